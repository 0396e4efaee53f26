"""A data set with everything that passes the check takes a real training step of size N, with finite numbers."""

import json
import math
import pathlib

import pytest
from broken_data import HEIGHT, RLE, WIDTH, change_annotation, copy_image, list_twice, run_check, write_dataset

from instseg_jax.cli import main

SMALL = {
    "model.num_decoder_layers": 1, "model.num_queries": 8, "data.image_size": 64, "data.train_sizes": "(64,)",
    "data.max_instances": 6, "data.num_workers": 1, "data.keep_empty": True, "denoising.num_denoising": 6,
    "loss.num_points": 64, "optimizer.warmup_steps": 2, "train.batch_size": 4, "train.epochs": 2,
    "eval.every_epochs": 2,
}  # fmt: skip


@pytest.mark.slow
def test_all_that_passes_trains(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")

    def edit(contents, folder):
        copy_image(contents, folder)
        list_twice(contents, folder)
        change_annotation(number=0, iscrowd=1)(contents, folder)
        change_annotation(number=1, bbox=[2, 3, 28, 20])(contents, folder)
        change_annotation(number=2, segmentation=[[2, 3, 14, 12, 14, 3, 2, 12]])(contents, folder)
        change_annotation(number=3, area=0)(contents, folder)
        change_annotation(number=4, segmentation=dict(RLE, counts=[HEIGHT * WIDTH]))(contents, folder)
        del contents["train"]["annotations"][6:]

    root = write_dataset(tmp_path / "data", edit)
    result = run_check(root)
    assert result.passed
    found = {flaw.code for flaw in result.flaws}
    assert found >= {"leak", "duplicate_file_name", "crowd", "box_mask_mismatch", "self_crossing_polygon", "zero_area"}
    assert found >= {"empty_mask", "empty_image"}
    overrides = [f"--config.{field}={value}" for field, value in SMALL.items()]
    code = main(
        ["train", "--config=configs/quickstart.py", f"--config.data.dir={root}", f"--workdir={tmp_path}", *overrides]
    )
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) >= 2
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
