"""What errors cost: against the published tool's numbers, and worked out by hand."""

import numpy as np
import pytest
from evaluation_cases import EXAMPLE, annotation, data_set, example_results, example_truth, read_json, result

from instseg_jax.evaluation.errors import DETECTION_KINDS, KINDS, split_errors
from instseg_jax.evaluation.matching import match_detections

CLASSES = ((1, "cat"), (2, "dog"))


def split(truth, results, iou_type="segm"):
    return split_errors(match_detections(truth, results, iou_type=iou_type, max_detections=100))


def kinds_of(errors) -> list[str]:
    return [DETECTION_KINDS[kind] if kind >= 0 else "fine" for kind in errors.kinds]


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_agreement_with_tidecv(iou_type):
    truth = example_truth()
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    present = {a["category_id"] for a in truth["annotations"]}
    results = [r for r in example_results(iou_type) if r["category_id"] in present]
    errors = split(truth, results, iou_type)
    recorded = read_json(EXAMPLE / "tide.json")[iou_type]
    assert errors.counts == recorded["counts"]
    # Its recall steps are k / 100, those of COCO 0.01 * k: a few fall to the other side of a detection.
    assert errors.ap == pytest.approx(recorded["AP50"], abs=2e-4)
    for kind, cost in recorded["costs"].items():
        assert errors.costs[kind] == pytest.approx(cost, abs=3e-4), kind
    assert max(errors.costs.values()) > 0.1


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (result(1, 0, 0, 0.9), "fine"),
        (result(1, 0, 0, 0.9, category_id=2), "classification"),
        (result(1, 5, 0, 0.9), "localisation"),  # IoU 1/3
        (result(1, 5, 0, 0.9, category_id=2), "both"),
        (result(1, 30, 20, 0.9), "background"),
        (result(2, 0, 0, 0.9), "background"),  # an image without objects
        (result(1, 8, 5, 0.9), "background"),  # IoU 10/190, below 0.1
    ],
)
def test_kinds_by_hand(found, kind):
    errors = split(data_set(annotation(1, 1, 0, 0), categories=CLASSES), [found])
    assert kinds_of(errors) == [kind]
    assert errors.missed.tolist() == [kind in ("both", "background")]
    assert errors.not_found.tolist() == [kind != "fine"]


def test_a_second_detection_is_a_duplicate():
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 2, 0, 0))
    errors = split(truth, [result(1, 0, 0, 0.9), result(1, 1, 0, 0.8), result(2, 0, 0, 0.7)])
    assert kinds_of(errors) == ["fine", "duplicate", "fine"]
    # Precision at full recall is 2/3, at half recall 1: removing the duplicate gives 1 everywhere.
    assert errors.ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert errors.costs["duplicate"] == pytest.approx(1 - errors.ap)
    assert errors.costs["missed"] == errors.costs["localisation"] == 0


def test_a_corrected_place_is_worth_the_object():
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 2, 0, 0))
    errors = split(truth, [result(1, 0, 0, 0.9), result(2, 5, 0, 0.8), result(2, 6, 0, 0.7)])
    assert kinds_of(errors) == ["fine", "localisation", "localisation"]
    assert errors.ap == pytest.approx(51 / 101)
    # Of two detections near one object the better scored is corrected, the other goes.
    assert errors.costs["localisation"] == pytest.approx(50 / 101)
    assert errors.missed.tolist() == [False, False] and errors.not_found.tolist() == [False, True]
    assert errors.nearest.tolist() == [-1, 1, 1]


def test_a_corrected_class_moves_to_the_other_class():
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 1, 30, 0, category_id=2), categories=CLASSES)
    errors = split(truth, [result(1, 0, 0, 0.9), result(1, 30, 0, 0.8)])
    assert kinds_of(errors) == ["fine", "classification"]
    assert errors.ap == pytest.approx(0.5)
    assert errors.costs["classification"] == pytest.approx(0.5)


def test_missed_objects_and_the_two_other_views():
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 2, 0, 0))
    errors = split(truth, [result(2, 40, 20, 0.95), result(1, 0, 0, 0.9)])
    assert kinds_of(errors) == ["fine", "background"]
    assert errors.missed.tolist() == [False, True]
    assert errors.ap == pytest.approx(51 / 101 / 2)
    assert errors.costs["missed"] == pytest.approx(0.5 - errors.ap)  # one object, a false alarm before it
    assert errors.costs["false_negatives"] == pytest.approx(0.5 - errors.ap)
    assert errors.costs["false_positives"] == pytest.approx(51 / 101 - errors.ap)
    assert errors.costs["background"] == pytest.approx(51 / 101 - errors.ap)


def test_crowds_are_no_error():
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 1, 20, 10, iscrowd=1, side=20))
    errors = split(truth, [result(1, 0, 0, 0.9), result(1, 25, 15, 0.8)])
    assert kinds_of(errors) == ["fine", "fine"]
    assert errors.ap == pytest.approx(1) and not errors.missed.any()


def test_nothing_to_find_and_nothing_found():
    empty = split(data_set(), [result(1, 0, 0, 0.9)])
    assert empty.ap is None and set(empty.costs.values()) == {None}
    assert empty.counts["background"] == 1
    nothing = split(data_set(annotation(1, 1, 0, 0)), [])
    assert nothing.ap == 0 and nothing.costs["missed"] == 1 and nothing.counts["missed"] == 1
    assert set(KINDS) < set(nothing.costs)
    perfect = split(data_set(annotation(1, 1, 0, 0)), [result(1, 0, 0, 0.9)])
    assert perfect.ap == pytest.approx(1) and max(perfect.costs.values()) < 1e-12 and not any(perfect.counts.values())
    assert np.all(perfect.kinds == -1)
