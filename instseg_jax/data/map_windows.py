"""Where a raster is cut: windows around polygons of a layer, in pixels of the raster."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from instseg_jax.messages import quote
from instseg_jax.windows import Window

SLIVER_PX = 1.0  # pixels of a picture: an object, or what a border leaves of it, that is smaller is none
LARGE_SHARE = 0.25  # of a picture: so much of an object is worth learning, however little of the object it is
MOST_ENLARGED = 16  # pixels of a picture for one of the raster, along a side


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How rasters are cut."""

    tile: int  # pixels of a picture's side
    overlap: float  # of neighbouring pictures, as a share of their side
    min_visible: float  # share of an object that must be in a picture; less is marked to be ignored
    empty_share: float  # pictures without objects, for each one with some
    gsd: float | None  # metres on the ground that a pixel of a picture shows; None: as in the raster
    bands: tuple[str, ...] | None  # that are shown as red, green and blue, by colour or number; None: the colours
    seed: int


def check_cutting(cutting: Cutting) -> None:
    """Raise ValueError for options that say nothing that can be cut."""
    if cutting.tile < 32:
        raise ValueError(f"--tile is {cutting.tile}, it must be at least 32 pixels.")
    if not 0 <= cutting.overlap < 1:
        raise ValueError(f"--overlap is {cutting.overlap}, it must be at least 0 and below 1.")
    if not 0 < cutting.min_visible <= 1:
        raise ValueError(f"--min_visible is {cutting.min_visible}, it must be above 0 and at most 1.")
    if cutting.empty_share < 0:
        raise ValueError(f"--empty_share is {cutting.empty_share}, it must be at least 0.")
    if cutting.bands is not None and len(cutting.bands) != 3:
        raise ValueError(
            f"--bands is {quote(','.join(cutting.bands))}, it must name three, shown as red, green and blue."
        )
    if cutting.gsd is not None and not 0 < cutting.gsd < 1e6:
        raise ValueError(f"--gsd is {cutting.gsd}, it must be above 0 metres.")


def window_sides(name: str, lengths: tuple[float, float], cutting: Cutting) -> tuple[int, int]:
    """Width and height of what a picture shows, in pixels of a raster, whose sides are `lengths` metres.

    Raises ValueError, which names the raster, for pictures that would be far finer than it is.
    """
    if cutting.gsd is None:
        return cutting.tile, cutting.tile
    width, height = (max(1, round(cutting.tile * cutting.gsd / length)) for length in lengths)
    if min(width, height) * MOST_ENLARGED < cutting.tile:
        raise ValueError(
            f"--gsd is {cutting.gsd}, {name} has pixels of {min(lengths):.3g} m; "
            f"they are made at most {MOST_ENLARGED} times finer."
        )
    return width, height


def grid(size: tuple[int, int], sides: tuple[int, int], overlap: float) -> Iterator[Window]:
    """Windows that cover an image of `size` (height, width); the last ones reach its edge, where it is large enough."""

    def starts(length: int, side: int) -> list[int]:
        step = max(1, round(side * (1 - overlap)))
        return sorted({min(start, max(0, length - side)) for start in range(0, max(1, length), step)})

    for y in starts(size[0], sides[1]):
        for x in starts(size[1], sides[0]):
            yield Window(x, y, *sides)


def around(shape: Any, size: tuple[int, int], sides: tuple[int, int]) -> Window:
    """The window with a shape in its middle, moved to lie on the image."""
    left, top, right, bottom = shape.bounds
    x = min(max(0, round((left + right - sides[0]) / 2)), max(0, size[1] - sides[0]))
    y = min(max(0, round((top + bottom - sides[1]) / 2)), max(0, size[0] - sides[1]))
    return Window(x, y, *sides)


def objects_in(
    window: Window, tree: Any, shapes: np.ndarray, scale: np.ndarray, cutting: Cutting
) -> list[tuple[int, Any, bool]]:
    """(index, shape in pixels of the picture, whether enough of it is seen) of the shapes that a window shows."""
    import shapely

    box = shapely.box(*window.box)
    found = []
    for index in sorted(tree.query(box, predicate="intersects").tolist()):
        part = shapes[index] & box
        seen = part.area * scale.prod()
        if seen < SLIVER_PX:
            continue
        enough = part.area >= cutting.min_visible * shapes[index].area or seen >= LARGE_SHARE * cutting.tile**2
        shape = shapely.transform(part, lambda xy: (xy - [window.x, window.y]) * scale)
        found.append((index, shape, bool(enough)))
    return found
