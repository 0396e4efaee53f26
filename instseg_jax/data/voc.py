"""Pascal VOC: SegmentationObject and SegmentationClass palette images, and Annotations in XML.

Masks are taken to the pixel (holes and parts stay); 255 is no object. What class an object has is asked of
SegmentationClass first, then of the XML. Without masks, the boxes of the XML become rectangles.
"""

import collections
import dataclasses
import functools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from instseg_jax import masks
from instseg_jax.data.converted import (
    NOT_A_CLASS,
    ConvertedImage,
    ConvertedObject,
    Listing,
    check_inside,
    find_picture,
    is_hidden,
    join_parts,
    picture_size,
    read_class_names,
    read_lines,
)
from instseg_jax.files import is_regular
from instseg_jax.images import IMAGE_SUFFIXES
from instseg_jax.messages import quote, shorten

VOID = 255
LABEL_MAP = "labelmap.txt"  # of CVAT: names and colours of the classes
FOLDERS = ("SegmentationObject", "SegmentationClass", "Annotations")
MIN_OVERLAP = 0.5  # IoU of a mask's box with a box of the XML that names its class
# The classes of the Pascal VOC challenge itself, whose palette index is their place in the alphabet.
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclasses.dataclass(frozen=True)
class _XmlObject:
    name: str
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels, x2 and y2 exclusive


def find_annotations(source: Path, labels: str | Path | None) -> Listing:
    """One name a picture: of ImageSets/Segmentation/{train,val}.txt, else of all masks, else of all XML files.

    The folder may also hold the one that is laid out as VOC is, as VOCdevkit does.

    Raises: FileNotFoundError when it has none of VOC's folders.
    """
    class_names = read_class_names(source, labels)
    source = _find_root(source)
    if not class_names and is_regular(source / LABEL_MAP):
        class_names = tuple(_read_label_map(source / LABEL_MAP).values())
    parts = {}
    for part in ("train", "val"):
        for folder in ("Segmentation", "Main"):
            file = source / "ImageSets" / folder / f"{part}.txt"
            if is_regular(file) and part not in parts:
                lines = [
                    re.sub(r"\s+-?[01]$", "", line.strip()) for line in read_lines(file)
                ]  # Main says whether it is there
                parts[part] = [Path(line) for line in lines if line]
    if not parts:
        stems = {
            path.stem
            for folder, suffix in (("SegmentationObject", "png"), ("SegmentationClass", "png"), ("Annotations", "xml"))
            for path in (source / folder).glob(f"*.{suffix}")
            if not is_hidden(path, source)
        }
        parts = {"train": [Path(stem) for stem in sorted(stems)]}
    if not any(parts.values()):
        raise FileNotFoundError(
            f"There is neither SegmentationObject nor SegmentationClass nor Annotations in {str(source)!r}."
        )
    return Listing(source, parts, class_names)


def _find_root(source: Path) -> Path:
    """The folder itself, or the only one below it that is laid out as VOC is."""
    if any((source / name).is_dir() for name in FOLDERS):
        return source
    found = {path.parent for name in FOLDERS for path in source.rglob(name) if path.is_dir()}
    return found.pop() if len(found) == 1 else source


def read_annotation(stem: Path, listing: Listing, notes: collections.Counter[str]) -> ConvertedImage:
    """Read all that there is of a name: masks, classes, XML and the picture.

    Raises: FileNotFoundError when the name has no picture.
    """
    root, name = listing.root, stem.as_posix()
    picture = find_picture(name, [root / "JPEGImages", root / "images", root])
    if picture is None:
        raise FileNotFoundError(
            f"There is no picture {quote(name)} in {str(root / 'JPEGImages')!r} ({IMAGE_SUFFIXES})."
        )
    masks_of = {kind: root / kind / f"{name}.png" for kind in FOLDERS[:2]}
    xml_file = root / "Annotations" / f"{name}.xml"
    for path in (picture, xml_file, *masks_of.values()):
        check_inside(path, root, f"The name {quote(name)}")
    height, width = picture_size(picture)
    xml = _read_xml(xml_file)
    colors = _read_label_map(root / LABEL_MAP) if is_regular(root / LABEL_MAP) else {}
    codes = {code: index for index, code in enumerate(colors)} or None
    classes, _ = _read_indices(masks_of["SegmentationClass"], height, width, codes)
    instances, void = _read_indices(masks_of["SegmentationObject"], height, width)
    if instances is None and classes is not None:
        notes["pictures without SegmentationObject, each connected region made an object"] += 1
        instances, void = _connected_regions(classes), VOID
    if instances is None:
        objects = _boxes_as_objects(xml, height, width, notes)
    else:
        objects = _masks_as_objects(name, instances, void, classes, xml, listing, notes)
    return ConvertedImage(picture.resolve(), b"", picture.name, height, width, tuple(objects))


def _masks_as_objects(
    name: str,
    instances: np.ndarray,
    void: int | None,  # the number of no object; 16-bit images have none
    classes: np.ndarray | None,
    xml: list[_XmlObject],
    listing: Listing,
    notes: collections.Counter[str],
) -> list[ConvertedObject]:
    objects, boxes = [], []
    for number in np.unique(instances).tolist():
        if number in (0, void):
            continue
        mask = (instances == number).astype(np.uint8)
        rle = masks.encode_mask(mask)
        box = masks.mask_box_xyxy_px(mask)
        assert box is not None  # the number occurs
        boxes.append(box)
        index = None
        if classes is not None:
            index = int(np.bincount(classes[mask > 0], minlength=VOID + 1).argmax())
            if index in (0, VOID):
                notes["objects left out that SegmentationClass calls void or background"] += 1
                continue
        label = _name_of_index(index, listing.class_names) or _name_by_box(box, xml, number)
        if label is None and not listing.class_names and index is not None and index <= len(VOC_CLASSES) and not xml:
            label = VOC_CLASSES[index - 1]
            notes[
                "objects whose class number is read as one of the Pascal VOC challenge, since no file names classes"
            ] += 1
        if label is None:
            raise ValueError(
                f"Object {number} of {quote(name)} has no class name: neither class number {index} in a labels.txt "
                "nor a box in Annotations fits; name a file of class names with --labels."
            )
        if label in NOT_A_CLASS:
            notes["objects left out, to be ignored"] += 1
        else:
            objects.append(ConvertedObject(label, rle))
    for o in xml:
        if max((_box_iou(box, o.box) for box in boxes), default=0.0) < MIN_OVERLAP:
            notes["objects of Annotations left out, since no mask has their box"] += 1
    return objects


def _name_of_index(index: int | None, class_names: tuple[str, ...]) -> str | None:
    """The class of a palette index: a list of names may begin with the background (index 0) or with the first class."""
    names = [name for name in class_names if name != "__ignore__"]
    if index is None or not names:
        return None
    position = index if names[0] in NOT_A_CLASS else index - 1
    return names[position] if 0 <= position < len(names) else None


def _name_by_box(box: tuple[int, int, int, int], xml: list[_XmlObject], number: int) -> str | None:
    """The class of the XML's object with the box of a mask; where several share it, of the one with its number."""
    overlaps = [_box_iou(box, o.box) for o in xml]
    best = max(overlaps, default=0.0)
    if best < MIN_OVERLAP:
        return None
    equal = [i for i, overlap in enumerate(overlaps) if overlap > best - 0.05]
    return xml[number - 1 if number - 1 in equal else overlaps.index(best)].name


def _boxes_as_objects(
    xml: list[_XmlObject], height: int, width: int, notes: collections.Counter[str]
) -> list[ConvertedObject]:
    objects = []
    for o in xml:
        x1, y1, x2, y2 = o.box
        segmentation = join_parts([np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64)], height, width)
        if segmentation is None:
            notes["objects left out, without a pixel in their picture"] += 1
        else:
            notes["boxes without a mask, made rectangles"] += 1
            objects.append(ConvertedObject(o.name, segmentation))
    return objects


def _read_xml(file: Path) -> list[_XmlObject]:
    if not is_regular(file):
        return []
    try:
        root = ElementTree.parse(file).getroot()
        return [
            _XmlObject((entry.findtext("name") or "").strip(), _read_box(entry.find("bndbox")))
            for entry in root.findall("object")
        ]
    except (ElementTree.ParseError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no VOC annotation: {shorten(error)}.") from error


def _read_box(node: ElementTree.Element | None) -> tuple[float, float, float, float]:
    """Corners of a bndbox, whose pixels count from 1 and include the last."""
    if node is None:
        raise ValueError("an object has no bndbox")
    x1, y1, x2, y2 = (float(node.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))  # type: ignore[arg-type]
    return x1 - 1, y1 - 1, x2, y2


def _read_label_map(file: Path) -> dict[int, str]:
    """CVAT's labelmap.txt, `name:r,g,b:parts:actions` a line: names by colour 0xRRGGBB, in the order of the file.

    Raises: ValueError that names a line of another form.
    """
    names = {}
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        try:
            red, green, blue = (int(value) for value in rest.split(":")[0].split(","))
        except ValueError:
            raise ValueError(f"Line {number} of {file} is not name:red,green,blue:parts:actions.") from None
        names[red << 16 | green << 8 | blue] = name.strip()
    return names


def _read_indices(
    file: Path, height: int, width: int, codes: dict[int, int] | None = None
) -> tuple[np.ndarray | None, int | None]:
    """Indices [height, width] of a PNG, and the one of them that stands for no object.

    Colours are turned into indices by `codes` {0xRRGGBB: index}, else by the VOC palette. 255 stands for no object
    where there are 8 bits; of 16 it is a number like others.
    """
    if not is_regular(file):
        return None, None
    void: int | None = VOID
    try:
        with Image.open(file) as picture:
            if codes is not None or picture.mode in ("RGB", "RGBA"):
                known = _palette_codes() if codes is None else codes
                indices = _colors_to_indices(np.asarray(picture.convert("RGB")), file, known)
            else:
                indices = np.asarray(picture)
                void = VOID if indices.dtype == np.uint8 else None
    except OSError as error:
        raise ValueError(f"{str(file)!r} can't be read as an image: {shorten(error)}.") from error
    if indices.ndim != 2 or indices.shape != (height, width):
        raise ValueError(
            f"{str(file)!r} is {indices.shape[1]}x{indices.shape[0]}, its picture {width}x{height} pixels."
        )
    return indices.astype(np.int64), void


@functools.cache
def _palette_codes() -> dict[int, int]:
    """Index of each colour 0xRRGGBB of the VOC palette: its bits are dealt out to red, green and blue in turn."""
    codes = {}
    for index in range(256):
        rgb, rest = [0, 0, 0], index
        for bit in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        codes[rgb[0] << 16 | rgb[1] << 8 | rgb[2]] = index
    return codes


def _colors_to_indices(rgb: np.ndarray, file: Path, known: dict[int, int]) -> np.ndarray:
    codes = rgb.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    values, inverse = np.unique(codes, return_inverse=True)
    if any(value not in known for value in values.tolist()):
        raise ValueError(f"{str(file)!r} has colours that are neither of the VOC palette nor of a {LABEL_MAP}.")
    return np.array([known[value] for value in values.tolist()])[inverse].reshape(codes.shape)


def _connected_regions(classes: np.ndarray) -> np.ndarray:
    regions, count = np.zeros(classes.shape, np.int64), 0
    for index in np.unique(classes).tolist():
        if index not in (0, VOID):
            found, labels = cv2.connectedComponents((classes == index).astype(np.uint8), connectivity=8)
            labels = labels.astype(np.int64)
            # 255 stays the number of no object.
            numbers = np.array([0, *(n if n < VOID else n + 1 for n in range(count + 1, count + found))])
            regions = np.where(labels > 0, numbers[labels], regions)
            count += found - 1
    return regions


def _box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0
