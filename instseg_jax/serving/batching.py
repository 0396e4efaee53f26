"""Requests that arrive one by one become batches: a bounded queue and threads that empty it.

Nothing here knows about HTTP or images.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

WORKERS = 2  # one batch is encoded while the device works on the next


class QueueFullError(RuntimeError):
    """There are as many items waiting as may."""


class Batcher:
    """Runs items in batches of at most `batch_size`, waiting at most `max_wait` seconds for one to fill.

    `run` takes the items of a batch and returns a result for each, in order. When it raises, every item is run once
    more alone, so that one bad item fails by itself.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        batch_size: int,
        max_wait: float,
        queue_size: int,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        """`observe` is told the size of each batch and the seconds that it took."""
        self._run, self._observe = run, observe
        self._batch_size, self._max_wait = batch_size, max_wait
        self._queue: queue.Queue[tuple[Any, Future] | None] = queue.Queue()
        self._slots = threading.Semaphore(queue_size)
        self._turn = threading.Lock()
        self._state = threading.Lock()
        self._is_open = True
        self._workers = [threading.Thread(target=self._work, daemon=True, name=f"batch-{i}") for i in range(WORKERS)]
        for worker in self._workers:
            worker.start()

    @property
    def waiting(self) -> int:
        """How many items wait for a batch."""
        return self._queue.qsize()

    @property
    def is_alive(self) -> bool:
        """Whether items are taken and every thread runs."""
        return self._is_open and all(worker.is_alive() for worker in self._workers)

    def submit(self, item: Any) -> Future:
        """Queue an item; its future gets the result. A future that is cancelled in time is not run.

        Raises: QueueFullError; RuntimeError after `close`.
        """
        with self._state:
            if not self._is_open:
                raise RuntimeError("the batcher is closed")
            if not self._slots.acquire(blocking=False):
                raise QueueFullError
            future: Future = Future()
            self._queue.put((item, future))
        return future

    def close(self) -> None:
        """Take no more items, finish those that were accepted, and stop the threads."""
        with self._state:
            if not self._is_open:
                return
            self._is_open = False
            for _ in self._workers:
                self._queue.put(None)
        for worker in self._workers:
            worker.join()

    def _work(self) -> None:
        while True:
            # One thread forms a batch at a time: two would share out what should go together.
            with self._turn:
                batch, is_last = self._next_batch()
            running = [(item, future) for item, future in batch if future.set_running_or_notify_cancel()]
            if running:
                self._run_batch(running)
            if is_last:
                return

    def _next_batch(self) -> tuple[list[tuple[Any, Future]], bool]:
        batch: list[tuple[Any, Future]] = []
        deadline = None
        while len(batch) < self._batch_size:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                entry = self._queue.get(timeout=wait) if wait != 0.0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if entry is None:
                return batch, True
            self._slots.release()
            batch.append(entry)
            deadline = deadline or time.monotonic() + self._max_wait
        return batch, False

    def _run_batch(self, batch: list[tuple[Any, Future]]) -> None:
        started = time.monotonic()
        try:
            results = self._run([item for item, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            for entry in batch:
                self._run_batch([entry])
            return
        if self._observe is not None:
            self._observe(len(batch), time.monotonic() - started)
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
