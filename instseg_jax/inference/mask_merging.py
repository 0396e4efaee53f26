"""Instances of overlapping windows to the instances of the image: by their masks.

Two instances of neighbouring windows are the same object when they are of one class and the intersection of their
masks covers most of the smaller one. Both cut off, only what both windows see is compared. An object that a window
shows as a whole keeps that window's mask; one that every window cuts gets the union. Of one window an object may have
several pieces, where the window's border cuts them and they lie apart: the arms of an E, the bends of a river. Windows
that call the same pixels otherwise still show one object.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from instseg_jax.inference.pieces import (
    NEAR,
    Piece,
    WindowInstances,
    agreed_part,
    boxes_meet,
    covered_part,
    intersection_over_smaller,
    lie_apart,
    meeting_pairs,
    share_a_part,
    united,
    window_pieces,
)
from instseg_jax.types import Instances
from instseg_jax.windows import Window

MIN_COVERED = 0.5  # of the smaller mask: from here on two masks are one object
MIN_WHOLE = 0.5  # of the largest part's area: a smaller "whole" object beside it is a fragment
CROWD = 2  # whole objects of its class inside a large one: so many make it a crowd, not an object
# Masks of two classes are one object where they agree (IoU in what both windows see), and enough of both is seen.
MIN_AGREED = 0.7
MIN_SHARED = 0.1


@dataclasses.dataclass(frozen=True)
class Match:
    """Two pieces that show one object."""

    is_one_class: bool
    sureness: float
    first: int
    second: int

    @property
    def order(self) -> tuple[bool, float, int, int]:
        """What matches are sorted by: the highest goes first."""
        return self.is_one_class, self.sureness, self.first, self.second


def merge_windows(
    parts: Sequence[WindowInstances], whole: Instances | None, *, size: tuple[int, int], overlap_px: int
) -> Instances:
    """Merge what was found in windows of an image of `size` (height, width), by falling score.

    `whole` was found in the whole image at once: of it, objects longer than `overlap_px`, which no window need show
    completely, complete or join what the windows found. Instances without mask pixels are left out.
    """
    pieces = [piece for number, part in enumerate(parts) for piece in window_pieces(number, part, size)]
    corners = np.array([(part.window.x, part.window.y) for part in parts], np.int64).reshape(-1, 2)
    places = np.stack([np.unique(corners[:, i], return_inverse=True)[1] for i in (0, 1)], axis=1)  # column, row
    merged = _join(pieces, places)
    if _meet_far_apart(parts):
        merged = _join(merged, None)
    if whole is not None:
        everything = WindowInstances(Window(0, 0, size[1], size[0]), whole)
        merged = add_large(merged, list(window_pieces(-1, everything, size)), overlap_px)
    merged.sort(key=lambda piece: -piece.score)
    return Instances(
        scores=np.array([piece.score for piece in merged], np.float32),
        labels=np.array([piece.label for piece in merged], np.int32),
        boxes_xyxy_px=np.array([piece.box for piece in merged], np.float32).reshape(-1, 4),
        masks=[piece.to_rle(size) for piece in merged],
    )


def _meet_far_apart(parts: Sequence[WindowInstances]) -> bool:
    """Whether windows overlap that are more than NEAR columns or rows apart."""
    for axis in (0, 1):
        starts = np.unique([part.window.box[axis] for part in parts])
        side = max((part.window.box[axis + 2] - part.window.box[axis] for part in parts), default=0)
        if (starts[NEAR + 1 :] < starts[: -NEAR - 1] + side).any():
            return True
    return False


def _join(pieces: Sequence[Piece], places: np.ndarray | None) -> list[Piece]:
    """One piece for each object that the pieces show; see `meeting_pairs` for `places`."""
    return [piece for _, piece in join_matched(pieces, _matches(pieces, places))]


def join_matched(pieces: Sequence[Piece], matches: Iterable[Match]) -> list[tuple[int, Piece]]:
    """One piece for each object, of pieces whose matches are all known: (index of a piece of it, that piece).

    Pieces that no chain of matches links don't take part in each other's fate, and the order of the pieces counts,
    not their indices: linked pieces may be joined by themselves.
    """
    groups, rivals = _group(pieces, matches)
    merged = [_resolve([pieces[i] for i in group]) for group in groups]
    dropped = _covered_rivals(merged, groups, rivals)
    return [(groups[number][0], piece) for number, piece in enumerate(merged) if number not in dropped]


def _group(pieces: Sequence[Piece], matches: Iterable[Match]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Group the pieces that are one object.

    Returns the groups, and the pairs of pieces that match too but could not be joined: a window shows both as objects
    of their own.
    """
    owner = list(range(len(pieces)))
    members = [[i] for i in owner]
    windows = [set(piece.windows) for piece in pieces]
    apart: set[tuple[int, int]] = set()  # groups that are known to be two objects
    rivals = []
    for match in sorted(matches, key=lambda match: match.order, reverse=True):
        first, second = owner[match.first], owner[match.second]
        if first == second:
            continue
        if not windows[first].isdisjoint(windows[second]):
            pair = (min(first, second), max(first, second))
            if match.is_one_class and pair not in apart:
                if not _are_parts_of_one(pieces, members[first], members[second]):
                    apart.add(pair)
                is_joined = pair not in apart and share_a_part(pieces[match.first], pieces[match.second])
            else:
                is_joined = False
            if not is_joined:
                if match.is_one_class:
                    rivals.append((match.first, match.second))
                continue
        for i in members[second]:
            owner[i] = first
        members[first] += members[second]
        windows[first] |= windows[second]
        members[second] = []
    return [group for group in members if group], rivals


def _are_parts_of_one(pieces: Sequence[Piece], first: list[int], second: list[int]) -> bool:
    """Whether all that a window shows of two groups may belong to one object: cut by its border, and not adjoining."""
    return all(
        pieces[i].is_cut and pieces[j].is_cut and lie_apart(pieces[i], pieces[j])
        for i in first
        for j in second
        if not pieces[i].windows.isdisjoint(pieces[j].windows)
    )


def _matches(pieces: Sequence[Piece], places: np.ndarray | None) -> Iterator[Match]:
    """Pairs of pieces that are one object."""
    for i, j in meeting_pairs(pieces, places):
        if match := match_of(pieces, i, j):
            yield match


def match_of(pieces: Sequence[Piece], i: int, j: int) -> Match | None:
    """How sure it is that two pieces of different windows, whose extents meet, are one object; None: they are not."""
    a, b = pieces[i], pieces[j]
    sureness = min(a.score, b.score)
    if a.label == b.label:
        covered = covered_part(a, b)
        # Of a winding object the zone may show several parts, of which the two have but one in common.
        if covered >= MIN_COVERED or (covered > 0 and a.is_cut and b.is_cut and share_a_part(a, b)):
            # What both windows are sure of goes before what happens to cover it.
            return Match(True, covered * sureness, i, j)
        return None
    agreed, shared = agreed_part(a, b)
    return Match(False, agreed * sureness, i, j) if agreed >= MIN_AGREED and shared >= MIN_SHARED else None


def _resolve(group: list[Piece]) -> Piece:
    """One piece for an object: the best that shows it as a whole, else the union of all."""
    if len(group) == 1:
        return group[0]
    largest = max(piece.area for piece in group)
    complete = [piece for piece in group if not piece.is_cut and piece.area >= MIN_WHOLE * largest]
    if complete:
        return dataclasses.replace(max(complete, key=lambda piece: piece.score), **_seen_by(group))
    return _union(group)


def _seen_by(group: list[Piece]) -> dict:
    """The fields of a piece that say who shows it."""
    seen = np.array([piece.seen for piece in group])
    return {
        "windows": frozenset().union(*(piece.windows for piece in group)),
        "seen": (*seen[:, :2].min(axis=0).tolist(), *seen[:, 2:].max(axis=0).tolist()),
    }


def _union(group: list[Piece]) -> Piece:
    if len(group) == 1:
        return group[0]
    votes: dict[int, float] = {}  # by area: windows that see more of it know better
    for piece in group:
        votes[piece.label] = votes.get(piece.label, 0.0) + piece.area * piece.score
    label = max(votes, key=lambda label: votes[label])
    best = max((piece for piece in group if piece.label == label), key=lambda piece: piece.score)
    boxes = np.array([piece.box for piece in group])
    return dataclasses.replace(
        best,
        box=np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]),
        **_seen_by(group),
        **united(group),
    )


def _covered_rivals(merged: list[Piece], groups: list[list[int]], rivals: list[tuple[int, int]]) -> set[int]:
    """Numbers of the lower scored of two objects that match but were kept apart, where one covers most of the other."""
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    dropped: set[int] = set()
    looked_at: set[tuple[int, ...]] = set()
    for a, b in rivals:
        pair = tuple(sorted({group_of[a], group_of[b]}, key=lambda number: (-merged[number].score, number)))
        if len(pair) < 2 or pair in looked_at or pair[0] in dropped or pair[1] in dropped:
            continue
        looked_at.add(pair)
        if intersection_over_smaller(merged[pair[0]], merged[pair[1]]) >= MIN_COVERED:
            dropped.add(pair[1])
    return dropped


def add_large(merged: list[Piece], whole: Iterable[Piece], overlap_px: int) -> list[Piece]:
    """Bring in the large objects that were found in the whole image, with the fragments that windows found of them.

    Of `whole` those count that are longer than `overlap_px`. They come last.
    """
    for large in whole:
        if max(large.extent[2] - large.extent[0], large.extent[3] - large.extent[1]) <= overlap_px:
            continue
        same = [
            piece
            for piece in merged
            if piece.label == large.label
            and boxes_meet(piece.extent, large.extent)
            and intersection_over_smaller(piece, large) >= MIN_COVERED
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
