"""What an evaluation found in a few pictures, drawn beside what is there."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from instseg_jax.data import coco
from instseg_jax.masks import segmentation_to_rle
from instseg_jax.results.visualize import draw_instances
from instseg_jax.scoring.run import read_shown

LONGER_SIDE = 640  # pixels, of each half
GAP = 6  # pixels between the halves


def draw_found(
    dataset: coco.CocoDataset, results: Sequence[dict], count: int, *, threshold: float
) -> Iterator[tuple[str, np.ndarray]]:
    """Draw `count` pictures evenly over a data set, the objects on the left and what was found on the right.

    Args:
      dataset: the pictures with their objects.
      results: COCO entries with masks, of all pictures.
      count: how many; fewer where there are not so many.
      threshold: lowest score that is drawn.

    Yields: (name of the picture without its ending, RGB [h, w, 3] uint8).
    """
    index = {category: label for label, category in enumerate(dataset.category_ids)}
    names = dataset.categories
    for position in np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist():
        record, picture = dataset.images[position], read_shown(dataset, position)
        size = picture.shape[:2]
        there = [
            (one.label, one.box_xywh_px, segmentation_to_rle(one.segmentation, *size), 1.0)
            for one in dataset.annotations[position]
            if not one.is_crowd
        ]
        found = [
            (index[one["category_id"]], one["bbox"], one["segmentation"], one["score"])
            for one in results
            if one["image_id"] == record.id and one["score"] >= threshold
        ]
        halves = []
        for entries, is_found in ((there, False), (found, True)):
            boxes = np.array([box for _, box, _, _ in entries], np.float64).reshape(-1, 4)
            drawn = draw_instances(
                picture,
                boxes_xyxy_px=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
                labels=[label for label, _, _, _ in entries],
                names=[names[label] for label, _, _, _ in entries],
                scores=[score for _, _, _, score in entries] if is_found else None,
                masks=[mask for _, _, mask, _ in entries],
            )
            scale = min(1.0, LONGER_SIDE / max(size))
            smaller = max(1, round(size[1] * scale)), max(1, round(size[0] * scale))
            halves.append(drawn if scale == 1 else cv2.resize(drawn, smaller, interpolation=cv2.INTER_AREA))
        gap = np.full((halves[0].shape[0], GAP, 3), 255, np.uint8)
        yield (
            record.file_name.rpartition("/")[2].rpartition(".")[0],
            np.concatenate([halves[0], gap, halves[1]], axis=1),
        )
