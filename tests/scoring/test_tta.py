"""Views of one image and the merging of what they show, worked out by hand."""

import numpy as np
import pytest

from instseg_jax.scoring.tta import flip_back, merge_views, parse_views, scaled_sizes
from instseg_jax.types import Detections


def view(*instances: tuple, grid: int = 8) -> Detections:
    """One image's detections, of (score, label, box, level of the mask inside the box)."""
    logits = np.full((1, len(instances), grid, grid), -4.0, np.float32)
    for i, (_, _, (x1, y1, x2, y2), level) in enumerate(instances):
        logits[0, i, round(y1 * grid) : round(y2 * grid), round(x1 * grid) : round(x2 * grid)] = level
    scores, labels, boxes = ([instance[k] for instance in instances] for k in range(3))
    return Detections(
        np.array([scores], np.float32), np.array([labels], np.int32), np.array([boxes], np.float32), logits
    )


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def test_names_of_views():
    assert parse_views(None) == parse_views("") == ()
    assert parse_views("flip, scales") == ("flip", "scales")
    with pytest.raises(ValueError, match="--tta is 'flip,turn'; it may name flip and scales"):
        parse_views("flip,turn")


def test_sizes_are_multiples_and_each_once():
    assert scaled_sizes(640, (0.75, 1.25), 32) == (640, 480, 800)
    assert scaled_sizes(64, (0.9, 1.1, 0.1), 32) == (64, 32)
    assert all(size % 32 == 0 for size in scaled_sizes(320, (0.3, 0.77, 1.9), 32))


def test_flipping_back_is_the_mirror_image_and_its_own_inverse():
    found = view((0.9, 3, (0.125, 0.25, 0.5, 0.75), 5.0))
    back = flip_back(found)
    np.testing.assert_allclose(back.boxes_xyxy[0, 0], [0.5, 0.25, 0.875, 0.75])
    assert (back.mask_logits[0, 0] > 0).nonzero()[1].tolist() == [4, 5, 6] * 4
    again = flip_back(back)
    np.testing.assert_array_equal(again.boxes_xyxy, found.boxes_xyxy)
    np.testing.assert_array_equal(again.mask_logits, found.mask_logits)


def test_what_two_views_agree_on_is_averaged_by_score():
    one = view((0.8, 1, LEFT, 4.0))
    two = view((0.4, 1, (0.0, 0.0, 0.5, 0.9), 1.0))
    merged = merge_views([one, two], num_detections=5)
    assert merged.scores.shape == (1, 1) and merged.labels.tolist() == [[1]]
    assert merged.scores[0, 0] == pytest.approx(0.6)
    np.testing.assert_allclose(merged.boxes_xyxy[0, 0], [0, 0, 0.5, (0.8 * 1 + 0.4 * 0.9) / 1.2], rtol=1e-6)
    assert merged.mask_logits[0, 0, 0, 0] == pytest.approx((0.8 * 4 + 0.4 * 1) / 1.2)


def test_what_one_view_alone_sees_loses_score():
    one = view((0.8, 1, LEFT, 4.0), (0.1, 5, LEFT, 4.0), (0.1, 6, LEFT, 4.0))
    two = view((0.6, 1, RIGHT, 3.0), (0.5, 2, LEFT, 3.0))  # another place; the same place, another class
    merged = merge_views([one, two], num_detections=5)
    np.testing.assert_allclose(merged.scores, [[0.4, 0.3, 0.25]])
    assert merged.labels.tolist() == [[1, 1, 2]]
    np.testing.assert_allclose(merged.boxes_xyxy[0], [LEFT, RIGHT, LEFT])
    assert merged.mask_logits[0, 1, 0].tolist() == pytest.approx([-4] * 4 + [3] * 4)


def test_two_objects_of_one_view_stay_two():
    """Near doubles within a view are not merged; of several fits the closest is taken."""
    near = (0.0, 0.0, 0.5, 0.9)
    one = view((0.9, 0, LEFT, 4.0), (0.7, 0, near, 4.0))
    two = view((0.6, 0, near, 4.0))
    merged = merge_views([one, two], num_detections=5)
    np.testing.assert_allclose(merged.scores, [[(0.7 + 0.6) / 2, 0.9 / 2]])
    np.testing.assert_allclose(merged.boxes_xyxy[0], [near, LEFT], rtol=1e-6)


def test_merging_a_view_with_itself_changes_nothing():
    rng = np.random.default_rng(0)
    corner = rng.random((2, 7, 2)) * 0.5
    found = Detections(
        -np.sort(-rng.random((2, 7)).astype(np.float32)),
        np.tile(np.arange(7, dtype=np.int32), (2, 1)),
        np.concatenate([corner, corner + 0.3], axis=-1).astype(np.float32),
        rng.normal(size=(2, 7, 8, 8)).astype(np.float32),
    )
    merged = merge_views([found, found, found], num_detections=7)
    for name in ("scores", "labels", "boxes_xyxy", "mask_logits"):
        np.testing.assert_allclose(getattr(merged, name), getattr(found, name), rtol=1e-5, atol=1e-6)


def test_masks_of_other_grids_come_to_the_first_one():
    one, two = view((0.5, 0, LEFT, 4.0), grid=8), view((0.5, 0, LEFT, 4.0), grid=16)
    merged = merge_views([one, two], num_detections=1)
    assert merged.mask_logits.shape == (1, 1, 8, 8)
    np.testing.assert_array_equal(merged.mask_logits[0, 0] > 0, one.mask_logits[0, 0] > 0)


def test_images_keep_equally_many():
    """One image's views agree, the other's do not; the weakest of the latter go."""
    agreeing = [view((0.9, 0, LEFT, 4.0), (0.5, 1, LEFT, 4.0))] * 2
    differing = [view((0.9, 0, LEFT, 4.0), (0.5, 1, LEFT, 4.0)), view((0.9, 0, LEFT, 4.0), (0.6, 2, RIGHT, 4.0))]
    both = [
        Detections(*map(np.concatenate, zip(fields(a), fields(b), strict=True)))
        for a, b in zip(agreeing, differing, strict=True)
    ]
    merged = merge_views(both, num_detections=9)
    np.testing.assert_allclose(merged.scores, [[0.9, 0.5], [0.9, 0.3]])
    assert merged.labels.tolist() == [[0, 1], [0, 2]]


def fields(found: Detections) -> tuple:
    return found.scores, found.labels, found.boxes_xyxy, found.mask_logits


def test_the_best_stay_when_there_are_too_many():
    one, two = view((0.8, 1, LEFT, 4.0)), view((0.9, 1, RIGHT, 3.0))
    merged = merge_views([one, two], num_detections=1)
    np.testing.assert_allclose(merged.boxes_xyxy[0, 0], RIGHT)
