"""A small data set that the loader's tests share, and comparing batches."""

import itertools
import json
from pathlib import Path

import cv2
import numpy as np


def write_loader_set(root: Path) -> Path:
    """Seven pictures: picture i is 40 x (50 + i) with the grey value 20 * i and i rectangles, the sixth with none."""
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    images, annotations = [], []
    for i in range(7):
        cv2.imwrite(str(root / "images" / f"{i}.png"), np.full((40, 50 + i, 3), 20 * i, np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 50 + i})
        for k in range(0 if i == 6 else i):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": 1 + k % 2,
                    "segmentation": [[8 * k, 10, 8 * k + 8, 10, 8 * k + 8, 30, 8 * k, 30]],
                    "iscrowd": 0,
                }
            )
    data = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "odd"}, {"id": 2, "name": "even"}],
    }
    for split in ("train", "val"):
        (root / "annotations" / f"instance_{split}.json").write_text(json.dumps(data))
    return root


def take(batches, n):
    with_end = list(itertools.islice(batches, n))
    batches.close()
    return with_end


def arrays(batch):
    targets = batch.targets
    return [
        batch.images, batch.image_valid, batch.image_index, batch.original_sizes, batch.content_sizes,
        targets.labels, targets.boxes, targets.masks, targets.valid,
    ]  # fmt: skip


def assert_equal(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(x, y)
