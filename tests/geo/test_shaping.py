"""Outlines of drawn masks with known corners: what comes back, how far it moved, and what stays as it was."""

import numpy as np
import pytest

shapely = pytest.importorskip("shapely")

import cv2  # noqa: E402

from instseg_jax.geo.shaping import Shaping, reshape  # noqa: E402
from instseg_jax.masks import encode_mask  # noqa: E402
from instseg_jax.outlines import rle_to_polygons  # noqa: E402

PIXEL = 0.5  # metres
L_SHAPE = np.array([[0, 0], [40, 0], [40, 15], [18, 15], [18, 30], [0, 30]], float)  # metres


def turned(points, degrees):
    angle = np.radians(degrees)
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def as_pixels(shape):
    """The outline along pixels of a mask that was drawn of a polygon, in metres."""
    mask = np.zeros((240, 240), np.uint8)
    for value, rings in ((1, [p.exterior for p in shapely.get_parts(shape)]),
                         (0, [r for p in shapely.get_parts(shape) for r in p.interiors])):  # fmt: skip
        for ring in rings:
            cv2.fillPoly(mask, [np.round(np.asarray(ring.coords) / PIXEL - 0.5).astype(np.int32)], value)
    polygons = rle_to_polygons(encode_mask(mask))
    return shapely.multipolygons([shapely.Polygon(p.outer * PIXEL, [h * PIXEL for h in p.holes]) for p in polygons])


def moved_to(points):
    return np.array([60, 60]) + points - points.mean(axis=0)


def corner_angles(ring):
    points = np.asarray(ring.coords)[:-1]
    first, second = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    cross = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    return np.abs(np.degrees(np.arctan2(cross, (first * second).sum(axis=1))))


@pytest.mark.parametrize("degrees", [0, 7, 31, 45, 68])
def test_a_building_gets_its_corners_and_right_angles_back(degrees):
    true = shapely.Polygon(moved_to(turned(L_SHAPE, degrees)))
    pixels = as_pixels(true)
    shaped = reshape(pixels, Shaping(regularize=1.5), "building")
    assert shaped is not None and shaped.how == "regularized" and shaped.moved <= 1.5
    (part,) = shaped.shape.geoms
    assert len(part.exterior.coords) - 1 == len(L_SHAPE)
    np.testing.assert_allclose(corner_angles(part.exterior), 90, atol=1e-6)
    of_pixels, of_part = (one.intersection(true).area / one.union(true).area for one in (pixels, part))
    assert of_part >= of_pixels - 1e-4 and of_part > 0.95
    assert shaped.area_change == pytest.approx(abs(part.area / pixels.area - 1)) and shaped.area_change < 0.02


def test_a_court_stays_one_with_right_angles():
    court = moved_to(turned(np.array([[0, 0], [10, 0], [10, 8], [0, 8]], float), 20))
    outer = moved_to(turned(np.array([[0, 0], [40, 0], [40, 30], [0, 30]], float), 20))
    shaped = reshape(as_pixels(shapely.Polygon(outer, [court])), Shaping(regularize=1.5), "building")
    (part,) = shaped.shape.geoms
    (hole,) = part.interiors
    np.testing.assert_allclose(corner_angles(part.exterior), 90, atol=1e-6)
    np.testing.assert_allclose(corner_angles(hole), 90, atol=1e-6)
    assert abs(shapely.Polygon(hole).area - 80) < 12


def test_what_has_no_right_angles_is_rounded_instead_and_others_are_not_asked():
    pond = as_pixels(shapely.Point(60, 60).buffer(30))
    shaping = Shaping(regularize=1.0, smooth=1.0, regularize_classes=("building",))
    assert reshape(pond, shaping, "building").how == "smoothed"  # doesn't fit
    house = as_pixels(shapely.Polygon(moved_to(L_SHAPE)))
    assert reshape(house, shaping, "building").how == "regularized"
    assert reshape(house, shaping, "pond").how == "smoothed"
    assert reshape(pond, Shaping(regularize=1.0), "building") is None


def test_rounding_takes_the_steps_of_pixels_away():
    true = shapely.Point(60, 60).buffer(25)
    pixels = as_pixels(true)
    shaped = reshape(pixels, Shaping(smooth=1.0), "pond")
    assert shaped.moved <= 1.0 and shaped.area_change < 0.02
    assert corner_angles(shaped.shape.geoms[0].exterior).max() < 30 < corner_angles(pixels.geoms[0].exterior).max()
    round_length = 2 * np.sqrt(np.pi * pixels.area)  # the least that this area can have
    assert shaped.shape.length < 1.02 * round_length < 1.2 * round_length < pixels.length


@pytest.mark.parametrize("what", ["simplify", "smooth", "regularize"])
def test_no_outline_moves_farther_than_it_may(what):
    rng = np.random.default_rng(0)
    done = 0
    for _ in range(20):
        blob = shapely.union_all(shapely.points(rng.uniform(35, 85, (6, 2))).tolist()).buffer(rng.uniform(3, 20))
        court = shapely.box(55, 55, 60, 62)
        pixels = as_pixels(shapely.MultiPolygon([p for p in shapely.get_parts(blob - court) if p.area > 1]))
        tolerance = rng.uniform(0.3, 3)
        shaped = reshape(pixels, Shaping(**{what: tolerance}), "x")
        if shaped is None:
            continue
        done += 1
        far = shapely.hausdorff_distance(pixels, shaped.shape, densify=0.1)
        assert far <= tolerance * 1.02 and shaped.shape.is_valid
        assert abs(far - shaped.moved) < 0.15 * tolerance
        assert sum(len(p.interiors) for p in shaped.shape.geoms) == sum(len(p.interiors) for p in pixels.geoms)
    assert done > (0 if what == "regularize" else 10)


def test_nothing_asked_changes_nothing():
    assert reshape(as_pixels(shapely.Polygon(moved_to(L_SHAPE))), Shaping(min_area=4), "building") is None
