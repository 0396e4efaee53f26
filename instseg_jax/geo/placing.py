"""Where a raster says that it lies: by an affine transform, a world file or ground control points."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.files import read_regular_text
from instseg_jax.geo.georeference import Georeference
from instseg_jax.messages import shorten

MOST_OFF_PX = 1.0  # of a ground control point from where the affine transform puts it
log = logging.getLogger(__name__)


def world_file(path: Path) -> Path | None:
    """The world file beside a picture (`a.jgw`, `a.jpgw` or `a.wld` of `a.jpg`); None: there is none."""
    suffix = path.suffix.lower()
    for name in (suffix[:2] + suffix[-1] + "w", suffix + "w", ".wld"):
        for beside in (path.with_suffix(name), path.with_suffix(name.upper())):
            if beside.is_file():
                return beside
    return None


def georeference_of(file: Any, path: Path) -> Georeference | None:
    """That of an open rasterio file at `path`; None, with a warning where it says something else, in pixels.

    Ground control points count where an affine transform fits them to a pixel. A CRS that the file lacks is taken from
    a `.prj` beside it.
    """
    if not file.transform.is_identity:
        crs = file.crs or _crs_beside(path)
        return Georeference(tuple(file.transform)[:6], crs.to_wkt() if crs else None, crs.to_epsg() if crs else None)
    points, crs = file.gcps
    if points:
        transform = _fit(points)
        if transform is not None:
            return Georeference(transform, crs.to_wkt() if crs else None, crs.to_epsg() if crs else None)
        log.warning(
            "%s: its map is in pixels, no affine transform fits its %d ground control points; gdalwarp straightens it",
            path,
            len(points),
        )
    elif file.rpcs is not None:
        log.warning("%s: its map is in pixels, it is placed by RPCs; gdalwarp -rpc straightens it", path)
    elif file.crs is not None:
        log.warning("%s: its map is in pixels, it has a CRS but no transform", path)
    return None


def _fit(points: Any) -> tuple[float, float, float, float, float, float] | None:
    """The affine transform from pixels that fits ground control points by least squares; None: none fits."""
    pixels = np.array([(point.col, point.row, 1.0) for point in points], np.float64)
    ground = np.array([(point.x, point.y) for point in points], np.float64)
    if len(points) < 3 or np.linalg.matrix_rank(pixels - [*pixels[:, :2].mean(axis=0), 0]) < 3:
        return None  # on one line
    origin = ground.mean(axis=0)  # large numbers beside small ones lose their digits
    found = np.linalg.lstsq(pixels, ground - origin, rcond=None)[0]
    linear = found[:2].T
    if np.linalg.matrix_rank(linear) < 2:
        return None
    off = np.linalg.solve(linear, (pixels @ found - (ground - origin)).T)
    if np.abs(off).max() > MOST_OFF_PX:
        return None
    (a, b), (d, e) = linear.tolist()
    c, f = (found[2] + origin).tolist()
    return a, b, c, d, e, f


def _crs_beside(path: Path) -> Any:
    """The CRS of a `.prj` file beside a raster; None: there is none, or none that can be read."""
    from rasterio.crs import CRS

    beside = path.with_suffix(".prj")
    if not beside.is_file():
        return None
    try:
        return CRS.from_wkt(read_regular_text(beside).strip())
    except Exception as error:  # GDAL's errors have a private base class
        log.warning("%s is no CRS that can be read (%s)", beside, shorten(error))
        return None
