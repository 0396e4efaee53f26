"""Parts of masks and outlines: to the pixel, with holes and parts, drawn again by independent rasterisers."""

import numpy as np
import pytest
from edge_walk import walk_edges
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from instseg_jax.crops import crop_bounds, crop_rle, paste_mask
from instseg_jax.masks import decode_rle, encode_mask, rasterize_polygons
from instseg_jax.outlines import _trace_parts, bridge_holes, join_rings, ring_area, rle_to_polygons

MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@settings(max_examples=150, deadline=None)
@given(MASKS, st.integers(-5, 14), st.integers(-5, 14), st.integers(1, 20), st.integers(1, 20))
def test_a_rectangle_of_an_rle_is_that_of_the_mask(mask, x, y, width, height):
    padded = np.zeros((60, 60), bool)
    padded[20 : 20 + mask.shape[0], 20 : 20 + mask.shape[1]] = mask
    part = crop_rle(encode_mask(mask), (x, y, x + width, y + height))
    np.testing.assert_array_equal(part, padded[20 + y : 20 + y + height, 20 + x : 20 + x + width])


@settings(max_examples=150, deadline=None)
@given(MASKS, st.integers(-14, 24), st.integers(-14, 24))
def test_a_placed_mask_is_cut_off_at_the_border(mask, x, y):
    canvas = np.zeros((60, 60), bool)
    canvas[20 + y : 20 + y + mask.shape[0], 20 + x : 20 + x + mask.shape[1]] = mask
    assert paste_mask(mask, (x, y), (15, 18)) == encode_mask(canvas[20:35, 20:38])


def test_masks_of_huge_images_cost_what_they_cover():
    rle = paste_mask(np.ones((30, 40), bool), (19_000, 100), (20_000, 20_000))
    assert len(rle["counts"]) < 400
    part = crop_rle(rle, (18_990, 90, 19_050, 140))
    assert part.sum() == 1200 and part[10:40, 10:50].all()


@pytest.mark.parametrize(
    ("box", "bounds"),
    [
        ([1.4, 2.6, 5.4, 7.6], (1, 3, 5, 8)),
        ([-3, -3, 50, 50], (0, 0, 20, 10)),
        ([4.0, 4.0, 4.0, 4.0], (4, 4, 5, 5)),
        ([20, 10, 20, 10], (19, 9, 20, 10)),
    ],
)
def test_a_box_always_has_a_pixel(box, bounds):
    assert crop_bounds(box, (10, 20)) == bounds


def test_rings_are_those_of_a_walk_along_the_edges():
    numbers, holes, touches = np.random.default_rng(0), 0, 0
    for share in np.linspace(0.1, 0.95, 150):
        mask = (numbers.random(numbers.integers(1, 16, 2)) < share).astype(np.uint8)
        wanted = walk_edges(mask)
        found = [(outer.tolist(), [hole.tolist() for hole in inner]) for outer, inner in _trace_parts(mask)]
        assert found == wanted
        holes += sum(len(inner) for _, inner in wanted)
        corners = [tuple(corner) for outer, inner in wanted for ring in (outer, *inner) for corner in ring]
        touches += len(corners) - len(set(corners))
    assert holes > 100 and touches > 200


@settings(max_examples=300, deadline=None)
@given(MASKS)
def test_outlines_enclose_exactly_the_mask(mask):
    polygons = rle_to_polygons(encode_mask(mask))
    assert sum(polygon.area for polygon in polygons) == mask.sum()
    drawn = np.zeros(mask.shape, np.uint8)
    for polygon in polygons:
        assert ring_area(polygon.outer) > 0 > max([ring_area(hole) for hole in polygon.holes], default=-1)
        for ring in (polygon.outer, *polygon.holes):  # even-odd: a hole takes away what its outer ring has set
            drawn ^= fill(ring, mask.shape)
    np.testing.assert_array_equal(drawn, mask)


def fill(ring: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies in a ring: PIL on a canvas eight times as large, read at the centres."""
    canvas = Image.new("1", (shape[1] * 8, shape[0] * 8))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in (ring * 8).tolist()], fill=1)
    return np.asarray(canvas, np.uint8)[4::8, 4::8]


@settings(max_examples=200, deadline=None)
@given(MASKS)
def test_outlines_are_valid_for_maps(mask):
    shapely = pytest.importorskip("shapely")
    parts = [shapely.Polygon(p.outer, p.holes) for p in rle_to_polygons(encode_mask(mask))]
    assert shapely.MultiPolygon(parts).is_valid


def test_a_ring_with_a_dot_in_it():
    mask = np.zeros((9, 12), bool)
    mask[1:8, 2:9] = True
    mask[2:7, 3:8] = False
    mask[4, 5] = True
    ring, dot = rle_to_polygons(encode_mask(mask))
    assert ring.area == 24 and dot.area == 1 and len(ring.holes) == 1 and not dot.holes
    assert sorted(ring.outer.tolist()) == [[2, 1], [2, 8], [9, 1], [9, 8]]
    assert sorted(ring.holes[0].tolist()) == [[3, 2], [3, 7], [8, 2], [8, 7]]


def test_an_empty_mask_has_no_outline():
    assert rle_to_polygons(encode_mask(np.zeros((5, 5), bool))) == []


def disc_with_hole(size: int = 200) -> np.ndarray:
    distance = np.hypot(*(np.mgrid[:size, :size] - size / 2))
    return (distance < 0.45 * size) & (distance > 0.2 * size)


def test_simplified_outlines_keep_their_distance_and_lose_points():
    rle = encode_mask(disc_with_hole())
    (exact,), (simple,) = rle_to_polygons(rle), rle_to_polygons(rle, tolerance=1.0)
    assert len(simple.outer) < len(exact.outer) / 4 and len(simple.holes) == 1
    drawn = rasterize_polygons([bridge_holes(simple)], 200, 200)
    difference = drawn != disc_with_hole()
    assert 0 < difference.sum() < 0.03 * disc_with_hole().sum()
    (dot,) = rle_to_polygons(encode_mask(np.eye(1, dtype=bool)), tolerance=5.0)
    assert dot.area == 1


def test_bridged_holes_stay_open():
    (polygon,) = rle_to_polygons(encode_mask(disc_with_hole()))
    ring = bridge_holes(polygon)
    assert abs(ring_area(ring)) == polygon.area
    drawn = rasterize_polygons([ring], 200, 200)
    assert (drawn != disc_with_hole()).mean() < 0.005 and drawn[100, 100] == 0


def test_joined_rings_have_the_area_of_all():
    mask = np.zeros((20, 30), bool)
    mask[2:8, 3:9] = mask[10:15, 20:28] = mask[17:19, 1:4] = True
    parts = rle_to_polygons(encode_mask(mask))
    assert [part.area for part in parts] == [40, 36, 6]
    joined = join_rings([part.outer for part in parts])
    assert ring_area(joined) == mask.sum()
    np.testing.assert_array_equal(fill(joined, mask.shape)[mask], 1)
    assert decode_rle(encode_mask(mask)).sum() == 82
