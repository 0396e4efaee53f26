"""A plane in metres around a place on the globe, for lengths, blocks and ratios of areas: they need no ellipsoid."""

import numpy as np

METRES_PER_DEGREE = 111_195.0  # of a great circle on the mean sphere


def to_plane(lon_lat: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Longitudes and latitudes [n, 2] to metres [n, 2] east and north of `origin`, the nearer way around the globe."""
    off = lon_lat - origin
    off[:, 0] = (off[:, 0] + 180) % 360 - 180
    return off * [np.cos(np.radians(origin[1])) * METRES_PER_DEGREE, METRES_PER_DEGREE]
