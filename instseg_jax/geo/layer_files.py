"""Layers of polygons as files: GeoPackage, GeoJSON (RFC 7946), FlatGeobuf and GeoParquet (extra `geo`)."""

import contextlib
import importlib.util
import json
import sqlite3
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.files import written_aside
from instseg_jax.geo.antimeridian import cut_at_180
from instseg_jax.messages import quote, shorten

DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".json": "GeoJSON", ".fgb": "FlatGeobuf", ".parquet": "Parquet"}
LAYER = "instances"
GDAL_OPTIONS = threading.Lock()  # they are those of the process
EXTRA = ("rasterio", "pyogrio", "shapely", "pyproj")
GEOJSON_DECIMALS = 8  # of degrees: a millimetre
WGS84 = "EPSG:4326"


def driver_of(path: str | Path) -> str:
    """The format that a file's name asks for. Raises ValueError for a suffix of none."""
    suffix = Path(path).suffix.lower()
    if suffix not in DRIVERS:
        raise ValueError(f"A layer is written as {', '.join(DRIVERS)}, {quote(str(path))} is none of them.")
    return DRIVERS[suffix]


def write_layer(
    path: str | Path,
    geometries: np.ndarray,
    columns: Mapping[str, np.ndarray],
    crs: Any,
    *,
    style: str | None = None,
) -> Path:
    """Write polygons [n] of shapely with columns [n] as a layer `instances`; a file that was there is replaced whole.

    `crs` is of pyproj, None: unknown; GeoJSON in WGS 84 follows RFC 7946, cut at 180 degrees. `style` is QGIS' QML:
    kept within a GeoPackage, beside other files. Raises OSError where it can't be written.
    """
    import shapely

    driver = driver_of(path)
    is_rfc = driver == "GeoJSON" and crs is not None and crs.equals(WGS84)
    if is_rfc:
        geometries = np.array([*map(cut_at_180, geometries), None], object)[:-1]
    shapes = np.array([shapely.multipolygons([g]) if g.geom_type == "Polygon" else g for g in geometries], object)
    blobs = shapely.to_wkb(shapely.orient_polygons(shapes))
    with written_aside(path) as aside:
        if driver == "Parquet":
            _write_parquet(aside, blobs, columns, crs)
        else:
            options: dict[str, Any] = {}
            named = aside.with_name(f"{aside.name}{Path(path).suffix}")  # without it FlatGeobuf makes a folder
            if is_rfc:
                options = {"RFC7946": "YES", "COORDINATE_PRECISION": GEOJSON_DECIMALS}
            try:
                write_vectors(named, blobs, columns, None if crs is None else crs.to_wkt(), driver=driver, **options)
            except OSError as error:
                named.unlink(missing_ok=True)
                raise OSError(f"{path} can't be written ({shorten(error)}).") from error
            if style is not None and driver == "GPKG":
                _add_style(named, style)
            named.replace(aside)
    if style is not None and driver != "GPKG":
        with written_aside(Path(path).with_suffix(".qml")) as aside:
            aside.write_text(style, encoding="utf-8")
    return Path(path)


def write_vectors(
    path: Path,
    blobs: np.ndarray,
    columns: Mapping[str, np.ndarray],
    wkt: str | None,
    *,
    driver: str,
    changed: float | None = None,
    is_appended: bool = False,
    **options: Any,
) -> None:
    """Write multipolygons [n], as WKB, with GDAL as the layer `instances`, or append them to it.

    `changed` is when a GeoPackage says that it was, in seconds; None: now. Raises OSError where it can't be written.
    """
    import pyogrio

    when = None if changed is None else time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed))
    with GDAL_OPTIONS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'crs' was not provided")  # a picture that lies nowhere
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": when})
        try:
            pyogrio.raw.write(
                path,
                geometry=blobs,
                field_data=list(columns.values()),
                fields=np.array(list(columns), object),
                geometry_type="MultiPolygon",
                crs=wkt,
                driver=driver,
                layer=LAYER,
                append=is_appended,
                **options,
            )
        except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, pyogrio.errors.FieldError) as error:
            raise OSError(f"{path} can't be written ({shorten(error)}).") from error
        finally:
            pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": None})


def read_layer_file(
    path: Path, layer: str | None, columns: Sequence[str] | None
) -> tuple[np.ndarray, dict[str, np.ndarray], str | None]:
    """Geometries [n] as WKB, columns and CRS of a file of any format that GDAL knows, or GeoParquet.

    `columns` None: all. Raises ValueError that names the file, or the field that is not there.
    """
    import pyogrio

    try:
        if path.suffix.lower() == ".parquet":
            geometry, found, crs = _read_parquet(path)
        else:
            meta, _, geometry, data = pyogrio.raw.read(path, layer=layer or _only_layer(path))
            found, crs = dict(zip(map(str, meta["fields"]), data, strict=True)), meta["crs"]
    except ValueError:
        raise
    except Exception as error:  # GDAL's and Arrow's errors have no base class in common
        raise ValueError(f"{path} can't be read as a layer of polygons ({shorten(error)}).") from error
    if not len(geometry):  # GeoJSON without features has no fields
        found = {name: np.zeros(0, object) for name in columns or ()} | found
    if missing := [name for name in columns or () if name not in found]:
        known = ", ".join(found) or "none"
        raise ValueError(f"The layer {path} has no field {quote(missing[0])}; it has {shorten(known)}.")
    return geometry, found if columns is None else {name: found[name] for name in columns}, crs


def reproject(shapes: np.ndarray, source: Any, target: Any) -> np.ndarray:
    """Shapes [n] of shapely from one CRS to another, of pyproj or its text; x is east in both, whatever a CRS says."""
    import pyproj
    import shapely

    step = pyproj.Transformer.from_crs(source, target, always_xy=True)
    return shapely.transform(shapes, lambda xy: np.stack(step.transform(xy[:, 0], xy[:, 1]), axis=1))


def require_extra(what: str) -> None:
    """Raise ValueError that names the extra, where a package that `what` needs is missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{what} needs pip install "instseg_jax[geo]"; {", ".join(missing)} is not installed.')


def _only_layer(path: Path) -> str:
    """The layer of a file that has one with shapes. Raises ValueError that names them, where there are several."""
    import pyogrio

    layers = [str(name) for name, geometry in pyogrio.list_layers(path).tolist() if geometry is not None]
    if len(layers) != 1:
        several = f"several layers, name one as {path}:LAYER: {', '.join(layers)}" if layers else "no layer of shapes"
        raise ValueError(f"{path} has {shorten(several)}.")
    return layers[0]


def _write_parquet(path: Path, geometry: np.ndarray, columns: Mapping[str, np.ndarray], crs: Any) -> None:
    """GeoParquet 1.1: a column of WKB, and what it is in the metadata."""
    pa, parquet = _arrow(path)
    table = pa.table({name: pa.array(values.tolist()) for name, values in columns.items()})
    table = table.append_column("geometry", pa.array(geometry.tolist(), pa.binary()))
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["MultiPolygon"], "orientation": "counterclockwise"}
    column |= {"crs": None if crs is None else crs.to_json_dict()}
    said = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    parquet.write_table(table.replace_schema_metadata({b"geo": json.dumps(said).encode()}), path)


def _read_parquet(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray], str | None]:
    _, parquet = _arrow(path)
    table = parquet.read_table(path)
    try:
        said = json.loads((table.schema.metadata or {})[b"geo"])
        name = said["primary_column"]
        column = said["columns"][name]
        encoding = column["encoding"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no GeoParquet: it has no metadata `geo`.") from error
    if encoding != "WKB":
        raise ValueError(f"The geometries of {path} are {quote(encoding)}, only WKB is read.")
    crs = column.get("crs", "OGC:CRS84")
    geometry = np.array(table[name].to_pylist(), object)
    values = {other: np.array(table[other].to_pylist(), object) for other in table.column_names if other != name}
    return geometry, values, json.dumps(crs) if isinstance(crs, dict) else crs


def _arrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f'{path} is GeoParquet; that needs pip install "instseg_jax[geo]".') from error
    return pyarrow, pyarrow.parquet


def _add_style(path: Path, style: str) -> None:
    """The table in which QGIS looks for the style of a GeoPackage's layer."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("""
            CREATE TABLE layer_styles (
                id INTEGER PRIMARY KEY AUTOINCREMENT, f_table_catalog TEXT, f_table_schema TEXT, f_table_name TEXT,
                f_geometry_column TEXT, styleName TEXT, styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN,
                description TEXT, owner TEXT, ui TEXT, update_time DATETIME);
            INSERT INTO gpkg_contents (table_name, data_type, identifier) VALUES
                ('layer_styles', 'attributes', 'layer_styles');
        """)
        row = ("", "", LAYER, "geom", "classes", style, "", True, "colours of the classes", "")
        database.execute(
            "INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName, "
            "styleQML, styleSLD, useAsDefault, description, owner) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        database.commit()
