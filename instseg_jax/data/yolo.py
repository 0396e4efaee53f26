"""YOLO segmentation text: `class x1 y1 x2 y2 ...` a line, coordinates as parts of the picture's sides."""

import collections
import os
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.data.converted import (
    ConvertedImage,
    ConvertedObject,
    Listing,
    check_inside,
    is_hidden,
    join_parts,
    picture_size,
    read_class_names,
    read_lines,
)
from instseg_jax.files import is_regular, read_yaml
from instseg_jax.images import IMAGE_SUFFIXES
from instseg_jax.messages import first_few, quote


def find_annotations(source: Path, labels: str | Path | None) -> Listing:
    """Pictures of a data.yaml's `train` and `val`, else all below images/, with the names of their classes.

    The label file of `images/.../a.jpg` is `labels/.../a.txt`, or stands beside the picture; pictures without one
    have no objects.

    Raises: FileNotFoundError when there is no picture, or none has labels; ValueError for labels of poses.
    """
    description = next(
        (source / name for name in ("data.yaml", "dataset.yaml", "data.yml") if is_regular(source / name)), None
    )
    content = _read_yaml(description) if description else {}
    if "kpt_shape" in content:
        raise ValueError(f"{description} has kpt_shape: these are poses, whose keypoints are no outlines of objects.")
    class_names = _read_names(content.get("names"), description)
    if labels is not None or not class_names:
        class_names = read_class_names(source, labels)
    base = source / str(content.get("path") or "")
    if not os.path.isdir(base):  # noqa: PTH112 (no name is too long)
        base = source
    parts = {
        part: _find_pictures(source, base, content[part], description) for part in ("train", "val") if content.get(part)
    }
    if not parts:
        for part, folder in (("train", "train"), ("val", "val"), ("val", "valid")):
            if (source / "images" / folder).is_dir():
                parts[part] = parts.get(part, []) + _pictures_below(source / "images" / folder)
    if not any(parts.values()):
        parts = {"train": _pictures_below(source / "images" if (source / "images").is_dir() else source)}
    if not any(parts.values()):
        raise FileNotFoundError(f"There is no picture below {str(source)!r}.")
    if not any(is_regular(_label_file(path)) for paths in parts.values() for path in paths):
        raise FileNotFoundError(f"No picture below {str(source)!r} has a YOLO label file (labels/NAME.txt).")
    taken = {_label_file(path).resolve() for paths in parts.values() for path in paths}
    labelled = {path.resolve() for folder in source.rglob("labels") for path in folder.rglob("*.txt")}
    unused = [path for path in labelled - taken if not is_hidden(path, source.resolve())]
    return Listing(
        source, parts, class_names, left_out=("label files left out, of no picture of a part",) * len(unused)
    )


def read_annotation(path: Path, listing: Listing, notes: collections.Counter[str]) -> ConvertedImage:
    """Read the labels of a picture; where no file names the classes they are called by their number.

    Raises: ValueError that names the line for what is neither a polygon nor a box.
    """
    file, objects = check_inside(_label_file(path), listing.root, f"The picture {quote(path.name)}"), []
    picture = check_inside(path, listing.root, "The folder or a list")
    height, width = picture_size(picture)
    if not is_regular(file):
        notes["pictures without a label file, taken as background"] += 1
    lines = read_lines(file) if is_regular(file) else []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), np.array([float(word) for word in words[1:]])
        except ValueError:
            raise ValueError(f"Line {number} of {file} is no class number with coordinates.") from None
        if label < 0 or not np.isfinite(values).all():
            raise ValueError(f"Line {number} of {file} has a class or a coordinate that can't be.")
        if len(values) == 4:
            notes["boxes without a mask, made rectangles"] += 1
            x, y, w, h = values
            values = np.array([x - w / 2, y - h / 2, x + w / 2, y - h / 2, x + w / 2, y + h / 2, x - w / 2, y + h / 2])
        if len(values) < 6 or len(values) % 2:
            raise ValueError(f"Line {number} of {file} has {len(values)} coordinates: neither a polygon nor a box.")
        segmentation = join_parts([values.reshape(-1, 2) * (width, height)], height, width)
        if segmentation is None:
            notes["objects left out, without a pixel in their picture"] += 1
            continue
        names = listing.class_names
        if names and (label >= len(names) or not names[label]):
            raise ValueError(
                f"Line {number} of {file} has the class {quote(label)}, which has no name in {len(names)} names."
            )
        if not names:
            notes["objects whose class is called by its number, since no file names the classes"] += 1
        objects.append(ConvertedObject(names[label] if names else f"class {quote(label)}", segmentation))
    return ConvertedImage(path.resolve(), b"", path.name, height, width, tuple(objects))


def _read_names(names: Any, description: Path | None) -> tuple[str, ...]:
    """Class names by number, "" where a number has none; of a list, or of numbers (also as text) with names."""
    if not names:
        return ()
    if not isinstance(names, dict):
        return tuple(map(str, names)) if isinstance(names, list) else (str(names),)
    try:
        by_number = {int(key): str(name) for key, name in names.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{description} has names whose keys are no numbers: {first_few(list(names))}.") from None
    if min(by_number) < 0 or len(by_number) < len(names):
        raise ValueError(f"{description} has names whose keys are negative or the same: {first_few(list(names))}.")
    return tuple(by_number.get(number, "") for number in range(max(by_number) + 1))


def _read_yaml(file: Path) -> dict[str, Any]:
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold names, train and val.")
    return content


def _find_pictures(source: Path, base: Path, entry: Any, description: Path | None) -> list[Path]:
    """Pictures of a folder or of a list file that a data.yaml names; exports often write `../` too often."""
    found: list[Path] = []
    for name in entry if isinstance(entry, list) else [entry]:
        relative = str(name).replace("\\", "/")
        candidates = [base / relative, source / relative, source / relative.lstrip("./")]
        if relative.startswith(".."):  # written for a folder above: what lies inside is meant, not what is beside
            candidates.reverse()
        place = next((path for path in candidates if os.path.exists(path)), None)  # noqa: PTH110 (no name is too long)
        if place is None:
            raise FileNotFoundError(f"{description} names {quote(relative)}, which does not exist.")
        check_inside(place, source, str(description))
        if is_regular(place):
            lines = [line.strip().replace("\\", "/") for line in read_lines(place) if line.strip()]
            found += [path if path.is_absolute() else place.parent / path for path in map(Path, lines)]
        else:
            found += _pictures_below(place)
    return found


def _pictures_below(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if not is_hidden(path, folder))


def _label_file(picture: Path) -> Path:
    """The label file of a picture: the last folder `images` of its path becomes `labels`, else it lies beside."""
    parts = list(picture.parts)
    usual = picture.parent.parent / "labels" / f"{picture.stem}.txt"
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            usual = Path(*parts).with_suffix(".txt")
            break
    beside = picture.with_suffix(".txt")
    return beside if is_regular(beside) and not is_regular(usual) else usual
