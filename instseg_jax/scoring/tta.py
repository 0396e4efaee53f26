"""Test-time augmentation: one image seen several times, and the detections of all views merged.

A view is the network input mirrored, or made from the image at another size. Merging averages what several views
agree on; a detection that only some of them have loses score. Where views come from is the caller's.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from pycocotools import mask as mask_api

from instseg_jax.messages import quote
from instseg_jax.types import Detections

VIEWS = ("flip", "scales")
MERGE_IOU = 0.6  # boxes of one class that overlap by this in two views are one object


def parse_views(text: str | None) -> tuple[str, ...]:
    """The kinds of views that a text like "flip,scales" names; none for no text. Raises ValueError for others."""
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    unknown = [name for name in names if name not in VIEWS]
    if unknown:
        raise ValueError(f"--tta is {quote(text)}; it may name {' and '.join(VIEWS)}, separated by a comma")
    return names


def scaled_sizes(image_size: int, scales: Sequence[float], multiple: int) -> tuple[int, ...]:
    """Sizes of the network input at several scales, the plain one first, each a multiple of `multiple` pixels."""
    sizes = [max(multiple, round(image_size * scale / multiple) * multiple) for scale in scales]
    return tuple(dict.fromkeys([image_size, *sizes]))


def flip_back(detections: Detections) -> Detections:
    """Detections of a mirrored network input in the frame of the plain one."""
    x1, y1, x2, y2 = np.moveaxis(np.asarray(detections.boxes_xyxy), -1, 0)
    return Detections(
        scores=detections.scores,
        labels=detections.labels,
        boxes_xyxy=np.stack([1 - x2, y1, 1 - x1, y2], axis=-1),
        mask_logits=np.asarray(detections.mask_logits)[..., ::-1],
    )


def merge_views(views: Sequence[Detections], *, num_detections: int) -> Detections:
    """Merge the detections of V views of a batch, all in one frame, on the mask grid of the first.

    Of two views, detections of a class pair up by the overlap of their boxes, largest first. A pair's box and mask
    logits are means weighted by score; a score is its sum over the views divided by V. Each image keeps as many as the
    largest view has, `num_detections` at most.
    """
    batch_size, _ = np.shape(views[0].scores)
    count = min(num_detections, max(np.shape(view.scores)[1] for view in views))
    merged = [_merge_image([_of_image(view, b) for view in views], count) for b in range(batch_size)]
    return Detections(*(np.stack(parts) for parts in zip(*merged, strict=True)))


def _of_image(view: Detections, index: int) -> tuple[np.ndarray, ...]:
    fields = (view.scores, view.labels, view.boxes_xyxy, view.mask_logits)
    scores, labels, boxes, logits = (np.asarray(field)[index] for field in fields)
    return scores.astype(np.float32), labels, boxes.astype(np.float32), logits.astype(np.float32)


def _merge_image(views: Sequence[tuple[np.ndarray, ...]], num_detections: int) -> tuple[np.ndarray, ...]:
    scores, labels, boxes, logits = views[0]
    grid = logits.shape[1:]
    anchors = boxes  # what later views are compared with: the box of the first view that has the object
    weight, boxes, logits = scores.copy(), boxes * scores[:, None], logits * scores[:, None, None]
    for other_scores, other_labels, other_boxes, other_logits in views[1:]:
        mine, theirs = _pair_up(anchors, labels, other_boxes, other_labels)
        new = np.setdiff1d(np.arange(len(other_scores)), theirs)
        rows = np.full(len(other_scores), -1)
        rows[theirs], rows[new] = mine, len(weight) + np.arange(len(new))
        anchors = np.concatenate([anchors, other_boxes[new]])
        labels = np.concatenate([labels, other_labels[new]])
        weight = np.concatenate([weight, np.zeros(len(new), np.float32)])
        boxes = np.concatenate([boxes, np.zeros((len(new), 4), np.float32)])
        logits = np.concatenate([logits, np.zeros((len(new), *grid), np.float32)])
        weight[rows] += other_scores
        boxes[rows] += other_boxes * other_scores[:, None]
        for row, score, mask in zip(rows, other_scores, other_logits, strict=True):
            logits[row] += score * cv2.resize(np.ascontiguousarray(mask), grid[::-1], interpolation=cv2.INTER_LINEAR)
    best = np.argsort(-weight, kind="stable")[:num_detections]
    divisor = np.maximum(weight[best], np.finfo(np.float32).tiny)
    return (
        weight[best] / len(views),
        labels[best],
        boxes[best] / divisor[:, None],
        logits[best] / divisor[:, None, None],
    )


def _pair_up(
    boxes: np.ndarray, labels: np.ndarray, other_boxes: np.ndarray, other_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both sides that are one object, each at most once."""
    sides = (np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1).astype(np.float64) for b in (boxes, other_boxes))
    ious = np.asarray(mask_api.iou(*sides, np.zeros(len(other_boxes), np.uint8)))
    ious = np.where(labels[:, None] == other_labels[None], ious, 0)
    row, column = np.nonzero(ious >= MERGE_IOU)
    mine, theirs = [], []
    is_free, is_other_free = np.ones(len(boxes), bool), np.ones(len(other_boxes), bool)
    for i in np.argsort(-ious[row, column], kind="stable"):
        if is_free[row[i]] and is_other_free[column[i]]:
            is_free[row[i]] = is_other_free[column[i]] = False
            mine.append(row[i])
            theirs.append(column[i])
    return np.array(mine, np.intp), np.array(theirs, np.intp)
