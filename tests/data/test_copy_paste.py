"""Instance copy-paste: pasted objects look like their originals, what is behind them shrinks, nothing else changes."""

import dataclasses

import numpy as np
import pytest
from example_data import NOTHING, make_example
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg_jax import masks
from instseg_jax.data import copy_paste


def drawn(example):
    """Masks [n, h, w] of all objects."""
    size = example.image.shape[:2]
    return np.array([masks.segmentation_to_mask(s, *size) for s in example.segmentations]).reshape(-1, *size)


def paste(example, donor, seed=0, **changes):
    arguments = {"max_objects": 3, "scale_range": (1.0, 1.0)} | changes
    return copy_paste.paste_objects(example, donor, np.random.default_rng(seed), **arguments)


def colored(color, boxes, **size):
    """A picture of one colour; objects differ from it by theirs."""
    example = make_example(boxes=boxes, **size)
    image = np.full_like(example.image, color)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = color + 100
    return dataclasses.replace(example, image=image, labels=example.labels + color)


@given(st.integers(0, 10_000), st.sampled_from([(1.0, 1.0), (0.4, 2.5)]))
@settings(max_examples=80, deadline=None)
def test_pixels_and_masks_belong_together(seed, scale_range):
    example = colored(10, [(5, 4, 25, 20), (30, 10, 50, 38)])
    donor = colored(100, [(2, 2, 14, 12), (20, 5, 40, 25), (45, 30, 58, 39)])
    result = paste(example, donor, seed, scale_range=scale_range)
    found = drawn(result)
    assert len(result.labels) == len(result.boxes_xyxy_px) == len(found)
    assert not (found.sum(axis=0) > 1).any()  # who is behind loses the pixels
    pasted = found[result.labels >= 100].any(axis=0)
    assert pasted.any() and (result.image[pasted] == 200).all()
    # Elsewhere nothing changed, but for what is left of an object that a later one hides.
    changed = (result.image != example.image).any(axis=2) & ~pasted
    assert (result.image[changed] == 200).all() and changed.sum() <= 0.2 * 20 * 20 * 2.5**2
    for mask, box in zip(found, result.boxes_xyxy_px, strict=True):
        assert box.tolist() == list(masks.mask_box_xyxy_px(mask))
    assert (example.image == colored(10, [(5, 4, 25, 20), (30, 10, 50, 38)]).image).all()  # its own is untouched


def test_scale_one_keeps_size_and_shape():
    example, donor = colored(10, []), colored(100, [(20, 5, 40, 25)])
    areas = {int(drawn(paste(example, donor, seed)).sum()) for seed in range(10)}
    assert areas == {20 * 20}
    places = {tuple(paste(example, donor, seed).boxes_xyxy_px[0]) for seed in range(10)}
    assert len(places) > 5


def test_an_object_behind_goes_when_little_of_it_is_left():
    donor = colored(100, [(0, 0, 54, 36)])  # nine tenths of each side of the picture
    example = colored(10, [(20, 15, 30, 25)])
    for seed in range(10):
        assert paste(example, donor, seed).labels.tolist() == [100]
    whole = colored(10, [(0, 0, 60, 40)])
    result = paste(whole, donor)
    assert result.labels.tolist() == [100]  # 456 of 2400 pixels are left: less than a fifth
    smaller = paste(whole, colored(100, [(0, 0, 30, 30)]))
    assert smaller.labels.tolist() == [10, 100]
    assert drawn(smaller)[0].sum() == 60 * 40 - 30 * 30


def test_a_donor_that_is_larger_is_made_to_fit():
    example, donor = colored(10, [], height=20, width=30), colored(100, [(0, 0, 60, 40)])
    (box,) = paste(example, donor).boxes_xyxy_px
    assert (box[2] - box[0], box[3] - box[1]) == (27, 18)


def test_objects_of_a_few_pixels_and_none():
    example = colored(10, [(5, 4, 25, 20)])
    assert paste(example, colored(100, [])) is example
    speck = colored(100, [(3, 3, 4, 4)])
    assert paste(example, speck).labels.tolist() == [10]


def test_count_is_bounded_and_random():
    example, donor = colored(10, []), colored(100, [(i * 6, 2, i * 6 + 3, 5) for i in range(8)])
    counts = {len(paste(example, donor, seed, max_objects=4).labels) for seed in range(60)}
    assert max(counts) <= 4 and len(counts) >= 3


def test_same_generator_same_result():
    example, donor = colored(10, [(5, 4, 25, 20)]), colored(100, [(2, 2, 14, 12), (20, 5, 40, 25)])
    a, b, c = (paste(example, donor, seed, scale_range=(0.5, 1.5)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.image, b.image)
    assert (a.image != c.image).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copy_paste_scale": (0.0, 1.0)}, "copy_paste_scale"),
        ({"copy_paste_scale": (2.0, 1.0)}, "copy_paste_scale"),
        ({"copy_paste_max_objects": 0}, "copy_paste_max_objects"),
        ({"copy_paste_probability": 1.5}, "copy_paste_probability"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NOTHING, **changes)
