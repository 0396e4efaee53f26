"""Label Studio's JSON: polygons, brushes (holes and parts stay), rectangles and ellipses of tasks.

A task counts with its last annotation that was not cancelled, else with its prediction. A region is an object; one
whose parentID is a region of the same class is a part of that.
"""

import collections
import functools
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from instseg_jax.brush_rle import decode_brush
from instseg_jax.data.converted import (
    NOT_A_CLASS,
    ConvertedImage,
    ConvertedObject,
    Listing,
    check_inside,
    find_picture,
    is_hidden,
    join_parts,
    read_class_names,
)
from instseg_jax.files import is_regular, parse_json, read_regular
from instseg_jax.images import IMAGE_SUFFIXES
from instseg_jax.messages import quote, shorten
from instseg_jax.pixels import decode

SHAPES = ("polygon", "brush", "rectangle", "ellipse")
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # before the names of pictures that were uploaded
ELLIPSE_CORNERS = 72


def find_annotations(source: Path, labels: str | Path | None) -> Listing:
    """One path a task: that of its file, and its number in it.

    Raises: FileNotFoundError when there are none.
    """
    found = []
    for file in sorted(source.rglob("*.json")):
        if not is_hidden(file, source) and is_regular(file):
            found += [file / str(number) for number, task in enumerate(_read_tasks(file)) if _is_task(task)]
    if not found:
        raise FileNotFoundError(f"There is no JSON file with tasks of Label Studio below {str(source)!r}.")
    return Listing(source, {"train": found}, read_class_names(source, labels))


def read_annotation(path: Path, listing: Listing, notes: collections.Counter[str]) -> ConvertedImage:
    """Read one task with its picture; what is left out is counted in `notes`.

    Raises: ValueError that names file and task for what can't be read.
    """
    file, what = path.parent, f"Task {int(path.name) + 1} of {path.parent}"
    task = _read_tasks(file)[int(path.name)]
    picture = check_inside(_find_picture(task, file, listing.root, what), listing.root, what).resolve()
    height, width = decode(read_regular(picture), str(picture)).shape[:2]
    regions: dict[str, dict[str, Any]] = {}
    for number, item in enumerate(_result_of(task, what, notes)):
        if not isinstance(item, dict) or not isinstance(item.get("value"), dict):
            continue  # relations and answers to questions
        region = regions.setdefault(str(item.get("id") or number), {"value": {}, "parent": None})
        region["value"] |= item["value"]  # shape and class may come apart, under one id
        region["parent"] = item.get("parentID") or region["parent"]
        region["rotation"] = item.get("image_rotation") or region.get("rotation")
    parts: dict[tuple[str, str], list[np.ndarray]] = {}
    for name, region in regions.items():
        label = _label_of(region["value"])
        if label in NOT_A_CLASS:
            notes["regions left out, without a class"] += 1
            continue
        if region["rotation"]:
            raise ValueError(f"{what} has a picture turned by {quote(region['rotation'])} degrees; export it unturned.")
        try:
            drawn = _draw(region["value"], height, width)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{what} has a region {quote(name)} that can't be read: {shorten(error)}.") from error
        if drawn is None:
            notes["regions left out, that are no polygon, brush, rectangle or ellipse"] += 1
            continue
        parent = str(region["parent"])
        is_part = parent in regions and _label_of(regions[parent]["value"]) == label
        parts.setdefault((label, parent if is_part else name), []).append(drawn)
    objects = []
    for (label, _), drawings in parts.items():
        segmentation = join_parts(drawings, height, width)
        if segmentation is None:
            notes["regions left out, without a pixel in their picture"] += 1
        else:
            objects.append(ConvertedObject(label, segmentation))
    return ConvertedImage(picture, b"", picture.name, height, width, tuple(objects))


@functools.lru_cache(maxsize=2)
def _parse(file: Path, changed: int) -> Any:
    return parse_json(read_regular(file), file)


def _read_tasks(file: Path) -> list[Any]:
    content = _parse(file, file.stat().st_mtime_ns)
    return content if isinstance(content, list) else [content]


def _is_task(task: Any) -> bool:
    has_labels = isinstance(task, dict) and ("annotations" in task or "predictions" in task)
    return has_labels and isinstance(task.get("data"), dict)


def _result_of(task: dict[str, Any], what: str, notes: collections.Counter[str]) -> list[Any]:
    made = [one for one in task.get("annotations") or [] if isinstance(one, dict) and not one.get("was_cancelled")]
    if len(made) > 1:
        notes["tasks with several annotations, of which the last was taken"] += 1
    chosen = made or [one for one in task.get("predictions") or [] if isinstance(one, dict)]
    result = chosen[-1].get("result") if chosen else []
    if not isinstance(result, list):
        raise ValueError(f"{what} has no list of results.")
    return result


def _label_of(value: dict[str, Any]) -> str:
    for name in ("labels", *(f"{shape}labels" for shape in SHAPES)):
        if isinstance(value.get(name), list) and value[name]:
            return str(value[name][0]).strip()
    return ""


def _draw(value: dict[str, Any], height: int, width: int) -> np.ndarray | None:
    """A region as a polygon [P, 2] float64 in pixels, or as a mask [height, width] uint8; None for another."""
    scale = np.array([width, height]) / 100  # all numbers are percents
    if "rle" in value:
        return decode_brush(value["rle"], height, width)
    if "points" in value:
        return np.array(value["points"], np.float64).reshape(-1, 2) * scale
    if "radiusX" in value:
        angles = 2 * math.pi * np.arange(ELLIPSE_CORNERS) / ELLIPSE_CORNERS
        ring = np.stack([value["radiusX"] * np.cos(angles), value["radiusY"] * np.sin(angles)], axis=1) * scale
    elif {"x", "y", "width", "height"} <= value.keys():
        ring = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (value["width"], value["height"]) * scale
    else:
        return None
    angle = math.radians(value.get("rotation") or 0)  # clockwise on the screen, around (x, y)
    turned = ring @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return turned + np.array([value["x"], value["y"]]) * scale


def _find_picture(task: dict[str, Any], file: Path, root: Path, what: str) -> Path:
    """The picture that the task's data name by a path, an upload or an address, by its name near the file."""
    named = [value for value in task["data"].values() if isinstance(value, str)]
    for value in named:
        address = urlsplit(value)
        path = parse_qs(address.query).get("d", [unquote(address.path)])[0].replace("\\", "/")
        name = path.rpartition("/")[2]
        if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        folders = [file.parent, file.parent / "images", root, root / "images"]
        for candidate in (name, UPLOADED.sub("", name)):
            for folder in folders:
                if is_regular(folder / candidate):
                    return folder / candidate
        if (found := find_picture(Path(UPLOADED.sub("", name)).stem, folders)) is not None:
            return found
    raise FileNotFoundError(f"{what} names the picture {quote(named[0] if named else None)}, which is not there.")
