"""Boundaries of masks, for Boundary AP (Cheng et al., "Boundary IoU", CVPR 2021)."""

import math

import cv2
import numpy as np

from instseg_jax.masks import compress_rle, edges_to_rle, rle_runs

DISTANCE = 0.02  # of the image's diagonal, as published


def mask_boundary(rle: dict) -> dict:
    """The pixels of a mask that are closer to its edge than 2 % of the image's diagonal (Chebyshev), at least one.

    The picture's border is an edge too. Takes and returns an RLE; only the columns that the mask reaches are decoded.
    """
    height, width = rle["size"]
    distance = max(1, round(DISTANCE * math.hypot(height, width)))
    ends = np.cumsum(rle_runs(compress_rle(rle)))
    begins, ends = ends[: len(ends) // 2 * 2 : 2], ends[1::2]
    if not len(ends) or begins[0] == ends[-1]:
        return rle
    left, right = int(begins[0]) // height, (int(ends[-1]) - 1) // height + 1
    changes = np.zeros((right - left) * height, np.uint8)  # that wraps around: 255 is one less
    changes[begins - left * height] = 1
    is_inside = ends < right * height
    changes[ends[is_inside] - left * height] -= 1
    padded = np.zeros(len(changes) + 2, np.uint8)  # with a background pixel at either end
    np.cumsum(changes, dtype=np.uint8, out=padded[1:-1])
    columns = padded[1:-1].reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    part = columns[:, rows[0] : rows[-1] + 1]
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    inside = np.asarray(cv2.erode(np.pad(part, 1), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0), np.uint8)
    part -= inside[1:-1, 1:-1]
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return edges_to_rle(edges + left * height, (height, width))
