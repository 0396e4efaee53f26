"""Merging an image's pieces a row of windows after the other, for images of which not all fit into memory.

What `mask_merging.merge_windows` makes of all pieces at once: pieces that no chain of matches links decide nothing for
each other, so whatever can meet no later window is joined and goes. Only windows at most `pieces.NEAR` columns and
rows apart may overlap.
"""

import dataclasses

import numpy as np

from instseg_jax.inference.mask_merging import MIN_WHOLE, Match, join_matched
from instseg_jax.inference.piece_tables import (
    NO_MATCHES,
    Grid,
    Matches,
    PieceTable,
    concatenate,
    find_matches,
    table_of,
)


@dataclasses.dataclass(frozen=True)
class Pending:
    """Pieces that may still meet others, and the matches among them."""

    table: PieceTable
    matches: Matches


def nothing_pending() -> Pending:
    """The state before the first row."""
    return Pending(table_of([], [], []), NO_MATCHES)


def join_rows(pending: Pending, new: PieceTable, grid: Grid, next_y: float) -> tuple[PieceTable, Pending]:
    """Add the pieces of some rows of windows, all before `next_y`, where the next row begins (infinity after the last).

    Returns: the objects that are complete now, with the number of a piece of each, and what is pending.
    """
    table = concatenate([pending.table, new])
    rows = np.searchsorted(table.numbers, pending.table.numbers)
    is_new = np.ones(len(table), bool)
    is_new[rows] = False
    known = pending.matches._replace(first=rows[pending.matches.first], second=rows[pending.matches.second])
    found = find_matches(table, grid, is_new)
    matches = Matches(*(np.concatenate(columns) for columns in zip(known, found, strict=True)))
    linked = _linked(len(table), matches)
    is_open = np.zeros(len(table), bool)
    is_open[linked[table.extents[:, 3] > next_y]] = True
    waits = is_open[linked]
    joined = _join_linked(table, matches.take(~waits[matches.first]), np.where(waits, -1, linked), grid)
    kept = np.flatnonzero(waits)
    of_kept = matches.take(waits[matches.first])
    of_kept = of_kept._replace(first=np.searchsorted(kept, of_kept.first), second=np.searchsorted(kept, of_kept.second))
    return joined, Pending(table.take(kept), of_kept)


def _linked(count: int, matches: Matches) -> np.ndarray:
    """For each of `count` pieces the first one that a chain of matches links it to."""
    first = np.arange(count)
    while True:
        a, b = first[matches.first], first[matches.second]
        low, high = np.minimum(a, b), np.maximum(a, b)
        if (low == high).all():
            return first
        np.minimum.at(first, high, low)
        while (first[first] != first).any():
            first = first[first]


def _join_linked(table: PieceTable, matches: Matches, linked: np.ndarray, grid: Grid) -> PieceTable:
    """One row for each object of complete groups; `linked` [n] is a group's first row, -1 for rows to leave out."""
    sizes = np.bincount(linked[linked >= 0], minlength=len(table))
    size = np.where(linked >= 0, sizes[linked], 0)
    alone = np.flatnonzero(size == 1)
    # Most groups are two windows' views of one object, of which one is complete: that one is taken.
    in_pair = size[matches.first] == 2
    i, j = matches.first[in_pair], matches.second[in_pair]
    largest = np.maximum(table.areas[i], table.areas[j])
    whole_i, whole_j = (~table.is_cut[k] & (table.areas[k] >= MIN_WHOLE * largest) for k in (i, j))
    better = np.where(whole_i & (~whole_j | (table.scores[i] >= table.scores[j])), i, j)
    decided = whole_i | whole_j
    pairs = dataclasses.replace(table.take(better[decided]), numbers=table.numbers[i[decided]])

    is_left = size > 1
    is_left[i[decided]] = is_left[j[decided]] = False
    left = np.flatnonzero(is_left)
    return concatenate([table.take(alone), pairs, _join_others(table, matches, linked, left, grid)])


def _join_others(table: PieceTable, matches: Matches, linked: np.ndarray, rows: np.ndarray, grid: Grid) -> PieceTable:
    """The groups of `rows`, one after the other by the whole rule."""
    members: dict[int, list[int]] = {}
    for row, group in zip(rows.tolist(), linked[rows].tolist(), strict=True):
        members.setdefault(group, []).append(row)
    in_group: dict[int, list[tuple]] = {}
    is_left = np.zeros(len(table), bool)
    is_left[rows] = True
    columns = [column.tolist() for column in matches.take(is_left[matches.first])]
    for match in zip(*columns, strict=True):
        in_group.setdefault(int(linked[match[2]]), []).append(match)
    pieces, owners = [], []
    for group, group_rows in members.items():
        place = {row: k for k, row in enumerate(group_rows)}
        found = [Match(same, sure, place[first], place[second]) for same, sure, first, second in in_group[group]]
        for owner, piece in join_matched([table.piece(row, grid) for row in group_rows], found):
            pieces.append(piece)
            owners.append(group_rows[owner])
    return table_of(pieces, table.numbers[owners], table.windows[owners])
