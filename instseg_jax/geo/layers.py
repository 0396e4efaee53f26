"""Layers of polygons as people draw them on maps, as shapes in pixels of a raster (extra `geo`).

Coordinates are (x, y) everywhere, longitude before latitude, whatever order a CRS is defined in.
"""

import collections
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.files import read_regular_text
from instseg_jax.geo.georeference import WGS84, Georeference
from instseg_jax.geo.layer_files import read_layer_file
from instseg_jax.geo.plane import to_plane
from instseg_jax.messages import quote, shorten
from instseg_jax.windows import Window

GEOJSON_SUFFIXES = (".geojson", ".json")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Polygons with their class names, in coordinates of their CRS."""

    path: Path
    shapes: np.ndarray  # [n] of shapely, Polygon or MultiPolygon, valid and not empty
    names: tuple[str, ...]
    crs: Any  # of pyproj; None: the file says none
    is_assumed: bool  # GeoJSON without a word on its CRS, which then should be WGS 84


def read_layer(
    source: str, *, class_field: str | None, class_name: str | None, crs: str | None, notes: collections.Counter[str]
) -> Layer:
    """Read a layer of polygons: `FILE` or `FILE:LAYER` of any vector format that GDAL knows.

    Classes are the values of `class_field`, or `class_name` for all. `crs` overrules what the file says. Invalid rings
    are mended; what is mended or left out is counted in `notes`. Raises ValueError or FileNotFoundError that names it.
    """
    import pyproj
    import shapely

    path, layer_name = _split_source(source)
    geometry, columns, said = read_layer_file(path, layer_name, [class_field] if class_field else [])
    if not class_field and not class_name:
        raise ValueError(
            f"Classes of {path} are unknown: --class_field names a field, --class_name is for all objects."
        )
    values = columns[class_field] if class_field else [class_name] * len(geometry)
    is_assumed = path.suffix.lower() in GEOJSON_SUFFIXES and crs is None and not _has_crs(path)
    try:
        found = pyproj.CRS.from_user_input(crs or said) if crs or said else None
    except pyproj.exceptions.CRSError as error:
        raise ValueError(f"The CRS {quote(crs or said)} of {path} is unknown ({shorten(error)}).") from error
    shapes, names = [], []
    seen: set[tuple[bytes, str]] = set()
    for blob, value in zip(geometry, values, strict=True):
        shape = None if blob is None else shapely.force_2d(shapely.from_wkb(blob))
        if shape is None or shape.is_empty:
            notes["features without a geometry, left out"] += 1
            continue
        if not np.isfinite(shapely.get_coordinates(shape)).all():
            notes["features whose coordinates are no numbers, left out"] += 1
            continue
        if not shape.is_valid:
            shape = shapely.make_valid(shape)
            notes["invalid rings, mended"] += 1
        shape = _polygons_of(shape)
        if shape.is_empty:
            notes["features without an area (points, lines), left out"] += 1
        elif value is None or value != value or not str(value).strip():
            notes[f"features without a value of {class_field}, left out"] += 1
        elif (key := (shapely.normalize(shape).wkb, str(value))) in seen:
            notes["features that are there twice, left out once"] += 1
        else:
            seen.add(key)
            shapes.append(shape)
            names.append(str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip())
    if not shapes:
        left = "".join(f"; {note}: {count}" for note, count in notes.items())
        raise ValueError(f"The layer {path} has no polygon with a class{left}.")
    collected = np.empty(len(shapes), object)
    collected[:] = shapes
    return Layer(path, collected, tuple(names), found, is_assumed)


def shapes_in_pixels(layer: Layer, place: Georeference, raster: str, size: tuple[int, int]) -> np.ndarray:
    """The layer's shapes [n] in pixels (x, y) of a raster of `size` (height, width) that lies at `place`.

    A layer that says no CRS lies in the raster's, unless its coordinates are degrees that don't meet the raster. Raises
    ValueError for one that has no way to the raster's CRS.
    """
    import pyproj
    import shapely

    a, b, c, d, e, f = place.transform
    inverse = np.linalg.inv(np.array([[a, b], [d, e]]))

    def to_pixels(ground: np.ndarray) -> np.ndarray:
        return (ground - [c, f]) @ inverse.T

    if place.wkt is None or layer.crs is None or layer.is_assumed:
        as_they_are = shapely.transform(layer.shapes, to_pixels)
        if _meets(as_they_are, size) and not (layer.is_assumed and place.epsg == WGS84):
            if layer.is_assumed:
                log.warning("%s says no CRS and is not in WGS 84: its coordinates are those of %s", layer.path, raster)
            return as_they_are
        if place.wkt is None or layer.crs is None or not _is_globe(shapely.total_bounds(layer.shapes)):
            return as_they_are  # it may lie on another raster
    own = pyproj.CRS.from_wkt(place.wkt)
    try:
        transformer = pyproj.Transformer.from_crs(layer.crs, own, always_xy=True)
        ground = shapely.transform(layer.shapes, lambda xy: np.stack(transformer.transform(xy[:, 0], xy[:, 1]), axis=1))
        is_there = np.isfinite(shapely.bounds(ground)).all(axis=1)
        if not is_there.any():  # raises the reason
            x, y = shapely.get_coordinates(layer.shapes).T
            transformer.transform(x, y, errcheck=True)
        ground[~is_there] = shapely.Polygon()  # the other side of the globe
    except pyproj.exceptions.ProjError as error:
        raise ValueError(
            f"There is no way from the CRS of {layer.path} to that of {raster} ({shorten(error)})."
        ) from error
    if own.is_geographic:
        middle = float(place.to_ground(np.array([size[::-1]]) / 2)[0, 0])
        ground = _turn_to(ground, middle, 2 * math.pi / own.axis_info[0].unit_conversion_factor)
    return shapely.transform(ground, to_pixels)


def _turn_to(shapes: np.ndarray, middle: float, turn: float) -> np.ndarray:
    """Shapes whose parts lie on the side of the globe around a longitude: 250 and -110 degrees are one place.

    `turn` is once around. Parts that a border of the world has cut are joined; what is wider than half of it stays.
    """
    import shapely

    left, _, right, _ = shapely.bounds(parts := shapely.get_parts(shapes)).T
    turns = np.where(right - left > turn / 2, 0, np.round((middle - (left + right) / 2) / turn))
    if not turns.any():
        return shapes
    turned = shapely.transform(parts, lambda xy: xy)
    for number in np.unique(turns[turns != 0]):
        is_there = turns == number
        turned[is_there] = shapely.transform(parts[is_there], lambda xy, by=number * turn: np.add(xy, [by, 0]))
    counts = shapely.get_num_geometries(shapes)
    joined = [shapely.union_all(own) for own in np.split(turned, np.cumsum(counts)[:-1])]
    return np.array([*joined, None], object)[:-1]


def pixel_sides(place: Georeference, size: tuple[int, int]) -> tuple[float, float] | None:
    """Width and height on the ground, in metres, of the pixel in the middle of a raster of `size` (height, width).

    None where the CRS is unknown or has no way to the globe. True lengths: degrees, feet and the stretched metres of a
    Mercator map are measured on the ellipsoid.
    """
    import pyproj

    if place.wkt is None:
        return None
    x, y = size[1] / 2, size[0] / 2
    corners = place.to_ground(np.array([[x - 0.5, y], [x + 0.5, y], [x, y - 0.5], [x, y + 0.5]]))
    try:
        transformer = pyproj.Transformer.from_crs(pyproj.CRS.from_wkt(place.wkt), WGS84, always_xy=True)
        lon, lat = transformer.transform(corners[:, 0], corners[:, 1], errcheck=True)
    except pyproj.exceptions.ProjError:
        return None
    _, _, lengths = pyproj.Geod(ellps="WGS84").inv(lon[::2], lat[::2], lon[1::2], lat[1::2])
    return float(lengths[0]), float(lengths[1])


def find_ground(place: Georeference, window: Window) -> tuple[list[float], np.ndarray] | None:
    """Longitude and latitude of a window's middle, and how many metres (east, north) its width and its height are.

    The metres are [2, 2], a row for the way from its left to its right, and one for that from its top to its bottom.
    None where the CRS is unknown or has no way to the globe.
    """
    import pyproj

    if place.wkt is None:
        return None
    ways = np.array([[0.0, 0.0], [-0.5, 0.0], [0.5, 0.0], [0.0, -0.5], [0.0, 0.5]])
    ground = place.to_ground((ways + 0.5) * [window.width, window.height] + [window.x, window.y])
    try:
        transformer = pyproj.Transformer.from_crs(pyproj.CRS.from_wkt(place.wkt), WGS84, always_xy=True)
        found = np.stack(transformer.transform(ground[:, 0], ground[:, 1], errcheck=True), axis=1)
    except pyproj.exceptions.ProjError:
        return None
    plane = to_plane(found, found[0])
    return [round(value, 9) for value in found[0].tolist()], plane[[2, 4]] - plane[[1, 3]]


def known_crs(layer: Layer) -> Any:
    """The CRS of a layer that no raster can tell. Raises ValueError where the file says none that can be."""
    import shapely

    bounds = shapely.total_bounds(layer.shapes)
    if layer.crs is None or (layer.is_assumed and not _is_globe(bounds)):
        raise ValueError(
            f"The layer {layer.path} says no CRS that fits its coordinates ({_say_bounds(bounds)}): "
            "name it with --labels_crs=EPSG:NUMBER."
        )
    return layer.crs


def _is_globe(bounds: np.ndarray) -> bool:
    """Whether coordinates can be degrees."""
    return bool(bounds[0] >= -180.5 and bounds[2] <= 180.5 and bounds[1] >= -90.5 and bounds[3] <= 90.5)


def _split_source(source: str) -> tuple[Path, str | None]:
    path, layer_name = Path(source), None
    if not path.exists() and ":" in source:
        head, _, layer_name = source.rpartition(":")
        path = Path(head)
    if not path.exists():
        raise FileNotFoundError(f"There is no layer {source!r}.")
    return path, layer_name


def _has_crs(path: Path) -> bool:
    try:
        return isinstance(json.loads(read_regular_text(path)).get("crs"), dict)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no GeoJSON ({shorten(error)}).") from error


def _polygons_of(shape: Any) -> Any:
    """The polygons of a shape: one, several as a MultiPolygon, or an empty one."""
    import shapely

    parts, rest = [], [shape]
    while rest:  # collections may hold collections
        one = rest.pop()
        if one.geom_type == "Polygon":
            parts.append(one)
        elif hasattr(one, "geoms"):
            rest += reversed(one.geoms)
    parts = [part for part in parts if part.area > 0]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def _meets(shapes: np.ndarray, size: tuple[int, int]) -> bool:
    import shapely

    left, top, right, bottom = shapely.total_bounds(shapes)
    return bool(left < size[1] and right > 0 and top < size[0] and bottom > 0)


def _say_bounds(bounds: np.ndarray) -> str:
    return "x {:.6g} to {:.6g}, y {:.6g} to {:.6g}".format(*bounds[[0, 2, 1, 3]])
