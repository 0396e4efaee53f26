"""A thousand `kill -9` at random moments of train, sweep, predict and serve: nothing is half, lost or changed.

`INSTSEG_KILLS=30 pytest -s -m slow tests/test_random_kills.py` takes a part of them: minutes instead of an hour.
Commands begin with all modules imported, so that kills strike their work.
"""

import http.client
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import cv2
import pytest
from fork_commands import Command, Commands
from places import ROOT
from tiny_runs import QUICK_COMPILATION, TINY, write_subset

from instseg_jax.training.workdir import read_rows
from instseg_jax.weights import checkpoint

KILLS = int(os.environ.get("INSTSEG_KILLS", "1000"))
SHARES = {"train": 0.15, "sweep": 0.05, "predict": 0.4, "serve": 0.4}  # a training takes longest
EPOCHS = 8  # of two steps
SECONDS = 900


class Runs:
    """Commands on one small data set, and how long each takes undisturbed."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.data = folder, write_subset(folder / "data", 4)
        self.whole = folder / "whole"  # a training that was never disturbed
        self.seconds: dict[str, float] = {}
        environment = os.environ | {"XLA_FLAGS": QUICK_COMPILATION, "INSTSEG_HUGE_PAGES": "0", "PYTHONUNBUFFERED": "1"}
        environment.setdefault("INSTSEG_COMPILED", str(self.folder / "compiled"))
        self.commands = Commands(ROOT, environment)

    def arguments(self, verb: str, workdir: pathlib.Path) -> list[str]:
        fields = TINY | {"data.dir": self.data, "train.epochs": EPOCHS, "checkpoint.every_steps": 1}
        fields |= {"eval.every_epochs": 4, "eval.best_metric": "bbox/AR_100"}
        overrides = [f"--config.{name}={value}" for name, value in fields.items()]
        config, here = "--config=configs/quickstart.py", f"--workdir={workdir}"
        weights = f"--weights={self.whole}"
        return {
            "train": ["train", config, here, *overrides],
            "sweep": ["sweep", config, here, *overrides, "--axis=optimizer.learning_rate=1e-4,2e-4"],
            "predict": ["predict", weights, f"--input={self.data}/images", f"--save_path={workdir}", "--threshold=0"],
            "serve": ["serve", weights, "--port=0"],
        }[verb]

    def start(self, verb: str, workdir: pathlib.Path) -> Command:
        return self.commands.start(self.arguments(verb, workdir), self.folder / f"{verb}.log")

    def finish(self, verb: str, workdir: pathlib.Path) -> None:
        """Run a verb to its end; a server answers once and is then asked to end."""
        started, process = time.monotonic(), self.start(verb, workdir)
        try:
            if verb == "serve":
                port = self.wait_for_port(process)
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("GET", "/health")
                assert connection.getresponse().status == 200
                os.kill(process.pid, signal.SIGTERM)
            assert process.wait(SECONDS) == 0, self.said(process)
        finally:
            process.kill()
        self.seconds[verb] = time.monotonic() - started

    def wait_for_port(self, process: Command) -> int:
        deadline = time.monotonic() + SECONDS
        while "ready after" not in (text := self.said(process)):
            assert process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.1)
        return int(text.split("127.0.0.1:")[1].split("/")[0])

    def said(self, process: Command) -> str:
        return process.log.read_text()[-3000:]


def check_whole(folder: pathlib.Path) -> int:
    """Every file that has its name is whole; returns how many there are."""
    count = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".jpg", ".png"):
            assert cv2.imread(str(path)) is not None, path
        count += 1
    return count


def check_training(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """A training ended as the one that was never disturbed: every row, the scores, and the best weights."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        mine, its = ([row | {"seconds": 0} for row in read_rows(folder / name)] for folder in (workdir, whole))
        assert len(its) > 1 and mine == its, name
    found, wanted = (json.loads((folder / "train_result.json").read_text()) for folder in (workdir, whole))
    assert found["done_flag"] and found["best_score"] == wanted["best_score"]
    assert checkpoint.read_metadata(workdir)["step"] == checkpoint.read_metadata(whole)["step"]


@pytest.mark.slow
def test_nothing_is_lost_by_kills(tmp_path):
    pytest.importorskip("fastapi")
    runs, numbers = Runs(tmp_path), random.Random(0)
    runs.finish("train", runs.whole)  # compiles: how long one takes is measured with the next
    killed = dict.fromkeys(SHARES, 0)
    finished = dict.fromkeys(SHARES, 0)
    for verb, share in SHARES.items():
        workdir = tmp_path / f"{verb}-killed"
        runs.finish(verb, tmp_path / f"{verb}-once")
        wanted = max(1, round(KILLS * share))
        while killed[verb] < wanted:
            process = runs.start(verb, workdir)
            try:
                process.wait(numbers.uniform(0, runs.seconds[verb]))
            except subprocess.TimeoutExpired:
                killed[verb] += 1
            else:
                assert verb != "serve" and process.returncode == 0, runs.said(process)
                finished[verb] += 1
            process.kill()
            if verb == "predict":
                check_whole(workdir)
            if process.returncode == 0:  # the next one begins anew
                if verb == "train":
                    check_training(workdir, runs.whole)
                shutil.rmtree(workdir)
        runs.finish(verb, workdir)
        if verb == "train":
            check_training(workdir, runs.whole)
        if verb == "predict":
            assert check_whole(workdir) == check_whole(tmp_path / "predict-once") > 4
        if verb == "sweep":
            for table in (workdir, tmp_path / "sweep-once"):
                results = [json.loads(path.read_text()) for path in table.rglob("train_result.json")]
                assert len(results) == 2 and all(result["done_flag"] for result in results)
            scores = [
                sorted(json.loads(path.read_text())["best_score"] for path in folder.rglob("train_result.json"))
                for folder in (workdir, tmp_path / "sweep-once")
            ]
            assert scores[0] == scores[1]
        print(f"\n{verb}: {killed[verb]} kills survived, {finished[verb]} runs ended before theirs", flush=True)
    runs.commands.close()
    assert sum(killed.values()) >= min(KILLS, len(SHARES))
