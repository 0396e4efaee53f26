"""Large images in windows: where the windows lie, how they are read and worked on.

What was found in them becomes the instances of the image in `mask_merging.py`. A GeoTIFF is read window by window
(`rasters.py`); other formats have to be decoded whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import cv2
import numpy as np

from instseg_jax.inference.mask_merging import merge_windows
from instseg_jax.inference.pieces import WindowInstances
from instseg_jax.inference.sources import Source
from instseg_jax.inference.streaming import Found
from instseg_jax.messages import quote
from instseg_jax.progress import Track
from instseg_jax.windows import Window, fill_up, view_size

OVERVIEW_SIDE = 2048  # pixels of the longer side of the view in which large objects are looked for
MAX_PIXELS = 2**32 - 1  # pycocotools counts in 32 bits

Stream = Callable[[Iterator[Source], int, np.ndarray], Iterator[Found]]


class Image(Protocol):
    """What windows are read from."""

    size: tuple[int, int]  # (height, width)

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window [height, width, 3] uint8 RGB; black beyond the image."""

    def view(self, side: int) -> np.ndarray:
        """The whole image, its longer side at most `side` pixels."""

    def picture(self) -> np.ndarray:
        """The whole image, or a smaller view where it is too large to hold."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How large images are cut. `overlap` is a part of the side; see `Pipeline.predict`."""

    side: int
    overlap: float
    whole_image: bool
    progress: Track | None = None  # of the windows of an image

    def __post_init__(self) -> None:
        if not isinstance(self.side, int) or self.side < 32:
            raise ValueError(f"tile is {quote(self.side)}, it must be a whole number of pixels, at least 32")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap is {quote(self.overlap)}, it must be between 0 and 0.9")

    @property
    def stride(self) -> int:
        """Pixels from the start of a window to that of the next."""
        return max(1, self.side - self.overlap_px)

    @property
    def overlap_px(self) -> int:
        """Pixels that neighbouring windows have in common."""
        return round(self.side * self.overlap)


class ArrayImage:
    """Windows of an image [height, width, 3] uint8 RGB that is in memory; see `Image` for its methods."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.size = (pixels.shape[0], pixels.shape[1])

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window [height, width, C]; black beyond the image."""
        part = self.pixels[window.y : window.y + window.height, window.x : window.x + window.width]
        return fill_up(part, window)

    def view(self, side: int) -> np.ndarray:
        """The whole image, its longer side at most `side` pixels (averaged over areas)."""
        height, width = view_size(self.size, side)
        if (height, width) == self.size:
            return self.pixels
        return cv2.resize(self.pixels, (width, height), interpolation=cv2.INTER_AREA)

    def picture(self) -> np.ndarray:
        """The whole image, not copied."""
        return self.pixels


def stream_tiled(
    sources: Iterator[Source], stream: Stream, tiles: Tiles, batch_size: int, thresholds: np.ndarray
) -> Iterator[Found]:
    """Find the instances of each source in windows, in order; an image that fits into one is worked on as it is."""
    for source in sources:
        try:
            image = _open(source)
        except (ValueError, OSError) as error:
            yield Found(source, None, None, " ".join(str(error).split()))
            continue
        source = dataclasses.replace(source, size=image.size)
        if max(image.size) <= tiles.side:
            yield from stream(iter([dataclasses.replace(source, read=image.picture)]), batch_size, thresholds)
            continue
        windows = windows_of(image.size, tiles)
        results: Iterable[Found] = stream(_window_sources(source, image, tiles), batch_size, thresholds)
        if tiles.progress is not None:
            results = tiles.progress(results, len(windows) + tiles.whole_image)
        # Without their pixels: all windows together would be more than the image.
        found = [(one.instances, one.error) for one in results]
        failed = [error for _, error in found if error is not None]
        if failed:
            yield Found(source, None, None, failed[0])
            continue
        parts = [
            WindowInstances(window, instances)
            for window, (instances, _) in zip(windows, found, strict=False)
            if instances is not None
        ]
        whole = found[-1][0] if tiles.whole_image else None
        merged = merge_windows(parts, whole, size=image.size, overlap_px=tiles.overlap_px)
        yield Found(source, image.picture(), merged)


def windows_of(size: tuple[int, int], tiles: Tiles) -> list[Window]:
    """Square windows over an image of `size` (height, width), row by row.

    The last ones of a row or column end at the border of the image; in a direction in which the image is shorter than
    a window, they reach beyond it.
    """
    rows, columns = (window_starts(length, tiles) for length in size)
    return [Window(x, y, tiles.side, tiles.side) for y in rows for x in columns]


def window_starts(length: int, tiles: Tiles) -> list[int]:
    """Where windows begin along a side of `length` pixels."""
    last = max(0, length - tiles.side)
    return [min(i * tiles.stride, last) for i in range(math.ceil(last / tiles.stride) + 1)]


def _open(source: Source) -> Image:
    """Windows of a source: read from its file where the format allows, else of the decoded image."""
    image: Image = source.raster or ArrayImage(source.read())
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise ValueError(f"{source.name} has {image.size[0]} x {image.size[1]} pixels, more than {MAX_PIXELS}")
    return image


def _window_sources(source: Source, image: Image, tiles: Tiles) -> Iterator[Source]:
    """The windows of an image, and the whole of it scaled down as the last one where that is asked for."""
    for window in windows_of(image.size, tiles):
        yield Source(source.name, functools.partial(image.read, window))
    if tiles.whole_image:
        yield Source(source.name, functools.partial(image.view, OVERVIEW_SIDE), size=image.size)
