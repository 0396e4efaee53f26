"""The training loop around a step that takes no time: what is saved when, what a signal does, how long it says."""

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from places import ROOT
from tiny_runs import TINY, write_subset
from trial_runs import Trial

from instseg_jax.config import load_config
from instseg_jax.progress import say_duration
from instseg_jax.training import loop, metrics, validation
from instseg_jax.training.signals import Interrupted, StopSignals
from instseg_jax.training.workdir import read_rows


def send(number):
    os.kill(os.getpid(), number)


def test_every_evaluated_step_is_saved_before_its_evaluation(tmp_path, monkeypatch):
    trial = Trial(tmp_path, monkeypatch)
    before = []
    trial.on_score = lambda number: before.append((number, trial.saved[-1]))
    result = trial.train()
    assert before == [(2, 2), (4, 4), (6, 6)]
    assert (result["end"], result["steps"], trial.saved) == ("finished", 6, [2, 4, 6])
    assert result["models"]["last_1"] == {"step": 6, "score": 0.25, "path": "checkpoints/6"}
    assert result["models"]["best"]["score"] == 0.25


def test_early_stopping_after_no_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train\.early_stopping is 0, it must be at least 1"):
        loop.train(load_config("quickstart", {"train.early_stopping": "0"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_never_knows_more_than_the_rows(tmp_path, monkeypatch):
    """Killed right after a save, a run goes on from there: what is not written then never will be."""
    trial = Trial(tmp_path, monkeypatch, **{"checkpoint.every_steps": 1})
    rows_at_save, save = {}, loop.checkpoint.save

    def look(manager, step, *arguments, **options):
        rows_at_save[step] = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
        return save(manager, step, *arguments, **options)

    monkeypatch.setattr(loop.checkpoint, "save", look)
    trial.train()
    assert rows_at_save == {step: list(range(step)) for step in range(1, 7)}


@pytest.mark.parametrize("epochs", [1, 3])
def test_an_evaluation_that_breaks_loses_no_epoch_and_is_made_again(tmp_path, monkeypatch, epochs):
    trial = Trial(tmp_path, monkeypatch, **{"train.epochs": epochs})

    def fail(number):
        raise MemoryError("no memory for an evaluation")

    trial.on_score = fail
    with pytest.raises(MemoryError):
        trial.train()
    assert trial.saved == [2] and trial.steps == [0, 1] and trial.scored == []
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]
    trial.on_score = lambda number: None
    assert trial.train()["end"] == "finished"
    assert trial.steps == list(range(2 * epochs))
    assert trial.scored == list(range(2, 2 * epochs + 1, 2))
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == trial.scored
    trial.train()
    assert trial.scored == list(range(2, 2 * epochs + 1, 2))  # what is finished is not scored again


@pytest.mark.parametrize("part", ["keep_weights", "write_evaluation", "History.add"])
@pytest.mark.parametrize("at", [2, 6])
def test_an_evaluation_that_is_killed_after_its_score_keeps_the_best_model(tmp_path, monkeypatch, part, at):
    trial = Trial(tmp_path, monkeypatch, **{"train.early_stopping": 2})  # the third of three equal scores is the last
    owner = validation.History if part == "History.add" else validation
    name = part.rpartition(".")[2]
    whole = getattr(owner, name)

    def killed(*arguments, **options):
        if trial.saved[-1] == at:
            raise KeyboardInterrupt  # nothing that is left to do is done
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, killed)
    with pytest.raises(KeyboardInterrupt):
        trial.train()
    assert (tmp_path / "evaluate_result.json").exists() == (part == "History.add")  # never that of other weights
    monkeypatch.setattr(owner, name, whole)
    result = trial.train()
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [2, 4, 6]
    assert result["models"]["best"] == {"step": 6, "score": 0.25, "path": "best_model"}
    assert (result["best_score"], result["steps"]) == (0.25, 6)
    assert (tmp_path / "predictions.json").exists()


@pytest.mark.parametrize("at", [2, 6])
def test_pictures_of_an_evaluation_are_drawn_where_a_kill_came_before_them(tmp_path, monkeypatch, at):
    trial, drawn = Trial(tmp_path, monkeypatch), []

    def killed(step, results):
        if step == at:
            raise KeyboardInterrupt  # nothing that is left to do is done
        drawn.append(step)

    trial.draw = killed  # called by each evaluation
    with pytest.raises(KeyboardInterrupt):
        trial.train()
    trial.draw = lambda step, results: drawn.append(step)
    trial.train()
    assert drawn == [2, 4, 6]


def test_a_run_is_called_finished_when_all_that_belongs_to_it_is_done(tmp_path, monkeypatch):
    trial, result = Trial(tmp_path, monkeypatch), tmp_path / "train_result.json"
    is_there = []

    def killed():
        raise KeyboardInterrupt  # nothing that is left to do is done

    with pytest.raises(KeyboardInterrupt):
        loop.train(trial.config, tmp_path, finish=killed)
    assert not result.exists()
    loop.train(trial.config, tmp_path, finish=lambda: is_there.append(result.exists()))
    assert is_there == [False] and json.loads(result.read_text())["done_flag"]
    trial = Trial(tmp_path, monkeypatch, **{"train.epochs": 5})
    trial.on_step = lambda number: is_there.append(result.exists())
    loop.train(trial.config, tmp_path)
    assert is_there == [False] * 5 and json.loads(result.read_text())["steps"] == 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_first_step_of_a_size_is_heard_at_once(tmp_path, monkeypatch, number):
    """XLA compiles outside of Python; a wait in a thread that no signal can end stands for it."""
    trial, released = Trial(tmp_path, monkeypatch, sizes=(64, 64, 64, 96)), threading.Event()

    def compile_for_long(step):
        if step == 3:
            threading.Timer(0.2, send, [number]).start()
            released.wait(60)

    trial.on_step = compile_for_long
    started = time.monotonic()
    result = trial.train()
    assert time.monotonic() - started < 30
    assert (result["end"], result["done_flag"], result["steps"], trial.saved) == ("stopped", False, 3, [2, 3])
    released.set()
    trial.on_step = lambda step: None
    assert trial.train()["end"] == "finished"
    assert trial.steps == [0, 1, 2, 3, 3, 4, 5]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    log = (tmp_path / "train.log").read_text()
    assert "compiling the training step for 96 x 96 px, about 40 s the first time" in log
    assert "stopped by a signal at step 3; the same command goes on from there" in log


def test_a_signal_before_anything_is_trained_leaves_a_folder_to_begin_in(tmp_path, monkeypatch):
    trial = Trial(tmp_path, monkeypatch)
    trial.on_step = lambda step: (send(signal.SIGTERM), time.sleep(1))
    result = trial.train()
    assert (result["end"], result["steps"], trial.saved) == ("stopped", 0, [])
    trial.on_step = lambda step: None
    assert trial.train()["steps"] == 6


def test_a_signal_during_an_evaluation_keeps_the_epoch_and_scores_it_later(tmp_path, monkeypatch):
    trial, released = Trial(tmp_path, monkeypatch), threading.Event()
    trial.on_score = lambda number: (send(signal.SIGTERM), released.wait(60))
    result = trial.train()
    assert (result["end"], result["steps"], trial.saved) == ("stopped", 2, [2])
    assert not (tmp_path / "best_model").exists()
    released.set()
    trial.on_score = lambda number: None
    assert trial.train()["end"] == "finished"
    assert trial.steps == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [2, 4, 6]


def test_listening_hands_on_what_the_work_gives_or_raises():
    with StopSignals() as stop:
        assert stop.listen(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            stop.listen(lambda: 1 / 0)
        threading.Timer(0.1, send, [signal.SIGTERM]).start()
        with pytest.raises(Interrupted):
            stop.listen(lambda: time.sleep(1))
        assert stop.asked(0)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


def run_steps(progress, clock, first, last, seconds):
    for step in range(first, last + 1):
        clock.now += seconds
        progress.update(step, {"loss": 1.0})


def test_the_time_left_begins_after_compiling_and_follows_the_last_steps(monkeypatch, caplog):
    clock, logger = Clock(monkeypatch), logging.getLogger("eta")
    caplog.set_level(logging.INFO, "eta")
    progress = metrics.TrainingProgress(1000, 0, logger, evaluate_every=1000)
    with progress.compiling((64, 64)):
        clock.now += 400
    run_steps(progress, clock, 1, 1, 0.5)
    assert progress._left(1) == ""  # one step has no time of its own yet
    assert caplog.messages[-1] == "step 1/1000  loss 1.000"
    run_steps(progress, clock, 2, 11, 0.5)
    assert progress._left(11) == "0.50 s a step  00:08:14 left"
    with progress.compiling((96, 96)):
        clock.now += 400
    run_steps(progress, clock, 12, 20, 0.5)
    assert progress._left(20) == "0.50 s a step  00:08:10 left"
    run_steps(progress, clock, 21, 20 + progress.WINDOW, 2.0)
    assert progress._left(70) == "2.00 s a step  00:31:00 left"
    assert "compiled the training step for 96 x 96 px in 400 s" in caplog.messages


def test_the_time_left_holds_the_evaluations_to_come(monkeypatch):
    clock = Clock(monkeypatch)
    progress = metrics.TrainingProgress(10, 0, logging.getLogger("eta"), evaluate_every=2)
    run_steps(progress, clock, 1, 2, 1.0)
    with progress.evaluating():
        clock.now += 100
    run_steps(progress, clock, 3, 3, 1.0)
    assert progress._left(3) == "1.00 s a step  00:06:47 left"  # 7 steps and the evaluations of steps 4, 6, 8, 10
    progress = metrics.TrainingProgress(500_000, 0, logging.getLogger("eta"), evaluate_every=500_000)
    run_steps(progress, clock, 1, 2, 0.756)
    assert progress._left(2) == "0.76 s a step  4 d 08:59:58 left"


def test_durations_have_days():
    assert [say_duration(s) for s in (-1, 59.6, 3600, 86399, 86400, 105 * 3600)] == [
        *("00:00:00", "00:01:00", "01:00:00", "23:59:59", "1 d 00:00:00", "4 d 09:00:00")
    ]


def test_a_process_that_compiles_ends_on_sigterm(tmp_path):
    """The real thing: size N without any compiled program takes many seconds to begin."""
    data = write_subset(tmp_path / "data", 4)
    fields = [f"--config.{field}={value}" for field, value in (TINY | {"data.dir": data}).items()]
    command = [sys.executable, "run.py", "train", "--config=quickstart", f"--workdir={tmp_path / 'run'}", *fields]
    options = {"cwd": ROOT, "env": os.environ | {"INSTSEG_COMPILED": ""}, "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        said = ""
        while "compiling the training step" not in said:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said += line
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        said += process.communicate(timeout=60)[0]
    assert time.monotonic() - started < 8
    assert process.returncode == 0, said
    assert "stopped by a signal before the first step; the same command goes on from there" in said
    assert json.loads((tmp_path / "run/train_result.json").read_text())["end"] == "stopped"


def test_log_lines_go_to_what_stdout_is_by_then(tmp_path):
    """A live bar takes the place of sys.stdout, so that lines are printed above it."""
    logger, said = metrics.open_log(tmp_path / "train.log"), io.StringIO()
    with contextlib.redirect_stdout(said):
        logger.info("compiling")
    assert said.getvalue() == "compiling\n"
