"""Outlines along pixels made into ones that a person would draw (extra `geo`); each says how far it moved.

Everything is in metres, on any plane. A shape that can't be had within its tolerance stays as it was.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

LEAST_POINTS, MOST_POINTS = 32, 1 << 17  # of an outline as it is smoothed
WIDTHS_AROUND = 16  # of the Gaussian in an outline: what is small is smoothed less
SAMPLED = 4  # points of a tolerance's length: how densely distances between outlines are measured
LEAST_PART = 1e-6  # of a tolerance's square; what make_valid leaves besides is no part


@dataclasses.dataclass(frozen=True)
class Shaping:
    """What is done to outlines before they are written; lengths are metres that an outline may move, 0: not at all.

    One thing is done to a shape: right angles where its class is among those and they fit, else rounding, else
    simplifying.
    """

    simplify: float = 0.0  # fewer corners
    smooth: float = 0.0  # steps of pixels rounded off
    regularize: float = 0.0  # edges in two directions that are perpendicular, as those of buildings
    regularize_classes: tuple[str, ...] | None = None  # None: all
    min_area: float = 0.0  # square metres; smaller objects are left out


@dataclasses.dataclass(frozen=True)
class Shaped:
    """A shape, what was done to it, metres that its outline moved, and the change of its area as a share."""

    shape: Any
    how: str
    moved: float
    area_change: float


def reshape(shape: Any, shaping: Shaping, label: str) -> Shaped | None:
    """Shape the outlines of a (multi)polygon of shapely in metres; None where it stays as it is."""
    classes = shaping.regularize_classes
    steps: list[tuple[str, float, Callable[[Any, float], Any]]] = []
    if shaping.regularize and (classes is None or label in classes):
        steps.append(("regularized", shaping.regularize, _regularize))
    steps += [("smoothed", shaping.smooth, _smooth)] if shaping.smooth else []
    steps += [("simplified", shaping.simplify, _simplify)] if shaping.simplify else []
    for how, tolerance, step in steps:
        shaped = _accept(shape, step(shape, tolerance), how, tolerance)
        if shaped is not None:
            return shaped
    return None


def _accept(before: Any, after: Any, how: str, tolerance: float) -> Shaped | None:
    """What a step made, if it is a shape with the same parts and holes and nowhere farther off than the tolerance."""
    import shapely

    if after is None:
        return None
    valid = shapely.make_valid(after)
    least = LEAST_PART * tolerance**2
    parts = [part for part in shapely.get_parts(valid) if part.geom_type == "Polygon" and part.area > least]
    if _rings(shapely.multipolygons(parts)) != _rings(before):
        return None
    after = shapely.multipolygons(parts)
    distance = max(_farthest(before, after, tolerance / SAMPLED), _farthest(after, before, tolerance / SAMPLED))
    if distance > tolerance * (1 + 1e-6):
        return None
    return Shaped(after, how, distance, float(abs(after.area / before.area - 1)))


def _farthest(shape: Any, other: Any, step: float) -> float:
    """How far a shape's outline, looked at every `step`, goes from the other's; by a tree, as outlines may be long."""
    import shapely

    points = shapely.points(shapely.get_coordinates(shapely.segmentize(shape, step)))
    rings = shapely.get_rings(shapely.get_parts(other))
    edges = [np.stack([ring[:-1], ring[1:]], axis=1) for ring in map(shapely.get_coordinates, rings)]
    tree = shapely.STRtree(shapely.linestrings(np.concatenate(edges)))
    return float(tree.query_nearest(points, return_distance=True, all_matches=False)[1].max())


def _rings(shape: Any) -> int:
    import shapely

    return int(shapely.get_num_interior_rings(shapely.get_parts(shape)).sum()) + len(shapely.get_parts(shape))


def _simplify(shape: Any, tolerance: float) -> Any:
    import shapely

    return shapely.simplify(shape, tolerance, preserve_topology=True)


def _smooth(shape: Any, tolerance: float) -> Any:
    """Each outline as a closed curve of complex numbers whose high frequencies are taken out.

    The gain is 1 - (1 - g)^2 with g of a Gaussian as wide as the tolerance: g alone would shrink what is round.
    """
    import shapely

    def low_pass(ring: Any, _: Any) -> np.ndarray:
        count = min(max(int(np.ceil(ring.length / tolerance * SAMPLED)), LEAST_POINTS), MOST_POINTS)
        points = shapely.get_coordinates(shapely.line_interpolate_point(ring, np.arange(count) * ring.length / count))
        width = min(tolerance, ring.length / WIDTHS_AROUND)
        gain = np.exp(-2 * (np.pi * width * np.fft.fftfreq(count, ring.length / count)) ** 2)
        curve = np.fft.ifft(np.fft.fft(points[:, 0] + 1j * points[:, 1]) * (1 - (1 - gain) ** 2))
        return np.stack([curve.real, curve.imag], axis=1)

    return shapely.simplify(_each_ring(shape, low_pass), tolerance / 20, preserve_topology=True)


def _regularize(shape: Any, tolerance: float) -> Any:
    """Edges along the main direction of each part and across it; None where an outline has no four sides so."""
    return _each_ring(shape, lambda ring, part: _square_ring(ring, _main_direction(part, tolerance), tolerance))


def _each_ring(shape: Any, change: Callable[[Any, Any], np.ndarray | None]) -> Any:
    """A shape of changed rings [P, 2]; None where one of them is None."""
    import shapely

    parts = []
    for part in shapely.get_parts(shape):
        rings = [change(ring, part) for ring in (part.exterior, *part.interiors)]
        if any(ring is None for ring in rings):
            return None
        parts.append(shapely.Polygon(rings[0], rings[1:]))
    return shapely.multipolygons(parts)


def _main_direction(part: Any, tolerance: float) -> float:
    """The direction in radians of the edge that, with its perpendicular, most of the outline's length follows."""
    import shapely

    points = np.asarray(shapely.simplify(part.exterior, tolerance / 2).coords)
    steps = np.diff(points, axis=0)
    angles, lengths = np.arctan2(steps[:, 1], steps[:, 0]), np.linalg.norm(steps, axis=1)
    off = np.abs(np.sin(2 * (angles[:, None] - angles)))  # 0 along and across, 1 at 45 degrees
    turns = np.exp(4j * (angles - angles[np.argmin(off @ lengths)]))  # quarter turns are the same
    near = turns.real > 0.5  # within 15 degrees
    return float(angles[np.argmin(off @ lengths)] + np.angle((turns * lengths)[near].sum()) / 4)


def _square_ring(ring: Any, direction: float, tolerance: float) -> np.ndarray | None:
    """A ring [P, 2] whose edges run along a direction and across it in turn; None for fewer than four of them."""
    import shapely

    turn = np.array([[np.cos(direction), -np.sin(direction)], [np.sin(direction), np.cos(direction)]])
    points = (np.asarray(ring.coords) @ turn)[:-1]
    corners = np.asarray(shapely.simplify(ring, tolerance / 2).coords)[:-1] @ turn
    if len(corners) < 4:
        return None
    # Corners are points of the ring: which one each is.
    at = np.array([np.argmin(((points - corner) ** 2).sum(axis=1)) for corner in corners])
    steps = np.roll(corners, -1, axis=0) - corners
    is_across = np.abs(steps[:, 1]) > np.abs(steps[:, 0])
    starts = np.flatnonzero(is_across != np.roll(is_across, 1))  # of runs of edges in the same direction
    if len(starts) < 4:
        return None
    places = np.array([_run_place(points, at[a], at[b], bool(is_across[a])) for a, b in _pairs(starts)])
    before = np.roll(places, 1)  # a corner is where a run meets the one before it
    first = is_across[starts]
    square = np.stack([np.where(first, places, before), np.where(first, before, places)], axis=1)
    return square @ turn.T


def _pairs(values: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(values.tolist(), np.roll(values, -1).tolist(), strict=True))


def _run_place(points: np.ndarray, start: int, stop: int, is_across: bool) -> float:
    """Where a run of the outline lies, x if it runs across and else y: the mean along its length."""
    count = (stop - start) % len(points) or len(points)
    run = points[(start + np.arange(count + 1)) % len(points)]
    along = np.abs(np.diff(run[:, 1 if is_across else 0]))  # steps to the side carry no weight
    middles = (run[1:, 0 if is_across else 1] + run[:-1, 0 if is_across else 1]) / 2
    return float(np.average(middles, weights=along)) if along.sum() > 0 else float(middles.mean())
