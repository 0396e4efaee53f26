"""Evaluation gives the same on one device and on several, in one process and in several, in batches of any size."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import HELPERS
from pycocotools import mask as mask_api

SCRIPT = HELPERS / "evaluate_on_devices.py"


def evaluate(folder: Path, *, devices: int, batch_size: int, processes: int = 1, views: str = "") -> list[dict]:
    """What each process says of the evaluation."""
    environment = dict(os.environ)
    environment |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(SCRIPT.parent.parent)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    file = folder / f"{devices}-{batch_size}-{processes}-{views}.json"
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(file), str(batch_size), str(processes), str(i), str(port), views],
            env=environment, cwd=SCRIPT.parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    for process in started:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    return [json.loads(Path(f"{file}.{i}").read_text(encoding="utf-8")) for i in range(processes)]


def assert_same(one: dict, other: dict, *, least_iou: float = 1.0) -> None:
    assert len(one["results"]) == len(other["results"]) == 35 * 6
    for a, b in zip(one["results"], other["results"], strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        np.testing.assert_allclose([a["score"], *a["bbox"]], [b["score"], *b["bbox"]], rtol=1e-5)
        assert mask_api.iou([a["segmentation"]], [b["segmentation"]], [0])[0, 0] >= least_iou
    assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-12)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> dict:
    (said,) = evaluate(tmp_path_factory.mktemp("one"), devices=1, batch_size=1)
    assert said["devices"] == 1
    assert len({json.dumps(r["segmentation"]) for r in said["results"]}) > 100
    assert 0 < said["metrics"]["segm/AR_100"] < 1
    return said


def test_eight_devices_and_a_last_partial_batch(tmp_path, one_device):
    """35 images in batches of 3, which 8 devices fill up to 8."""
    (said,) = evaluate(tmp_path, devices=8, batch_size=3)
    assert said["devices"] == 8
    assert_same(one_device, said)


@pytest.mark.slow
def test_two_processes_know_everything(tmp_path, one_device):
    for said in evaluate(tmp_path, devices=2, batch_size=8, processes=2):
        assert (said["devices"], said["processes"]) == (4, 2)
        assert_same(one_device, said)


@pytest.mark.slow
def test_views_on_several_devices(tmp_path, one_device):
    (one,) = evaluate(tmp_path, devices=1, batch_size=4, views="flip,scales")
    (two,) = evaluate(tmp_path, devices=2, batch_size=4, views="flip,scales")
    # Masks are means over views: rounding, which depends on how many images a device has, can move a pixel.
    assert_same(one, two, least_iou=0.999)
    assert [r["score"] for r in one["results"]] != [r["score"] for r in one_device["results"]]
    assert {r["image_id"] for r in one["results"]} == {r["image_id"] for r in one_device["results"]}
