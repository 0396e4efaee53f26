"""A bar for what a person waits for."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track as track_in_terminal

Item = TypeVar("Item")
Track = Callable[[Iterable[Any], int], Iterable[Any]]  # (items, how many) -> the items, shown as they pass


def say_duration(seconds: float) -> str:
    """Hours, minutes and seconds, with days where there are any: `3 d 01:02:03`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02d}:{minute:02d}:{second:02d}" if days else f"{hour:02d}:{minute:02d}:{second:02d}"


def track(items: Iterable[Item], text: str, total: int | None) -> Iterator[Item]:
    """Go through `items`, `total` of them (None: unknown), beside a bar; in a notebook, where that needs more packages,
    without one.
    """
    console = Console()
    if console.is_jupyter:
        return iter(items)
    return iter(track_in_terminal(items, text, total, console=console))
