"""Faster engines give pycocotools' numbers; Boundary AP by hand."""

import importlib.util

import numpy as np
import pytest
from evaluation_cases import annotation, data_set, example_results, example_truth, result
from pycocotools import mask as mask_api

from instseg_jax.evaluation.boundary import edge_distance, mask_boundary, measure_edges
from instseg_jax.evaluation.coco import coco_metrics, result_entries, truth_entries
from instseg_jax.evaluation.engines import ENGINES

MODULES = {"faster-coco-eval": "faster_coco_eval", "hotcoco": "hotcoco"}


def encode(mask: np.ndarray) -> dict:
    return mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.mark.parametrize("engine", MODULES)
@pytest.mark.parametrize("limit", [100, 2])
def test_engines_agree(engine, limit):
    pytest.importorskip(MODULES[engine])
    truth = example_truth()
    for iou_type in ("segm", "bbox"):
        results = example_results(iou_type)
        expected = coco_metrics(truth, results, iou_types=(iou_type,), max_detections=limit)
        found = coco_metrics(truth, results, iou_types=(iou_type,), max_detections=limit, engine=engine)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] is None) if value is None else found[name] == pytest.approx(value, abs=1e-12), name
        assert 0.2 < expected[f"{iou_type}/AP"] < 0.6


@pytest.mark.parametrize("engine", MODULES)
@pytest.mark.parametrize(
    ("annotations", "results"), [([], []), ([annotation(1, 1, 0, 0)], []), ([], [result(1, 0, 0, 0.9)])]
)
def test_engines_with_nothing_there_or_nothing_found(engine, annotations, results):
    pytest.importorskip(MODULES[engine])
    truth = data_set(*annotations)
    assert coco_metrics(truth, results, engine=engine) == coco_metrics(truth, results)


def test_an_unknown_engine_and_one_that_is_not_installed(monkeypatch):
    with pytest.raises(ValueError, match=f"must be one of {', '.join(ENGINES)}, got 'slowcoco'"):
        coco_metrics(data_set(), [], engine="slowcoco")
    found = importlib.import_module

    def import_module(name: str):
        if name in MODULES.values():
            raise ImportError(name)
        return found(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ValueError, match=r"pip install 'instseg_jax\[fast-eval\]'"):
        coco_metrics(data_set(annotation(1, 1, 0, 0)), [result(1, 0, 0, 1)], engine="hotcoco")


def test_a_boundary_by_hand():
    # A diagonal of 100 pixels: the boundary is 2 pixels wide.
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 20:50] = 1
    expected = mask.copy()
    expected[12:28, 22:48] = 0
    np.testing.assert_array_equal(mask_api.decode(mask_boundary(encode(mask))), expected)


def test_the_pictures_border_is_an_edge_and_small_masks_are_all_boundary():
    mask = np.ones((60, 80), np.uint8)
    expected = mask.copy()
    expected[2:-2, 2:-2] = 0
    np.testing.assert_array_equal(mask_api.decode(mask_boundary(encode(mask))), expected)
    dot = np.zeros((60, 80), np.uint8)
    dot[5:9, 5:9] = 1
    np.testing.assert_array_equal(mask_api.decode(mask_boundary(encode(dot))), dot)
    assert mask_api.area(mask_boundary(encode(np.zeros((60, 80))))) == 0


def test_a_boundary_keeps_what_is_near_a_pixel_outside():
    """Against the definition, pixel by pixel, on shapes with holes."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = np.kron(rng.random((6, 8)) < 0.7, np.ones((10, 10))).astype(np.uint8)
        padded = np.pad(mask, 2)
        near = np.zeros_like(mask)
        for y in range(60):
            for x in range(80):
                near[y, x] = mask[y, x] and not padded[y : y + 5, x : x + 5].all()
        np.testing.assert_array_equal(mask_api.decode(mask_boundary(encode(mask))), near)
        assert 0 < near.sum() < mask.sum()


def square(start: int, stop: int, size=(60, 80)) -> dict:
    mask = np.zeros(size, bool)
    mask[start:stop, start:stop] = True
    return encode(mask)


def test_distance_of_edges_by_hand():
    assert edge_distance(square(20, 40), square(20, 40)) == 0
    # From each of the 56 pixels of the inner edge it is 5 to the outer; from the 96 of the outer the same, but for the
    # nine around each of its corners, which lie at (5, d) from a corner of the inner one.
    corner = 2 * [np.hypot(5, d) for d in range(1, 5)] + [np.hypot(5, 5)]
    outward = [5.0] * 60 + 4 * corner
    expected = (5 * 56 + sum(outward)) / (56 + 96)
    assert len(outward) == 96 and edge_distance(square(20, 35), square(15, 40)) == pytest.approx(expected)
    assert edge_distance(square(15, 40), square(20, 35)) == pytest.approx(expected)
    # The border of the picture is no edge: of a mask that reaches it the other sides count.
    left, wider = np.zeros((2, 60, 80), bool)
    left[:, :20], wider[:, :27] = True, True
    assert edge_distance(encode(left), encode(wider)) == 7
    assert edge_distance(encode(np.ones((60, 80))), square(20, 40)) is None
    assert edge_distance(square(20, 40), encode(np.zeros((60, 80)))) is None


def test_distance_of_edges_against_all_pairs_of_pixels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        masks = []
        for _ in range(2):
            mask = np.zeros((50, 70), bool)
            for y, x, height, width in rng.integers(0, 25, (3, 4)):
                mask[y : y + height + 1, x : x + width + 1] = True
            masks.append(mask)
        points = []
        for mask in masks:
            padded = np.pad(mask, 1, mode="edge")
            inner = np.min([padded[1 + y : 51 + y, 1 + x : 71 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)
            points.append(np.argwhere(mask & ~inner))
        apart = np.hypot(*np.moveaxis(points[0][:, None] - points[1][None], -1, 0))
        expected = np.concatenate([apart.min(axis=1), apart.min(axis=0)]).mean()
        assert edge_distance(*map(encode, masks)) == pytest.approx(expected, abs=1e-4)


def test_edges_of_many_pairs():
    pairs = [(square(20, 40), square(20, 40))] * 8 + [(square(20, 35), square(15, 40))] * 2
    edges = measure_edges(pairs)
    far = edge_distance(*pairs[-1])
    assert (edges.num_pairs, edges.median_px, edges.band_px) == (10, 0, 2) and edges.p90_px == pytest.approx(far)
    assert (
        f"edges of 10 matched masks are off by 0.0 px (median; a tenth of them by more than {far:.1f} px)"
        in edges.say()
    )
    assert measure_edges([]) is None and measure_edges([(square(20, 40), encode(np.zeros((60, 80))))]) is None


def test_boundary_ap_by_hand():
    # 40 x 40 squares in a picture with a diagonal of 100: shifted by 4, their IoU is 36 / 44 = 0.82, but of their rims
    # of 2 pixels (304 each) only the two horizontal bars overlap: 2 * 2 * 36 = 144, 144 / 464 = 0.31.
    mask, shifted = np.zeros((2, 60, 80), np.uint8)
    mask[10:50, 10:50], shifted[10:50, 14:54] = 1, 1
    image = {"id": 1, "height": 60, "width": 80}
    truth = {
        "images": [image],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "segmentation": encode(mask)}
        ],
    }
    found = [{"image_id": 1, "category_id": 1, "score": 1.0, "bbox": [14, 10, 40, 40], "segmentation": encode(shifted)}]
    metrics = coco_metrics(truth, found, iou_types=("segm", "boundary"))
    assert metrics["segm/AP"] == pytest.approx(0.7)  # 0.5, 0.55 .. 0.8
    assert metrics["boundary/AP"] == 0
    perfect = [found[0] | {"segmentation": encode(mask)}]
    assert coco_metrics(truth, perfect, iou_types=("boundary",))["boundary/AP"] == pytest.approx(1)


def test_boundary_ap_never_exceeds_mask_ap():
    truth, results = example_truth(), example_results("segm")
    metrics = coco_metrics(truth, results, iou_types=("segm", "boundary"))
    assert 0.05 < metrics["boundary/AP"] < metrics["segm/AP"]
    assert metrics["boundary/AP50"] <= metrics["segm/AP50"]


def test_boundary_ap_of_the_example_is_that_of_another_implementation():
    library = pytest.importorskip("faster_coco_eval")
    truth, results = example_truth(), example_results("segm")
    metrics = coco_metrics(truth, results, iou_types=("boundary",))
    pair = []
    for entries in (truth_entries(truth, "segm"), result_entries(truth, results, "segm")):
        coco = library.COCO()
        coco.dataset = truth | {"annotations": entries}
        coco.createIndex()
        pair.append(coco)
    evaluation = library.COCOeval_faster(*pair, "boundary")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    found = [metrics[f"boundary/{name}"] for name in names]
    np.testing.assert_allclose(found, evaluation.stats[:6], atol=1e-12)
    assert min(found) > 0.05
