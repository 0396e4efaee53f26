"""What should the class score of a matched query aim at: the IoU of masks, of boxes, or 1?

Command:   python run.py sweep --config=configs/ablations/iou_target.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores.
Answer:    not yet run.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({}, name="mask IoU")
    add({"loss.iou_target": "box"}, name="box IoU")
    add({"loss.iou_target": "none", "loss.aux_iou_target": "none"}, name="1")
