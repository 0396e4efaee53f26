"""From the network's outputs to instances in pixels of the original image.

`select_detections` runs on the device, inside jit; everything after it is numpy on the host, where every image
may have its own size. Masks are upsampled as logits, in one bilinear step from the network's mask grid straight
to the original image, then thresholded, as the reference implementation does (PaddleDetection, DETRMaskPostProcess).

A mask of the original size never exists as floats as a whole: only the region that can hold mask pixels is
sampled, a block of columns at a time, and each block becomes runs of a COCO RLE at once. Reading and drawing of
results is in `results.py` and `visualize.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from instseg_jax import boxes
from instseg_jax.masks import edges_to_rle
from instseg_jax.types import Detections, FactoredOutputs, Instances, Outputs

# Pixels sampled at a time: few enough for a core's cache, enough to hide the cost of the calls.
BLOCK_PIXELS = 1 << 18


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """Bilinear weights of one axis: pixel p is grid[lower[p]] * (1 - weight[p]) + grid[upper[p]] * weight[p]."""

    lower: np.ndarray  # [pixels] int
    upper: np.ndarray  # [pixels] int, lower or lower + 1
    weight: np.ndarray  # [pixels] float32, 0..1

    def __getitem__(self, pixels: slice) -> "_Sampling":
        return _Sampling(self.lower[pixels], self.upper[pixels], self.weight[pixels])


def select_detections(outputs: Outputs | FactoredOutputs, *, num_detections: int) -> Detections:
    """Keep the best (query, class) pairs of each image, by falling score.

    A query can appear several times, with different classes. T = min(num_detections, Q * K). Boxes become
    normalised corners that are not clipped. Raises ValueError for fewer than one. Source: PaddleDetection,
    DETRMaskPostProcess.
    """
    if num_detections < 1:
        raise ValueError(f"num_detections must be at least 1, got {num_detections}.")
    batch_size, num_queries, num_classes = np.shape(outputs.class_logits)
    scores = jax.nn.sigmoid(jnp.asarray(outputs.class_logits, jnp.float32))  # float32: half precision makes ties
    count = min(num_detections, num_queries * num_classes)
    top_scores, index = jax.lax.top_k(scores.reshape(batch_size, -1), count)
    query = index // num_classes
    boxes_xyxy = boxes.cxcywh_to_xyxy(jnp.asarray(outputs.boxes, jnp.float32))
    return Detections(
        scores=top_scores,
        labels=(index % num_classes).astype(jnp.int32),
        boxes_xyxy=jnp.take_along_axis(boxes_xyxy, query[..., None], axis=1),
        mask_logits=outputs.masks_of(query),
    )


def upsample_masks(
    mask_logits: Float[np.ndarray, "T h w"],
    *,
    input_size: tuple[int, int],
    content_size: tuple[int, int],
    original_size: tuple[int, int],
    threshold: float = 0.5,
) -> Bool[np.ndarray, "T height width"]:
    """Resize mask logits [T, h, w] to binary masks [T, height, width] bool of the original image.

    The grid spans the network input of `input_size`; the image fills `content_size` of it from the top left
    corner (all of it when stretched). Half-pixel bilinear without antialiasing, also when the result is smaller
    than the grid. `threshold` is a probability. Holds all masks at once: for many or large images
    use `encode_masks`, whose masks are the same to the bit.
    """
    logits = _above_threshold(mask_logits, threshold)
    rows, columns = _samplings(logits.shape[1:], input_size, content_size, original_size)
    masks = np.empty((len(logits), *original_size), bool)
    for mask, grid in zip(masks, logits, strict=True):
        by_row = np.ascontiguousarray(_interpolate(grid, rows).T)
        mask[:] = (_interpolate(by_row, columns) > 0).T
    return masks


def encode_masks(
    mask_logits: Float[np.ndarray, "T h w"],
    *,
    input_size: tuple[int, int],
    content_size: tuple[int, int],
    original_size: tuple[int, int],
    threshold: float = 0.5,
) -> list[dict]:
    """Resize mask logits [T, h, w] to COCO RLEs of the original image, with little memory.

    Arguments and masks are those of `upsample_masks`, but only the region that can hold mask pixels is sampled,
    a block of columns at a time. Returns T dicts {"size": [height, width], "counts": str}.
    """
    logits = _above_threshold(mask_logits, threshold)
    rows, columns = _samplings(logits.shape[1:], input_size, content_size, original_size)
    return [edges_to_rle(_mask_edges(grid, rows, columns), original_size) for grid in logits]


def detections_to_instances(
    detections: Detections,
    index: int,
    *,
    input_size: tuple[int, int],
    content_size: tuple[int, int],
    original_size: tuple[int, int],
    score_threshold: float = 0.0,
) -> Instances:
    """Turn image `index` of a batch of detections into instances in pixels of its original image.

    Sizes are (height, width): of the network input, of the part of it that the image fills from the top left
    corner, and of the image file. Instances below `score_threshold` are left out before any mask work.
    """
    scores = np.asarray(detections.scores)[index].astype(np.float32)
    keep = np.flatnonzero(scores >= score_threshold)
    # Normalised by the network input; the image fills content/input of it.
    scale_y, scale_x = (
        original * size / content
        for original, size, content in zip(original_size, input_size, content_size, strict=True)
    )
    boxes_xyxy = np.asarray(detections.boxes_xyxy)[index][keep].astype(np.float32)
    return Instances(
        scores=scores[keep],
        labels=np.asarray(detections.labels)[index][keep].astype(np.int32),
        boxes_xyxy_px=boxes_xyxy * np.array([scale_x, scale_y, scale_x, scale_y], np.float32),
        masks=encode_masks(
            np.asarray(detections.mask_logits)[index][keep],
            input_size=input_size,
            content_size=content_size,
            original_size=original_size,
        ),
    )


def _above_threshold(mask_logits: np.ndarray, threshold: float) -> np.ndarray:
    """Shift logits [T, h, w] to float32 that is positive exactly where the probability is above `threshold`."""
    if not 0 < threshold < 1:
        raise ValueError(f"A mask threshold is a probability between 0 and 1, got {threshold}.")
    logits = np.asarray(mask_logits, np.float32)
    return logits if threshold == 0.5 else logits - np.float32(math.log(threshold / (1 - threshold)))


def _samplings(
    grid_size: tuple[int, int],
    input_size: tuple[int, int],
    content_size: tuple[int, int],
    original_size: tuple[int, int],
) -> tuple[_Sampling, _Sampling]:
    """Bilinear weights of the rows and of the columns of the original image."""
    sizes = zip(("height", "width"), grid_size, input_size, content_size, original_size, strict=True)
    rows, columns = (_sampling(*args) for args in sizes)
    return rows, columns


def _sampling(side: str, cells: int, input_length: int, content_length: int, pixels: int) -> _Sampling:
    """Bilinear weights along one axis, from cell centres to the centres of the original's pixels."""
    if not 1 <= content_length <= input_length:
        raise ValueError(f"The content {side} must be 1..{input_length} (the network input), got {content_length}.")
    if pixels < 1:
        raise ValueError(f"The original {side} must be at least 1 pixel, got {pixels}.")
    # The part of the grid that the image fills need not end on a whole cell. The last cell that it touches is the
    # last one used: cells beyond it describe padding, not the image.
    last = -(-content_length * cells // input_length) - 1
    centres = (np.arange(pixels) + 0.5) * (content_length * cells / (pixels * input_length)) - 0.5
    position = np.clip(centres, 0, last)  # float64: float32 is off by 1e-4 cells in wide images
    lower = position.astype(np.intp)
    return _Sampling(lower, np.minimum(lower + 1, last), (position - lower).astype(np.float32))


def _interpolate(grid: np.ndarray, sampling: _Sampling) -> np.ndarray:
    """Sample [cells, m] along its first axis: [pixels, m] float32.

    Products of each end with its own weight, not end + difference * weight: ends that are both positive (or both
    not) then give a result that is so too, without exception from rounding, so skipping them changes nothing.
    """
    values = grid.take(sampling.lower, axis=0)
    values *= (1 - sampling.weight)[:, None]
    upper = grid.take(sampling.upper, axis=0)
    upper *= sampling.weight[:, None]
    values += upper
    return values


def _support(positive: np.ndarray, sampling: _Sampling) -> tuple[int, int]:
    """Range of pixels along one axis that touch a positive cell, from `positive` [cells] bool."""
    cells = np.flatnonzero(positive)
    if not len(cells):
        return 0, 0
    return int(np.searchsorted(sampling.upper, cells[0])), int(np.searchsorted(sampling.lower, cells[-1], "right"))


def _mask_edges(logits: np.ndarray, rows: _Sampling, columns: _Sampling) -> np.ndarray:
    """Positions, down the columns of the original image, where its mask of logits [h, w] > 0 begins and ends.

    Non-decreasing; a run that goes on from one column into the next leaves a pair of equal positions.
    """
    height = len(rows.lower)
    positive = logits > 0
    top, bottom = _support(np.any(positive, axis=1), rows)
    left, right = _support(np.any(positive, axis=0), columns)
    if top >= bottom or left >= right:
        return np.zeros(0, np.intp)
    first, last = int(columns.lower[left]), int(columns.upper[right - 1])
    # Columns first in memory: that is the order of an RLE. A background pixel after each column closes its runs.
    step = bottom - top + 1
    grid = np.zeros((last - first + 1, step), np.float32)
    grid[:, :-1] = _interpolate(logits[:, first : last + 1], rows[top:bottom]).T
    is_inside = grid > 0
    crossings = np.flatnonzero(is_inside[1:] != is_inside[:-1])
    edges = []
    block = max(1, BLOCK_PIXELS // step)
    for start in range(left, right, block):
        part = columns[start : min(start + block, right)]
        mask = np.zeros(1 + len(part.lower) * step, bool)  # with a background pixel before the first column, too
        # Between two columns of the grid that are both inside, or both outside, so is every pixel: `_interpolate`
        # says why. Only where they differ is there anything to compute.
        np.take(is_inside, part.lower - first, axis=0, out=mask[1:].reshape(-1, step))
        pixels, inside = _sample_crossings(grid, crossings, part, first)
        mask[1:][pixels] = inside
        column, row = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), step)
        edges.append((column + start) * height + (row + top))
    return np.concatenate(edges)


def _sample_crossings(
    grid: np.ndarray, crossings: np.ndarray, columns: _Sampling, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the given columns that lie between positions of `grid` of different sign.

    `grid` [cells, step] begins with the network's column `first`; `crossings` are the flat positions in it whose
    successor in the next column is on the other side of 0.

    Returns: flat positions in [columns, step], and whether they are inside.
    """
    step = grid.shape[1]
    begins = np.searchsorted(columns.lower, np.arange(first, first + len(grid)))
    cell, row = np.divmod(crossings, step)
    counts = begins[cell + 1] - begins[cell]
    at = np.repeat(crossings, counts)
    column = np.arange(len(at)) + np.repeat(begins[cell] - (np.cumsum(counts) - counts), counts)
    weight = columns.weight[column]
    values = grid.reshape(-1)
    inside = values[at] * (1 - weight) + values[at + step] * weight > 0
    return column * step + np.repeat(row, counts), inside
