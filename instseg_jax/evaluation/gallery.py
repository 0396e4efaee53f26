"""Pictures of the worst false alarms, the worst misses and the best matches, cut out around what they show.

Drawing itself is a function that the caller passes in, with the arguments of `inference.visualize.draw_instances`.
"""

import base64
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image

from instseg_jax.evaluation.analysis import Analysis
from instseg_jax.evaluation.errors import DETECTION_KINDS
from instseg_jax.masks import decode_rle

PER_IMAGE = 2  # cases from one image, so that one bad image doesn't fill a gallery
SIDE = 270  # pixels of the longer side of one picture
MARGIN = 0.35  # of the longer side of what is shown, around it
MAX_ENLARGEMENT = 4.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One detection, one object, or both, of an image."""

    image: int  # position in the matches' images
    detection: int | None
    obj: int | None
    caption: str


def choose_cases(analysis: Analysis, count: int) -> dict[str, list[Case]]:
    """The most certain false alarms, the largest objects missed, and the closest matches, `count` of each at most."""
    matches, errors = analysis.matches, analysis.errors
    names = matches.class_names
    wrong = np.flatnonzero(errors.kinds >= 0)
    false_alarms = []
    for d in wrong[np.argsort(-matches.scores[wrong], kind="stable")].tolist():
        obj = int(errors.nearest[d])
        text = f"{names[matches.labels[d]]} {matches.scores[d]:.2f}: {DETECTION_KINDS[errors.kinds[d]]}"
        false_alarms.append(Case(int(matches.image_index[d]), d, obj if obj >= 0 else None, text))
    areas = np.array([entry["area"] for entry in matches.object_entries])
    lost = np.flatnonzero(errors.not_found)
    misses = [
        Case(int(matches.object_image_index[o]), None, o, f"{names[matches.object_labels[o]]}, {areas[o]:.0f} px")
        for o in lost[np.argsort(-areas[lost], kind="stable")].tolist()
    ]
    iou_of = dict(zip(map(tuple, matches.pairs.tolist()), matches.pair_ious.tolist(), strict=True))
    found = [(iou_of[d, o], d, o) for d, o in enumerate(matches.matched[0].tolist()) if (d, o) in iou_of]
    best = [
        Case(int(matches.image_index[d]), d, o, f"{names[matches.labels[d]]} {matches.scores[d]:.2f}, IoU {iou:.3f}")
        for iou, d, o in sorted(found, key=lambda entry: -entry[0])
    ]
    chosen = {"Worst false alarms": false_alarms, "Worst misses": misses, "Best matches": best}
    return {title: _spread(cases, count) for title, cases in chosen.items()}


def draw_cases(
    analysis: Analysis,
    results: Sequence[dict],
    cases: Sequence[Case],
    *,
    read_image: Callable[[int], np.ndarray],
    draw: Callable[..., np.ndarray],
) -> list[tuple[str, str]]:
    """Draw each case, the truth on the left and the prediction on the right: [(caption, JPEG as a data address)].

    `read_image(image_id)` gives RGB [H, W, 3] uint8. Beside a missed object the predictions are shown that are
    certain enough to be kept, by the threshold with the best F1.
    """
    matches = analysis.matches
    threshold = analysis.thresholds["overall"] if analysis.thresholds else 0.5
    pictures = []
    for case in cases:
        image = read_image(matches.image_ids[case.image].item())
        objects = np.flatnonzero(matches.object_image_index == case.image)
        if case.detection is None:
            detections = np.flatnonzero((matches.image_index == case.image) & (matches.scores >= threshold))
        else:
            detections = np.array([case.detection])
        truth = [(matches.object_entries[o], int(matches.object_labels[o]), None) for o in objects]
        predicted = [
            (results[matches.result_index[d]], int(matches.labels[d]), float(matches.scores[d])) for d in detections
        ]
        shown = [] if case.detection is None else [_box(predicted[0][0], matches.iou_type)]
        shown += [] if case.obj is None else [_box(matches.object_entries[case.obj], matches.iou_type)]
        frame = _frame(np.array(shown), image.shape[:2])
        sides = [
            _draw_side(image, frame, entries, matches.class_names, matches.iou_type, draw)
            for entries in (truth, predicted)
        ]
        gap = np.full((len(sides[0]), 6, 3), 255, np.uint8)
        pictures.append((case.caption, _data_address(np.concatenate([sides[0], gap, sides[1]], axis=1))))
    return pictures


def _spread(cases: Sequence[Case], count: int) -> list[Case]:
    seen: Counter[int] = Counter()
    chosen = []
    for case in cases:
        seen[case.image] += 1
        if seen[case.image] <= PER_IMAGE:
            chosen.append(case)
        if len(chosen) == count:
            break
    return chosen


def _box(entry: dict, iou_type: str) -> np.ndarray:
    """Corners of a result's or an object's box, or of its mask."""
    if iou_type == "bbox":
        x, y, w, h = entry["bbox"]
        return np.array([x, y, x + w, y + h], np.float64)
    mask = decode_rle(entry["segmentation"])
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.array([0, 0, mask.shape[1], mask.shape[0]], np.float64)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def _frame(corners: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of an image to show: a square around all corners [n, 4] with a margin, as far as the image goes."""
    (x1, y1), (x2, y2) = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    half = max(x2 - x1, y2 - y1, SIDE / MAX_ENLARGEMENT / 2) * (0.5 + MARGIN)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, right = (int(np.clip(v, 0, size[1])) for v in (x - half, x + half))
    top, bottom = (int(np.clip(v, 0, size[0])) for v in (y - half, y + half))
    if right - left < 2 or bottom - top < 2:  # a box outside the image
        return 0, 0, size[1], size[0]
    return left, top, right, bottom


def _draw_side(
    image: np.ndarray,
    frame: tuple[int, int, int, int],
    entries: Sequence[tuple[dict, int, float | None]],
    class_names: Sequence[str],
    iou_type: str,
    draw: Callable[..., np.ndarray],
) -> np.ndarray:
    """Cut, enlarge and draw the entries (annotation or result, label, score) that reach into the frame."""
    left, top, right, bottom = frame
    scale = min(SIDE / max(right - left, bottom - top), MAX_ENLARGEMENT)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    crop = cv2.resize(
        np.ascontiguousarray(image[top:bottom, left:right]),
        size,
        interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC,
    )
    boxes, masks, kept = [], [], []
    for entry, label, score in entries:
        x1, y1, x2, y2 = _box(entry, iou_type)
        if x1 >= right or x2 <= left or y1 >= bottom or y2 <= top:
            continue
        boxes.append((np.array([x1 - left, y1 - top, x2 - left, y2 - top])) * scale)
        if iou_type == "bbox":
            masks.append(np.zeros(crop.shape[:2], np.uint8))
        else:
            part = np.ascontiguousarray(decode_rle(entry["segmentation"])[top:bottom, left:right])
            masks.append(cv2.resize(part, size, interpolation=cv2.INTER_NEAREST))
        kept.append((label, score))
    scores = [score for _, score in kept if score is not None]
    return draw(
        crop,
        boxes_xyxy_px=np.array(boxes).reshape(-1, 4),
        labels=[label for label, _ in kept],
        names=[class_names[label] for label, _ in kept],
        scores=scores if len(scores) == len(kept) else None,
        masks=masks,
    )


def _data_address(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
