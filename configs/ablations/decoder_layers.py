"""How many decoder layers?

Command:   python run.py sweep --config=configs/ablations/decoder_layers.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores.
Answer:    not yet run.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({"model.num_decoder_layers": 1}, name="1")
    add({}, name="3")
    add({"model.num_decoder_layers": 6}, name="6")
