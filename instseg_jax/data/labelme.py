"""LabelMe's JSON files: every shape type, parts joined by group_id, pictures beside the file or embedded in it."""

import base64
import binascii
import collections
import itertools
import math
from pathlib import Path
from typing import Any, TypeGuard

import cv2
import numpy as np

from instseg_jax.data.coco_entries import MAX_SIDE_PX
from instseg_jax.data.converted import (
    NOT_A_CLASS,
    ConvertedImage,
    Listing,
    check_inside,
    find_picture,
    is_hidden,
    join_objects,
    read_class_names,
    read_lines,
)
from instseg_jax.data.polygons import draw_ellipse
from instseg_jax.files import is_regular, parse_json, read_regular
from instseg_jax.messages import quote, shorten
from instseg_jax.pixels import decode

LISTS = {"train": "train_anno_list.txt", "val": "val_anno_list.txt"}
LINE_WIDTH_PX = 10  # as LabelMe itself draws lines
POINT_RADIUS_PX = 5
CIRCLE_TOLERANCE_PX = 0.1  # of the polygon from the circle
MOST_CORNERS = 3600  # of a circle
SAME_SHAPE = 0.01  # relative difference of the two scale factors of a picture that was resized
IGNORING_FLAGS = ("__ignore__", "ignore", "ignored")
CROWD_FLAGS = ("crowd", "iscrowd")


def find_annotations(source: Path, labels: str | Path | None) -> Listing:
    """The files that `train_anno_list.txt` and `val_anno_list.txt` list, else all LabelMe files below the folder.

    Raises: FileNotFoundError when there are none.
    """
    class_names = read_class_names(source, labels)
    if is_regular(source / LISTS["train"]):
        parts = {part: _read_list(source / name) for part, name in LISTS.items() if is_regular(source / name)}
        listed = {path.resolve() for paths in parts.values() for path in paths}
        rest = [path for path in _files_below(source) if path.resolve() not in listed]
        left_out = ("LabelMe files left out, that no list names",) * len(rest)
        return Listing(source, parts, class_names, is_val_wanted="val" not in parts, left_out=left_out)
    found = _files_below(source)
    if not found:
        raise FileNotFoundError(f"There is no LabelMe file below {str(source)!r}, and no {LISTS['train']} in it.")
    return Listing(source, {"train": found}, class_names)


def read_annotation(path: Path, listing: Listing, notes: collections.Counter[str]) -> ConvertedImage:
    """Read one file with its picture; what is left out or drawn in a way of its own is counted in `notes`.

    Raises: ValueError that names the file for shapes that are no LabelMe shapes.
    """
    content = _read_json(check_inside(path, listing.root, "The folder"))
    picture, data = _find_picture(path, content, listing.root, notes)
    if picture is not None:
        picture = check_inside(picture, listing.root, str(path)).resolve()
    height, width = decode(read_regular(picture) if picture else data, str(picture or path)).shape[:2]
    if not isinstance(content.get("shapes"), list):
        raise ValueError(f"{path} has no list of shapes.")
    scale = _scale_of_points(path, content, height, width)
    instances: dict[Any, list[np.ndarray]] = {}
    crowds = set()
    for number, shape in enumerate(content["shapes"]):
        what = f"Shape {number + 1} of {path}"
        if not isinstance(shape, dict):
            raise ValueError(f"{what} is no JSON object.")
        label, flags = shape.get("label"), shape.get("flags") or {}
        label = "" if label is None else str(label).strip()  # the class 0 is one
        if not isinstance(flags, dict):  # names of those that are set
            flags = dict.fromkeys(map(str, flags), True) if isinstance(flags, list) else {}
        if label in NOT_A_CLASS or any(flags.get(name) for name in IGNORING_FLAGS):
            notes["shapes left out, unlabelled or to be ignored"] += 1
            continue
        group = shape.get("group_id")
        key = (label, "group", str(group)) if group is not None else (label, "shape", number)
        drawn = _shape_mask(shape, what, height, width, scale, notes)
        if drawn is None:
            continue
        instances.setdefault(key, []).append(drawn)
        if any(flags.get(name) for name in CROWD_FLAGS):
            crowds.add(key)
    objects = join_objects(instances, height, width, notes, what="shapes", crowds=crowds)
    name = picture.name if picture else f"{path.stem}{_suffix_of(data)}"
    return ConvertedImage(picture, data, name, height, width, objects)


def _files_below(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*.json") if not is_hidden(path, source) and _may_be_labelme(path))


def _read_list(file: Path) -> list[Path]:
    """Paths of a list file, one a line (of a picture and its annotation the last), relative to its folder."""
    lines = [line.strip().replace("\\", "/") for line in read_lines(file)]
    paths = []
    for line in filter(None, lines):
        whole, last = file.parent / line, file.parent / line.split(" ")[-1]
        paths.append(last if is_regular(last) and not is_regular(whole) else whole)
    if not paths:
        raise ValueError(f"{file} lists no annotation file.")
    for path in paths:
        if not is_regular(path):
            raise FileNotFoundError(f"{file} lists {str(path)!r}, which does not exist.")
    return paths


def _may_be_labelme(path: Path) -> bool:
    """Whether a file is LabelMe's, or damaged so that it can't be told: such a one must not vanish unsaid."""
    try:
        content = parse_json(read_regular(path), path)
    except ValueError:
        return True
    if isinstance(content, list):  # of Label Studio's tasks, which may lie beside; any other is told
        return not (content and all(isinstance(task, dict) and "data" in task for task in content))
    return not isinstance(content, dict) or "shapes" in content or "imagePath" in content


def _read_json(path: Path) -> dict[str, Any]:
    content = parse_json(read_regular(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no LabelMe file: it must hold a JSON object.")
    return content


def _find_picture(
    path: Path, content: dict[str, Any], root: Path, notes: collections.Counter[str]
) -> tuple[Path | None, bytes]:
    """The picture's file, or the bytes that are embedded where there is none.

    Where imagePath names another picture than the one beside the file that has its name, the files were renamed since:
    the one beside is taken, and that is noted.
    """
    named = str(content.get("imagePath") or "").replace("\\", "/")
    folders = [path.parent, path.parent.parent / "images", root / "images", root]
    beside = find_picture(path.stem, [path.parent])
    embedded = content.get("imageData")
    is_another = bool(named) and Path(named).stem != path.stem
    if beside is not None and is_another and (not embedded or _decode_picture(path, embedded) == read_regular(beside)):
        notes[
            f"files whose imagePath names another picture than the one beside them, which was taken ({path.name})"
        ] += 1
        return beside, b""
    for candidate in itertools.chain([path.parent / named], (folder / Path(named).name for folder in folders)):
        if named and is_regular(candidate):
            if beside is not None and is_another and _decode_picture(path, embedded) != read_regular(candidate):
                notes["files whose imagePath names another picture, the one embedded in them was taken"] += 1
                break
            return candidate, b""
    if embedded:
        return None, _decode_picture(path, embedded)
    found = find_picture(path.stem, folders)
    if found is None:
        raise FileNotFoundError(f"{path} names the picture {quote(named)}, which does not exist, and embeds none.")
    return found, b""


def _decode_picture(path: Path, embedded: Any) -> bytes:
    try:
        return base64.b64decode(embedded, validate=False)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"The picture embedded in {path} is damaged: {shorten(error)}.") from error


def _scale_of_points(path: Path, content: dict[str, Any], height: int, width: int) -> tuple[float, float]:
    """By what to multiply (x, y): 1, unless the picture was resized after it was labelled."""
    said_height, said_width = content.get("imageHeight"), content.get("imageWidth")
    if (said_height, said_width) in ((height, width), (None, None)):
        return 1.0, 1.0
    if not (_is_side(said_height) and _is_side(said_width)):
        raise ValueError(
            f"{path} has the size {quote(said_width)} x {quote(said_height)}, not whole numbers of pixels."
        )
    if abs(said_height * width / (said_width * height) - 1) > SAME_SHAPE:
        raise ValueError(
            f"{path} says {quote(said_width)}x{quote(said_height)}, but its picture is {width}x{height} pixels."
        )
    return width / said_width, height / said_height


def _is_side(said: Any) -> TypeGuard[int]:
    return isinstance(said, int) and 0 < said <= MAX_SIDE_PX


def _shape_mask(
    shape: dict[str, Any],
    what: str,
    height: int,
    width: int,
    scale: tuple[float, float],
    notes: collections.Counter[str],
) -> np.ndarray | None:
    """A shape as a polygon [P, 2] float64, or as a mask [height, width] uint8 where it has no outline; None, noted, for
    a polygon of too few points, a slip of the mouse.
    """
    kind = shape.get("shape_type") or "polygon"
    if not isinstance(kind, str):
        raise ValueError(f"{what} has the shape type {quote(kind)}, not a string.")
    try:
        points = np.array(shape["points"], np.float64).reshape(-1, 2)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} has points that are not pairs of numbers.") from None
    if not np.isfinite(points).all():
        raise ValueError(f"{what} has points that are not finite.")
    least = {"point": 1, "points": 1, "rectangle": 2, "circle": 2, "line": 2, "linestrip": 2, "mask": 1, "ellipse": 2}
    if kind == "polygon" and len(points) < 3:
        notes["polygons left out, with fewer than 3 points"] += 1
        return None
    if len(points) < least.get(kind, 3):
        raise ValueError(
            f"{what}, a {shorten(kind)}, has {len(points)} points, it needs at least {least.get(kind, 3)}."
        )
    if kind == "mask":
        return _embedded_mask(shape, points[0], what, height, width)
    points = points * scale
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    if kind in ("circle", "ellipse") and len(points) == 2:
        return _circle(*points) if kind == "circle" else _ellipse(*points)
    if kind in ("line", "linestrip", "point", "points"):
        notes[f"{kind} shapes, drawn as wide as LabelMe draws them"] += 1
        return _draw_thin(points, kind, height, width)
    if kind not in ("polygon", "rectangle", "rotation", "quadrilateral", "oriented_rectangle"):
        raise ValueError(f"{what} has the unknown shape type {quote(kind)}.")
    return points


def _circle(center: np.ndarray, edge: np.ndarray) -> np.ndarray:
    radius = math.dist(center, edge)
    # A regular polygon of n corners leaves its circle by radius * (1 - cos(pi / n)).
    flatness = min(CIRCLE_TOLERANCE_PX / max(radius, 1e-9), 1.0)
    angle = max(math.acos(1 - flatness), math.pi / MOST_CORNERS)  # what is seen of a huge one is nearly straight
    corners = max(12, math.ceil(math.pi / angle))
    return draw_ellipse(center, radius, radius, corners)


def _ellipse(corner: np.ndarray, opposite: np.ndarray) -> np.ndarray:
    radii = np.abs(opposite - corner) / 2
    return draw_ellipse((corner + opposite) / 2, radii[0], radii[1])


def _draw_thin(points: np.ndarray, kind: str, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    pixels = np.rint(points).astype(np.int32)
    if kind in ("point", "points"):
        for x, y in pixels.tolist():
            cv2.circle(mask, (x, y), POINT_RADIUS_PX, 1, -1)
    else:
        cv2.polylines(mask, [pixels], False, 1, LINE_WIDTH_PX)
    return mask


def _embedded_mask(shape: dict[str, Any], corner: np.ndarray, what: str, height: int, width: int) -> np.ndarray:
    """A mask that is drawn into a rectangle of the picture: PNG, base64, its top left corner at the first point."""
    try:
        encoded = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
        drawn = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
    except (KeyError, TypeError, binascii.Error, ValueError, cv2.error):
        drawn = None
    if drawn is None:
        raise ValueError(f"{what} is a mask, but holds no PNG that can be read.")
    x, y = (round(v) for v in corner.tolist())
    mask = np.zeros((height, width), np.uint8)
    top, left = max(y, 0), max(x, 0)
    seen = drawn[top - y : height - y, left - x : width - x]
    mask[top : top + seen.shape[0], left : left + seen.shape[1]] = seen > 0
    return mask


def _suffix_of(data: bytes) -> str:
    return ".png" if data.startswith(b"\x89PNG") else ".jpg"
