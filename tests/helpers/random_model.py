"""Small networks with random weights and batch statistics, for what must not change a network's outputs."""

import dataclasses

import jax
import numpy as np

from instseg_jax.models.mask_rtdetr import MaskRTDETR, initial_variables, make_model
from instseg_jax.models.variants import Stage

SMALL_STAGES = (
    Stage(16, 48, 1, False, False, 3, 3),
    Stage(24, 96, 1, True, False, 3, 3),
    Stage(48, 192, 1, True, True, 5, 3),
    Stage(64, 256, 1, True, True, 5, 3),
)


def small_model(*, like: str = "s", num_classes: int = 3, num_queries: int = 12) -> MaskRTDETR:
    """Size N; or a small PP-HGNetV2 with what sets S and L apart: the neck's inner width, the level with attention."""
    model = make_model("mask_rtdetr_n", num_classes=num_classes, num_queries=num_queries)
    if like == "n":
        return model
    backbone = {"stem_channels": (16, 16), "stages": SMALL_STAGES, "lite_stages": ()}
    changes = {
        "s": {"csp_expansion": 0.5, "attention_level": 1, "num_csp_blocks": 3},
        "l": {"csp_expansion": 1.0, "attention_level": 2, "num_csp_blocks": 2, "num_prototypes": 8},
    }
    return model.clone(variant=dataclasses.replace(model.variant, **backbone, **changes[like]))


def random_variables(model: MaskRTDETR, *, seed: int = 0, channels: int = 3) -> dict:
    """Initial values, moved so that no norm is the identity, no offset zero, and no score a tie."""
    rng = np.random.default_rng(seed)

    def moved(path, x):
        name = path[-1].key
        if name in ("scale", "var"):
            return (x * rng.uniform(0.6, 1.4, x.shape)).astype(x.dtype)
        return (x + rng.normal(0, 0.1 if x.ndim == 1 else 0.02, x.shape)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(moved, initial_variables(model, seed=seed, channels=channels))


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).random(shape, np.float32)
