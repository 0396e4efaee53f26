"""`sweep --search=optuna` around a stand-in of a training: trials, sharing, going on, giving up."""

import csv
import json
import os
import subprocess
import sys

import pytest
from places import HELPERS, ROOT
from tiny_runs import write_subset

optuna = pytest.importorskip("optuna")

from instseg_jax.cli import main  # noqa: E402
from instseg_jax.sweeps import launch  # noqa: E402
from instseg_jax.sweeps.search import open_search  # noqa: E402
from instseg_jax.sweeps.state import lock  # noqa: E402

STAND_IN = (sys.executable, str(HELPERS / "sweep_run.py"))
CONFIG = """
import quickstart

def get_config():
    return quickstart.get_config()

def search(space):
"""
SPACE = """
    space.float("optimizer.learning_rate", 1e-4, 1e-2, log=True)
    space.choice("optimizer.schedule", ("constant", "cosine"))
    space.int("model.num_queries", 20, 60)
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAM", STAND_IN)
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.05)
    monkeypatch.syspath_prepend(str(ROOT / "configs"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "configs")]))


def command(folder, *more, space=SPACE, trials=3):
    config = folder / "mine.py"
    config.write_text(CONFIG + space)
    data = folder / "data"
    if not data.is_dir():
        write_subset(data, 4)
    options = [f"--config={config}", f"--config.data.dir={data}", f"--workdir={folder / 'out'}"]
    return ["sweep", *options, "--search=optuna", f"--trials={trials}", *more]


def rows(folder):
    return list(csv.DictReader((folder / "out" / "search.csv").open()))


def test_trials_are_runs_and_more_of_them_go_on(tmp_path, capsys):
    assert main(command(tmp_path, trials=3)) == 0
    first = rows(tmp_path)
    assert [row["state"] for row in first] == ["COMPLETE"] * 3
    for row in first:  # the stand-in's score
        assert float(row["segm/AP"]) == pytest.approx(100 * float(row["optimizer.learning_rate"]))
        fields = json.loads((tmp_path / "out" / f"trial={int(row['trial']):04d}" / "config.json").read_text())
        assert fields["optimizer"]["learning_rate"] == float(row["optimizer.learning_rate"])
        assert fields["model"]["num_queries"] == int(row["model.num_queries"])
        assert fields["optimizer"]["schedule"] == row["optimizer.schedule"]
    capsys.readouterr()
    assert main(command(tmp_path, trials=3)) == 0
    assert rows(tmp_path) == first and "trial=0003" not in capsys.readouterr().out
    assert main(command(tmp_path, "--jobs=2", trials=5)) == 0
    assert rows(tmp_path)[:3] == first and len(rows(tmp_path)) == 5
    said = capsys.readouterr().out
    best = max(rows(tmp_path), key=lambda row: float(row["segm/AP"]))
    assert f"Best: trial={int(best['trial']):04d}" in said
    assert f"--config.optimizer.learning_rate={best['optimizer.learning_rate']}" in said
    assert "PED-ANOVA" in said and (tmp_path / "out" / "search.png").stat().st_size > 5000


def test_what_was_killed_goes_on_as_the_same_trial(tmp_path):
    spec = command(tmp_path)[1].removeprefix("--config=")
    overrides = {"data.dir": str(tmp_path / "data")}
    search = open_search(spec, overrides, tmp_path / "out", num_trials=3, is_pruning=False)
    killed = search.begin()  # and nobody ends it
    assert killed.name == "trial=0000"
    assert main(command(tmp_path)) == 0
    found = rows(tmp_path)
    assert [row["state"] for row in found] == ["COMPLETE"] * 3
    assert found[0]["optimizer.learning_rate"] == killed.overrides["optimizer.learning_rate"]
    for row in found:
        starts = (tmp_path / "out" / f"trial={int(row['trial']):04d}" / "starts.txt").read_text()
        assert len(starts.splitlines()) == 1


def test_a_process_that_was_killed_while_it_proposed_ends_nothing(tmp_path):
    spec = command(tmp_path)[1].removeprefix("--config=")
    overrides, out = {"data.dir": str(tmp_path / "data")}, tmp_path / "out"
    search = open_search(spec, overrides, out, num_trials=3, is_pruning=False)
    some = dict(list(search.space.distributions.items())[:1])
    search.study.ask(fixed_distributions=some)
    assert main(command(tmp_path)) == 0
    found = rows(tmp_path)
    assert [row["state"] for row in found] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert main(command(undisturbed)) == 0
    for row, wanted in zip(found[1:], rows(undisturbed), strict=True):
        assert {name: row[name] for name in search.space.distributions} == {
            name: wanted[name] for name in search.space.distributions
        }


def test_processes_that_propose_in_turn_never_propose_the_same(tmp_path):
    """Two that open the study at the same moment know the same trials and have the same seed."""
    spec = command(tmp_path)[1].removeprefix("--config=")
    overrides, out = {"data.dir": str(tmp_path / "data")}, tmp_path / "out"
    both = [open_search(spec, overrides, out, num_trials=12, is_pruning=False) for _ in range(2)]
    runs, held = [], []
    for number in range(12):
        run = both[number % 2].begin()
        assert run.name == f"trial={number:04d}"
        folder = out / run.name
        folder.mkdir()
        held.append(lock(folder))  # it trains
        runs.append(tuple(run.overrides[field] for field in both[0].space.distributions))
    assert len(set(runs)) == 12 and both[0].begin() is None
    for descriptor in held:
        os.close(descriptor)


def test_a_run_that_breaks_is_a_failed_trial(tmp_path):
    space = '\n    space.choice("train.epochs", (13, 3))\n'
    assert main(command(tmp_path, space=space, trials=8)) == 0
    states = {row["train.epochs"]: row["state"] for row in rows(tmp_path)}
    assert states == {"13": "FAIL", "3": "COMPLETE"}


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path):
    code = f"from instseg_jax.sweeps import launch; launch.PROGRAM = {STAND_IN!r}\n"
    code += f"from instseg_jax.cli import main; raise SystemExit(main({command(tmp_path, trials=8)!r}))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "configs")])
    environment = os.environ | {"PYTHONPATH": path}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("trial=" in text for text in said)
    search = open_search(
        command(tmp_path)[1].removeprefix("--config="), {}, tmp_path / "out", num_trials=8, is_pruning=False
    )
    trials = search.study.get_trials()
    assert len(trials) == 8 and all(trial.state.name == "COMPLETE" for trial in trials)
    for trial in trials:
        starts = (tmp_path / "out" / f"trial={trial.number:04d}" / "starts.txt").read_text()
        assert len(starts.splitlines()) == 1


@pytest.mark.slow
def test_runs_that_promise_little_are_given_up(tmp_path):
    space = '\n    space.choice("optimizer.learning_rate", (1e-2, 1e-5))\n'
    more = ("--prune", "--config.train.epochs=18", "--config.eval.every_epochs=2")
    assert main(command(tmp_path, *more, space=space, trials=14)) == 0
    found = rows(tmp_path)
    given_up = [row for row in found if row["state"] == "PRUNED"]
    assert given_up and all(float(row["optimizer.learning_rate"]) == 1e-5 for row in given_up)
    assert all(int(row["evaluations"]) < 9 for row in given_up)
    assert max(float(row["segm/AP"]) for row in found if row["segm/AP"]) == pytest.approx(9e-2)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("\n    pass\n", "names no field"),
        ('\n    space.int("model.num_querys", 1, 2)\n', "num_querys"),
        ('\n    space.int("train.epochs", 1, 2)\n    space.int("train.epochs", 1, 3)\n', "names 'train.epochs' twice"),
        ('\n    space.float("train.epochs", 0.5, 2)\n', "train.epochs"),
    ],
)
def test_a_space_that_can_not_be_is_told_before_anything_starts(tmp_path, capsys, space, message):
    assert main(command(tmp_path, space=space)) != 0
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "study.log").exists()


def test_another_space_needs_another_folder(tmp_path, capsys):
    assert main(command(tmp_path, trials=1)) == 0
    assert main(command(tmp_path, trials=2, space='\n    space.int("model.num_queries", 5, 6)\n')) != 0
    assert "holds a search of another space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"), [(["--axis=seed=1,2"], "--search proposes"), (["--trials=0"], "--trials is 0")]
)
def test_options_that_do_not_go_together(tmp_path, capsys, more, message):
    assert main(command(tmp_path, *more)) != 0
    assert message in capsys.readouterr().err
