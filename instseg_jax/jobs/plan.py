"""What there is to do: inputs cut into parts, a pure function of inputs and options, told apart by its digest."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.bands import Bands
from instseg_jax.files import check_seal, read_json, seal, write_json
from instseg_jax.geo.rasters import open_raster
from instseg_jax.geo.reading import Reading, make_reading
from instseg_jax.images import is_video
from instseg_jax.inference.piece_tables import Grid
from instseg_jax.inference.tiling import MAX_PIXELS, Tiles, window_starts

PLAN = "plan.json"
SUPER_TILE = 16  # windows of a raster's part, in rows and in columns
PICTURES = 256  # of a part
FORM = 1  # of plans and parts; another one is another plan


@dataclasses.dataclass(frozen=True)
class Input:
    """One file, or address, that is segmented."""

    name: str
    kind: str  # picture, video or raster: the last is worked on in super-tiles
    bytes: int | None  # of the file, None where it is none
    changed: int | None  # nanoseconds
    size: tuple[int, int] | None = None  # (height, width) of a raster


@dataclasses.dataclass(frozen=True)
class Part:
    """What one worker does at a time: pictures, a video, a super-tile of a raster, or the view of a whole one."""

    number: int
    kind: str  # pictures, video, tile, view
    first: int  # index of its first input
    last: int  # and the one after its last
    rows: tuple[int, int] = (0, 0)  # of a super-tile: its windows, [first, last)
    columns: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Inputs and options of a job; all else follows from them."""

    settings: Mapping[str, Any]  # plain values: tile, overlap, whole_image, and what the pipeline is
    inputs: tuple[Input, ...]

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that tell plans apart."""
        text = json.dumps(_plain(self), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """All there is to do, in order of the inputs."""
        parts: list[Part] = []
        i = 0
        while i < len(self.inputs):
            kind, end = self.inputs[i].kind, i + 1
            if kind == "raster":
                parts += self._raster_parts(i, len(parts))
            elif kind == "video":
                parts.append(Part(len(parts), "video", i, end))
            else:
                while end < len(self.inputs) and end - i < PICTURES and self.inputs[end].kind == kind:
                    end += 1
                parts.append(Part(len(parts), "pictures", i, end))
            i = end
        return tuple(parts)

    @property
    def tiles(self) -> Tiles | None:
        """How rasters are cut; None: not at all."""
        if self.settings["tile"] is None:
            return None
        return Tiles(self.settings["tile"], self.settings["overlap"], self.settings["whole_image"])

    @property
    def bands(self) -> Bands | None:
        """How pixels are read; None: as 8-bit colour."""
        bands = self.settings["bands"]
        if bands is None:
            return None
        ranges = bands["ranges"]
        return Bands(bands["channels"], None if ranges is None else tuple((low, high) for low, high in ranges))

    @property
    def reading(self) -> Reading | None:
        """How rasters of maps are read; None: each as it says itself."""
        said = self.settings.get("reading")
        return None if said is None else make_reading(said, "The plan's ")

    def grid(self, source: Input) -> Grid:
        """The windows of a raster."""
        assert source.size is not None and self.tiles is not None
        return grid_of(source.size, self.tiles)

    def _raster_parts(self, index: int, number: int) -> list[Part]:
        source, grid = self.inputs[index], self.grid(self.inputs[index])
        spans = [
            [(start, min(start + SUPER_TILE, len(starts))) for start in range(0, len(starts), SUPER_TILE)]
            for starts in (grid.ys, grid.xs)
        ]
        kinds: list[dict[str, Any]] = [
            {"kind": "tile", "rows": rows, "columns": columns} for rows in spans[0] for columns in spans[1]
        ]
        if self.settings["whole_image"] and is_viewed(source):
            kinds.append({"kind": "view"})
        return [Part(number + k, first=index, last=index + 1, **kind) for k, kind in enumerate(kinds)]


def grid_of(size: tuple[int, int], tiles: Tiles) -> Grid:
    """The windows of an image of `size` (height, width)."""
    ys, xs = (np.array(window_starts(length, tiles), np.int64) for length in size)
    return Grid(xs, ys, tiles.side)


def is_viewed(source: Input) -> bool:
    """Whether a raster can be looked at as a whole: masks of the view are masks of the image."""
    return source.size is not None and source.size[0] * source.size[1] <= MAX_PIXELS


def build_plan(names: Sequence[str], settings: Mapping[str, Any]) -> Plan:
    """Plan the segmentation of files and addresses, in their order. Models of other bands read files whole.

    Raises ValueError for a raster whose windows
    overlap too much to be merged in rows, where it is too large to be merged at once.
    """
    plan = Plan(json.loads(json.dumps(dict(settings))), ())
    return dataclasses.replace(
        plan, inputs=tuple(_describe(name, plan.tiles if plan.bands is None else None, plan.reading) for name in names)
    )


def _describe(name: str, tiles: Tiles | None, reading: Reading | None) -> Input:
    path = Path(name)
    if not path.is_file():
        return Input(name, "picture", None, None)
    state = path.stat()
    known = (state.st_size, state.st_mtime_ns)
    if is_video(path):
        return Input(name, "video", *known)
    raster = open_raster(path, reading) if tiles is not None else None
    if raster is None or tiles is None or max(raster.size) <= tiles.side:
        return Input(name, "picture", *known)
    source = Input(name, "raster", *known, raster.size)
    if not grid_of(raster.size, tiles).meets_far_apart:
        return source
    if is_viewed(source):
        return Input(name, "picture", *known)
    raise ValueError(
        f"overlap is {tiles.overlap}, at most 0.5 is possible for an image as large as {name}, "
        f"{raster.size[0]} x {raster.size[1]} pixels"
    )


def write_plan(plan: Plan, job: Path) -> None:
    """Write a plan into the folder of its job."""
    write_json(job / PLAN, seal(_plain(plan) | {"plan": plan.digest, "parts": len(plan.parts)}), durable=True)


def read_plan(job: Path) -> Plan | None:
    """The plan of a job; None where there is none. Raises ValueError where it is damaged or of another version."""
    if not (job / PLAN).is_file():
        return None
    content = check_seal(read_json(job / PLAN), job / PLAN, is_sealed=True)
    inputs = [
        Input(**{**one, "size": None if one["size"] is None else tuple(one["size"])}) for one in content["inputs"]
    ]
    plan = Plan(content["settings"], tuple(inputs))
    if content["form"] != FORM or plan.digest != content["plan"]:
        raise ValueError(f"{job / PLAN} is the plan of another version of instseg_jax")
    return plan


def difference(plan: Plan, other: Plan) -> str:
    """In a few words how a plan differs from another."""
    changed = [
        f"{name} is {_short(other.settings.get(name))} there and {_short(value)} here"
        for name, value in plan.settings.items()
        if other.settings.get(name) != value
    ]
    if plan.inputs != other.inputs:
        names, others = ({one.name for one in each.inputs} for each in (plan, other))
        new, gone = sorted(names - others), sorted(others - names)
        if new or gone:
            changed.append(f"{len(new)} inputs are new and {len(gone)} are gone, as {(new + gone)[0]}")
        else:
            first = next(a.name for a, b in zip(plan.inputs, other.inputs, strict=True) if a != b)
            changed.append(f"{first} is another file now")
    return "; ".join(changed)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(plan: Plan) -> dict[str, Any]:
    return {
        "form": FORM,
        "super_tile": SUPER_TILE,
        "pictures": PICTURES,
        "settings": dict(plan.settings),
        "inputs": [dataclasses.asdict(one) for one in plan.inputs],
    }
