"""Options of the training recipe, each by what a real run leaves: sizes, precision, early end, records."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from places import ROOT
from tiny_runs import QUICK_COMPILATION, TINY, write_subset

from instseg_jax.config import load_config
from instseg_jax.data import loader
from instseg_jax.data.source import build_dataset
from instseg_jax.training import loop, workdir
from instseg_jax.training.workdir import read_rows
from instseg_jax.weights import checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return write_subset(tmp_path_factory.mktemp("subset") / "data", 4)


def train(data: pathlib.Path, folder: pathlib.Path, compiled: pathlib.Path, **overrides) -> str:
    """Run the command in a process of its own; returns what it said."""
    fields = TINY | {"data.dir": data} | overrides
    arguments = [f"--config.{field}={value}" for field, value in fields.items()]
    command = [sys.executable, "run.py", "train", "--config=configs/quickstart.py", f"--workdir={folder}", *arguments]
    environment = os.environ | {"INSTSEG_COMPILED": str(compiled), "XLA_FLAGS": QUICK_COMPILATION}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_each_size_is_compiled_once_and_kept(data, tmp_path):
    """Sizes are drawn from (seed, step) alone, so every process of several draws the same."""
    config = load_config("configs/quickstart.py", TINY | {"data.dir": str(data), "data.train_sizes": "(64, 96)"})
    batches = loader.build_train_loader(config, build_dataset(config.data, "train")).batches()
    drawn = {next(batches).images.shape[1] for _ in range(8)}
    batches.close()
    assert drawn == {64, 96}
    options = {"data.train_sizes": "(64,96)", "train.epochs": 4}
    said = train(data, tmp_path / "first", tmp_path / "compiled", **options)
    assert "huge pages" in said
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "compiled").glob("jit_*-cache"))
    assert [kept.count(f"jit_{name}") for name in ("forward", "backward", "update")] == [2, 2, 1]
    before = set((tmp_path / "compiled").glob("*-cache"))
    train(data, tmp_path / "second", tmp_path / "compiled", **options)
    assert set((tmp_path / "compiled").glob("*-cache")) == before
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("first", "second")]
    assert rows[0] == rows[1] and len(rows[0]) == 8


@pytest.mark.slow
def test_low_precision_and_remat_train_like_float32(data, tmp_path):
    runs = {"plain": {}, "bfloat16": {"model.dtype": "bfloat16"}, "remat": {"model.remat": True}}
    rows, kinds = {}, {}
    for name, options in runs.items():
        train(data, tmp_path / name, tmp_path / "compiled", **options)
        rows[name] = read_rows(tmp_path / name / "metrics.jsonl")
        kinds[name] = {x.dtype for x in jax.tree.leaves(checkpoint.load_inference_checkpoint(tmp_path / name)[0])}
    first = {name: values[0]["loss"] for name, values in rows.items()}
    assert first["remat"] == pytest.approx(first["plain"], rel=1e-5)
    assert first["bfloat16"] == pytest.approx(first["plain"], rel=0.05) and first["bfloat16"] != first["plain"]
    assert kinds["bfloat16"] == kinds["plain"] == {np.dtype(np.float32)}
    assert all(np.isfinite(row["loss"]) for row in rows["bfloat16"])


@pytest.mark.slow
def test_training_ends_early_and_leaves_its_records(data, tmp_path):
    """Boxes of 64 px pictures are found nowhere in so few steps: the score stays where it is."""
    pytest.importorskip("tensorboardX")
    options = {
        "train.epochs": 20,
        "eval.every_epochs": 1,
        "train.early_stopping": 2,
        "eval.best_metric": "segm/AP_small",
    }
    said = train(data, tmp_path / "run", tmp_path / "compiled", **options, **{"log.trackers": "tensorboard"})
    result = json.loads((tmp_path / "run/train_result.json").read_text())
    assert "no better segm/AP_small in 2 evaluations" in said
    assert result["end"] == "stopped early" and result["done_flag"]
    assert 0 < result["steps"] < result["total_steps"] == 40
    assert result["models"]["last_1"]["step"] == result["steps"]
    assert (tmp_path / "run" / result["models"]["best"]["path"]).is_dir()
    assert (tmp_path / "run/training.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
    again = train(data, tmp_path / "run", tmp_path / "compiled", **options)
    assert json.loads((tmp_path / "run/train_result.json").read_text())["steps"] == result["steps"], again


def test_a_folder_without_room_or_rights_is_refused(tmp_path, monkeypatch):
    config = load_config("configs/quickstart.py")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't write to the folder"):
        workdir.open_workdir(tmp_path / "file" / "run", config, 10, 100)
    with pytest.raises(OSError, match=r"room for \d+ MB, the checkpoints to come need 4000000000 MB"):
        workdir.open_workdir(tmp_path / "run", config, 10**15, 100)
    assert not (tmp_path / "run" / "config.json").exists()
    workdir.open_workdir(tmp_path / "run", config, 10, 100)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["name"] == "mask_rtdetr_n"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),  # writing a row of numbers
        ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device"),  # Orbax, saving
    ],
)
def test_a_disk_that_fills_up_on_the_way_is_told(tmp_path, monkeypatch, error):
    manager = checkpoint.make_manager(tmp_path / "checkpoints", max_to_keep=1)
    checkpoint.save(manager, 7, {"params": {"a": np.ones(3)}, "batch_stats": {}}, {"step": 7}, wait=True)
    manager.close()

    def fill_up(config, workdir, own):
        raise error

    monkeypatch.setattr(loop, "_train", fill_up)
    with pytest.raises(OSError, match=r"has no room left, step 7 is saved; free some and give the same command again"):
        loop.train(load_config("configs/quickstart.py"), tmp_path)
    result = json.loads((tmp_path / "train_result.json").read_text())
    assert result["err_type"] == "OSError" and "no room left" in result["err_msg"] and not result["done_flag"]


def test_rows_that_were_cut_off_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2]
    workdir.keep_rows(path, lambda row: row["step"] < 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
