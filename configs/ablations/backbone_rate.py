"""How fast should the backbone learn, relative to the rest, when nothing is pretrained?

Command:   python run.py sweep --config=configs/ablations/backbone_rate.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores, a run on one: about five minutes.
Answer:    as fast, where nothing is pretrained: mAP@0.5 0.137 ± 0.010 (mAP 0.068 ± 0.006) against 0.064 ± 0.007
           (0.032 ± 0.008) at a tenth of the rate.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({}, name="1")
    add({"optimizer.multipliers": ((r"^backbone/", 0.1),)}, name="0.1")
