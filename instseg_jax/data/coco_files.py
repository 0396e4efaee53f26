"""COCO's JSON as other tools write it, in any number of files: polygons and run-length codes (holes and parts stay).

Where the folder is laid out as the project reads it, the files of its splits count. Otherwise all below it do; those
with val, valid or validation in their path are the validation split, those with test are left out.
"""

import collections
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from instseg_jax import masks
from instseg_jax.data import coco_entries, layouts
from instseg_jax.data.converted import (
    NOT_A_CLASS,
    ConvertedImage,
    ConvertedObject,
    Listing,
    check_inside,
    find_named,
    folders_near,
    is_hidden,
    join_parts,
    picture_size,
    read_class_names,
)
from instseg_jax.files import is_regular, parse_json, read_regular
from instseg_jax.messages import quote

LISTS = ("images", "annotations", "categories")
PART_OF_WORD = {"val": "val", "valid": "val", "validation": "val", "test": "test"}
OURS = ("id", "file_name", "height", "width")  # of an image; the rest is kept as it is


@dataclasses.dataclass(frozen=True)
class _File:
    entries: list[dict[str, Any]]  # of its pictures
    records: list[coco_entries.ImageRecord]
    names: dict[int, str]  # of the classes by id, ids ascending
    objects: dict[int, list[dict[str, Any]]]  # by image id


def find_annotations(source: Path, labels: str | Path | None) -> Listing:
    """One path a picture: that of its file, and its number in it. Class names are those of the files, by their ids.

    Raises: FileNotFoundError when there are none, ValueError for a picture that two files list.
    """
    parts, left_out = _find_files(source)
    names: dict[str, None] = {}
    found: dict[str, list[Path]] = {part: [] for part in parts}
    file_of: dict[Path, Path] = {}
    for part, file in ((part, file) for part, files in parts.items() for file in files):
        content = _read(file)
        names |= dict.fromkeys(content.names.values())
        found[part] += [file / str(number) for number in range(len(content.records))]
        for record in content.records:
            picture = _find_picture(record, file, source)
            if picture is not None and file_of.setdefault(picture.resolve(), file) != file:
                other = file_of[picture.resolve()]
                raise ValueError(f"{other} and {file} both list the picture {quote(record.file_name)}; keep one.")
    return Listing(source, found, read_class_names(source, labels) if labels else tuple(names), left_out=left_out)


def read_annotation(path: Path, listing: Listing, notes: collections.Counter[str]) -> ConvertedImage:
    """Read one picture of a file; what is left out is counted in `notes`.

    Raises: ValueError that names the file and the picture or annotation for what can't be read.
    """
    file, content = path.parent, _read(path.parent)
    record, entry = content.records[int(path.name)], content.entries[int(path.name)]
    what = f"Image {quote(record.id)} of {file}"
    found = _find_picture(record, file, listing.root)
    if found is None:
        raise FileNotFoundError(f"{what} names the picture {quote(record.file_name)}, which is not there.")
    picture = check_inside(found, listing.root, what).resolve()
    height, width = picture_size(picture)
    if (record.height, record.width) != (height, width):
        raise ValueError(f"{what} is said to have {record.width} x {record.height} pixels, but has {width} x {height}.")
    objects = []
    for annotation in content.objects.get(record.id, ()):
        try:
            drawn = _read_object(annotation, record, content.names, notes)
        except ValueError as error:
            raise ValueError(f"Annotation {quote(annotation.get('id'))} of {file}: {error}") from error
        objects += [drawn] if drawn is not None else []
    facts = {key: value for key, value in entry.items() if key not in OURS}
    if record.license:
        facts["license"] = record.license  # by name: ids mean nothing without their file's list
    return ConvertedImage(picture, b"", picture.name, height, width, tuple(objects), facts)


def _read_object(
    entry: dict[str, Any], record: coco_entries.ImageRecord, names: dict[int, str], notes: collections.Counter[str]
) -> ConvertedObject | None:
    """An object of a picture; None, noted, for one without a class or a pixel."""
    if not coco_entries.is_id(entry["category_id"]) or entry["category_id"] not in names:
        raise ValueError(f"its category_id is {quote(entry['category_id'])}, which the file does not list.")
    name, segmentation = names[entry["category_id"]], entry.get("segmentation")
    if name in NOT_A_CLASS:
        notes["objects left out, without a class"] += 1
        return None
    if not segmentation and entry.get("bbox"):
        x, y, width, height = _read_box(entry["bbox"])
        segmentation = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        notes["boxes without a mask, made rectangles"] += 1
    read = coco_entries.read_segmentation(segmentation, record)
    size = record.height, record.width
    parts = [masks.segmentation_to_mask(read, *size)] if isinstance(read, dict) else list(read)
    joined = join_parts(parts, *size)
    if joined is None:
        notes["objects left out, without a pixel in their picture"] += 1
        return None
    facts = {"ignore": 1} if coco_entries.read_flag(entry, "ignore") else {}
    return ConvertedObject(name, joined, coco_entries.read_flag(entry, "iscrowd"), facts)


def _read_box(box: Any) -> list[float]:
    numbers = [coco_entries.read_number(value) for value in box] if isinstance(box, list) else []
    if len(numbers) != 4 or None in numbers:
        raise ValueError(f"its bbox must be four numbers [x, y, width, height], got {quote(box)}.")
    return [float(number) for number in numbers if number is not None]


def _find_files(source: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """Annotation files by split, and a note for each that is in none."""
    below = [path for path in sorted(source.rglob("*.json")) if not is_hidden(path, source) and _is_coco(path)]
    if not below:
        raise FileNotFoundError(f"There is no JSON file of {', '.join(LISTS)} below {str(source)!r}.")
    parts: dict[str, list[Path]] = {}
    for part in ("train", "val"):
        usual = [path for path in layouts.annotation_files(source, part) if path in below]
        parts |= {part: usual[:1]} if usual else {}
    if "train" not in parts:
        parts = {}
        for path in below:
            parts.setdefault(_part_of(path.relative_to(source)), []).append(path)
        parts.pop("test", None)
        if set(parts) == {"val"}:
            parts = {"train": parts["val"]}
    used = {path for files in parts.values() for path in files}
    if not used:
        raise FileNotFoundError(
            f"{below[0]} is of a test split, and there is no other JSON file of {', '.join(LISTS)}."
        )
    return parts, tuple(f"COCO files left out, of no split, as {p.name}" for p in below if p not in used)


def _part_of(path: Path) -> str:
    words = re.findall(r"[a-z]+", path.as_posix().lower())
    return next((PART_OF_WORD[word] for word in words if word in PART_OF_WORD), "train")


def _find_picture(record: coco_entries.ImageRecord, file: Path, root: Path) -> Path | None:
    name = record.file_name.replace("\\", "/")
    usual = layouts.image_folders(root, _part_of(file.relative_to(root)), file)
    folders = [file.parent, *usual, *folders_near(file, root), *folders_near(file.parent, root)]
    return find_named([name, name.rpartition("/")[2]], folders)


def _is_coco(file: Path) -> bool:
    try:
        content = parse_json(read_regular(file), file) if is_regular(file) else None
    except ValueError:
        return False
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in LISTS):
        return False
    return not any("segments_info" in entry for entry in content["annotations"][:1])  # panoptic


@functools.lru_cache(maxsize=2)
def _parse(file: Path, changed: int) -> _File:
    content = coco_entries.read_json(file)
    records = coco_entries.read_images(content["images"], file, content.get("licenses"))
    objects: dict[int, list[dict[str, Any]]] = {record.id: [] for record in records}
    for number, entry in enumerate(content["annotations"]):
        what = f"Annotation number {number + 1} of {file}"
        coco_entries.require_keys(entry, ("image_id", "category_id"), what)
        if not coco_entries.is_id(entry["image_id"]) or entry["image_id"] not in objects:
            raise ValueError(
                f"{what} belongs to the image id {quote(entry['image_id'])}, which the file does not list."
            )
        objects[entry["image_id"]].append(entry)
    return _File(content["images"], records, dict(coco_entries.read_categories(content["categories"], file)), objects)


def _read(file: Path) -> _File:
    return _parse(file, file.stat().st_mtime_ns)
