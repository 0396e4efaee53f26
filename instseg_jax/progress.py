"""A bar for what a person waits for."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as track_in_terminal

Item = TypeVar("Item")


def track(items: Iterable[Item], text: str, total: int | None) -> Iterator[Item]:
    """Go through `items`, `total` of them (None: unknown), beside a bar; in a notebook, where that needs more packages,
    without one.
    """
    console = Console()
    if console.is_jupyter:
        return iter(items)
    return iter(track_in_terminal(items, text, total, console=console))
