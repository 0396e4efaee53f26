"""Do noised objects fed beside the queries help?

Command:   python run.py sweep --config=configs/ablations/denoising.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores.
Answer:    not yet run.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({"denoising.num_denoising": 0}, name="none")
    add({}, name="20")
    add({"denoising.num_denoising": 60}, name="60")
