"""Where an image lies on the ground, and instances as maps: GeoJSON in WGS 84, GeoPackage in the image's own CRS.

Pixel corner (0, 0), the top left of the top left pixel, is the origin of the affine transform, as in GDAL. The
transform is applied once, to outlines along pixel edges (`polygons.py`). Areas in square metres are those
on the globe (`areas.py`), not in the image's CRS, which may distort them.
"""

import dataclasses
import itertools
import json
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from instseg_jax.files import written_aside
from instseg_jax.geo.antimeridian import cut_at_180
from instseg_jax.geo.areas import ToGround, area_measure, degrees_of
from instseg_jax.geo.layer_files import require_extra, write_vectors
from instseg_jax.outlines import Polygon, ring_area

WGS84 = 4326
DECIMALS = 9  # of degrees in GeoJSON: a tenth of a millimetre
Feature = tuple[list[list[np.ndarray]], dict]  # rings [P, 2] of each part, and properties
AT_ONCE = 10_000  # features of a GeoPackage in memory
GEOPACKAGE_FIELDS = {"label": object, "cls_id": np.int64, "score": np.float64, "area_px": np.int64, "area_m2": float}


class Located(Protocol):
    """Instances of an image that lies somewhere, as results have them."""

    @property
    def input_path(self) -> str:
        """The image's file."""

    def outlines(self) -> Iterator[tuple[dict, list[Polygon]]]:
        """For each instance a dict with label, cls_id and score, and its parts in pixels of the image."""

    @property
    def georeference(self) -> "Georeference | None":
        """Where the image lies; None: unknown."""


@dataclasses.dataclass(frozen=True)
class Georeference:
    """An affine transform from pixels to the ground, and the CRS of the ground."""

    transform: tuple[float, float, float, float, float, float]  # X = a x + b y + c, Y = d x + e y + f
    wkt: str | None  # of the CRS; None: unknown
    epsg: int | None

    def after(self, matrix: np.ndarray) -> "Georeference":
        """That of other pixels, which `matrix` [2, 3] takes to those of this one."""
        a, b, c, d, e, f = self.transform
        linear, offset = np.array([[a, b], [d, e]]) @ matrix, np.array([c, f])
        linear[:, 2] += offset
        return dataclasses.replace(self, transform=tuple(linear.ravel().tolist()))

    def to_ground(self, points: np.ndarray) -> np.ndarray:
        """Pixel coordinates [P, 2] (x, y) to coordinates on the ground."""
        a, b, c, d, e, f = self.transform
        x, y = points[:, 0], points[:, 1]
        return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


def to_geojson(result: Located) -> dict:
    """Make a GeoJSON FeatureCollection of a result, RFC 7946: a feature an instance, with its holes and parts.

    In longitudes and latitudes of WGS 84. Where the image's CRS has no way there, in that, which a `crs` member names
    as GeoJSON had it before; without a georeference in pixels, y down. An instance on the border of the world is cut
    there. Properties: label, cls_id, score, area_px, and area_m2 where the CRS is known.
    """
    head, to_degrees = _collection(result.georeference)
    return head | {"features": [_feature(parts, said, to_degrees) for parts, said in ground_features(result)]}


def write_geojson(path: str | Path, result: Located) -> Path:
    """Write `to_geojson` to a file, a feature at a time; return it."""
    head, to_degrees = _collection(result.georeference)
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(head | {"features": []}, ensure_ascii=False)[:-2])
        for number, (parts, properties) in enumerate(ground_features(result)):
            text = json.dumps(_feature(parts, properties, to_degrees), ensure_ascii=False, allow_nan=False)
            file.write(f", {text}" if number else text)
        file.write("]}\n")
    return Path(path)


def _collection(place: "Georeference | None") -> tuple[dict[str, Any], ToGround | None]:
    """The head of a FeatureCollection, and what brings coordinates [P, 2] of the image's CRS to degrees, if need be."""
    collection: dict[str, Any] = {"type": "FeatureCollection"}
    if place is None or place.wkt is None:
        return collection, None
    if place.epsg == WGS84:
        return collection, lambda points: points
    to_degrees = degrees_of(place.wkt, place.to_ground(np.zeros((1, 2))))
    if to_degrees is None:
        name = f"urn:ogc:def:crs:EPSG::{place.epsg}" if place.epsg else place.wkt
        collection["crs"] = {"type": "name", "properties": {"name": name}}
    return collection, to_degrees


def _feature(parts: list[list[np.ndarray]], properties: dict, to_degrees: ToGround | None) -> dict[str, Any]:
    if to_degrees is not None:
        lengths = [len(ring) for rings in parts for ring in rings]
        points = to_degrees(np.concatenate([ring for rings in parts for ring in rings])).round(DECIMALS)
        turned = iter(np.split(points, np.cumsum(lengths)[:-1]))
        parts = [[next(turned) for _ in rings] for rings in parts]
    if to_degrees is not None and max(np.abs(rings[0][:, 0]).max() for rings in parts) > 180:
        parts = _cut(parts)
    rings = [[[*ring.tolist(), ring[0].tolist()] for ring in rings] for rings in parts]
    return {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": rings}, "properties": properties}


def _cut(parts: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Rings [P, 2] of parts in degrees, cut at 180."""
    import shapely

    shape = cut_at_180(shapely.multipolygons([shapely.Polygon(rings[0], rings[1:]) for rings in parts]))
    shape = shapely.orient_polygons(shape)
    return [[np.asarray(ring.coords)[:-1] for ring in (one.exterior, *one.interiors)] for one in shape.geoms]


def write_geopackage(path: str | Path, result: Located) -> Path:
    """Write a result as a GeoPackage with one layer, `instances`, in the image's CRS; return the file.

    It says that it changed when the image did: the same image gives the same file. Needs the extra `geo`.
    """
    require_extra("A GeoPackage")
    wkt = None if result.georeference is None else result.georeference.wkt
    with written_aside(path) as aside:
        named = aside.with_name(f"{aside.name}.gpkg")  # GDAL wants its suffix
        try:
            for number, found in enumerate(_batches(ground_features(result))):
                said = [properties for _, properties in found]
                columns = {
                    name: np.array([one[name] for one in said], kind) for name, kind in GEOPACKAGE_FIELDS.items()
                }
                blobs = np.array([*(_to_wkb(parts) for parts, _ in found), None], object)[:-1]
                write_vectors(
                    named,
                    blobs,
                    columns,
                    wkt,
                    driver="GPKG",
                    changed=_changed(result.input_path),
                    is_appended=number > 0,
                )
            named.replace(aside)
        finally:
            named.unlink(missing_ok=True)
    return Path(path)


def _batches(features: Iterator[Feature]) -> Iterator[list[Feature]]:
    """So many at a time as there is memory for; one without any where there are none."""
    yield list(itertools.islice(features, AT_ONCE))
    while found := list(itertools.islice(features, AT_ONCE)):
        yield found


def ground_features(result: Located) -> Iterator[Feature]:
    """For each instance with mask pixels: its parts, each with outer ring and holes on the ground, and properties.

    In the image's CRS, or in its pixels where it says none.
    Outer rings run counter-clockwise and holes clockwise on the map (y up), as GeoJSON wants it.
    """
    place = result.georeference
    areas_of = area_measure(place.to_ground, place.wkt) if place is not None and place.wkt else None
    for box, polygons in result.outlines():
        if not polygons:
            continue
        properties = {
            "label": box["label"],
            "cls_id": box["cls_id"],
            "score": box["score"],
            "area_px": round(sum(polygon.area for polygon in polygons)),
            "area_m2": None if areas_of is None else _sum(areas_of(polygon) for polygon in polygons),
        }
        yield [_on_the_ground(polygon, place) for polygon in polygons], properties


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None where one of the values is unknown."""
    found = list(values)
    return None if any(value is None for value in found) else sum(value for value in found if value is not None)


def _on_the_ground(polygon: Polygon, place: Georeference | None) -> list[np.ndarray]:
    rings = [ring if place is None else place.to_ground(ring) for ring in (polygon.outer, *polygon.holes)]
    is_outer = [True] + [False] * len(polygon.holes)
    return [ring if (ring_area(ring) > 0) == outer else ring[::-1] for ring, outer in zip(rings, is_outer, strict=True)]


def _changed(name: str) -> float:
    """When a file changed, in seconds; now, where it is none."""
    path = Path(name)
    return path.stat().st_mtime if path.is_file() else time.time()


def _to_wkb(parts: Sequence[Sequence[np.ndarray]]) -> bytes:
    """A multipolygon as little-endian WKB."""
    blob = [struct.pack("<BII", 1, 6, len(parts))]
    for rings in parts:
        blob.append(struct.pack("<BII", 1, 3, len(rings)))
        for ring in rings:
            closed = np.concatenate([ring, ring[:1]])
            blob += [struct.pack("<I", len(closed)), np.ascontiguousarray(closed, "<f8").tobytes()]
    return b"".join(blob)
