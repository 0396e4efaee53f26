"""CVAT's XML "for images 1.1": polygons, masks (holes and parts stay), boxes, ellipses. Shapes of one group_id are one.

The XML of videos has tracks in place of pictures, and is refused.
"""

import collections
import functools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from instseg_jax.data.converted import (
    NOT_A_CLASS,
    ConvertedImage,
    Listing,
    check_inside,
    find_named,
    folders_near,
    is_hidden,
    join_objects,
    picture_size,
    read_class_names,
)
from instseg_jax.data.polygons import draw_ellipse, turn_clockwise
from instseg_jax.files import is_regular, read_regular
from instseg_jax.messages import quote, shorten


def find_annotations(source: Path, labels: str | Path | None) -> Listing:
    """One path a picture: that of its file, and its number in it. Class names are those of the task, in its order.

    Raises: FileNotFoundError when there are none, ValueError for the XML of a video.
    """
    found: list[Path] = []
    names: dict[str, None] = {}
    for file in sorted(source.rglob("*.xml")):
        if is_hidden(file, source) or not is_regular(file):
            continue
        root = _read(file)
        if root.tag != "annotations":
            continue
        if root.find("track") is not None:
            raise ValueError(f"{file} is of a video; export it as 'CVAT for images 1.1'.")
        names |= dict.fromkeys((node.text or "").strip() for node in root.findall("meta//label/name"))
        found += [file / str(number) for number in range(len(root.findall("image")))]
    if not found:
        raise FileNotFoundError(f"There is no XML file of CVAT below {str(source)!r}.")
    return Listing(source, {"train": found}, read_class_names(source, labels) or tuple(names))


def read_annotation(path: Path, listing: Listing, notes: collections.Counter[str]) -> ConvertedImage:
    """Read one picture of a file; what is left out is counted in `notes`.

    Raises: ValueError that names file and picture for what can't be read.
    """
    file = path.parent
    image = _read(file).findall("image")[int(path.name)]
    name = (image.get("name") or "").replace("\\", "/")
    what = f"The picture {quote(name)} of {file}"
    found = find_named([name, name.rpartition("/")[2]], folders_near(file, listing.root))
    if found is None:
        raise FileNotFoundError(f"{what} is not there.")
    picture = check_inside(found, listing.root, what).resolve()
    height, width = picture_size(picture)
    if (image.get("height"), image.get("width")) not in ((str(height), str(width)), (None, None)):
        said = f"{image.get('width')} x {image.get('height')}"
        raise ValueError(f"{what} is said to have {said} pixels, but has {width} x {height}.")
    parts: dict[tuple[str, str], list[np.ndarray]] = {}
    for number, shape in enumerate(image):
        label, group = (shape.get("label") or "").strip(), shape.get("group_id") or "0"
        if label in NOT_A_CLASS:
            notes["shapes left out, without a class"] += 1
            continue
        try:
            drawn = _draw(shape, height, width)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{what} has a {shape.tag} that can't be read: {shorten(error)}.") from error
        if drawn is None:
            notes[f"shapes left out, that are a {shape.tag}"] += 1
            continue
        parts.setdefault((label, f"group {group}" if group != "0" else f"shape {number}"), []).append(drawn)
    objects = join_objects(parts, height, width, notes, what="shapes")
    return ConvertedImage(picture, b"", picture.name, height, width, objects)


@functools.lru_cache(maxsize=2)
def _parse(file: Path, changed: int) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(read_regular(file))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file} is no XML that can be read: {shorten(error)}.") from error


def _read(file: Path) -> ElementTree.Element:
    return _parse(file, file.stat().st_mtime_ns)


def _draw(shape: ElementTree.Element, height: int, width: int) -> np.ndarray | None:
    """A shape as a polygon [P, 2] float64, or as a mask [height, width] uint8; None for one without an area."""
    said = shape.attrib
    if shape.tag == "polygon":
        return _finite([[float(v) for v in point.split(",")] for point in said["points"].split(";")])
    if shape.tag == "mask":
        return _mask(said, height, width)
    if shape.tag == "box":
        x1, y1, x2, y2 = (float(said[name]) for name in ("xtl", "ytl", "xbr", "ybr"))
        ring, center = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]), np.array([x1 + x2, y1 + y2]) / 2
    elif shape.tag == "ellipse":
        center = np.array([float(said["cx"]), float(said["cy"])])
        ring = draw_ellipse(center, float(said["rx"]), float(said["ry"]))
    else:
        return None
    return _finite(turn_clockwise(ring, float(said.get("rotation", 0)), center))


def _finite(points: list[list[float]] | np.ndarray) -> np.ndarray:
    ring = np.array(points, np.float64).reshape(-1, 2)
    if not np.isfinite(ring).all():
        raise ValueError("a coordinate is not finite")
    return ring


def _mask(said: dict[str, str], height: int, width: int) -> np.ndarray:
    """A mask in its rectangle: runs, row after row, of what is not drawn and what is in turns."""
    left, top, columns, rows = (int(float(said[name])) for name in ("left", "top", "width", "height"))
    runs = [int(run) for run in said["rle"].split(",")]
    if min(runs) < 0 or sum(runs) != rows * columns:
        raise ValueError(f"its runs are {sum(runs)} pixels, its rectangle {columns} x {rows}")
    if left < 0 or top < 0 or columns < 1 or rows < 1 or left + columns > width or top + rows > height:
        raise ValueError(f"its rectangle {columns} x {rows} at {left}, {top} is not inside {width} x {height}")
    mask = np.zeros((height, width), np.uint8)
    drawn = np.repeat(np.arange(len(runs)) % 2, runs).reshape(rows, columns)
    mask[top : top + rows, left : left + columns] = drawn
    return mask
