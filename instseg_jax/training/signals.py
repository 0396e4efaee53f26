"""Signals that ask a run to stop: heard between steps, and while a program is compiled or the model is scored."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

LISTENING_SECONDS = 0.1  # between looks at whether a signal has come
WORKER = "instseg-work"  # name of the threads that `StopSignals.listen` starts

T = TypeVar("T")


class Interrupted(Exception):
    """A signal came before the work was done."""


class StopSignals:
    """While inside, SIGTERM, SIGUSR1 and the first SIGINT only ask to stop; SIGUSR1 also asks to be started again.

    Several processes must stop at the same step: JAX's coordinator hears of a SIGTERM to any of them and names it. A
    SIGUSR1 becomes one.
    """

    def __enter__(self) -> "StopSignals":
        self._is_asked = self.is_requeue = False
        self._before: dict[int, Any] = {}
        numbers = [signal.SIGTERM, signal.SIGINT] if jax.process_count() == 1 else []
        numbers += [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
        for number in numbers:
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break
        return self

    def _ask(self, number: int, frame) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.is_requeue = True
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others of
            else:
                self._is_asked = True
            return  # a second one changes nothing
        self._is_asked = True
        signal.signal(number, self._before[number] or signal.SIG_DFL)

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._is_asked

    def is_to_be_requeued(self) -> bool:
        """Whether it was SIGUSR1 that asked, in any process; once all have stopped."""
        if jax.process_count() > 1:
            return bool(multihost_utils.process_allgather(np.array([self.is_requeue])).any())
        return self.is_requeue

    def listen(self, work: Callable[[], T]) -> T:
        """Return work(), done by a thread while this one hears signals: XLA compiles for minutes outside of Python.

        Raises: Interrupted when a signal comes first; the thread then ends by itself, and what it works on is lost.
          Otherwise whatever `work` raises.
        """
        if signal.SIGTERM not in self._before:  # nothing to hear here
            return work()
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                outcome["value"] = work()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=run, name=WORKER)
        thread.start()
        while thread.is_alive():
            thread.join(LISTENING_SECONDS)
            if self._is_asked and thread.is_alive():
                raise Interrupted
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]


def is_still_working() -> bool:
    """Whether a thread of an interrupted `StopSignals.listen` goes on; Python would wait for it before it ends."""
    return any(thread.name == WORKER for thread in threading.enumerate())
