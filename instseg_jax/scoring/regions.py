"""How many objects there are in a region, and how large they are together: with intervals, from those that were found.

Blocks of labelled ground tell how much is missed and how much is found that is not there: by split conformal prediction
(Lei et al. 2018) with each block's residual taken from the others (jackknife). Where a region is like the blocks, its
true number lies within the interval as often as asked for.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from instseg_jax.geo.plane import METRES_PER_DEGREE
from instseg_jax.scoring.maps import ALL, MapLayer

KNOWN_SIZE = 1e-6  # of a block: less unlabelled ground is none
DEALT = 10  # times that blocks are put together to groups


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is expected to be there, and from where to where it may be."""

    value: float
    low: float
    high: float


def estimate(
    found: float, blocks_found: np.ndarray, blocks_true: np.ndarray, *, coverage: float, unit: float, size: float
) -> Estimate | None:
    """The true amount of a region where `found` was found, by amounts [n] that were found and are true in n blocks.

    `unit` is the amount of one object, 1 for counts; `size` how many blocks the region is as large as. None where the
    blocks are too few for this coverage (0..1), or nothing was found in them. What is expected is `found` times the
    blocks' ratio of true to found. Residuals are those of as many blocks together as the region is large, or as leaves
    enough groups, each by the ratio of all other blocks. They are measured in a standard deviation, up to a factor that
    they tell: it grows with the root of the number of objects, as that of independent ones does, and, for amounts
    beyond those of the blocks, with the error of the ratio itself.
    """
    f, t = blocks_found / unit, blocks_true / unit
    least = math.ceil(coverage / (1 - coverage) - 1e-9)  # groups, of which the largest residual then counts
    if len(f) < least or f.sum() <= f.max():
        return None
    ratio = t.sum() / f.sum()
    squares = (t - ratio * f) ** 2
    spread = float((squares / (f + 1)).mean())
    ratio_error = float(squares.sum() / f.sum() ** 2) / spread if spread > 0 else 0.0  # of spread

    def deviation(amount: Any) -> Any:
        return np.sqrt(amount + 1 + ratio_error * amount**2)

    together = min(max(1, round(size)), len(f) // least)
    groups = _groups(len(f), together)
    own_f, own_t = f[groups].sum(axis=1), t[groups].sum(axis=1)
    rest = f.sum() - own_f
    others = np.divide(t.sum() - own_t, rest, out=np.full(len(rest), ratio), where=rest > 0)
    scores = np.sort(np.abs(own_t - others * own_f) / deviation(own_f))
    rank = math.ceil((1 + 1 / len(f)) * coverage * len(scores) - 1e-9)
    reach = float(scores[min(rank, len(scores)) - 1] * deviation(found / unit))
    value = ratio * found / unit
    return Estimate(value * unit, max(0.0, value - reach) * unit, (value + reach) * unit)


def _groups(count: int, together: int) -> np.ndarray:
    """Groups [g, together] of positions below `count`: each alone, or random parts of equal size, dealt out anew."""
    if together == 1:
        return np.arange(count)[:, None]
    rng = np.random.default_rng(0)
    number = count // together
    dealt = [rng.permutation(count)[: number * together].reshape(number, together) for _ in range(DEALT)]
    return np.concatenate(dealt)


def estimate_regions(
    found: MapLayer,
    true: MapLayer,
    area: np.ndarray,
    regions: Mapping[str, Any],
    *,
    latitude: float,
    block: float,
    coverage: float,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Counts and areas of each region and class, of labelled ground known, of the rest estimated.

    All lie on one plane, of `latitude` where it touches the globe.
    `area` is polygons in which `true` is complete; blocks are its squares of `block` metres. An object lies where a
    point on it does. A row has what was `found`, and `count` and `area_m2` with their `_low` and `_high`; None where
    the blocks are too few. Raises ValueError for no size, or a coverage that is none.
    """
    import shapely

    if not block > 0:
        raise ValueError(f"--block is {block:g}, it must be above 0 metres.")
    if not 0.5 <= coverage < 1:
        raise ValueError(f"--coverage is {100 * coverage:g}, it must be from 50 to below 100 %.")
    labelled = shapely.union_all(area)
    cells = _cells(labelled, block)
    tables: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in regions}
    for label in (ALL, *sorted({*found.labels, *true.labels})):
        layers = [_Objects(layer, label, latitude) for layer in (found, true)]
        blocks = np.array([one.amounts(cell) for cell in cells for one in layers]).reshape(-1, 2, 2)  # count, area
        unit = float(blocks[:, 1, 1].sum() / max(blocks[:, 1, 0].sum(), 1))
        for name, region in regions.items():
            rest = region - labelled
            here, known = layers[0].amounts(rest), layers[1].amounts(region & labelled)
            size = float(shapely.area(rest)) / block**2
            row: dict[str, float | None] = {"found": layers[0].amounts(region)[0]}
            for k, (key, one) in enumerate((("count", 1.0), ("area_m2", unit))):
                got: Estimate | None = Estimate(0.0, 0.0, 0.0)
                if size > KNOWN_SIZE:
                    got = (
                        estimate(here[k], blocks[:, 0, k], blocks[:, 1, k], coverage=coverage, unit=one, size=size)
                        if one
                        else None
                    )
                values = (None,) * 3 if got is None else tuple(known[k] + v for v in dataclasses.astuple(got))
                row |= dict(zip((key, f"{key}_low", f"{key}_high"), values, strict=True))
            if row["count_low"] is not None and row["count_high"] is not None:
                row |= {"count_low": math.ceil(row["count_low"]), "count_high": math.floor(row["count_high"])}
            tables[name][label] = row
    return tables


class _Objects:
    """The objects of a class: a point on each, and their areas in square metres."""

    def __init__(self, layer: MapLayer, label: str, latitude: float) -> None:
        import shapely

        shapes = layer.shapes if label == ALL else layer.shapes[layer.labels == label]
        points = shapely.point_on_surface(shapes)
        own = np.radians(latitude + shapely.get_y(points) / METRES_PER_DEGREE)  # where a degree is shorter or longer
        self.tree = shapely.STRtree(points)
        self.areas = shapely.area(shapes) * np.cos(own) / np.cos(np.radians(latitude))

    def amounts(self, shape: Any) -> tuple[float, float]:
        """Number and area of those in a shape."""
        inside = self.tree.query(shape, predicate="contains")
        return float(len(inside)), float(self.areas[inside].sum())


def _cells(labelled: Any, block: float) -> list[Any]:
    """The squares of which at least half is labelled ground, cut to it."""
    import shapely

    west, south, east, north = shapely.bounds(labelled)
    corners = np.mgrid[0 : math.ceil((east - west) / block), 0 : math.ceil((north - south) / block)].reshape(2, -1).T
    low = corners * block + [west, south]
    cells = shapely.intersection(shapely.box(low[:, 0], low[:, 1], low[:, 0] + block, low[:, 1] + block), labelled)
    return list(cells[shapely.area(cells) >= 0.5 * block**2])
