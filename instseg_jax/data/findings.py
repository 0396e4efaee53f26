"""What `check_dataset` can find: the codes, how bad each one is, and what to do about it.

A `Flaw` is one place where something is wrong; `group` makes the findings of the report of them, one for
each code and split. Looking for flaws is `data/check.py` and its neighbours.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

ERROR, WARNING, ADVICE = "error", "warning", "advice"  # errors fail the check, the others don't
MAX_DETAILS = 20  # places of one finding that are described in words; the ids are always complete

# code: (severity, what it means, what to do)
CODES: dict[str, tuple[str, str, str]] = {
    "missing_annotations": (
        ERROR,
        "an annotation file or an image folder is missing",
        "Ensure that both `instance_train.json` and `instance_val.json` exist in annotations/ and the pictures in "
        "images/, or name the files with --config.data.train_annotations and its siblings.",
    ),
    "broken_json": (
        ERROR,
        "the annotation file, or an entry of it, is not what COCO writes",
        "Export the file again, or mend the entries that are named; --fix leaves out single broken entries.",
    ),
    "missing_image": (
        ERROR,
        "a picture that the annotation file lists is not in the image folder",
        "Copy the file there or correct its file_name; --fix corrects names that differ in case or folder and "
        "leaves out the rest.",
    ),
    "outside_folder": (
        ERROR,
        "a listed picture lies outside of the image folder: by `..`, an absolute path or a link",
        "Copy it into the folder, name the folder that it is in with --config.data.train_images and val_images, or "
        "allow it with --config.data.allow_outside=True; --fix leaves it out.",
    ),
    "undecodable_image": (
        ERROR,
        "a picture is empty, cut off, no image or no file but a pipe, a device or a folder",
        "Replace the file; --fix leaves it out with its objects.",
    ),
    "duplicate_image_id": (
        ERROR,
        "several pictures share an id, so it is open which of them an object belongs to",
        "Give every picture its own id; --fix leaves out all that share one, unless they are the same entry.",
    ),
    "duplicate_annotation_id": (
        ERROR,
        "several objects share an id",
        "Give every object its own id; --fix does.",
    ),
    "unknown_category": (
        ERROR,
        "an object has a category id that the file does not list",
        "Add the category or correct the id; --fix leaves the object out.",
    ),
    "unknown_image": (
        ERROR,
        "an object belongs to an image id that the file does not list",
        "Add the image or correct the id; --fix leaves the object out.",
    ),
    "size_mismatch": (
        ERROR,
        "a picture has another size than the annotation file says",
        "Correct height and width, and the objects with them; --fix turns or scales the objects where it is plain how.",
    ),
    "degenerate_polygon": (
        ERROR,
        "an object has no polygon with an area",
        "Draw the object again; --fix leaves out such polygons, and objects that have no other.",
    ),
    "outside_image": (
        ERROR,
        "an object reaches beyond its picture",
        "Check that the annotations belong to pictures of this size; --fix cuts objects at the picture's border.",
    ),
    "broken_rle": (
        ERROR,
        "a run-length code does not fit its picture or is damaged",
        "Export the mask again; --fix leaves the object out.",
    ),
    "categories_differ": (
        ERROR,
        "training and validation file disagree on the categories",
        "Use the same ids and names in both; --fix brings both to one list, by name.",
    ),
    "no_objects": (
        ERROR,
        "a split has nothing to train on or to score",
        "Move pictures with objects into it, for instance with the verb split.",
    ),
    "leak": (
        WARNING,
        "the same picture, or nearly the same, is in training and validation",
        "Move it to one side, else the validation numbers are too good; `split --group_by` keeps series together.",
    ),
    "box_mask_mismatch": (
        WARNING,
        "an object's bbox is not the box around its mask",
        "--fix computes the box from the mask.",
    ),
    "suspect_masks": (
        ERROR,
        "nearly all boxes of a split disagree with its masks, so the masks are likely wrong",
        "Look at the drawings. Run-length codes count down the columns, from top left; an export that counts along "
        "the rows has to be made again. --fix leaves such a file as it is.",
    ),
    "shifted_labels": (
        WARNING,
        "the labels of a map are off, all by the same way: their layer's CRS or datum is another, or they were drawn "
        "on other pictures",
        "Look at the overview. Convert again with --labels_crs=EPSG:NUMBER, if the file says a wrong CRS, or move the "
        "layer by as much.",
    ),
    "duplicate_object": (
        WARNING,
        "the same object is there twice: perfect predictions could find only one of the two",
        "Remove one of them; --fix keeps the first.",
    ),
    "not_trained": (
        WARNING,
        "training leaves objects out",
        "Nothing, where that is meant (`ignore`); else correct the field that is named.",
    ),
    "vanishing_mask": (
        WARNING,
        "an object's mask has no pixel at a size that the config trains at",
        "Train on a larger input (--config.data.image_size) or cut the pictures into tiles. Recipes for small data "
        "leave such objects out (data.drop_empty_masks), the official recipe teaches them as objects of nothing.",
    ),
    "crowd": (
        WARNING,
        "objects are marked as crowds: training leaves them out, evaluation forgives predictions there",
        "Nothing, if they are groups; an export that marks everything iscrowd=1 has to be made again.",
    ),
    "empty_image": (
        WARNING,
        "pictures without objects are not trained on by default",
        "--config.data.keep_empty=True trains on them as background, data.empty_share chooses how many.",
    ),
    "class_imbalance": (
        WARNING,
        "some classes have very few objects beside others, or none to train on",
        "Collect more of them, or split again: the verb split keeps the shares of the classes.",
    ),
    "empty_mask": (
        ADVICE,
        "an object's mask has no pixel once it is drawn",
        "--fix leaves it out.",
    ),
    "zero_area": (
        ADVICE,
        "an object's area field is not positive, and training leaves such objects out",
        "--fix computes the area from the mask.",
    ),
    "self_crossing_polygon": (
        ADVICE,
        "the outline of a polygon crosses itself; what lies in the loops may be drawn inside out",
        "Look at the object and draw it again where it matters.",
    ),
    "exif_rotation": (
        ADVICE,
        "pictures carry an EXIF rotation; they are turned on reading, and their annotations fit that",
        "Nothing; other tools may show them turned.",
    ),
    "deep_pixels": (
        ADVICE,
        "pictures have more than 8 bits a channel, of which only the upper 8 are read",
        "--config.data.scaling=percentile brings the range that the training pictures use to 8 bits.",
    ),
    "duplicate_file_name": (
        ADVICE,
        "several pictures of a split are the same file",
        "Put the objects of a picture into one entry.",
    ),
    "unused_category": (
        ADVICE,
        "categories without any object",
        "Nothing, or remove them from both files: the network learns to never predict them.",
    ),
    "duplicate_category_name": (
        ADVICE,
        "several categories have the same name",
        "Merge them, if they mean the same.",
    ),
    "more_queries": (
        ADVICE,
        "pictures hold nearly as many objects as the network can find, or more than the loader keeps",
        "Raise --config.model.num_queries (any number; no weight depends on it), --config.data.max_instances and "
        "--config.eval.num_detections.",
    ),
    "small_objects": (
        ADVICE,
        "most objects are tiny at the training size",
        "Train on a larger input (--config.data.image_size), or cut the pictures into tiles.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Flaw:
    """One place where something is wrong; `ids` are of pictures or, where `is_of_annotation`, of annotations."""

    code: str
    split: str | None  # None: of both together
    ids: tuple[Any, ...]
    detail: str
    is_of_annotation: bool = False

    @property
    def is_error(self) -> bool:
        """Whether it fails the check, as its code has it."""
        return CODES[self.code][0] == ERROR


def group(flaws: Iterable[Flaw]) -> list[dict[str, Any]]:
    """Findings for the report: one for each code and split, the errors first, in the order of `CODES`.

    Each has code, severity, split, count, message, ids with `id_of` ("image" or "annotation"), what_to_do, and
    the first 20 places in words under details.
    """
    table: dict[tuple[str, str | None], list[Flaw]] = {}
    for flaw in flaws:
        table.setdefault((flaw.code, flaw.split), []).append(flaw)
    order = list(CODES)
    findings = []
    for (code, split), members in sorted(table.items(), key=lambda item: (order.index(item[0][0]), str(item[0][1]))):
        severity, meaning, what_to_do = CODES[code]
        findings.append(
            {
                "code": code,
                "severity": severity,
                "split": split,
                "count": len(members),
                "message": meaning,
                "id_of": "annotation" if members[0].is_of_annotation else "image",
                "ids": [i for member in members for i in member.ids],
                "what_to_do": what_to_do,
                "details": [member.detail for member in members[:MAX_DETAILS]],
            }
        )
    return findings


def describe(finding: dict[str, Any], most: int = 3) -> list[str]:
    """A finding in lines of text: what it is, a few places, what to do."""
    where = f" ({finding['split']})" if finding["split"] else ""
    lines = [f"{finding['severity']}: {finding['code']}{where}: {finding['message']}: {finding['count']}"]
    lines += [f"    {detail}" for detail in finding["details"][:most]]
    if finding["count"] > most:
        lines.append(f"    and {finding['count'] - most} more")
    return [*lines, f"    -> {finding['what_to_do']}"]


def has_errors(flaws: Sequence[Flaw]) -> bool:
    """Whether any of the flaws fails the check."""
    return any(flaw.is_error for flaw in flaws)
