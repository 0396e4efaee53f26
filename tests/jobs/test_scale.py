"""How far a merge goes: a million instances, and the rule that looks at every pair."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instseg_jax.inference.mask_merging import join_matched, match_of
from instseg_jax.inference.piece_tables import Grid, PieceTable, concatenate, table_of
from instseg_jax.jobs.merge import Spool, merge_rows

SIDE, STRIDE = 640, 512
ROWS_A_TIME = 16


def grid_of(columns: int, rows: int) -> Grid:
    return Grid(np.arange(columns) * STRIDE, np.arange(rows) * STRIDE, SIDE)


def two_views(grid: Grid, row: int, count: int, rng: np.random.Generator) -> PieceTable:
    """Pieces of `count` rectangles in a row of windows, each of which two windows side by side see, a little otherwise.

    Of most, one window at least shows all; some are longer than what both windows see.
    """
    column = rng.integers(0, len(grid.xs) - 1, count)
    width = np.where(rng.random(count) < 0.02, rng.integers(130, 200, count), rng.integers(8, 60, count))
    height = rng.integers(8, 40, count)
    # Between 4 px inside the left window and 4 px inside the right one.
    x1 = (column + 1) * STRIDE + rng.integers(4 - width, SIDE - STRIDE - 4, count)
    y1 = row * STRIDE + rng.integers(0, SIDE - 40, count)
    label, score = rng.integers(0, 3, count), rng.random(count)
    views = []
    for side in (0, 1):
        window = row * len(grid.xs) + column + side
        left = (column + side) * STRIDE
        seen = np.stack([x1, y1, x1 + width, y1 + height], axis=1) + rng.integers(-1, 2, (count, 4))
        seen[:, 0::2] = np.clip(seen[:, 0::2], left[:, None], left[:, None] + SIDE)
        seen[:, 1::2] = np.clip(seen[:, 1::2], row * STRIDE, row * STRIDE + SIDE)
        order = np.argsort(window, kind="stable")
        place = np.arange(count) - np.searchsorted(window[order], window[order])
        numbers = np.empty(count, np.int64)
        numbers[order] = (window[order] << 20) + 2 * place + side
        views.append(rectangles(grid, numbers, window, label, np.float32(score * 0.9 + 0.1 * side), seen))
    return concatenate(views)


def rectangles(grid, numbers, windows, labels, scores, extents) -> PieceTable:
    boxes = grid.boxes(windows)
    first, last = extents[:, 0] // 8, -(-extents[:, 2] // 8)
    lengths = (last - first) * (extents[:, 3] - extents[:, 1])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    k = np.repeat(np.arange(len(extents)), lengths)
    column = (np.arange(starts[-1]) - starts[:-1][k]) % (last - first)[k]
    bits = np.full(starts[-1], 0xFF, np.uint8)
    bits &= np.where(column == 0, 0xFF >> (extents[:, 0] % 8)[k], 0xFF).astype(np.uint8)
    bits &= np.where(column == (last - first - 1)[k], 0xFF << (-extents[:, 2] % 8)[k], 0xFF).astype(np.uint8)
    near = np.minimum(extents[:, :2] - boxes[:, :2], boxes[:, 2:] - extents[:, 2:])
    return PieceTable(
        numbers=numbers,
        windows=windows.astype(np.int64),
        labels=labels.astype(np.int32),
        scores=np.asarray(scores, np.float32),
        boxes=extents.astype(np.float32),
        extents=extents.astype(np.int64),
        areas=(extents[:, 2] - extents[:, 0]) * (extents[:, 3] - extents[:, 1]),
        is_cut=near.min(axis=1) <= 2,
        starts=starts,
        bits=bits,
    )


def rows_of(grid: Grid, count: int):
    """`count` instances, two pieces each, in groups of rows of windows."""
    rng, rows = np.random.default_rng(0), len(grid.ys)
    for begin in range(0, rows, ROWS_A_TIME):
        end = min(begin + ROWS_A_TIME, rows)
        shares = [count * (row + 1) // rows - count * row // rows for row in range(begin, end)]
        yield end, concatenate(two_views(grid, row, n, rng) for row, n in zip(range(begin, end), shares, strict=True))


MILLION = """
import sys, time
from instseg_jax.memory import peak_memory_mb
sys.path.insert(0, sys.argv[1])
import tempfile, pathlib
from test_scale import *
grid = grid_of(300, 320)
size = (int(grid.ys[-1]) + SIDE, int(grid.xs[-1]) + SIDE)
seconds, pieces = 0.0, 0

def timed(rows):
    global seconds, pieces
    for end, table in rows:
        pieces += len(table)
        started = time.process_time()
        yield end, table
        seconds += time.process_time() - started

with tempfile.TemporaryDirectory() as folder:
    spool = Spool(pathlib.Path(folder) / "bits")
    merge_rows(timed(rows_of(grid, int(sys.argv[2]))), grid, table_of([], [], []), SIDE - STRIDE, size, spool)
    started = time.monotonic()
    read = sum(len(chunk) for chunk in spool.chunks())
    print(pieces, read, round(seconds, 1), round(time.monotonic() - started, 1))
print(round(peak_memory_mb()))
"""


def test_merging_in_rows_is_the_rule_that_looks_at_every_pair(tmp_path):
    """10,000 instances, 20,000 pieces; many of them lie on each other."""
    grid = grid_of(9, 21)
    tables = list(rows_of(grid, 10_000))
    everything = concatenate(table for _, table in tables)
    pieces = [everything.piece(i, grid) for i in range(len(everything))]
    x1, y1, x2, y2 = everything.extents.T
    matches = []
    for i in range(len(pieces)):
        meets = (x1[i + 1 :] < x2[i]) & (x2[i + 1 :] > x1[i]) & (y1[i + 1 :] < y2[i]) & (y2[i + 1 :] > y1[i])
        meets &= everything.windows[i + 1 :] != everything.windows[i]
        matches += [match for j in np.flatnonzero(meets) + i + 1 if (match := match_of(pieces, i, int(j)))]
    expected = sorted(join_matched(pieces, matches), key=lambda found: (-found[1].score, found[0]))

    spool = Spool(tmp_path / "bits")
    merge_rows(iter(tables), grid, table_of([], [], []), SIDE - STRIDE, (0, 0), spool)
    found = concatenate(spool.chunks())
    found = found.take(np.lexsort((found.numbers, -found.scores)))
    assert len(matches) > 10_000 and 9000 < len(found) < 10_000
    assert sum(piece.windows != frozenset([everything.windows[i]]) for i, piece in expected) > 9000
    assert found.numbers.tolist() == everything.numbers[[i for i, _ in expected]].tolist()
    assert found.labels.tolist() == [piece.label for _, piece in expected]
    assert found.scores.tolist() == [piece.score for _, piece in expected]
    assert found.extents.tolist() == [list(piece.extent) for _, piece in expected]
    np.testing.assert_array_equal(found.boxes, [piece.box for _, piece in expected])
    np.testing.assert_array_equal(found.bits, np.concatenate([piece.bits.ravel() for _, piece in expected]))


@pytest.mark.slow
def test_a_million_instances():
    """Two million pieces: at most 60 s of one core and 4 GB."""
    command = [sys.executable, "-c", MILLION, str(Path(__file__).parent), "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    pieces, instances, merging, reading, peak = map(float, done.stdout.split())
    print(f"{pieces:,.0f} pieces to {instances:,.0f}: {merging} s, read again in {reading} s, {peak:,.0f} MB at most")
    assert pieces == 2_000_000 and 950_000 < instances <= 1_000_000
    assert merging <= 60 and peak <= 4000
