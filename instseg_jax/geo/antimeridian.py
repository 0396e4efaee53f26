"""Shapes in degrees that lie across the border of the world, cut there (RFC 7946, 3.1.9; extra `geo`)."""

from typing import Any

import numpy as np

TURN = 360.0


def mend_torn(shape: Any) -> Any:
    """A (multi)polygon of which some points came out on the other side of the world, cut at 180 degrees; else itself.

    Its rings go the nearer way from point to point; one that goes around a pole has the pole inside.
    """
    import shapely

    bounds = shapely.bounds(parts := shapely.get_parts(shape))
    if not (bounds[:, 2] - bounds[:, 0] > TURN / 2).any():
        return shape
    whole = []
    for part in parts:
        outer = _continuous(np.asarray(part.exterior.coords)[:, :2])
        middle = (outer[:, 0].min() + outer[:, 0].max()) / 2
        holes = []
        for hole in part.interiors:
            ring = _continuous(np.asarray(hole.coords)[:, :2])
            ring[:, 0] += TURN * np.round((middle - ring[:, 0].mean()) / TURN)  # on the side of the outer one
            holes.append(ring)
        whole.append(shapely.Polygon(outer, holes))
    return cut_at_180(shapely.multipolygons(whole))


def cut_at_180(shape: Any) -> Any:
    """A (multi)polygon whose longitudes may go on beyond 180 as one within -180..180; its pieces meet there."""
    import shapely

    west, _, east, _ = shape.bounds
    if west >= -TURN / 2 and east <= TURN / 2:
        return shape
    pieces = []
    for part in shapely.get_parts(shapely.make_valid(shape)):
        first, last = np.floor((np.array(part.bounds)[[0, 2]] + TURN / 2) / TURN).astype(int)
        for turns in range(first, last + 1):
            west = TURN * turns - TURN / 2
            piece = part & shapely.box(west, -90, west + TURN, 90)
            pieces += shapely.get_parts(shapely.transform(piece, lambda xy, by=TURN * turns: xy - [by, 0])).tolist()
    joined = shapely.union_all([one for one in pieces if one.geom_type == "Polygon" and one.area > 0])
    return shapely.multipolygons(shapely.get_parts(joined))  # around a pole two of them share a side


def _continuous(ring: np.ndarray) -> np.ndarray:
    """A closed ring [P, 2] whose longitudes go on where they would jump."""
    longitudes = np.unwrap(ring[:, 0], period=TURN)
    ring = np.stack([longitudes, ring[:, 1]], axis=1)
    if abs(longitudes[-1] - longitudes[0]) > TURN / 2:  # around a pole
        pole = np.copysign(90.0, ring[:, 1].mean())
        ring = np.concatenate([ring, [[longitudes[-1], pole], [longitudes[0], pole]], ring[:1]])
    return ring
