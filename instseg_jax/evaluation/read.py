"""Reading a COCO truth file and a COCO results file that come from anywhere, with what is wrong said in a sentence."""

from pathlib import Path
from typing import Any

from instseg_jax.files import parse_json, read_regular
from instseg_jax.masks import check_rle, compress_rle
from instseg_jax.messages import quote


def read_truth(path: str | Path) -> dict[str, Any]:
    """Read COCO ground truth: a JSON object with images, annotations and categories.

    Raises FileNotFoundError or ValueError that names the file. What an annotation needs depends on what is scored:
    `coco.truth_entries` looks at that.
    """
    truth = _read_json(path)
    lists = {
        name: truth.get(name) if isinstance(truth, dict) else None for name in ("images", "annotations", "categories")
    }
    missing = [name for name, value in lists.items() if not isinstance(value, list)]
    if missing:
        raise ValueError(f"{path} is no COCO ground truth: it lacks the list {quote(missing[0])}.")
    for name in ("images", "categories"):
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in lists[name] or ()]
        if any(not isinstance(i, int | str) for i in ids) or len(set(ids)) != len(ids):
            raise ValueError(f"The {name} of {path} must have ids, each its own.")
    for number, annotation in enumerate(lists["annotations"] or (), start=1):
        for name in ("image_id", "category_id"):
            if not isinstance(annotation, dict) or name not in annotation:
                raise ValueError(f"Annotation number {number} of {path} lacks {name}.")
    return truth


def read_results(path: str | Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Read COCO result entries, and say what they hold: masks ("segm"), boxes ("bbox"), or both.

    Masks may be RLEs or polygons. Raises FileNotFoundError or ValueError that names the file and the entry.
    """
    results = _read_json(path)
    if not isinstance(results, list) or not all(isinstance(entry, dict) for entry in results):
        raise ValueError(f"{path} must hold a list of COCO result entries.")
    for number, entry in enumerate(results, start=1):
        where = f"Result {number} of {path}"
        score, box, mask = entry.get("score"), entry.get("bbox"), entry.get("segmentation")
        if not isinstance(score, int | float) or isinstance(score, bool):
            raise ValueError(f"{where} needs a score, got {quote(score)}.")
        if box is not None and not _is_box(box):
            raise ValueError(f"{where} has the bbox {quote(box)}, which must be [x, y, width, height].")
        if isinstance(mask, dict):
            try:
                check_rle(compress_rle(mask))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    keys = {"segm": "segmentation", "bbox": "bbox"}
    held = tuple(kind for kind, key in keys.items() if all(entry.get(key) is not None for entry in results))
    if not held:
        raise ValueError(f"Neither all results of {path} have a segmentation nor all a bbox.")
    return results, held


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)


def _read_json(path: str | Path) -> Any:
    try:
        return parse_json(read_regular(path), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
