"""Does pasting objects of other pictures help?

Command:   python run.py sweep --config=configs/ablations/copy_paste.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores, a run on one: about five minutes.
Answer:    nothing beyond the spread: mAP@0.5 0.137 ± 0.010 without, 0.124 ± 0.019 with it; mAP 0.068 ± 0.006, 0.058 ±
           0.017.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({}, name="no")
    add({"data.augment.copy_paste_probability": 0.5}, name="half of the pictures")
