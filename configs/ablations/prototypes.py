"""How many prototypes should masks be made of?

Command:   python run.py sweep --config=configs/ablations/prototypes.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores.
Answer:    not yet run.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({"model.num_prototypes": 8}, name="8")
    add({}, name="32")
    add({"model.num_prototypes": 128}, name="128")
