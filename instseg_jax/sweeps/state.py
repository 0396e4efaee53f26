"""How far a run of a sweep is, and how good it was, told by the files in its folder."""

import dataclasses
import json
import os
from pathlib import Path

from instseg_jax.files import read_json
from instseg_jax.training.workdir import METRICS, RESULT, VALIDATION, read_rows

SCORES = ("segm/AP50", "segm/AP", "bbox/AP50", "bbox/AP")
LOCK = "running.lock"  # held by the process that trains in the folder, and by nobody once it has ended
TAIL = 8192  # bytes at the end of metrics.jsonl, in which its last row is looked for


@dataclasses.dataclass(frozen=True)
class State:
    """How far a run is and, once it is finished, how good."""

    status: str  # finished, failed, stopped, running, waiting
    reason: str = ""  # of a failed run
    scores: dict[str, float | None] = dataclasses.field(default_factory=dict)  # of the best evaluation; 0..1
    steps: int = 0
    epoch: float = 0.0
    seconds: float | None = None  # of training; of a run that was resumed, since then


def read_state(folder: Path) -> State:
    """The state of the run in a folder, which need not exist yet."""
    if is_locked(folder):
        row = last_row(folder / METRICS)
        return State("running", steps=int(row.get("step", -1)) + 1, epoch=row.get("epoch", 0.0))
    return read_ended(folder)


def read_ended(folder: Path) -> State:
    """The state of a run that does not go on, or that this process holds the lock of."""
    if not (folder / RESULT).is_file():
        row = last_row(folder / METRICS)
        if not row:
            return State("waiting")
        return State("stopped", steps=int(row["step"]) + 1, epoch=row.get("epoch", 0.0))
    result = read_json(folder / RESULT)
    if "err_msg" in result:
        return State("failed", reason=f"{result['err_type']}: {' '.join(str(result['err_msg']).split())}")
    steps, seconds = result["steps"], result["seconds"]
    if not result["done_flag"]:
        return State("stopped", steps=steps, epoch=last_row(folder / METRICS).get("epoch", 0.0))
    return State("finished", "", read_scores(folder, result["best_metric"]), steps, seconds=seconds)


def read_scores(folder: Path, best_metric: str) -> dict[str, float | None]:
    """The scores of the evaluation whose weights are the best model: the last of the best ones."""
    rows = read_rows(folder / VALIDATION)
    scored = [row for row in rows if row.get(best_metric) is not None]
    if not rows:
        return {}
    row = max(reversed(scored), key=lambda row: row[best_metric]) if scored else rows[-1]
    return {name: row.get(name) for name in (best_metric, *SCORES)}


def last_row(path: Path) -> dict:
    """The last whole row of a file of JSON lines, {} where there is none; reads the end of the file alone."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().split(b"\n")[:-1]  # after the last line break nothing is whole
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:  # the first piece may begin in the middle of a row
            continue
    return {}


def lock(folder: Path) -> int | None:
    """Take the folder for one process; returns a file descriptor for the process to inherit, None without locks.

    The lock is gone when every process that has the descriptor has closed it or ended, however it ended.

    Raises: BlockingIOError when somebody holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def is_locked(folder: Path) -> bool:
    """Whether a run goes on in the folder."""
    if not (folder / LOCK).is_file():
        return False
    try:
        descriptor = lock(folder)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False
