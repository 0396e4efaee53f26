"""What the readers of other formats hand to `data/convert.py`, and what several of them do the same way."""

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax import masks
from instseg_jax.data.polygons import clip_polygon, is_degenerate
from instseg_jax.files import is_inside, is_regular, read_regular, read_regular_text
from instseg_jax.images import IMAGE_SUFFIXES
from instseg_jax.pixels import decode

NOT_A_CLASS = ("__ignore__", "_background_", "background", "")
LABEL_FILES = ("labels.txt", "class_names.txt", "classes.txt")
MIN_AREA_PX = 1  # pixels that an object must have once it is drawn


@dataclasses.dataclass(frozen=True)
class ConvertedObject:
    """An object: its class name, and its mask as COCO writes it (a list of polygons or an RLE, ready for JSON)."""

    name: str
    segmentation: list[list[float]] | dict[str, Any]
    is_crowd: bool = False
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # more entries of its annotation


@dataclasses.dataclass(frozen=True)
class ConvertedImage:
    """A picture with its objects; its file is at `path`, or its bytes are `data` where the annotations hold it."""

    path: Path | None
    data: bytes
    name: str  # of the file, without folders
    height: int
    width: int
    objects: tuple[ConvertedObject, ...]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # more entries of its record


@dataclasses.dataclass(frozen=True)
class Listing:
    """Annotation files by part ("train", "val"), and the class names where a file lists them."""

    root: Path
    parts: dict[str, list[Path]]
    class_names: tuple[str, ...]  # of a file; one that lies above the folder counts if it has every class that occurs
    is_val_wanted: bool = False  # a part of train is to become the validation split
    left_out: tuple[str, ...] = ()  # a note for each thing of the source that is in no part


def read_class_names(source: Path, labels: str | Path | None, *, above: bool = True) -> tuple[str, ...]:
    """Class names, one a line: of the file that is named, or of labels.txt and the like in the folder or above it.

    Raises FileNotFoundError when a named file does not exist.
    """
    if labels is not None:
        candidates = [Path(labels)]
        if not is_regular(candidates[0]):
            raise FileNotFoundError(f"There is no file of class names {str(labels)!r}.")
    else:
        folders = [source, source.resolve().parent] if above else [source]
        candidates = [folder / name for folder in folders for name in LABEL_FILES]
    for candidate in candidates:
        if is_regular(candidate):
            if labels is None and candidate.parent == source:
                check_inside(candidate, source, "The data set's list of classes")
            return tuple(line.strip() for line in read_lines(candidate) if line.strip())
    return ()


def read_lines(file: Path) -> list[str]:
    """Lines of a text file, UTF-8 with or without a BOM. Raises ValueError that names a file of another encoding."""
    try:
        return read_regular_text(file).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a UTF-8 text file (byte {error.start}).") from error


def check_inside(path: Path, source: Path, what: str) -> Path:
    """The path, which `what` named. Raises ValueError where it, or what it links to, lies outside of the data set."""
    if not is_inside(source, path.absolute()):
        raise ValueError(
            f"{what} leads to {str(path)!r}, outside of {str(source)!r}; name a folder that holds all of the data set."
        )
    return path


def is_hidden(path: Path, root: Path) -> bool:
    """Whether a file, or a folder above it below `root`, is hidden: `._a.jpg` of a Mac, `.ipynb_checkpoints/`."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def find_picture(stem: str, folders: Sequence[Path]) -> Path | None:
    """The picture of a name without ending, in the first of some folders that has it."""
    for folder in folders:
        for suffix in IMAGE_SUFFIXES:
            for path in (folder / f"{stem}{suffix}", folder / f"{stem}{suffix.upper()}"):
                if is_regular(path):
                    return path
    return None


def find_named(names: Sequence[str], folders: Sequence[Path]) -> Path | None:
    """The first of some names, paths with slashes, that is a file in one of the folders; else the picture that has the
    last one's stem.
    """
    for name in filter(None, names):
        for folder in folders:
            if is_regular(folder / name):
                return folder / name
    return find_picture(Path(names[-1]).stem, folders)


def folders_near(file: Path, root: Path) -> list[Path]:
    """Where the pictures of an annotation file may be, in a data set below `root`: the likeliest first."""
    return [file.parent, file.parent / "images", root, root / "images"]


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture as it is trained on, turned as EXIF says; every pixel is decoded."""
    height, width = decode(read_regular(path), str(path)).shape[:2]
    return height, width


def join_objects(
    parts: Mapping[Any, Sequence[np.ndarray]],
    height: int,
    width: int,
    notes: collections.Counter[str],
    *,
    what: str,
    crowds: Collection[Any] = (),
) -> tuple[ConvertedObject, ...]:
    """An object of each of `parts`, {(class name, ...): polygons and masks as of `join_parts`}.

    Those in which nothing is drawn are noted, as `what`; keys in `crowds` are crowds.
    """
    objects = []
    for key, drawings in parts.items():
        segmentation = join_parts(drawings, height, width)
        if segmentation is None:
            notes[f"{what} left out, without a pixel in their picture"] += 1
        else:
            objects.append(ConvertedObject(key[0], segmentation, is_crowd=key in crowds))
    return tuple(objects)


def join_parts(parts: Sequence[np.ndarray], height: int, width: int) -> list[list[float]] | dict[str, Any] | None:
    """One object's mask of its parts: polygons [P, 2] (float) stay polygons, a binary mask [H, W] (uint8) among them
    makes it an RLE. Polygons are cut at the picture's border; None when nothing is left.
    """
    drawn = [part for part in parts if part.dtype == np.uint8]
    outlines = [_cut(part, height, width) for part in parts if part.dtype != np.uint8]
    outlines = [points for points in outlines if len(points) >= 3 and not is_degenerate(points)]
    whole = masks.rasterize_polygons(outlines, height, width)
    for mask in drawn:
        whole |= mask
    if whole.sum() < MIN_AREA_PX:
        return None
    return masks.encode_mask(whole) if drawn else [points.round(3).ravel().tolist() for points in outlines]


def _cut(points: np.ndarray, height: int, width: int) -> np.ndarray:
    is_inside = points.min() >= 0 and points[:, 0].max() <= width and points[:, 1].max() <= height
    return points if is_inside else clip_polygon(points, height, width)
