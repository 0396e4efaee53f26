"""Instances of overlapping windows to the instances of the image: by their masks, as RLEs of the whole image.

Two instances of neighbouring windows are the same object when they are of one class and the intersection of their
masks covers most of the smaller one. Both cut off, only what both windows see is compared. An object that a window
shows as a whole keeps that window's mask; one that every window cuts gets the union.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from pycocotools import mask as mask_api

from instseg_jax.crops import crop_rle, paste_mask
from instseg_jax.masks import compress_rle, rle_area, rle_box_xyxy_px
from instseg_jax.types import Instances
from instseg_jax.windows import Window

MIN_COVERED = 0.5  # of the smaller mask: from here on two masks are one object
MIN_WHOLE = 0.5  # of the largest part's area: a smaller "whole" object beside it is a fragment
CROWD = 2  # whole objects of its class inside a large one: so many make it a crowd, not an object
CUT_MARGIN = 2  # pixels: a mask that comes so near to a window's border is cut off by it


@dataclasses.dataclass(frozen=True)
class WindowInstances:
    """What was found in a window, in its own pixels."""

    window: Window
    instances: Instances


@dataclasses.dataclass(frozen=True)
class _Piece:
    """An instance of one window, in pixels of the image."""

    window: int  # index
    label: int
    score: float
    box: np.ndarray  # [4] xyxy, the network's
    mask: dict  # RLE of the whole image, counts as bytes
    extent: tuple[int, int, int, int]  # of the mask
    area: int
    is_cut: bool


def merge_windows(
    parts: Sequence[WindowInstances], whole: Instances | None, *, size: tuple[int, int], overlap_px: int
) -> Instances:
    """Merge what was found in windows of an image of `size` (height, width), by falling score.

    `whole` was found in the whole image at once: of it, objects longer than `overlap_px`, which no window need show
    completely, complete or join what the windows found. Instances without mask pixels are left out.
    """
    pieces = [piece for number, part in enumerate(parts) for piece in _pieces(number, part, size)]
    windows = [part.window for part in parts]
    groups, rivals = _group(pieces, windows, size)
    merged = [_resolve([pieces[i] for i in group]) for group in groups]
    merged = _without_covered(merged, groups, rivals)
    if whole is not None:
        merged = _add_large(merged, whole, size, overlap_px)
    merged.sort(key=lambda piece: -piece.score)
    return Instances(
        scores=np.array([piece.score for piece in merged], np.float32),
        labels=np.array([piece.label for piece in merged], np.int32),
        boxes_xyxy_px=np.array([piece.box for piece in merged], np.float32).reshape(-1, 4),
        masks=[{"size": list(size), "counts": piece.mask["counts"].decode("ascii")} for piece in merged],
    )


def _pieces(number: int, part: WindowInstances, size: tuple[int, int]) -> Iterator[_Piece]:
    window, found = part.window, part.instances
    # Sides of the window that are not sides of the image: there an object may go on.
    reach = np.array([window.width, window.height] * 2, np.float32)
    inner = (window.x > 0, window.y > 0, window.x + window.width < size[1], window.y + window.height < size[0])
    for i in range(len(found)):
        rle = compress_rle(found.masks[i])
        x1, y1, x2, y2 = rle_box_xyxy_px(rle)
        if x2 <= x1 or y2 <= y1:
            continue
        mask = compress_rle(paste_mask(crop_rle(rle, (x1, y1, x2, y2)), (x1 + window.x, y1 + window.y), size))
        distances = (x1, y1, window.width - x2, window.height - y2)
        yield _Piece(
            window=number,
            label=int(found.labels[i]),
            score=float(found.scores[i]),
            # A window knows nothing beyond itself: its boxes end at its sides, as those of an image do.
            box=np.clip(found.boxes_xyxy_px[i], 0, reach) + np.array([window.x, window.y] * 2, np.float32),
            mask=mask,
            extent=rle_box_xyxy_px(mask),
            area=rle_area(mask),
            is_cut=any(is_inner and d <= CUT_MARGIN for is_inner, d in zip(inner, distances, strict=True)),
        )


def _group(
    pieces: Sequence[_Piece], windows: Sequence[Window], size: tuple[int, int]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Group the pieces that are one object, with at most one of each window.

    Returns the groups, and the pairs of pieces that match too but could not be joined for that reason.
    """
    owner = list(range(len(pieces)))
    members = [[i] for i in range(len(pieces))]
    rivals = []
    for _, a, b in sorted(_matches(pieces, windows, size), reverse=True):
        first, second = owner[a], owner[b]
        if first == second:
            continue
        seen = {pieces[i].window for i in members[first]}
        if any(pieces[i].window in seen for i in members[second]):
            rivals.append((a, b))
            continue
        for i in members[second]:
            owner[i] = first
        members[first] += members[second]
        members[second] = []
    return [group for group in members if group], rivals


def _matches(
    pieces: Sequence[_Piece], windows: Sequence[Window], size: tuple[int, int]
) -> Iterator[tuple[float, int, int]]:
    """Pairs of pieces of overlapping windows that are one object: (how sure that is, index, index)."""
    by_window: list[list[int]] = [[] for _ in windows]
    for i, piece in enumerate(pieces):
        by_window[piece.window].append(i)
    corners = np.array([window.box for window in windows]).reshape(-1, 4)
    for a in range(len(windows)):
        meets = (np.minimum(corners[a, 2:], corners[:, 2:]) > np.maximum(corners[a, :2], corners[:, :2])).all(axis=1)
        for b in np.flatnonzero(meets):
            if b <= a or not by_window[a] or not by_window[b]:
                continue
            zone = (*np.maximum(corners[a, :2], corners[b, :2]), *np.minimum(corners[a, 2:], corners[b, 2:]))
            for i in by_window[a]:
                for j in by_window[b]:
                    if pieces[i].label == pieces[j].label and _boxes_meet(pieces[i].extent, pieces[j].extent):
                        covered = _covered(pieces[i], pieces[j], zone, size)
                        if covered >= MIN_COVERED:
                            # What both windows are sure of goes before what happens to cover it.
                            yield covered * min(pieces[i].score, pieces[j].score), i, j


def _boxes_meet(a: Sequence[int], b: Sequence[int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _covered(a: _Piece, b: _Piece, zone: tuple[int, int, int, int], size: tuple[int, int]) -> float:
    """Intersection over the smaller mask; of two that are cut off, only inside the zone that both windows see."""
    if not (a.is_cut and b.is_cut):
        return intersection_over_smaller(a.mask, b.mask)
    box = tuple(int(v) for v in (*np.maximum(a.extent[:2], b.extent[:2]), *np.minimum(a.extent[2:], b.extent[2:])))
    both = crop_rle(a.mask, box) & crop_rle(b.mask, box)  # type: ignore[arg-type]
    smaller = min(_area_in(piece, zone) for piece in (a, b))
    return float(both.sum() / smaller) if smaller else 0.0


def _area_in(piece: _Piece, zone: tuple[int, int, int, int]) -> int:
    x1, y1, x2, y2 = piece.extent
    box = (max(x1, int(zone[0])), max(y1, int(zone[1])), min(x2, int(zone[2])), min(y2, int(zone[3])))
    return int(crop_rle(piece.mask, box).sum()) if box[0] < box[2] and box[1] < box[3] else 0


def intersection_over_smaller(a: dict, b: dict) -> float:
    """Part of the smaller of two masks (RLEs with counts as bytes) that the other covers: 0..1."""
    # With the crowd flag pycocotools divides by the area of the first mask alone.
    return float(max(mask_api.iou([a], [b], [1])[0, 0], mask_api.iou([b], [a], [1])[0, 0]))


def _resolve(group: list[_Piece]) -> _Piece:
    """One piece for an object: the best that shows it as a whole, else the union of all."""
    largest = max(piece.area for piece in group)
    complete = [piece for piece in group if not piece.is_cut and piece.area >= MIN_WHOLE * largest]
    if complete:
        return max(complete, key=lambda piece: piece.score)
    return _union(group)


def _union(group: list[_Piece]) -> _Piece:
    if len(group) == 1:
        return group[0]
    best = max(group, key=lambda piece: piece.score)
    mask = mask_api.merge([piece.mask for piece in group])
    boxes = np.array([piece.box for piece in group])
    return dataclasses.replace(
        best,
        box=np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]),
        mask=mask,
        extent=rle_box_xyxy_px(mask),
        area=rle_area(mask),
    )


def _without_covered(merged: list[_Piece], groups: list[list[int]], rivals: list[tuple[int, int]]) -> list[_Piece]:
    """Drop the lower scored of two objects that match but were kept apart, where one covers most of the other."""
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    dropped: set[int] = set()
    for a, b in rivals:
        first, second = sorted({group_of[a], group_of[b]}, key=lambda number: -merged[number].score)
        if first in dropped or second in dropped:
            continue
        if intersection_over_smaller(merged[first].mask, merged[second].mask) >= MIN_COVERED:
            dropped.add(second)
    return [piece for number, piece in enumerate(merged) if number not in dropped]


def _add_large(merged: list[_Piece], whole: Instances, size: tuple[int, int], overlap_px: int) -> list[_Piece]:
    """Bring in the large objects that were found in the whole image, with the fragments that windows found of them."""
    everything = Window(0, 0, size[1], size[0])
    for large in _pieces(-1, WindowInstances(everything, whole), size):
        if max(large.extent[2] - large.extent[0], large.extent[3] - large.extent[1]) <= overlap_px:
            continue
        same = [
            piece
            for piece in merged
            if piece.label == large.label
            and _boxes_meet(piece.extent, large.extent)
            and intersection_over_smaller(piece.mask, large.mask) >= MIN_COVERED
        ]
        complete = [piece for piece in same if not piece.is_cut]
        if any(piece.area >= MIN_WHOLE * large.area for piece in complete):
            continue  # a window shows it as a whole, and finer
        if len(complete) >= CROWD:
            continue  # scaled down, several small objects look like one
        fragments = [piece for piece in same if piece.is_cut]
        taken = {id(piece) for piece in fragments}
        merged = [piece for piece in merged if id(piece) not in taken]
        merged.append(dataclasses.replace(_union([large, *fragments]), is_cut=False))
    return merged
