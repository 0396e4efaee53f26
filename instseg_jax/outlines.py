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

# Corners are told apart by the pixels around them: 1 above left, 2 above right, 4 below left, 8 below right.
RISING, FALLING = 6, 9  # only diagonal pixels are set
TURNS = np.array([0, 1, 1, 0, 1, 0, 2, 1, 1, 2, 0, 1, 0, 1, 1, 0])  # of outlines, for each of the 16
IS_TURN = (np.arange(256) < 16).astype(np.uint8) * np.resize(TURNS > 0, 256)  # a table of cv2.LUT
# Where a turn goes on: along the row, and there to the right (of a falling corner's two turns the second).
LEAVES_ACROSS, GOES_RIGHT = np.isin(range(16), (1, 8, 9, 11, 13)), np.isin(range(16), (8, 9, 13))


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
    return 0.5 * float(np.dot(x, np.append(y[1:], y[:1])) - np.dot(y, np.append(x[1:], x[:1])))


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
    traced = _trace_rings(mask)
    if len(traced) == 1:
        return [(traced[0][0], [])]
    count, parts = cv2.connectedComponents(mask, connectivity=4)
    outers: list[np.ndarray | None] = [None] * count
    holes: list[list[np.ndarray]] = [[] for _ in range(count)]
    for ring, area, (x, y) in traced:
        if area > 0:
            outers[parts[y, x]] = ring
        else:
            holes[parts[y, x]].append(ring)
    return [(outer, inner) for outer, inner in zip(outers, holes, strict=True) if outer is not None]


def _trace_rings(mask: np.ndarray) -> list[tuple[np.ndarray, float, tuple[int, int]]]:
    """Borders of a mask [h, w], object to the right: simple rings [P, 2], their areas, and a pixel (x, y) beside each.

    At a corner where only diagonal pixels are set, a ring turns right and so stays with its own pixel. One that meets
    itself in such a corner is split there.
    """
    height, width = mask.shape
    padded = np.zeros((height + 2, width + 2), np.uint8)
    padded[1:-1, 1:-1] = mask != 0
    rows = padded[:, :-1] + 2 * padded[:, 1:]
    around = rows[:-1] + 4 * rows[1:]
    at = np.flatnonzero(cv2.LUT(around, IS_TURN))
    if not len(at):
        return []
    kinds = around.ravel()[at]
    turns = TURNS[kinds]
    # Where there are two, first that with the edge left of it.
    at, kinds = np.repeat(at, turns), np.repeat(kinds, turns)
    is_second = np.zeros(len(at), bool)
    is_second[1:] = at[1:] == at[:-1]
    y, x = np.divmod(at, width + 1)
    # Along a row, and along a column, each two turns that follow each other are the ends of an edge.
    across = np.arange(len(at)) ^ 1
    has_edge_below = (kinds == RISING) ^ is_second
    order = np.argsort((x * (height + 1) + y) * 2 + has_edge_below)
    down = np.empty_like(across)
    down[order] = order[across]
    after = np.where(LEAVES_ACROSS[kinds], across, down)
    starts = np.flatnonzero(GOES_RIGHT[kinds] & ((kinds != FALLING) | is_second))
    walk, ends = _cycles(after.tolist(), starts.tolist())

    points = np.stack([x, y], axis=1)[walk]
    begins = [0, *ends[:-1]]
    areas = np.add.reduceat((x * y[after] - y * x[after])[walk], begins) / 2
    may_meet = np.logical_or.reduceat((TURNS[kinds] == 2)[walk], begins)
    traced = []
    for i, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        ring, beside = points[begin:end], (int(x[walk[begin]]), int(y[walk[begin]]))
        if not may_meet[i]:
            traced.append((ring, areas[i], beside))
            continue
        apart = [np.array(each) for each in _split_at_repeats([*map(tuple, ring.tolist())])]
        traced += [(each, ring_area(each), beside) for each in apart]
    return traced


def _cycles(after: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
    """Walk a permutation from those starts that no walk has met before: all that is met, and where each walk ends."""
    is_met = [False] * len(after)
    walk: list[int] = []
    ends = []
    for start in starts:
        if is_met[start]:
            continue
        at = start
        while not is_met[at]:
            is_met[at] = True
            walk.append(at)
            at = after[at]
        ends.append(len(walk))
    return walk, ends


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
