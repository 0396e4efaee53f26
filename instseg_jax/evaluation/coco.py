"""COCO detection metrics: detections to result entries, result entries to named numbers.

Ground truth is a plain COCO dict in memory (or a pycocotools COCO); nothing passed in is changed. The counting is
`engines`; matches, curves, error split and report are files of their own.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from instseg_jax.evaluation.engines import AREAS, count_matches
from instseg_jax.evaluation.processes import local_rows
from instseg_jax.files import write_json
from instseg_jax.inference.postprocess import detections_to_instances
from instseg_jax.masks import rle_area, segmentation_to_rle
from instseg_jax.messages import quote
from instseg_jax.types import Batch, Detections

IOU_TYPES = ("bbox", "segm")
RESULT = "evaluate_result.json"
MAX_DETECTIONS = 100  # of a class in an image, as COCO counts them


def coco_results(
    detections: Detections,
    batch: Batch,
    dataset_image_ids: Sequence[int],
    category_ids: Sequence[int | None],
) -> list[dict]:
    """Turn the detections of a batch into COCO result entries, without a score threshold.

    `dataset_image_ids[i]` is the COCO id of the i-th image of the data set (`batch.image_index`),
    `category_ids[k]` that of class index k, None for a class to leave out. Images that only pad the batch are
    skipped. Entries hold image_id, category_id, bbox (x, y, width, height in pixels of the original image, not
    clipped), score and segmentation (RLE of the original size). Raises ValueError for a class without a category id.
    """
    results = []
    for i in np.flatnonzero(np.asarray(batch.image_valid)):
        instances = detections_to_instances(
            detections,
            int(i),
            input_size=np.shape(batch.images)[1:3],
            content_size=tuple(np.asarray(batch.content_sizes)[i].tolist()),
            original_size=tuple(np.asarray(batch.original_sizes)[i].tolist()),
        )
        image_id = int(dataset_image_ids[int(np.asarray(batch.image_index)[i])])
        corners = instances.boxes_xyxy_px.astype(np.float64)
        boxes_xywh_px = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
        for score, label, bbox, rle in zip(
            instances.scores, instances.labels, boxes_xywh_px, instances.masks, strict=True
        ):
            if not 0 <= label < len(category_ids):
                raise ValueError(f"Class index {label} has no category id: only {len(category_ids)} are given.")
            category_id = category_ids[label]
            if category_id is None:
                continue
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(category_id),
                    "bbox": bbox,
                    "score": float(score),
                    "segmentation": rle,
                }
            )
    return results


def coco_metrics(
    ground_truth: dict | COCO,
    results: Sequence[dict],
    *,
    iou_types: Sequence[str] = IOU_TYPES,
    max_detections: int | None = None,
    engine: str = "pycocotools",
) -> dict[str, float | None]:
    """Score COCO result entries against COCO ground truth, over all its images.

    Returns, for `segm` and `bbox` (and `boundary`, where asked for), `segm/AP` (IoU 0.50:0.95), `AP50`, `AP75`,
    `AP_small`, `AP_medium`, `AP_large`, `AR_1`, `AR_10`, `AR_100`, `AR_small`, `AR_medium`, `AR_large` and
    `AP/<class name>` for each class, in 0..1; and `AP`, which is `segm/AP`. None where there is no ground truth to
    find. `max_detections` counts per image and class, as COCO does (None: `detection_limit`); another one than 100
    stands in the names as well.

    Areas of results are those of the mask for `segm` and of the box for `bbox`. Raises ValueError for entries
    that do not fit the ground truth.
    """
    known = (*IOU_TYPES, "boundary")
    if not iou_types or any(iou_type not in known for iou_type in iou_types):
        raise ValueError(f"iou_types must be some of {', '.join(known)}, got {quote(iou_types)}.")
    dataset = ground_truth.dataset if isinstance(ground_truth, COCO) else ground_truth
    if max_detections is None:
        max_detections = detection_limit(dataset)
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}.")
    scores = {iou_type: _evaluate(dataset, results, iou_type, max_detections, engine) for iou_type in iou_types}
    metrics = {"AP": scores["segm"]["AP"]} if "segm" in scores else {}
    return metrics | {
        f"{iou_type}/{name}": value for iou_type, named in scores.items() for name, value in named.items()
    }


def detection_limit(ground_truth: dict) -> int:
    """How many detections of a class in an image count, by score: COCO's 100, or as many as there are objects.

    It follows from the ground truth alone, so that a results file has one AP whoever scores it, and the one that
    pycocotools gives it wherever no image has more than 100 objects of a class.
    """
    objects = Counter((entry["image_id"], entry["category_id"]) for entry in ground_truth.get("annotations", ()))
    return max(MAX_DETECTIONS, *objects.values()) if objects else MAX_DETECTIONS


def collect_results(
    pairs: Iterable[tuple[Detections, Batch]], *, image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> list[dict]:
    """Turn detections, as they come, into COCO result entries; see `coco_results`.

    A pair is asked for before the one before it is encoded, so that a device works on it meanwhile. Of several
    processes each gets the results of its own part of the batches; `processes.gather_results` brings them together.
    """

    def encode(detections: Detections, batch: Batch) -> list[dict]:
        return coco_results(local_rows(detections), batch, image_ids, category_ids)

    results: list[dict] = []
    pending = None
    for pair in pairs:
        if pending is not None:
            results += encode(*pending)
        pending = pair
    if pending is not None:
        results += encode(*pending)
    return results


def write_evaluation(
    output_dir: str | Path, metrics: dict[str, float | None], results: Sequence[dict], **more: Any
) -> None:
    """Write `evaluate_result.json` (metrics, and `more` beside them) and `predictions.json` (COCO result entries)."""
    remove_result(output_dir)
    write_json(Path(output_dir) / "predictions.json", list(results))
    # Last, since its presence says that the evaluation is complete.
    write_json(Path(output_dir) / RESULT, {"done_flag": True, "metrics": metrics, **more}, indent=4)


def remove_result(output_dir: str | Path) -> None:
    """Take `evaluate_result.json` of an earlier evaluation away, before the first file is replaced that it is about."""
    (Path(output_dir) / RESULT).unlink(missing_ok=True)


def _evaluate(
    dataset: dict, results: Sequence[dict], iou_type: str, max_detections: int, engine: str
) -> dict[str, float | None]:
    """Have the engine count, and name the numbers."""
    objects, detections = truth_entries(dataset, iou_type), result_entries(dataset, results, iou_type)
    limits = sorted({min(limit, max_detections) for limit in (1, 10, max_detections)})
    precision, recall = count_matches(engine, dataset, objects, detections, iou_type, limits)
    # The numbers of `summarize()`, which only knows a limit of 100, are means of these arrays.
    area = {name: i for i, name in enumerate(AREAS)}
    named = {
        "AP": _mean(precision[:, :, :, area["all"], -1]),
        "AP50": _mean(precision[0, :, :, area["all"], -1]),
        "AP75": _mean(precision[5, :, :, area["all"], -1]),
    }
    named |= {f"AP_{size}": _mean(precision[:, :, :, area[size], -1]) for size in ("small", "medium", "large")}
    named |= {f"AR_{limit}": _mean(recall[:, :, area["all"], i]) for i, limit in enumerate(limits)}
    named |= {f"AR_{size}": _mean(recall[:, :, area[size], -1]) for size in ("small", "medium", "large")}
    names = class_names(dataset["categories"])
    named |= {f"AP/{names[id_]}": _mean(precision[:, :, k, area["all"], -1]) for k, id_ in enumerate(sorted(names))}
    return named


def _mean(values: np.ndarray) -> float | None:
    """Mean of the entries that are defined (not -1), None without any."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def class_names(categories: Sequence[dict]) -> dict[int, str]:
    """Name by category id; classes that share a name get their id behind it."""
    names = [category.get("name", str(category["id"])) for category in categories]
    return {
        category["id"]: name if names.count(name) == 1 else f"{name} ({category['id']})"
        for category, name in zip(categories, names, strict=True)
    }


def truth_entries(dataset: dict, iou_type: str) -> list[dict]:
    """Copy the ground truth with what pycocotools relies on: area, iscrowd, and ids from 1 (0 is its 'no match').

    Entries hold, by `iou_type`, bbox (x, y, width, height in pixels) or segmentation (RLE, counts as bytes). Raises
    ValueError that names the annotation which lacks its image or what is scored.
    """
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in dataset["images"]}
    entries = []
    for number, annotation in enumerate(dataset.get("annotations", ()), start=1):
        image_id, where = annotation["image_id"], f"Annotation {quote(annotation.get('id', number))}"
        if image_id not in sizes:
            raise ValueError(f"{where} belongs to image {quote(image_id)}, which is not in the data set.")
        entry = {
            "id": number,
            "image_id": image_id,
            "category_id": annotation["category_id"],
            "iscrowd": int(annotation.get("iscrowd", 0)),
        }
        if iou_type == "bbox":
            entry["bbox"] = annotation.get("bbox")
            if entry["bbox"] is None or len(entry["bbox"]) != 4:
                raise ValueError(f"{where} needs a bbox [x, y, width, height], got {quote(entry['bbox'])}.")
            entry["area"] = annotation.get("area", entry["bbox"][2] * entry["bbox"][3])
        else:
            entry["segmentation"] = _to_rle(annotation.get("segmentation"), sizes[image_id], where)
            entry["area"] = annotation.get("area", rle_area(entry["segmentation"]))
        entries.append(entry)
    return entries


def _to_rle(segmentation: Any, size: tuple[int, int], where: str) -> dict:
    """Bring a COCO segmentation (polygons, or RLE with a list or a string) to a compressed RLE."""
    if None in size:
        raise ValueError(f"{where} needs the height and width of its image, which the data set lacks.")
    try:
        if isinstance(segmentation, Sequence):
            segmentation = tuple(np.reshape(polygon, (-1, 2)) for polygon in segmentation)
        elif not isinstance(segmentation, dict):
            raise ValueError(f"A segmentation must be polygons or an RLE, got {quote(segmentation)}.")
        return segmentation_to_rle(segmentation, *size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def result_entries(dataset: dict, results: Sequence[dict], iou_type: str) -> list[dict]:
    """Copy the results with what pycocotools relies on, of the kind that is evaluated only; see `truth_entries`.

    Raises ValueError that names the result which lacks something, or belongs to no image or class of `dataset`.
    """
    key = "bbox" if iou_type == "bbox" else "segmentation"
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in dataset["images"]}
    category_ids = {category["id"] for category in dataset["categories"]}
    entries = []
    for number, result in enumerate(results, start=1):
        missing = [name for name in ("image_id", "category_id", "score", key) if name not in result]
        if missing:
            raise ValueError(f"Result {number} lacks {', '.join(missing)}.")
        if result["image_id"] not in sizes:
            raise ValueError(
                f"Result {number} has image_id {quote(result['image_id'])}, which is not in the ground truth."
            )
        if result["category_id"] not in category_ids:
            raise ValueError(
                f"Result {number} has category_id {quote(result['category_id'])}, "
                f"but the ground truth has {quote(sorted(category_ids))}: are these class indices?"
            )
        if not math.isfinite(result["score"]):
            raise ValueError(f"Result {number} has score {quote(result['score'])}, which must be finite.")
        entry = {name: result[name] for name in ("image_id", "category_id", "score", key)}
        is_compressed = isinstance(entry[key], dict) and not isinstance(entry[key].get("counts"), list)
        if iou_type != "bbox" and not is_compressed:
            entry[key] = _to_rle(entry[key], sizes[entry["image_id"]], f"Result {number}")
        # pycocotools takes masks of unequal sizes for disjoint, without a word.
        if iou_type != "bbox" and tuple(entry[key]["size"]) != sizes[entry["image_id"]]:
            raise ValueError(
                f"Result {number} has a mask of size {quote(entry[key]['size'])}, "
                f"but image {entry['image_id']} is {list(sizes[entry['image_id']])} (height, width)."
            )
        # The area decides which results count for small, medium and large objects when they match nothing.
        area = result["bbox"][2] * result["bbox"][3] if iou_type == "bbox" else rle_area(entry[key])
        entries.append(entry | {"id": number, "area": area, "iscrowd": 0})
    return entries
