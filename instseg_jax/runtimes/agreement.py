"""How far two programs that detect agree, on the same images, detection by detection.

Detections come by falling score, so nearly equal ones may change places: they are paired by class and box before
anything is compared.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from instseg_jax.types import Detections

Detect = Callable[[np.ndarray], Detections]

SCORE_FLOOR = 0.05  # detections of the reference below it are not looked for
LEAST_COMPARED = 10  # detections an image that are compared where no image has any above the floor
PAIR_IOU = 0.5  # of the boxes of a pair


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
    return compare(wanted, found)


def compare(wanted: Sequence[Found], found: Sequence[Found]) -> dict[str, Any]:
    """What `compare_runs` says, of the detections of each image."""
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
            ious.append(float(mask_iou(one.mask_logits[i] > 0, other.mask_logits[j] > 0)))
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
    iou = box_iou(one.boxes_xyxy[:count, None], other.boxes_xyxy[None])
    same = one.labels[:count, None] == other.labels[None]
    distance = 1 - iou + np.abs(one.scores[:count, None] - other.scores[None])
    distance[~same | (iou < PAIR_IOU)] = np.inf
    pairs = []
    while distance.size and np.isfinite(distance.min()):
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        pairs.append((int(i), int(j)))
        distance[i], distance[:, j] = np.inf, np.inf
    return pairs


def _of_first(detections: Detections) -> Found:
    """The detections of the first image of a batch."""
    fields = (detections.scores, detections.labels, detections.boxes_xyxy, detections.mask_logits)
    return Found(*(np.asarray(field)[0] for field in fields))


def box_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of xyxy boxes that broadcast, [..., 4]; 0 where both are empty."""
    corners = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    both = np.prod(np.maximum(corners[1] - corners[0], 0), axis=-1)
    union = _area(one) + _area(other) - both
    return both / np.where(union > 0, union, 1)


def mask_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of masks [..., h, w] bool; 1 where both are empty."""
    union = np.count_nonzero(one | other, axis=(-2, -1))
    return np.where(union, np.count_nonzero(one & other, axis=(-2, -1)) / np.maximum(union, 1), 1.0)


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)
