"""Pieces by the million, as columns, and what pairs of them have in common, many pairs at a time.

The measures are those of `pieces.py`, which says them for one pair.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from instseg_jax.inference.mask_merging import MIN_AGREED, MIN_COVERED, MIN_SHARED
from instseg_jax.inference.pieces import NEAR, Piece, share_a_part

CHUNK = 1 << 17  # pairs, or bytes of masks, that are looked at together
LARGE = 1 << 62  # from here on pieces are of the view of a whole image
IN_WINDOW = 20  # bits of a piece's number that count the pieces of its window


@dataclasses.dataclass(frozen=True)
class Grid:
    """Windows of one image, row by row: window `n` lies at column n % len(xs), row n // len(xs)."""

    xs: np.ndarray  # [columns] int64, where windows begin
    ys: np.ndarray  # [rows]
    side: int

    def boxes(self, windows: np.ndarray) -> np.ndarray:
        """xyxy [n, 4] of windows [n]."""
        x, y = self.xs[windows % len(self.xs)], self.ys[windows // len(self.xs)]
        return np.stack([x, y, x + self.side, y + self.side], axis=-1)

    @property
    def meets_far_apart(self) -> bool:
        """Whether windows overlap that are more than NEAR columns or rows apart."""
        return any((starts[NEAR + 1 :] < starts[: -NEAR - 1] + self.side).any() for starts in (self.xs, self.ys))


@dataclasses.dataclass(frozen=True)
class PieceTable:
    """Columns of n pieces, by rising number; see `pieces.Piece`."""

    numbers: np.ndarray  # [n] int64: by window, then as the window has them
    windows: np.ndarray  # [n] int64
    labels: np.ndarray  # [n] int32
    scores: np.ndarray  # [n] float32
    boxes: np.ndarray  # [n, 4] float32
    extents: np.ndarray  # [n, 4] int64
    areas: np.ndarray  # [n] int64
    is_cut: np.ndarray  # [n] bool
    starts: np.ndarray  # [n + 1] int64: where the bytes of a mask begin in `bits`
    bits: np.ndarray  # uint8

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, index: np.ndarray) -> "PieceTable":
        """The rows `index` (integers), in that order."""
        lengths = np.diff(self.starts)[index]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.arange(starts[-1]) + np.repeat(self.starts[:-1][index] - starts[:-1], lengths)
        columns = {name: getattr(self, name)[index] for name in COLUMNS}
        return PieceTable(**columns, starts=starts, bits=self.bits[flat])

    def mask(self, i: int) -> np.ndarray:
        """The mask [h, w] bool of row `i`, inside its extent."""
        x1, _, x2, _ = self.extents[i].tolist()
        rows = np.unpackbits(self._bits_of(i), axis=1, count=x2 - x1 // 8 * 8)
        return rows[:, x1 % 8 :].view(bool)

    def _bits_of(self, i: int) -> np.ndarray:
        x1, y1, x2, y2 = self.extents[i].tolist()
        return self.bits[self.starts[i] : self.starts[i + 1]].reshape(y2 - y1, -(-x2 // 8) - x1 // 8)

    def piece(self, i: int, grid: Grid) -> Piece:
        """Row `i` as a piece."""
        x1, y1, x2, y2 = self.extents[i].tolist()
        row, column = divmod(int(self.windows[i]), len(grid.xs))
        x, y = int(grid.xs[column]), int(grid.ys[row])
        return Piece(
            windows=frozenset([int(self.windows[i])]),
            seen=(x, y, x + grid.side, y + grid.side),
            label=int(self.labels[i]),
            score=float(self.scores[i]),
            box=self.boxes[i],
            extent=(x1, y1, x2, y2),
            bits=self._bits_of(i),
            area=int(self.areas[i]),
            is_cut=bool(self.is_cut[i]),
        )


class Matches(NamedTuple):
    """Columns of pairs of pieces that show one object; see `mask_merging.Match`."""

    is_one_class: np.ndarray  # [m] bool
    sureness: np.ndarray  # [m] float64
    first: np.ndarray  # [m] int64, row of the table
    second: np.ndarray  # [m], a later row

    def take(self, index: np.ndarray) -> "Matches":
        """The matches `index` (integers or booleans)."""
        return Matches(*(column[index] for column in self))


COLUMNS = ("numbers", "windows", "labels", "scores", "boxes", "extents", "areas", "is_cut")


NO_MATCHES = Matches(np.zeros(0, bool), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))


def number_pieces(window: int, count: int) -> np.ndarray:
    """Numbers [count] of the pieces of a window."""
    return (window << IN_WINDOW) + np.arange(count, dtype=np.int64)


def table_of(
    pieces: Sequence[Piece], numbers: Sequence[int] | np.ndarray, windows: Sequence[int] | np.ndarray
) -> PieceTable:
    """The columns of pieces, with a number and a window for each."""
    lengths = [piece.bits.size for piece in pieces]
    return PieceTable(
        numbers=np.asarray(numbers, np.int64).reshape(-1),
        windows=np.asarray(windows, np.int64).reshape(-1),
        labels=np.array([piece.label for piece in pieces], np.int32),
        scores=np.array([piece.score for piece in pieces], np.float32),
        boxes=np.array([piece.box for piece in pieces], np.float32).reshape(-1, 4),
        extents=np.array([piece.extent for piece in pieces], np.int64).reshape(-1, 4),
        areas=np.array([piece.area for piece in pieces], np.int64),
        is_cut=np.array([piece.is_cut for piece in pieces], bool),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        bits=np.concatenate([piece.bits.ravel() for piece in pieces] or [np.zeros(0, np.uint8)]),
    )


def concatenate(tables: Iterable[PieceTable]) -> PieceTable:
    """Tables one after the other, brought into the order of their numbers."""
    parts = [table_of([], [], []), *tables]
    ends = np.cumsum([0, *(len(part.bits) for part in parts)])
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    starts = np.concatenate([*(part.starts[:-1] + end for part, end in zip(parts, ends, strict=False)), ends[-1:]])
    table = PieceTable(**columns, starts=starts, bits=np.concatenate([part.bits for part in parts]))
    order = np.argsort(table.numbers, kind="stable")
    return table if (order[1:] > order[:-1]).all() else table.take(order)


def find_matches(table: PieceTable, grid: Grid, is_new: np.ndarray) -> Matches:
    """Pairs of pieces that are one object, at least one of which is new; by the rule of `mask_merging`."""
    found = [columns for pairs in _meeting_pairs(table, grid, is_new) for columns in _matches_of(table, grid, *pairs)]
    return Matches(*(np.concatenate(column) for column in zip(NO_MATCHES, *found, strict=True)))


def covered_by(table: PieceTable, large: PieceTable) -> np.ndarray:
    """Which pieces [n] bool share most of the smaller mask with one of a few large ones of their class."""
    both = concatenate([table, large])  # whose numbers are higher
    is_covered = np.zeros(len(table), bool)
    for j in range(len(table), len(both)):
        meets = (table.extents[:, :2] < both.extents[j, 2:]) & (both.extents[j, :2] < table.extents[:, 2:])
        i = np.flatnonzero(meets.all(axis=1) & (table.labels == both.labels[j]))
        shared = _shared_areas(both, i, np.full(len(i), j))
        is_covered[i] |= shared / np.minimum(both.areas[i], both.areas[j]) >= MIN_COVERED
    return is_covered


def _meeting_pairs(table: PieceTable, grid: Grid, is_new: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, larger j), in chunks, of different windows near each other whose extents meet."""
    if not len(table):
        return
    x1, y1, x2, y2 = table.extents.T
    column, row = table.windows % len(grid.xs), table.windows // len(grid.xs)
    # Bands of rows, as high as most pieces; in each a sweep from left to right. A piece is in every band it touches.
    height = max(16, int(np.mean(y2 - y1)))
    first, last = y1 // height, (y2 - 1) // height
    counts = last - first + 1
    piece = np.repeat(np.arange(len(table)), counts)
    band = first[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(x2.max()) + 1
    key = band * width + x1[piece]
    order = np.argsort(key, kind="stable")
    key, piece, band = key[order], piece[order], band[order]
    ends = np.searchsorted(key, band * width + x2[piece], side="left")
    candidates = np.maximum(ends - np.arange(len(piece)) - 1, 0)
    for begin, end in _chunks(candidates):
        number = candidates[begin:end]
        a = np.repeat(np.arange(begin, end), number)
        b = a + 1 + np.arange(len(a)) - np.repeat(np.cumsum(number) - number, number)
        i, j, where = piece[a], piece[b], band[a]
        kept = np.maximum(first[i], first[j]) == where  # in the first band that both touch
        kept &= (is_new[i] | is_new[j]) & (table.windows[i] != table.windows[j])
        i, j = i[kept], j[kept]
        kept = (y1[i] < y2[j]) & (y1[j] < y2[i])
        kept &= (np.abs(column[i] - column[j]) <= NEAR) & (np.abs(row[i] - row[j]) <= NEAR)
        yield np.minimum(i[kept], j[kept]), np.maximum(i[kept], j[kept])


def _matches_of(table: PieceTable, grid: Grid, i: np.ndarray, j: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Columns of matches: of one class, how sure, first, second."""
    shared = _shared_areas(table, i, j)
    i, j, shared = (column[shared > 0] for column in (i, j, shared))
    sureness = np.minimum(table.scores[i], table.scores[j]).astype(np.float64)
    areas = np.stack([table.areas[i], table.areas[j]])
    is_same = table.labels[i] == table.labels[j]
    both_cut = table.is_cut[i] & table.is_cut[j]
    in_zone = areas.copy()  # what both windows see
    looked_at = np.flatnonzero(both_cut | ~is_same)
    boxes = [grid.boxes(table.windows[index[looked_at]]) for index in (i, j)]
    zones = np.concatenate([np.maximum(*boxes)[:, :2], np.minimum(*boxes)[:, 2:]], axis=1)
    for side, index in enumerate((i, j)):
        in_zone[side, looked_at] = _areas_in(table, index[looked_at], zones)

    smaller = np.where(both_cut, in_zone.min(axis=0), areas.min(axis=0))
    covered = np.divide(shared, smaller, out=np.zeros(len(i)), where=smaller > 0)
    is_match = is_same & (covered >= MIN_COVERED)
    for k in np.flatnonzero(is_same & both_cut & (covered > 0) & ~is_match):
        is_match[k] = share_a_part(table.piece(i[k], grid), table.piece(j[k], grid))
    yield is_same[is_match], (covered * sureness)[is_match], i[is_match], j[is_match]

    union = in_zone.sum(axis=0) - shared
    seen = in_zone.min(axis=0) > 0
    agreed = np.divide(shared, union, out=np.zeros(len(i)), where=seen)
    least = np.where(seen, (in_zone / areas).min(axis=0), 0)
    is_match = ~is_same & (agreed >= MIN_AGREED) & (least >= MIN_SHARED)
    yield is_same[is_match], (agreed * sureness)[is_match], i[is_match], j[is_match]


def _shared_areas(table: PieceTable, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Pixels [p] that two masks have in common."""
    low = np.maximum(table.extents[i, :2], table.extents[j, :2])
    high = np.minimum(table.extents[i, 2:], table.extents[j, 2:])
    areas = np.zeros(len(i), np.int64)
    for part, (k, row, column) in _bytes_of(low, high):
        both = table.bits[_place(table, i[part], low[part], k, row, column)]
        both &= table.bits[_place(table, j[part], low[part], k, row, column)]
        areas[part] = _sums(both, k, len(areas[part]))
    return areas


def _areas_in(table: PieceTable, i: np.ndarray, zones: np.ndarray) -> np.ndarray:
    """Pixels [p] of masks inside rectangles xyxy [p, 4]."""
    low = np.maximum(table.extents[i, :2], zones[:, :2])
    high = np.minimum(table.extents[i, 2:], zones[:, 2:])
    areas = np.zeros(len(i), np.int64)
    at_left = (0xFF >> (low[:, 0] % 8)).astype(np.uint8)
    at_right = ((0xFF << (-high[:, 0] % 8)) & 0xFF).astype(np.uint8)
    last = -(-high[:, 0] // 8) - low[:, 0] // 8 - 1
    for part, (k, row, column) in _bytes_of(low, high):
        inside = table.bits[_place(table, i[part], low[part], k, row, column)]
        inside &= np.where(column == 0, at_left[part][k], 0xFF).astype(np.uint8)
        inside &= np.where(column == last[part][k], at_right[part][k], 0xFF).astype(np.uint8)
        areas[part] = _sums(inside, k, len(areas[part]))
    return areas


def _bytes_of(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[slice, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """The bytes of rectangles, in chunks: which rectangles, and for each byte its rectangle there, row and column."""
    columns = np.maximum(-(-high[:, 0] // 8) - low[:, 0] // 8, 0)
    number = columns * np.maximum(high[:, 1] - low[:, 1], 0) * (high[:, 0] > low[:, 0])
    for begin, end in _chunks(number):
        count = number[begin:end]
        k = np.repeat(np.arange(end - begin), count)
        place = np.arange(len(k)) - np.repeat(np.cumsum(count) - count, count)
        row, column = np.divmod(place, columns[begin:end][k])
        yield slice(begin, end), (k, row, column)


def _place(
    table: PieceTable, i: np.ndarray, low: np.ndarray, k: np.ndarray, row: np.ndarray, column: np.ndarray
) -> np.ndarray:
    """Where in `bits` a byte of a rectangle that begins at `low` lies, for the pieces `i` [p] of the rectangles."""
    extents = table.extents[i]
    stride = -(-extents[:, 2] // 8) - extents[:, 0] // 8
    base = table.starts[i] + (low[:, 1] - extents[:, 1]) * stride + low[:, 0] // 8 - extents[:, 0] // 8
    return base[k] + row * stride[k] + column


def _sums(found: np.ndarray, k: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(k, weights=np.bitwise_count(found), minlength=count).astype(np.int64)


def _chunks(costs: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges (begin, end) of entries whose costs together are about CHUNK; one alone may cost more."""
    total = np.cumsum(costs)
    begin = 0
    while begin < len(costs):
        paid = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, paid + CHUNK, side="right")))
        yield begin, end
        begin = end
