"""Five channels of 16 bits through the whole chain: check, train from a stem of colours, evaluate, predict."""

import json
import math

import numpy as np
import pytest
from bands_data import write_dataset

from instseg_jax.cli import main
from instseg_jax.config import load_config
from instseg_jax.models.mask_rtdetr import build_model, initial_variables
from instseg_jax.weights import checkpoint

FIELDS = {
    "model.num_decoder_layers": 1, "model.num_queries": 8, "data.image_size": 64, "data.train_sizes": "(64,)",
    "data.max_instances": 6, "data.num_workers": 1, "data.channels": 5, "data.scaling": "percentile",
    "denoising.num_denoising": 6, "loss.num_points": 64, "optimizer.warmup_steps": 2, "train.batch_size": 2,
    "train.epochs": 1, "eval.every_epochs": 1,
}  # fmt: skip


@pytest.mark.slow
def test_train_evaluate_predict(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    data, work = write_dataset(tmp_path / "data", 5, ".npy"), tmp_path / "work"
    overrides = [f"--config.{field}={value}" for field, value in (FIELDS | {"data.dir": data}).items()]
    assert main(["check_dataset", f"--workdir={work}", "--config=configs/quickstart.py", *overrides]) == 0

    # Weights for colours, as a checkpoint of three channels; their stem is inflated.
    plain = load_config("configs/quickstart.py", {"model.num_decoder_layers": "1", "model.num_queries": "8"})
    variables = initial_variables(build_model(plain.model, 1), seed=5)
    metadata = {"config": json.loads(plain.to_json_best_effort()), "class_names": ["square"], "category_ids": [1]}
    checkpoint.save_inference_checkpoint(tmp_path / "colours", variables, metadata)

    start = f"--config.model.weights={tmp_path / 'colours'}"
    assert main(["train", "--config=configs/quickstart.py", f"--workdir={work}", start, *overrides]) == 0
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    assert "reshaped: backbone/stem/conv/kernel" in (work / "train.log").read_text()

    saved = checkpoint.read_metadata(work / "best_model")["config"]["data"]
    assert saved["channels"] == 5 and len(saved["channel_ranges"]) == 5
    assert main(["evaluate", f"--weights={work}", f"--workdir={tmp_path / 'again'}"]) == 0
    once, again = (
        json.loads((folder / "evaluate_result.json").read_text())["metrics"] for folder in (work, tmp_path / "again")
    )
    assert once["segm/AP"] == again["segm/AP"]

    picture = data / "images" / "0.npy"
    predict = ["predict", f"--weights={work}", f"--workdir={tmp_path / 'predicted'}", "--threshold=0"]
    assert main([*predict, f"--input={picture}"]) == 0
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((8, 8, 2), np.uint16))
    capsys.readouterr()
    assert main([*predict, f"--input={wrong}"]) == 1
    said = capsys.readouterr()
    assert "has 2 channels, data.channels is 5" in said.err + said.out
