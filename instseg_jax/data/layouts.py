"""How a data set lies in its folder: the names that are looked for, and what another layout seems to be."""

import json
import re
from pathlib import Path

from instseg_jax.files import check_regular, is_regular

HEAD_BYTES = 1 << 20  # of an annotation file, in which the first file name stands
ROBOFLOW = "_annotations.coco.json"


def annotation_files(root: Path, split: str) -> list[Path]:
    """Where the annotations of a split ("train", "val") may be, the usual place first.

    Those of the tutorial, of COCO 2017, of CVAT, Datumaro and FiftyOne, and of Roboflow, who calls the split "valid".
    """
    stems = (f"instance_{split}", f"instances_{split}2017", f"instances_{split}")
    folders = (split, "valid") if split == "val" else (split,)
    return [
        *(root / "annotations" / f"{stem}.json" for stem in stems),
        *(root / folder / ROBOFLOW for folder in folders),
    ]


def image_folders(root: Path, split: str, annotations: Path) -> list[Path]:
    """Where the pictures of an annotation file may be, the likeliest first."""
    if annotations.name == ROBOFLOW:
        return [annotations.parent]
    names = [f"{split}2017", f"images/{split}2017", "images", f"images/{split}", split]
    usual_first = annotations.name == f"instances_{split}2017.json"
    return [root / name for name in (names if usual_first else [*names[2::-1], *names[3:]])]


def choose_folder(folders: list[Path], annotations: Path) -> Path | None:
    """The first folder that holds the first picture that the file lists, else the first that is there."""
    there = [folder for folder in folders if folder.is_dir()]
    if len(there) < 2:
        return there[0] if there else None
    first = first_file_name(annotations)
    return next((folder for folder in there if first and is_regular(folder / first)), there[0])


def first_file_name(annotations: Path) -> str | None:
    """The first `file_name` of an annotation file, of which only the beginning is read; None without one."""
    try:
        check_regular(annotations)
        with annotations.open("rb") as file:
            head = file.read(HEAD_BYTES).decode("utf-8", "ignore")
        found = re.search(r'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', head)
        name = json.loads(found[1]) if found else None
    except (OSError, ValueError):
        return None
    return name if isinstance(name, str) and "\0" not in name else None


def describe_other(root: Path) -> str:
    """What a folder without COCO files seems to hold, and what to do with it, as the end of an error; "" if unknown."""
    kind = _other_kind(root)
    return f"; this looks like {kind}: run convert --src_dataset_type={kind} --config.data.dir={root}" if kind else ""


def _other_kind(root: Path) -> str | None:
    if any((root / name).is_dir() for name in ("SegmentationObject", "SegmentationClass")):
        return "VOC"
    if any(is_regular(root / name) for name in ("data.yaml", "data.yml", "dataset.yaml")):
        return "YOLO"
    if (root / "labels").is_dir() and next((root / "labels").rglob("*.txt"), None):
        return "YOLO"
    if next((root / "Annotations").glob("*.xml"), None):
        return "VOC"
    for path in sorted(root.rglob("*.json"))[:20]:
        head = _head(path)
        if b'"shapes"' in head or b'"imagePath"' in head:
            return "LabelMe"
        if b'"file_name"' in head:
            return "COCO"
        if b'"data"' in head and (b'"annotations"' in head or b'"predictions"' in head):
            return "LabelStudio"
    for path in sorted(root.rglob("*.xml"))[:20]:
        if b"<annotations" in _head(path):
            return "CVAT"
    return None


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; nothing of what can't be read."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""
