"""The runner itself: it reads samples as it reads whole tensors, and tells errors from rounding."""

import numpy as np
import pytest
import synth
from reference import relative_error, stored_values, whole_tensor
from reference_starts import check_selection, check_start_boxes, same_boxes, tight_boxes


def test_samples_are_read_at_their_places():
    tensor = np.random.default_rng(0).standard_normal((3, 50, 40))
    samples = tensor.reshape(-1)[synth.subsample_indices("name", tensor.size, 64)]
    reference, mine = stored_values({"name@s": samples}, "name", tensor)
    np.testing.assert_array_equal(reference, mine)
    reference, mine = stored_values({"G@name": samples}, "G@name", tensor, "name")
    np.testing.assert_array_equal(reference, mine)
    reference, mine = stored_values({"name@s": samples}, "name", tensor + 1e-4)
    np.testing.assert_allclose(mine - reference, 1e-4)
    assert stored_values({"name@stat": samples}, "name", tensor) is None
    assert whole_tensor({"name@s": samples}, "name", tensor.shape) is None
    np.testing.assert_array_equal(whole_tensor({"name@s": tensor.reshape(-1)}, "name", tensor.shape), tensor)
    with pytest.raises(AssertionError):
        stored_values({"name": tensor}, "name", tensor[:2])


def test_a_gradient_off_by_one_in_ten_thousand_is_an_error():
    gradient = np.random.default_rng(1).standard_normal(16)
    assert relative_error(gradient * (1 + 1e-8), gradient) < 1e-6 < relative_error(gradient * (1 + 1e-4), gradient)
    assert relative_error(np.full(16, 1e-16), np.zeros(16), floor=1e-6) < 1e-6  # a gradient of rounding alone


def test_selections_differ_by_near_ties_alone():
    scores = np.array([[0.9, 0.8, 0.7, 0.7 - 1e-6, 0.2]])
    ours = np.array([[0, 1, 2]])
    check_selection(scores, ours, np.array([[0, 1, 3]]), 1e-5)
    for wrong in ([[0, 1, 4]], [[0, 2, 3]], [[1, 0, 2]], [[0, 1, 1]]):  # lower, missing one, swapped, twice
        with pytest.raises(AssertionError):
            check_selection(scores, ours, np.array(wrong), 1e-5)


def test_start_boxes_differ_where_the_logit_is_near_zero():
    masks = np.full((1, 2, 6, 8), -1.0)
    masks[0, 0, 1:4, 2:6] = 1.0
    masks[0, 1, 2:4, 3:5] = 1.0
    boxes = tight_boxes(masks)
    assert not check_start_boxes(masks, boxes, 0.0).any()
    near = masks.copy()
    near[0, 0, 2, 6] = -1e-5  # one column more where rounding lifts it
    moved = masks.copy()
    moved[0, 0, 2, 6] = 1.0
    moved = tight_boxes(moved)
    assert check_start_boxes(near, moved, 1e-4).tolist() == [[True, False]]
    for wrong in (masks, near):
        with pytest.raises(AssertionError):
            check_start_boxes(wrong, moved, 1e-6)
    empty = boxes.copy()
    empty[0, 1] = 0.0
    with pytest.raises(AssertionError):
        check_start_boxes(masks, empty, 1e-4)


def test_swapped_queries_are_found_by_their_boxes():
    boxes = np.random.default_rng(2).uniform(0.2, 0.8, (7, 4))
    order = np.array([0, 2, 1, 3, 6])
    np.testing.assert_array_equal(same_boxes(boxes[order], boxes), order)
    with pytest.raises(AssertionError):
        same_boxes(boxes[order] + 0.01, boxes)
