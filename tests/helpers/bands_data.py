"""A data set of pictures with many bands."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

HEIGHT, WIDTH = 40, 48


def write_dataset(root: Path, channels: int, suffix: str) -> Path:
    """Four pictures of 12-bit noise in each channel c around 500 * (c + 1); a square object is 1000 brighter."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    for i in range(4):
        rng = np.random.default_rng(i)
        picture = rng.normal(500 * np.arange(1, channels + 1), 40, (HEIGHT, WIDTH, channels))
        picture[10:30, 12 + i : 32 + i] += 1000
        picture = picture.clip(0, 65535).astype(np.uint16)
        path = root / "images" / f"{i}{suffix}"
        if suffix == ".npy":
            np.save(path, picture)
        elif suffix == ".tif":
            rasterio = pytest.importorskip("rasterio")
            with rasterio.open(
                path, "w", driver="GTiff", width=WIDTH, height=HEIGHT, count=channels, dtype="uint16"
            ) as file:
                file.write(np.moveaxis(picture, 2, 0))
        else:
            cv2.imwrite(str(path), picture[..., [2, 1, 0, 3][:channels]] if channels > 1 else picture[..., 0])
        content["images"].append({"id": i, "file_name": path.name, "height": HEIGHT, "width": WIDTH})
        corners = [12 + i, 10, 32 + i, 10, 32 + i, 30, 12 + i, 30]
        content["annotations"].append({"id": i, "image_id": i, "category_id": 1, "segmentation": [corners]})
    for split in ("train", "val"):
        (root / "annotations" / f"instance_{split}.json").write_text(json.dumps(content))
    return root
