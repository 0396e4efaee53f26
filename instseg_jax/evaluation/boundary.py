"""Boundaries of masks, for Boundary AP (Cheng et al., "Boundary IoU", CVPR 2021)."""

import math

import cv2
import numpy as np
from pycocotools import mask as mask_api

from instseg_jax.masks import rle_box_xyxy_px

DISTANCE = 0.02  # of the image's diagonal, as published


def mask_boundary(rle: dict) -> dict:
    """The pixels of a mask that are closer to its edge than 2 % of the image's diagonal (Chebyshev), at least one.

    The picture's border is an edge too. Takes and returns an RLE of compressed counts. Only the mask's box is decoded
    to pixels at a time.
    """
    height, width = rle["size"]
    distance = max(1, round(DISTANCE * math.hypot(height, width)))
    x1, y1, x2, y2 = rle_box_xyxy_px(rle)
    if x1 >= x2:
        return rle
    mask = mask_api.decode(rle)
    inside = np.pad(mask[y1:y2, x1:x2], 1)
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    inside = cv2.erode(inside, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    mask[y1:y2, x1:x2] -= inside[1:-1, 1:-1]
    return mask_api.encode(mask)
