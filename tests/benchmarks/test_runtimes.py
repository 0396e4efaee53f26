"""Runtimes side by side: what is timed answers like the network, and ratios are of what was measured."""

import dataclasses

import numpy as np
import pytest
from random_model import random_images, random_variables, small_model

from instseg_jax.benchmarks.runtimes import MATRIX, agreement, compare_runtimes
from instseg_jax.cli import main
from instseg_jax.types import Detections


def detections(boxes, scores, labels):
    boxes, scores, labels = (np.array([x], t) for x, t in ((boxes, np.float32), (scores, np.float32), (labels, int)))
    return Detections(scores, labels, boxes, np.zeros((*scores.shape, 1, 1)))


def test_agreement_by_hand():
    expected = detections([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], [0.9, 0.6, 0.3], [1, 2, 2])
    assert agreement(expected, expected) == {"score": 0, "kept": 1, "box_iou": pytest.approx(1)}
    other = detections([[0, 0, 0.5, 0.5], [0, 0, 1, 0.95], [0.5, 0.5, 1, 1]], [0.7, 0.6, 0.3], [2, 1, 0])
    found = agreement(other, expected)  # another order is none; a box of 0.95 is one; another class is not
    assert found == {"score": pytest.approx(0.2), "kept": pytest.approx(2 / 3), "box_iou": pytest.approx(0.975)}
    nowhere = dataclasses.replace(expected, boxes_xyxy=expected.boxes_xyxy + 5)
    assert agreement(nowhere, expected) == {"score": 0, "kept": 0, "box_iou": 0}


@pytest.mark.slow
def test_runtimes_are_timed_beside_another_network(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, images = small_model(), random_images(1, 64, 96, 3)
    asked = {"num_detections": 7, "num_threads": 1, "repeats": 3, "folder": tmp_path}
    variables = random_variables(model)
    compare_runtimes(model, variables, images, runtimes=["onnxruntime"], **asked)
    found = compare_runtimes(
        model, variables, images, runtimes=["xla", "onnxruntime"], peer=tmp_path / "model.onnx", **asked
    )
    names = [row["runtime"] for row in found["rows"]]
    assert names == ["xla", "onnxruntime", "peer model.onnx"]
    assert found["gflop"] > 0.05 and found["limit_s"] == pytest.approx(found["gflop"] / found["gflops"])
    for row in found["rows"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["p95_s"] and 0 < row["cpu_min_s"] <= row["cpu_median_s"]
        assert row["times_limit"] == pytest.approx(row["min_s"] / found["limit_s"])
        assert row["first_s"] > row["min_s"] and row["file_mb"] > 1
        assert row["times_peer"] == pytest.approx(row["median_s"] / found["rows"][2]["median_s"])
    for row in found["rows"][:2]:
        assert row["difference"]["score"] < 1e-4 and row["difference"]["kept"] == 1
    assert found["rows"][2]["difference"] is None and MATRIX > 1000


@pytest.mark.parametrize(
    ("option", "message"),
    [("--runtimes=abacus", "--runtimes is 'abacus'; it may name xla"), ("--peer=l", "--peer holds 'l'")],
)
def test_bad_options_are_one_sentence(monkeypatch, capsys, tmp_path, option, message):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    assert main(["benchmark", "--runtimes=xla", option, f"--workdir={tmp_path / 'out'}"]) == 1
    assert message in capsys.readouterr().err
