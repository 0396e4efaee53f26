"""Does an export find what the checkpoint finds? Both are run on the same images and compared, detection by detection.

Detections come by falling score, so nearly equal ones may change places: they are paired by class and box before
anything is compared.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from instseg_jax.boxes import box_iou
from instseg_jax.types import Detections

Detect = Callable[[np.ndarray], Detections]

SCORE_FLOOR = 0.05  # detections of the checkpoint below it are not looked for in the export
LEAST_COMPARED = 10  # detections an image that are compared where no image has any above the floor
PAIR_IOU = 0.5  # of the boxes of a pair

# What is still all right, by precision: least share of detections found again, least mean mask IoU, and the largest
# loss of AP. Float32 exports differ by rounding alone; the others are for the reader to judge from these on.
BOUNDS = {
    "float32": {"matched_share": 0.99, "mask_iou_mean": 0.99, "ap_loss": 0.002},
    "bfloat16": {"matched_share": 0.95, "mask_iou_mean": 0.95, "ap_loss": 0.005},
    "float16": {"matched_share": 0.98, "mask_iou_mean": 0.98, "ap_loss": 0.005},
    "int8": {"matched_share": 0.85, "mask_iou_mean": 0.90, "ap_loss": 0.01},
}


@dataclasses.dataclass(frozen=True)
class Found:
    """The detections of one image in numpy, by falling score."""

    scores: np.ndarray  # [T]
    labels: np.ndarray  # [T]
    boxes_xyxy: np.ndarray  # [T, 4] normalised
    mask_logits: np.ndarray  # [T, h, w]


def compare_runs(reference: Detect, exported: Detect, images: Sequence[np.ndarray]) -> dict[str, Any]:
    """Detect both on images [H, W, C] float32, one at a time, and compare.

    Returns: `compared` detections of the reference, `matched_share` of them found by the export with the same class
      and a box IoU of at least 0.5, `largest_difference` of scores (0..1), boxes_xyxy (normalised) and mask_logits over
      the pairs, and mask_iou_mean and mask_iou_min of their masks on the network's grid.
    """
    wanted = [_of_first(reference(image[None])) for image in images]
    found = [_of_first(exported(image[None])) for image in images]
    is_any = any((one.scores >= SCORE_FLOOR).any() for one in wanted)
    compared, differences, ious = 0, [], []
    for one, other in zip(wanted, found, strict=True):
        count = int((one.scores >= SCORE_FLOOR).sum()) if is_any else min(LEAST_COMPARED, len(one.scores))
        compared += count
        for i, j in pair_detections(one, other, count):
            differences.append(
                [
                    float(np.abs(np.float32(getattr(one, name)[i]) - np.float32(getattr(other, name)[j])).max())
                    for name in ("scores", "boxes_xyxy", "mask_logits")
                ]
            )
            ious.append(_mask_iou(one.mask_logits[i] > 0, other.mask_logits[j] > 0))
    largest = np.max(differences, axis=0).tolist() if differences else [None] * 3
    return {
        "compared": compared,
        "matched_share": len(ious) / compared,
        "largest_difference": dict(zip(("scores", "boxes_xyxy", "mask_logits"), largest, strict=True)),
        "mask_iou_mean": float(np.mean(ious)) if ious else None,
        "mask_iou_min": float(np.min(ious)) if ious else None,
    }


def pair_detections(one: Found, other: Found, count: int) -> list[tuple[int, int]]:
    """Pairs (index in `one`, index in `other`) for the first `count` of one image's detections, nearest first.

    Near are detections of the same class with like score and box; each goes into one pair.
    """
    iou = np.array(box_iou(jnp.asarray(one.boxes_xyxy[:count, None]), jnp.asarray(other.boxes_xyxy[None])))
    same = one.labels[:count, None] == other.labels[None]
    distance = 1 - iou + np.abs(one.scores[:count, None] - other.scores[None])
    distance[~same | (iou < PAIR_IOU)] = np.inf
    pairs = []
    while distance.size and np.isfinite(distance.min()):
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        pairs.append((int(i), int(j)))
        distance[i], distance[:, j] = np.inf, np.inf
    return pairs


def find_warnings(report: dict[str, Any], precision: str) -> list[str]:
    """What of a comparison is beyond the bounds of its precision, one sentence each."""
    bounds = BOUNDS[precision]
    warnings = []
    for name, what in (("matched_share", "share of detections found again"), ("mask_iou_mean", "mean mask IoU")):
        value = report[name]
        if value is None or value < bounds[name]:
            shown = "not known" if value is None else f"{value:.4f}"
            warnings.append(f"the {what} is {shown}, below {bounds[name]} for {precision}")
    scored = report.get("ap")
    if scored and scored["loss"] is not None and scored["loss"] > bounds["ap_loss"]:
        warnings.append(f"the export loses {scored['loss']:.4f} mask AP, more than {bounds['ap_loss']} for {precision}")
    return warnings


def _of_first(detections: Detections) -> Found:
    """The detections of the first image of a batch."""
    fields = (detections.scores, detections.labels, detections.boxes_xyxy, detections.mask_logits)
    return Found(*(np.asarray(field)[0] for field in fields))


def _mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0
