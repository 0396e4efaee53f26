"""Geometry of polygons in COCO annotations: cutting, moving, and tracing masks. Numpy and OpenCV only.

Drawing polygons is `masks.py`; there the rule is pycocotools'.
"""

import cv2
import numpy as np


def clip_polygon(points: np.ndarray, height: float, width: float) -> np.ndarray:
    """Cut a polygon [P, 2] (x, y) at the border of a picture (Sutherland and Hodgman 1974); [0, 2] if none is left."""
    for axis, limit, keeps_below in ((0, 0.0, False), (0, width, True), (1, 0.0, False), (1, height, True)):
        if not len(points):
            break
        inside = points[:, axis] <= limit if keeps_below else points[:, axis] >= limit
        kept: list[np.ndarray] = []
        for i, point in enumerate(points):
            before = points[i - 1]
            if inside[i] != inside[i - 1]:
                part = (limit - before[axis]) / (point[axis] - before[axis])
                crossing = before + part * (point - before)
                crossing[axis] = limit
                kept.append(crossing)
            if inside[i]:
                kept.append(point)
        points = np.array(kept, np.float64).reshape(-1, 2)
    return points


def turn_points(points: np.ndarray, orientation: int, height: float, width: float) -> np.ndarray:
    """Move points [P, 2] of a picture as stored (height x width) to where EXIF's orientation (1..8) turns them."""
    x, y = points[:, 0], points[:, 1]
    if orientation in (5, 6, 7, 8):
        moved = {5: (y, x), 6: (height - y, x), 7: (height - y, width - x), 8: (y, width - x)}[orientation]
    else:
        moved = {1: (x, y), 2: (width - x, y), 3: (width - x, height - y), 4: (x, height - y)}[orientation]
    return np.stack(moved, axis=1)


def polygon_area(points: np.ndarray) -> float:
    """Area of a polygon [P, 2] that does not cross itself, in square pixels."""
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def has_holes(mask: np.ndarray) -> bool:
    """Whether a binary mask [H, W] encloses background: polygons, of which COCO draws the union, can't say that."""
    padded = np.pad(mask == 0, 1, constant_values=True).astype(np.uint8)
    return bool(cv2.connectedComponents(padded, connectivity=4)[0] > 2)
