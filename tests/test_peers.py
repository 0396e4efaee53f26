"""Several processes: whoever is lost is said in seconds, without stacks; a signal to one stops all; latecomers."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from places import HELPERS, ROOT

from instseg_jax import peers
from instseg_jax.training.signals import StopSignals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals and pipes to inherit")


def start(folder: pathlib.Path, port: int, process: int, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(HELPERS / "one_of_several.py"), str(folder / "train_result.json")]
    command += [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={process}", *more]
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def pair(tmp_path):
    """Two processes that work together, by now in their loop."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(tmp_path, port, i) for i in (0, 1)]
    for process in processes:
        assert any("step 3" in line for line in process.stdout), process.stderr.read()[-2000:]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_lost_is_said_in_seconds(pair, tmp_path, victim):
    survivor, started = pair[1 - victim], time.monotonic()
    pair[victim].kill()
    _, errors = survivor.communicate(timeout=60)
    assert survivor.returncode == 1 and time.monotonic() - started < 30
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f"process {victim}" in said[0] and "was lost; the same command goes on" in said[0]
    for stack in ("@     0x", "Check failure", "Terminating process", "Traceback"):
        assert stack not in errors, errors
    result = json.loads((tmp_path / "train_result.json").read_text())
    assert result["done_flag"] is False and f"error: {result['err_msg']}" == said[0]


def test_a_signal_to_one_stops_all_to_be_started_again(pair, tmp_path):
    pair[1].send_signal(signal.SIGUSR1)
    for process in pair:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == peers.REQUEUE == 75, errors
        assert "error" not in errors
    assert not (tmp_path / "train_result.json").exists()


def test_who_works_ends_with_who_stands_by(pair):
    line = next(line for line in pair[1].stdout if "pid" in line)
    pid = int(line.split()[-1])
    assert pid != pair[1].pid
    pair[1].kill()
    for _ in range(100):
        if not pathlib.Path(f"/proc/{pid}").exists() or "zombie" in pathlib.Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it works on alone")


def test_others_that_do_not_come_are_waited_for_again(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = start(tmp_path, port, 1, "--initialization_timeout=1", "--initialization_tries=2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "the other processes did not come in time; try 2 of 2" in errors
    assert errors.splitlines()[-1].startswith("error: ") and "@     0x" not in errors


def test_who_is_one_of_several_is_stood_by(monkeypatch):
    monkeypatch.delenv(peers.SWITCH, raising=False)
    assert peers.is_wanted(["train", "--coordinator=a:1"]) and peers.is_wanted(["train", "--distributed"])
    assert not peers.is_wanted(["train", "--config.data.dir=a"])
    monkeypatch.setenv(peers.SWITCH, "5")
    assert not peers.is_wanted(["train", "--distributed"])


@pytest.mark.parametrize(("number", "is_requeue"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_signals_to_one_alone(number, is_requeue):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.asked(1)
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        deadline = time.monotonic() + 10
        while not stop.asked(1) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.asked(1) and stop.is_to_be_requeued() == is_requeue
        if is_requeue:
            os.kill(os.getpid(), number)  # a second one changes nothing
    assert signal.getsignal(number) == before
