"""Boundaries of masks: for Boundary AP (Cheng et al., "Boundary IoU", CVPR 2021), and how far edges are apart."""

import dataclasses
import math
from collections.abc import Iterable

import cv2
import numpy as np

from instseg_jax.masks import compress_rle, edges_to_rle, rle_runs

DISTANCE = 0.02  # of the image's diagonal, as published


@dataclasses.dataclass(frozen=True)
class Edges:
    """How far the edges of masks lie from those of the objects that they were matched with."""

    num_pairs: int
    median_px: float  # over the pairs, of the mean distance of their edges, both ways
    p90_px: float
    band_px: float  # median width of the band that Boundary AP looks at

    def say(self) -> str:
        """All of it in one sentence."""
        return (
            f"The edges of {self.num_pairs} matched masks are off by {self.median_px:.1f} px (median; a tenth of them "
            f"by more than {self.p90_px:.1f} px); Boundary AP looks at a band of {self.band_px:g} px."
        )


def band_width(size: tuple[int, int]) -> int:
    """Pixels from the edge that belong to the boundary, in a picture of size (height, width)."""
    return max(1, round(DISTANCE * math.hypot(*size)))


def measure_edges(pairs: Iterable[tuple[dict, dict]]) -> Edges | None:
    """Measure pairs of masks (RLE of one size each); None where no pair has edges."""
    measured = [(edge_distance(a, b), band_width(tuple(a["size"]))) for a, b in pairs]
    known = np.array([pair for pair in measured if pair[0] is not None], np.float64)
    if not len(known):
        return None
    median, p90 = np.percentile(known[:, 0], (50, 90)).tolist()
    return Edges(len(known), median, p90, float(np.median(known[:, 1])))


def edge_distance(a: dict, b: dict) -> float | None:
    """Mean distance in pixels from the edge of a mask (RLE) to the nearest point of the other's, both ways.

    An edge is the outermost pixels of a mask; the border of the picture is none. None where a mask has no edge.
    """
    height, width = a["size"]
    decoded = [found for found in map(_decode_columns, (a, b)) if found is not None]
    if len(decoded) < 2:
        return None
    known = [(left, padded[1:-1].reshape(-1, height)) for left, padded in decoded]
    left = max(0, min(start for start, _ in known) - 1)
    right = min(width, max(start + len(columns) for start, columns in known) + 1)
    edges = []
    for start, columns in known:
        mask = np.zeros((right - left, height), np.uint8)
        mask[start - left : start - left + len(columns)] = columns
        edges.append(mask.astype(bool) & ~cv2.erode(mask, np.ones((3, 3), np.uint8)).astype(bool))
    if not edges[0].any() or not edges[1].any():
        return None
    rows = np.flatnonzero((edges[0] | edges[1]).any(axis=0))
    edges = [edge[:, rows[0] : rows[-1] + 1] for edge in edges]
    far = [cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for edge in edges]
    return float(np.concatenate([far[1][edges[0]], far[0][edges[1]]]).mean())


def _decode_columns(rle: dict) -> tuple[int, np.ndarray] | None:
    """First column that a mask reaches, and its columns to the last one, flat, a background pixel at either end."""
    height, _ = rle["size"]
    ends = np.cumsum(rle_runs(compress_rle(rle)))
    begins, ends = ends[: len(ends) // 2 * 2 : 2], ends[1::2]
    if not len(ends) or begins[0] == ends[-1]:
        return None
    left, right = int(begins[0]) // height, (int(ends[-1]) - 1) // height + 1
    changes = np.zeros((right - left) * height, np.uint8)  # that wraps around: 255 is one less
    changes[begins - left * height] = 1
    is_inside = ends < right * height
    changes[ends[is_inside] - left * height] -= 1
    padded = np.zeros(len(changes) + 2, np.uint8)
    np.cumsum(changes, dtype=np.uint8, out=padded[1:-1])
    return left, padded


def mask_boundary(rle: dict) -> dict:
    """The pixels of a mask that are closer to its edge than 2 % of the image's diagonal (Chebyshev), at least one.

    The picture's border is an edge too. Takes and returns an RLE; only the columns that the mask reaches are decoded.
    """
    height, width = rle["size"]
    distance = band_width((height, width))
    decoded = _decode_columns(rle)
    if decoded is None:
        return rle
    left, padded = decoded
    columns = padded[1:-1].reshape(-1, height)
    rows = np.flatnonzero(columns.any(axis=0))
    part = columns[:, rows[0] : rows[-1] + 1]
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    inside = np.asarray(cv2.erode(np.pad(part, 1), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0), np.uint8)
    part -= inside[1:-1, 1:-1]
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return edges_to_rle(edges + left * height, (height, width))
