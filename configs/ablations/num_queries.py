"""How many queries?

Command:   python run.py sweep --config=configs/ablations/num_queries.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores, a run on one: about five minutes.
Answer:    more is better: mAP@0.5 0.110 ± 0.007 with 20, 0.137 ± 0.010 with 50, 0.160 ± 0.001 with 100; mAP 0.055 ±
           0.001, 0.068 ± 0.006, 0.084 ± 0.004.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({"model.num_queries": 20}, name="20")
    add({}, name="50")
    add({"model.num_queries": 100}, name="100")
