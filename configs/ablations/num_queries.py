"""How many queries?

Command:   python run.py sweep --config=configs/ablations/num_queries.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores.
Answer:    not yet run.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({"model.num_queries": 20}, name="20")
    add({}, name="50")
    add({"model.num_queries": 100}, name="100")
