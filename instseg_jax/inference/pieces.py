"""Pieces of objects as windows show them: their masks in pixels of the image, and what two of them have in common."""

import dataclasses
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from instseg_jax.crops import crop_rle, paste_mask
from instseg_jax.masks import compress_rle, mask_box_xyxy_px, rle_box_xyxy_px
from instseg_jax.types import Instances
from instseg_jax.windows import Window

CUT_MARGIN = 2  # pixels: a mask that comes so near to a window's border is cut off by it
MIN_GAP = 4  # pixels between masks that lie apart: row houses touch
# A connected part of two masks is the same from this IoU on, and counts from this share of the smaller mask on.
MIN_SAME, MIN_PART = 0.8, 0.05
# Windows that lie further apart, in rows or columns of windows, are compared through those between them first:
# at an overlap of 0.9 each object is in 400 windows.
NEAR = 2


@dataclasses.dataclass(frozen=True)
class WindowInstances:
    """What was found in a window, in its own pixels."""

    window: Window
    instances: Instances


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one window, or several, show of an object, in pixels of the image."""

    windows: frozenset[int]  # indices
    seen: tuple[int, int, int, int]  # what these windows see, xyxy
    label: int
    score: float
    box: np.ndarray  # [4] xyxy, the network's
    extent: tuple[int, int, int, int]  # of the mask, xyxy
    # The mask inside its extent, eight pixels of a row a byte: bytes begin where x of the image is a multiple of 8.
    bits: np.ndarray  # [rows, bytes] uint8
    area: int
    is_cut: bool

    def pixels(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """The mask in a rectangle inside its extent, as booleans."""
        first = box[0] // 8
        part = self._bytes((first * 8, box[1], box[2], box[3]))
        rows = np.unpackbits(part, axis=1, count=box[2] - first * 8)
        return rows[:, box[0] - first * 8 :].view(bool)

    def to_rle(self, size: tuple[int, int]) -> dict:
        """The mask as the RLE of an image of `size` (height, width)."""
        return paste_mask(self.pixels(self.extent), self.extent[:2], size)

    def _bytes(self, box: tuple[int, int, int, int]) -> np.ndarray:
        x1, y1 = self.extent[0] // 8, self.extent[1]
        return self.bits[box[1] - y1 : box[3] - y1, box[0] // 8 - x1 : -(-box[2] // 8) - x1]


def window_pieces(number: int, part: WindowInstances, size: tuple[int, int]) -> Iterator[Piece]:
    """The pieces of window `number` of an image of `size` (height, width); masks without pixels are left out."""
    window, found = part.window, part.instances
    # Sides of the window that are not sides of the image: there an object may go on.
    reach = np.array([window.width, window.height] * 2, np.float32)
    inner = (window.x > 0, window.y > 0, window.x + window.width < size[1], window.y + window.height < size[0])
    for i in range(len(found)):
        rle = compress_rle(found.masks[i])
        x1, y1, x2, y2 = rle_box_xyxy_px(rle)
        if x2 <= x1 or y2 <= y1:
            continue
        corner = x1 + window.x, y1 + window.y
        # A window may reach beyond the image.
        inside = (x1, y1, min(x2, size[1] - window.x), min(y2, size[0] - window.y))
        mask = crop_rle(rle, inside) if inside[0] < inside[2] and inside[1] < inside[3] else np.zeros((0, 0), np.uint8)
        if inside != (x1, y1, x2, y2):
            left = mask_box_xyxy_px(mask)
            if left is None:
                continue
            mask = mask[left[1] : left[3], left[0] : left[2]]
            corner = corner[0] + left[0], corner[1] + left[1]
        distances = (x1, y1, window.width - x2, window.height - y2)
        yield Piece(
            windows=frozenset([number]),
            seen=window.box,
            label=int(found.labels[i]),
            score=float(found.scores[i]),
            # A window knows nothing beyond itself: its boxes end at its sides, as those of an image do.
            box=np.clip(found.boxes_xyxy_px[i], 0, reach) + np.array([window.x, window.y] * 2, np.float32),
            is_cut=any(is_inner and d <= CUT_MARGIN for is_inner, d in zip(inner, distances, strict=True)),
            **measured(mask, corner),
        )


def measured(mask: np.ndarray, corner: tuple[int, int]) -> dict:
    """The fields of a piece that follow from its mask [h, w], which touches all its sides, at `corner` (x, y)."""
    extent = (*corner, corner[0] + mask.shape[1], corner[1] + mask.shape[0])
    return {
        "extent": extent,
        "bits": np.packbits(np.pad(mask, ((0, 0), (corner[0] % 8, 0))), axis=1),
        "area": int(np.count_nonzero(mask)),
    }


def united(pieces: Sequence[Piece]) -> dict:
    """The fields of a piece that follow from its mask, of the union of several."""
    extents = np.array([piece.extent for piece in pieces])
    (x1, y1), (x2, y2) = extents[:, :2].min(axis=0).tolist(), extents[:, 2:].max(axis=0).tolist()
    bits = np.zeros((y2 - y1, -(-x2 // 8) - x1 // 8), np.uint8)
    for piece in pieces:
        left, top = piece.extent[0] // 8 - x1 // 8, piece.extent[1] - y1
        height, width = piece.bits.shape
        bits[top : top + height, left : left + width] |= piece.bits
    return {"extent": (x1, y1, x2, y2), "bits": bits, "area": int(np.bitwise_count(bits).sum(dtype=np.int64))}


def meeting_pairs(pieces: Sequence[Piece], places: np.ndarray | None) -> Iterator[tuple[int, int]]:
    """Pairs of pieces of different windows whose extents meet: (index, larger index).

    `places` [windows, 2] are the column and row of each window, for pieces of one window each: then only windows at
    most NEAR columns and rows apart. A sweep from left to right: the work follows the pairs, not the square.
    """
    extents = np.array([piece.extent for piece in pieces]).reshape(-1, 4)
    order = np.argsort(extents[:, 0], kind="stable")
    x1, y1, x2, y2 = extents[order].T
    if places is not None:
        place = places[[next(iter(pieces[i].windows)) for i in order]]
    for k, i in enumerate(order):
        end = np.searchsorted(x1, x2[k], side="left")
        meets = (y1[k + 1 : end] < y2[k]) & (y2[k + 1 : end] > y1[k])
        if places is not None:
            distance = np.abs(place[k + 1 : end] - place[k]).max(axis=1)
            meets &= (distance <= NEAR) & (distance > 0)
        for j in order[k + 1 : end][meets]:
            if pieces[i].windows.isdisjoint(pieces[j].windows):
                yield (int(i), int(j)) if i < j else (int(j), int(i))


def boxes_meet(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two rectangles xyxy have an area in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _intersection(a: Sequence[int], b: Sequence[int]) -> tuple[int, int, int, int]:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def covered_part(a: Piece, b: Piece) -> float:
    """Intersection over the smaller mask; of two that are cut off, only inside the zone that both windows see."""
    if not (a.is_cut and b.is_cut):
        return _shared_area(a, b) / min(a.area, b.area)
    smaller = min(_area_in(piece, _intersection(a.seen, b.seen)) for piece in (a, b))
    return _shared_area(a, b) / smaller if smaller else 0.0


def share_a_part(a: Piece, b: Piece) -> bool:
    """Whether a connected part of both masks, inside the zone that the windows of both see, is the same.

    It must be a notable part of the smaller mask. Two windows then show one object, even if they show more of it that
    the other does not.
    """
    if _shared_area(a, b) < MIN_PART * min(a.area, b.area):
        return False
    zone = _intersection(a.seen, b.seen)
    box = (min(a.extent[0], b.extent[0]), min(a.extent[1], b.extent[1]), 0, 0)
    box = _intersection((*box[:2], max(a.extent[2], b.extent[2]), max(a.extent[3], b.extent[3])), zone)
    parts = []
    for piece in (a, b):
        inner = _intersection(piece.extent, box)
        mask = np.zeros((box[3] - box[1], box[2] - box[0]), np.uint8)
        mask[inner[1] - box[1] : inner[3] - box[1], inner[0] - box[0] : inner[2] - box[0]] = piece.pixels(inner)
        parts.append(cv2.connectedComponents(mask))
    (count_a, numbers_a), (count_b, numbers_b) = parts
    pairs = numbers_a.astype(np.int64) * count_b + numbers_b
    shared = np.bincount(pairs.ravel(), minlength=count_a * count_b).reshape(count_a, count_b)
    union = shared.sum(axis=1, keepdims=True) + shared.sum(axis=0, keepdims=True) - shared
    is_same = (shared >= MIN_SAME * union) & (shared >= MIN_PART * min(a.area, b.area))
    return bool(is_same[1:, 1:].any())


def agreed_part(a: Piece, b: Piece) -> tuple[float, float]:
    """Intersection over union inside the zone that the windows of both see, and the least part of either mask there."""
    zone = _intersection(a.seen, b.seen)
    areas = [_area_in(piece, zone) for piece in (a, b)]
    if not all(areas):
        return 0.0, 0.0
    both = _shared_area(a, b)
    return both / (sum(areas) - both), min(areas[0] / a.area, areas[1] / b.area)


def _shared_area(a: Piece, b: Piece) -> int:
    box = _intersection(a.extent, b.extent)
    if not boxes_meet(a.extent, b.extent):
        return 0
    return int(np.bitwise_count(a._bytes(box) & b._bytes(box)).sum(dtype=np.int64))


def _area_in(piece: Piece, zone: Sequence[int]) -> int:
    box = _intersection(piece.extent, zone)
    if box == piece.extent:
        return piece.area
    return int(np.count_nonzero(piece.pixels(box))) if box[0] < box[2] and box[1] < box[3] else 0


def intersection_over_smaller(a: Piece, b: Piece) -> float:
    """Part of the smaller of two masks that the other covers: 0..1."""
    return _shared_area(a, b) / min(a.area, b.area)


def lie_apart(a: Piece, b: Piece) -> bool:
    """Whether more than MIN_GAP pixels lie between two masks."""
    near = (a.extent[0] - MIN_GAP, a.extent[1] - MIN_GAP, a.extent[2] + MIN_GAP, a.extent[3] + MIN_GAP)
    if not boxes_meet(near, b.extent):
        return True
    common = _intersection(near, b.extent)
    grown = cv2.dilate(np.pad(a.pixels(a.extent).view(np.uint8), MIN_GAP), np.ones((2 * MIN_GAP + 1,) * 2, np.uint8))
    part = grown[common[1] - near[1] : common[3] - near[1], common[0] - near[0] : common[2] - near[0]]
    return not (part.view(bool) & b.pixels(common)).any()
