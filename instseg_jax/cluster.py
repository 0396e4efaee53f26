"""Commands of ours as tasks of a Ray cluster (extra `ray`), each a process on one of its nodes.

Who runs where and when, and whether more nodes are started, is for Ray to say.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = (sys.executable, "-m", "instseg_jax.cli")
POLL_SECONDS = 0.5
SAVING_SECONDS = 60.0  # that commands have to end, when they are told to


class Cluster(NamedTuple):
    """What there is to run on."""

    ray: Any
    places: int  # commands at a time that it has room for now
    needs: dict[str, float]  # of each command, as Ray names it


class Ended(NamedTuple):
    """A command that has ended."""

    number: int  # its place among the commands
    code: int  # not 0: it failed
    error: str  # the last line that it said of that


def join_ray(address: str | None) -> Cluster:
    """Connect to the cluster at an address; None: that of $RAY_ADDRESS or of this machine, which is begun if need be.

    A command takes a GPU where the cluster has some, else a core. Raises ImportError without Ray, ConnectionError
    where there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report them over the network
    try:
        import ray
    except ImportError as error:
        raise ImportError('--engine=ray needs Ray: pip install "instseg_jax[ray]"') from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    present = ray.cluster_resources()
    kind = "GPU" if present.get("GPU") else "CPU"
    return Cluster(ray, max(1, int(present.get(kind, 1))), {f"num_{kind.lower()}s": 1})


def run_commands(
    cluster: Cluster, commands: Sequence[Sequence[str]], *, at_once: int | None = None, wait: Callable[[], None]
) -> Iterator[Ended]:
    """Run commands, given without the program's name; yield each as it ends.

    At most `at_once` go on at a time (None: as many as Ray has room for). The nodes have this package, in a Python at
    the same path, and see our current folder. `wait` is called about twice a second. What still goes on when the caller
    stops asking is told to save and end.
    """
    ray = cluster.ray
    # A node that is lost takes no command along: it runs again on another one.
    task = ray.remote(**cluster.needs, max_retries=3)(_run)
    waiting = list(enumerate(commands))[::-1]
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and (at_once is None or len(running) < at_once):
                number, command = waiting.pop()
                running[task.remote([*PROGRAM, *command], Path.cwd())] = number
            for reference in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                number = running.pop(reference)
                try:
                    yield Ended(number, *ray.get(reference))
                except ray.exceptions.RayError as error:  # its worker or node was lost too often
                    yield Ended(number, 1, " ".join(str(error).split()))
            wait()
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=SAVING_SECONDS)


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """In a task: a command as a process; its exit code and the last line of its errors."""
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, stdin=null, stdout=null, stderr=pipe, text=True)
    try:
        errors = process.communicate()[1]
    except BaseException:  # Ray cancels a task by an interrupt
        process.terminate()
        process.wait()
        raise
    return process.returncode, (errors.strip().splitlines() or [""])[-1]
