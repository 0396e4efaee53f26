"""Everything about an annotation file that can be checked without opening a picture.

Entries are read by the same functions as for training (`data/coco_entries.py`), so what passes here can be
read there; the findings that go further (boxes that disagree with masks, crossing outlines) are added.
"""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax import masks
from instseg_jax.data import coco_entries
from instseg_jax.data.coco import untrainable_reason
from instseg_jax.data.coco_entries import Annotation, ImageRecord, is_id
from instseg_jax.data.examples import Layout
from instseg_jax.data.findings import Flaw
from instseg_jax.data.polygons import crosses_itself, is_degenerate
from instseg_jax.data.rasterize import render_masks, whole_view
from instseg_jax.images import content_size
from instseg_jax.messages import first_few, quote

OUTSIDE_TOLERANCE_PX = 2.0  # annotators overshoot the border by a pixel or two
BOX_TOLERANCE_PX = 3.0  # outlines are rounded to pixels and simplified: no reason to doubt a box
MIN_BOX_IOU = 0.8  # of the bbox with the box around the mask
SUSPECT_SHARE, MIN_SUSPECT = 0.8, 3  # of a split's boxes that must disagree with their masks to suspect the masks
THIN_PIXELS = 2.0  # mask pixels: what is thicker on average can't fall between the pixels of a mask
MAX_CROSSING_POINTS = 1000  # polygons with more are not searched for crossings: the search is quadratic


@dataclasses.dataclass(frozen=True)
class CheckedObject:
    """An object that can be read: its annotation, and its mask as a run-length code."""

    annotation: Annotation
    category_id: int
    mask_area: int
    mask_side: int  # the longer side of the box around the mask, in pixels
    reason: str | None  # why training leaves it out

    @property
    def is_trained(self) -> bool:
        """Whether training takes it, unless its mask vanishes."""
        return self.reason is None


@dataclasses.dataclass
class CheckedFile:
    """What of an annotation file can be used: pictures by id, their objects, and the category names by id."""

    images: dict[int, ImageRecord]
    objects: dict[int, list[CheckedObject]]  # by image id
    categories: dict[int, str]
    num_annotations: int  # entries of the file, usable or not


def check_file(split: str, content: dict[str, Any]) -> tuple[CheckedFile, list[Flaw]]:
    """Check the pictures, categories and references of a file; objects are added by `check_objects`."""
    flaws: list[Flaw] = []
    images = _check_images(split, content["images"], flaws)
    categories = _check_categories(split, content["categories"], flaws)
    return CheckedFile(images, {i: [] for i in images}, categories, len(content["annotations"])), flaws


def entries_by_image(
    split: str, content: dict[str, Any], checked: CheckedFile
) -> tuple[dict[int, list[dict[str, Any]]], list[Flaw]]:
    """Annotation entries of each known picture, and the flaws of those that belong nowhere."""
    flaws: list[Flaw] = []
    entries: dict[int, list[dict[str, Any]]] = {i: [] for i in checked.images}
    known = {entry["id"] for entry in content["images"] if isinstance(entry, dict) and is_id(entry.get("id"))}
    seen: collections.Counter[int] = collections.Counter()
    for number, entry in enumerate(content["annotations"]):
        what = f"annotation number {number + 1}"
        try:
            coco_entries.require_keys(entry, ("id", "image_id", "category_id"), what)
            coco_entries.check_ids([entry["id"]], "annotations", Path(split))
        except ValueError as error:
            flaws.append(Flaw("broken_json", split, (), str(error), is_of_annotation=True))
            continue
        what, ids = f"annotation {quote(entry['id'])}", (entry["id"],)
        seen[entry["id"]] += 1
        image_id, category_id = entry["image_id"], entry["category_id"]
        if not is_id(image_id) or image_id not in known:
            flaws.append(
                Flaw("unknown_image", split, ids, f"{what}: image id {quote(image_id)}", is_of_annotation=True)
            )
        elif not is_id(category_id) or category_id not in checked.categories:
            detail = f"{what}: category id {quote(category_id)}"
            flaws.append(Flaw("unknown_category", split, ids, detail, is_of_annotation=True))
        elif image_id in entries:
            entries[image_id].append(entry)
    for annotation_id, count in seen.items():
        if count > 1:
            detail = f"annotation id {quote(annotation_id)} occurs {count} times"
            flaws.append(Flaw("duplicate_annotation_id", split, (annotation_id,), detail, is_of_annotation=True))
    return entries, flaws


def check_objects(
    split: str, image: ImageRecord, entries: list[dict[str, Any]]
) -> tuple[list[CheckedObject], list[Flaw]]:
    """Read and draw the objects of a picture; also returns what is wrong with them."""
    objects, flaws = [], []
    seen: dict[tuple, int] = {}  # class and mask: the first object of these

    def add(code: str, entry: dict[str, Any], detail: str) -> None:
        text = f"annotation {quote(entry['id'])} of {quote(image.file_name)}: {detail}"
        flaws.append(Flaw(code, split, (entry["id"],), text, is_of_annotation=True))

    for entry in entries:
        problem = find_segmentation_flaw(entry.get("segmentation"), image)
        if problem is not None:
            add(problem[0], entry, problem[1])
            continue
        try:
            annotation = coco_entries.read_annotation(entry, 0, image)
        except ValueError as error:
            add("broken_json", entry, str(error))
            continue
        rle = masks.segmentation_to_rle(annotation.segmentation, image.height, image.width)
        area = masks.rle_area(rle)
        mask_box = masks.rle_box_xyxy_px(rle)
        same = (entry["category_id"], bytes(rle["counts"]) if area else annotation.box_xywh_px)
        if same in seen:
            add("duplicate_object", entry, f"it has the class and the mask of annotation {quote(seen[same])}")
        seen.setdefault(same, entry["id"])
        for code, detail in _find_doubts(annotation, mask_box, area, image):
            add(code, entry, detail)
        side = max(mask_box[2] - mask_box[0], mask_box[3] - mask_box[1])
        reason = untrainable_reason(annotation, image)
        objects.append(CheckedObject(annotation, entry["category_id"], area, side, reason))
    return objects, flaws


def vanishing_sizes(
    objects: Sequence[CheckedObject], image: ImageRecord, sizes: Sequence[tuple[int, int]], layout: Layout
) -> dict[int, list[tuple[int, int]]]:
    """Network inputs (height, width), out of `sizes`, at which the mask of a trained object has no pixel left.

    Returns: {position in `objects`: sizes}; objects that are seen at every size are not in it. Only objects that are
    thin at a size are drawn there.
    """
    gone: dict[int, list[tuple[int, int]]] = {}
    for size in dict.fromkeys(sizes):
        content = content_size((image.height, image.width), size, layout.resize)
        scale = min(content[0] / image.height, content[1] / image.width)
        thin = [
            i
            for i, o in enumerate(objects)
            if o.is_trained and o.mask_area * scale < THIN_PIXELS * layout.mask_stride * max(o.mask_side, 1)
        ]
        drawn = render_masks(
            [objects[i].annotation.segmentation for i in thin],
            (image.height, image.width),
            whole_view(image.height, image.width),
            content,
            size,
            mask_stride=layout.mask_stride,
            rasterization=layout.mask_rasterization,
        )
        for i, mask in zip(thin, drawn, strict=True):
            if not mask.any():
                gone.setdefault(i, []).append(size)
    return gone


def find_suspect_masks(split: str, flaws: Sequence[Flaw], num_objects: int) -> Flaw | None:
    """Nearly all boxes that disagree with their masks mean that the masks are wrong, not the boxes."""
    count = sum(flaw.code == "box_mask_mismatch" for flaw in flaws)
    if count < MIN_SUSPECT or count <= SUSPECT_SHARE * num_objects:
        return None
    return Flaw("suspect_masks", split, (), f"{count} of {num_objects} boxes are not the boxes around their masks")


def find_segmentation_flaw(segmentation: Any, image: ImageRecord) -> tuple[str, str] | None:
    """The code and the words for what makes a segmentation unusable, None when it is sound."""
    try:
        read = coco_entries.read_segmentation(segmentation, image)
    except ValueError as error:
        if isinstance(segmentation, dict):
            return "broken_rle", str(error)
        return ("outside_image" if "far outside" in str(error) and _all_finite(segmentation) else "degenerate_polygon",
                str(error))  # fmt: skip
    if isinstance(read, dict):
        return None
    for points in read:
        if is_degenerate(points):
            return "degenerate_polygon", "it has a polygon without area, its points lie on one line"
    reach = max(_reach(points.min(axis=0), points.max(axis=0), image) for points in read)
    if reach > OUTSIDE_TOLERANCE_PX:
        return "outside_image", f"a polygon reaches {reach:.0f} px beyond the {image.width}x{image.height} picture"
    return None


def compare_categories(train: CheckedFile, val: CheckedFile) -> list[Flaw]:
    """What the category lists of the two splits disagree on."""
    ids = sorted(train.categories.keys() | val.categories.keys())
    names = [(i, train.categories.get(i, "missing"), val.categories.get(i, "missing")) for i in ids]
    return [
        Flaw(
            "categories_differ",
            None,
            (i,),
            f"category id {quote(i)}: {quote(a)} in train, {quote(b)} in val",
        )
        for i, a, b in names
        if a != b
    ]


def _check_images(split: str, entries: list[Any], flaws: list[Flaw]) -> dict[int, ImageRecord]:
    by_id: dict[int, list[ImageRecord]] = {}
    for number, entry in enumerate(entries):
        try:
            record = coco_entries.read_image(entry, f"image number {number + 1}")
            coco_entries.check_ids([record.id], "images", Path(split))
            by_id.setdefault(record.id, []).append(record)
        except ValueError as error:
            flaws.append(Flaw("broken_json", split, (), str(error)))
    names: collections.Counter[str] = collections.Counter()
    for image_id, records in by_id.items():
        if len(records) > 1:
            listed = first_few([repr(record.file_name) for record in records])
            flaws.append(Flaw("duplicate_image_id", split, (image_id,), f"image id {quote(image_id)}: {listed}"))
        names.update(record.file_name for record in records[:1])
    for name, count in names.items():
        if count > 1:
            ids = tuple(i for i, records in by_id.items() if records[0].file_name == name)
            flaws.append(Flaw("duplicate_file_name", split, ids, f"{quote(name)} is listed {count} times"))
    return {image_id: records[0] for image_id, records in by_id.items()}


def _check_categories(split: str, entries: list[Any], flaws: list[Flaw]) -> dict[int, str]:
    try:
        categories = dict(coco_entries.read_categories(entries, Path(f"the {split} file")))
    except ValueError as error:
        flaws.append(Flaw("broken_json", split, (), str(error)))
        sound = [e for e in entries if isinstance(e, dict) and is_id(e.get("id")) and "name" in e]
        return {entry["id"]: " ".join(str(entry["name"]).split())[: coco_entries.MAX_NAME] for entry in reversed(sound)}
    for name, count in collections.Counter(categories.values()).items():
        if count > 1:
            ids = tuple(i for i, of_id in categories.items() if of_id == name)
            flaws.append(Flaw("duplicate_category_name", split, ids, f"{quote(name)} has the ids {ids}"))
    return categories


def _find_doubts(
    annotation: Annotation, mask_box: tuple[int, int, int, int], mask_area: int, image: ImageRecord
) -> list[tuple[str, str]]:
    """Codes and words for what is odd about an object that can be drawn."""
    doubts = []
    reason = untrainable_reason(annotation, image)
    if reason is not None and not annotation.is_crowd and annotation.area > 0:  # these have findings of their own
        doubts.append(("not_trained", f"training leaves it out: {reason}"))
    x, y, w, h = annotation.box_xywh_px
    box = np.array([x, y, x + w, y + h])
    if annotation.is_crowd:
        doubts.append(("crowd", "it is a crowd"))
    if _reach(box[:2], box[2:], image) > OUTSIDE_TOLERANCE_PX:
        doubts.append(("outside_image", f"its bbox reaches beyond the {image.width}x{image.height} picture"))
    elif mask_area == 0:
        doubts.append(("empty_mask", "its mask has no pixel"))
    elif np.abs(box - mask_box).max() > BOX_TOLERANCE_PX and _iou(box, np.array(mask_box)) < MIN_BOX_IOU:
        rounded = [round(v, 1) for v in box.tolist()]
        doubts.append(("box_mask_mismatch", f"its bbox has the corners {rounded}, its mask {list(mask_box)}"))
    if annotation.area <= 0 and mask_area:
        doubts.append(("zero_area", f"its area is {annotation.area:g}, but its mask has {mask_area} pixels"))
    if not isinstance(annotation.segmentation, dict) and any(
        3 < len(points) <= MAX_CROSSING_POINTS and crosses_itself(points) for points in annotation.segmentation
    ):
        doubts.append(("self_crossing_polygon", "its outline crosses itself"))
    return doubts


def _reach(low: np.ndarray, high: np.ndarray, image: ImageRecord) -> float:
    """How many pixels a box reaches beyond its picture, negative when it stays inside."""
    return float(max(-low.min(), high[0] - image.width, high[1] - image.height))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = max(sides[0], 0) * max(sides[1], 0)
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared
    return float(shared / union) if union > 0 else 0.0


def _all_finite(segmentation: list[Any]) -> bool:
    return all(coco_entries.is_number(value) for polygon in segmentation for value in polygon)
