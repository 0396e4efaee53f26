"""What should the class score of a matched query aim at: the IoU of masks, of boxes, or 1?

Command:   python run.py sweep --config=configs/ablations/iou_target.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores, a run on one: about five minutes.
Answer:    the IoU of masks: mAP@0.5 0.137 ± 0.010, of boxes 0.104 ± 0.056, 1 in all layers 0.065 ± 0.008; mAP 0.068 ±
           0.006, 0.058 ± 0.013, 0.031 ± 0.010. Between masks and boxes the spread is as large as the difference.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({}, name="mask IoU")
    add({"loss.iou_target": "box"}, name="box IoU")
    add({"loss.iou_target": "none", "loss.aux_iou_target": "none"}, name="1")
