"""Everything that explains one set of results, for masks or for boxes; the report shows it, JSON sums it up."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instseg_jax.evaluation import curves
from instseg_jax.evaluation.errors import ErrorSplit, split_errors
from instseg_jax.evaluation.matching import Matches, match_detections

SHOWN_IOUS = (0.5, 0.75, 0.9)  # overlap thresholds whose precision-recall curves are shown


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Matches of one kind (segm or bbox) with all that is computed from them; at IoU 0.5 where nothing is said."""

    matches: Matches
    precision_recall: dict[float, np.ndarray]  # IoU -> [K, 101]
    f1: curves.F1Curve  # all classes together
    class_f1: tuple[curves.F1Curve, ...]
    thresholds: dict | None  # of scores, with the best F1: {"overall": score, "classes": {name: score}}
    errors: ErrorSplit
    calibration: curves.Calibration
    confusion: np.ndarray  # [K + 1, K + 1], at the overall threshold

    def summary(self) -> dict:
        """The numbers of the analysis as plain JSON values."""
        return {
            "AP50": self.errors.ap,
            "error_costs": self.errors.costs,
            "error_counts": self.errors.counts,
            "calibration_error": self.calibration.error,
            "best_f1": self.f1.best_f1,
            "thresholds": self.thresholds,
        }


def analyse(ground_truth: dict, results: Sequence[dict], *, iou_type: str, max_detections: int) -> Analysis:
    """Match and analyse COCO result entries by masks (`segm`) or boxes (`bbox`)."""
    matches = match_detections(ground_truth, results, iou_type=iou_type, max_detections=max_detections)
    thresholds = curves.best_thresholds(matches)
    position = {iou: int(np.argmin(np.abs(matches.iou_thresholds - iou))) for iou in SHOWN_IOUS}
    return Analysis(
        matches=matches,
        precision_recall={iou: curves.precision_recall(matches, t) for iou, t in position.items()},
        f1=curves.f1_curve(matches, 0),
        class_f1=tuple(curves.f1_curve(matches, 0, k) for k in range(len(matches.class_names))),
        thresholds=thresholds,
        errors=split_errors(matches),
        calibration=curves.calibration(matches, 0),
        confusion=curves.confusion_matrix(matches, score_threshold=thresholds["overall"] if thresholds else 0.0),
    )
