"""What all ablations start from: size N from scratch on balloon (61 / 13 photographs, one class), minutes on a CPU.

Command:  python run.py train --config=configs/ablations/base.py --config.data.dir=balloon --workdir=runs/base
Source:   configs/quickstart.py with smaller pictures and milder augmentation, so that 720 steps of 2 images suffice.

Scores are those of the last step: there is no evaluation before it, so no choice among evaluations.
Sweeps that share a workdir share the runs of this base.
"""

import quickstart
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; it takes no argument."""
    if arg:
        raise ValueError(f"configs/ablations/base.py takes no argument, it was given {arg!r}")
    config = quickstart.get_config()
    config.model.num_queries = 30
    config.data.dir = ""
    config.data.image_size = 128
    config.data.train_sizes = (128,)
    config.data.max_instances = 30
    config.data.augment.scale_jitter = (0.8, 1.3)
    config.loss.num_points = 512
    config.train.epochs = 24
    config.train.batch_size = 2
    config.eval.every_epochs = 24
    config.checkpoint.every_steps = 250
    config.checkpoint.keep = 1
    return config
