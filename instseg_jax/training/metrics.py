"""What a run says while it goes: rows in metrics.jsonl, a log file, a progress line."""

import json
import logging
import pathlib
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in the order of the steps.

    Rows from `start_step` on are dropped at opening: they come from a run that went further than the
    checkpoint it resumes from, and will be written again.
    """

    def __init__(self, path: pathlib.Path, start_step: int):
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] < start_step]
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _complete_lines(path: pathlib.Path) -> list[str]:
    """Lines of a file that may have been cut off in the middle of one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and line.strip().endswith("}")]


def read_metrics(path: pathlib.Path) -> list[dict]:
    """Rows of a metrics.jsonl."""
    return [json.loads(line) for line in _complete_lines(path)]


def open_log(path: pathlib.Path) -> logging.Logger:
    """A logger that appends to `path` and prints to the console."""
    logger = logging.getLogger("instseg_jax.train")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_console = logging.StreamHandler(sys.stdout)
    to_console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(to_file)
    logger.addHandler(to_console)
    return logger


class TrainingProgress:
    """A live bar in a terminal; elsewhere a plain line now and then."""

    PLAIN_SECONDS = 30.0

    def __init__(self, total_steps: int, start_step: int, logger: logging.Logger):
        self._total, self._logger = total_steps, logger
        self._started, self._start_step = time.monotonic(), start_step
        self._last_line = self._started
        console = Console()
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            columns += (TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=total_steps, completed=start_step, text="")
            self._bar.start()

    def update(self, step: int, row: dict) -> None:
        text = "loss {loss:.3f}".format(**row)
        for name in ("loss/class", "loss/box_giou", "loss/mask_dice"):
            if name in row:
                text += f"  {name.removeprefix('loss/')} {row[name]:.3f}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last_line < self.PLAIN_SECONDS and step < self._total:
            return
        self._last_line = now
        per_step = (now - self._started) / max(1, step - self._start_step)
        remaining = time.strftime("%H:%M:%S", time.gmtime(per_step * (self._total - step)))
        self._logger.info("step %d/%d  %s  %.2f s a step  %s left", step, self._total, text, per_step, remaining)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
