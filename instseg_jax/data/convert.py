"""Other annotation formats to COCO: finding the files, naming pictures and categories, writing the result.

Each format is read by a file of its own (`labelme.py`, `voc.py`, `yolo.py`, `label_studio.py`,
`cvat.py`, `coco_files.py`, `maps.py`) to `ConvertedImage`s.
Written are `annotations/instance_train.json`, `instance_val.json` where there is a validation part, and `images/`.
"""

import collections
import dataclasses
import filecmp
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instseg_jax import files, masks
from instseg_jax.data import coco_entries, coco_files, cvat, label_studio, labelme, replacing, split, voc, yolo
from instseg_jax.data.converted import (
    NOT_A_CLASS,
    ConvertedImage,
    Listing,
    is_hidden,
    read_class_names,
)
from instseg_jax.images import IMAGE_SUFFIXES
from instseg_jax.messages import quote
from instseg_jax.progress import Track

DEFAULT_PERCENTAGES = (80, 20)  # of a train_anno_list.txt without a val_anno_list.txt
MASK_FOLDERS = ("SegmentationClass", "SegmentationObject")  # of VOC
READERS = {
    "labelme": labelme,
    "voc": voc,
    "yolo": yolo,
    "labelstudio": label_studio,
    "cvat": cvat,
    "coco": coco_files,
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was written, and what a person should know about it."""

    parts: dict[str, tuple[Path, int, int]]  # of each split: annotation file, number of pictures, of objects
    categories: tuple[str, ...]
    notes: tuple[str, ...]


def convert_dataset(
    source: str | Path,
    kind: str,
    target: str | Path,
    *,
    labels: str | Path | None,
    percentages: tuple[int, int] | None,
    group_by: str | None,
    seed: int,
    progress: Track,
    skip_invalid: bool = False,
) -> Conversion:
    """Convert a data set to COCO below `target` (may be the folder itself); existing annotation files become .bak.

    `kind` is LabelMe, VOC, YOLO, LabelStudio, CVAT or COCO in any case. `labels` names a file of class names, one a
    line; otherwise labels.txt, class_names.txt or classes.txt in or above the folder is used, otherwise classes are
    numbered as they occur. With `percentages` of training and validation all pictures are dealt out as `split_images`
    does; without them, a `train_anno_list.txt` alone gives a fifth to validation. `skip_invalid` goes on past what
    can't be read, and notes it.

    Raises FileNotFoundError or ValueError, naming the file, for what can't be read.
    """
    if kind.lower() not in READERS:
        raise ValueError(
            f"The source data set type must be one of LabelMe, VOC, YOLO, LabelStudio, CVAT, COCO, got {quote(kind)}."
        )
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise FileNotFoundError(f"There is no data set folder {str(source)!r}.")
    replacing.take_back(target / "annotations")  # which may be what is read
    replacing.check_whole(source / "annotations")
    reader = READERS[kind.lower()]
    listing: Listing = reader.find_annotations(source, labels)
    notes: collections.Counter[str] = collections.Counter()
    converted: dict[str, list[ConvertedImage]] = {}
    for part, paths in listing.parts.items():
        converted[part] = []
        for path in progress(paths, len(paths)):
            its_notes: collections.Counter[str] = collections.Counter()  # they don't count where the file is left out
            try:
                converted[part].append(_with_names(reader.read_annotation(path, listing, its_notes), path))
                notes.update(its_notes)
            except (ValueError, OSError) as error:
                if not skip_invalid:
                    kind_of_error = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                    raise kind_of_error(f"{error} --skip_invalid goes on without it.") from error
                notes[f"left out, {error}"] += 1
    notes.update(listing.left_out)
    pictures_of = collections.Counter(image.path for images in converted.values() for image in images if image.path)
    if doubled := [path for path, count in pictures_of.items() if count > 1]:
        notes[f"pictures that several annotation files are of, as {doubled[0].name}"] += len(doubled)
    if unused := _unused_pictures(source, target, set(pictures_of)):
        notes[f"pictures of the folder that are not in the result, as {unused[0].name}"] += len(unused)
    if not any(image.objects for images in converted.values() for image in images):
        raise ValueError(f"There is no object in the {kind} annotations below {str(source)!r}.")
    is_certain = labels is not None or bool(read_class_names(source, None, above=False))
    everything = [image for images in converted.values() for image in images]
    known = [coco_entries.read_name(name, f"A class of {str(source)!r}") for name in listing.class_names if name]
    names = _category_names(known, everything, is_certain=is_certain)
    if percentages is None and listing.is_val_wanted:
        percentages = DEFAULT_PERCENTAGES
    return write_converted(
        converted, names, target, percentages=percentages, group_by=group_by, seed=seed, notes=notes, info={}
    )


def write_converted(
    converted: Mapping[str, Iterable[ConvertedImage]],
    names: Sequence[str],
    target: Path,
    *,
    percentages: tuple[int, int] | None,
    group_by: str | None,
    seed: int,
    notes: collections.Counter[str],
    info: dict[str, Any],
) -> Conversion:
    """Write pictures, one at a time, and annotation files of the classes `names` below `target`.

    With `percentages` the pictures of all parts are dealt out to training and validation. `info` is said of the whole
    set in each file; `notes` are read once all pictures are written.
    """
    pictures = _PictureFolder(target / "images")
    contents = {part: _to_coco(images, names, pictures) for part, images in converted.items()}
    for content in contents.values():
        content.update({"info": info} if info else {})
    if percentages is not None:
        whole = split.merge_contents(list(contents.values()))
        train, val = split.split_images(
            whole, train_percent=percentages[0], val_percent=percentages[1], group_by=group_by, seed=seed
        )
        contents = {"train": train, "val": val}
    written = {part: target / "annotations" / f"instance_{part}.json" for part in contents}
    names_now = {entry["file_name"] for content in contents.values() for entry in content["images"]}
    stale = _find_stale(target / "annotations", set(written.values()), names_now)
    replacing.replace_files({written[part]: content for part, content in contents.items()}, stale)
    for file in stale:
        notes[f"files of an earlier split of these pictures, now .bak, as {file.name}"] += 1
    return Conversion(
        parts={part: (written[part], len(c["images"]), len(c["annotations"])) for part, c in contents.items()},
        categories=tuple(names),
        notes=tuple(f"{note}: {count}" for note, count in notes.items()),
    )


def _find_stale(folder: Path, written: set[Path], pictures: set[str]) -> list[Path]:
    """Splits that list some of these pictures, or none: what was dealt out before would be in two at once."""
    stale = []
    for file in sorted(folder.glob("instance_*.json")):
        if file in written or not files.is_regular(file):
            continue
        try:
            listed = {str(entry.get("file_name")) for entry in coco_entries.read_json(file)["images"]}
        except (ValueError, OSError, AttributeError):  # not ours to judge
            continue
        if not listed or listed & pictures:
            stale.append(file)
    return stale


def _with_names(image: ConvertedImage, path: Path) -> ConvertedImage:
    """The names of classes as COCO files are read, so that what is written can be. Raises ValueError of read_name."""
    names = [coco_entries.read_name(o.name, f"A class of {path}") for o in image.objects]
    objects = [dataclasses.replace(o, name=name) for o, name in zip(image.objects, names, strict=True)]
    return dataclasses.replace(image, objects=tuple(objects))


def _unused_pictures(source: Path, target: Path, used: set[Path]) -> list[Path]:
    """Pictures below the source that no annotation took; neither masks nor copies of an earlier conversion."""
    names = {path.name for path in used}
    copies = (target / "images").resolve()
    found = []
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or is_hidden(path, source) or not files.is_regular(path):
            continue
        is_mask = any(part in MASK_FOLDERS for part in path.relative_to(source).parts)
        is_copy = path.name in names and path.resolve().is_relative_to(copies)
        if not (is_mask or is_copy or path.resolve() in used):
            found.append(path)
    return found


class _PictureFolder:
    """The folder images/ of the target: knows its pictures, takes in others under names of their own."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.taken: dict[str, Path | None] = {}

    def add(self, image: ConvertedImage) -> str:
        """Make sure that a picture is in the folder; returns its name there, with slashes."""
        path = image.path.resolve() if image.path is not None else None
        if path is not None and path.is_relative_to(self.folder):
            return path.relative_to(self.folder).as_posix()
        name = Path(image.name).name
        for number in range(len(self.taken) + 2):
            candidate = name if not number else f"{Path(name).stem}_{number}{Path(name).suffix}"
            if candidate not in self.taken and self._is_free_for(candidate, image):
                break
        self.taken[candidate] = path
        if not (self.folder / candidate).exists():
            if path is None:
                files.write_bytes(self.folder / candidate, image.data)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                aside = self.folder / f".{candidate}.tmp"
                shutil.copyfile(path, aside)
                aside.replace(self.folder / candidate)
        return candidate

    def _is_free_for(self, name: str, image: ConvertedImage) -> bool:
        there = self.folder / name
        if not there.exists():
            return True
        if image.path is None:
            return there.read_bytes() == image.data
        return filecmp.cmp(there, image.path, shallow=False)


def _category_names(known: Sequence[str], images: Sequence[ConvertedImage], *, is_certain: bool) -> list[str]:
    """Class names: the known ones in their order, then others as they first occur.

    Names that are not certain to be of this data set only count when they have every class that occurs.
    """
    used = dict.fromkeys(o.name for image in images for o in image.objects)
    names = dict.fromkeys(name for name in known if name not in NOT_A_CLASS)
    if not is_certain and used.keys() - names.keys():
        names = {}
    return list(names | used)


def _to_coco(images: Iterable[ConvertedImage], names: Sequence[str], pictures: _PictureFolder) -> dict[str, Any]:
    """COCO content of some pictures; ids count from 1, boxes and areas are those of the drawn masks."""
    ids = {name: number for number, name in enumerate(names, start=1)}
    content: dict[str, Any] = {"images": [], "annotations": []}
    for image in images:
        image_id = len(content["images"]) + 1
        content["images"].append(
            {"id": image_id, "file_name": pictures.add(image), "height": image.height, "width": image.width}
            | image.facts
        )
        record = coco_entries.ImageRecord(image_id, image.name, image.height, image.width)
        for o in image.objects:
            rle = masks.segmentation_to_rle(
                coco_entries.read_segmentation(o.segmentation, record), image.height, image.width
            )
            x1, y1, x2, y2 = masks.rle_box_xyxy_px(rle)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": ids[o.name],
                    "segmentation": o.segmentation,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": masks.rle_area(rle),
                    "iscrowd": int(o.is_crowd),
                }
                | o.facts
            )
    content["categories"] = [{"id": i, "name": name, "supercategory": "none"} for name, i in ids.items()]
    return content
