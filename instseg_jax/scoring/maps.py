"""Two layers of a map held against each other: what was found, and what is there (extra `geo`).

A found polygon and a true one are a pair where they have the same class and an IoU of at least the threshold. Each has
one partner at most; pairs are made by falling score, then by falling IoU.
"""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.evaluation import charts
from instseg_jax.files import write_text
from instseg_jax.geo.layer_files import WGS84, reproject
from instseg_jax.geo.plane import to_plane
from instseg_jax.messages import quote

ALL = "all classes"
DRAWN = 20_000  # polygons in the picture of the map; of more, every n-th
MAP_SIDE = 1100  # units of its longer side
COLORS = {"found": "#1a9850", "wrong": "#d73027", "missed": "#f0a30a"}


@dataclasses.dataclass(frozen=True)
class MapLayer:
    """Polygons [n] of shapely, their classes and scores [n], and the CRS of pyproj."""

    shapes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    crs: Any


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Both layers on one plane in metres, and each polygon's partner in the other one, -1 for none."""

    found: MapLayer
    true: MapLayer
    of_found: np.ndarray
    of_true: np.ndarray
    ious: np.ndarray  # [found], 0 without a partner


def match_layers(found: MapLayer, true: MapLayer, *, iou: float, area: np.ndarray | None) -> Pairs:
    """Pair the polygons of two layers in any CRS; `area` is polygons in the CRS of `true` within which both count.

    A polygon counts where its middle lies. Raises ValueError for a threshold outside 0..1 and a layer without CRS.
    """
    import shapely

    if not 0 < iou <= 1:
        raise ValueError(f"--iou is {iou:g}, it must be above 0 and at most 1.")
    origin = find_origin(true)
    found, true = layer_on_plane(found, origin), layer_on_plane(true, origin)
    if area is not None:
        within = shapely.union_all(shapes_on_plane(area, true.crs, origin))
        found, true = (_within(layer, within) for layer in (found, true))
    first, second = shapely.STRtree(true.shapes).query(found.shapes, predicate="intersects")
    same = found.labels[first] == true.labels[second]
    first, second = first[same], second[same]
    shared = shapely.area(shapely.intersection(found.shapes[first], true.shapes[second]))
    union = shapely.area(found.shapes)[first] + shapely.area(true.shapes)[second] - shared
    ious = shared / np.maximum(union, 1e-12)
    of_found, of_true = np.full(len(found.shapes), -1), np.full(len(true.shapes), -1)
    of_pairs = np.zeros(len(found.shapes))
    for k in np.lexsort((-ious, -found.scores[first])):
        i, j = first[k], second[k]
        if ious[k] >= iou and of_found[i] < 0 and of_true[j] < 0:
            of_found[i], of_true[j], of_pairs[i] = j, i, ious[k]
    return Pairs(found, true, of_found, of_true, of_pairs)


def count_pairs(pairs: Pairs, in_found: np.ndarray, in_true: np.ndarray) -> dict[str, float | int | None]:
    """Precision, recall, F1 and areas of some of the polygons, given as booleans; None where nothing is there."""
    import shapely

    hits, num_found, num_true = (pairs.of_found[in_found] >= 0).sum(), in_found.sum(), in_true.sum()
    seen = (pairs.of_true[in_true] >= 0).sum()
    precision, recall = _ratio(hits, num_found), _ratio(seen, num_true)
    both = None if precision is None or recall is None else precision + recall
    matched = pairs.ious[in_found & (pairs.of_found >= 0)]
    return {
        "true": int(num_true),
        "found": int(num_found),
        "pairs": int(hits),
        "precision": precision,
        "recall": recall,
        "f1": None if both is None else (2 * precision * recall / both if both else 0.0),  # type: ignore[operator]
        "iou": float(np.median(matched)) if len(matched) else None,
        "true_m2": float(shapely.area(pairs.true.shapes[in_true]).sum()),
        "found_m2": float(shapely.area(pairs.found.shapes[in_found]).sum()),
    }


def by_class(pairs: Pairs) -> dict[str, dict]:
    """The counts of all polygons, and of each class."""
    names = sorted({*pairs.true.labels, *pairs.found.labels})
    rows = {ALL: count_pairs(pairs, np.ones(len(pairs.of_found), bool), np.ones(len(pairs.of_true), bool))}
    return rows | {name: count_pairs(pairs, pairs.found.labels == name, pairs.true.labels == name) for name in names}


def by_block(pairs: Pairs, block: float) -> dict[str, dict]:
    """The counts of squares of `block` metres from the south west on, named column_row; a pair counts where the true
    polygon lies. Raises ValueError for no size.
    """
    import shapely

    if not block > 0:
        raise ValueError(f"--block is {block:g}, it must be above 0 metres.")
    middles = [np.array(shapely.get_coordinates(shapely.centroid(one.shapes))) for one in (pairs.found, pairs.true)]
    middles[0] = middles[0].copy()
    is_pair = pairs.of_found >= 0
    middles[0][is_pair] = middles[1][pairs.of_found[is_pair]]
    if not sum(map(len, middles)):
        return {}
    corner = np.concatenate(middles).min(axis=0)
    cells = [[f"{x}_{y}" for x, y in np.floor((middle - corner) / block).astype(int)] for middle in middles]
    of_found, of_true = (np.array(names, object) for names in cells)
    return {name: count_pairs(pairs, of_found == name, of_true == name) for name in sorted({*of_found, *of_true})}


def write_map_report(
    path: Path, pairs: Pairs, tables: dict[str, dict[str, dict]], regions: dict[str, dict], facts: Sequence[str]
) -> Path:
    """Write the page: a table for each grouping, what regions hold, the map with what is right, wrong and missed."""
    header = ("", "true", "found", "pairs", "precision", "recall", "F1", "median IoU", "true m2", "found m2")
    sections = [f"<h1>Found against true</h1><p class='dim'>{'<br>'.join(map(html.escape, facts))}</p>"]
    for title, rows in tables.items():
        cells = [[name, *(_shown(value) for value in row.values())] for name, row in rows.items()]
        sections.append(f"<h2>{html.escape(title)}</h2>{charts.table(header, cells)}")
    if regions:
        lines = [
            [name, label, *(_shown(value) for value in row.values())]
            for name, of_classes in regions.items()
            for label, row in of_classes.items()
        ]
        named = ("", "class", "found", "there are", "from", "to", "m2", "from", "to")
        sections.append(f"<h2>Regions</h2>{charts.table(named, lines)}")
    sections.append(f"<h2>Map</h2>{_draw(pairs)}")
    return write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Found against true</title>'
        f"<style>{charts.STYLE}</style></head><body>{''.join(sections)}</body></html>\n",
    )


def _draw(pairs: Pairs) -> str:
    """The polygons as SVG, north up: pairs, what is wrong, and what is missed."""
    import shapely

    groups = {
        "wrong": pairs.found.shapes[pairs.of_found < 0],
        "found": pairs.found.shapes[pairs.of_found >= 0],
        "missed": pairs.true.shapes[pairs.of_true < 0],  # last, so that nothing covers them
    }
    total = sum(map(len, groups.values()))
    if not total:
        return "<p class='dim'>There is nothing to draw.</p>"
    west, south, east, north = shapely.total_bounds(np.concatenate(list(groups.values())))
    scale = MAP_SIDE / max(east - west, north - south, 1e-9)
    step = -(-total // DRAWN)

    def outline(shape: Any) -> str:
        parts = [p for p in shapely.get_parts(shapely.simplify(shape, 0.5 / scale)) if p.geom_type == "Polygon"]
        rings = [ring.coords for part in parts for ring in (part.exterior, *part.interiors)]
        return "".join(
            "M" + " ".join(f"{(x - west) * scale:.1f},{(north - y) * scale:.1f}" for x, y in r) for r in rings
        )

    paths = [
        f'<path d="{outline(shape)}" fill="{COLORS[name]}" stroke="{COLORS[name]}"/>'
        for name, shapes in groups.items()
        for shape in shapes[::step]
    ]
    keys = ", ".join(f'<span style="color:{color}">&#9632;</span> {name}' for name, color in COLORS.items())
    thinned = f"; one of {step} polygons is drawn" if step > 1 else ""
    keys += f"{thinned}; {east - west:,.0f} m from west to east"
    box = f"-4 -4 {(east - west) * scale + 8:.0f} {(north - south) * scale + 8:.0f}"
    return (
        f'<figure><svg viewBox="{box}" role="img" aria-label="map" fill-opacity="0.45" fill-rule="evenodd">'
        f"{''.join(paths)}</svg><figcaption>{keys}</figcaption></figure>"
    )


def find_origin(layer: MapLayer) -> np.ndarray:
    """Longitude and latitude about the middle of a layer: where its plane touches the globe."""
    import shapely

    middles = shapely.get_coordinates(shapely.centroid(shapely.get_parts(_to_degrees(layer.shapes, layer.crs))))
    around = np.exp(1j * np.radians(middles[:, 0])).mean()  # -180 and 180 degrees are neighbours
    return np.array([np.degrees(np.angle(around)), (middles[:, 1].min() + middles[:, 1].max()) / 2])


def _to_degrees(shapes: np.ndarray, crs: Any) -> np.ndarray:
    if not len(shapes):  # nothing was found, on no raster
        return shapes
    if crs is None:
        raise ValueError("a layer says no CRS, it can't be held against another one")
    return reproject(shapes, crs, WGS84)


def shapes_on_plane(shapes: np.ndarray, crs: Any, origin: np.ndarray) -> np.ndarray:
    """Shapes of a CRS in metres around `origin`."""
    import shapely

    return shapely.transform(_to_degrees(shapes, crs), lambda xy: to_plane(xy, origin))


def layer_on_plane(layer: MapLayer, origin: np.ndarray) -> MapLayer:
    """A layer in metres around `origin`, its shapes valid."""
    import shapely

    return dataclasses.replace(layer, shapes=shapely.make_valid(shapes_on_plane(layer.shapes, layer.crs, origin)))


def _within(layer: MapLayer, area: Any) -> MapLayer:
    import shapely

    inside = shapely.contains(area, shapely.point_on_surface(layer.shapes))
    return MapLayer(layer.shapes[inside], layer.labels[inside], layer.scores[inside], layer.crs)


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _shown(value: float | int | None) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) and abs(value) <= 1 else f"{value:,.0f}"


def check_classes(found: MapLayer, true: MapLayer) -> None:
    """Raise ValueError where no class is in both layers."""
    if len(found.labels) and not set(found.labels) & set(true.labels):
        shown = [quote(", ".join(sorted(set(map(str, layer.labels)))[:5])) for layer in (found, true)]
        raise ValueError(f"No class is in both layers: {shown[0]} were found, {shown[1]} are true; see --class_field.")
