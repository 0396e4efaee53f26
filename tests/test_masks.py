"""Run-length codes and polygons against masks written out by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg_jax import masks

RECTANGLE = np.array([[1, 1], [4, 1], [4, 3], [1, 3]], np.float64)  # columns 1..3, rows 1..2


def test_decode_runs_column_by_column():
    mask = masks.decode_rle({"size": [2, 3], "counts": [1, 2, 3]})
    np.testing.assert_array_equal(mask, [[0, 1, 0], [1, 0, 0]])
    assert mask.dtype == np.uint8


def test_counts_as_list_bytes_and_str_are_the_same_mask():
    runs = masks.compress_rle({"size": [2, 3], "counts": [1, 2, 3]})
    assert isinstance(runs["counts"], bytes)
    as_str = {"size": [2, 3], "counts": runs["counts"].decode()}
    np.testing.assert_array_equal(masks.decode_rle(as_str), masks.decode_rle(runs))
    assert masks.encode_mask(np.array([[0, 1, 0], [1, 0, 0]])) == as_str


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_encoding_round_trip(height, width, density, seed):
    mask = np.random.default_rng(seed).random((height, width)) < density
    rle = json.loads(json.dumps(masks.encode_mask(mask)))
    np.testing.assert_array_equal(masks.decode_rle(rle), mask)
    masks.check_rle(masks.compress_rle(rle))
    with pytest.raises(ValueError, match="add up"):
        masks.check_rle({"size": [height + 1, width], "counts": rle["counts"].encode()})


def test_round_trip_of_a_mask_with_long_runs():
    mask = np.zeros((3000, 2000), np.uint8)
    mask[:, 700:] = 1
    rle = masks.compress_rle(masks.encode_mask(mask))
    masks.check_rle(rle)
    assert masks.rle_area(rle) == 3000 * 1300


@pytest.mark.parametrize("counts", [b"", b"0", b"zz", b"o", b"\xff\xfe", b"00000000n"])
def test_check_rle_refuses_broken_codes(counts):
    with pytest.raises(ValueError, match="RLE's counts"):
        masks.check_rle({"size": [4, 5], "counts": counts})


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 3], "counts": [1, 2]}, "add up to 2 \\* 3, got 3"),
        ({"size": [2, 3], "counts": [7, -1]}, "not negative"),
        ({"size": [2], "counts": [6]}, "size must be"),
        ({"size": [2, 3]}, "counts must be a string or a list"),
    ],
)
def test_compress_rle_refuses_malformed(rle, message):
    with pytest.raises(ValueError, match=message):
        masks.compress_rle(rle)


def test_rectangle_covers_its_pixels():
    mask = masks.rasterize_polygons([RECTANGLE], 5, 6)
    expected = np.zeros((5, 6))
    expected[1:3, 1:4] = 1
    np.testing.assert_array_equal(mask, expected)
    assert masks.mask_box_xyxy_px(mask) == (1, 1, 4, 3)


def test_polygon_and_rle_of_it_are_the_same_mask():
    rle = masks.segmentation_to_rle((RECTANGLE,), 5, 6)
    np.testing.assert_array_equal(masks.segmentation_to_mask(rle, 5, 6), masks.segmentation_to_mask((RECTANGLE,), 5, 6))
    assert masks.rle_area(rle) == 6
    assert masks.rle_box_xyxy_px(rle) == (1, 1, 4, 3)


def test_polygons_are_joined():
    mask = masks.rasterize_polygons([RECTANGLE, np.add(RECTANGLE, (1, 0)), np.add(RECTANGLE, (6, 0))], 4, 12)
    np.testing.assert_array_equal(mask[1], [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0])
    assert mask.sum() == 14


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(0, 300), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_columns_are_those_of_the_whole_drawing(num_parts, height, first, width, seed):
    rng = np.random.default_rng(seed)
    corners = [rng.uniform((first, -5), (first + width + 9, height + 5), (5, 2)).round(1) for _ in range(num_parts)]
    whole = masks.rasterize_polygons(corners, height, first + width)
    columns = masks.rasterize_columns([polygon.ravel() for polygon in corners], height, first, first + width)
    np.testing.assert_array_equal(columns, whole[:, first:])
    assert not whole[:, :first].any()


def test_polygon_beyond_the_canvas_is_cut():
    mask = masks.rasterize_polygons([np.array([[-5, -5], [3, -5], [3, 20], [-5, 20]], float)], 4, 6)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0, 0]] * 4)


def test_one_pixel_and_empty_masks():
    dot = np.zeros((3, 4), bool)
    dot[2, 1] = True
    assert masks.rle_area(masks.compress_rle(masks.encode_mask(dot))) == 1
    assert masks.mask_box_xyxy_px(dot) == (1, 2, 2, 3)
    empty = masks.segmentation_to_rle((), 3, 4)
    assert masks.rle_area(empty) == 0
    assert masks.mask_box_xyxy_px(masks.decode_rle(empty)) is None


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="at least 3 points"):
        masks.rasterize_polygons([RECTANGLE[:2]], 5, 6)
    with pytest.raises(ValueError, match=r"2x3 .* not 3x2"):
        masks.segmentation_to_rle({"size": [2, 3], "counts": [6]}, 3, 2)
    with pytest.raises(ValueError, match="shape"):
        masks.encode_mask(np.zeros((1, 2, 3)))
