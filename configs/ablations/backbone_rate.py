"""How fast should the backbone learn, relative to the rest, when nothing is pretrained?

Command:   python run.py sweep --config=configs/ablations/backbone_rate.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores.
Answer:    not yet run.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({}, name="1")
    add({"optimizer.multipliers": ((r"^backbone/", 0.1),)}, name="0.1")
