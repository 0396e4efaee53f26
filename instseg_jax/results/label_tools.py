"""Results for tools in which people correct them: Label Studio's tasks with predictions, CVAT's XML ("for images 1.1").

One file holds all pictures. An object of one part without holes is a polygon, which is easy to correct; any other is a
mask (Label Studio's brush, CVAT's mask), so that holes stay open and parts stay one object.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from instseg_jax.brush_rle import encode_brush
from instseg_jax.crops import crop_rle
from instseg_jax.files import written_aside
from instseg_jax.masks import decode_rle, rle_area, rle_box_xyxy_px
from instseg_jax.outlines import rle_to_polygons
from instseg_jax.results.result import Result

FILES = {"label_studio": "label_studio.json", "cvat": "cvat.xml"}
TOLERANCE_PX = 1.0  # of polygons, as of LabelMe's
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class LabelFile:
    """A file of one of FILES that grows and gets its name when it is complete."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._make: Callable[[Result, int], str] = {"label_studio": _task, "cvat": _cvat_image}[kind]
        self._kind, self._path, self._count = kind, folder / FILES[kind], 0

    def __enter__(self) -> "LabelFile":
        self._aside = written_aside(self._path)
        self._file = self._aside.__enter__().open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def add(self, result: Result) -> None:
        """Append a picture and its instances."""
        if self._kind == "label_studio":
            self._file.write("[\n" if not self._count else ",\n")
        elif not self._count:
            self._file.write(_cvat_head(result))
        self._file.write(self._make(result, self._count))
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._kind == "label_studio":
            self._file.write("\n]\n" if self._count else "[]\n")
        elif kind is None:
            self._file.write("</annotations>\n" if self._count else "<annotations>\n</annotations>\n")
        self._file.close()
        self._aside.__exit__(kind, error, trace)


def _task(result: Result, number: int) -> str:
    """A task of Label Studio with the picture as a local file, and what was found as its prediction."""
    height, width = result.size
    regions = []
    for i, (box, mask) in enumerate(zip(result.boxes, result.masks, strict=True)):
        if not rle_area(mask):
            continue
        outline = _simple_outline(mask)
        kind = "brush" if outline is None else "polygon"
        value: dict = {f"{kind}labels": [box["label"]]}
        if outline is None:
            value |= {"format": "rle", "rle": encode_brush(decode_rle(mask))}
        else:
            value |= {"points": (outline * (100 / width, 100 / height)).tolist(), "closed": True}
        shared = {"original_width": width, "original_height": height, "image_rotation": 0, "score": box["score"]}
        named = {"id": f"{number}-{i}", "type": f"{kind}labels", "from_name": kind, "to_name": "image"}
        regions.append(named | shared | {"value": value})
    scores = [region["score"] for region in regions]
    prediction = {"model_version": "instseg_jax", "score": min(scores, default=0.0), "result": regions}
    task = {"data": {"image": f"/data/local-files/?d={quote(result.name)}"}, "predictions": [prediction]}
    return json.dumps(task, ensure_ascii=False)


def label_studio_config(class_names: tuple[str, ...]) -> str:
    """The labelling interface that the tasks need: a picture, a brush and a polygon with the classes."""
    labels = "".join(f"    <Label value={_attribute(name)}/>\n" for name in class_names)
    tools = "".join(
        f'  <{kind}Labels name="{kind.lower()}" toName="image">\n{labels}  </{kind}Labels>\n'
        for kind in ("Polygon", "Brush")
    )
    return f'<View>\n  <Image name="image" value="$image"/>\n{tools}</View>\n'


def _cvat_head(result: Result) -> str:
    labels = "".join(f"<label><name>{_attribute(name)[1:-1]}</name></label>" for name in result.class_names)
    meta = f"<meta><task><mode>annotation</mode><labels>{labels}</labels></task></meta>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n{meta}\n'


def _cvat_image(result: Result, number: int) -> str:
    height, width = result.size
    lines = [f'<image id="{number}" name={_attribute(result.name)} width="{width}" height="{height}">']
    for box, mask in zip(result.boxes, result.masks, strict=True):
        if not rle_area(mask):
            continue
        shared = f'label={_attribute(box["label"])} source="auto" occluded="0" z_order="0"'
        outline = _simple_outline(mask)
        if outline is not None:
            points = ";".join(f"{x:.2f},{y:.2f}" for x, y in outline.tolist())
            lines.append(f'  <polygon {shared} points="{points}"/>')
            continue
        x1, y1, x2, y2 = rle_box_xyxy_px(mask)
        runs = ", ".join(map(str, _row_runs(crop_rle(mask, (x1, y1, x2, y2)))))
        place = f'left="{x1}" top="{y1}" width="{x2 - x1}" height="{y2 - y1}"'
        lines.append(f'  <mask {shared} rle="{runs}" {place}/>')
    return "\n".join([*lines, "</image>\n"])


def _simple_outline(mask: dict) -> np.ndarray | None:
    """The ring [P, 2] of an object of one part without holes; None for any other."""
    exact = rle_to_polygons(mask)
    if len(exact) != 1 or exact[0].holes:
        return None
    return rle_to_polygons(mask, tolerance=TOLERANCE_PX)[0].outer


def _row_runs(mask: np.ndarray) -> list[int]:
    """Lengths of runs, row after row, of what is not drawn and what is in turns."""
    flat = np.concatenate([[False], np.asarray(mask).ravel() != 0])
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], changes, [flat.size - 1]])).tolist()


def _attribute(text: str) -> str:
    return quoteattr(NOT_IN_XML.sub("", text), {'"': "&quot;"})
