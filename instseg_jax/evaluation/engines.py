"""The programs that match and count for COCO's metrics: pycocotools, and two faster ones where installed.

All give the arrays that pycocotools' `accumulate` gives. pycocotools is the reference and the default. faster-coco-eval
(C++, two maintainers, about thirty releases since 2023, used by torchmetrics and Ultralytics) and hotcoco (Rust, one
maintainer, first release in 2026) agree with it on the published example to 1e-12; a test holds them to it.
"""

import contextlib
import importlib
import io
from collections.abc import Sequence
from types import ModuleType

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instseg_jax.evaluation.boundary import mask_boundary
from instseg_jax.messages import quote

ENGINES = ("pycocotools", "faster-coco-eval", "hotcoco")
AREAS = ("all", "small", "medium", "large")


def count_matches(
    engine: str,
    dataset: dict,
    objects: list[dict],
    detections: list[dict],
    iou_type: str,
    detection_limits: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Match, count and accumulate: (precision [10, 101, K, 4, L], recall [10, K, 4, L]), -1 where undefined.

    Axes: IoU thresholds 0.5 .. 0.95, recalls 0 .. 1, classes by rising id, `AREAS`, `detection_limits`. Entries are
    those of `coco.truth_entries` and `coco.result_entries`. `iou_type` is bbox, segm, or boundary (pycocotools alone).
    Raises ValueError for an unknown engine, and for one that is not installed, with the extra that brings it.
    """
    if engine not in ENGINES:
        raise ValueError(f"The evaluation engine must be one of {', '.join(ENGINES)}, got {quote(engine)}.")
    limits = list(detection_limits)
    with contextlib.redirect_stdout(io.StringIO()):
        if engine == "faster-coco-eval" and iou_type != "boundary":
            library = _import(engine, "faster_coco_eval")
            pair = (_index(library.COCO, dataset, entries) for entries in (objects, detections))
            evaluation = library.COCOeval_faster(*pair, iou_type)
        elif engine == "hotcoco" and iou_type != "boundary" and detections:
            library = _import(engine, "hotcoco")
            truth = library.COCO(_plain(dataset) | {"annotations": [_with_text(entry) for entry in objects]})
            evaluation = library.COCOeval(truth, truth.loadRes([_with_text(entry) for entry in detections]), iou_type)
        else:
            pair = (_index(COCO, dataset, entries) for entries in (objects, detections))
            kind = _BoundaryEval if iou_type == "boundary" else COCOeval
            evaluation = kind(*pair, "segm" if iou_type == "boundary" else iou_type)
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


class _BoundaryEval(COCOeval):
    """Overlap of two masks: the smaller of their IoU and that of their boundaries (Cheng et al., CVPR 2021)."""

    def computeIoU(self, image_id: int, category_id: int) -> np.ndarray:
        whole = super().computeIoU(image_id, category_id)
        if not len(whole):
            return whole
        objects, detections = self._gts[image_id, category_id], self._dts[image_id, category_id]
        best = np.argsort([-d["score"] for d in detections], kind="mergesort")[: self.params.maxDets[-1]]
        # Where the masks themselves overlap too little for any threshold, their boundaries change nothing.
        rows, columns = np.nonzero(whole >= self.params.iouThrs[0])
        rows, columns = np.unique(rows), np.unique(columns)
        if len(rows):
            boundaries = mask_api.iou(
                [mask_boundary(detections[best[i]]["segmentation"]) for i in rows],
                [mask_boundary(objects[i]["segmentation"]) for i in columns],
                [objects[i]["iscrowd"] for i in columns],
            )
            chosen = np.ix_(rows, columns)
            whole[chosen] = np.minimum(whole[chosen], boundaries)
        return whole


def _import(engine: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"The evaluation engine {engine} is not installed; pip install 'instseg_jax[fast-eval]' installs it."
        ) from error


def _plain(dataset: dict) -> dict:
    return {"images": dataset["images"], "categories": dataset["categories"]}


def _index(kind: type, dataset: dict, annotations: list[dict]):
    """Make a library's COCO object of new annotations on the images and categories of a data set."""
    coco = kind()
    coco.dataset = _plain(dataset) | {"annotations": annotations}
    coco.createIndex()
    return coco


def _with_text(entry: dict) -> dict:
    """The entry with run lengths as text, as they come from JSON."""
    rle = entry.get("segmentation")
    if rle is None or isinstance(rle["counts"], str):
        return entry
    return entry | {"segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}}
