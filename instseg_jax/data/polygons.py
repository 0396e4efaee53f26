"""Geometry of polygons in annotations: cutting, turning, judging. Numpy only.

Drawing polygons is `masks.py`; there the rule is pycocotools'.
"""

import math

import numpy as np

ELLIPSE_CORNERS = 72
MIN_THICKNESS_PX = 1e-6  # a polygon thinner than that is a line


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


def draw_ellipse(center: np.ndarray, x_radius: float, y_radius: float, corners: int = ELLIPSE_CORNERS) -> np.ndarray:
    """An ellipse around `center` [2] (x, y) as a polygon [corners, 2]."""
    angles = 2 * math.pi * np.arange(corners) / corners
    return center + np.stack([x_radius * np.cos(angles), y_radius * np.sin(angles)], axis=1)


def turn_clockwise(points: np.ndarray, degrees: float, center: np.ndarray) -> np.ndarray:
    """Turn points [P, 2] (x, y) around `center` [2], clockwise as it is seen on the screen."""
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return (points - center) @ turn + center


def is_degenerate(points: np.ndarray) -> bool:
    """Whether the points [P, 2] of a polygon all lie on one line."""
    offsets = points - points[0]
    lengths = np.hypot(*offsets.T)
    farthest = offsets[lengths.argmax()]
    if lengths.max() < MIN_THICKNESS_PX:
        return True
    distances = np.abs(offsets[:, 0] * farthest[1] - offsets[:, 1] * farthest[0]) / lengths.max()
    return bool(distances.max() < MIN_THICKNESS_PX)


def crosses_itself(points: np.ndarray) -> bool:
    """Whether two sides of a polygon [P, 2] cross; touching corners do not count."""
    starts, ends = points, np.roll(points, -1, axis=0)
    sides = ends - starts

    def side_of(index: np.ndarray, others: np.ndarray) -> np.ndarray:
        """On which side of line `index` (rows) each of `others` (columns) lies: -1, 0, 1."""
        offset = others[None] - starts[index][:, None]
        return np.sign(sides[index][:, None, 0] * offset[..., 1] - sides[index][:, None, 1] * offset[..., 0])

    everything = np.arange(len(points))
    starts_apart = side_of(everything, starts) * side_of(everything, ends) < 0
    return bool((starts_apart & starts_apart.T).any())
