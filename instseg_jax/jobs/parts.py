"""One part of a plan: computed, and written as one file of pieces or results that knows no other part.

Masks of a raster's windows are kept inside their extents (`piece_tables.py`), so that no image is too large.
"""

import dataclasses
import functools
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instseg_jax.geo.rasters import RasterImage, open_raster
from instseg_jax.geo.reading import Reading
from instseg_jax.inference.piece_tables import (
    LARGE,
    PieceTable,
    concatenate,
    number_pieces,
    table_of,
)
from instseg_jax.inference.pieces import WindowInstances, window_pieces
from instseg_jax.inference.pipeline import Pipeline
from instseg_jax.inference.sources import Source
from instseg_jax.inference.tiling import OVERVIEW_SIDE
from instseg_jax.jobs.plan import Input, Part, Plan
from instseg_jax.results.result import Result
from instseg_jax.windows import Window

Compute = Callable[[Plan, Part], bytes]


class Failure(NamedTuple):
    """What could not be read: a picture, or a window of a raster."""

    input: str
    window: list[int] | None  # xyxy
    error: str


@dataclasses.dataclass(frozen=True)
class Content:
    """What a part's file holds."""

    results: list[Result]  # of pictures and videos
    pieces: PieceTable  # of rasters
    failed: list[Failure]


def compute_part(plan: Plan, part: Part, pipeline: Pipeline) -> bytes:
    """The file of a part. What can't be read is noted in it."""
    if part.kind in ("tile", "view"):
        return _compute_raster(plan, part, pipeline)
    names = [one.name for one in plan.inputs[part.first : part.last]]
    cut = {"tile": plan.settings["tile"], "overlap": plan.settings["overlap"]}
    try:
        found = list(_plain_results(pipeline, names, cut | {"whole_image": plan.settings["whole_image"]}))
    except (ValueError, OSError) as error:  # a single one is not among many that go on
        if len(names) > 1:
            raise
        found = [Result.failed(names[0], " ".join(str(error).split()))]
    rows = [
        {"input": one.input_path, "page": one.page_index, "size": one.size, "boxes": one.boxes, "masks": one.masks}
        | {"error": one.error}
        for one in found
    ]
    failed = [Failure(one.input_path, None, one.error) for one in found if one.error is not None]
    return _pack(plan, part, rows, None, failed)


def _plain_results(pipeline: Pipeline, names: list[str], options: dict[str, Any]) -> Iterator[Result]:
    for result in pipeline.predict(names, **options):
        yield dataclasses.replace(result, image=None)


def _compute_raster(plan: Plan, part: Part, pipeline: Pipeline) -> bytes:
    source, grid = plan.inputs[part.first], plan.grid(plan.inputs[part.first])
    assert source.size is not None
    if part.kind == "view":
        numbers, windows = [0], [Window(0, 0, source.size[1], source.size[0])]
    else:
        numbers = [row * len(grid.xs) + column for row in range(*part.rows) for column in range(*part.columns)]
        corners = grid.boxes(np.array(numbers))[:, :2].tolist()
        windows = [Window(x, y, grid.side, grid.side) for x, y in corners]
    try:
        raster = _raster_of(source, plan.reading)
    except (ValueError, OSError) as error:
        failed = [Failure(source.name, list(window.box), " ".join(str(error).split())) for window in windows]
        return _pack(plan, part, [], None, failed)
    if part.kind == "view":
        whole = Source(source.name, functools.partial(raster.view, OVERVIEW_SIDE), size=source.size)
        sources = iter([whole])
    else:
        sources = (Source(source.name, functools.partial(raster.read, window)) for window in windows)
    tables, failed = [], []
    found = pipeline.stream(sources, pipeline.batch_size, pipeline.thresholds)
    for number, window, one in zip(numbers, windows, found, strict=True):
        if one.instances is None:
            failed.append(Failure(source.name, list(window.box), one.error or "unknown"))
            continue
        pieces = list(window_pieces(number, WindowInstances(window, one.instances), source.size))
        named = number_pieces(number, len(pieces)) + (LARGE if part.kind == "view" else 0)
        tables.append(table_of(pieces, named, [number] * len(pieces)))
    return _pack(plan, part, [], concatenate(tables), failed)


@functools.lru_cache(maxsize=1)
def _raster_of(source: Input, reading: Reading | None) -> RasterImage:
    """The raster of an input, kept open for the parts that follow. Raises ValueError where it is not what it was."""
    raster = open_raster(Path(source.name), reading)
    if raster is None or raster.size != source.size:
        raise ValueError(f"{source.name} is no longer a raster of {source.size} pixels")
    return raster


def _pack(plan: Plan, part: Part, rows: list[dict], pieces: PieceTable | None, failed: list[Failure]) -> bytes:
    head = {"plan": plan.digest, "part": part.number, "results": rows, "failed": failed}
    text = json.dumps(head, ensure_ascii=True, allow_nan=False).encode("ascii")
    columns = {} if pieces is None else {f.name: getattr(pieces, f.name) for f in dataclasses.fields(pieces)}
    data = io.BytesIO()
    np.savez(data, head=np.frombuffer(text, np.uint8), **columns)
    return data.getvalue()


def read_failures(path: Path, plan: Plan) -> list[Failure]:
    """What a part's file notes as failed. Raises ValueError where the file is damaged or of another plan."""
    with _open(path) as file:
        return [Failure(*row) for row in _head(file, path, plan)["failed"]]


def read_part(path: Path, plan: Plan) -> Content:
    """A part's file. Raises ValueError where it is damaged or of another plan."""
    with _open(path) as file:
        head = _head(file, path, plan)
        try:
            columns = {name: file[name] for name in file.files if name != "head"}
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} is damaged: {error}; remove it, and the same command computes it again"
            ) from error
    results = [
        Result(
            row["input"],
            tuple(row["size"]),
            row["boxes"],
            row["masks"],
            page_index=row["page"],
            class_names=tuple(plan.settings["class_names"]),
            category_ids=tuple(plan.settings["category_ids"]),
            error=row["error"],
        )
        for row in head["results"]
    ]
    pieces = PieceTable(**columns) if columns else table_of([], [], [])
    return Content(results, pieces, [Failure(*row) for row in head["failed"]])


def _open(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it, and the same command computes it again") from error


def _head(file: Any, path: Path, plan: Plan) -> dict[str, Any]:
    try:
        head = json.loads(file["head"].tobytes())
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it, and the same command computes it again") from error
    if head["plan"] != plan.digest:
        raise ValueError(f"{path} belongs to the plan {head['plan']}, not to {plan.digest}")
    return head
