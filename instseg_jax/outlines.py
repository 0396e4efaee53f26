"""Outlines of masks: from an RLE to polygons with holes, along the edges of the pixels.

Corner (0, 0) is the top left corner of the top left pixel, so that an outline encloses exactly the pixels of its mask
and its area is their number. Pixels that only touch at a corner are apart: every ring is simple, and rings meet in
single points at the most, as OGC's formats want it. Files made of outlines are in `formats.py` and `geo.py`.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from instseg_jax.crops import crop_rle
from instseg_jax.masks import compress_rle, rle_box_xyxy_px

# Steps along the four directions right, down, left, up, as (x, y). The object lies to the right of an edge.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


@dataclasses.dataclass(frozen=True)
class Polygon:
    """One connected part of a mask: its outer ring [P, 2] (x, y) in pixels and the rings of its holes, not closed.

    On the screen (y down) the outer ring runs clockwise and holes run counter-clockwise.
    """

    outer: np.ndarray
    holes: tuple[np.ndarray, ...]

    @property
    def area(self) -> float:
        """Area in square pixels, without the holes."""
        return abs(ring_area(self.outer)) - sum(abs(ring_area(hole)) for hole in self.holes)


def rle_to_polygons(rle: dict, *, tolerance: float = 0.0) -> list[Polygon]:
    """Trace a mask's parts, the largest first, as float64 rings along pixel edges in the whole image's frame.

    `tolerance` in pixels is how far a simplified ring may run from the exact one (0: exact); a ring that would
    lose its area stays exact. Simplified rings may cross each other where they nearly touch.
    """
    rle = compress_rle(rle)
    x1, y1, x2, y2 = rle_box_xyxy_px(rle)
    if x2 <= x1 or y2 <= y1:
        return []

    def place(ring: np.ndarray) -> np.ndarray:
        return _simplify(ring, tolerance).astype(np.float64) + np.array([x1, y1])

    traced = _trace_parts(crop_rle(rle, (x1, y1, x2, y2)))
    parts = [Polygon(place(outer), tuple(place(hole) for hole in holes)) for outer, holes in traced]
    return sorted(parts, key=lambda polygon: -polygon.area)


def ring_area(ring: np.ndarray) -> float:
    """Signed area of a ring [P, 2]: positive when it runs clockwise on the screen (y down)."""
    x, y = ring[:, 0], ring[:, 1]
    return 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def bridge_holes(polygon: Polygon) -> np.ndarray:
    """Make one ring [P, 2] of a polygon, for formats without holes: drawn as one polygon, it leaves them open."""
    return join_rings([polygon.outer, *sorted(polygon.holes, key=lambda hole: -abs(ring_area(hole)))])


def join_rings(rings: Sequence[np.ndarray]) -> np.ndarray:
    """Join rings [P, 2] to one ring, in their order.

    Each is joined to the nearest corner of what is joined already by a cut of no width, walked in both directions.
    """
    joined = rings[0]
    for ring in rings[1:]:
        distances = ((joined[:, None] - ring[None]) ** 2).sum(axis=2)
        at, start = np.unravel_index(np.argmin(distances), distances.shape)
        cut = np.concatenate([np.roll(ring, -start, axis=0), ring[start : start + 1]])
        joined = np.concatenate([joined[: at + 1], cut, joined[at:]])
    return joined


def _simplify(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Leave out corners (Douglas-Peucker) of an integer ring [P, 2], unless nothing would be left of it."""
    if tolerance <= 0:
        return ring
    simple = cv2.approxPolyDP(ring.astype(np.int32)[:, None], tolerance, True)[:, 0]
    return simple if len(simple) >= 3 and ring_area(simple.astype(np.float64)) else ring


def _trace_parts(mask: np.ndarray) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Outer ring and hole rings [P, 2] of each 4-connected part of a mask [h, w]."""
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    count, parts = cv2.connectedComponents(padded, connectivity=4)
    outers: list[np.ndarray | None] = [None] * count
    holes: list[list[np.ndarray]] = [[] for _ in range(count)]
    for part, ring in _trace_rings(padded, parts):
        if ring_area(ring) > 0:
            outers[part] = ring
        else:
            holes[part].append(ring)
    return [(outer, inner) for outer, inner in zip(outers, holes, strict=True) if outer is not None]


def _trace_rings(padded: np.ndarray, parts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Walk the borders of a padded mask, object to the right: (part, simple ring [P, 2]) in the unpadded frame.

    At a corner where only diagonal pixels are set, the walk turns right and so stays with its own pixel. A ring that
    meets itself in such a corner is split there.
    """
    inside = padded != 0
    # An edge leaves corner (x, y), the top left of pixel (x, y), in direction d.
    leaves = np.zeros((4, padded.shape[0] + 1, padded.shape[1] + 1), bool)
    leaves[0, 1:-1, :-1] = inside[1:] & ~inside[:-1]  # along the top of a pixel, to the right
    leaves[1, :-1, 1:-1] = inside[:, :-1] & ~inside[:, 1:]  # down its right side
    leaves[2, 1:-1, 1:] = inside[:-1] & ~inside[1:]  # along its bottom, to the left
    leaves[3, 1:, 1:-1] = inside[:, 1:] & ~inside[:, :-1]  # up its left side
    rings = []
    for y, x in zip(*np.nonzero(leaves[0]), strict=True):
        if leaves[0, y, x]:
            corners = _walk(leaves, int(x), int(y))
            for ring in _split_at_repeats(corners):
                rings.append((int(parts[y, x]), _without_straight(np.array(ring)) - 1))
    return rings


def _walk(leaves: np.ndarray, x: int, y: int) -> list[tuple[int, int]]:
    """Follow edges from the one that leaves a corner rightwards until it comes again; takes them off `leaves`."""
    corners, direction, start = [(x, y)], 0, (x, y)
    while True:
        x, y = x + STEPS[direction][0], y + STEPS[direction][1]
        # Right turn, straight on, left turn: in this order the walk stays with its own pixel.
        direction = next(d for turn in (1, 0, 3) if leaves[d := (direction + turn) % 4, y, x])
        leaves[direction, y, x] = False
        if (x, y) == start and direction == 0:
            return corners
        corners.append((x, y))


def _split_at_repeats(corners: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Part a closed walk into rings that pass each corner once."""
    rings: list[list[tuple[int, int]]] = []
    path: list[tuple[int, int]] = []
    position: dict[tuple[int, int], int] = {}
    for corner in corners:
        if corner in position:
            start = position[corner]
            rings.append(path[start:])
            for passed in path[start + 1 :]:
                del position[passed]
            del path[start + 1 :]
        else:
            position[corner] = len(path)
            path.append(corner)
    return [*rings, path]


def _without_straight(ring: np.ndarray) -> np.ndarray:
    """Leave out the corners at which a ring [P, 2] does not turn."""
    step = np.roll(ring, -1, axis=0) - ring
    return ring[(step != np.roll(step, 1, axis=0)).any(axis=1)]
