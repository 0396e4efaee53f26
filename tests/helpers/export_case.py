"""A small checkpoint whose scores, boxes and masks differ from image to image, for tests of exports."""

import json
from pathlib import Path

import numpy as np

from instseg_jax.config import load_config
from instseg_jax.models.mask_rtdetr import build_model, initial_variables
from instseg_jax.weights import checkpoint

CLASS_NAMES = ("building", "tree", "car")
CATEGORY_IDS = (7, 3, 90)
SIZE = 64
QUERIES = 12
DETECTIONS = 10


def make_run(folder: Path, overrides: dict[str, str] | None = None) -> Path:
    """Write a run whose best model is size N with one decoder layer and lively heads; returns its folder."""
    settings = {
        "data.image_size": str(SIZE),
        "model.num_queries": str(QUERIES),
        "model.num_decoder_layers": "1",
        "eval.num_detections": str(DETECTIONS),
        "eval.batch_size": "4",
        "eval.boundary": "False",
    }
    config = load_config("configs/quickstart.py", settings | (overrides or {}))
    model = build_model(config.model, len(CLASS_NAMES))
    variables = initial_variables(model, seed=3, channels=config.data.channels)
    rng = np.random.default_rng(0)
    heads = variables["params"]["transformer"]
    # Fresh heads give every query the same score and box.
    heads["score_head"]["kernel"] *= 6
    heads["score_head"]["bias"][:] = [-1.0, -3.0, -4.0]
    heads["bbox_head"]["layers_2"]["kernel"][:] = rng.normal(0, 0.2, heads["bbox_head"]["layers_2"]["kernel"].shape)
    metadata = {
        "config": json.loads(config.to_json_best_effort()),
        "class_names": list(CLASS_NAMES),
        "category_ids": list(CATEGORY_IDS),
        "step": 1,
        "score": None,
    }
    checkpoint.save_inference_checkpoint(folder / checkpoint.BEST_MODEL, variables, metadata)
    return folder


def same_instances(one, other, *, score: float = 1e-3, pixels: float = 0.05) -> bool:
    """Whether two results hold the same instances, in order, to a tolerance."""
    if len(one) != len(other) or not len(one):
        return False
    return all(
        (a["label"], a["cls_id"]) == (b["label"], b["cls_id"])
        and abs(a["score"] - b["score"]) <= score
        and np.abs(np.subtract(a["coordinate"], b["coordinate"])).max() <= pixels
        for a, b in zip(one.boxes, other.boxes, strict=True)
    )
