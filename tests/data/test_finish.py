"""Resizing, drawing masks and decoding: against numbers worked out by hand and plain array operations."""

import dataclasses

import numpy as np
import pytest
from example_data import RECIPE, layout, make_example, rectangle
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from instseg_jax import images, masks
from instseg_jax.data import coco, examples, rasterize, transforms

# Finishing.


def test_finish_normalises_boxes_of_a_stretched_picture():
    sample = examples.finish(make_example(40, 60, boxes=((15, 10, 45, 30),)), (80, 60), "linear", layout())
    np.testing.assert_allclose(sample.boxes, [[0.5, 0.5, 0.5, 0.5]])
    assert sample.image.shape == (80, 60, 3)
    assert sample.image.dtype == np.float32
    assert masks.mask_box_xyxy_px(sample.masks[0]) == (15, 20, 45, 60)
    assert (sample.original_size, sample.content_size) == ((40, 60), (80, 60))


def test_boxes_that_reach_beyond_the_picture_are_clipped():
    example = make_example(40, 60, boxes=((-10, 20, 30, 50),))
    sample = examples.finish(example, (40, 60), "linear", layout())
    np.testing.assert_allclose(sample.boxes, [[0.25, 0.75, 0.5, 0.5]])


def test_letterbox_fills_the_top_left_and_is_black_beyond():
    example = make_example(40, 60, boxes=((0, 0, 60, 40), (30, 20, 60, 40)))
    sample = examples.finish(example, (96, 96), "linear", layout(resize="letterbox"))
    assert sample.content_size == (64, 96)
    assert sample.image[:64].min(axis=-1).max() > 0
    assert not sample.image[64:].any()
    assert [masks.mask_box_xyxy_px(mask) for mask in sample.masks] == [(0, 0, 96, 64), (48, 32, 96, 64)]
    np.testing.assert_allclose(sample.boxes[0], [0.5, 1 / 3, 1, 2 / 3], rtol=1e-6)
    turned = examples.finish(transforms.turn(example), (96, 96), "linear", layout(resize="letterbox"))
    assert turned.content_size == (96, 64)


@pytest.mark.parametrize("rasterization", ["exact", "polygon"])
def test_letterbox_does_not_show_what_a_crop_cut_away(rasterization):
    example = transforms.crop(make_example(40, 60, boxes=((10, 0, 50, 40),)), y=10, x=0, height=20, width=60)
    sample = examples.finish(example, (60, 60), "linear", layout(resize="letterbox", mask_rasterization=rasterization))
    assert sample.content_size == (20, 60)
    assert masks.mask_box_xyxy_px(sample.masks[0]) == (10, 0, 50, 20)


@pytest.mark.parametrize("rasterization", ["exact", "polygon"])
def test_strided_masks_of_rectangles(rasterization):
    example = make_example(32, 64, boxes=((8, 4, 24, 20),))
    sample = examples.finish(example, (64, 128), "linear", layout(mask_stride=4, mask_rasterization=rasterization))
    assert sample.masks.shape == (1, 16, 32)
    assert masks.mask_box_xyxy_px(sample.masks[0]) == (4, 2, 12, 10)
    assert sample.masks.sum() == 64


@pytest.mark.parametrize("stride", [1, 4])
def test_both_rasterizations_agree_but_for_the_outline(stride):
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    disc = np.stack([100 + 60 * np.cos(angle), 90 + 50 * np.sin(angle)], axis=1)
    example = dataclasses.replace(make_example(180, 200, boxes=((40, 40, 160, 140),)), segmentations=((disc,),))
    example = transforms.flip(transforms.crop(example, y=20, x=30, height=150, width=140), horizontal=True)
    exact, polygon = (
        examples.finish(example, (256, 256), "linear", layout(mask_stride=stride, mask_rasterization=r)).masks[0]
        for r in ("exact", "polygon")
    )
    assert (exact != polygon).any()
    assert (exact & polygon).sum() / (exact | polygon).sum() > 0.97
    # pi * 60 * 50 source pixels, enlarged by 256 / 150 and 256 / 140
    assert polygon.sum() * stride**2 == pytest.approx(np.pi * 3000 * 256 / 150 * 256 / 140, rel=0.02)


def test_run_length_codes_are_drawn_exactly_in_both_ways():
    disc = np.hypot(*np.mgrid[-20:20, -30:30]) < 15
    example = dataclasses.replace(
        make_example(40, 60, boxes=((15, 5, 45, 35),)), segmentations=(masks.encode_mask(disc),)
    )
    exact, polygon = (
        examples.finish(example, (80, 120), "linear", layout(mask_rasterization=r)).masks for r in ("exact", "polygon")
    )
    np.testing.assert_array_equal(exact, polygon)
    np.testing.assert_array_equal(exact[0], np.kron(disc, np.ones((2, 2))))


def test_refit_boxes_follow_what_is_left_of_the_masks():
    # An L of two bars: cropping its foot away leaves the thin upright bar.
    upright, foot = rectangle(10, 0, 14, 40)[0], rectangle(10, 30, 40, 40)[0]
    hidden = rectangle(50, 0, 51, 1)
    example = dataclasses.replace(
        make_example(40, 60, boxes=((10, 0, 40, 40), (20, 0, 60, 20))), segmentations=((upright, foot), hidden)
    )
    cropped = transforms.crop(example, y=0, x=0, height=30, width=41)
    assert len(cropped.labels) == 2
    for stride in (1, 2):
        kept = examples.finish(cropped, (30, 41 * 2), "linear", layout(mask_stride=stride))
        assert len(kept.labels) == 2
        refit = examples.finish(cropped, (30, 41 * 2), "linear", layout(mask_stride=stride, refit_boxes=True))
        assert refit.labels.tolist() == [0]  # of the other object no pixel is left
        np.testing.assert_allclose(refit.boxes, [[12 / 41, 0.5, 4 / 41, 1.0]], rtol=1e-6)
        np.testing.assert_array_equal(refit.masks, kept.masks[:1])


def test_one_pixel_object_and_no_object():
    example = make_example(32, 32, boxes=((7, 9, 8, 10),))
    sample = examples.finish(example, (64, 64), "linear", layout())
    assert sample.masks.sum() == 4
    assert masks.mask_box_xyxy_px(sample.masks[0]) == (14, 18, 16, 20)
    empty = examples.finish(make_example(boxes=()), (64, 64), "linear", layout(refit_boxes=True))
    assert (empty.boxes.shape, empty.masks.shape, empty.labels.shape) == ((0, 4), (0, 64, 64), (0,))


def test_uint8_pixels_saturate_and_float_pixels_overshoot():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 255
    example = dataclasses.replace(make_example(8, 8, boxes=()), image=image)
    whole = examples.finish(example, (64, 64), "cubic", layout()).image
    assert (whole.min(), whole.max()) == (0.0, 1.0)
    real = examples.finish(dataclasses.replace(example, is_float=True), (64, 64), "cubic", layout()).image
    assert real.min() < -0.01
    assert real.max() > 1.01


# Decoding.


def dataset_of(folder, file_name, width, height):
    return coco.CocoDataset(
        annotation_file=folder / "set.json",
        name="instance_train",
        image_folder=folder,
        images=(coco.ImageRecord(1, file_name, height, width),),
        annotations=((),),
        categories=("thing",),
        category_ids=(1,),
    )


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_8_bit_value_becomes_its_255th(channels):
    values = np.arange(256, dtype=np.uint8).reshape(2, 128, 1).repeat(channels, axis=2)
    place = np.full((3, 140, channels), 7, np.float32)
    images.resize_pixels(values, (2, 128), (3, 140), "linear", place)
    np.testing.assert_array_equal(place[:2, :128], values.astype(np.float32) * np.float32(1 / 255))
    assert not place[2:].any() and not place[:, 128:].any()


def test_images_are_turned_as_exif_says(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the left half comes to the top
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = examples.load_example(dataset_of(tmp_path, "a.jpg", 16, 32), 0).image
    assert image.shape == (32, 16, 3)
    assert image[:12].mean(axis=(0, 1)) == pytest.approx([254, 0, 0], abs=3)
    assert image[20:].mean() < 3
    with pytest.raises(ValueError, match=r"a\.jpg' is 16x32 pixels \(turned .* EXIF .*instance_train says 32x16"):
        examples.load_example(dataset_of(tmp_path, "a.jpg", 32, 16), 0)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 6), 77, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 6, 4), (10, 20, 30, 255), np.uint8)).save(tmp_path / "clear.png")
    assert images.read_image(tmp_path / "grey.png").tolist() == np.full((4, 6, 3), 77).tolist()
    assert images.read_image(tmp_path / "clear.png")[0, 0].tolist() == [10, 20, 30]


def test_image_errors_name_the_file_and_both_sizes(tmp_path):
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png' is 6x4 pixels, but instance_train says 7x4"):
        examples.load_example(dataset_of(tmp_path, "a.png", 7, 4), 0)
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for name in ("text.jpg", "empty.jpg"):
        with pytest.raises(ValueError, match=f"{name}' can't be read as an image"):
            examples.load_example(dataset_of(tmp_path, name, 6, 4), 0)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        examples.load_example(dataset_of(tmp_path, "none.jpg", 6, 4), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": "pad"}, "data.resize must be one of stretch, letterbox, got 'pad'"),
        ({"mask_rasterization": "fast"}, "data.mask_rasterization .* got 'fast'"),
        ({"mask_stride": 0}, "data.mask_stride .* got 0"),
        ({"max_instances": -1}, "data.max_instances .* got -1"),
    ],
)
def test_layout_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        layout(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_probability": 1.5}, "data.augment.flip_probability must be between 0 and 1, got 1.5"),
        ({"expand_max_ratio": 0.5}, "data.augment.expand_max_ratio must be at least 1, got 0.5"),
        ({"scale_jitter": (2.0, 1.0)}, "data.augment.scale_jitter"),
        ({"scale_jitter": (0.0, 1.0)}, "data.augment.scale_jitter"),
    ],
)
def test_augmentation_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **changes)


@given(st.integers(0, 100_000))
@example(5373)  # an edge that passes in the middle between two pixels
@settings(max_examples=150, deadline=None)
def test_drawing_in_the_own_box_changes_no_pixel(seed):
    """Polygons of any kind, many of them beyond the picture's borders, against drawing them in the whole picture."""
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(1, 60, 2))
    corners = [
        (rng.uniform(-0.4, 1.4, (int(rng.integers(3, 9)), 2)) * (width, height)) for _ in range(rng.integers(1, 4))
    ]
    if seed % 3 == 0:
        corners = [points.round() for points in corners]
    if seed % 5 == 0:
        corners = [points * 0.1 + rng.uniform(0, 0.9, 2) * (width, height) for points in corners]
    expected = masks.rasterize_polygons(corners, height, width)
    view, size = rasterize.whole_view(height, width), (height, width)
    for rasterization in ("exact", "polygon"):
        drawn = rasterize.render_masks(
            [tuple(corners), rectangle(0, 0, width, height)],
            size,
            view,
            size,
            size,
            mask_stride=1,
            rasterization=rasterization,
        )
        np.testing.assert_array_equal(drawn[0], expected)
        assert drawn[1].all()
