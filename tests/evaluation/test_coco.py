"""COCO metrics against published numbers, pycocotools itself, and cases worked out by hand."""

import contextlib
import copy
import io
import json
import re

import numpy as np
import pytest
from evaluation_cases import EXAMPLE, annotation, data_set, example_results, example_truth, read_json, result, square
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instseg_jax.evaluation import coco as coco_room
from instseg_jax.evaluation.coco import coco_metrics, coco_results, write_evaluation
from instseg_jax.evaluation.read import read_results
from instseg_jax.masks import encode_mask
from instseg_jax.types import Batch, Detections, Targets

NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
EVERY_RECALL = 101


@pytest.fixture(scope="module", name="example_truth")
def _example_truth() -> dict:
    return example_truth()


# --- published numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_published_numbers(example_truth, iou_type):
    metrics = coco_metrics(example_truth, example_results(iou_type), iou_types=(iou_type,))
    printed = (EXAMPLE / "val2014_fake_eval_res.txt").read_text(encoding="utf-8")
    section = printed.split(f"type={iou_type}")[1].split("type=")[0]
    published = re.findall(r"= (\d\.\d{3})$", section, flags=re.MULTILINE)
    assert len(published) == 12
    assert [f"{metrics[f'{iou_type}/{name}']:.3f}" for name in NAMES] == published
    exact = read_json(EXAMPLE / "expected_pycocotools_stats.json")[iou_type]
    np.testing.assert_allclose([metrics[f"{iou_type}/{name}"] for name in NAMES], exact, rtol=0, atol=1e-12)


def test_classes_of_the_example_average_to_the_whole(example_truth):
    metrics = coco_metrics(example_truth, example_results("segm"), iou_types=("segm",))
    of_classes = {name: value for name, value in metrics.items() if name.startswith("segm/AP/")}
    assert len(of_classes) == 80
    present = {a["category_id"] for a in example_truth["annotations"]}
    names = {f"segm/AP/{c['name']}" for c in example_truth["categories"] if c["id"] in present}
    assert {name for name, value in of_classes.items() if value is not None} == names
    np.testing.assert_allclose(np.mean([of_classes[name] for name in names]), metrics["segm/AP"], rtol=1e-9)


def test_one_class_agrees_with_pycocotools(example_truth):
    metrics = coco_metrics(example_truth, example_results("bbox"), iou_types=("bbox",))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(example_truth)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(example_results("bbox")), "bbox")
        evaluation.params.catIds = [1]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] > 0.1
    assert metrics["bbox/AP/person"] == pytest.approx(evaluation.stats[0], abs=1e-12)


def test_another_limit_of_detections(example_truth):
    metrics = coco_metrics(example_truth, example_results("segm"), iou_types=("segm",), max_detections=2)
    assert {name for name in metrics if "/AR_" in name} == {
        f"segm/AR_{n}" for n in ("1", "2", "small", "medium", "large")
    }
    exact = read_json(EXAMPLE / "expected_pycocotools_stats.json")["segm"]
    assert metrics["segm/AR_1"] == pytest.approx(exact[6], abs=1e-12)
    assert metrics["segm/AR_1"] < metrics["segm/AR_2"] < exact[7]
    many = coco_metrics(example_truth, example_results("segm"), iou_types=("segm",), max_detections=300)
    # No image of the example has more than 100 detections of a class.
    assert many["segm/AR_300"] == pytest.approx(exact[8], abs=1e-12)
    assert many["segm/AP"] == pytest.approx(exact[0], abs=1e-12)


# --- by hand -------------------------------------------------------------------------------------------------------


def test_half_of_the_objects_found():
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 2, 20, 20))
    metrics = coco_metrics(truth, [result(1, 0, 0, 0.9)])
    # Precision is 1 up to a recall of 0.5: the first 51 of the recalls 0, 0.01 .. 1.
    assert metrics["segm/AP"] == pytest.approx(51 / EVERY_RECALL)
    assert metrics["AP"] == metrics["segm/AP"]
    assert metrics["bbox/AP"] == pytest.approx(51 / EVERY_RECALL)
    assert metrics["segm/AR_100"] == pytest.approx(0.5)
    assert metrics["segm/AP/cat"] == metrics["segm/AP"]
    # 10 x 10 pixels are small; there are no others.
    assert metrics["segm/AP_small"] == metrics["segm/AP"]
    assert metrics["segm/AP_large"] is None and metrics["segm/AR_medium"] is None


def test_overlap_decides_the_thresholds_that_count():
    # 10 x 10 shifted by 2: intersection 80, union 120, IoU 0.667: 4 of the 10 thresholds 0.5, 0.55 .. 0.95.
    metrics = coco_metrics(data_set(annotation(1, 1, 0, 0)), [result(1, 2, 0, 0.9)])
    for kind in ("segm", "bbox"):
        assert metrics[f"{kind}/AP"] == pytest.approx(0.4)
        assert metrics[f"{kind}/AP50"] == pytest.approx(1.0)
        assert metrics[f"{kind}/AP75"] == 0.0


def test_a_false_alarm_in_an_image_without_objects_counts():
    metrics = coco_metrics(data_set(annotation(1, 1, 0, 0)), [result(2, 5, 5, 0.95), result(1, 0, 0, 0.5)])
    assert metrics["segm/AP"] == pytest.approx(0.5)
    # The other way round it costs nothing: full recall is reached before.
    metrics = coco_metrics(data_set(annotation(1, 1, 0, 0)), [result(2, 5, 5, 0.4), result(1, 0, 0, 0.5)])
    assert metrics["segm/AP"] == pytest.approx(1.0)


def test_detections_within_a_crowd_are_not_counted():
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 1, 20, 10, iscrowd=1, side=20))
    found = [result(1, 0, 0, 0.5), result(1, 22, 12, 0.9), result(1, 28, 18, 0.8)]
    assert coco_metrics(truth, found)["segm/AP"] == pytest.approx(1.0)
    outside = [*found, result(1, 45, 0, 0.7)]
    assert coco_metrics(truth, outside)["segm/AP"] == pytest.approx(0.5)
    only_crowd = coco_metrics(data_set(annotation(2, 1, 20, 10, iscrowd=1, side=20)), found)
    assert only_crowd["segm/AP"] is None and only_crowd["bbox/AP/cat"] is None


def test_no_results():
    metrics = coco_metrics(data_set(annotation(1, 1, 0, 0)), [])
    assert metrics["segm/AP"] == metrics["bbox/AP50"] == metrics["segm/AR_100"] == metrics["segm/AP/cat"] == 0.0
    assert metrics["segm/AP_large"] is None


@pytest.mark.parametrize("results", [[], [result(1, 0, 0, 0.9)]])
def test_no_ground_truth(results):
    metrics = coco_metrics(data_set(), results)
    assert set(metrics) == {"AP"} | {f"{kind}/{name}" for kind in ("segm", "bbox") for name in (*NAMES, "AP/cat")}
    assert set(metrics.values()) == {None}


def test_no_images():
    assert set(coco_metrics(data_set(image_ids=()), []).values()) == {None}


def test_annotation_with_id_0_can_be_found():
    # pycocotools writes the id of the match and takes 0 for none.
    truth = data_set(annotation(0, 1, 0, 0), annotation(1, 2, 20, 20))
    assert coco_metrics(truth, [result(1, 0, 0, 0.9), result(2, 20, 20, 0.8)])["segm/AP"] == pytest.approx(1.0)


def test_duplicate_annotation_ids_are_two_objects():
    truth = data_set(annotation(1, 1, 0, 0), annotation(1, 2, 20, 20))
    assert coco_metrics(truth, [result(1, 0, 0, 0.9)])["segm/AR_100"] == pytest.approx(0.5)


def test_area_and_crowd_flag_may_be_missing():
    lean = annotation(1, 1, 0, 0)
    del lean["area"], lean["iscrowd"]
    metrics = coco_metrics(data_set(lean), [result(1, 0, 0, 0.9)])
    assert metrics["segm/AP_small"] == metrics["bbox/AP_small"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["polygon", "uncompressed", "compressed"])
@pytest.mark.parametrize("has_box", [True, False])
def test_results_in_any_code_score_alike(tmp_path, kind, has_box):
    """Files of other tools have polygons or lists of runs, and keys of their own."""
    truth = data_set(annotation(1, 1, 0, 0) | {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]})
    mask = np.zeros((40, 60), np.uint8)
    mask[:10, :10] = 1
    code = {
        "polygon": [[0, 0, 10, 0, 10, 10, 0, 10]],
        "uncompressed": {"size": [40, 60], "counts": [0, *[10, 30] * 9, 10, 2400 - 9 * 40 - 10]},
        "compressed": encode_mask(mask),
    }[kind]
    entry = {"id": 7, "image_id": 1, "category_id": 1, "score": 0.9, "segmentation": code, "area": 100, "iscrowd": 0}
    entry |= {"bbox": [0, 0, 10, 10]} if has_box else {}
    (tmp_path / "results.json").write_text(json.dumps([entry]))
    results, kinds = read_results(tmp_path / "results.json")
    assert kinds == (("segm", "bbox") if has_box else ("segm",))
    metrics = coco_metrics(truth, results, iou_types=(*kinds, "boundary"))
    assert [metrics[f"{each}/AP"] for each in (*kinds, "boundary")] == pytest.approx([1.0] * (len(kinds) + 1))


def test_polygons_and_uncompressed_codes():
    polygon = annotation(1, 1, 0, 0) | {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}
    runs = []
    for _ in range(10):
        runs += [10, 30]
    uncompressed = annotation(2, 2, 0, 0) | {
        "segmentation": {"size": [40, 60], "counts": [0, *runs[:-1], 30 + 50 * 40]}
    }
    metrics = coco_metrics(data_set(polygon, uncompressed), [result(1, 0, 0, 0.9), result(2, 0, 0, 0.9)])
    assert metrics["segm/AP"] == pytest.approx(1.0)


def test_area_of_a_result_is_that_of_its_kind():
    # A thin mask in a box of medium size matches nothing: by its own area it is small, and no alarm among the medium.
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[39, :50] = 1
    rle = mask_api.encode(mask)
    thin = {"image_id": 1, "category_id": 1, "score": 0.95, "bbox": [0, 0, 50, 40], "segmentation": rle}
    truth = data_set(annotation(1, 2, 0, 0, side=35))
    found = {"image_id": 2, "category_id": 1, "score": 0.5, "bbox": [0, 0, 35, 35], "segmentation": square(0, 0, 35)}
    metrics = coco_metrics(truth, [thin, found])
    assert metrics["segm/AP_medium"] == pytest.approx(1.0)
    assert metrics["bbox/AP_medium"] == pytest.approx(0.5)


def test_classes_with_one_name_are_told_apart():
    truth = data_set(annotation(1, 1, 0, 0, category_id=7), categories=((3, "cat"), (7, "cat"), (90, "dog")))
    metrics = coco_metrics(truth, [result(1, 0, 0, 0.9, category_id=7)], iou_types=("segm",))
    assert metrics["segm/AP/cat (7)"] == pytest.approx(1.0)
    assert metrics["segm/AP/cat (3)"] is None and metrics["segm/AP/dog"] is None


def test_nothing_is_changed_or_printed(capsys):
    truth = data_set(annotation(5, 1, 0, 0) | {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]})
    results = [result(1, 0, 0, 0.9)]
    before = copy.deepcopy((truth, results))
    first = coco_metrics(truth, results)
    assert (truth, results) == before
    assert capsys.readouterr().out == ""
    assert coco_metrics(truth, results) == first
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO()
        loaded.dataset = truth
        loaded.createIndex()
    assert coco_metrics(loaded, results) == first
    assert (truth, results) == before


def test_an_evaluation_that_is_killed_between_its_files_leaves_no_word_of_the_one_before(tmp_path, monkeypatch):
    write_evaluation(tmp_path, {"segm/AP": 0.5}, [{"score": 0.5}])
    write_json = coco_room.write_json

    def killed(path, *arguments, **options):
        if path.name == "evaluate_result.json":
            raise KeyboardInterrupt  # nothing that is left to do is done
        return write_json(path, *arguments, **options)

    monkeypatch.setattr(coco_room, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(tmp_path, {"segm/AP": 0.25}, [{"score": 0.25}])
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_metrics_are_plain_json(tmp_path):
    results = [result(1, 0, 0, 0.9)]
    metrics = coco_metrics(data_set(annotation(1, 1, 0, 0)), results)
    assert all(value is None or type(value) is float for value in metrics.values())
    write_evaluation(tmp_path / "new", metrics, results)
    assert read_json(tmp_path / "new" / "evaluate_result.json") == {"done_flag": True, "metrics": metrics}
    assert read_json(tmp_path / "new" / "predictions.json") == results
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["evaluate_result.json", "predictions.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 0}, r"category_id 0, but the ground truth has \[1\]"),
        ({"image_id": 9}, "image_id 9, which is not in the ground truth"),
        ({"score": float("nan")}, "score nan, which must be finite"),
        ({"segmentation": square(0, 0, size=(60, 40))}, r"mask of size \[60, 40\], but image 1 is \[40, 60\]"),
    ],
)
def test_results_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        coco_metrics(data_set(annotation(1, 1, 0, 0)), [result(1, 0, 0, 0.9) | change])


def test_results_that_lack_something():
    only_box = {key: value for key, value in result(1, 0, 0, 0.9).items() if key != "segmentation"}
    truth = data_set(annotation(1, 1, 0, 0))
    assert coco_metrics(truth, [only_box], iou_types=("bbox",))["bbox/AP"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="Result 1 lacks segmentation"):
        coco_metrics(truth, [only_box])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": None}, "Annotation 17: A segmentation must be polygons or an RLE, got None"),
        ({"segmentation": [[1, 2, 3, 4]]}, "Annotation 17: A polygon needs at least 3 points"),
        ({"segmentation": [[1, 2, 3]]}, "Annotation 17: "),
        ({"bbox": None}, r"Annotation 17 needs a bbox \[x, y, width, height\], got None"),
        ({"image_id": 5}, "Annotation 17 belongs to image 5"),
    ],
)
def test_annotations_that_are_broken(change, message):
    with pytest.raises(ValueError, match=message):
        coco_metrics(data_set(annotation(17, 1, 0, 0) | change), [])


def test_unknown_kinds_and_limits():
    with pytest.raises(ValueError, match="iou_types must be some of bbox, segm"):
        coco_metrics(data_set(), [], iou_types=("keypoints",))
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        coco_metrics(data_set(), [], max_detections=0)


# --- from detections -----------------------------------------------------------------------------------------------


def batch_of(image_index, image_valid, original_sizes, content_sizes) -> Batch:
    size = len(image_index)
    targets = Targets(np.zeros((size, 1)), np.zeros((size, 1, 4)), np.zeros((size, 1, 1, 1)), np.zeros((size, 1), bool))
    return Batch(
        images=np.zeros((size, 160, 160, 3), np.float32),
        targets=targets,
        image_valid=np.array(image_valid),
        image_index=np.array(image_index, np.int32),
        original_sizes=np.array(original_sizes, np.int32),
        content_sizes=np.array(content_sizes, np.int32),
    )


def test_detections_become_results_of_the_right_image_and_class():
    # Three images of different sizes, the second letterboxed (80 of 160 rows), the last one padding of the batch.
    logits = np.full((3, 2, 40, 40), -10, np.float32)
    logits[0, 0, 10:30, 10:30] = 10
    logits[1, 0, 5:15, 20:40] = 10
    boxes_xyxy = np.zeros((3, 2, 4), np.float32)
    boxes_xyxy[0, 0] = [0.25, 0.25, 0.75, 0.75]
    boxes_xyxy[1, 0] = [0.5, 0.125, 1.0, 0.375]
    detections = Detections(
        scores=np.array([[0.9, 0.1], [0.8, 0.1], [0.7, 0.6]], np.float32),
        labels=np.array([[2, 0], [1, 0], [0, 0]]),
        boxes_xyxy=boxes_xyxy,
        mask_logits=logits,
    )
    batch = batch_of(
        [1, 0, -1], [True, True, False], [(400, 600), (200, 400), (1, 1)], [(160, 160), (80, 160), (160, 160)]
    )
    results = coco_results(detections, batch, dataset_image_ids=[11, 42], category_ids=[7, 3, 90])
    assert [(r["image_id"], r["category_id"]) for r in results] == [(42, 90), (42, 7), (11, 3), (11, 7)]
    np.testing.assert_allclose(results[0]["bbox"], [150, 100, 300, 200])
    np.testing.assert_allclose(results[2]["bbox"], [200, 50, 200, 100])
    assert [r["segmentation"]["size"] for r in results] == [[400, 600]] * 2 + [[200, 400]] * 2
    assert json.loads(json.dumps(results)) == results
    truth = {
        "images": [{"id": 42, "height": 400, "width": 600}, {"id": 11, "height": 200, "width": 400}],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}, {"id": 90, "name": "c"}],
        "annotations": [
            {"id": 1, "image_id": 42, "category_id": 90, "bbox": [150, 100, 300, 200],
             "segmentation": [[150, 100, 450, 100, 450, 300, 150, 300]]},
            {"id": 2, "image_id": 11, "category_id": 3, "bbox": [200, 50, 200, 100],
             "segmentation": [[200, 50, 400, 50, 400, 150, 200, 150]]},
        ],
    }  # fmt: skip
    metrics = coco_metrics(truth, results)
    assert metrics["segm/AP"] == metrics["bbox/AP"] == pytest.approx(1.0)
    assert metrics["segm/AP/b"] is None


def test_results_have_no_score_threshold_and_keep_empty_masks():
    detections = Detections(
        scores=np.array([[1e-6, 0.0]], np.float32),
        labels=np.zeros((1, 2), np.int32),
        boxes_xyxy=np.full((1, 2, 4), 2.0, np.float32),
        mask_logits=np.full((1, 2, 40, 40), -1, np.float32),
    )
    batch = batch_of([0], [True], [(30, 20)], [(160, 160)])
    results = coco_results(detections, batch, [1], [1])
    assert len(results) == 2
    assert coco_metrics({**data_set(), "images": [{"id": 1, "height": 30, "width": 20}]}, results)["AP"] is None
    assert [mask_api.area(r["segmentation"]) for r in results] == [0, 0]


def test_a_class_without_a_category_id():
    detections = Detections(np.ones((1, 1)), np.full((1, 1), 3), np.zeros((1, 1, 4)), np.zeros((1, 1, 40, 40)))
    with pytest.raises(ValueError, match="Class index 3 has no category id: only 2 are given"):
        coco_results(detections, batch_of([0], [True], [(30, 20)], [(160, 160)]), [1], [1, 2])


def test_a_batch_of_padding_only():
    detections = Detections(np.ones((1, 1)), np.zeros((1, 1)), np.zeros((1, 1, 4)), np.zeros((1, 1, 40, 40)))
    assert coco_results(detections, batch_of([-1], [False], [(1, 1)], [(160, 160)]), [], []) == []
