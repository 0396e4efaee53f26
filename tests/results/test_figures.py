"""Figures: what is drawn where, and what colours mean."""

import numpy as np
import pytest

from instseg_jax.geo.georeference import Georeference
from instseg_jax.masks import encode_mask
from instseg_jax.results import figures
from instseg_jax.results.result import Result

GREY = np.full((40, 60, 3), 128, np.uint8)
RED, GREEN = (255, 0, 0), (0, 255, 0)


def test_pictures_stand_in_rows_with_titles():
    figure = figures.show_pictures([GREY, GREY, GREY], ["a", "b", "c"], columns=2, width=6)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "c", ""]
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 0]
    figure.canvas.draw()
    tops = [axis.get_position().y1 for axis in figure.axes]
    assert tops[0] == tops[1] > tops[2]
    box = figure.axes[0].get_window_extent()
    assert box.width / box.height == pytest.approx(60 / 40, rel=1e-3)  # nothing is distorted


def test_pictures_and_titles_must_be_equally_many():
    with pytest.raises(ValueError, match="2 pictures, but 1 titles"):
        figures.show_pictures([GREY, GREY], ["a"], columns=2)
    with pytest.raises(ValueError, match="no picture"):
        figures.show_pictures([], columns=2)


def test_alike_features_get_alike_colours():
    """Two areas in 16 channels, a little noise: one colour each, far apart."""
    rng = np.random.default_rng(0)
    features = rng.normal(0, 0.01, (8, 8, 16))
    features[:, 4:] += rng.normal(0, 1, 16)
    shown = figures.features_to_rgb(features).astype(int)
    first = shown[..., 0]  # the first component tells the areas apart
    assert abs(first[:, :4].mean() - first[:, 4:].mean()) > 200
    assert first[:, :4].std() < 10 and first[:, 4:].std() < 10
    np.testing.assert_array_equal(shown, figures.features_to_rgb(3 * features + 7))  # neither scale nor origin matter


def test_features_of_two_channels_and_without_contrast_are_shown():
    assert figures.features_to_rgb(np.random.default_rng(0).random((4, 4, 2))).shape == (4, 4, 3)
    assert (figures.features_to_rgb(np.ones((4, 4, 5))) == 128).all()


def test_signs_have_their_colours():
    shown = figures.signed_to_rgb(np.array([[-4.0, 0.0, 4.0, 2.0, 9.0]]), limit=4)[0].astype(int)
    assert shown[0].tolist() == [33, 102, 172] and shown[2].tolist() == [178, 24, 43]
    assert shown[1].tolist() == [247, 247, 247]
    assert shown[3].tolist() == [212, 136, 145]  # half way from white to red, rounded to even
    assert shown[4].tolist() == shown[2].tolist()
    assert (figures.signed_to_rgb(np.zeros((2, 2))) == 247).all()


def test_heat_is_bright_where_values_are_high():
    heat = np.zeros((4, 6))
    heat[0, 0] = 1
    drawn = figures.draw_heat(GREY, heat).astype(int)
    assert drawn[2, 2].sum() > GREY[2, 2].sum() > drawn[-1, -1].sum()
    darker = figures.draw_heat(GREY, heat, limit=2).astype(int)
    assert darker[2, 2].sum() < drawn[2, 2].sum()
    assert (GREY == 128).all()  # the picture given is not drawn on


def test_boxes_are_drawn_where_they_lie():
    drawn = figures.draw_boxes(GREY, np.array([[0.5, 0.5, 0.5, 0.5]]), [RED], line=1)
    changed = (drawn != GREY).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max()) == pytest.approx((10, 30), abs=1)  # a quarter and three quarters of 40
    assert (columns.min(), columns.max()) == pytest.approx((15, 45), abs=1)
    assert not changed[15:25, 20:40].any()


def test_points_are_discs_of_their_colour_and_size():
    points = np.array([[0.25, 0.5], [0.75, 0.5], [1e9, 0.0], [np.nan, 0.5]])
    drawn = figures.draw_points(GREY, points, [RED, GREEN, RED, RED], radii=[3.0, 6.0, 3.0, 3.0])
    assert drawn[20, 15].tolist() == list(RED) and drawn[20, 45].tolist() == list(GREEN)
    small = (drawn[:, :30] == RED).all(axis=-1).sum()
    large = (drawn[:, 30:] == GREEN).all(axis=-1).sum()
    assert 3 < large / small < 5  # four times the area
    with pytest.raises(ValueError, match="shorter"):
        figures.draw_points(GREY, points, [RED])


def test_targets_coarser_than_the_picture_are_drawn_in_their_place():
    mask = np.zeros((1, 20, 30), np.uint8)
    mask[0, 5:15, 5:25] = 1
    image = np.full((40, 60, 3), 0.5, np.float32)
    drawn = figures.draw_targets(image, np.array([[0.5, 0.5, 2 / 3, 0.5]]), [0], mask, ["house"])
    assert (drawn[20, 30] != 128).any() and (drawn[28, 48] != 128).any()
    assert (drawn[33:] == 128).all() and (drawn[20, 55] == 128).all()


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.int64)])
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(ValueError, match="picture to draw on must be"):
        figures.draw_boxes(image, np.zeros((0, 4)), [])


def place(transform) -> Georeference:
    return Georeference(transform, None, None)


def mapped(**changes) -> Result:
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:40] = True
    box = {"cls_id": 0, "label": "house", "score": 0.9, "coordinate": [30, 10, 40, 20]}
    fields = {"image": GREY, "georeference": place((2.0, 0.0, 1000.0, 0.0, -2.0, 5000.0))} | changes
    return Result("a.tif", (40, 60), [box], [encode_mask(mask)], **fields)


def test_a_map_has_the_coordinates_of_the_ground():
    figure = figures.draw_map(mapped())
    axis = figure.axes[0]
    assert axis.get_xlim() == (1000, 1120) and axis.get_ylim() == (4920, 5000)
    (outline,) = axis.patches
    points = outline.get_xy()
    assert points.min(axis=0).tolist() == [1060, 4960] and points.max(axis=0).tolist() == [1080, 4980]


def test_a_map_needs_picture_and_place():
    with pytest.raises(ValueError, match="no georeference"):
        figures.draw_map(mapped(georeference=None))
    with pytest.raises(ValueError, match="no picture"):
        figures.draw_map(mapped(image=None))
    with pytest.raises(ValueError, match="without rotation"):
        figures.draw_map(mapped(georeference=place((2.0, 0.1, 0.0, 0.1, -2.0, 0.0))))
