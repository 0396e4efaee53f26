"""Which detection found which object: the ground that every analysis stands on.

`match_detections` pairs the detections and objects of a whole data set once, by COCO's rule, and keeps flat arrays;
curves, error split, thresholds, confusion and bootstrap are computed from those. The official numbers are in `coco`.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_api

from instseg_jax.evaluation.coco import class_names, result_entries, truth_entries

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as pycocotools has them, to the bit
RECALLS = np.linspace(0.0, 1.0, 101)
BACKGROUND_IOU = 0.1  # pairs that overlap less are taken for unrelated (TIDE, Bolya et al. 2020)


@dataclasses.dataclass(frozen=True)
class Matches:
    """N detections and M objects of a data set with K classes, T overlap thresholds and P overlapping pairs.

    Detections stand by image, within it by falling score. Crowds are objects that are `object_is_crowd`: what they
    match counts neither for nor against.
    """

    iou_type: str  # bbox or segm
    image_ids: np.ndarray  # [I], rising
    class_names: tuple[str, ...]  # K names, told apart by the category id where they are the same
    category_ids: tuple[int, ...]  # K ids, rising
    iou_thresholds: np.ndarray  # [T]
    scores: np.ndarray  # [N] float64
    labels: np.ndarray  # [N] position in class_names
    image_index: np.ndarray  # [N] position in image_ids
    result_index: np.ndarray  # [N] position in the results that were given
    matched: np.ndarray  # [T, N] object that the detection found, -1 for none
    object_labels: np.ndarray  # [M]
    object_image_index: np.ndarray  # [M]
    object_is_crowd: np.ndarray  # [M] bool
    object_entries: list[dict]  # M objects as COCO has them
    pairs: np.ndarray  # [P, 2] detection and object of one image, of any classes, no crowds
    pair_ious: np.ndarray  # [P] float64, all that are at least BACKGROUND_IOU

    @functools.cached_property
    def is_true(self) -> np.ndarray:
        """[T, N] found an object."""
        return (self.matched >= 0) & ~self.is_ignored

    @functools.cached_property
    def is_ignored(self) -> np.ndarray:
        """[T, N] lies in a crowd."""
        is_crowd = np.append(self.object_is_crowd, False)  # the last place is what -1 points to
        return is_crowd[self.matched]

    @functools.cached_property
    def is_false(self) -> np.ndarray:
        """[T, N] found nothing, or something that was found already."""
        return (self.matched < 0) & ~self.is_ignored

    @functools.cached_property
    def num_objects(self) -> np.ndarray:
        """[K] objects to find."""
        return np.bincount(self.object_labels[~self.object_is_crowd], minlength=len(self.class_names))

    @functools.cached_property
    def by_class(self) -> list[np.ndarray]:
        """The detections of each class, by falling score."""
        order = np.argsort(-self.scores, kind="stable")
        return [order[self.labels[order] == k] for k in range(len(self.class_names))]


def match_detections(
    ground_truth: dict,
    results: Sequence[dict],
    *,
    iou_type: str,
    max_detections: int,
    iou_thresholds: np.ndarray = IOU_THRESHOLDS,
) -> Matches:
    """Match COCO result entries with COCO ground truth by masks (`segm`) or boxes (`bbox`).

    COCO's rule: within an image and class, detections choose by falling score, each the free object that it overlaps
    most, at least by the threshold; a crowd can be chosen many times, and only where no object fits.
    `max_detections` counts per image and class. Raises ValueError for entries that do not fit the ground truth.
    """
    objects = truth_entries(ground_truth, iou_type)
    detections = result_entries(ground_truth, results, iou_type)
    names = class_names(ground_truth["categories"])
    category_ids = sorted(names)
    label_of = {category_id: k for k, category_id in enumerate(category_ids)}
    image_ids = np.unique([image["id"] for image in ground_truth["images"]])
    position = {image_id: i for i, image_id in enumerate(image_ids.tolist())}

    image_index = np.array([position[d["image_id"]] for d in detections], np.intp)
    scores = np.array([d["score"] for d in detections], np.float64)
    labels = np.array([label_of[d["category_id"]] for d in detections], np.intp)
    order = _keep_best(np.lexsort([-scores, image_index]), image_index, labels, max_detections)
    object_image_index = np.array([position[o["image_id"]] for o in objects], np.intp)
    object_labels = np.array([label_of[o["category_id"]] for o in objects], np.intp)
    is_crowd = np.array([bool(o["iscrowd"]) for o in objects], bool)

    key = "bbox" if iou_type == "bbox" else "segmentation"
    matched = np.full((len(iou_thresholds), len(order)), -1, np.intp)
    pairs, pair_ious = [np.zeros((0, 2), np.intp)], [np.zeros(0)]
    of_image = _positions_by_image(image_index[order], len(image_ids))
    objects_of_image = _positions_by_image(object_image_index, len(image_ids))
    for mine, theirs in zip(of_image, objects_of_image, strict=True):
        if not len(mine) or not len(theirs):
            continue
        ious = np.asarray(
            mask_api.iou(
                [detections[order[d]][key] for d in mine],
                [objects[o][key] for o in theirs],
                is_crowd[theirs].astype(np.uint8),
            )
        )
        row, column = np.nonzero((ious >= BACKGROUND_IOU) & ~is_crowd[theirs])
        pairs.append(np.stack([mine[row], theirs[column]], axis=1))
        pair_ious.append(ious[row, column])
        mine_labels = labels[order[mine]]
        for label in np.intersect1d(mine_labels, object_labels[theirs]):
            rows, columns = np.flatnonzero(mine_labels == label), np.flatnonzero(object_labels[theirs] == label)
            found = _match_class(ious[np.ix_(rows, columns)], is_crowd[theirs[columns]], iou_thresholds)
            matched[:, mine[rows]] = np.where(found >= 0, theirs[columns][found], -1)
    return Matches(
        iou_type=iou_type,
        image_ids=image_ids,
        class_names=tuple(names[i] for i in category_ids),
        category_ids=tuple(category_ids),
        iou_thresholds=np.asarray(iou_thresholds),
        scores=scores[order],
        labels=labels[order],
        image_index=image_index[order],
        result_index=order,
        matched=matched,
        object_labels=object_labels,
        object_image_index=object_image_index,
        object_is_crowd=is_crowd,
        object_entries=objects,
        pairs=np.concatenate(pairs),
        pair_ious=np.concatenate(pair_ious),
    )


def interpolated_precision(is_true: np.ndarray, is_false: np.ndarray, num_objects: float) -> np.ndarray:
    """Precision at the 101 recalls 0, 0.01 .. 1, as COCO interpolates it: [..., n] by falling score to [..., 101].

    The flags may be weights; 0 where a recall is not reached. `num_objects` must be above 0.
    """
    true, false = np.cumsum(is_true, axis=-1, dtype=np.float64), np.cumsum(is_false, axis=-1, dtype=np.float64)
    precision = true / (true + false + np.spacing(1))
    envelope = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1]
    envelope = np.concatenate([envelope, np.zeros((*envelope.shape[:-1], 1))], axis=-1)
    reached = np.apply_along_axis(np.searchsorted, -1, true / num_objects, RECALLS) if true.size else 0
    return np.take_along_axis(envelope, np.broadcast_to(reached, (*true.shape[:-1], len(RECALLS))), axis=-1)


def average_precision(matches: Matches, image_weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision [T, K] of each threshold and class, NaN for a class without objects.

    `image_weights` [I], whole numbers, counts each image that many times, as a bootstrap draws them. All classes are
    worked on at once: a bootstrap calls this thousands of times.
    """
    num_classes = len(matches.class_names)
    weights = np.ones(len(matches.image_ids), np.int64) if image_weights is None else np.asarray(image_weights)
    real = ~matches.object_is_crowd
    num_objects = np.zeros(num_classes, np.int64)
    np.add.at(num_objects, matches.object_labels[real], weights[matches.object_image_index[real]])
    has_objects = num_objects > 0
    # How many objects must be found to reach each recall, by the division that pycocotools makes; 0 is reached by
    # the first one as well as by none.
    needed = [np.searchsorted(np.arange(n + 1) / n, RECALLS, side="left") for n in num_objects[has_objects]]
    wanted = np.maximum(np.array(needed, np.int64).reshape(-1, len(RECALLS)), 1)

    order = np.concatenate([*matches.by_class, np.zeros(0, np.intp)])
    of_image = weights[matches.image_index[order]]
    result = np.full((len(matches.iou_thresholds), num_classes), np.nan)
    for t in range(len(matches.iou_thresholds)):
        # Interpolated precision and recall change at true detections alone.
        at = np.flatnonzero(matches.is_true[t, order] & (of_image > 0))
        label = matches.labels[order[at]]
        true = _cumulate(of_image[at], label)
        false = (
            np.cumsum(of_image * matches.is_false[t, order])[at] - _falses_before(matches, t, of_image, order)[label]
        )
        precision = true / (true + false + np.spacing(1))
        # The best precision from here to the end of the class: each class is lifted above those behind it.
        lift = 2.0 * (num_classes - label)
        envelope = np.maximum.accumulate((precision + lift)[::-1])[::-1] - lift
        span = int(num_objects.sum()) + 1  # keeps the counts of a class apart from those of the next
        keys = true + span * label
        queries = wanted + span * np.flatnonzero(has_objects)[:, None]
        reached = np.searchsorted(keys, queries, side="left")
        is_reached = np.append(label, -1)[reached] == np.flatnonzero(has_objects)[:, None]
        result[t, has_objects] = (np.append(envelope, 0.0)[reached] * is_reached).mean(axis=1)
    return result


def _cumulate(values: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Running sums within each label; labels stand together, in rising order."""
    total = np.cumsum(values)
    starts = np.flatnonzero(np.append(True, label[1:] != label[:-1])) if len(label) else np.zeros(0, np.intp)
    before = np.concatenate([[0], total])[starts]
    return total - np.repeat(before, np.diff(np.append(starts, len(label))))


def _falses_before(matches: Matches, t: int, of_image: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[K] false detections of all classes before each class."""
    counts = np.zeros(len(matches.class_names), np.int64)
    np.add.at(counts, matches.labels[order], of_image * matches.is_false[t, order])
    return np.cumsum(counts) - counts


def _keep_best(order: np.ndarray, image_index: np.ndarray, labels: np.ndarray, limit: int) -> np.ndarray:
    """The first `limit` of each image and class, of detections in `order`."""
    seen: collections.Counter[tuple[int, int]] = collections.Counter()
    kept = []
    for d in order.tolist():
        key = (image_index[d], labels[d])
        seen[key] += 1
        if seen[key] <= limit:
            kept.append(d)
    return np.array(kept, np.intp)


def _positions_by_image(image_index: np.ndarray, num_images: int) -> list[np.ndarray]:
    """Positions of the entries of each image, in their order."""
    order = np.argsort(image_index, kind="stable")
    return np.split(order, np.cumsum(np.bincount(image_index, minlength=num_images))[:-1]) if num_images else []


def _match_class(ious: np.ndarray, is_crowd: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Match detections [D] by falling score with objects [G] of their class: [T, D] object or -1."""
    found = np.full((len(thresholds), len(ious)), -1, np.intp)
    for t, threshold in enumerate(np.minimum(thresholds, 1 - 1e-10)):
        is_free = ~is_crowd
        for d in np.flatnonzero((ious >= threshold).any(axis=1)):
            fits = ious[d] >= threshold
            for candidates in (np.flatnonzero(fits & is_free), np.flatnonzero(fits & is_crowd)):
                if len(candidates):
                    # Of equal overlaps the last counts, as in pycocotools.
                    best = candidates[::-1][np.argmax(ious[d, candidates[::-1]])]
                    found[t, d] = best
                    is_free[best] = False
                    break
    return found
