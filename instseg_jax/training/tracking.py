"""The trackers of a run: they get what its own files get, in a thread of their own, so that no step waits for them.

What a tracker fails at is told once, and it is left out from there on. trackers.json in the workdir notes after each
row how far each has come: a run that resumes sends no row twice (but one, where a kill came between row and note), and
a tracker that comes later, was left out or had not got all when the run was killed gets what it lacks.
"""

import dataclasses
import logging
import pathlib
import queue
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from instseg_jax.files import read_json, write_json
from instseg_jax.training.trackers import Tracker
from instseg_jax.training.workdir import CONFIG, LOG, METRICS, VALIDATION, read_rows

STATE = "trackers.json"
ARTEFACTS = (CONFIG, LOG, "training.png", "evaluate_result.json")
CLOSING_SECONDS = 120.0  # that the end of a run waits for what is still to be sent
ROWS, EVALUATIONS = "rows", "evaluations"  # what a tracker gets, step after step

Make = Callable[[str], tuple[Tracker, str]]  # name of the run, "" for a new one -> tracker, name of the run


@dataclasses.dataclass
class Follower:
    """A tracker, opened when there is something for it, and how far it has come."""

    make: Make
    run: str  # by which its library knows the run; "" as long as there is none
    sent: dict[str, int]  # the last step it got, of each kind; -1: none
    tracker: Tracker | None = None
    is_left_out: bool = False


class Item(NamedTuple):
    """Something to send: those that have had this step of this kind do not get it again."""

    kind: str  # ROWS, EVALUATIONS, or "" for what is sent to those that are open
    step: int
    send: Callable[[Tracker], None]


class Tracking:
    """All trackers of a run; every method but `close` returns at once, and none of them raises."""

    def __init__(self, workdir: pathlib.Path, followers: Mapping[str, Follower], logger: logging.Logger):
        self._workdir, self._followers, self._logger = workdir, followers, logger
        self._items: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)

    def start(self, start_step: int) -> None:
        """Note how far each has come and send what is missing from before `start_step`, where the run goes on."""
        if not self._followers:
            return
        self._note()
        before = [(row["step"], 0, row) for row in read_rows(self._workdir / VALIDATION) if row["step"] <= start_step]
        before += [(row["step"], 1, row) for row in read_rows(self._workdir / METRICS) if row["step"] < start_step]
        for step, is_row, row in sorted(before, key=lambda entry: entry[:2]):
            self.log(row) if is_row else self.score(step, row, {})
        self._thread.start()

    def log(self, row: dict) -> None:
        """Send the row of a step, as metrics.jsonl has it."""
        step, numbers = row["step"], _numbers(row)
        self._put(Item(ROWS, step, lambda tracker: tracker.log(step, numbers)))

    def score(self, step: int, metrics: dict, pictures: Mapping[str, np.ndarray]) -> None:
        """Send the scores of an evaluation and what was found in a few pictures: RGB [h, w, 3] uint8 by name."""
        numbers = _numbers(metrics)

        def send(tracker: Tracker) -> None:
            tracker.log(step, numbers)
            for name, picture in pictures.items():
                tracker.picture(step, name, picture)

        self._put(Item(EVALUATIONS, step, send))

    def close(self) -> None:
        """Send the files of the run and wait until all is sent, CLOSING_SECONDS at most."""
        if not self._thread.is_alive():
            return
        for path in [self._workdir / name for name in ARTEFACTS]:
            if path.is_file():
                self._put(Item("", -1, lambda tracker, path=path: tracker.artefact(path)))  # type: ignore[misc]
        self._put(Item("", -1, lambda tracker: tracker.close()))
        self._items.put(None)
        self._thread.join(CLOSING_SECONDS)
        if self._thread.is_alive():
            self._logger.warning("trackers have not taken all in %.0f s; the rest is left out", CLOSING_SECONDS)

    def _put(self, item: Item) -> None:
        if self._followers:
            self._items.put(item)

    def _work(self) -> None:
        while (item := self._items.get()) is not None:
            for name, follower in self._followers.items():
                try:
                    self._send(follower, item)
                except Exception as error:
                    follower.is_left_out = True
                    text = (str(error) or type(error).__name__).splitlines()[0]
                    self._logger.warning("the tracker %s fails and is left out from here on: %s", name, text)
                    self._note()
        self._note()

    def _send(self, follower: Follower, item: Item) -> None:
        if follower.is_left_out or item.step <= follower.sent.get(item.kind, -2):
            return
        if follower.tracker is None:
            if not item.kind:
                return
            follower.tracker, follower.run = follower.make(follower.run)
            self._note()
        item.send(follower.tracker)
        if item.kind:
            follower.sent[item.kind] = item.step
            self._note()

    def _note(self) -> None:
        state = {
            name: {"run": one.run, "is_left_out": one.is_left_out, **one.sent} for name, one in self._followers.items()
        }
        try:
            write_json(self._workdir / STATE, state, indent=2)
        except OSError as error:
            self._logger.warning("%s can't be written: %s", STATE, error)


def open_tracking(workdir: pathlib.Path, makers: Mapping[str, Make], logger: logging.Logger) -> Tracking:
    """The trackers of a run, of its first process alone; they go on after what trackers.json says they got."""
    followers = {}
    for name, make in makers.items() if jax.process_index() == 0 else ():
        sent, run = {ROWS: -1, EVALUATIONS: -1}, ""
        try:
            state = read_json(workdir / STATE)[name]
            run = str(state["run"])
            sent = {kind: int(state[kind]) for kind in sent}
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or none of this name
            pass
        followers[name] = Follower(make, run, sent)
    return Tracking(workdir, followers, logger)


def _numbers(row: Mapping) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, float)}
