"""How many decoder layers?

Command:   python run.py sweep --config=configs/ablations/decoder_layers.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores, a run on one: about five minutes.
Answer:    three, or six: mAP@0.5 0.077 ± 0.006 with 1, 0.137 ± 0.010 with 3, 0.151 ± 0.011 with 6; mAP 0.045 ± 0.010,
           0.068 ± 0.006, 0.060 ± 0.004.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({"model.num_decoder_layers": 1}, name="1")
    add({}, name="3")
    add({"model.num_decoder_layers": 6}, name="6")
