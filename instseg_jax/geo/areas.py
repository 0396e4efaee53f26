"""Areas on the globe, in square metres (extra `geo`: rasterio): of the ellipsoid, not of the image's CRS.

A ring is brought to longitude and latitude, its longitudes made continuous, and its area is that in an equal-area
cylinder, which knows no border of the world. Only a ring around a pole has none there; it is measured in an azimuthal
equal-area projection around that pole.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from instseg_jax.outlines import Polygon, ring_area

WGS84 = 4326
AXIS, FLATTENING = 6378137.0, 1 / 298.257223563  # of WGS 84; other ellipsoids differ by less than 0.1 %
# Points between which an edge may bend unseen: as straight in the image it is none on the globe.
MOST_STEP_DEGREES, MOST_STEP_METRES = 0.25, 25_000.0
MOST_STEP_PX, MOST_STEPS = 64.0, 2000
MOST_OFF_PX = 0.5  # there and back again: more, and the point lies off the domain of the CRS
METRES = 0.01  # of which there and back is always good enough
log = logging.getLogger(__name__)

ToGround = Callable[[np.ndarray], np.ndarray]


def area_measure(to_ground: ToGround, wkt: str) -> Callable[[Polygon], float | None]:
    """Make a function from a polygon in pixels to its area in square metres.

    `to_ground` turns pixels [P, 2] into coordinates of the CRS `wkt`. The function gives None where the CRS has no way
    to the globe (engineering, another planet) and off its domain; the reason is logged, once.
    """
    from rasterio.crs import CRS
    from rasterio.warp import transform

    globe = CRS.from_epsg(WGS84)
    is_told = False

    def area(polygon: Polygon) -> float | None:
        nonlocal is_told
        try:
            crs = CRS.from_wkt(wkt)
            unit = crs.units_factor[1] or 1.0  # radians or metres
            if crs.is_geographic:
                transform(crs, globe, [0.0], [0.0])  # of another planet: raises
            most_step = (math.radians(MOST_STEP_DEGREES) if crs.is_geographic else MOST_STEP_METRES) / unit
            total = 0.0
            for sign, ring in [(1, polygon.outer)] + [(-1, hole) for hole in polygon.holes]:
                points = _densify(ring, to_ground, most_step)
                total += sign * _globe_area(
                    *_on_the_globe(points, to_ground, crs, globe, unit if crs.is_geographic else None)
                )
        except Exception as error:  # GDAL's errors have a private base class
            if not is_told:
                reason = " ".join(str(error).split())[:120]
                log.warning("objects without area in m2: the image's CRS has no way to the globe there (%s)", reason)
            is_told = True
            return None
        return total

    return area


def degrees_of(wkt: str, sample: np.ndarray) -> ToGround | None:
    """Make a function from coordinates [P, 2] of a CRS to longitudes, continuous along them, and latitudes of WGS 84.

    None where there is no way for `sample` [P, 2].
    """
    try:
        from rasterio.crs import CRS
        from rasterio.warp import transform

        crs, globe = CRS.from_wkt(wkt), CRS.from_epsg(WGS84)

        def to_degrees(points: np.ndarray) -> np.ndarray:
            x, y = transform(crs, globe, points[:, 0], points[:, 1])
            return np.stack([np.degrees(np.unwrap(np.radians(x))), y], axis=1)

        return to_degrees if np.isfinite(to_degrees(sample)).all() else None
    except Exception:  # GDAL's errors have a private base class; area_measure says it
        return None


def _densify(ring: np.ndarray, to_ground: ToGround, most_step: float) -> np.ndarray:
    """The ring [P, 2] with points so near to each other that what lies between them is straight on the globe too."""
    after = np.roll(ring, -1, axis=0)
    lengths = np.abs(to_ground(after) - to_ground(ring)).max(axis=1) / most_step
    steps = np.maximum(lengths, np.abs(after - ring).max(axis=1) / MOST_STEP_PX)
    counts = np.ceil(np.nan_to_num(steps, nan=1)).clip(1, MOST_STEPS).astype(int)
    return np.concatenate(
        [a + (b - a) * (np.arange(n) / n)[:, None] for a, b, n in zip(ring, after, counts, strict=True)]
    )


def _on_the_globe(
    points: np.ndarray, to_ground: ToGround, crs: Any, globe: Any, radians_a_unit: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes, continuous along the ring, and latitudes of points [P, 2] in pixels; radians.

    Raises: ValueError, or an error of GDAL, off the domain of the CRS.
    """
    from rasterio.warp import transform

    ground = to_ground(points)
    if radians_a_unit is not None:  # continuous as they are, beyond 180 degrees too
        longitudes, latitudes = ground.T * radians_a_unit
    else:
        x, y = transform(crs, globe, ground[:, 0], ground[:, 1])
        back = np.stack(transform(globe, crs, x, y), axis=1)
        pixel = np.abs(to_ground(np.array([[1.0, 1.0]])) - to_ground(np.zeros((1, 2)))).max()
        if not (np.abs(back - ground) <= max(MOST_OFF_PX * pixel, METRES)).all():
            raise ValueError("off the domain of the CRS")
        longitudes, latitudes = np.unwrap(np.radians(x)), np.radians(y)
    if not np.isfinite(longitudes).all() or not (np.abs(latitudes) <= math.pi / 2 + 1e-9).all():
        raise ValueError("beyond the poles")
    return longitudes, np.clip(latitudes, -math.pi / 2, math.pi / 2)


def _globe_area(longitudes: np.ndarray, latitudes: np.ndarray) -> float:
    """Area in square metres inside a ring of radians, straight between longitude and authalic height."""
    e2 = FLATTENING * (2 - FLATTENING)
    e, sines = math.sqrt(e2), np.sin(latitudes)
    heights = (1 - e2) / 2 * (sines / (1 - e2 * sines**2) + np.arctanh(e * sines) / e)  # Snyder 1987, 3-12
    if abs(np.unwrap(np.append(longitudes, longitudes[0]))[-1] - longitudes[0]) < 1:
        return AXIS**2 * abs(ring_area(np.stack([longitudes, heights], axis=1)))
    # Around a pole: the squares of the radii grow with the distance of the heights.
    pole = (1 - e2) / 2 * (1 / (1 - e2) + math.atanh(e) / e)
    radii = np.sqrt(np.maximum(2 * (pole - math.copysign(1.0, float(heights.mean())) * heights), 0))
    return AXIS**2 * abs(ring_area(np.stack([radii * np.cos(longitudes), radii * np.sin(longitudes)], axis=1)))
