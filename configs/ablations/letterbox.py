"""Stretch pictures to a square, or keep their shape and fill the rest?

Command:   python run.py sweep --config=configs/ablations/letterbox.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores.
Answer:    not yet run.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({}, name="stretch")
    add({"data.resize": "letterbox"}, name="letterbox")
