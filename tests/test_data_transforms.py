"""Decoding, augmentation and resizing: against the reference's own numbers, and against plain array operations."""

import dataclasses
import json
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instseg_jax import images, masks
from instseg_jax.data import coco, examples, rasterize, transforms

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "reference_transforms.json").read_text())
RECIPE = transforms.Augmentation(
    photometric_probability=0.8,
    expand_probability=0.5,
    expand_max_ratio=4.0,
    crop_probability=0.8,
    flip_probability=0.5,
    vertical_flip_probability=0.0,
    quarter_turns=False,
    scale_jitter=None,
)
NOTHING = dataclasses.replace(
    RECIPE, photometric_probability=0.0, expand_probability=0.0, crop_probability=0.0, flip_probability=0.0
)


def layout(**changes):
    return dataclasses.replace(
        examples.Layout("stretch", mask_stride=1, mask_rasterization="exact", refit_boxes=False, max_instances=9),
        **changes,
    )


def rectangle(x1, y1, x2, y2):
    return (np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64),)


def make_example(height=40, width=60, boxes=((5, 4, 25, 20), (30, 10, 50, 38)), seed=0):
    """A noise picture with one rectangular object for each box."""
    return examples.Example(
        image=np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8),
        view=rasterize.whole_view(height, width),
        is_float=False,
        boxes_xyxy_px=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.arange(len(boxes), dtype=np.int32),
        segmentations=tuple(rectangle(*box) for box in boxes),
    )


def seen_pixels(example):
    dtype = np.float32 if example.is_float else np.uint8
    return rasterize.view_pixels(example.image, example.view, examples.FILL_COLOR, dtype)


def seen_masks(example, rasterization="exact"):
    return rasterize.render_masks(
        example.segmentations,
        example.image.shape[:2],
        example.view,
        example.view.size,
        example.view.size,
        mask_stride=1,
        rasterization=rasterization,
    )


def assert_same(a, b):
    np.testing.assert_array_equal(seen_pixels(a), seen_pixels(b))
    np.testing.assert_array_equal(seen_masks(a), seen_masks(b))
    np.testing.assert_allclose(a.boxes_xyxy_px, b.boxes_xyxy_px)
    np.testing.assert_array_equal(a.labels, b.labels)


# The reference's own numbers: its transforms, run with both of its random generators seeded.


class ReferenceGenerator:
    """Stands in for np.random.Generator and draws what the reference draws, from the same generators."""

    def __init__(self, decide):
        self.random = decide

    def uniform(self, low, high):
        return np.random.uniform(low, high)  # noqa: NPY002

    def integers(self, low, high):
        return np.random.randint(low, high)  # noqa: NPY002

    def permutation(self, n):
        return np.random.permutation(n)  # noqa: NPY002


def reference_example():
    stored = np.load(DATA / "reference_transforms.npz")
    packed = np.unpackbits(stored["masks_packed"])[: 3 * 150 * 211].reshape(3, 150, 211)
    return examples.Example(
        image=stored["image"],
        view=rasterize.whole_view(150, 211),
        is_float=False,
        boxes_xyxy_px=stored["boxes"],
        labels=np.array([1, 2, 3], np.int32),
        segmentations=tuple(masks.encode_mask(mask) for mask in packed),
    )


def run_reference_case(name, example):
    """The reference decides by one generator or the other, and to expand when the draw is high."""
    if name == "RandomDistort":
        return transforms.distort_colors(example, ReferenceGenerator(random.random), probability=0.8)
    if name == "RandomExpand":
        generator = ReferenceGenerator(lambda: 1 - np.random.uniform())  # noqa: NPY002
        return transforms.expand_canvas(example, generator, probability=0.5, max_ratio=4.0)
    if name == "RandomCrop":
        return transforms.crop_around_objects(example, ReferenceGenerator(random.random), probability=0.8)
    generator = ReferenceGenerator(np.random.uniform)
    return transforms.flip_randomly(example, generator, probability=0.5, horizontal=True)


@pytest.mark.parametrize("case", REFERENCE)
def test_augmentations_equal_the_reference(case):
    name, seed = case.split("_")
    np.random.seed(int(seed))  # noqa: NPY002
    random.seed(int(seed))
    expected = REFERENCE[case]
    result = run_reference_case(name, reference_example())
    pixels = seen_pixels(result)
    assert list(pixels.shape) == expected["shape"]
    assert str(pixels.dtype) == expected["dtype"]
    assert pixels.mean(dtype=np.float64) == pytest.approx(expected["mean"], abs=1e-9)
    np.testing.assert_array_equal(result.boxes_xyxy_px, np.array(expected["boxes"], np.float32))
    assert result.labels.tolist() == expected["cls"]
    assert [int(mask.sum()) for mask in seen_masks(result)] == expected["mask_area"]


def test_reference_cases_cover_applied_and_skipped():
    for name in ("RandomDistort", "RandomExpand", "RandomCrop", "RandomFlip"):
        means = {(case["mean"], str(case["boxes"])) for key, case in REFERENCE.items() if key.startswith(name)}
        assert len(means) >= 2, name


def test_resized_masks_and_boxes_equal_the_reference():
    stored = np.load(DATA / "reference_transforms.npz")
    sample = examples.finish(reference_example(), (256, 256), "linear", layout())
    expected = np.unpackbits(stored["resized_masks_packed"])[: 3 * 256 * 256].reshape(3, 256, 256)
    np.testing.assert_array_equal(sample.masks, expected)
    np.testing.assert_allclose(sample.boxes, stored["resized_boxes"], atol=1e-7)


def test_evaluation_pixels_equal_the_reference():
    stored = np.load(DATA / "reference_transforms.npz")
    sample = examples.finish(reference_example(), (96, 128), "cubic", layout())
    # OpenCV rounds a handful of the bicubic values the other way from version to version.
    difference = np.abs(np.rint(sample.image * 255) - stored["downsized"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4


# The view against carrying out each step with plain array operations.


def expand_arrays(pixels, canvas, y, x, fill):
    out = np.empty((*canvas, *pixels.shape[2:]), np.float32 if pixels.ndim == 3 else np.uint8)
    out[...] = fill
    out[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return out


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["crop", "expand", "flip_x", "flip_y", "turn"]), max_size=6), st.integers(0, 10**6))
def test_view_equals_carrying_out_each_step(steps, seed):
    rng = np.random.default_rng(seed)
    example = make_example(23, 31, boxes=((2, 3, 20, 21), (12, 5, 29, 19)), seed=seed)
    pixels, drawn = example.image, seen_masks(example)
    for step in steps:
        h, w = example.view.size
        if step == "crop":
            ch, cw = int(rng.integers(1, h + 1)), int(rng.integers(1, w + 1))
            y, x = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
            view = rasterize.move_view(example.view, y, x, ch, cw)
            pixels, drawn = pixels[y : y + ch, x : x + cw], drawn[:, y : y + ch, x : x + cw]
        elif step == "expand":
            canvas = (h + int(rng.integers(1, 9)), w + int(rng.integers(1, 9)))
            y, x = int(rng.integers(0, canvas[0] - h + 1)), int(rng.integers(0, canvas[1] - w + 1))
            view = rasterize.move_view(example.view, -y, -x, *canvas)
            example = dataclasses.replace(example, is_float=True)
            pixels = expand_arrays(pixels, canvas, y, x, examples.FILL_COLOR)
            drawn = np.stack([expand_arrays(mask, canvas, y, x, 0) for mask in drawn])
        elif step == "turn":
            view = rasterize.turn_view(example.view)
            pixels, drawn = np.rot90(pixels), np.rot90(drawn, axes=(1, 2))
        else:
            view = rasterize.flip_view(example.view, horizontal=step == "flip_x")
            axis = 1 if step == "flip_x" else 0
            pixels, drawn = np.flip(pixels, axis), np.flip(drawn, axis + 1)
        example = dataclasses.replace(example, view=view)
    assert example.view.size == pixels.shape[:2]
    np.testing.assert_array_equal(seen_pixels(example), pixels)
    np.testing.assert_array_equal(seen_masks(example), drawn)
    size = (64, 48)
    sample = examples.finish(example, size, "linear", layout())
    resized = [cv2.resize(np.ascontiguousarray(m), size[::-1], interpolation=cv2.INTER_NEAREST) for m in drawn]
    np.testing.assert_array_equal(sample.masks, resized)
    whole = cv2.resize(np.ascontiguousarray(pixels), size[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(sample.image, whole / 255.0, atol=1e-6)


def test_flipping_twice_and_turning_four_times_change_nothing():
    example = make_example()
    for horizontal in (True, False):
        once = transforms.flip(example, horizontal=horizontal)
        assert (seen_pixels(once) != seen_pixels(example)).any()
        assert_same(transforms.flip(once, horizontal=horizontal), example)
    turned = example
    for _ in range(4):
        turned = transforms.turn(turned)
    assert transforms.turn(example).view.size == (60, 40)
    assert_same(turned, example)


def test_boxes_follow_flips_and_turns():
    example = make_example(40, 60, boxes=((5, 4, 25, 20),))
    assert transforms.flip(example, horizontal=True).boxes_xyxy_px.tolist() == [[35, 4, 55, 20]]
    assert transforms.flip(example, horizontal=False).boxes_xyxy_px.tolist() == [[5, 20, 25, 36]]
    assert transforms.turn(example).boxes_xyxy_px.tolist() == [[4, 35, 20, 55]]


@pytest.mark.parametrize("rasterization", ["exact", "polygon"])
@pytest.mark.parametrize("seed", range(30))
def test_boxes_of_rectangles_stay_the_extents_of_their_masks(seed, rasterization):
    rng = np.random.default_rng(seed)
    example = make_example(boxes=((5, 4, 25, 20), (30, 10, 50, 38), (0, 0, 60, 40)))
    augmentation = dataclasses.replace(
        RECIPE, photometric_probability=0.0, vertical_flip_probability=0.5, quarter_turns=True, scale_jitter=(0.7, 1.4)
    )
    result = transforms.augment(example, rng, augmentation)
    drawn = seen_masks(result, rasterization)
    assert 1 <= len(drawn) <= 3
    extents = [masks.mask_box_xyxy_px(mask) for mask in drawn]
    np.testing.assert_array_equal(extents, result.boxes_xyxy_px)


def test_crop_keeps_objects_with_their_centre_inside():
    example = make_example(40, 60, boxes=((0, 0, 10, 10), (4, 0, 10, 10), (20, 20, 30, 30), (0, 0, 5, 5)))
    cropped = transforms.crop(example, y=5, x=5, height=20, width=25)
    # Centres (5, 5), (7, 5), (25, 25), (2.5, 2.5); inside is 5 <= x < 30 and 5 <= y < 25.
    assert cropped.labels.tolist() == [0, 1]
    assert cropped.boxes_xyxy_px.tolist() == [[0, 0, 5, 5], [0, 0, 5, 5]]
    np.testing.assert_array_equal(seen_pixels(cropped), example.image[5:25, 5:30])
    assert len(cropped.segmentations) == 2


def test_what_was_cropped_away_does_not_come_back():
    example = make_example(40, 60, boxes=((0, 0, 60, 40),))
    cropped = transforms.crop(example, y=10, x=10, height=20, width=30)
    widened = transforms.crop(cropped, y=-5, x=-5, height=30, width=40)
    pixels = seen_pixels(dataclasses.replace(widened, is_float=True))
    np.testing.assert_array_equal(pixels[5:25, 5:35], example.image[10:30, 10:40])
    np.testing.assert_allclose(pixels[:5], np.broadcast_to(examples.FILL_COLOR, (5, 40, 3)), rtol=1e-6)
    for rasterization in ("exact", "polygon"):
        assert masks.mask_box_xyxy_px(seen_masks(widened, rasterization)[0]) == (5, 5, 35, 25)


def test_crop_rules_over_many_draws():
    example = make_example(boxes=((5, 4, 25, 20), (30, 10, 50, 38)))
    shapes = set()
    for seed in range(200):
        result = transforms.crop_around_objects(example, np.random.default_rng(seed), probability=1.0)
        height, width = result.view.size
        shapes.add((height, width))
        assert len(result.labels) >= 1
        assert 0.29 <= np.sqrt(height * width / 2400) <= 1
        if (height, width) != (40, 60):
            assert 0.4 < (width / 60) / (height / 40) < 2.5
    assert (40, 60) in shapes
    assert len(shapes) > 50


def test_crop_of_a_tiny_picture_and_of_one_without_objects():
    empty = make_example(boxes=())
    assert transforms.crop_around_objects(empty, np.random.default_rng(0), probability=1.0) is empty
    dot = make_example(1, 1, boxes=((0, 0, 1, 1),))
    for seed in range(20):
        result = transforms.crop_around_objects(dot, np.random.default_rng(seed), probability=1.0)
        assert result.view.size == (1, 1)


def test_jitter_zooms_in_and_out_without_changing_the_shape():
    example = make_example(40, 60, boxes=((25, 15, 35, 25),))
    for low, high, sizes in ((2.0, 2.0, (20, 30)), (0.5, 0.5, (80, 120))):
        for seed in range(20):
            result = transforms.jitter_scale(example, np.random.default_rng(seed), scale_range=(low, high))
            assert result.view.size in (sizes, (40, 60))
            assert len(result.labels) == 1
    assert result.is_float
    corner = make_example(40, 60, boxes=((0, 0, 3, 3),))
    views = {
        transforms.jitter_scale(corner, np.random.default_rng(s), scale_range=(4.0, 4.0)).view.size for s in range(50)
    }
    assert (40, 60) in views  # a crop that would lose the only object is not made


def test_nothing_happens_with_probability_zero():
    example = make_example()
    assert_same(transforms.augment(example, np.random.default_rng(0), NOTHING), example)


def test_same_generator_same_result_and_another_seed_another():
    example = make_example()
    a, b, c = (transforms.augment(example, np.random.default_rng([7, 0, s]), RECIPE) for s in (3, 3, 4))
    assert_same(a, b)
    assert a.view != c.view or (a.image != c.image).any()


def test_distortion_changes_colours_only():
    example = make_example()
    for seed in range(40):
        result = transforms.distort_colors(example, np.random.default_rng(seed), probability=1.0)
        assert result.is_float
        assert result.image.dtype == np.uint8
        assert result.view == example.view
    changed = [
        (transforms.distort_colors(example, np.random.default_rng(s), probability=1.0).image != example.image).any()
        for s in range(40)
    ]
    assert 25 < sum(changed) < 40  # all four are left out once in 16


def test_limit_objects_is_a_random_choice_in_order():
    example = make_example(boxes=[(i, 0, i + 4, 4) for i in range(10)])
    kept, dropped = transforms.limit_objects(example, np.random.default_rng(0), max_instances=4)
    assert dropped == 6
    assert kept.labels.tolist() == sorted(set(kept.labels.tolist()))
    assert kept.boxes_xyxy_px[:, 0].tolist() == kept.labels.tolist()
    other, _ = transforms.limit_objects(example, np.random.default_rng(1), max_instances=4)
    assert other.labels.tolist() != kept.labels.tolist()
    same, dropped = transforms.limit_objects(example, np.random.default_rng(0), max_instances=10)
    assert (same, dropped) == (example, 0)


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
        name="instance_train",
        image_folder=folder,
        images=(coco.ImageRecord(1, file_name, height, width),),
        annotations=((),),
        categories=("thing",),
        category_ids=(1,),
    )


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
