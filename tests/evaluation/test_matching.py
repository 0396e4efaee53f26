"""Which detection found which object: against pycocotools, and worked out by hand."""

import copy

import numpy as np
import pytest
from evaluation_cases import annotation, data_set, example_results, example_truth, result

from instseg_jax.evaluation.coco import coco_metrics
from instseg_jax.evaluation.matching import average_precision, interpolated_precision, match_detections


def match(truth, results, iou_type="segm", limit=100):
    return match_detections(truth, results, iou_type=iou_type, max_detections=limit)


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_average_precision_of_the_example_is_that_of_pycocotools(iou_type):
    truth, results = example_truth(), example_results(iou_type)
    matches = match(truth, results, iou_type)
    metrics = coco_metrics(truth, results, iou_types=(iou_type,))
    ap = average_precision(matches)
    assert np.nanmean(ap) == pytest.approx(metrics[f"{iou_type}/AP"], abs=1e-12)
    assert np.nanmean(ap[0]) == pytest.approx(metrics[f"{iou_type}/AP50"], abs=1e-12)
    for k, name in enumerate(matches.class_names):
        expected = metrics[f"{iou_type}/AP/{name}"]
        assert np.isnan(ap[:, k]).all() if expected is None else ap[:, k].mean() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_of_detections_is_that_of_pycocotools(limit):
    truth, results = example_truth(), example_results("segm")
    metrics = coco_metrics(truth, results, iou_types=("segm",), max_detections=limit)
    assert metrics["segm/AP"] < coco_metrics(truth, results, iou_types=("segm",))["segm/AP"]
    assert np.nanmean(average_precision(match(truth, results, limit=limit))) == pytest.approx(
        metrics["segm/AP"], abs=1e-12
    )


def test_noise_and_ties_against_pycocotools():
    """Crowds, equal scores, equal overlaps, several classes: whatever a generator makes."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        annotations = [
            annotation(i + 1, int(rng.integers(1, 4)), *rng.integers(0, 30, 2).tolist(),
                       category_id=int(rng.integers(1, 3)), iscrowd=int(rng.random() < 0.2))
            for i in range(20)
        ]  # fmt: skip
        results = []
        for a in annotations:
            for _ in range(int(rng.integers(0, 3))):
                x, y = (max(0, int(v + rng.integers(-2, 3))) for v in a["bbox"][:2])
                score = float(rng.integers(1, 5)) / 5
                results.append(result(a["image_id"], x, y, score, category_id=int(rng.integers(1, 3))))
        truth = data_set(*annotations, image_ids=(1, 2, 3), categories=((1, "a"), (2, "b")))
        for iou_type in ("segm", "bbox"):
            expected = coco_metrics(truth, results, iou_types=(iou_type,))[f"{iou_type}/AP"]
            assert 0 < expected < 1
            assert np.nanmean(average_precision(match(truth, results, iou_type))) == pytest.approx(expected, abs=1e-12)


def test_by_hand():
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 1, 30, 0), annotation(3, 2, 0, 0, iscrowd=1, side=20))
    results = [
        result(1, 0, 0, 0.5),  # the object
        result(1, 2, 0, 0.9),  # IoU 2/3 with it: comes first up to 0.65
        result(1, 0, 30, 0.8),  # nothing
        result(2, 5, 5, 0.7),  # in the crowd
    ]
    matches = match(truth, results)
    assert matches.result_index.tolist() == [1, 2, 0, 3]  # by image, then by score
    at_half, at_strict = matches.matched[0], matches.matched[-1]
    assert at_half.tolist() == [0, -1, -1, 2] and at_strict.tolist() == [-1, -1, 0, 2]
    assert matches.is_true[0].tolist() == [True, False, False, False]
    assert matches.is_ignored[0].tolist() == [False, False, False, True]
    assert matches.is_false[0].tolist() == [False, True, True, False]
    assert matches.num_objects.tolist() == [2]
    assert matches.pairs.tolist() == [[0, 0], [2, 0]]
    np.testing.assert_allclose(matches.pair_ious, [2 / 3, 1])


def test_weights_count_images_as_copies_of_them():
    """A bootstrap weight of 2 is the same as having the image twice, 0 as not having it."""
    truth, results = example_truth(), example_results("segm")
    weights = np.random.default_rng(3).integers(0, 3, len(truth["images"]))
    ids = sorted(image["id"] for image in truth["images"])
    doubled = {"images": [], "annotations": [], "categories": truth["categories"]}
    doubled_results = []
    for image_id, weight in zip(ids, weights.tolist(), strict=True):
        for copy_number in range(weight):
            new_id = image_id * 10 + copy_number
            doubled["images"] += [i | {"id": new_id} for i in truth["images"] if i["id"] == image_id]
            doubled["annotations"] += [
                a | {"image_id": new_id} for a in truth["annotations"] if a["image_id"] == image_id
            ]
            doubled_results += [r | {"image_id": new_id} for r in results if r["image_id"] == image_id]
    weighted = average_precision(match(truth, results), weights)
    assert not np.allclose(np.nanmean(weighted), np.nanmean(average_precision(match(truth, results))))
    expected = average_precision(match(doubled, doubled_results))
    # Copies have equal scores, which in the doubled set are told apart by their order, with weights not.
    np.testing.assert_allclose(np.nanmean(weighted), np.nanmean(expected), atol=2e-3)
    assert (np.isnan(weighted) == np.isnan(expected)).all()


def test_interpolated_precision_by_hand():
    curve = interpolated_precision(np.array([1, 0, 1]), np.array([0, 1, 0]), 4)
    # Recalls 0.25, 0.25, 0.5 at precisions 1, 1/2, 2/3.
    np.testing.assert_allclose(curve[:26], 1)
    np.testing.assert_allclose(curve[26:51], 2 / 3)
    assert (curve[51:] == 0).all()
    assert (interpolated_precision(np.zeros((10, 0)), np.zeros((10, 0)), 3) == 0).all()


@pytest.mark.parametrize("results", [[], [result(1, 0, 0, 0.9)]])
@pytest.mark.parametrize("annotations", [[], [annotation(1, 2, 0, 0)]])
def test_nothing_there_or_nothing_found(annotations, results):
    matches = match(data_set(*annotations), results)
    ap = average_precision(matches)
    assert np.isnan(ap).all() if not annotations else (ap == 0).all()
    assert (matches.matched == -1).all() and matches.pairs.shape == (0, 2)


def test_nothing_is_changed():
    truth, results = data_set(annotation(1, 1, 0, 0)), [result(1, 0, 0, 0.9)]
    before = copy.deepcopy((truth, results))
    assert average_precision(match(truth, results)).mean() == pytest.approx(1)
    assert (truth, results) == before
