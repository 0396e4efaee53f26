"""A data set of two noise pictures a split, with objects that a test names."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (60, 90)  # (height, width) of the pictures


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def write_set(root: Path, objects: list[dict], classes=("a", "b")) -> Path:
    """Two splits of the same two pictures, all objects in the first."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        rng = np.random.default_rng(len(split))
        images = []
        for i in range(2):
            name = f"{split}{i}.png"
            Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(root / "images" / name)
            images.append({"id": i, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        sound = {"id": 999, "image_id": 1, "category_id": 1, "segmentation": rectangle(10, 10, 30, 30)}
        named = [{"id": i + 1, "image_id": 0, "category_id": 1} | entry for i, entry in enumerate(objects)]
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
        content = {"images": images, "annotations": [*named, sound], "categories": categories}
        (root / "annotations" / f"instance_{split}.json").write_text(json.dumps(content))
    return root
