"""Curves of a set of matches at one overlap threshold: precision and recall, F1, calibration, confusion.

All work on `matching.Matches`; drawing them is `report`.
"""

import dataclasses

import numpy as np

from instseg_jax.evaluation.matching import Matches, interpolated_precision

NUM_BINS = 10  # of scores, in the calibration


@dataclasses.dataclass(frozen=True)
class F1Curve:
    """Precision, recall and F1 of keeping the detections with at least a score, for one class or all together."""

    scores: np.ndarray  # [n] falling, distinct
    precision: np.ndarray  # [n]
    recall: np.ndarray  # [n]
    f1: np.ndarray  # [n]
    best_threshold: float | None  # None without objects or detections
    best_f1: float | None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How often detections of a score are right, in bins of equal width."""

    edges: np.ndarray  # [bins + 1]
    counts: np.ndarray  # [bins] detections
    scores: np.ndarray  # [bins] mean score, NaN for an empty bin
    precision: np.ndarray  # [bins] share of true detections, NaN for an empty bin
    error: float | None  # mean distance of score and precision over the detections; None without any


def precision_recall(matches: Matches, threshold: int) -> np.ndarray:
    """Interpolated precision [K, 101] at the recalls 0, 0.01 .. 1, NaN for classes without objects."""
    rows = np.full((len(matches.class_names), 101), np.nan)
    for k, chosen in enumerate(matches.by_class):
        if matches.num_objects[k]:
            flags = matches.is_true[threshold, chosen], matches.is_false[threshold, chosen]
            rows[k] = interpolated_precision(*flags, matches.num_objects[k])
    return rows


def f1_curve(matches: Matches, threshold: int, label: int | None = None) -> F1Curve:
    """F1 against the score from which detections are kept; of one class, or pooled over all for None.

    The best threshold lies halfway between the last score that it keeps and the first that it leaves out, the
    highest of equally good ones; detections count from the threshold on.
    """
    if label is None:
        chosen, num_objects = np.argsort(-matches.scores, kind="stable"), int(matches.num_objects.sum())
    else:
        chosen, num_objects = matches.by_class[label], int(matches.num_objects[label])
    chosen = chosen[~matches.is_ignored[threshold, chosen]]
    scores = matches.scores[chosen]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.intp)
    true = np.cumsum(matches.is_true[threshold, chosen])[last]
    kept = last + 1
    # With nothing to find there is no recall; 0 keeps the curve drawable.
    recall = true / num_objects if num_objects else np.zeros(len(last))
    f1 = 2 * true / (kept + num_objects) if len(last) else np.zeros(0)
    distinct = scores[last]
    if not num_objects or not len(last) or not true.any():
        return F1Curve(distinct, true / kept, recall, f1, None, None)
    best = int(np.argmax(f1))
    below = distinct[best + 1] if best + 1 < len(distinct) else 0.0
    return F1Curve(distinct, true / kept, recall, f1, float((distinct[best] + below) / 2), float(f1[best]))


def best_thresholds(matches: Matches) -> dict | None:
    """The score thresholds with the best F1 at IoU 0.5: {"overall": score, "classes": {name: score}}, or None.

    Classes of which nothing was found have none: the overall one serves them.
    """
    overall = f1_curve(matches, 0).best_threshold
    if overall is None:
        return None
    of_classes = {name: f1_curve(matches, 0, k).best_threshold for k, name in enumerate(matches.class_names)}
    return {"overall": overall, "classes": {name: score for name, score in of_classes.items() if score is not None}}


def calibration(matches: Matches, threshold: int, *, num_bins: int = NUM_BINS) -> Calibration:
    """Compare scores with the share of true detections at one overlap threshold."""
    counted = ~matches.is_ignored[threshold]
    scores, is_true = matches.scores[counted], matches.is_true[threshold, counted]
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.clip(np.ceil(scores * num_bins).astype(np.intp) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    divisor = np.where(counts, counts, np.nan)
    mean_scores = np.bincount(bins, scores, num_bins) / divisor
    precision = np.bincount(bins, is_true, num_bins) / divisor
    error = np.nansum(counts * np.abs(mean_scores - precision)) / len(scores) if len(scores) else None
    return Calibration(edges, counts, mean_scores, precision, None if error is None else float(error))


def confusion_matrix(matches: Matches, *, score_threshold: float, iou: float = 0.5) -> np.ndarray:
    """Count [K + 1, K + 1] which class (row) was detected as which (column); the last of both is background.

    Detections from `score_threshold` on are paired with objects of any class, the largest overlaps first, each once.
    What is left over is missed (last column) or a false alarm (last row). Crowds, and detections in them, are left out.
    """
    num_classes = len(matches.class_names)
    table = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    counted = (matches.scores >= score_threshold) & ~matches.is_ignored[0]
    chosen = np.flatnonzero(counted[matches.pairs[:, 0]] & (matches.pair_ious >= iou))
    is_free, is_unfound = counted.copy(), ~matches.object_is_crowd
    # Equal overlaps: the right class first, so that two objects in one place are no confusion.
    detection, obj = matches.pairs[chosen].T
    is_other = matches.labels[detection] != matches.object_labels[obj]
    for d, o in matches.pairs[chosen[np.lexsort([is_other, -matches.pair_ious[chosen]])]]:
        if is_free[d] and is_unfound[o]:
            is_free[d] = is_unfound[o] = False
            table[matches.object_labels[o], matches.labels[d]] += 1
    table[:-1, -1] = np.bincount(matches.object_labels[is_unfound], minlength=num_classes)
    table[-1, :-1] = np.bincount(matches.labels[is_free], minlength=num_classes)
    return table
