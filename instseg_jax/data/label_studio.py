"""Label Studio's JSON: polygons, brushes (holes and parts stay), rectangles and ellipses of tasks.

A task counts with its last annotation that was not cancelled, else with its prediction. A region is an object; one
whose parentID is a region of the same class is a part of that.
"""

import collections
import functools
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from instseg_jax.brush_rle import decode_brush
from instseg_jax.data.converted import (
    NOT_A_CLASS,
    ConvertedImage,
    Listing,
    check_inside,
    find_named,
    folders_near,
    is_hidden,
    join_objects,
    picture_size,
    read_class_names,
)
from instseg_jax.data.polygons import draw_ellipse, turn_clockwise
from instseg_jax.files import is_regular, parse_json, read_regular
from instseg_jax.images import IMAGE_SUFFIXES
from instseg_jax.messages import quote, shorten

SHAPES = ("polygon", "brush", "rectangle", "ellipse")
UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # before the names of pictures that were uploaded


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
    height, width = picture_size(picture)
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
    objects = join_objects(parts, height, width, notes, what="regions")
    return ConvertedImage(picture, b"", picture.name, height, width, objects)


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
        place = np.array([value["x"], value["y"]]) * scale
        ring = draw_ellipse(place, *(np.array([value["radiusX"], value["radiusY"]]) * scale))
    elif {"x", "y", "width", "height"} <= value.keys():
        place = np.array([value["x"], value["y"]]) * scale
        ring = place + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (value["width"], value["height"]) * scale
    else:
        return None
    return turn_clockwise(ring, value.get("rotation") or 0, place)


def _find_picture(task: dict[str, Any], file: Path, root: Path, what: str) -> Path:
    """The picture that the task's data name by a path, an upload or an address, by its name near the file."""
    named = [value for value in task["data"].values() if isinstance(value, str)]
    for value in named:
        address = urlsplit(value)
        path = parse_qs(address.query).get("d", [unquote(address.path)])[0].replace("\\", "/")
        name = path.rpartition("/")[2]
        if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if (found := find_named([name, UPLOADED.sub("", name)], folders_near(file, root))) is not None:
            return found
    raise FileNotFoundError(f"{what} names the picture {quote(named[0] if named else None)}, which is not there.")
