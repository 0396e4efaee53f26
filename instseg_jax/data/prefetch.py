"""Work ahead of who waits for it: threads, or processes that are given the function once."""

import collections
import itertools
import multiprocessing
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

import cv2

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int,
    prefetch: int,
    use_processes: bool,
) -> Generator[Result, None, None]:
    """Yield function(item) in order; `num_workers` threads or processes work on up to `prefetch` items ahead.

    With no workers it computes inline. An error is raised where its result would have been yielded. Closing the
    iterator ends the workers. For processes the function, the items and the results must be picklable.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    items = iter(items)
    pending: collections.deque[Future] = collections.deque()
    pool, call = _start_workers(function, num_workers, use_processes)
    try:
        for item in itertools.islice(items, prefetch):
            pending.append(pool.submit(call, item))
        while pending:
            result = pending.popleft().result()
            for item in itertools.islice(items, 1):
                pending.append(pool.submit(call, item))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_workers(function: Callable, num_workers: int, use_processes: bool) -> tuple[Executor, Callable]:
    """Workers, and what to hand them: the function itself, or one that calls what each process was given."""
    if not use_processes:
        return ThreadPoolExecutor(num_workers, thread_name_prefix="loader"), function
    # Not forked: the parent has threads of XLA, whose locks a fork would copy in whatever state they are.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, _remember, (function,)), _call_remembered


_function: Callable | None = None  # of a worker process


def _remember(function: Callable) -> None:
    global _function
    cv2.setNumThreads(0)
    _function = function


def _call_remembered(item: Any) -> Any:
    assert _function is not None  # the process was started with it
    return _function(item)
