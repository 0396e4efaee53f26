"""What each kind of error costs, in points of AP: the split of TIDE (Bolya et al., ECCV 2020), on masks or boxes.

A false detection has one kind, by what it overlaps most; an object that no correction of a detection would find is
missed. The cost of a kind is what AP at the first overlap threshold (0.5) gains when its errors alone are corrected.

Differences from the tool `tidecv`: crowds follow COCO, and AP is averaged over the classes that have objects.
"""

import dataclasses

import numpy as np

from instseg_jax.evaluation.matching import BACKGROUND_IOU, Matches, interpolated_precision

DETECTION_KINDS = ("classification", "localisation", "both", "duplicate", "background")
KINDS = (*DETECTION_KINDS, "missed")
DESCRIPTIONS = {
    "classification": "right place, wrong class",
    "localisation": "right class, overlap between 0.1 and 0.5",
    "both": "wrong class and overlap between 0.1 and 0.5",
    "duplicate": "an object that a better scored detection found",
    "background": "no object overlaps by 0.1",
    "missed": "object that no detection comes near",
}


@dataclasses.dataclass(frozen=True)
class ErrorSplit:
    """The kind of every false detection and the cost of every kind."""

    ap: float | None  # AP at IoU 0.5 as it is, 0..1; None without objects
    costs: dict[str, float | None]  # AP gained by correcting one kind; and all false positives, all false negatives
    counts: dict[str, int]
    kinds: np.ndarray  # [N] index into DETECTION_KINDS, -1 for detections that are true or ignored
    nearest: np.ndarray  # [N] the object that an error is about, -1 for none
    missed: np.ndarray  # [M] bool
    not_found: np.ndarray  # [M] bool, the missed ones and those that a false detection nearly found


def split_errors(matches: Matches) -> ErrorSplit:
    """Split the errors at the first threshold of `matches`, which should be 0.5."""
    same, same_object = _largest_overlap(matches, is_same_class=True)
    other, other_object = _largest_overlap(matches, is_same_class=False)
    threshold = float(matches.iou_thresholds[0])
    conditions = {
        "localisation": (same >= BACKGROUND_IOU) & (same <= threshold),
        "classification": other >= threshold,
        "duplicate": same >= threshold,
        "background": np.maximum(same, other) <= BACKGROUND_IOU,
    }
    order = [DETECTION_KINDS.index(kind) for kind in conditions]
    kinds = np.select(list(conditions.values()), order, DETECTION_KINDS.index("both"))
    kinds = np.where(matches.is_false[0], kinds, -1)
    is_wrong_class, is_misplaced = (kinds == DETECTION_KINDS.index(k) for k in ("classification", "localisation"))
    is_duplicate = kinds == DETECTION_KINDS.index("duplicate")
    nearest = np.where(is_wrong_class | (kinds == DETECTION_KINDS.index("both")), other_object, -1)
    nearest = np.where(is_misplaced | is_duplicate, same_object, nearest)

    found = matches.matched[0]
    not_found = ~matches.object_is_crowd
    not_found[found[found >= 0]] = False
    # Correcting a detection makes it find its object, unless another one has it already: then it only goes away.
    correctable = np.flatnonzero(is_wrong_class | is_misplaced)
    correctable = correctable[not_found[nearest[correctable]]]
    correctable = correctable[np.argsort(-matches.scores[correctable], kind="stable")]
    _, first = np.unique(nearest[correctable], return_index=True)
    becomes_true = np.zeros(len(kinds), bool)
    becomes_true[correctable[first]] = True
    missed = not_found.copy()
    missed[nearest[correctable]] = False

    ap, costs = _costs(matches, kinds, nearest, becomes_true, missed)
    counts = {kind: int((kinds == i).sum()) for i, kind in enumerate(DETECTION_KINDS)}
    return ErrorSplit(ap, costs, counts | {"missed": int(missed.sum())}, kinds, nearest, missed, not_found)


def _costs(
    matches: Matches, kinds: np.ndarray, nearest: np.ndarray, becomes_true: np.ndarray, missed: np.ndarray
) -> tuple[float | None, dict[str, float | None]]:
    """AP as it is, and what it gains by each correction."""
    is_true, is_false = matches.is_true[0], matches.is_false[0]
    num_objects = matches.num_objects
    if not num_objects.any():
        return None, dict.fromkeys((*KINDS, "false_positives", "false_negatives"))
    has_objects = num_objects > 0
    ap = _mean_ap(matches, matches.labels, is_true, is_false, num_objects, has_objects)
    corrected = {}
    for i, kind in enumerate(DETECTION_KINDS):
        is_kind = kinds == i
        labels = matches.labels
        if kind == "classification" and is_kind.any():
            labels = np.where(is_kind & becomes_true, matches.object_labels[nearest], labels)
        corrected[kind] = _mean_ap(
            matches, labels, is_true | (is_kind & becomes_true), is_false & ~is_kind, num_objects, has_objects
        )
    num_missed = np.bincount(matches.object_labels[missed], minlength=len(num_objects))
    found = np.bincount(matches.labels[is_true], minlength=len(num_objects))
    none = np.zeros_like(is_false)
    corrected["missed"] = _mean_ap(matches, matches.labels, is_true, is_false, num_objects - num_missed, has_objects)
    corrected["false_positives"] = _mean_ap(matches, matches.labels, is_true, none, num_objects, has_objects)
    corrected["false_negatives"] = _mean_ap(matches, matches.labels, is_true, is_false, found, has_objects)
    # A correction can lower interpolated AP by a hair, where recall moves from one of its 101 steps to the next.
    return ap, {kind: max(0.0, value - ap) for kind, value in corrected.items()}


def _mean_ap(
    matches: Matches,
    labels: np.ndarray,
    is_true: np.ndarray,
    is_false: np.ndarray,
    num_objects: np.ndarray,
    has_objects: np.ndarray,
) -> float:
    """Mean AP over the classes `has_objects` [K].

    One of which `num_objects` [K] leaves nothing to find counts as 0 with detections and not at all without; a data
    set that this leaves without classes as 1.
    """
    order = np.argsort(-matches.scores, kind="stable")
    aps = []
    for k in np.flatnonzero(has_objects):
        chosen = order[labels[order] == k]
        if num_objects[k] > 0:
            aps.append(interpolated_precision(is_true[chosen], is_false[chosen], num_objects[k]).mean())
        elif len(chosen):
            aps.append(0.0)
    return float(np.mean(aps)) if aps else 1.0


def _largest_overlap(matches: Matches, *, is_same_class: bool) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU [N] of each detection with an object of its class, or of another one, and that object."""
    detection, obj = matches.pairs.T
    chosen = np.flatnonzero((matches.labels[detection] == matches.object_labels[obj]) == is_same_class)
    chosen = chosen[np.lexsort([obj[chosen], -matches.pair_ious[chosen], detection[chosen]])]
    detections, first = np.unique(detection[chosen], return_index=True)
    overlap, of_object = np.zeros(len(matches.scores)), np.full(len(matches.scores), -1, np.intp)
    overlap[detections] = matches.pair_ious[chosen[first]]
    of_object[detections] = obj[chosen[first]]
    return overlap, of_object
