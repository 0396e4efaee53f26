"""The entries of a COCO annotation file: each one read and checked by itself, in one sentence each.

What a whole file means, and how splits are found, is `data/coco.py`; what is wrong with a data set as a
whole, `data/check.py`.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax import masks
from instseg_jax.files import parse_json, read_regular
from instseg_jax.messages import first_few, quote

MAX_SIDE_PX = 10**6  # of a picture: masks of what lies beyond would be drawn for hours
MAX_REACH = 10  # times the longer side of its picture that a polygon may reach
MAX_NAME = 500  # letters of a class name
MAX_FILE_NAME = 4096  # letters of a picture's path, as Linux has it
MAX_WHOLE_FLOAT = 2.0**53  # beyond it a float does not name one whole number
ID_KEYS = {"images": ("id",), "categories": ("id",), "annotations": ("id", "image_id", "category_id")}
FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRecord:
    """One picture: its id in the file, its path relative to the image folder, its size in pixels."""

    id: int
    file_name: str
    height: int
    width: int
    license: str = ""  # name or address, where the file tells


@dataclasses.dataclass(frozen=True, slots=True)
class Annotation:
    """One object of a picture; `label` is the class index, the box is as the file has it."""

    id: int
    label: int
    box_xywh_px: tuple[float, float, float, float]
    area: float
    segmentation: masks.Segmentation
    is_crowd: bool
    is_ignored: bool


def read_json(file: Path) -> dict[str, Any]:
    """Read an annotation file as far as its three lists; raises FileNotFoundError or ValueError."""
    try:
        content = parse_json(read_regular(file), file)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no annotation file {str(file)!r}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object with images, annotations and categories.")
    require_keys(content, ("images", "annotations", "categories"), str(file))
    for key in ("images", "annotations", "categories"):
        if not isinstance(content[key], list):
            raise ValueError(f"{quote(key)} of {file} must be a list.")
    for key, names in ID_KEYS.items():
        for entry in content[key]:
            for name in names if isinstance(entry, dict) else ():
                if name in entry:
                    entry[name] = whole(entry[name])
    return content


def whole(value: Any) -> Any:
    """An id as it is meant: 1.0 is 1, as pandas writes ids; anything else stays what it is."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= MAX_WHOLE_FLOAT
    return int(value) if is_whole else value


def read_categories(entries: list[Any], file: Path) -> list[tuple[int, str]]:
    """(id, name) of each category, by ascending id: the rank is the class index.

    Raises: ValueError that names the file when there are none, or an entry is malformed.
    """
    for number, entry in enumerate(entries):
        require_keys(entry, ("id", "name"), f"Category number {number + 1} of {file}")
    if not entries:
        raise ValueError(f"{file} lists no categories.")
    check_ids([entry["id"] for entry in entries], "categories", file)
    return sorted(
        (entry["id"], read_name(entry["name"], f"Category {quote(entry['id'])} of {file}")) for entry in entries
    )


def read_name(name: Any, what: str) -> str:
    """A class name on one line: white space at the ends goes, control characters inside become a space.

    Raises: ValueError, begun by `what`, for a name without a letter, of too many, or of characters that are no text.
    """
    text = str(name)
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise ValueError(f"{what} has the name {quote(text[:MAX_NAME])}, half of a character that UTF-8 can't write.")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        text = " ".join("".join(letter if ord(letter) >= 32 and ord(letter) != 127 else " " for letter in text).split())
    text = text.strip()
    if not text:
        raise ValueError(f"{what} has an empty name.")
    if len(text) > MAX_NAME:
        raise ValueError(f"{what} has a name of {len(text)} letters, at most {MAX_NAME} are allowed.")
    return text


def read_images(entries: list[Any], file: Path, licenses: Any = None) -> list[ImageRecord]:
    """The pictures of a file, their ids whole numbers that differ; `licenses` is the file's list of them."""
    named = _read_licenses(licenses)
    records = [read_image(entry, f"Image number {number + 1} of {file}", named) for number, entry in enumerate(entries)]
    check_ids([record.id for record in records], "images", file)
    return records


def read_image(entry: Any, what: str, licenses: Mapping[str, str] | None = None) -> ImageRecord:
    """One picture; `what` begins the message of the ValueError, `licenses` names licences by the text of their id."""
    require_keys(entry, ("id", "file_name", "height", "width"), what)
    what, file_name = f"{what} (id {quote(entry['id'])})", entry["file_name"]
    for name in ("height", "width"):
        value = entry[name]
        number = read_number(value)
        if number is None or number != int(number) or not 1 <= number <= MAX_SIDE_PX:
            raise ValueError(f"{what} has the {name} {quote(value)}, not a number of pixels.")
    if not isinstance(file_name, str):
        raise ValueError(f"{what} has the file name {quote(file_name)}, not a string.")
    is_text = not any(letter == "\0" or 0xD800 <= ord(letter) <= 0xDFFF for letter in file_name[:MAX_FILE_NAME])
    if len(file_name) > MAX_FILE_NAME or not is_text:
        raise ValueError(f"{what} has the file name {quote(file_name)}, which no file can have.")
    license_id = str(entry.get("license") or "")  # an id of the file's list, or a name
    license = (licenses or {}).get(license_id, "" if license_id.isdigit() else license_id)
    height, width = (int(float(entry[side])) for side in ("height", "width"))
    return ImageRecord(entry["id"], file_name, height, width, license)


def _read_licenses(entries: Any) -> dict[str, str]:
    if not isinstance(entries, list):
        return {}
    sound = [entry for entry in entries if isinstance(entry, dict) and "id" in entry]
    return {str(entry["id"]): str(entry.get("name") or entry.get("url") or "") for entry in sound}


def read_annotation(entry: dict[str, Any], label: int, image: ImageRecord) -> Annotation:
    """One object of a picture; a missing `bbox` or `area` is computed from the mask."""
    segmentation = read_segmentation(entry.get("segmentation"), image)
    box, area = read_box_and_area(entry, segmentation, image)
    return Annotation(
        id=entry["id"],
        label=label,
        box_xywh_px=box,
        area=area,
        segmentation=segmentation,
        is_crowd=read_flag(entry, "iscrowd"),
        is_ignored=read_flag(entry, "ignore"),
    )


def read_flag(entry: dict[str, Any], name: str) -> bool:
    """A field that is 0 or 1, as a number, a truth value or a word; missing or null is 0.

    Raises: ValueError, without saying which object, for anything else.
    """
    value = entry.get(name)
    if value is None:
        return False
    text = str(value).strip().lower()
    if isinstance(value, bool | int | float | str) and text in FLAGS:
        return FLAGS[text]
    raise ValueError(f"its {name} must be 0 or 1, got {quote(value)}.")


def read_number(value: Any) -> float | None:
    """A finite number, also one that is written as text; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if is_number(value) else None


def read_box_and_area(
    entry: dict[str, Any], segmentation: masks.Segmentation, image: ImageRecord
) -> tuple[tuple[float, float, float, float], float]:
    """(x, y, width, height) in pixels and the area of an object, from the entry or else from its mask.

    A box without width or height is as good as none. Raises: ValueError, without saying which object, for a box or an
    area that is no number.
    """
    box, area = entry.get("bbox"), entry.get("area")
    numbers: list[float] | None = None
    if box is not None:
        read = [read_number(v) for v in box] if isinstance(box, (list, tuple)) else []
        numbers = [v for v in read if v is not None]
        if len(read) != 4 or len(numbers) != 4:
            raise ValueError(f"its bbox must be four numbers [x, y, width, height], got {quote(box)}.")
        if numbers[2] <= 0 or numbers[3] <= 0:
            numbers = None
    if numbers is None or area is None:
        rle = masks.segmentation_to_rle(segmentation, image.height, image.width)
        if area is None:
            area = masks.rle_area(rle)
        if numbers is None:
            x1, y1, x2, y2 = masks.rle_box_xyxy_px(rle)
            numbers = [x1, y1, x2 - x1, y2 - y1]
    area_read = read_number(area)
    if area_read is None:
        raise ValueError(f"its area must be a number, got {quote(area)}.")
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]), float(numbers[3])), area_read


def read_segmentation(segmentation: Any, image: ImageRecord) -> masks.Segmentation:
    """Polygons or a run-length code of a picture, checked so that drawing it is safe.

    Raises: ValueError, without saying which object, for everything else.
    """
    if isinstance(segmentation, dict):
        rle = masks.segmentation_to_rle(segmentation, image.height, image.width)
        masks.check_rle(rle)
        return rle
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no segmentation: neither polygons nor a run-length code.")
    if not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError("its segmentation must be a list of polygons [x1, y1, x2, y2, ...], not a flat list.")
    return tuple(_read_polygon(polygon, image) for polygon in segmentation)


def _read_polygon(polygon: list[Any], image: ImageRecord) -> np.ndarray:
    if len(polygon) < 6:
        raise ValueError(f"it has a polygon with {len(polygon) // 2} points, at least 3 are needed.")
    if len(polygon) % 2:
        raise ValueError(f"it has a polygon with {len(polygon)} numbers, but x and y come in pairs.")
    try:
        points = np.array(polygon, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("it has a polygon with coordinates that are not numbers.") from None
    # Drawing takes memory and time in proportion to the coordinates: a stray 1e9 would end the process.
    limit = MAX_REACH * max(image.height, image.width)
    if not np.abs(points).max() <= limit:
        raise ValueError(f"it has a polygon that reaches far outside its {image.width}x{image.height} image.")
    return points


def require_keys(entry: Any, keys: Sequence[str], what: str) -> None:
    """Raise ValueError unless the entry is an object that has the keys."""
    if not isinstance(entry, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(entry).__name__}.")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(map(quote, missing))}.")


def check_ids(ids: Sequence[Any], what: str, file: Path) -> None:
    """Raise ValueError unless the ids are whole numbers that differ."""
    for value in ids:
        if not is_id(value):
            raise ValueError(f"The ids of the {what} in {file} must be whole numbers, got {quote(value)}.")
    if len(set(ids)) < len(ids):
        twice = [value for value, count in collections.Counter(ids).items() if count > 1]
        raise ValueError(f"Several {what} of {file} share an id: {first_few(twice)}.")


def is_id(value: Any) -> bool:
    """Whether a value of a JSON file can be an id: a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond 1.8e308
        return False
