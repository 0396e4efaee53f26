"""From the parts of a job to the results of its inputs, read from the disk a row of super-tiles after the other."""

import dataclasses
import functools
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from instseg_jax.bands import show_bands
from instseg_jax.crops import paste_mask
from instseg_jax.geo.rasters import open_raster
from instseg_jax.inference.mask_merging import add_large
from instseg_jax.inference.piece_tables import (
    COLUMNS,
    LARGE,
    Grid,
    PieceTable,
    concatenate,
    covered_by,
    table_of,
)
from instseg_jax.inference.sources import find_sources
from instseg_jax.inference.streamed_merging import join_rows, nothing_pending
from instseg_jax.inference.tiling import MAX_PIXELS
from instseg_jax.jobs.parts import Failure, read_part
from instseg_jax.jobs.plan import Input, Part, Plan
from instseg_jax.jobs.workers import part_file
from instseg_jax.results.large import LargeResult
from instseg_jax.results.result import Result
from instseg_jax.types import Instances

MOST_HELD = 50_000  # instances of a raster's result; more are written from the disk
READ_AHEAD = 4096  # instances
MERGING = ".merging"  # folders of masks, as large as all parts


def merged_results(
    plan: Plan, job: Path, failed: list[Failure], *, with_images: bool
) -> Iterator[Result | LargeResult]:
    """The results of all inputs in order; of a raster that has many instances, one that lies on the disk.

    What failed is added to `failed`. `with_images`: results have the pictures that are drawn on. Raises ValueError for
    a part that is damaged, FileNotFoundError for one that is missing.
    """
    for left in job.glob(f"{MERGING}*"):  # by merges that were killed: one merges at a time
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=MERGING, dir=job))
    try:
        for first, group in itertools.groupby(plan.parts, key=lambda part: part.first):
            parts, source = list(group), plan.inputs[first]
            if source.kind == "raster":
                yield _merge_raster(plan, job, source, parts, folder, failed, with_images)
                continue
            content = read_part(part_file(job, parts[0].number), plan)
            failed += content.failed
            yield from _with_images(plan, parts[0], content.results, with_images)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_images(plan: Plan, part: Part, results: list[Result], with_images: bool) -> Iterator[Result]:
    """Results of pictures or a video with their places on the ground, and the pictures where they are drawn."""
    names = [one.name for one in plan.inputs[part.first : part.last]]
    if part.kind == "video" and not with_images:
        yield from results
        return
    found, _ = find_sources(names, channels="rgb", bands=plan.bands, reading=plan.reading)
    for source, result in zip(found, results, strict=True):
        if result.error is not None:
            yield result
            continue
        image = None
        if with_images:
            is_cut = plan.tiles is not None and source.raster is not None
            image = _picture(source.raster.picture if is_cut and source.raster is not None else source.read)
            image = image if plan.bands is None or image is None else show_bands(image)
        yield dataclasses.replace(result, image=image, georeference=source.georeference)


def _merge_raster(
    plan: Plan, job: Path, source: Input, parts: list[Part], folder: Path, failed: list[Failure], with_image: bool
) -> Result | LargeResult:
    grid, spool = plan.grid(source), Spool(folder / f"{parts[0].number}.bits")
    assert source.size is not None and plan.tiles is not None
    large = table_of([], [], [])
    if parts[-1].kind == "view":
        content = read_part(part_file(job, parts[-1].number), plan)
        failed += content.failed
        large = content.pieces
        sides = (large.extents[:, 2:] - large.extents[:, :2]).max(axis=1, initial=0)
        large = large.take(np.flatnonzero(sides > plan.tiles.overlap_px))
    merge_rows(_tables(plan, job, parts, failed), grid, large, plan.tiles.overlap_px, source.size, spool)
    raster = open_raster(Path(source.name), plan.reading)
    head = Result(
        source.name,
        source.size,
        [],
        [],
        class_names=tuple(plan.settings["class_names"]),
        category_ids=tuple(plan.settings["category_ids"]),
        georeference=None if raster is None else raster.georeference,
    )
    if source.size[0] * source.size[1] > MAX_PIXELS or len(spool) > MOST_HELD:
        return LargeResult(head, len(spool), functools.partial(_found, spool, head))
    found = list(_found(spool, head))
    spool.close()
    return dataclasses.replace(
        head,
        boxes=[box for box, _, _ in found],
        masks=[paste_mask(mask, corner, source.size) for _, corner, mask in found],
        image=_picture(raster.picture) if with_image and raster is not None else None,
    )


def _picture(read: Callable[[], np.ndarray]) -> np.ndarray | None:
    """The picture to draw on; None where a part of it can't be read, of which the drawing then tells."""
    try:
        return read()
    except (ValueError, OSError):
        return None


def _tables(plan: Plan, job: Path, parts: list[Part], failed: list[Failure]) -> Iterator[tuple[int, PieceTable]]:
    """For each row of super-tiles the number of the first row of windows after it, and its pieces."""
    tiles = [part for part in parts if part.kind == "tile"]
    for (_, end), row in itertools.groupby(tiles, key=lambda part: part.rows):
        contents = [read_part(part_file(job, part.number), plan) for part in row]
        failed += [failure for content in contents for failure in content.failed]
        yield end, concatenate(content.pieces for content in contents)


def merge_rows(
    rows: Iterator[tuple[int, PieceTable]],
    grid: Grid,
    large: PieceTable,
    overlap_px: int,
    size: tuple[int, int],
    spool: "Spool",
) -> None:
    """Join the pieces of an image of `size` (height, width), given in rows of windows, into a spool.

    `rows` yields the number of the row of windows after those that it has, and their pieces. `large` was found in the
    whole image. The outcome is that of `mask_merging.merge_windows`.
    """
    pending, held = nothing_pending(), []
    for end, table in rows:
        next_y = float(grid.ys[end]) if end < len(grid.ys) else math.inf
        joined, pending = join_rows(pending, table, grid, next_y)
        meets = covered_by(joined, large)
        held.append(joined.take(np.flatnonzero(meets)))
        spool.add(joined.take(np.flatnonzero(~meets)))
    if not len(large):
        return
    kept = concatenate(held)
    pieces = [kept.piece(i, grid) for i in range(len(kept))]
    number_of = {id(piece): int(number) for piece, number in zip(pieces, kept.numbers, strict=True)}
    found = add_large(pieces, [large.piece(i, grid) for i in range(len(large))], overlap_px)
    numbers = [number_of.get(id(piece), LARGE + k) for k, piece in enumerate(found)]
    spool.add(table_of(found, numbers, [0] * len(found)))


class Spool:
    """Objects on the disk, given back by falling score: their masks in a file, all else in memory (64 bytes each)."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("w+b")
        self._columns: list[dict[str, np.ndarray]] = []
        self._starts: list[np.ndarray] = []
        self._end = 0

    def __len__(self) -> int:
        return sum(len(start) for start in self._starts)

    def add(self, table: PieceTable) -> None:
        """Append objects."""
        self._columns.append({name: getattr(table, name) for name in COLUMNS})
        self._starts.append(self._end + table.starts[:-1])
        self._file.write(table.bits.data)
        self._end += len(table.bits)

    @functools.cached_property
    def _sorted(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        columns = {name: np.concatenate([part[name] for part in self._columns]) for name in COLUMNS}
        order = np.lexsort((columns["numbers"], -columns["scores"]))
        return {name: column[order] for name, column in columns.items()}, np.concatenate(self._starts)[order]

    def chunks(self) -> Iterator[PieceTable]:
        """All objects, some thousand at a time; may be called again."""
        if not self._columns:
            return
        columns, starts = self._sorted
        self._file.flush()
        extents = columns["extents"]
        lengths = (extents[:, 3] - extents[:, 1]) * (-(-extents[:, 2] // 8) - extents[:, 0] // 8)
        with self._path.open("rb", buffering=0) as file:
            for begin in range(0, len(starts), READ_AHEAD):
                part = slice(begin, begin + READ_AHEAD)
                yield PieceTable(
                    **{name: column[part] for name, column in columns.items()},
                    starts=np.concatenate([[0], np.cumsum(lengths[part])]),
                    bits=_read(file, starts[part], lengths[part]),
                )

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _read(file: IO[bytes], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    data = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        file.seek(start)
        data.append(file.read(length))
    return np.frombuffer(b"".join(data), np.uint8)


def _found(spool: Spool, head: Result) -> Iterator[tuple[dict, tuple[int, int], np.ndarray]]:
    """The objects of a large result, as `LargeResult` reads them."""
    for table in spool.chunks():
        alone = Instances(table.scores, table.labels, table.boxes, [{}] * len(table))
        boxes = Result.from_instances(
            alone, class_names=head.class_names, input_path=head.input_path, size=head.size
        ).boxes
        for i, box in enumerate(boxes):
            x, y = table.extents[i, :2].tolist()
            yield box, (x, y), table.mask(i)
