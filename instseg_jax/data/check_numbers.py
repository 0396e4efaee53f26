"""The numbers of a data set (objects of each class, in each picture, their sizes) and the advice they give."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from instseg_jax.data.check_annotations import CheckedFile, CheckedObject
from instseg_jax.data.coco_entries import ImageRecord
from instseg_jax.data.findings import Flaw
from instseg_jax.messages import quote

PERCENTILES = (1, 10, 50, 90, 99)
NEAR_LIMIT = 0.8  # of the queries or slots that the 99th percentile of objects a picture may fill
SMALL_SIDE_PX = 16  # square root of an object's area at the training size
MAX_IMBALANCE = 50  # times as many objects of the most frequent class as of the rarest
FEW_OBJECTS = 5  # of a class in training, where the others have many


def count_classes(files: dict[str, CheckedFile]) -> dict[str, dict[str, int]]:
    """Objects of each class in each split, crowds included: {class name: {split: count}}, by category id."""
    names = {i: name for file in reversed(files.values()) for i, name in file.categories.items()}
    counts = {
        split: collections.Counter(o.category_id for objects in file.objects.values() for o in objects)
        for split, file in files.items()
    }
    table: dict[str, dict[str, int]] = {}
    for category_id in sorted(names):
        row = table.setdefault(names[category_id], dict.fromkeys(files, 0))
        for split in files:
            row[split] += counts[split][category_id]
    return table


def measure_split(file: CheckedFile, image_size: Sequence[int], resize: str) -> dict[str, Any]:
    """Percentiles of objects a picture, of picture sizes and of object sizes (square root of the mask's area)."""
    per_image = [len(file.objects[i]) for i in file.images]
    sides, at_training = _object_sides(file, image_size, resize)
    return {
        "images": len(file.images),
        "images_without_objects": per_image.count(0),
        "objects": sum(per_image),
        "annotations": file.num_annotations,
        "crowds": sum(o.annotation.is_crowd for objects in file.objects.values() for o in objects),
        "objects_per_image": summarise(per_image),
        "image_width_px": summarise([image.width for image in file.images.values()]),
        "image_height_px": summarise([image.height for image in file.images.values()]),
        "object_side_px": summarise(sides),
        "object_side_at_training_size_px": summarise(at_training),
        "share_of_small_objects": _share([side < SMALL_SIDE_PX for side in at_training]),
    }


def advise(
    files: dict[str, CheckedFile],
    measured: dict[str, dict[str, Any]],
    *,
    num_queries: int,
    max_instances: int,
    image_size: Sequence[int],
) -> list[Flaw]:
    """Warnings and advice that follow from the numbers."""
    flaws = []
    for split, numbers in measured.items():
        busy = numbers["objects_per_image"].get("p99", 0)
        for limit, name in ((num_queries, "model.num_queries"), (max_instances, "data.max_instances")):
            if busy > NEAR_LIMIT * limit:
                detail = f"99 of 100 pictures have at most {busy:g} objects, {name} is {limit}"
                flaws.append(Flaw("more_queries", split, (), detail))
        small = numbers["share_of_small_objects"]
        if small is not None and small > 0.5:
            size = "x".join(str(side) for side in image_size)
            detail = f"{small:.0%} of the objects are smaller than {SMALL_SIDE_PX} px at {size}"
            flaws.append(Flaw("small_objects", split, (), detail))
    return flaws + _class_flaws(files)


def summarise(values: Sequence[float]) -> dict[str, float]:
    """{"min", "mean", "max", "p1", "p10", "p50", "p90", "p99"} of some numbers; empty for none."""
    if not len(values):
        return {}
    percentiles = np.percentile(values, PERCENTILES)
    summary = {"min": float(np.min(values)), "mean": float(np.mean(values)), "max": float(np.max(values))}
    summary |= {f"p{p}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)}
    return {name: round(value, 2) for name, value in summary.items()}


def _object_sides(file: CheckedFile, size: Sequence[int], resize: str) -> tuple[list[float], list[float]]:
    sides, at_training = [], []
    for image_id, image in file.images.items():
        scale = _scale(image, size, resize)
        for o in _countable(file.objects[image_id]):
            sides.append(o.mask_area**0.5)
            at_training.append(o.mask_area**0.5 * scale)
    return sides, at_training


def _scale(image: ImageRecord, size: Sequence[int], resize: str) -> float:
    """By what factor lengths change on average when a picture is brought to the training size."""
    along_y, along_x = size[0] / image.height, size[1] / image.width
    return min(along_y, along_x) if resize == "letterbox" else (along_y * along_x) ** 0.5


def _class_flaws(files: dict[str, CheckedFile]) -> list[Flaw]:
    counts = count_classes(files)
    unused = [name for name, row in counts.items() if not sum(row.values())]
    flaws = [Flaw("unused_category", None, (name,), f"{quote(name)} has no object") for name in unused]
    used = {name: row.get("train", 0) for name, row in counts.items() if name not in unused}
    most = max(used.values(), default=0)
    for name, count in used.items():
        if not count:
            detail = f"{quote(name)} occurs in validation only"
        elif count * MAX_IMBALANCE < most or (count < FEW_OBJECTS and most >= 10 * FEW_OBJECTS):
            detail = f"{quote(name)} has {count} objects in train, the most frequent class {most}"
        else:
            continue
        flaws.append(Flaw("class_imbalance", "train", (name,), detail))
    return flaws


def _countable(objects: Sequence[CheckedObject]) -> list[CheckedObject]:
    return [o for o in objects if not o.annotation.is_crowd]


def _share(flags: Sequence[bool]) -> float | None:
    return round(sum(flags) / len(flags), 4) if flags else None
