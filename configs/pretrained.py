"""The weights of size N that come with the package: `mask_rtdetr_n_pretrained`, buildings, balloons and COCO's groups.

Command:   python run.py train --config=configs/pretrained.py --config.data.dir=DIR --workdir=runs/pretrained
Data:      245 training and 70 validation photographs: instseg_jax/weights/pretrained/SOURCES.md.
Measured:  segm AP 0.040, AP50 0.077 over 14 classes, most of them not learned (building AP 0.339, balloon 0.142),
           seed 0, 10,980 steps of 4 images, 1.6 hours on one CPU core.
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
    config.data.max_instances = 40
    config.data.augment.photometric_probability = 0.8
    config.data.augment.scale_jitter = (0.6, 1.8)
    config.data.augment.copy_paste_probability = 0.3
    config.denoising.num_denoising = 50
    config.loss.num_points = 2048
    config.optimizer.ema_decay = 0.999
    config.optimizer.ema_ramp_steps = 400
    config.train.epochs = 180
    config.eval.every_epochs = 20
    config.checkpoint.every_steps = 1000
    return config
