"""How far a job is, told from its folder alone: by anyone, at any time."""

import contextlib
import dataclasses
import os
import time
from pathlib import Path

from instseg_jax.jobs.parts import read_failures
from instseg_jax.jobs.plan import Plan
from instseg_jax.jobs.workers import PARTS, finished_parts, held_leases, part_file


@dataclasses.dataclass(frozen=True)
class State:
    """Parts of a job."""

    total: int
    done: int
    in_work: int
    failed: int  # things that could not be read: pictures, windows
    rate: float | None  # parts a second since the first one; None: too few to tell

    @property
    def seconds_left(self) -> float | None:
        """At that rate; None: unknown."""
        return (self.total - self.done) / self.rate if self.rate else None


def read_state(job: Path, plan: Plan) -> State:
    """Count the parts of a job. Raises ValueError for a damaged part."""
    done = finished_parts(job)
    failed = sum(len(read_failures(part_file(job, number), plan)) for number in sorted(done))
    in_work = sum(name.isdigit() and int(name) not in done for name in held_leases(job))
    return State(len(plan.parts), len(done), in_work, failed, _rate(job))


def _rate(job: Path) -> float | None:
    times = []
    with contextlib.suppress(FileNotFoundError), os.scandir(job / PARTS) as entries:
        times = sorted(entry.stat().st_mtime for entry in entries if entry.name.endswith(".npz"))
    if len(times) < 2 or times[-1] <= times[0]:
        return None
    # While somebody works, the time since the last part counts; of a job at rest it does not.
    end = time.time() if held_leases(job) else times[-1]
    return (len(times) - 1) / max(end - times[0], times[-1] - times[0])
