"""Trackers get what a run's files get, once, and never change or end a run; the libraries too, without a network."""

import dataclasses
import importlib.util
import json
import logging
import re
import struct
import threading

import numpy as np
import pytest
from trial_runs import Trial

from instseg_jax.data import coco
from instseg_jax.masks import segmentation_to_rle
from instseg_jax.scoring.shown import GAP, draw_found
from instseg_jax.training import trackers
from instseg_jax.training.trackers import Tracker, check_trackers
from instseg_jax.training.validation import build_draw
from instseg_jax.training.workdir import read_rows

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


class Recorder:
    """A tracker that notes what it gets."""

    def __init__(self, fails_at=None):
        self.rows, self.scores, self.pictures, self.files, self.closed = [], [], [], [], 0
        self.fails_at = fails_at

    def log(self, step, numbers):
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        (self.scores if "segm/AP" in numbers else self.rows).append(step)

    def close(self):
        self.closed += 1

    @property
    def tracker(self):
        return Tracker(self.log, lambda step, name, image: self.pictures.append((step, name)),
                       lambda path: self.files.append(path.name), self.close)  # fmt: skip


def interrupted(trial, at=5, **own):
    """The run breaks off in a step, after the checkpoint of the step before it."""

    def fail(number):
        if number == at:
            raise RuntimeError("power cut")

    trial.on_step = fail
    with pytest.raises(RuntimeError, match="power cut"):
        trial.train(**own)
    trial.on_step = lambda number: None


def test_a_run_that_resumes_sends_every_step_once(tmp_path, monkeypatch):
    trial, recorder = Trial(tmp_path, monkeypatch), Recorder()
    mine = {"trackers": {"mine": recorder.tracker}}
    interrupted(trial, **mine)
    assert max(trial.saved) == 4 and recorder.rows == [0, 1, 2, 3]  # step 4 had not been fetched
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as if it was sent, and the run killed after that
        file.write(json.dumps({"step": 4, "loss": 1.0}) + "\n")
    noted = json.loads((tmp_path / "trackers.json").read_text())
    (tmp_path / "trackers.json").write_text(json.dumps({"mine": noted["mine"] | {"rows": 4}}))
    assert trial.train(**mine)["end"] == "finished"
    assert recorder.rows == [0, 1, 2, 3, 5] and recorder.scores == [2, 4, 6]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(6))
    assert recorder.closed == 2 and set(recorder.files) == {"train.log", "evaluate_result.json"}
    trial.train(**mine)
    assert recorder.closed == 2  # nothing is missing: it is not even opened


def test_what_waited_for_a_slow_tracker_when_the_run_was_killed_is_sent_when_it_resumes(tmp_path, monkeypatch):
    trial, recorder, gone = Trial(tmp_path, monkeypatch), Recorder(), threading.Event()
    kept = {}

    def log(step, numbers):
        if step == 2:  # nothing that is noted from here on outlasts the kill
            kept.setdefault("state", (tmp_path / "trackers.json").read_bytes())
            gone.wait(10)
        recorder.log(step, numbers)

    trial.on_step = lambda number: gone.set() if number == 5 else None
    trial.train(trackers={"mine": dataclasses.replace(recorder.tracker, log=log)})
    (tmp_path / "trackers.json").write_bytes(kept["state"])
    recorder.rows, recorder.scores = [0, 1], []
    trial.train(trackers={"mine": recorder.tracker})
    assert recorder.rows == list(range(6)) and recorder.scores == [2, 4, 6]


def test_a_tracker_that_fails_is_told_left_out_and_caught_up(tmp_path, monkeypatch):
    trial, bad, good = Trial(tmp_path, monkeypatch), Recorder(fails_at=3), Recorder()
    assert trial.train(trackers={"bad": bad.tracker, "good": good.tracker})["end"] == "finished"
    assert bad.rows == [0, 1, 2] and good.rows == list(range(6))
    told = (tmp_path / "train.log").read_text()
    assert told.count("the tracker bad fails and is left out from here on: the server is gone") == 1
    bad.fails_at, late = None, Recorder()
    trial.train(trackers={"bad": bad.tracker, "good": good.tracker, "late": late.tracker})
    assert bad.rows == good.rows == late.rows == list(range(6))
    assert bad.scores == good.scores == late.scores == [2, 4, 6]


def test_a_tracker_changes_nothing(tmp_path, monkeypatch):
    Trial(tmp_path / "plain", monkeypatch).train()
    Trial(tmp_path / "tracked", monkeypatch).train(trackers={"bad": Recorder(fails_at=0).tracker})
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "tracked" / name).read_bytes() != b""
    assert not (tmp_path / "plain/trackers.json").exists()


def test_wrong_trackers_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"log\.trackers has 'clearml', it must be of tensorboard, trackio, wandb, ml"):
        check_trackers(("clearml",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs tensorboardX: pip install "instseg_jax\[tensorboard\]"'):
        check_trackers(("tensorboard",))


def test_pictures_show_objects_and_what_was_found():
    dataset = coco.take_images(coco.read_split(coco.EMBEDDED, "val"), [0, 1, 2])
    record = dataset.images[2]
    results = [
        {
            "image_id": record.id,
            "category_id": dataset.category_ids[one.label],
            "bbox": one.box_xywh_px,
            "segmentation": segmentation_to_rle(one.segmentation, record.height, record.width),
            "score": score,
        }
        for one, score in zip(dataset.annotations[2], (0.9, 0.4), strict=False)
    ]
    drawn = dict(draw_found(dataset, results, 2, threshold=0.5))
    assert list(drawn) == [record.file_name.removesuffix(".jpg") for record in dataset.images[::2]]
    for index, picture in zip((0, 2), drawn.values(), strict=True):
        plain = dataset.read_image(index)
        left, right = picture[:, : plain.shape[1]], picture[:, plain.shape[1] + GAP :]
        assert left.shape == right.shape == plain.shape and (left != plain).any()
        assert (right != plain).any() == (index == 2)  # the first has nothing that is certain enough


def test_pictures_go_into_the_workdir_or_are_told(tmp_path, caplog):
    dataset = coco.take_images(coco.read_split(coco.EMBEDDED, "val"), [0, 1])
    logger = logging.getLogger("pictures")
    names = [f"validation/{record.file_name.removesuffix('.jpg')}" for record in dataset.images]
    assert list(build_draw(tmp_path, dataset, 9, logger)(3, [])) == names
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == sorted(f"{n[11:]}.jpg" for n in names)
    lost = dataclasses.replace(dataset, image_folder=tmp_path / "gone")
    assert build_draw(tmp_path, lost, 9, logger)(3, []) == {}
    assert "pictures of the validation at step 3 can't be drawn" in caplog.text


def steps_in_tensorboard(workdir):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(workdir / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    pictures = [(one.step, one.width) for one in events.Images("validation/a")]
    return [one.step for one in events.Scalars("loss")], [one.step for one in events.Scalars("segm/AP")], pictures


def steps_in_trackio(workdir):
    from trackio.sqlite_storage import SQLiteStorage

    run = json.loads((workdir / "trackers.json").read_text())["trackio"]["run"]
    rows = SQLiteStorage.get_logs(trackers.PROJECT, run)
    named = {name: [row["step"] for row in rows if name in row] for name in ("loss", "segm/AP", "validation/a")}
    return named["loss"], named["segm/AP"], [(step, 6) for step in named["validation/a"]]


def steps_in_mlflow(workdir):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{workdir / 'mlflow.db'}")
    run = json.loads((workdir / "trackers.json").read_text())["mlflow"]["run"]
    assert client.get_run(run).info.status == "FINISHED" and client.get_run(run).data.params["train.epochs"] == "3"
    assert {"train.log", "images"} <= {file.path for file in client.list_artifacts(run)}
    paths = [file.path for file in client.list_artifacts(run, "images")]
    images = {int(re.search("[+%]step[+%]([0-9]+)", path)[1]) for path in paths}
    named = {name: [one.step for one in client.get_metric_history(run, name)] for name in ("loss", "segm/AP")}
    return named["loss"], named["segm/AP"], [(step, 6) for step in sorted(images)]


def steps_in_wandb(workdir):
    from wandb.proto import wandb_internal_pb2

    found = {"loss": [], "segm/AP": [], "validation/a": []}
    for path in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record.FromString(data)
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for name in found:
                if any(f"{key}/".startswith(f"{name}/") for key in values):  # a picture has several values
                    found[name].append(int(values["_step"]))
    return found["loss"], found["segm/AP"], [(step, 6) for step in found["validation/a"]]


def records(data, block=32768):
    """Records of a LevelDB log, whose first block lacks 7 bytes: CRC (4 bytes), length (2), kind (1), data."""
    position, whole = 0, b""
    while position + 7 <= len(data):
        left = block - (position + 7) % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@pytest.mark.slow
@pytest.mark.parametrize("name", trackers.MODULES)
def test_the_libraries_get_every_step_once(name, tmp_path, monkeypatch):
    pytest.importorskip(trackers.MODULES[name])
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)
    workdir = tmp_path / "run"
    trial = Trial(workdir, monkeypatch, **{"log.trackers": name})
    trial.draw = lambda step, results: {"validation/a": PICTURE}
    interrupted(trial)
    if name == "wandb":  # the same run twice in one process: its service has to end in between
        importlib.import_module(name).teardown()
    trial.train()
    assert "is left out" not in (workdir / "train.log").read_text()
    found = {"tensorboard": steps_in_tensorboard, "trackio": steps_in_trackio, "mlflow": steps_in_mlflow,
             "wandb": steps_in_wandb}[name](workdir)  # fmt: skip
    assert found == (list(range(6)), [2, 4, 6], [(2, 6), (4, 6), (6, 6)])
