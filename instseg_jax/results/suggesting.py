"""Which pictures to label next: those that the model is unsure of, and that do not look like those chosen already."""

from collections.abc import Sequence

import cv2
import numpy as np

from instseg_jax.results.result import Result

SEEN = 0.1  # the lowest score that counts as a sign of an object
GRID = 4  # cells a side, of the look of a picture
LEAST = 0.05  # that a picture counts for by its look alone, where the model is sure


def uncertainty(scores: np.ndarray) -> float:
    """How unsure scores are, 0..1: the mean of 1 - |2 s - 1| over those of at least SEEN; 0 where there are none."""
    seen = np.asarray(scores, np.float64)
    seen = seen[seen >= SEEN]
    return float(np.mean(1 - np.abs(2 * seen - 1))) if len(seen) else 0.0


def describe(result: Result) -> np.ndarray:
    """What a picture looks like: its mean colours in GRID x GRID cells, and the shares of the classes seen in it.

    Each half has a length of about 1. Raises ValueError for a result without its picture.
    """
    if result.image is None:
        raise ValueError(f"The result of {result.input_path} has no picture to describe")
    cells = cv2.resize(result.image, (GRID, GRID), interpolation=cv2.INTER_AREA).astype(np.float64)
    counts = np.zeros(len(result.class_names))
    for box in result.boxes:
        counts[box["cls_id"]] += box["score"]
    return np.concatenate([cells.ravel() / 255 / np.sqrt(cells.size / 3), counts / max(counts.sum(), 1)])


def choose(uncertainties: Sequence[float], looks: np.ndarray, count: int) -> list[int]:
    """Choose `count` pictures, the most useful first.

    The first is the one with the highest uncertainty; each next one has the highest product of its uncertainty (at
    least LEAST) and its distance to the nearest look [n, D] that is chosen already.
    """
    weights = np.maximum(np.asarray(uncertainties, np.float64), LEAST)
    looks = np.asarray(looks, np.float64)
    chosen: list[int] = []
    nearest, is_left = np.ones(len(weights)), np.ones(len(weights), bool)
    for _ in range(min(count, len(weights))):
        i = int(np.argmax(np.where(is_left, weights * nearest, -1)))
        distances = np.linalg.norm(looks - looks[i], axis=1)
        nearest = distances if not chosen else np.minimum(nearest, distances)
        chosen.append(i)
        is_left[i] = False
    return chosen
