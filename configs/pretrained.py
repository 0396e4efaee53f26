"""The weights of size N that come with the package: `mask_rtdetr_n_pretrained`, 13 classes of everyday things.

Command:   python run.py train --config=configs/pretrained.py --config.data.dir=DIR --workdir=runs/pretrained
Data:      167 training and 30 validation photographs, listed in instseg_jax/weights/pretrained/SOURCES.md.
Measured:  MEASURED
"""

import quickstart
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """The recipe; it takes no argument."""
    if arg:
        raise ValueError(f"configs/pretrained.py takes no argument, it was given {arg!r}")
    config = quickstart.get_config()
    config.model.num_queries = 100
    config.data.dir = ""
    config.data.image_size = 256
    config.data.train_sizes = (256,)
    config.data.max_instances = 50
    config.data.augment.scale_jitter = (0.7, 1.6)
    config.data.augment.copy_paste_probability = 0.3
    config.data.augment.photometric_probability = 0.7
    config.denoising.num_denoising = 40
    config.loss.num_points = 2048
    config.optimizer.ema_decay = 0.999
    config.optimizer.ema_ramp_steps = 400
    config.train.epochs = 60
    config.eval.every_epochs = 20
    return config
