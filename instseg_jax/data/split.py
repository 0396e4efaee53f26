"""Dealing the pictures of a data set out to training and validation anew: no picture lost, doubled or torn from its
series, every class in both parts as far as it goes.
"""

import collections
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.data import coco, coco_entries
from instseg_jax.data.coco_entries import is_id
from instseg_jax.data.replacing import replace_files, take_back
from instseg_jax.messages import quote, shorten

Content = dict[str, Any]
LEFT_OUT = "instance_left_out.json"  # pictures too near to others for either split


def split_dataset(dir: str | Path, deal: Callable[[Content], dict[str, Content]]) -> dict[str, tuple[Path, int, int]]:
    """Merge the annotation files of a folder and deal their pictures out again.

    `deal` makes of all pictures the content of each split: "train", "val" and maybe "left_out", which is merged again
    the next time; or those of folds, beside which the others stay as they are. The originals stay beside the new files
    as .bak (.bak2, ... where there is one already).

    Returns: of each split the file, the number of pictures and of objects.

    Raises: ValueError for files that can't be, FileNotFoundError without any, and what `deal` raises.
    """
    root = coco.data_root(dir)
    take_back(root / "annotations")
    found = {}
    for part in ("train", "val"):
        try:
            found[part] = coco.find_split(root, part)
        except FileNotFoundError:
            continue
    if not found:
        raise FileNotFoundError(f"There is no annotations/instance_train.json in {str(root)!r} to split.")
    if len({folder for _, folder in found.values()}) > 1:
        raise ValueError(
            f"The splits of {str(root)!r} have their pictures in different folders; move them into images/."
        )
    left_out = root / "annotations" / LEFT_OUT
    listed = [*(file for file, _ in found.values()), *([left_out] if left_out.is_file() else [])]
    whole = merge_contents([coco_entries.read_json(file) for file in listed])
    parts = deal(whole)
    targets = {part: root / "annotations" / f"instance_{part}.json" for part in parts}
    old = set(listed) - set(targets.values())
    gone = sorted(old) if "train" in parts else ()  # COCO's own names would otherwise stand beside the new files
    replace_files({targets[part]: content for part, content in parts.items()}, gone)
    return {part: (targets[part], len(c["images"]), len(c["annotations"])) for part, c in parts.items()}


def check_percentages(train_percent: int, val_percent: int) -> None:
    """Raise ValueError unless both are whole numbers above 0 that sum to 100."""
    for name, value in (("train_percent", train_percent), ("val_percent", val_percent)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 100:
            raise ValueError(f"{name} must be a whole number between 1 and 99, got {quote(value)}.")
    if train_percent + val_percent != 100:
        raise ValueError(
            f"The sum of train_percent and val_percent should equal 100, got {train_percent} + {val_percent} = "
            f"{train_percent + val_percent}."
        )


def merge_contents(contents: Sequence[Content]) -> Content:
    """One COCO content of several: categories joined by name, pictures by file name, ids kept where they are free.

    Raises ValueError when a content contradicts itself: ids that are not unique or not there.
    """
    lists = ("images", "annotations", "categories")
    merged: Content = {key: value for content in contents[::-1] for key, value in content.items() if key not in lists}
    merged |= {key: [] for key in lists}
    free = {key: _FreeIds(entry for content in contents for entry in content[key]) for key in lists}
    categories: dict[str, Content] = {}
    images: dict[str, Content] = {}
    seen: set[tuple[int, int, str]] = set()
    for content in contents:
        new_category = _join_entries(content["categories"], "name", categories, free["categories"])
        new_image = _join_entries(content["images"], "file_name", images, free["images"])
        for entry in content["annotations"]:
            coco_entries.require_keys(entry, ("id", "image_id", "category_id"), "An annotation")
            if entry["image_id"] not in new_image or entry["category_id"] not in new_category:
                raise ValueError(
                    f"Annotation {quote(entry['id'])} has an image id {quote(entry['image_id'])} or a category id "
                    f"{quote(entry['category_id'])} that its file does not list; check_dataset --fix mends that."
                )
            image_id, category_id = new_image[entry["image_id"]], new_category[entry["category_id"]]
            mask = (image_id, category_id, json.dumps(entry.get("segmentation")))
            if mask in seen and len(contents) > 1:  # the same object of a picture that both files list
                continue
            seen.add(mask)
            ids = {"id": free["annotations"].take(entry["id"]), "image_id": image_id, "category_id": category_id}
            merged["annotations"].append({**entry, **ids})
    merged["images"], merged["categories"] = list(images.values()), list(categories.values())
    return merged


def split_images(
    content: Content, *, train_percent: int, val_percent: int, group_by: str | None, seed: int
) -> tuple[Content, Content]:
    """Deal the pictures of a COCO content out to two parts: seeded, each class in proportion, groups kept together.

    `group_by` is a regular expression that is searched in file names: pictures with the same match (of its first
    group, where it has one) stay together. The dealing follows Sechidis et al. 2011: the rarest class first, each
    picture to the part that lacks the class most.

    Raises: ValueError when there are too few pictures, or groups, for two parts.
    """
    check_percentages(train_percent, val_percent)
    groups = _group_images(content["images"], group_by)
    if len(groups) < 2:
        what = "picture" if group_by is None else "group of pictures"
        raise ValueError(f"{len(groups)} {what} can't be split into two parts that both hold something.")
    val_groups = deal_groups(content, groups, val_percent / 100, seed)
    val_ids = {i for number in val_groups for i in groups[number]}
    train_ids = {entry["id"] for entry in content["images"]} - val_ids
    return take_images(content, train_ids), take_images(content, val_ids)


def deal_groups(content: Content, groups: Sequence[Sequence[int]], val_share: float, seed: int) -> set[int]:
    """Which groups of image ids go to validation, as `split_images` deals; both parts get at least one."""
    classes_of: dict[int, collections.Counter[int]] = {
        entry["id"]: collections.Counter() for entry in content["images"]
    }
    for entry in content["annotations"]:
        classes_of[entry["image_id"]][entry["category_id"]] += 1
    counts = [sum((classes_of[i] for i in group), collections.Counter()) for group in groups]
    return _deal([len(group) for group in groups], counts, val_share, np.random.default_rng(seed))


def fold_split(number: int, part: str) -> str:
    """The name of a fold's split, as a file of annotations has it: `fold3_train`."""
    return f"fold{number}_{part}"


def _deal(
    sizes: Sequence[int], counts: Sequence[collections.Counter[int]], val_share: float, rng: np.random.Generator
) -> set[int]:
    """Choose the groups that go to validation; both parts get at least one."""
    total = sum(sizes)
    wanted_val = min(max(round(total * val_share), 1), total - 1)
    room = [total - wanted_val, wanted_val]  # pictures that each part still takes
    lacking: dict[int, list[float]] = {}  # objects of each class that each part still lacks
    for count in counts:
        for category, n in count.items():
            parts = lacking.setdefault(category, [0.0, 0.0])
            parts[0] += n * (1 - val_share)
            parts[1] += n * val_share
    left = list(rng.permutation(len(sizes)).tolist())
    chosen: tuple[set[int], set[int]] = (set(), set())
    has: tuple[collections.Counter[int], collections.Counter[int]] = (collections.Counter(), collections.Counter())
    while left:
        rarest = _rarest_class([counts[g] for g in left])
        members = [g for g in left if rarest is None or counts[g][rarest]]
        members.sort(key=lambda g: -sizes[g])  # large groups while there is room; stable, so otherwise random
        for g in members:
            fits = [part for part in (0, 1) if room[part] >= sizes[g]] or [max((0, 1), key=lambda p: room[p])]
            need = lacking[rarest] if rarest is not None else [0.0, 0.0]
            without = [part for part in fits if rarest is not None and not has[part][rarest]]
            is_last_chance = len(without) == 1 and g == members[-1]  # to have the class in both parts
            part = without[0] if is_last_chance else max(fits, key=lambda p: (need[p], room[p]))
            chosen[part].add(g)
            has[part].update(counts[g])
            room[part] -= sizes[g]
            for category, n in counts[g].items():
                lacking[category][part] -= n
        left = [g for g in left if g not in chosen[0] and g not in chosen[1]]
    for part in (0, 1):
        if not chosen[part]:  # one group was larger than the whole part
            smallest = min(chosen[1 - part], key=lambda g: sizes[g])
            chosen[1 - part].remove(smallest)
            chosen[part].add(smallest)
    return chosen[1]


def _rarest_class(counts: Sequence[collections.Counter[int]]) -> int | None:
    """The class with the fewest pictures or groups left; None when no object is left."""
    total = collections.Counter(category for count in counts for category, n in count.items() if n)
    return min(total, key=lambda category: (total[category], category)) if total else None


def _group_images(entries: Sequence[Content], group_by: str | None) -> list[list[int]]:
    if group_by is None:
        return [[entry["id"]] for entry in entries]
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise ValueError(f"group_by={quote(group_by)} is no regular expression: {shorten(error)}.") from error
    groups: dict[tuple[bool, str], list[int]] = {}
    for entry in entries:
        match = pattern.search(entry["file_name"])
        if match is None:
            raise ValueError(
                f"The pattern group_by={quote(group_by)} is not in the file name {quote(entry['file_name'])}."
            )
        key = (True, match.group(1) if pattern.groups and match.group(1) is not None else match.group(0))
        groups.setdefault(key, []).append(entry["id"])
    return list(groups.values())


def take_images(content: Content, ids: Collection[int]) -> Content:
    """A content with these pictures and their objects alone."""
    return {
        **content,
        "images": [entry for entry in content["images"] if entry["id"] in ids],
        "annotations": [entry for entry in content["annotations"] if entry["image_id"] in ids],
    }


class _FreeIds:
    """Hands out each id once: the wanted one where it is free, else one beyond all ids of the files."""

    def __init__(self, entries: Iterable[Any]):
        largest = 0
        for entry in entries:
            if not isinstance(entry, dict) or not is_id(entry.get("id")):
                raise ValueError(f"An entry without a whole number as its id: {quote(entry)}.")
            largest = max(largest, entry["id"])
        self.taken: set[int] = set()
        self.beyond = itertools.count(largest + 1)

    def take(self, wanted: int) -> int:
        chosen = next(self.beyond) if wanted in self.taken else wanted
        self.taken.add(chosen)
        return chosen


def _join_entries(entries: Sequence[Content], key: str, joined: dict[str, Content], free: _FreeIds) -> dict[int, int]:
    """Add entries to those that are joined by `key`, in place; the new id of each old one."""
    new: dict[int, int] = {}
    for entry in entries:
        coco_entries.require_keys(entry, ("id", key), "An entry")
        if entry["id"] in new:
            raise ValueError(f"Several entries share the id {quote(entry['id'])}; check_dataset --fix mends that.")
        if str(entry[key]) not in joined:
            joined[str(entry[key])] = dict(entry, id=free.take(entry["id"]))
        new[entry["id"]] = joined[str(entry[key])]["id"]
    return new
