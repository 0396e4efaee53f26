"""Small data sets (tens to a few thousand images): `--config=configs/finetune.py:l`, sizes n, s, m, l, x, h.

Command:   python run.py train --config=configs/finetune.py:l --config.data.dir=DIR --config.model.weights=WEIGHTS
           size n starts from the package's own weights (--config.model.weights= for nothing at all)
Source:    configs/mask_rtdetr.py, changed where its 72 epochs of COCO do not fit a few hundred images.
Measured:  with size n as it was before (a small PP-HGNetV2, weights of its own), 192 px, 4 images a step, against
           configs/mask_rtdetr.py:n in the same number of steps (seed 0; segm AP, AP50 at the end): fruits_nuts (14 / 4
           images), 501 steps: 0.656, 0.934, from nothing 0.259, 0.439, plain 0.000, 0.000. vhr10_mini (120 / 40
           images), 510 steps: 0.072, 0.126, from nothing 0.003, 0.005, plain 0.000, 0.000. The plain recipe is still in
           its warm-up of 2,000 steps then. With this size n fruits_nuts is at 0.783, 1.000,
           vhr10_mini at 0.145, 0.259. All with --config.data.image_size=192 --config.train.batch_size=4 and
           --config.train.epochs=167 or 17, evaluated once (--config.eval.every_epochs=167 or 17; more often,
           early stopping may end a run before). What each part brings: configs/ablations/recipe.py
"""

import mask_rtdetr
from ml_collections import ConfigDict

# Layers that a data set with other classes starts anew.
CLASS_LAYERS = r"^transformer/(score_head|denoising_class_embed)/"


def get_config(size: str = "l") -> ConfigDict:
    """The recipe for one size: n, s, m, l, x or h."""
    config = mask_rtdetr.get_config(size)
    is_small_start = size == "n"  # the package's own weights

    config.model.num_queries = 100  # more where images hold nearly as many objects
    if is_small_start:
        config.model.weights = "mask_rtdetr_n_pretrained"
        config.model.mask_enhanced = False  # boxes of masks that are noise yet mislead the decoder

    data = config.data
    data.train_sizes = (640,)  # one size: one compilation; the zoom below varies scale
    data.interpolations = ("linear",)
    data.refit_boxes = True
    data.drop_empty_masks = True
    data.augment.photometric_probability = 0.5
    data.augment.expand_probability = 0.0
    data.augment.crop_probability = 0.0
    data.augment.scale_jitter = (0.6, 1.6)

    config.denoising.num_denoising = 50
    config.loss.num_points = 4096

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-3 if is_small_start else 2e-4
    # Pretrained layers move slowly, new ones fast; neck and decoder of the small start have seen little.
    optimizer.multipliers = ((r"^backbone/", 0.1),) if is_small_start else ((CLASS_LAYERS, 5.0), (r"^backbone/", 0.1))
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 100
    optimizer.clip_norm = 1.0
    optimizer.ema_decay = 0.998
    optimizer.ema_ramp_steps = 200

    config.train.epochs = 60
    config.train.batch_size = 4
    config.train.early_stopping = 6
    config.eval.every_epochs = 5
    config.checkpoint.every_steps = 500
    return config


def search(space) -> None:
    """What `sweep --search=optuna` tries."""
    space.float("optimizer.learning_rate", 1e-4, 3e-3, log=True)
    space.float("data.augment.copy_paste_probability", 0.0, 0.5)
    space.choice("data.augment.photometric_probability", (0.2, 0.5, 0.8))
    space.choice("model.num_queries", (50, 100, 200))
