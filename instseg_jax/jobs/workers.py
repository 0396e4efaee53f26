"""Who computes which part: leases in the job's folder, and nothing else that workers know of each other.

A lease is a file that only one can make; its holder touches it while it lives. Two workers that compute one part all
the same write the same file, so a lease saves work and decides nothing.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from instseg_jax.files import write_bytes
from instseg_jax.jobs.parts import read_failures
from instseg_jax.jobs.plan import Part, Plan

PARTS, LEASES = "parts", "leases"
LEASE_SECONDS = 120.0  # without a touch, and a lease is nobody's
TOUCHES = 6  # in that time
POLL_SECONDS = 0.5


def part_file(job: Path, number: int) -> Path:
    """The file of a part."""
    return job / PARTS / f"{number:07d}.npz"


def finished_parts(job: Path) -> set[int]:
    """Numbers of the parts that are there."""
    with contextlib.suppress(FileNotFoundError), os.scandir(job / PARTS) as entries:
        names = [entry.name for entry in entries]
        return {int(name[:-4]) for name in names if name.endswith(".npz") and name[:-4].isdigit()}
    return set()


def missing_parts(job: Path, plan: Plan) -> list[Part]:
    """The parts that are not there, in order."""
    done = finished_parts(job)
    return [part for part in plan.parts if part.number not in done]


def failed_parts(job: Path, plan: Plan) -> dict[int, tuple[int, int]]:
    """The parts in which something failed, and which file each is: another one is a newer try."""
    found = {}
    for number in sorted(finished_parts(job)):
        path = part_file(job, number)
        if read_failures(path, plan):
            found[number] = _stamp(path)
    return found


def work(
    job: Path,
    plan: Plan,
    compute: Callable[[Part], bytes],
    *,
    share: tuple[int, int] | None = None,
    again: dict[int, tuple[int, int]] | None = None,
    tell: Callable[[int], None] | None = None,
    lease_seconds: float = LEASE_SECONDS,
) -> int:
    """Compute the parts that are missing and that nobody has; return how many were computed here.

    Args:
      compute: a part to the bytes of its file.
      share: (i, n): only parts whose number is i modulo n.
      again: parts to compute once more while their file is the one named, see `failed_parts`.
      tell: called with the number of parts that are there, after each.
    """
    (job / PARTS).mkdir(parents=True, exist_ok=True)
    again = again or {}
    mine = [part for part in plan.parts if share is None or part.number % share[1] == share[0]]
    # Each begins elsewhere, so that they seldom ask for the same.
    begin = int.from_bytes(secrets.token_bytes(4), "big") % max(1, len(mine)) if share is None else 0
    done = finished_parts(job)
    computed = 0
    for part in mine[begin:] + mine[:begin]:
        path = part_file(job, part.number)
        if not _is_wanted(part, path, done, again):
            continue
        with lease(job, str(part.number), lease_seconds) as is_mine:
            if not is_mine or not _is_wanted(part, path, set(), again):
                continue
            write_bytes(path, compute(part), durable=True)
            computed += 1
        if tell is not None:
            done = finished_parts(job)
            tell(len(done))
    return computed


def work_until_done(job: Path, plan: Plan, compute: Callable[[Part], bytes], **options) -> int:
    """`work`, and wait for the parts that others have, or take them when their leases expire."""
    computed = work(job, plan, compute, **options)
    options.pop("again", None)
    while missing_parts(job, plan):
        time.sleep(POLL_SECONDS)
        computed += work(job, plan, compute, **options)
    return computed


@contextlib.contextmanager
def lease(job: Path, name: str, seconds: float = LEASE_SECONDS) -> Iterator[bool]:
    """Try to take the lease `name` of a job and hold it while inside; whether that succeeded."""
    path = job / LEASES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_if_expired(path, seconds)
    holder = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8)})
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(holder)
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.wait(seconds / TOUCHES):
            with contextlib.suppress(OSError):
                os.utime(path)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield True
    finally:
        is_over.set()
        keeper.join()
        with contextlib.suppress(OSError):  # another one may have taken it for expired
            if path.read_text() == holder:
                path.unlink()


def held_leases(job: Path, seconds: float = LEASE_SECONDS) -> list[str]:
    """The names of the leases that somebody holds."""
    if not (job / LEASES).is_dir():
        return []
    return sorted(path.name for path in (job / LEASES).iterdir() if not path.name.startswith("."))


def _drop_if_expired(path: Path, seconds: float) -> None:
    try:
        state = path.stat()
        holder = path.read_text()
    except OSError:
        return
    if _now(path.parent) - state.st_mtime < seconds and not _is_dead(holder):
        return
    with contextlib.suppress(OSError):  # one of several gets it
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        path.rename(aside)
        aside.unlink()


def _is_dead(holder: str) -> bool:
    """Whether the process that wrote a lease is known not to live any more: on this host, that is."""
    try:
        content = json.loads(holder)
        if content["host"] != socket.gethostname():
            return False
        os.kill(int(content["process"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, OSError):  # being written, or another user's
        return False
    return False


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which stamps the leases."""
    probe = folder / f".{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _is_wanted(part: Part, path: Path, done: set[int], again: dict[int, tuple[int, int]]) -> bool:
    if part.number in again:
        return _stamp(path) == again[part.number]
    return part.number not in done and not path.exists()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except FileNotFoundError:
        return 0, 0
    return state.st_ino, state.st_mtime_ns
