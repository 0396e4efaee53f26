"""Memory of the process: its peak, and what a call takes above the start."""

import contextlib
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

SAMPLING_S = 0.002  # of the memory


@contextlib.contextmanager
def memory_above() -> Iterator[list[float]]:
    """Watch the process's memory while inside: the list holds the most above the start so far, in MB.

    It stays empty where the system doesn't tell (only Linux does). What comes and goes between two samples is missed.
    """
    found: list[float] = []
    start = _resident_mb()
    if start is None:
        yield found
        return
    found.append(0.0)
    is_done = threading.Event()

    def sample() -> None:
        found[0] = max(found[0], (_resident_mb() or 0.0) - start)

    def watch() -> None:
        while not is_done.wait(SAMPLING_S):
            sample()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        is_done.set()
        watcher.join()
        sample()


def peak_memory_mb() -> float:
    """The highest memory of the process so far."""
    try:  # getrusage would count what the process that started this one held
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def _resident_mb() -> float | None:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return None
    return int(pages) * resource.getpagesize() / 1e6
