"""The verb `sweep`: processes, what breaks, what is skipped, the tables. Most tests stand in for training."""

import csv
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from places import HELPERS, ROOT
from tiny_runs import QUICK_COMPILATION, TINY, write_subset

from instseg_jax.cli import main
from instseg_jax.config import load_config
from instseg_jax.sweeps import launch, state, tables
from instseg_jax.sweeps.plan import build_plan
from instseg_jax.verbs.sweep import _folds

STAND_IN = (sys.executable, str(HELPERS / "sweep_run.py"))
RATES = "--axis=optimizer.learning_rate=1e-3,3e-3"


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Call the verb with the stand-in; returns the exit code and what it printed."""
    monkeypatch.setattr(launch, "PROGRAM", STAND_IN)
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")

    def call(*arguments: str, folder: str = "sweep") -> tuple[int, str]:
        workdir = f"--workdir={tmp_path / folder}"
        code = main(["sweep", "--config=configs/quickstart.py", workdir, *arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def starts(folder: pathlib.Path) -> list[str]:
    return (folder / "starts.txt").read_text().splitlines()


def test_two_tables_with_mean_and_spread(sweep, tmp_path):
    code, said = sweep(
        RATES,
        "--axis=train.epochs=20,30",
        "--config.optimizer.learning_rate=1e-3",
        "--config.train.epochs=30",
        "--seeds=3",
    )
    assert code == 0
    folder = tmp_path / "sweep"
    text = (folder / "sweep.md").read_text()
    # segm/AP is 100 * rate + 0.01 * seed: 0.1, 0.11, 0.12 and 0.3, 0.31, 0.32; AP50 twice that.
    assert "| 1e-3 | 0.220 ± 0.020 | 0.110 ± 0.010 | 3 of 3 |" in text
    assert "| **3e-3** | **0.620 ± 0.020** | **0.310 ± 0.010** | 3 of 3 |" in text
    assert "| 20 | 0.220 ± 0.020 | 0.110 ± 0.010 | 3 of 3 |" in text
    assert "| 30 | 0.220 ± 0.020 | 0.110 ± 0.010 | 3 of 3 |" in text
    assert "## optimizer.learning_rate" in text and "## train.epochs" in text
    assert "9 of 9 runs finished" in text and text in said
    table = list(csv.DictReader(io.StringIO((folder / "sweep.csv").read_text())))
    assert [(row["table"], row["value"]) for row in table] == [
        ("optimizer.learning_rate", "1e-3"),
        ("optimizer.learning_rate", "3e-3"),
        ("train.epochs", "20"),
        ("train.epochs", "30"),
    ]
    numbers = [float(table[1][f"segm/AP {what}"]) for what in ("mean", "std", "min", "max")]
    assert numbers == pytest.approx([0.31, 0.01, 0.30, 0.32])
    assert table[1]["bbox/AP mean"] == "" and (table[1]["runs"], table[1]["finished"]) == ("3", "3")
    runs = list(csv.DictReader(io.StringIO((folder / "sweep_runs.csv").read_text())))
    assert (
        len(runs) == 9 and runs[-1]["run"] == "epochs=20,seed=2" and float(runs[-1]["segm/AP"]) == pytest.approx(0.12)
    )
    picture = Image.open(folder / "sweep.png").convert("RGB")
    assert len(picture.getcolors(1 << 20)) > 50 and picture.width > picture.height
    assert starts(folder / "base,seed=1") == ["auto"]


def test_the_winner_is_a_config_and_a_command(sweep, tmp_path):
    sweep(RATES, "--config.train.epochs=20", "--config.seed=4", "--seeds=2")
    best = load_config(str(tmp_path / "sweep" / "sweep_best.py"))
    fields = {"optimizer.learning_rate": "3e-3", "train.epochs": "20", "seed": "4"}
    assert best == load_config("configs/quickstart.py", fields)
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    command = re.search(r"instseg train .*", text).group()
    assert "--config.optimizer.learning_rate=3e-3" in command and "--config.train.epochs=20" in command
    assert "learning_rate=0.003,seed=5`" in text  # the better of its two runs has the weights


def test_finished_runs_are_skipped_and_broken_ones_are_told_and_tried_again(sweep, tmp_path):
    arguments = ("--axis=train.epochs=20,13,14,15,30",)
    code, said = sweep(*arguments)
    assert code == 1
    assert "2 of 5 runs finished, 3 failed" in said
    assert "- epochs=13,seed=0: RuntimeError: losses are not finite" in said
    assert "- epochs=14,seed=0: Killed: the process was ended by SIGKILL" in said
    assert "- epochs=15,seed=0: Exit: the process ended with code 1; it said: error: there is no such folder" in said
    folder = tmp_path / "sweep"
    assert "| 13 | - | - | 0 of 1 |" in said
    for epochs in (13, 14, 15):
        result = json.loads((folder / f"epochs={epochs},seed=0" / "train_result.json").read_text())
        assert result["done_flag"] is False and result["err_msg"]
    code, said = sweep(*arguments)
    assert code == 1 and "2 are finished already" in said
    counts = [len(starts(folder / f"epochs={epochs},seed=0")) for epochs in (20, 13, 14, 15, 30)]
    assert counts == [1, 2, 2, 2, 1]


def test_the_table_can_be_made_before_the_end(sweep, tmp_path):
    code, said = sweep(RATES, "--sweep_table")
    assert code == 1 and "0 of 2 runs finished, 2 waiting" in said
    assert not (tmp_path / "sweep" / "sweep_best.py").exists()
    assert sweep(RATES, "--sweep_index=0")[0] == 0
    code, said = sweep(RATES, "--sweep_table")
    assert code == 1 and "1 of 2 runs finished, 1 waiting" in said
    assert "| **1e-3** | **0.200** | **0.100** | 1 of 1 |" in said and "| 3e-3 | - | - | 0 of 1 |" in said


def test_an_array_job_runs_one_of_the_list(sweep, tmp_path):
    code, said = sweep(RATES, "--seeds=2", "--sweep_list")
    assert code == 0 and not (tmp_path / "sweep").exists()
    listed = re.findall(r"^ *(\d+)  (\w+) +(\S+)$", said, re.MULTILINE)
    assert listed[2:] == [("2", "waiting", "base,seed=1"), ("3", "waiting", "learning_rate=0.003,seed=1")]
    assert said.count("instseg train --config=configs/quickstart.py") == 4
    code, said = sweep(RATES, "--seeds=2", "--sweep_index=3")
    assert code == 0
    assert [p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()] == ["learning_rate=0.003,seed=1"]
    code, said = sweep(RATES, "--seeds=2", "--sweep_index=4")
    assert code == 1 and "--sweep_index is 4, it must be from 0 to 3" in said


def test_a_folder_of_another_config_is_refused_before_anything_starts(sweep, tmp_path):
    assert sweep(RATES)[0] == 0
    code, said = sweep(RATES, "--axis=train.epochs=20,40", "--config.model.num_queries=9")
    assert code == 1 and "base,seed=0 holds a run with another config (model.num_queries was 50, is 9)" in said
    assert not (tmp_path / "sweep" / "epochs=20,seed=0").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--axis=train.epochs=20,20",), "appears twice"),
        (("--axis=train.epochs=20,30", "--config.data.dir="), "data.dir is empty"),
        (("--axis=train.epochs=20,30", "--config.data.dir=/no/such"), "There is no data set folder '/no/such'"),
        (("--axis=model.num_decoder_layers=1,0",), "num_decoder_layers"),
        (("--axis=train.epochs=20,30", "--jobs=0"), "--jobs is 0"),
        (("--axis=train.epochs=20,30", "--jobs=2", "--config.device=toaster"), "device is 'toaster'"),
        (("--axis=train.epochs=20,30", "--mode=all"), "one_at_a_time"),
        ((), "there is nothing to vary"),
    ],
)
def test_what_can_be_known_is_said_before_anything_starts(sweep, tmp_path, arguments, message):
    code, said = sweep(*arguments)
    assert code == 1 and message in said and said.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_several_at_a_time_have_a_device_each(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "list_devices", lambda device: ["cpu:0", "cpu:1", "cpu:2"])
    code, _ = sweep("--axis=train.epochs=20,30,40,60", "--jobs=2")
    assert code == 0
    used = [starts(tmp_path / "sweep" / f"epochs={n},seed=0")[0] for n in (20, 30, 40, 60)]
    assert used[:2] == ["cpu:0", "cpu:1"] and set(used[2:]) <= {"cpu:0", "cpu:1"}
    code, said = sweep("--axis=train.epochs=70,80", "--jobs=4")
    assert code == 1 and "--jobs is 4, but config.device=auto has 3: cpu:0, cpu:1, cpu:2" in said


def test_a_run_that_another_process_has_finished_meanwhile_is_not_begun_again(sweep, tmp_path, monkeypatch):
    lock_patiently = launch._lock_patiently

    def lock_late(folder):
        descriptor = lock_patiently(folder)
        result = {"done_flag": True, "steps": 30, "seconds": 6.0, "best_metric": "segm/AP"}
        (folder / "train_result.json").write_text(json.dumps(result))
        return descriptor

    monkeypatch.setattr(launch, "_lock_patiently", lock_late)
    assert sweep(RATES)[0] == 0
    assert not list(tmp_path.rglob("starts.txt")) and len(list(tmp_path.rglob("train_result.json"))) == 2


def test_one_cpu_is_shared(monkeypatch):
    monkeypatch.setattr(launch, "list_devices", lambda device: ["cpu:0"])
    assert launch.assign_devices("auto", 3) == [None, None, None]
    monkeypatch.setattr(launch, "list_devices", lambda device: ["gpu:0"])
    with pytest.raises(ValueError, match="has 1: gpu:0"):
        launch.assign_devices("auto", 3)
    assert launch.assign_devices("gpu:0,1", 1) == [None]  # in turn: a run may use all that the config names


def test_devices_are_looked_for_in_another_process(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert launch.list_devices("cpu:0,2") == ["cpu:0", "cpu:2"]
    with pytest.raises(ValueError, match=r"^device is 'cpu:7'; each index once"):
        launch.list_devices("cpu:7")


@pytest.mark.slow
def test_an_interruption_saves_the_runs_and_the_next_call_goes_on(tmp_path):
    """SIGINT to the sweep alone: it hands SIGTERM on, starts nothing more, and tells how far it got."""
    code = (
        f"from instseg_jax.sweeps import launch; launch.PROGRAM = {STAND_IN!r}\n"
        "from instseg_jax.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["sweep", "--config=configs/quickstart.py", "--axis=train.epochs=16,20", f"--workdir={tmp_path}"]
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    run = tmp_path / "epochs=16,seed=0"
    deadline = time.monotonic() + 120
    while not (run / "ready.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state.read_state(run).status == "running"
    assert state.read_state(run).epoch == 3.5
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert "another process trains in this folder" in other.stdout  # a second sweep does not disturb the first
    assert len(starts(run)) == 1 and len(starts(tmp_path / "epochs=20,seed=0")) == 1
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "1 of 2 runs finished, 1 stopped" in said
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert again.returncode == 0 and "2 of 2 runs finished" in again.stdout
    assert len(starts(run)) == 2


def test_scores_are_those_of_the_best_evaluation(tmp_path):
    rows = [{"step": 1, "segm/AP": 0.2, "segm/AP50": 0.9}, {"step": 2, "segm/AP": 0.3, "segm/AP50": 0.5}]
    rows += [{"step": 3, "segm/AP": 0.3, "segm/AP50": 0.6}, {"step": 4, "segm/AP": None, "segm/AP50": None}]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "se')
    assert state.read_scores(tmp_path, "segm/AP")["segm/AP50"] == 0.6
    assert state.read_scores(tmp_path, "segm/AP50")["segm/AP"] == 0.2


def test_summaries():
    assert str(tables.summarise([])) == str(tables.summarise([None])) == "-"
    assert str(tables.summarise([0.25, None])) == "0.250"
    assert str(tables.summarise([0.1, 0.3])) == "0.200 ± 0.141"  # sqrt(2) / 10


def test_the_last_row_is_found_without_reading_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert state.last_row(path) == {}
    row = json.dumps({"step": 1, "filler": "x" * 3000})
    path.write_text("".join(f"{row}\n" for _ in range(5)) + '{"step": 2}\n{"step": 3')
    assert state.last_row(path) == {"step": 2}
    path.write_text('{"step": 3')
    assert state.last_row(path) == {}


@pytest.mark.slow
def test_two_real_runs(tmp_path):
    """Trains two tiny networks with the real command, in a folder that run.py does not lie in."""
    data = write_subset(tmp_path / "data", 4)
    fields = [f"--config.{field}={value}" for field, value in TINY.items()]
    arguments = ["--axis=loss.num_points=64,32", "--config=configs/quickstart.py", f"--config.data.dir={data}", *fields]
    environment = os.environ | {"XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": ""}
    command = [sys.executable, str(ROOT / "run.py"), "sweep", *arguments, "--workdir=sweep"]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, **options, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs finished" in done.stdout and "loss.num_points" in done.stdout
    folders = [tmp_path / "sweep" / name for name in ("base,seed=0", "num_points=32,seed=0")]
    losses = []
    for folder in folders:
        assert json.loads((folder / "train_result.json").read_text())["steps"] == 4
        assert (folder / "best_model").is_dir()
        losses.append(state.last_row(folder / "metrics.jsonl")["loss"])
    assert losses[0] != losses[1]
    again = subprocess.run(command, **options, timeout=300)
    assert again.returncode == 0 and "2 are finished already" in again.stdout
    # The winner's file is the config of the winner's run: that folder refuses any other one.
    winner = re.search(r"best weights are in `(.*?)`", again.stdout).group(1)
    resume = [sys.executable, str(ROOT / "run.py"), "train", "--config=sweep/sweep_best.py", f"--workdir={winner}"]
    resumed = subprocess.run(resume, **options, timeout=300)
    assert resumed.returncode == 0 and "4 of 4 steps" in resumed.stdout, resumed.stderr


def test_folds_are_runs_of_every_variant():
    plan = build_plan("configs/finetune.py:n", {"data.dir": "maps"}, [], folds=_folds(3))
    assert [run.name for run in plan.runs] == [f"base,fold={number},seed=0" for number in (1, 2, 3)]
    assert plan.runs[1].config.data.train_annotations == "annotations/instance_fold2_train.json"
    assert plan.runs[1].config.data.val_annotations == "annotations/instance_fold2_val.json"
    states = {run.name: state.State("waiting") for run in plan.runs}
    text = tables.to_markdown(plan, states, None, pathlib.Path("runs"))
    assert "mean ± sample standard deviation over 3 folds" in text
    axes = build_plan("configs/finetune.py:n", {}, ["train.epochs=1,2"], folds=_folds(2), num_seeds=2)
    assert len(axes.runs) == 2 * 2 * 2 and len({run.name for run in axes.runs}) == 8
