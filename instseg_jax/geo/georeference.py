"""Where an image lies on the ground, and instances as maps: GeoJSON and GeoPackage in the image's own CRS.

Pixel corner (0, 0), the top left of the top left pixel, is the origin of the affine transform, as in GDAL. The
transform is applied once, to outlines along pixel edges (`polygons.py`). Areas in square metres are those
on the globe (`areas.py`), not in the image's CRS, which may distort them.
"""

import dataclasses
import json
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from instseg_jax.files import written_aside
from instseg_jax.geo.areas import area_measure
from instseg_jax.outlines import Polygon, ring_area

WGS84 = 4326
GEOPACKAGE_ID, GEOPACKAGE_VERSION = 0x47504B47, 10300
UNKNOWN_SRS = -1  # GeoPackage's id for Cartesian coordinates without a CRS


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
    """Make a GeoJSON FeatureCollection of a result: a feature an instance, with its holes and parts.

    In the image's CRS, which a `crs` member names where it is not WGS 84; without a georeference in pixels, y down.
    Properties: label, cls_id, score, area_px, and area_m2 where the CRS is known.
    """
    return _collection(result.georeference) | {"features": [_feature(*found) for found in _features(result)]}


def write_geojson(path: str | Path, result: Located) -> Path:
    """Write `to_geojson` to a file, a feature at a time; return it."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(_collection(result.georeference) | {"features": []}, ensure_ascii=False)[:-2])
        for number, found in enumerate(_features(result)):
            text = json.dumps(_feature(*found), ensure_ascii=False, allow_nan=False)
            file.write(f", {text}" if number else text)
        file.write("]}\n")
    return Path(path)


def _collection(place: "Georeference | None") -> dict[str, Any]:
    collection: dict[str, Any] = {"type": "FeatureCollection"}
    if place is not None and place.wkt is not None and place.epsg != WGS84:
        name = f"urn:ogc:def:crs:EPSG::{place.epsg}" if place.epsg else place.wkt
        collection["crs"] = {"type": "name", "properties": {"name": name}}
    return collection


def _feature(parts: list[list[np.ndarray]], properties: dict) -> dict[str, Any]:
    rings = [[[*ring.tolist(), ring[0].tolist()] for ring in rings] for rings in parts]
    return {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": rings}, "properties": properties}


def write_geopackage(path: str | Path, result: Located) -> Path:
    """Write a result as a GeoPackage with one layer, `instances`, in the image's CRS; return the file.

    It says that it changed when the image did: the same image gives the same file.
    """
    with written_aside(path) as aside:
        # No locks, which shares may lack: nobody else knows the file.
        database = sqlite3.connect(f"{aside.absolute().as_uri()}?nolock=1", uri=True)
        try:
            database.execute("PRAGMA journal_mode = OFF")
            _fill_geopackage(database, result)
        except sqlite3.Error as error:
            raise OSError(f"{path} can't be written: {error}") from error
        finally:
            database.close()
    return Path(path)


def _features(result: Located) -> Iterator[tuple[list[list[np.ndarray]], dict]]:
    """For each instance with mask pixels: its parts, each with outer ring and holes on the ground, and properties.

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


def _fill_geopackage(database: sqlite3.Connection, result: Located) -> None:
    """The tables that OGC 12-128 requires, and one of features."""
    place = result.georeference
    srs = UNKNOWN_SRS if place is None or place.wkt is None else place.epsg or 100_000
    database.executescript(f"""
        PRAGMA application_id = {GEOPACKAGE_ID};
        PRAGMA user_version = {GEOPACKAGE_VERSION};
        CREATE TABLE gpkg_spatial_ref_sys (
            srs_name TEXT NOT NULL, srs_id INTEGER PRIMARY KEY, organization TEXT NOT NULL,
            organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL, description TEXT);
        CREATE TABLE gpkg_contents (
            table_name TEXT NOT NULL PRIMARY KEY, data_type TEXT NOT NULL, identifier TEXT UNIQUE,
            description TEXT DEFAULT '', last_change DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ','now')),
            min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE, srs_id INTEGER REFERENCES gpkg_spatial_ref_sys);
        CREATE TABLE gpkg_geometry_columns (
            table_name TEXT NOT NULL PRIMARY KEY REFERENCES gpkg_contents, column_name TEXT NOT NULL,
            geometry_type_name TEXT NOT NULL, srs_id INTEGER NOT NULL REFERENCES gpkg_spatial_ref_sys,
            z TINYINT NOT NULL, m TINYINT NOT NULL);
        CREATE TABLE instances (
            fid INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, geom MULTIPOLYGON, label TEXT, cls_id INTEGER, score DOUBLE,
            area_px INTEGER, area_m2 DOUBLE);
    """)
    wgs84 = 'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],PRIMEM["Greenwich",0],'
    wgs84 += 'UNIT["degree",0.0174532925199433],AUTHORITY["EPSG","4326"]]'
    rows = [
        ("Undefined Cartesian", -1, "NONE", -1, "undefined", None),
        ("Undefined geographic", 0, "NONE", 0, "undefined", None),
        ("WGS 84", WGS84, "EPSG", WGS84, wgs84, None),
    ]
    if place is not None and place.wkt is not None and srs != WGS84:
        rows.append(("CRS of the image", srs, "EPSG" if place.epsg else "NONE", srs, place.wkt, None))
    database.executemany("INSERT INTO gpkg_spatial_ref_sys VALUES (?, ?, ?, ?, ?, ?)", rows)
    database.execute(
        "INSERT INTO gpkg_contents (table_name, data_type, identifier, last_change, srs_id) "
        "VALUES ('instances', 'features', 'instances', strftime('%Y-%m-%dT%H:%M:%fZ', ?, 'unixepoch'), ?)",
        (_changed(result.input_path), srs),
    )
    database.execute("INSERT INTO gpkg_geometry_columns VALUES ('instances', 'geom', 'MULTIPOLYGON', ?, 0, 0)", (srs,))
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for parts, properties in _features(result):
        points = np.concatenate([ring for rings in parts for ring in rings])
        low, high = np.minimum(low, points.min(axis=0)), np.maximum(high, points.max(axis=0))
        database.execute(
            "INSERT INTO instances (geom, label, cls_id, score, area_px, area_m2) VALUES (?, ?, ?, ?, ?, ?)",
            (_geometry_blob(parts, srs), *(properties[k] for k in ("label", "cls_id", "score", "area_px", "area_m2"))),
        )
    if (low <= high).all():
        database.execute("UPDATE gpkg_contents SET min_x = ?, min_y = ?, max_x = ?, max_y = ?", (*low, *high))
    database.commit()


def _changed(name: str) -> float:
    """When a file changed, in seconds; now, where it is none."""
    path = Path(name)
    return path.stat().st_mtime if path.is_file() else time.time()


def _geometry_blob(parts: Sequence[Sequence[np.ndarray]], srs: int) -> bytes:
    """A multipolygon as GeoPackage stores it: its header without envelope, then little-endian WKB."""
    blob = [b"GP", struct.pack("<BBi", 0, 1, srs), struct.pack("<BII", 1, 6, len(parts))]
    for rings in parts:
        blob.append(struct.pack("<BII", 1, 3, len(rings)))
        for ring in rings:
            closed = np.concatenate([ring, ring[:1]])
            blob += [struct.pack("<I", len(closed)), np.ascontiguousarray(closed, "<f8").tobytes()]
    return b"".join(blob)
