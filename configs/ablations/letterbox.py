"""Stretch pictures to a square, or keep their shape and fill the rest?

Command:   python run.py sweep --config=configs/ablations/letterbox.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores, a run on one: about five minutes.
Answer:    keep their shape: mAP@0.5 0.180 ± 0.005 against 0.137 ± 0.010 stretched; mAP 0.084 ± 0.012, 0.068 ± 0.006.
           Balloons are round, which stretching hides; pictures of other things may answer otherwise.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({}, name="stretch")
    add({"data.resize": "letterbox"}, name="letterbox")
