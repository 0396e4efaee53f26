"""Results in the forms of other tools: LabelMe, YOLO, a COCO data set, supervision, and masks for JSON.

Every function takes results and returns plain values; files are written in `saving.py`, those of maps in `geo.py`.
Where a format has no holes, they are opened by a cut of no width; where it has no parts, these share a group.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instseg_jax.crops import crop_bounds, crop_rle
from instseg_jax.masks import decode_rle, rle_area, rle_box_xyxy_px
from instseg_jax.messages import quote
from instseg_jax.outlines import bridge_holes, join_rings, rle_to_polygons

if TYPE_CHECKING:
    from instseg_jax.results.result import Result

MASKS_FORMATS = ("rle", "crop", "polygon")
LABELME_VERSION = "5.5.0"  # the first whose shapes have all the fields written here


def masks_to_json(result: "Result", masks_format: str) -> list[Any]:
    """Masks in plain types, one an instance.

    "rle": COCO RLE of the whole image. "crop": nested lists of 0 and 1 of the box rounded to pixels, as the official
    pipeline has them (large). "polygon": the parts as GeoJSON's MultiPolygon has them, [[outer, hole, ...], ...] with
    rings of [x, y] in pixels that are not closed. Raises ValueError for any other name.
    """
    if masks_format == "rle":
        return [dict(mask) for mask in result.masks]
    if masks_format == "crop":
        boxes = [crop_bounds(box["coordinate"], result.size) for box in result.boxes]
        return [crop_rle(mask, box).tolist() for mask, box in zip(result.masks, boxes, strict=True)]
    if masks_format == "polygon":
        return [
            [[ring.tolist() for ring in (part.outer, *part.holes)] for part in rle_to_polygons(mask)]
            for mask in result.masks
        ]
    raise ValueError(f"masks_format must be one of {', '.join(MASKS_FORMATS)}, got {quote(masks_format)}.")


def to_labelme(result: "Result", *, image_path: str, tolerance: float) -> dict:
    """Make a LabelMe file of a result: one polygon a part, parts of one object with a group_id in common.

    `image_path` is where LabelMe finds the picture, relative to the file. Outlines keep within `tolerance` pixels.
    """
    shapes, groups = [], 0
    for box, mask in zip(result.boxes, result.masks, strict=True):
        parts = rle_to_polygons(mask, tolerance=tolerance)
        groups += len(parts) > 1
        shapes += [
            {
                "label": box["label"],
                "points": bridge_holes(part).tolist(),
                "group_id": groups if len(parts) > 1 else None,
                "description": f"score {box['score']:.3f}",
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
            }
            for part in parts
        ]
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": result.size[0],
        "imageWidth": result.size[1],
    }


def to_yolo(result: "Result", *, tolerance: float) -> str:
    """Make YOLO's segmentation labels: a line an instance, class index and x y pairs in 0..1 of the image.

    The format has neither holes nor parts: holes are opened by a cut, parts joined by one. Outlines keep within
    `tolerance` pixels. An instance without mask pixels has no line.
    """
    lines = []
    for box, mask in zip(result.boxes, result.masks, strict=True):
        parts = [bridge_holes(part) for part in rle_to_polygons(mask, tolerance=tolerance)]
        if parts:
            points = join_rings(parts) / (result.size[1], result.size[0])
            numbers = " ".join(f"{value:.6g}" for value in points.reshape(-1))
            lines.append(f"{box['cls_id']} {numbers}\n")
    return "".join(lines)


# pycocotools 2.0.9 and 2.0.10 ask for `info`.
COCO_HEAD: dict[str, Any] = {"info": {"description": "instances found by instseg_jax"}, "licenses": []}


def coco_image(result: "Result", image_id: int) -> dict:
    """The entry of an image in a COCO data set."""
    height, width = result.size
    return {"id": image_id, "file_name": Path(result.input_path).name, "height": height, "width": width}


def coco_entries(result: "Result", image_id: int) -> Iterator[dict]:
    """The annotations of a result, without their own ids; boxes and areas are those of the masks."""
    for entry in result.to_coco(image_id):
        x1, y1, x2, y2 = rle_box_xyxy_px(entry["segmentation"])
        yield entry | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": rle_area(entry["segmentation"])}


def coco_annotation(entry: dict, number: int) -> dict:
    """An annotation of a COCO data set, with its id."""
    return entry | {"id": number, "iscrowd": 0}


def coco_categories(names: Mapping[int, str]) -> list[dict]:
    """The categories of a COCO data set, by id."""
    return [{"id": int(id_), "name": name} for id_, name in sorted(names.items())]


def to_supervision(result: "Result") -> Any:
    """Make a `supervision.Detections` with masks [n, H, W] bool. Raises ImportError without that library."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError("to_supervision needs supervision: pip install supervision") from error
    names = [box["label"] for box in result.boxes]
    if not names:
        return supervision.Detections.empty()
    return supervision.Detections(
        xyxy=np.array([box["coordinate"] for box in result.boxes], np.float32),
        mask=np.stack([decode_rle(mask).astype(bool) for mask in result.masks]),
        confidence=np.array([box["score"] for box in result.boxes], np.float32),
        class_id=np.array([box["cls_id"] for box in result.boxes], int),
        data={"class_name": np.array(names)},
    )
