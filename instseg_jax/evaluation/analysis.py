"""Everything that explains one set of results, for masks or for boxes; the report shows it, JSON sums it up."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from instseg_jax.evaluation import curves
from instseg_jax.evaluation.boundary import Edges, measure_edges
from instseg_jax.evaluation.coco import result_entries
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
    edges: Edges | None  # of the matched masks; None for boxes, and where they were not wanted

    def summary(self) -> dict:
        """The numbers of the analysis as plain JSON values."""
        return {
            "AP50": self.errors.ap,
            "error_costs": self.errors.costs,
            "error_counts": self.errors.counts,
            "calibration_error": self.calibration.error,
            "best_f1": self.f1.best_f1,
            "thresholds": self.thresholds,
            "edges": None if self.edges is None else dataclasses.asdict(self.edges),
        }


def analyse(
    ground_truth: dict, results: Sequence[dict], *, iou_type: str, max_detections: int, with_edges: bool = False
) -> Analysis:
    """Match and analyse COCO result entries by masks (`segm`) or boxes (`bbox`); `with_edges`: those of masks too."""
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
        edges=_edges_of(ground_truth, results, matches) if with_edges and iou_type == "segm" else None,
    )


def _edges_of(ground_truth: dict, results: Sequence[dict], matches: Matches) -> Edges | None:
    """Edges of the detections that found an object at the lowest overlap."""
    found = np.flatnonzero(matches.is_true[0])
    entries = result_entries(ground_truth, [results[i] for i in matches.result_index[found]], "segm")
    objects = [matches.object_entries[i] for i in matches.matched[0, found]]
    pairs = zip(entries, objects, strict=True)
    return measure_edges((entry["segmentation"], object_["segmentation"]) for entry, object_ in pairs)
