"""The pictures of a map where they lie on their rasters, with their labels: to look at, and to find shifted labels.

`convert --src_dataset_type=geo` has written with each picture which window of which raster it is.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from instseg_jax import files, images, masks
from instseg_jax.data import shifts
from instseg_jax.data.check_annotations import CheckedFile
from instseg_jax.data.check_images import PictureFacts
from instseg_jax.data.coco_entries import ImageRecord, is_id
from instseg_jax.data.findings import Flaw
from instseg_jax.masks import Segmentation
from instseg_jax.messages import quote

SIDE = 1600  # pixels of an overview's longer side
MOST_RASTERS = 12  # that are drawn, those with most pictures
LEFT = "left_out"  # the split of pictures that belong to none
COLORS = {"train": (43, 108, 176), "val": (221, 107, 32), LEFT: (110, 110, 110)}  # as in the histogram
GROUND = 235  # grey where nothing is known
MAX_SIDE = 10**7  # pixels of a raster
# Pictures that are searched for shifts; rasters of their own where there are few, and these have many pictures.
MOST_COMPARED, MOST_SEARCHED, MIN_OF_RASTER = 300, 20, 6


@dataclasses.dataclass(frozen=True)
class MapTile:
    """A picture of a map, and which part of its raster it shows."""

    split: str
    path: Path
    size: tuple[int, int]  # (height, width)
    raster: str
    window: tuple[int, int, int, int]  # (x, y, width, height) in pixels of the raster
    ground: np.ndarray | None  # [2, 2]: metres east and north (rows) of a pixel to the right and one down (columns)
    labels: tuple[Segmentation, ...]


def find_tiles(
    folders: Mapping[str, Path],
    contents: Mapping[str, dict[str, Any]],
    checked: Mapping[str, CheckedFile],
    pictures: Mapping[str, Mapping[int, PictureFacts]],
) -> dict[str, list[MapTile]]:
    """The pictures of each raster that can be read and say where they lie; `folders` are those of the images."""
    found: dict[str, list[MapTile]] = collections.defaultdict(list)
    for split, file in checked.items():
        for entry in contents[split]["images"]:
            image = file.images.get(entry["id"]) if isinstance(entry, dict) and is_id(entry.get("id")) else None
            facts = None if image is None else pictures[split][image.id]
            if image is None or facts is None or facts.error is not None or facts.size != (image.height, image.width):
                continue
            raster, window = entry.get("raster"), _window(entry.get("window"))
            if not isinstance(raster, str) or window is None:
                continue
            labels = tuple(o.annotation.segmentation for o in file.objects[image.id])
            path, ground = folders[split] / image.file_name, _ground(entry, image)
            found[raster].append(MapTile(split, path, facts.size, raster, window, ground, labels))
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def find_left_out(file: Path) -> list[MapTile]:
    """The pictures that a split into blocks has left out, without labels; none where its file is not there, or odd."""
    try:
        content = files.read_json(file) if file.is_file() else {}
    except (ValueError, OSError, RecursionError):
        return []
    entries = content.get("images") if isinstance(content, dict) else None
    found = []
    for entry in entries if isinstance(entries, list) else ():
        window = _window(entry.get("window")) if isinstance(entry, dict) else None
        if window is not None and isinstance(entry.get("raster"), str):
            found.append(MapTile(LEFT, file, (window[3], window[2]), entry["raster"], window, None, ()))
    return found


def draw_overview(tiles: Sequence[MapTile], base: np.ndarray | None, size: tuple[int, int] | None) -> np.ndarray:
    """Draw the pictures of a raster [H, W, 3] uint8: frames and labels in the colour of the split; of those that are
    left out the frames.

    `base` is a picture of the whole raster of `size` (height, width) for the ground between; None: grey, as far as
    there are pictures.
    """
    windows = np.array([tile.window for tile in tiles])
    ends = (windows[:, :2] + windows[:, 2:]).max(axis=0)
    if base is None or size is None:
        start = windows[:, :2].min(axis=0)
    else:
        start, ends = np.zeros(2, int), np.array(size[::-1])
    scale = min(1.0, SIDE / (ends - start).max())
    width, height = np.maximum(1, np.round((ends - start) * scale).astype(int)).tolist()
    canvas = np.full((height, width, 3), GROUND, np.uint8)
    if base is not None:
        canvas = cv2.resize(base, (width, height), interpolation=cv2.INTER_AREA) // 2 + GROUND // 2  # pale
    lines: list[tuple[np.ndarray, str]] = []
    for tile in tiles:
        corner = np.array(tile.window[:2]) - start
        first = np.round(corner * scale).astype(int)
        last = np.minimum(np.round((corner + tile.window[2:]) * scale).astype(int), (width, height))
        if (last <= first).any():
            continue
        frame = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (last - first - 1) + first
        lines.append((frame, tile.split))
        if tile.split == LEFT:
            continue
        side = np.maximum(1, np.round(np.array(tile.window[2:]) * scale)).astype(int).tolist()
        picture = cv2.resize(images.read_image(tile.path), side, interpolation=cv2.INTER_AREA)
        shown = last - first
        canvas[first[1] : last[1], first[0] : last[0]] = picture[: shown[1], : shown[0]]
        factor = np.array(tile.window[2:]) / tile.size[::-1] * scale  # pixels of the overview for one of the picture
        lines += [(ring * factor + corner * scale, tile.split) for label in tile.labels for ring in _rings(label, tile)]
    for ring, split in lines:  # above all pictures
        cv2.polylines(canvas, [np.round(ring).astype(np.int32)], True, COLORS[split], 1, cv2.LINE_AA)
    return canvas


def read_base(root: Path, content: Mapping[str, Any], raster: str) -> tuple[np.ndarray | None, tuple[int, int] | None]:
    """The picture of a whole raster that `convert` has kept within the data set, and the raster's (height, width)."""
    known = content.get("info")
    said = known.get("overviews") if isinstance(known, dict) else None
    own = said.get(raster) if isinstance(said, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("file"), str) or not files.is_inside(root, own["file"]):
        return None, None
    size = own.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(_is_length(side) for side in size)):
        return None, None
    try:
        return images.read_image(root / own["file"]), (size[0], size[1])
    except (OSError, ValueError):
        return None, None


def find_shift_flaws(rasters: Mapping[str, Sequence[MapTile]]) -> list[Flaw]:
    """The rasters whose labels are off by one way, all of them; where rasters are many or small, all together."""
    usable = {
        raster: [tile for tile in tiles if tile.labels and tile.ground is not None] for raster, tiles in rasters.items()
    }
    usable = {raster: tiles for raster, tiles in usable.items() if tiles}
    groups = {f"on {quote(raster)}": tiles for raster, tiles in usable.items() if len(tiles) >= MIN_OF_RASTER}
    small = [tile for tiles in usable.values() if len(tiles) < MIN_OF_RASTER for tile in tiles]
    if len(groups) > MOST_SEARCHED:
        groups, small = {}, [tile for tiles in usable.values() for tile in tiles]
    if small:
        groups[f"on {len({tile.raster for tile in small})} rasters"] = small
    flaws = []
    for where, tiles in groups.items():
        share = min(1.0, MOST_COMPARED / len(groups) / len(tiles))
        positions = np.unique(np.linspace(0, len(tiles) - 1, max(1, round(len(tiles) * share))).astype(int))
        shift = _find_shift([tiles[position] for position in positions.tolist()])
        if shift is not None:
            flaws.append(Flaw("shifted_labels", None, (), f"{where}: {shift.say()}"))
    return flaws


def _find_shift(tiles: Sequence[MapTile]) -> shifts.Shift | None:
    if len(tiles) < shifts.MIN_TILES or sum(len(tile.labels) for tile in tiles) < shifts.MIN_OBJECTS:
        return None
    scales = [shifts.reduced_scale(tile.size) for tile in tiles]
    ground = [tile.ground / scale for tile, scale in zip(tiles, scales, strict=True) if tile.ground is not None]
    reach = shifts.find_reach(float(np.median([np.sqrt(abs(np.linalg.det(matrix))) for matrix in ground])))
    evidence = [
        shifts.weigh(
            images.read_image(tile.path),
            [masks.segmentation_to_rle(label, *tile.size) for label in tile.labels],
            reach,
        )
        for tile in tiles
    ]
    return shifts.find_shift(evidence, ground, scales)


def _ground(entry: Mapping[str, Any], image: ImageRecord) -> np.ndarray | None:
    """As `MapTile.ground`; north is up where a data set says nothing else."""
    said, metres = entry.get("east_north"), entry.get("metres")
    if isinstance(said, list) and len(said) == 2 and all(_is_numbers(column, 2) for column in said):
        matrix = np.array(said, np.float64).T
    elif isinstance(metres, list) and _is_numbers(metres, 2):
        matrix = np.diag([metres[0] / image.width, -metres[1] / image.height])
    else:
        return None
    return matrix if abs(np.linalg.det(matrix)) > 1e-12 else None


def _rings(label: Segmentation, tile: MapTile) -> Iterable[np.ndarray]:
    """The outlines [P, 2] of a label in pixels of its picture."""
    if isinstance(label, tuple):
        return label
    contours, _ = cv2.findContours(masks.decode_rle(label), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [contour[:, 0] + 0.5 for contour in contours]


def _window(value: Any) -> tuple[int, int, int, int] | None:
    if not (
        isinstance(value, list) and len(value) == 4 and all(isinstance(x, int) and abs(x) <= MAX_SIDE for x in value)
    ):
        return None
    x, y, width, height = value
    return (x, y, width, height) if width > 0 and height > 0 else None


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIDE


def _is_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e9 for x in value)
    )
