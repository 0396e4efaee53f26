"""From a source picture and its segmentations to the pixels of the network input.

Cropping, padding, flipping and turning are not carried out one after the other: a `View` remembers
which rectangle of the source is seen and how it is turned, and pixels and masks are made once, at the
end. Everything before the resize moves whole pixels, so the result equals doing each step in turn.
The random choices are in `data/transforms.py`.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from instseg_jax import masks
from instseg_jax.images import in_groups

OUTSIDE = -1  # stands for "no source pixel" where a network pixel is padding


@dataclasses.dataclass(frozen=True)
class View:
    """A rectangle of the source picture in whole pixels, then transposed, then flipped.

    The rectangle may reach beyond the picture; of the picture one sees what is in `visible`, so that
    nothing that was cropped away comes back when the rectangle grows again. `size` and all functions
    below speak of the frame that one sees, after turning.
    """

    top: int
    left: int
    height: int
    width: int
    visible: tuple[int, int, int, int]  # (top, left, bottom, right) in the source picture
    transposed: bool = False
    flip_y: bool = False
    flip_x: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what is seen."""
        return (self.width, self.height) if self.transposed else (self.height, self.width)


def whole_view(height: int, width: int) -> View:
    """See a whole picture as it is."""
    return View(0, 0, height, width, visible=(0, 0, height, width))


def move_view(view: View, y: int, x: int, height: int, width: int) -> View:
    """See the rectangle at (x, y) of a view's frame; one that reaches beyond the view pads it."""
    if view.flip_y:
        y = view.size[0] - y - height
    if view.flip_x:
        x = view.size[1] - x - width
    if view.transposed:
        y, x, height, width = x, y, width, height
    top, left, bottom, right = view.visible
    visible = (
        max(top, view.top),
        max(left, view.left),
        min(bottom, view.top + view.height),
        min(right, view.left + view.width),
    )
    return dataclasses.replace(view, top=view.top + y, left=view.left + x, height=height, width=width, visible=visible)


def flip_view(view: View, *, horizontal: bool) -> View:
    """Mirror a view left to right, or top to bottom."""
    if horizontal:
        return dataclasses.replace(view, flip_x=not view.flip_x)
    return dataclasses.replace(view, flip_y=not view.flip_y)


def turn_view(view: View) -> View:
    """Turn a view by 90 degrees counter-clockwise, as np.rot90 does."""
    return dataclasses.replace(view, transposed=not view.transposed, flip_y=not view.flip_x, flip_x=view.flip_y)


def seen_source(view: View) -> tuple[slice, slice]:
    """Rows and columns of the source picture that a view sees; empty slices when it sees none."""
    top, left, bottom, right = view.visible
    top, bottom = max(view.top, top), min(view.top + view.height, bottom)
    left, right = max(view.left, left), min(view.left + view.width, right)
    if bottom <= top or right <= left:
        return slice(0, 0), slice(0, 0)
    return slice(top, bottom), slice(left, right)


def view_pixels(image: np.ndarray, view: View, fill: Sequence[float], dtype: np.dtype) -> np.ndarray:
    """Pixels [h, w, C] of a view; `fill` is the colour beyond the picture."""
    rows, columns = seen_source(view)
    if rows.stop == rows.start:
        return np.full((*view.size, image.shape[2]), _fill_of(image.shape[2], fill)).astype(dtype)
    pixels = image[rows, columns].astype(dtype, copy=False)
    y_borders = (rows.start - view.top, view.top + view.height - rows.stop)
    x_borders = (columns.start - view.left, view.left + view.width - columns.stop)
    # Turning the picture before the border is added moves fewer pixels.
    if view.transposed:
        pixels, y_borders, x_borders = in_groups(cv2.transpose, pixels), x_borders, y_borders
    if view.flip_y:
        pixels, y_borders = in_groups(lambda x: cv2.flip(x, 0), pixels), y_borders[::-1]
    if view.flip_x:
        pixels, x_borders = in_groups(lambda x: cv2.flip(x, 1), pixels), x_borders[::-1]
    if max(*y_borders, *x_borders) > 0:
        value = _fill_of(min(pixels.shape[2], 4), fill)
        border = (*y_borders, *x_borders, cv2.BORDER_CONSTANT)
        pixels = in_groups(lambda x: cv2.copyMakeBorder(x, *border, value=value), pixels)
    return pixels


def _fill_of(channels: int, fill: Sequence[float]) -> tuple[float, ...]:
    """The colour beyond the picture for any number of channels: other than three, its mean in each."""
    return tuple(fill) if len(fill) == channels else (sum(fill) / len(fill),) * channels


def render_masks(
    segmentations: Sequence[masks.Segmentation],
    source_size: tuple[int, int],
    view: View,
    content: tuple[int, int],
    size: tuple[int, int],
    *,
    mask_stride: int,
    rasterization: str,
) -> np.ndarray:
    """Draw the masks of a view: uint8 0/1 [n, H / mask_stride, W / mask_stride] of the network input.

    "exact" draws each mask in the source picture and takes from it the pixels that the reference's
    nearest resize takes; with a stride, those of the cells' middles. "polygon" moves the points of
    polygons and draws them in the target's resolution, which is quicker and differs along the outline;
    run-length codes are always treated the first way.
    """
    canvas = (size[0] // mask_stride, size[1] // mask_stride)
    moved = [rasterization == "polygon" and not isinstance(s, dict) for s in segmentations]
    if all(moved) and _is_all_inside(view, content, size):  # the usual case, without a look at single pixels
        return _draw_polygons(segmentations, view, content, canvas, mask_stride)
    out = np.zeros((len(segmentations), *canvas), np.uint8)
    y_source, x_source = _source_positions(view, content, size, mask_stride)
    rows, columns = y_source != OUTSIDE, x_source != OUTSIDE
    inside = np.outer(columns, rows) if view.transposed else np.outer(rows, columns)
    drawn = [s for s, is_moved in zip(segmentations, moved, strict=True) if is_moved]
    out[np.array(moved, bool)] = _draw_polygons(drawn, view, content, canvas, mask_stride) * inside
    for i in np.flatnonzero(np.logical_not(moved)).tolist():
        _copy_mask(segmentations[i], source_size, y_source, x_source, view.transposed, out[i])
    return out


def map_points(points: np.ndarray, view: View, content: tuple[int, int]) -> np.ndarray:
    """Move points [P, 2] (x, y) of the source picture into the network input."""
    moved = points - (view.left, view.top)
    if view.transposed:
        moved = np.ascontiguousarray(moved[:, ::-1])
    height, width = view.size
    if view.flip_x:
        np.subtract(width, moved[:, 0], out=moved[:, 0])
    if view.flip_y:
        np.subtract(height, moved[:, 1], out=moved[:, 1])
    moved *= (content[1] / width, content[0] / height)
    return moved


def _is_all_inside(view: View, content: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether every pixel of the network input shows one of the picture."""
    top, left, bottom, right = view.visible
    is_within = top <= view.top and left <= view.left
    return is_within and view.top + view.height <= bottom and view.left + view.width <= right and content == size


def _draw_polygons(
    segmentations: Sequence[masks.Segmentation],
    view: View,
    content: tuple[int, int],
    canvas: tuple[int, int],
    mask_stride: int,
) -> np.ndarray:
    """Draw polygons in the target's resolution: uint8 0/1 [n, height, width] of the canvas.

    Each object is drawn in its own box (see `_draw_in_its_box`); numpy works on the points of all of them at once,
    since one of its calls takes as long as a thousand points.
    """
    out = np.zeros((len(segmentations), *canvas), np.uint8)
    if not len(segmentations):
        return out
    parts = [points for polygons in segmentations for points in polygons]
    ends = list(itertools.accumulate(map(len, parts)))
    part_counts = list(map(len, segmentations))
    moved = map_points(np.concatenate(parts), view, content)
    moved /= mask_stride
    first_parts = [0, *itertools.accumulate(part_counts[:-1])]
    starts = [ends[first] - len(parts[first]) for first in first_parts]
    low = np.maximum(np.floor(np.minimum.reduceat(moved, starts)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(np.maximum.reduceat(moved, starts)).astype(int) + 2, canvas[::-1])
    flat = moved.ravel()
    for i, ((x1, y1), (x2, y2)) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if x2 > x1 and y2 > y1:
            first = first_parts[i]
            own = [flat[2 * (ends[j] - len(parts[j])) : 2 * ends[j]] for j in range(first, first + part_counts[i])]
            out[i, y1:y2, x1:x2] = masks.rasterize_columns(own, y2, x1, x2)[y1:]
    return out


def _copy_mask(
    segmentation: masks.Segmentation,
    source_size: tuple[int, int],
    y_source: np.ndarray,
    x_source: np.ndarray,
    transposed: bool,
    out: np.ndarray,
) -> None:
    """Write the source mask's pixels at the given positions to `out`; only the object's box is touched."""
    y, x, source = _draw_in_its_box(segmentation, source_size)
    rows = np.flatnonzero((y_source >= y) & (y_source < y + source.shape[0]))
    columns = np.flatnonzero((x_source >= x) & (x_source < x + source.shape[1]))
    if not len(rows) or not len(columns):
        return
    seen = source[(y_source[rows] - y)[:, None], (x_source[columns] - x)[None]]
    if transposed:
        rows, columns, seen = columns, rows, seen.T
    out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = seen


def _draw_in_its_box(segmentation: masks.Segmentation, size: tuple[int, int]) -> tuple[int, int, np.ndarray]:
    """Draw a segmentation of a picture of `size`: the part of it that it lies in, and where that part is (y, x).

    The picture is cut off below and right of the object alone: of a polygon that was moved, pycocotools rounds a
    border that lies in the middle between two pixels otherwise, now and then.
    """
    if isinstance(segmentation, dict):
        return 0, 0, masks.segmentation_to_mask(segmentation, *size)
    low = np.min([points.min(axis=0) for points in segmentation], axis=0)
    high = np.max([points.max(axis=0) for points in segmentation], axis=0)
    x1, y1 = np.maximum(np.floor(low).astype(int) - 1, 0).tolist()
    x2, y2 = np.minimum(np.ceil(high).astype(int) + 2, size[::-1]).tolist()
    if x2 <= x1 or y2 <= y1:
        return 0, 0, np.zeros((0, 0), np.uint8)
    return y1, x1, masks.rasterize_columns([points.ravel() for points in segmentation], y2, x1, x2)[y1:]


def _source_positions(
    view: View, content: tuple[int, int], size: tuple[int, int], mask_stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Source row and source column of each mask row / column (swapped when the view is transposed)."""
    along_y = (view.flip_y, content[0], size[0])
    along_x = (view.flip_x, content[1], size[1])
    if view.transposed:
        along_y, along_x = along_x, along_y
    return (
        _positions(view.top, view.height, view.visible[0::2], *along_y, mask_stride),
        _positions(view.left, view.width, view.visible[1::2], *along_x, mask_stride),
    )


def _positions(
    start: int, length: int, visible: tuple[int, int], flipped: bool, content: int, padded: int, mask_stride: int
) -> np.ndarray:
    # OpenCV's own nearest resize of 0, 1, 2, ... says which pixel it takes; float32 holds them exactly.
    ramp = np.arange(length, dtype=np.float32)[None]
    taken = cv2.resize(ramp, (content, 1), interpolation=cv2.INTER_NEAREST)[0].astype(np.int64)
    if flipped:
        taken = length - 1 - taken
    taken += start
    positions = np.full(padded, OUTSIDE, np.int64)
    positions[:content] = np.where((taken >= visible[0]) & (taken < visible[1]), taken, OUTSIDE)
    return positions[mask_stride // 2 :: mask_stride]
