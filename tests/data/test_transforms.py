"""Decoding, augmentation and resizing: against the reference's own numbers, and against plain array operations."""

import dataclasses
import json
import random

import cv2
import numpy as np
import pytest
from example_data import NOTHING, RECIPE, assert_same, layout, make_example, seen_masks, seen_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from places import FIXTURES

from instseg_jax import masks
from instseg_jax.data import examples, rasterize, transforms

REFERENCE = json.loads((FIXTURES / "reference_transforms.json").read_text())

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
    stored = np.load(FIXTURES / "reference_transforms.npz")
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
    stored = np.load(FIXTURES / "reference_transforms.npz")
    sample = examples.finish(reference_example(), (256, 256), "linear", layout())
    expected = np.unpackbits(stored["resized_masks_packed"])[: 3 * 256 * 256].reshape(3, 256, 256)
    np.testing.assert_array_equal(sample.masks, expected)
    np.testing.assert_allclose(sample.boxes, stored["resized_boxes"], atol=1e-7)


def test_evaluation_pixels_equal_the_reference():
    stored = np.load(FIXTURES / "reference_transforms.npz")
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


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_colours_of_a_part_are_those_of_the_whole(seed):
    """Distorting what a crop sees gives the pixels that distorting everything and then cropping gives."""
    example = make_example(seed=seed)
    rng = np.random.default_rng(seed)
    y, x = int(rng.integers(0, 20)), int(rng.integers(0, 30))
    first = transforms.crop(
        transforms.distort_colors(example, np.random.default_rng(seed), probability=1.0), y, x, 15, 20
    )
    last = transforms.distort_colors(
        transforms.crop(example, y, x, 15, 20), np.random.default_rng(seed), probability=1.0
    )
    np.testing.assert_array_equal(seen_pixels(first), seen_pixels(last))


def test_colours_of_a_view_that_sees_nothing():
    example = transforms.crop(make_example(), -50, -50, 20, 20)
    result = transforms.distort_colors(example, np.random.default_rng(1), probability=1.0)
    assert seen_pixels(result).shape == (20, 20, 3)
