"""What all ablations start from: size N from scratch on balloon (61 / 13 photographs, one class), minutes on a CPU.

Command:  python run.py train --config=configs/ablations/base.py --config.data.dir=balloon --workdir=runs/base
Source:   configs/quickstart.py with smaller pictures and milder augmentation: 1,500 steps of 4 images.

Measured: with N as it was before (a small PP-HGNetV2), seeds 0 and 1: mAP@0.5 0.130 and 0.144, mAP
          0.064 and 0.073; about five minutes a run on one core. 600
          steps, tried before, gave 0.077 and 0.045 (seed 0). 13 validation images hold 50 objects: one of them is
          0.02 of recall, so "no difference beyond the spread of seeds" is to be expected of small effects.

Scores are those of the best of four evaluations. Sweeps that share a workdir share the runs of this base.
"""

import quickstart
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; it takes no argument."""
    if arg:
        raise ValueError(f"configs/ablations/base.py takes no argument, it was given {arg!r}")
    config = quickstart.get_config()
    config.data.dir = ""
    config.data.image_size = 128
    config.data.train_sizes = (128,)
    config.data.augment.scale_jitter = (0.8, 1.3)
    config.train.epochs = 100
    config.eval.every_epochs = 25
    config.checkpoint.every_steps = 400
    config.checkpoint.keep = 1
    return config
