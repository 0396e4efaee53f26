"""Small truths and results worked out by hand, and the published example, for the tests of evaluation."""

import json
from pathlib import Path

import numpy as np
from places import FIXTURES
from pycocotools import mask as mask_api

# Ground truth and made-up detections of 100 images with their published result: the COCO API's own example.
EXAMPLE = FIXTURES / "cocoeval100"


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def example_results(iou_type: str) -> list[dict]:
    return read_json(EXAMPLE / f"instances_val2014_fake{iou_type}100_results.json")


def square(x: int, y: int, side: int = 10, size: tuple[int, int] = (40, 60)) -> dict:
    """A filled square as a COCO RLE."""
    mask = np.zeros(size, np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    rle = mask_api.encode(mask)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def annotation(
    id_: int, image_id: int, x: int, y: int, *, category_id: int = 1, iscrowd: int = 0, side: int = 10
) -> dict:
    return {
        "id": id_, "image_id": image_id, "category_id": category_id, "iscrowd": iscrowd,
        "bbox": [x, y, side, side], "area": side * side, "segmentation": square(x, y, side),
    }  # fmt: skip


def result(image_id: int, x: int, y: int, score: float, *, category_id: int = 1) -> dict:
    return {
        "image_id": image_id, "category_id": category_id, "score": score,
        "bbox": [x, y, 10, 10], "segmentation": square(x, y),
    }  # fmt: skip


def data_set(*annotations: dict, image_ids=(1, 2), categories=((1, "cat"),)) -> dict:
    return {
        "images": [{"id": i, "height": 40, "width": 60, "file_name": f"{i}.png"} for i in image_ids],
        "categories": [{"id": id_, "name": name} for id_, name in categories],
        "annotations": list(annotations),
    }


def example_truth() -> dict:
    return read_json(EXAMPLE / "instances_val2014_100.json")
