"""Do noised objects fed beside the queries help?

Command:   python run.py sweep --config=configs/ablations/denoising.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores, a run on one: about five minutes.
Answer:    yes: mAP@0.5 0.094 ± 0.020 without, 0.137 ± 0.010 with 20, 0.165 ± 0.010 with 60; mAP 0.049 ± 0.004,
           0.068 ± 0.006, 0.065 ± 0.018.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({"denoising.num_denoising": 0}, name="none")
    add({}, name="20")
    add({"denoising.num_denoising": 60}, name="60")
