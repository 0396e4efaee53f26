"""What a run says while it goes: rows in metrics.jsonl, a log file, a progress line."""

import collections
import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from instseg_jax.progress import say_duration
from instseg_jax.training.workdir import METRICS, keep_rows

COMPILING_SECONDS = 40  # with the first step, on two idle CPU cores: 24 (N, 192 px), 33 (S, 640 px), 41 (L, 640 px)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in the order of the steps.

    Rows from `start_step` on are dropped at opening: they come from a run that went further than the
    checkpoint it resumes from, and will be written again. Of several processes only the first one writes.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        self._file = None
        if jax.process_index() != 0:
            return
        keep_rows(workdir / METRICS, lambda row: row["step"] < start_step)
        self._file = (workdir / METRICS).open("a", encoding="utf-8")

    def write(self, row: dict) -> None:
        """Append the row of a step (plain numbers, with `step`) and hand it to the system."""
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Have the system write the rows to the disk, so that they outlast a power cut."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing may be written afterwards."""
        if self._file is not None:
            self._file.close()


class _ConsoleHandler(logging.StreamHandler):
    """Prints to whatever is sys.stdout now: a live bar puts itself in its place, to stay below what is printed."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stdout


def open_log(path: pathlib.Path) -> logging.Logger:
    """A logger that appends to `path` and prints to the console; of several processes only the first one's."""
    logger = logging.getLogger("instseg_jax.train")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    if jax.process_index() != 0:
        logger.addHandler(logging.NullHandler())
        return logger
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_console = _ConsoleHandler()
    to_console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(to_file)
    logger.addHandler(to_console)
    return logger


class TrainingProgress:
    """A live bar in a terminal; elsewhere a plain line now and then.

    The time that is left comes from the last steps and the last evaluation: compiling, saving and the evaluations
    themselves do not count into the time of a step.
    """

    PLAIN_SECONDS = 30.0
    WINDOW = 50  # steps

    def __init__(self, total_steps: int, start_step: int, logger: logging.Logger, *, evaluate_every: int):
        self._total, self._logger, self._evaluate_every = total_steps, logger, evaluate_every
        self._seconds: collections.deque[float] = collections.deque(maxlen=self.WINDOW)  # of the last steps
        self._evaluation_seconds = 0.0
        self._mark: float | None = None  # when the step began that is going on; None: its time does not count
        self._last_line: float | None = None
        console = Console()
        self._bar = None
        if console.is_terminal and jax.process_index() == 0:
            texts = (TextColumn("{task.fields[left]}"), TextColumn("{task.fields[text]}"))
            columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *texts
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=total_steps, completed=start_step, text="", left="")
            self._bar.start()

    def update(self, step: int, row: dict) -> None:
        """Show that `step` steps are done; `row` holds `loss` and, where there are any, its terms."""
        now = time.monotonic()
        if self._mark is not None:
            self._seconds.append(now - self._mark)
        self._mark = now
        text = "loss {loss:.3f}".format(**row)
        for name in ("loss/class", "loss/box_giou", "loss/mask_dice"):
            if name in row:
                text += f"  {name.removeprefix('loss/')} {row[name]:.3f}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text, left=self._left(step))
        elif self._last_line is None or now - self._last_line >= self.PLAIN_SECONDS or step == self._total:
            self._last_line = now
            left = self._left(step)
            self._logger.info("step %d/%d  %s%s", step, self._total, text, f"  {left}" if left else "")

    @contextlib.contextmanager
    def compiling(self, size: tuple[int, ...]) -> Iterator[None]:
        """Around a step that compiles for pictures of a size (height, width) in pixels: says so before and after."""
        name = f"the training step for {size[0]} x {size[1]} px"
        self._logger.info("compiling %s, about %d s the first time", name, COMPILING_SECONDS)
        if self._bar:
            self._bar.update(self._task, left="compiling")
        started = time.monotonic()
        yield
        self._logger.info("compiled %s in %.0f s", name, time.monotonic() - started)
        self._mark = None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation."""
        if self._bar:
            self._bar.update(self._task, left="evaluating")
        started = time.monotonic()
        yield
        now = time.monotonic()
        self._evaluation_seconds = now - started
        if self._mark is not None:
            self._mark += now - started

    def _left(self, step: int) -> str:
        """How long a step takes and how long all others will, evaluations included; "" as long as nobody knows."""
        if not self._seconds:
            return ""
        per_step = sum(self._seconds) / len(self._seconds)
        evaluations = math.ceil(self._total / self._evaluate_every) - step // self._evaluate_every
        left = per_step * (self._total - step) + self._evaluation_seconds * evaluations
        return f"{per_step:.2f} s a step  {say_duration(left)} left"

    def close(self) -> None:
        """Take the bar away, so that what is printed next stays whole."""
        if self._bar:
            self._bar.stop()
