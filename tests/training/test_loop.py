"""From pictures to a trained, resumable, usable model: the whole chain on a few real images."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import optax
import pytest
from pycocotools.coco import COCO
from tiny_runs import TINY, write_subset

import instseg_jax
from instseg_jax.cli import main
from instseg_jax.config import load_config
from instseg_jax.data.source import build_dataset
from instseg_jax.models.mask_rtdetr import build_model, initial_variables
from instseg_jax.training import metrics, setup, step
from instseg_jax.training.optimizer import build_optimizer
from instseg_jax.training.state import TrainState, initial_state
from instseg_jax.training.workdir import read_rows
from instseg_jax.weights import checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return write_subset(tmp_path_factory.mktemp("subset") / "data", 4)


@pytest.fixture(scope="module", autouse=True)
def _compile_once():
    """The runs of this module take the same step; compiling it again takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        built = []

        def build_once(*args):
            built.append(build(*args)) if not built else None
            return built[0]

        build = setup.build_train_step
        patch.setattr(setup, "build_train_step", build_once)
        yield


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> pathlib.Path:
    """A run of four steps without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = load_config("configs/quickstart.py", TINY | {"data.dir": str(data)})
    result = instseg_jax.train(config, workdir)
    assert result["done_flag"] and result["steps"] == 4
    return workdir


def last_state(config, workdir: pathlib.Path) -> TrainState:
    """The training state in the last checkpoint, in numpy."""
    variables = initial_variables(build_model(config.model, 1), seed=0)
    optimizer, _ = build_optimizer(config.optimizer, variables["params"], optax.constant_schedule(0.0))
    with checkpoint.make_manager(workdir / "checkpoints", max_to_keep=3) as manager:
        return checkpoint.restore(manager, initial_state(variables, optimizer))[0]


def test_a_run_leaves_what_it_promises(finished):
    rows = read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(np.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    terms = [name for name in rows[0] if name.startswith("loss/")]
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][name] for name in terms), rel=1e-5)
    assert {"loss/class", "loss/mask_dice/encoder", "loss/box_giou/denoising"} <= set(terms)
    assert rows[0]["learning_rate"] < rows[1]["learning_rate"]
    assert json.loads((finished / "train_result.json").read_text())["done_flag"] is True
    scored = json.loads((finished / "evaluate_result.json").read_text())
    assert scored["metrics"]["AP"] == scored["metrics"]["segm/AP"]
    assert 0 <= scored["metrics"]["segm/AP50"] <= 1
    described = checkpoint.read_metadata(finished)
    assert described["class_names"] == ["building"]
    assert described["config"]["model"]["num_queries"] == 8


def test_a_stopped_run_resumes_to_the_bit(data, finished, tmp_path, monkeypatch):
    """SIGTERM in the middle of an epoch saves; the same call again ends where the whole run ended."""
    config = load_config("configs/quickstart.py", TINY | {"data.dir": str(data)})
    update = metrics.TrainingProgress.update

    def stop_after_three(self, step, row):
        update(self, step, row)
        if step == 2:  # the third step has been dispatched by then
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.TrainingProgress, "update", stop_after_three)
    stopped = instseg_jax.train(config, tmp_path)
    assert not stopped["done_flag"] and 2 <= stopped["steps"] < 4
    monkeypatch.undo()
    resumed = instseg_jax.train(config, tmp_path)
    assert resumed["done_flag"] and resumed["steps"] == 4
    jax.tree.map(np.testing.assert_array_equal, last_state(config, finished), last_state(config, tmp_path))
    first, second = (read_rows(folder / "metrics.jsonl") for folder in (finished, tmp_path))
    assert first == second


def test_another_config_is_refused(data, finished):
    changed = load_config("configs/quickstart.py", TINY | {"data.dir": str(data), "optimizer.learning_rate": "0.5"})
    before = (finished / "config.json").read_text()
    with pytest.raises(ValueError, match=r"optimizer.learning_rate was 0.001, is 0.5"):
        instseg_jax.train(changed, finished)
    assert (finished / "config.json").read_text() == before


def test_predict_and_evaluate_from_the_shell(data, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    folder = tmp_path / "pictures"
    shutil.copytree(data / "images", folder)
    (folder / "broken.jpg").write_bytes(b"no picture")
    code = main(["predict", f"--weights={finished}", f"--input={folder}", f"--workdir={tmp_path}", "--threshold=0"])
    said = capsys.readouterr().out
    assert code == 1 and "broken.jpg" in said and "4 pictures" in said
    drawn = sorted(p.name for p in (tmp_path / "predictions").iterdir())
    assert len(drawn) == 9 and "failed.json" in drawn  # a folder that is no run is a job, which lists what failed
    result = json.loads(next((tmp_path / "predictions").glob("*_res.json")).read_text())
    assert len(result["boxes"]) == len(result["masks"]) == 8  # queries times the one class
    assert result["boxes"][0]["label"] == "building"

    assert main(["evaluate", f"--weights={finished}", f"--workdir={tmp_path}"]) == 0
    once = json.loads((tmp_path / "evaluate_result.json").read_text())["metrics"]
    trained = json.loads((finished / "evaluate_result.json").read_text())["metrics"]
    assert {name: once[name] for name in trained} == trained  # the verb scores the edges of masks too
    truth = COCO(str(data / "annotations/instance_val.json"))
    assert truth.loadRes(str(tmp_path / "predictions.json")).getAnnIds()


@pytest.mark.slow
def test_a_few_images_are_learnt_by_heart(tmp_path, monkeypatch):
    """If loss, gradients and evaluation belong together, four images reach segm AP50 > 0.9."""
    monkeypatch.setattr(setup, "build_train_step", step.build_train_step)
    data = write_subset(tmp_path / "data", 4)
    overrides = {
        "data.dir": str(data),
        "data.image_size": "192",
        "data.train_sizes": "(192,)",
        "data.augment.photometric_probability": "0",
        "data.augment.flip_probability": "0",
        "data.augment.scale_jitter": "None",
        "train.epochs": "400",
        "eval.every_epochs": "400",
        "optimizer.ema_decay": "0.98",
        "loss.num_points": "1024",
    }
    config = load_config("configs/quickstart.py", overrides)
    instseg_jax.train(config, tmp_path / "run")
    scored = json.loads((tmp_path / "run/evaluate_result.json").read_text())["metrics"]
    assert scored["segm/AP50"] > 0.9
    assert build_dataset(config.data, "val").categories == ("building",)
