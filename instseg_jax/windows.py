"""Windows of images: where they lie, and pictures that fill them. Who reads and merges them is in `tiling.py`."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of an image, in pixels; (x, y) is its top left corner."""

    x: int
    y: int
    width: int
    height: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) in pixels of the image, x2 and y2 exclusive."""
        return self.x, self.y, self.x + self.width, self.y + self.height


def view_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) of an image of `size` scaled down so that its longer side is at most `side`."""
    scale = min(1.0, side / max(size))
    height, width = (max(1, round(length * scale)) for length in size)
    return height, width


def fill_up(part: np.ndarray, window: Window) -> np.ndarray:
    """Put the pixels of a window into the top left of a black picture of its full size."""
    if part.shape[:2] == (window.height, window.width):
        return part
    full = np.zeros((window.height, window.width, 3), np.uint8)
    full[: part.shape[0], : part.shape[1]] = part
    return full
