"""Parts of masks: reading a rectangle of an RLE, and placing a small mask into a large image.

Work and memory follow the rectangle, not the image: an instance of an image of 20,000 x 20,000 pixels costs what it
covers. Codes of whole masks are in `instseg_jax/masks.py`, their outlines in `polygons.py`.
"""

from collections.abc import Sequence

import numpy as np

from instseg_jax.masks import compress_rle, edges_to_rle, rle_runs

Box = tuple[int, int, int, int]


def crop_rle(rle: dict, box_xyxy_px: Box) -> np.ndarray:
    """Decode the rectangle (x1, y1, x2, y2; x2 and y2 exclusive) of an RLE to a uint8 0/1 mask [y2 - y1, x2 - x1].

    The rectangle may reach beyond the image, where nothing is set.
    """
    rle = compress_rle(rle)
    height = rle["size"][0]
    x1, y1, x2, y2 = box_xyxy_px
    edges = np.cumsum(rle_runs(rle))
    starts, stops = edges[:-1:2], edges[1::2]
    inside = (stops > x1 * height) & (starts < x2 * height) & (stops > starts)
    starts, stops = starts[inside], stops[inside]
    # A run may go on over several columns; here it becomes one piece a column.
    first, last = starts // height, (stops - 1) // height
    counts = last - first + 1
    run = np.repeat(np.arange(len(starts)), counts)
    columns = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
    tops = np.clip(np.maximum(starts[run] - columns * height, 0), y1, y2) - y1
    bottoms = np.clip(np.minimum(stops[run] - columns * height, height), y1, y2) - y1
    kept = (columns >= x1) & (columns < x2) & (bottoms > tops)
    changes = np.zeros((x2 - x1, y2 - y1 + 1), np.int8)
    changes[columns[kept] - x1, tops[kept]] += 1
    changes[columns[kept] - x1, bottoms[kept]] -= 1
    return np.ascontiguousarray(np.cumsum(changes, axis=1, dtype=np.int8)[:, :-1].T).view(np.uint8)


def paste_mask(mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> dict:
    """Encode a mask [h, w] whose top left pixel lies at `corner` (x, y) as the RLE of an image of `size`.

    `size` is (height, width). What lies beyond the image is cut off.
    """
    height, width = size
    x, y = corner
    left, top = max(0, -x), max(0, -y)
    mask = mask[top : max(top, height - y), left : max(left, width - x)]
    x, y = x + left, y + top
    # A background pixel before and behind each column, so that every run begins and ends within its column.
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), bool)
    columns[:, 1:-1] = mask.T != 0
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    return edges_to_rle((column + x) * height + row + y, size)


def crop_bounds(coordinate: Sequence[float], size: tuple[int, int]) -> Box:
    """Round a box (x1, y1, x2, y2) to whole pixels inside an image of `size` (height, width): at least one pixel.

    The rectangle of which the official formats give the mask. A box without extent, or outside the image, still
    has one pixel, so that a box never loses its mask.
    """
    limits = (size[1], size[0])
    low = [min(max(round(v), 0), limit - 1) for v, limit in zip(coordinate[:2], limits, strict=True)]
    high = [min(max(round(v), least + 1), limit) for v, least, limit in zip(coordinate[2:], low, limits, strict=True)]
    return low[0], low[1], high[0], high[1]
