"""Curves, thresholds, calibration and confusion, worked out by hand."""

import numpy as np
import pytest
from evaluation_cases import annotation, data_set, example_results, example_truth, result

from instseg_jax.evaluation import curves
from instseg_jax.evaluation.coco import coco_metrics
from instseg_jax.evaluation.matching import match_detections

CLASSES = ((1, "cat"), (2, "dog"))


def match(truth, results):
    return match_detections(truth, results, iou_type="segm", max_detections=100)


@pytest.fixture
def two_classes():
    truth = data_set(
        annotation(1, 1, 0, 0), annotation(2, 2, 0, 0), annotation(3, 2, 30, 0, category_id=2), categories=CLASSES
    )
    results = [
        result(1, 0, 0, 0.9),
        result(1, 30, 20, 0.8),  # false
        result(2, 0, 0, 0.6),
        result(2, 30, 0, 0.5, category_id=2),
        result(2, 0, 25, 0.1, category_id=2),  # false
    ]
    return match(truth, results)


def test_f1_by_hand(two_classes):
    cat, dog, both = (curves.f1_curve(two_classes, 0, label) for label in (0, 1, None))
    assert cat.scores.tolist() == [0.9, 0.8, 0.6]
    np.testing.assert_allclose(cat.precision, [1, 1 / 2, 2 / 3])
    np.testing.assert_allclose(cat.recall, [1 / 2, 1 / 2, 1])
    np.testing.assert_allclose(cat.f1, [2 / 3, 1 / 2, 4 / 5])
    assert (cat.best_threshold, cat.best_f1) == (pytest.approx(0.3), pytest.approx(0.8))  # halfway from 0.6 to 0
    assert (dog.best_threshold, dog.best_f1) == (pytest.approx(0.3), 1)  # halfway from 0.5 to 0.1
    np.testing.assert_allclose(both.f1, [2 / 4, 2 / 5, 4 / 6, 6 / 7, 6 / 8])
    thresholds = curves.best_thresholds(two_classes)
    assert thresholds == {"overall": pytest.approx(0.3), "classes": {"cat": cat.best_threshold, "dog": 0.3}}


@pytest.mark.parametrize("label", [None, 0, 5])
def test_no_other_threshold_has_a_better_f1(label):
    truth, results = example_truth(), example_results("segm")
    results = [r | {"score": round(r["score"] * 20) / 20} for r in results]  # many equal scores
    best = curves.f1_curve(match(truth, results), 0, label)
    name = sorted(c["id"] for c in truth["categories"])
    if label is not None:
        truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] == name[label]]
        results = [r for r in results if r["category_id"] == name[label]]

    def f1(threshold: float) -> float:
        matches = match(truth, [r for r in results if r["score"] >= threshold])
        true = matches.is_true[0].sum()
        return 2 * true / (true + matches.is_false[0].sum() + matches.num_objects.sum())

    assert f1(best.best_threshold) == pytest.approx(best.best_f1)
    assert max(f1(t) for t in np.linspace(0, 1, 41)) <= best.best_f1 + 1e-12
    assert f1(0.99) < best.best_f1


def test_nothing_to_threshold():
    for truth, results in ((data_set(), [result(1, 0, 0, 0.9)]), (data_set(annotation(1, 1, 0, 0)), [])):
        matches = match(truth, results)
        assert curves.best_thresholds(matches) is None
        assert curves.f1_curve(matches, 0).best_f1 is None


def test_precision_recall_is_what_ap50_is_the_mean_of():
    truth, results = example_truth(), example_results("segm")
    rows = curves.precision_recall(match(truth, results), 0)
    metrics = coco_metrics(truth, results, iou_types=("segm",))
    assert np.nanmean(rows.mean(axis=1)) == pytest.approx(metrics["segm/AP50"], abs=1e-12)
    assert (np.diff(rows[~np.isnan(rows[:, 0])], axis=1) <= 1e-12).all()


def test_calibration_by_hand(two_classes):
    bins = curves.calibration(two_classes, 0, num_bins=2)
    # 0.1 and 0.5 are in the lower half, 0.6, 0.8 and 0.9 in the upper.
    assert bins.counts.tolist() == [2, 3]
    np.testing.assert_allclose(bins.scores, [0.3, 2.3 / 3])
    np.testing.assert_allclose(bins.precision, [1 / 2, 2 / 3])
    assert bins.error == pytest.approx((2 * 0.2 + 3 * (2.3 / 3 - 2 / 3)) / 5)
    empty = curves.calibration(match(data_set(), []), 0)
    assert empty.error is None and empty.counts.sum() == 0
    edges = curves.calibration(match(data_set(), [result(1, 0, 0, 0.0), result(1, 0, 0, 1.0)]), 0)
    assert edges.counts[0] == edges.counts[-1] == 1 and edges.error == pytest.approx(0.5)


def test_confusion_by_hand():
    truth = data_set(
        annotation(1, 1, 0, 0), annotation(2, 1, 30, 0), annotation(3, 2, 0, 0, category_id=2),
        annotation(4, 2, 20, 10, iscrowd=1, side=20), categories=CLASSES,
    )  # fmt: skip
    results = [
        result(1, 0, 0, 0.9, category_id=2),  # a cat taken for a dog
        result(1, 1, 0, 0.8),  # the same cat, overlapping a little less: left over
        result(1, 30, 0, 0.2),  # below the threshold: that cat is missed
        result(2, 0, 0, 0.7, category_id=2),
        result(2, 25, 15, 0.9),  # in the crowd
        result(2, 40, 0, 0.9, category_id=2),  # nothing there
    ]
    table = curves.confusion_matrix(match(truth, results), score_threshold=0.5)
    assert table.tolist() == [[0, 1, 1], [0, 1, 0], [1, 1, 0]]
    # Rows of classes add up to the objects.
    assert table[:-1].sum(axis=1).tolist() == [2, 1]


def test_confusion_prefers_the_right_class_of_two_in_one_place():
    truth = data_set(annotation(1, 1, 0, 0, category_id=2), annotation(2, 1, 0, 0), categories=CLASSES)
    results = [result(1, 0, 0, 0.5, category_id=1), result(1, 0, 0, 0.9, category_id=2)]
    assert curves.confusion_matrix(match(truth, results), score_threshold=0.0).tolist() == [
        [1, 0, 0], [0, 1, 0], [0, 0, 0]
    ]  # fmt: skip
