"""Binary masks, polygons and COCO run-length codes: pure functions on the host (numpy, pycocotools).

A segmentation is either a tuple of polygons (float64 [P, 2] arrays of (x, y) in pixels of the image,
the union of which is the object) or a COCO RLE dict {"size": [height, width], "counts": ...}.
Reading annotation files is `data/coco.py`; turning masks with an augmentation is `data/rasterize.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64, Shaped, UInt8
from pycocotools import mask as coco_mask

from instseg_jax.messages import quote

Segmentation = tuple[np.ndarray, ...] | dict[str, Any]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a binary mask [H, W] as a COCO RLE {"size": [H, W], "counts": str}, ready for JSON.

    Raises ValueError for another number of dimensions.
    """
    if mask.ndim != 2:
        raise ValueError(f"A mask must have shape [height, width], got {list(mask.shape)}.")
    rle = coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: dict[str, Any]) -> UInt8[np.ndarray, "H W"]:
    """Decode a COCO RLE (counts as str, bytes or a list of run lengths) to a uint8 0/1 mask [H, W]."""
    return coco_mask.decode(compress_rle(rle))


def compress_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """Return the RLE with compressed counts as bytes, the form that pycocotools works on.

    Raises ValueError when size or counts are malformed. Compressed counts from a file that is not
    trusted need `check_rle` once: pycocotools decodes too few runs to uninitialised memory.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(_is_count(n) for n in size):
        raise ValueError(f"An RLE's size must be [height, width] in whole pixels, got {quote(size)}.")
    height, width = (int(n) for n in size)
    if isinstance(counts, (list, tuple)):
        if not all(_is_count(n) for n in counts):
            raise ValueError("An RLE's counts must be whole numbers that are not negative.")
        if sum(counts) != height * width:
            raise ValueError(f"An RLE's counts must add up to {height} * {width}, got {sum(counts)}.")
        return coco_mask.frPyObjects({"size": [height, width], "counts": [int(n) for n in counts]}, height, width)
    if isinstance(counts, str):
        counts = counts.encode("utf-8")
    if not isinstance(counts, bytes):
        raise ValueError(f"An RLE's counts must be a string or a list, got {type(counts).__name__}.")
    return {"size": [height, width], "counts": counts}


def check_rle(rle: dict[str, Any]) -> None:
    """Raise ValueError unless the runs of an RLE with compressed counts add up to height * width."""
    total, runs = rle["size"][0] * rle["size"][1], rle_runs(rle)
    if (runs < 0).any() or runs.sum() != total:
        raise ValueError(f"An RLE's counts must add up to its {total} pixels, got {int(runs.sum())}.")


def rle_runs(rle: dict[str, Any]) -> Int64[np.ndarray, " r"]:
    """Decode an RLE's compressed counts (bytes) to run lengths [r] int64, down the columns, background first.

    Raises ValueError for counts that no encoder makes; whether they fit the size is for `check_rle` to say.
    """
    digits = np.frombuffer(rle["counts"], np.uint8).astype(np.int64) - 48
    # A run is a little-endian base-32 number, 5 bits a character; 0x20 marks that more characters follow.
    ends = np.flatnonzero((digits & 0x20) == 0)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not len(ends) or ends[-1] != len(digits) - 1:
        raise ValueError("An RLE's counts are cut off or hold characters that no run-length code has.")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:
        raise ValueError("An RLE's counts hold a run that is longer than any image.")
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((digits & 0x1F) << shifts, starts)
    runs -= np.where(digits[ends] & 0x10, 1 << (5 * lengths), 0)  # 0x10 of the last character is the sign
    # From the fourth run on the code holds the difference to the run two before.
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def edges_to_rle(edges: Int[np.ndarray, " n"], size: tuple[int, int]) -> dict[str, Any]:
    """Compress the positions where the runs of a mask of `size` (height, width) begin and end, down its columns.

    Positions do not fall; equal ones cancel each other. Returns {"size": [height, width], "counts": str}.
    """
    repeated = np.flatnonzero(edges[1:] == edges[:-1])
    edges = np.delete(edges, np.concatenate([repeated, repeated + 1]))
    height, width = map(int, size)
    end = [] if len(edges) and edges[-1] == height * width else [height * width]
    counts = np.diff(np.concatenate([[0], edges, end])).astype(np.uint32)
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def rasterize_polygons(
    polygons: Sequence[np.ndarray], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width}"]:
    """Draw the union of polygons [P, 2] (x, y) on a uint8 0/1 canvas [height, width], as pycocotools does."""
    return coco_mask.decode(_polygons_to_rle(polygons, height, width))


def rasterize_columns(
    polygons: list[np.ndarray], height: int, first: int, last: int
) -> UInt8[np.ndarray, "{height} {last-first}"]:
    """Draw columns `first` to `last` (exclusive) of what `rasterize_polygons` draws, left of which nothing may lie.

    `polygons`: one or more, flat [2 P] float64, of at least three points each. Nothing is checked or converted:
    an object takes some ten microseconds, and so would that. Most of them go into pixels that are written, hence
    the columns.
    """
    parts = coco_mask.frPyObjects(polygons, height, last)
    rle = parts[0] if len(parts) == 1 else coco_mask.merge(parts)
    counts = _shorten_first_run(rle["counts"], height * first)
    return coco_mask.decode([{"size": [height, last - first], "counts": counts}])[:, :, 0]


def segmentation_to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """Return a segmentation as an RLE (counts as bytes) of a height x width image.

    Raises ValueError when an RLE was made for another size.
    """
    if not isinstance(segmentation, dict):
        return _polygons_to_rle(segmentation, height, width)
    rle = compress_rle(segmentation)
    if rle["size"] != [height, width]:
        raise ValueError(f"The RLE is for {rle['size'][0]}x{rle['size'][1]} (height x width), not {height}x{width}.")
    return rle


def segmentation_to_mask(segmentation: Segmentation, height: int, width: int) -> UInt8[np.ndarray, "{height} {width}"]:
    """Draw a segmentation as a uint8 0/1 mask [height, width]."""
    return coco_mask.decode(segmentation_to_rle(segmentation, height, width))


def rle_area(rle: dict[str, Any]) -> int:
    """Count the pixels of an RLE with compressed counts."""
    return int(coco_mask.area(rle))


def rle_box_xyxy_px(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return the extents (x1, y1, x2, y2) of an RLE, x2 and y2 exclusive; all 0 for an empty one."""
    x, y, w, h = (int(v) for v in coco_mask.toBbox(rle))
    return x, y, x + w, y + h


def mask_box_xyxy_px(mask: Shaped[np.ndarray, "H W"]) -> tuple[int, int, int, int] | None:
    """Return the extents (x1, y1, x2, y2) of a mask [H, W], x2 and y2 exclusive; None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _polygons_to_rle(polygons: Sequence[np.ndarray], height: int, width: int) -> dict[str, Any]:
    # pycocotools takes a list of four numbers for a box: fewer than three points must not get there.
    if any(len(polygon) < 3 for polygon in polygons):
        raise ValueError("A polygon needs at least 3 points.")
    if not len(polygons):
        return coco_mask.encode(np.zeros((height, width), np.uint8, order="F"))
    parts = coco_mask.frPyObjects([np.asarray(p, np.float64).reshape(-1) for p in polygons], height, width)
    return parts[0] if len(parts) == 1 else coco_mask.merge(parts)


def _shorten_first_run(counts: bytes, pixels: int) -> bytes:
    """Take pixels from the first run of compressed counts (see `rle_runs` for their form), which must have them."""
    run, length = 0, 0
    while True:
        digit = counts[length] - 48
        run |= (digit & 0x1F) << 5 * length
        length += 1
        if not digit & 0x20:
            break
    run -= pixels
    digits = bytearray()
    while run > 0xF:  # 0x10 of the last character is the sign
        digits.append((run & 0x1F | 0x20) + 48)
        run >>= 5
    digits.append(run + 48)
    return bytes(digits) + counts[length:]


def _is_count(number: Any) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool) and bool(number >= 0)
