"""Mended copies of annotation files: what `check_dataset --fix` writes.

Every change is said in a sentence. Nothing is guessed: where it is open what was meant (two pictures of one id, a
picture that was cropped or stretched after it was labelled), the doubtful entries are left out.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax import files, masks, pixels
from instseg_jax.data import check_annotations, check_images, coco_entries, polygons
from instseg_jax.data.check import Check, Source
from instseg_jax.data.check_images import PictureFacts
from instseg_jax.data.coco_entries import ImageRecord, is_id
from instseg_jax.messages import quote

ROUNDING_PX = 1.0  # by which the sides of a picture that was resized may differ from one factor for both
TURNING = (5, 6, 7, 8)  # EXIF orientations that swap height and width

Entry = dict[str, Any]
Moves = dict[int, tuple[ImageRecord, PictureFacts]]  # image id: what the file said, what the picture is


@dataclasses.dataclass(frozen=True)
class Repaired:
    """What became of the files."""

    source: Source
    changes: list[str]  # in words
    lost: dict[
        str, tuple[int, int, int, int]
    ]  # by split: pictures left out, of how many, objects left out, of how many
    moved: int  # objects whose masks were turned or scaled


def repair_dataset(check: Check) -> tuple[dict[str, dict[str, Any]], list[str], int]:
    """Mend what was found: the new content of each file that could be read, what was changed, in words, and how many
    objects were moved.
    """
    changes: list[str] = []
    contents = {split: _copy_finite(content) for split, content in check.contents.items()}
    num_moved = 0
    for split, content in contents.items():
        said: list[str] = []
        if any(flaw.code == "suspect_masks" and flaw.split == split for flaw in check.flaws):
            changes.append(f"{split}: nothing is changed, since its masks are likely wrong")
            continue
        num_moved += _repair_file(content, check, split, said)
        changes += [f"{split}: {text}" for text in said]
    if any(flaw.code == "categories_differ" for flaw in check.flaws):
        _unite_categories(contents, changes)
    return contents, changes, num_moved


def write_repaired(check: Check, folder: Path) -> Repaired:
    """Write the mended annotation files below `folder`: one for each file that could be read."""
    contents, changes, moved = repair_dataset(check)
    splits, lost = {}, {}
    for split, content in contents.items():
        file = folder / "annotations" / f"instance_{split}.json"
        is_touched = content != check.contents[split]  # what is left as it was stays so to the letter
        written = {"info": {}} | content if is_touched else content  # pycocotools 2.0.9 and 2.0.10 ask for it
        splits[split] = (files.write_json(file, written), check.source.splits[split][1])
        before = [len(check.contents[split][key]) for key in ("images", "annotations")]
        after = [len(content[key]) for key in ("images", "annotations")]
        lost[split] = (before[0] - after[0], before[0], before[1] - after[1], before[1])
    return Repaired(Source(check.source.root, splits), changes, lost, moved)


def _repair_file(content: Entry, check: Check, split: str, said: list[str]) -> int:
    """Mend a file in place; returns how many of its objects were moved."""
    folder, facts_of = check.source.splits[split][1], check.pictures[split]

    def inspect(name: str) -> PictureFacts:
        return check_images.inspect_listed(folder, name, check.bands, allow_outside=check.allow_outside)

    _read_text_ids(content, said)
    content["categories"] = _sound_categories(content["categories"], said)
    category_ids = {entry["id"] for entry in content["categories"]}
    images, moves = [], {}
    renamed: set[int] = set()
    _fill_in_sizes(content["images"], inspect, said)
    for entry in _sound_images(content["images"], said):
        known = facts_of.get(entry["id"]) or inspect(entry["file_name"])
        name = entry["file_name"]
        facts = _find_picture(entry, folder, known, inspect, said)
        if facts is None:
            continue
        if entry["file_name"] != name:
            renamed.add(entry["id"])
        record = coco_entries.read_image(entry, "")
        if facts.size != (record.height, record.width):
            if not _was_unturned(record, facts) and not _was_resized(record, facts):
                sizes = f"it is {facts.size[1]}x{facts.size[0]}, the file says {record.width}x{record.height}"
                said.append(
                    f"image {quote(record.id)} ({quote(record.file_name)}) left out with its objects: {sizes}, which "
                    "one factor does not explain: cropped, stretched or padded after it was labelled"
                )
                continue
            moves[record.id] = (record, facts)
            entry["height"], entry["width"] = facts.size
            name, old, new = (
                f"image {quote(record.id)} ({quote(record.file_name)})",
                f"{record.width}x{record.height}",
                f"{facts.size[1]}x{facts.size[0]}",
            )
            said.append(f"{name}: size {old} is now {new}{_how_moved(record, facts)}")
        images.append(entry)
    content["images"] = images = _one_entry_a_file(images, renamed, said)
    records = {entry["id"]: coco_entries.read_image(entry, "") for entry in images}
    annotations = []
    for entry in _sound_annotations(content["annotations"], said):
        what, image_id, category_id = f"annotation {quote(entry['id'])}", entry["image_id"], entry["category_id"]
        if not is_id(category_id) or category_id not in category_ids:
            said.append(f"{what} left out: unknown category id {quote(category_id)}")
        elif not is_id(image_id) or image_id not in records:
            said.append(f"{what} left out: there is no image {quote(image_id)}, or it was left out")
        elif _repair_object(what, entry, records[image_id], moves, said):
            annotations.append(entry)
    content["annotations"] = _without_twins(annotations, records, said)
    return sum(entry["image_id"] in moves for entry in content["annotations"])


def _read_text_ids(content: Entry, said: list[str]) -> None:
    """Make ids that are written as text the numbers that they spell, in place."""
    count = 0
    for key, names in coco_entries.ID_KEYS.items():
        for entry in content[key]:
            for name in names if isinstance(entry, dict) else ():
                value = entry.get(name)
                if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,18}\s*", value):
                    entry[name] = int(value)
                    count += 1
    if count:
        said.append(f"{count} ids that were text are numbers now")


def _one_entry_a_file(images: list[Entry], renamed: set[int], said: list[str]) -> list[Entry]:
    """Leave out entries whose picture was found under another name, where it is the picture of another one too."""
    uses = collections.Counter(entry["file_name"] for entry in images)
    kept = []
    for entry in images:
        if entry["id"] in renamed and uses[entry["file_name"]] > 1:
            said.append(
                f"image {quote(entry['id'])} left out: {quote(entry['file_name'])} stands for another entry too"
            )
        else:
            kept.append(entry)
    return kept


def _without_twins(annotations: list[Entry], records: dict[int, ImageRecord], said: list[str]) -> list[Entry]:
    """Of objects of one class with one and the same mask in a picture the first."""
    seen: set[tuple] = set()
    kept = []
    for entry in annotations:
        image = records[entry["image_id"]]
        segmentation = coco_entries.read_segmentation(entry["segmentation"], image)
        counts = bytes(masks.segmentation_to_rle(segmentation, image.height, image.width)["counts"])
        same = (image.id, entry["category_id"], counts)
        if same in seen:
            said.append(f"annotation {quote(entry['id'])} left out: the same object is there already")
            continue
        seen.add(same)
        kept.append(entry)
    return kept


def _copy_finite(node: Any) -> Any:
    """Copy a JSON document; NaN and infinity, which JSON does not have, become null."""
    if isinstance(node, dict):
        return {key: _copy_finite(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_copy_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def _sound_categories(entries: list[Any], said: list[str]) -> list[Entry]:
    sound: dict[int, Entry] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not is_id(entry.get("id")) or "name" not in entry:
            said.append(f"a category left out: {quote(entry)}")
        elif entry["id"] in sound:
            said.append(f"category {quote(entry['name'])} left out: its id {quote(entry['id'])} is taken")
        else:
            sound[entry["id"]] = entry
    return list(sound.values())


def _fill_in_sizes(entries: list[Any], inspect: Callable[[str], PictureFacts], said: list[str]) -> None:
    """Give image entries without a height or width those of their pictures, in place."""
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            continue
        sides: list[Any] = [entry.get(name) for name in ("height", "width")]
        if all(coco_entries.is_number(side) and side >= 1 for side in sides):
            continue
        facts = inspect(entry["file_name"])
        if facts.error is None:
            entry["height"], entry["width"] = facts.size
            said.append(
                f"image {quote(entry.get('id'))} ({quote(entry['file_name'])}): "
                "height and width are those of the picture"
            )


def _sound_images(entries: list[Any], said: list[str]) -> list[Entry]:
    """Image entries that can be read, without those that share an id."""
    by_id: dict[int, list[Entry]] = collections.defaultdict(list)
    for number, entry in enumerate(entries):
        try:
            record = coco_entries.read_image(entry, f"image number {number + 1}")
        except ValueError as error:
            said.append(f"an image left out: {error}")
            continue
        if is_id(record.id):
            by_id[record.id].append(entry)
        else:
            said.append(f"image {quote(record.file_name)} left out: its id {quote(record.id)} is no whole number")
    sound = []
    for image_id, group in by_id.items():
        if len({entry["file_name"] for entry in group}) > 1:
            said.append(f"image id {quote(image_id)} left out: {len(group)} pictures share it")
            continue
        if len(group) > 1:
            said.append(
                f"image {quote(image_id)} ({quote(group[0]['file_name'])}) is listed once now, not {len(group)} times"
            )
        sound.append(group[0])
    return sound


def _find_picture(
    entry: Entry, folder: Path, facts: PictureFacts, inspect: Callable[[str], PictureFacts], said: list[str]
) -> PictureFacts | None:
    """Facts of the picture of an image entry, under another name where that is plainly meant; None without one."""
    if facts.error is None:
        return facts
    found = check_images.find_file(folder, entry["file_name"]) if facts.is_missing else None
    if found is not None:
        facts = inspect(found.relative_to(folder).as_posix())
    if found is None or facts.error is not None:
        said.append(f"image {quote(entry['id'])} ({quote(entry['file_name'])}) left out: {facts.error}")
        return None
    name = found.relative_to(folder).as_posix()
    said.append(f"image {quote(entry['id'])}: file_name {quote(entry['file_name'])} is now {quote(name)}")
    entry["file_name"] = name
    return facts


def _sound_annotations(entries: list[Any], said: list[str]) -> list[Entry]:
    """Annotation entries with the keys that they need, each with an id of its own."""
    sound = []
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and {"image_id", "category_id"} <= entry.keys():
            sound.append(entry)
        else:
            said.append(f"annotation number {number + 1} left out: it lacks image_id or category_id")
    next_id = max((entry["id"] for entry in sound if is_id(entry.get("id"))), default=0) + 1
    unnamed = [entry for entry in sound if not is_id(entry.get("id"))]
    for entry in unnamed:
        entry["id"], next_id = next_id, next_id + 1
    if unnamed:
        said.append(f"{len(unnamed)} annotations without a whole id have the ids from {quote(unnamed[0]['id'])} on now")
    taken: set[int] = set()
    for entry in sound:
        if entry["id"] in taken:
            said.append(f"another annotation {quote(entry['id'])} has the id {quote(next_id)} now")
            entry["id"], next_id = next_id, next_id + 1
        taken.add(entry["id"])
    return sound


def _repair_object(what: str, entry: Entry, image: ImageRecord, moves: Moves, said: list[str]) -> bool:
    """Mend the mask, box and area of an object in place; says whether there is an object left."""
    is_changed = _shape_polygons(entry)
    if is_changed:
        said.append(f"{what}: its polygon is a list of numbers now")
    if image.id in moves:
        _move_object(entry, *moves[image.id])
        is_changed = True
    problem = check_annotations.find_segmentation_flaw(entry.get("segmentation"), image)
    if problem is not None:
        if not _repair_polygons(entry, image):
            said.append(f"{what} left out: {problem[1]}")
            return False
        said.append(f"{what}: polygons cut or left out ({problem[1]})")
        is_changed = True
    segmentation = coco_entries.read_segmentation(entry["segmentation"], image)
    rle = masks.segmentation_to_rle(segmentation, image.height, image.width)
    if not masks.rle_area(rle):
        said.append(f"{what} left out: its mask has no pixel")
        return False
    _, found = check_annotations.check_objects("", image, [entry])
    doubts = {flaw.code for flaw in found}
    if is_changed or doubts & {"box_mask_mismatch", "outside_image", "zero_area", "broken_json"}:
        x1, y1, x2, y2 = masks.rle_box_xyxy_px(rle)
        entry["bbox"], entry["area"] = [x1, y1, x2 - x1, y2 - y1], masks.rle_area(rle)
        if not is_changed:
            said.append(f"{what}: bbox and area computed from the mask")
    return True


def _shape_polygons(entry: Entry) -> bool:
    """Bring a flat polygon, or points as pairs, to COCO's form, in place; says whether it was another."""
    given = entry.get("segmentation")
    if not isinstance(given, list) or not given:
        return False
    if all(map(coco_entries.is_number, given)):
        entry["segmentation"] = [given]
    elif all(map(_is_point, given)) and len(given) >= 3:
        entry["segmentation"] = [[value for point in given for value in point]]
    elif all(isinstance(part, list) and len(part) >= 3 and all(map(_is_point, part)) for part in given):
        entry["segmentation"] = [[value for point in part for value in point] for part in given]
    else:
        return False
    return True


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(coco_entries.is_number, value))


def _repair_polygons(entry: Entry, image: ImageRecord) -> bool:
    """Keep what can be used of an object's polygons, cut at the picture's border; False when nothing is left."""
    if not isinstance(entry.get("segmentation"), list):
        return False
    kept = []
    for polygon in entry["segmentation"]:
        if not isinstance(polygon, list) or len(polygon) < 6 or not all(map(coco_entries.is_number, polygon)):
            continue
        points = np.array(polygon[: len(polygon) // 2 * 2], np.float64).reshape(-1, 2)
        points = polygons.clip_polygon(points, image.height, image.width)
        if len(points) >= 3 and not polygons.is_degenerate(points):
            kept.append(points.round(3).ravel().tolist())
    entry["segmentation"] = kept
    return bool(kept) and check_annotations.find_segmentation_flaw(kept, image) is None


def _how_moved(record: ImageRecord, facts: PictureFacts) -> str:
    if _was_unturned(record, facts):
        return ", its objects turned as its EXIF orientation says"
    return ", its objects scaled" if _was_resized(record, facts) else ""


def _move_object(entry: Entry, record: ImageRecord, facts: PictureFacts) -> None:
    """Bring an object from the size that the annotation file spoke of to that of the picture, where it is plain how."""
    segmentation = entry.get("segmentation")
    if check_annotations.find_segmentation_flaw(segmentation, record) is not None:
        return
    (height, width), is_turned = facts.size, _was_unturned(record, facts)
    if not is_turned and not _was_resized(record, facts):
        return
    read = coco_entries.read_segmentation(segmentation, record)
    if isinstance(read, dict):
        mask = masks.decode_rle(read)
        turn, resize = pixels.turn, check_images.resize_nearest
        entry["segmentation"] = masks.encode_mask(
            turn(mask, facts.orientation) if is_turned else resize(mask, facts.size)
        )
        return
    scale = (width / record.width, height / record.height)
    entry["segmentation"] = [
        (polygons.turn_points(p, facts.orientation, record.height, record.width) if is_turned else p * scale)
        .round(3)
        .ravel()
        .tolist()
        for p in read
    ]


def _was_unturned(record: ImageRecord, facts: PictureFacts) -> bool:
    return facts.orientation in TURNING and facts.size == (record.width, record.height)


def _was_resized(record: ImageRecord, facts: PictureFacts) -> bool:
    factor = math.sqrt(facts.size[0] * facts.size[1] / (record.height * record.width))
    off = (abs(side - factor * was) for side, was in zip(facts.size, (record.height, record.width), strict=True))
    return max(off) <= ROUNDING_PX


def _unite_categories(contents: dict[str, Entry], changes: list[str]) -> None:
    """Give both files one list of categories: ids of the first, names that it lacks added."""
    ids: dict[str, int] = {}
    for content in contents.values():
        for entry in content["categories"]:
            if str(entry["name"]) not in ids:
                is_free = entry["id"] not in ids.values()
                ids[str(entry["name"])] = entry["id"] if is_free else max(ids.values()) + 1
    for split, content in contents.items():
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        for old, name in names.items():
            if ids[name] != old:
                changes.append(f"{split}: category {quote(name)} has the id {quote(ids[name])} now, not {quote(old)}")
        for name in ids.keys() - set(names.values()):
            changes.append(f"{split}: category {quote(name)} added with the id {quote(ids[name])}")
        for entry in content["annotations"]:
            entry["category_id"] = ids[names[entry["category_id"]]]
        content["categories"] = [{"id": i, "name": name} for name, i in sorted(ids.items(), key=lambda item: item[1])]
