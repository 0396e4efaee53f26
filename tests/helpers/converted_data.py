"""Pictures and masks that the tests of converters share, and reading back what was written."""

from pathlib import Path

import cv2
import numpy as np

from instseg_jax import masks
from instseg_jax.data import coco
from instseg_jax.data.convert import convert_dataset

HEIGHT, WIDTH = 60, 80


def convert(source, kind, target, **changes):
    arguments = {"labels": None, "percentages": None, "group_by": None, "seed": 0, "progress": lambda items, _: items}
    return convert_dataset(source, kind, target, **(arguments | changes))


def read(target, part="train"):
    """{picture's name: [(class name, mask)]} of a converted data set, and the data set."""
    dataset = coco.read_split(target, part)
    coco.check_images(dataset)
    found = {}
    for image, annotations in zip(dataset.images, dataset.annotations, strict=True):
        found[image.file_name] = [
            (dataset.categories[a.label], masks.segmentation_to_mask(a.segmentation, image.height, image.width))
            for a in annotations
        ]
        for a, (_, mask) in zip(annotations, found[image.file_name], strict=True):
            x1, y1, x2, y2 = masks.mask_box_xyxy_px(mask)
            assert a.box_xywh_px == (x1, y1, x2 - x1, y2 - y1) and a.area == mask.sum()
    return found, dataset


def box_mask(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def write_picture(path: Path, seed: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    data = cv2.imencode(path.suffix, noise)[1].tobytes()
    path.write_bytes(data)
    return data
