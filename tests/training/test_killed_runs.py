"""A training process that is killed without warning loses at most the steps since its last save."""

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import pytest
from places import ROOT
from tiny_runs import QUICK_COMPILATION, TINY, write_subset

from instseg_jax.training.workdir import read_rows
from instseg_jax.weights import checkpoint

KILLS = 5
STEPS = 60


def start(data: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    overrides = TINY | {
        "data.dir": data,
        "train.epochs": STEPS // 2,
        "checkpoint.every_steps": 1,
        "eval.every_epochs": 2,
        "eval.best_metric": "bbox/AR_100",
    }
    arguments = [f"--config.{field}={value}" for field, value in overrides.items()]
    command = [sys.executable, "run.py", "train", "--config=configs/quickstart.py", f"--workdir={workdir}", *arguments]
    options = {"cwd": ROOT, "env": os.environ | {"XLA_FLAGS": QUICK_COMPILATION}, "text": True}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Steps whose checkpoint was complete: Orbax gives a folder its name when all is written."""
    folder = workdir / "checkpoints"
    return sorted(int(child.name) for child in folder.glob("*") if child.name.isdigit()) if folder.is_dir() else []


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    data, workdir = write_subset(tmp_path / "data", 4), tmp_path / "run"
    rng, last, resumed_at = random.Random(0), 0, []
    for _ in range(KILLS):
        process = start(data, workdir)
        deadline = time.monotonic() + 400
        while not [step for step in saved_steps(workdir) if step > last]:
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))  # in a step, a save, an evaluation or the replacing of the best model
        process.kill()
        process.wait()
        assert process.returncode == -9
        last = saved_steps(workdir)[-1]
        described = json.loads((workdir / "config.json").read_text())
        assert described["model"]["num_queries"] == 8
        if last > 4:  # the first evaluation came before this step was saved; step 4 is saved before it
            variables, metadata = checkpoint.load_inference_checkpoint(workdir)
            assert metadata["score"] is not None and variables["params"]
    process = start(data, workdir)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    log = (workdir / "train.log").read_text()
    resumed_at = [int(step) for step in re.findall(r"resuming at step (\d+)", log)]
    assert len(resumed_at) == KILLS and resumed_at == sorted(resumed_at) and resumed_at[-1] >= last > KILLS - 1
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == list(range(STEPS))
    scores = [row["bbox/AR_100"] for row in read_rows(workdir / "validation.jsonl")]
    assert len(scores) == STEPS // 4
    best = checkpoint.read_metadata(workdir)["score"]
    assert best == json.loads((workdir / "train_result.json").read_text())["best_score"] == max(scores)
    assert not [path for path in workdir.rglob("*") if "tmp" in path.name or "incoming" in path.name]
