"""Runs that go on: for longer than first meant, from another run's weights, and without validation images.

Data and workdir are real; the network is a few numbers, the step counts, and evaluations give what they are told.
"""

import dataclasses
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import TINY, write_subset

from instseg_jax.config import load_config
from instseg_jax.data import loader
from instseg_jax.data.source import build_dataset
from instseg_jax.training import loop, setup
from instseg_jax.training.workdir import read_rows
from instseg_jax.weights import checkpoint

METRICS = dict.fromkeys(("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50", "AP", "AP50"), 0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return write_subset(tmp_path_factory.mktemp("subset") / "data", 4)


@pytest.fixture(autouse=True)
def _steps_that_only_count(monkeypatch):
    def build_train_step(config, model, optimizer, schedule, multipliers, mesh):
        def step(state, parts):
            row = {"loss": jnp.float32(1), "learning_rate": schedule(state.num_updates), "skipped": False}
            return dataclasses.replace(state, step=state.step + 1, num_updates=state.num_updates + 1), row

        return step

    def initial_variables(model, *, seed, channels):
        head = {"score_head": {"bias": np.zeros(1, np.float32)}}
        return {
            "params": {"backbone": {"a": np.ones(2, np.float32)}, "transformer": head},
            "batch_stats": {"backbone": {"b": np.ones(2, np.float32)}},
        }

    monkeypatch.setattr(setup, "build_train_step", build_train_step)
    monkeypatch.setattr(setup, "initial_variables", initial_variables)
    monkeypatch.setattr(loop, "draw_training", lambda workdir: None)


@pytest.fixture
def _scored(monkeypatch):
    monkeypatch.setattr(setup, "build_score", lambda *of: lambda variables: (METRICS, []))


def train(data, workdir, **fields):
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return loop.train(load_config("quickstart", TINY | {"data.dir": str(data)} | named), workdir)


def rates(workdir):
    return [row["learning_rate"] for row in read_rows(workdir / "metrics.jsonl")]


@pytest.mark.usefixtures("_scored")
def test_more_epochs_continue_and_stretch_the_schedule(data, tmp_path):
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    fields = {"optimizer__warmup_steps": 0}
    assert train(data, longer, train__epochs=2, **fields)["steps"] == 4
    ended = rates(longer)[-1]
    result = train(data, longer, train__epochs=5, **fields)
    assert (result["end"], result["steps"], result["total_steps"]) == ("finished", 10, 10)
    assert json.loads((longer / "config.json").read_text())["train"]["epochs"] == 5
    train(data, whole, train__epochs=5, **fields)
    assert rates(longer)[4:] == rates(whole)[4:] and rates(longer)[4] > ended
    log = (longer / "train.log").read_text()
    said = "train.epochs was 2 and is 5: the cosine schedule is stretched over the new total, so its rate goes on at "
    assert f"{said}{rates(whole)[4]:.3g} from step 4 (it was 0 there)" in log
    assert train(data, longer, train__epochs=5, **fields)["steps"] == 10 and len(rates(longer)) == 10
    with pytest.raises(ValueError, match=r"longer has trained 10 steps, more than the 4 of train.epochs=2; give more"):
        train(data, longer, train__epochs=2, **fields)
    assert json.loads((longer / "config.json").read_text())["train"]["epochs"] == 5


@pytest.mark.usefixtures("_scored")
def test_a_constant_rate_and_an_early_end_go_on_too(data, tmp_path):
    fields = {"optimizer__schedule": "constant", "eval__every_epochs": 1}
    result = train(data, tmp_path, train__epochs=4, train__early_stopping=1, **fields)
    assert (result["end"], result["steps"]) == ("stopped early", 4)
    result = train(data, tmp_path, train__epochs=6, train__early_stopping=None, **fields)
    assert (result["end"], result["steps"]) == ("finished", 12)
    assert (
        "train.epochs was 4 and is 6: training goes on, its learning rate stays" in (tmp_path / "train.log").read_text()
    )


@pytest.mark.usefixtures("_scored")
def test_what_cant_change_names_the_command_of_a_new_run(data, tmp_path, monkeypatch):
    workdir = tmp_path / "mine"
    train(data, workdir)
    (tmp_path / "mine_2").mkdir()
    command = ["instseg", "train", "--config", "quickstart", "--workdir", str(workdir), "--config.data.dir=my data"]
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command[0]}", *command[1:]])
    with pytest.raises(ValueError) as error:
        train(data, workdir, optimizer__learning_rate=0.5)
    assert str(error.value) == (
        f"{workdir} holds a run with another config (optimizer.learning_rate was 0.001, is 0.5); give the same values "
        "to resume it, or start a new run from its weights: instseg train --config quickstart "
        f"'--config.data.dir=my data' --config.model.weights={workdir} --workdir={tmp_path / 'mine_3'}"
    )
    result = train(data, tmp_path / "mine_3", optimizer__learning_rate=0.5, model__weights=str(workdir))
    assert result["end"] == "finished"
    assert "0 fresh" in (tmp_path / "mine_3" / "train.log").read_text()
    with pytest.raises(ValueError, match=r"start a new run: instseg train [^;]*--workdir=\S*mine_4$") as error:
        train(data, workdir, model__num_prototypes=8)
    assert "model.weights" not in str(error.value)


def without_validation(data, folder, how):
    whole = json.loads((data / "annotations/instance_train.json").read_text())
    for child in ("annotations", "images"):
        (folder / child).mkdir(parents=True)
    for picture in (data / "images").iterdir():
        (folder / "images" / picture.name).write_bytes(picture.read_bytes())
    (folder / "annotations/instance_train.json").write_text(json.dumps(whole))
    if how == "empty":
        empty = whole | {"images": [], "annotations": []}
        (folder / "annotations/instance_val.json").write_text(json.dumps(empty))
    return folder


@pytest.mark.parametrize("how", ["empty", "missing"])
def test_without_validation_the_last_weights_are_the_best(data, tmp_path, how):
    folder, workdir = without_validation(data, tmp_path / "data", how), tmp_path / "run"
    result = train(folder, workdir, train__epochs=3)
    assert (result["end"], result["best_score"], result["models"]["best"]["step"]) == ("finished", None, 6)
    log = (workdir / "train.log").read_text()
    assert str(folder / "annotations/instance_val.json") in log
    assert f"split --config.data.dir={folder} --train_percent=80 --val_percent=20` deals the pictures out anew" in log
    assert "training goes without validation: its last weights count as the best ones" in log
    assert "4 training and 0 validation images" in log
    best, described = checkpoint.load_inference_checkpoint(workdir)
    assert described["step"] == 6 and best["params"]
    assert train(folder, workdir, train__epochs=4)["models"]["best"]["step"] == 8
    with pytest.raises((ValueError, FileNotFoundError), match=r"instance_val\.json.*split --config\.data\.dir="):
        config = load_config("quickstart", {"data.dir": str(folder)})
        loader.build_eval_loader(config, build_dataset(config.data, "val"))


def test_a_validation_file_that_is_named_must_be_there(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*other\.json"):
        train(data, tmp_path / "run", data__val_annotations="annotations/other.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train__epochs", -1, "train.epochs is -1, it must not be negative"),
        ("eval__every_epochs", 0, "eval.every_epochs is 0, it must be above 0"),
        ("eval__best_metric", "segm/mAP", r"eval.best_metric is 'segm/mAP', it must be one of .*segm/AP50"),
        ("eval__engine", "coco", "evaluation engine must be one of"),
        ("data__eval_interpolation", "bicubic", "interpolation must be one of"),
    ],
)
def test_what_would_end_the_first_evaluation_is_refused_before_anything(data, tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path / "run", **{field: value})
    assert not (tmp_path / "run").exists()
