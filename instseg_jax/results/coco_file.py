"""A COCO data set of results, written as they come: images, annotations (with score) and categories, ids from 1.

Boxes are those of the masks, as in ground truth. Categories have the ids of the data that the model learned from.
"""

import json
from pathlib import Path
from types import TracebackType

from instseg_jax.files import written_aside
from instseg_jax.results.formats import COCO_HEAD, coco_annotation, coco_categories, coco_entries, coco_image
from instseg_jax.results.large import LargeResult
from instseg_jax.results.result import Result


class CocoFile:
    """A file that grows and gets its name when it is complete. Its images wait in a second file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._number = self._images = 0
        self._categories: dict[int, str] = {}

    def __enter__(self) -> "CocoFile":
        self._aside = written_aside(self.path)
        name = self._aside.__enter__()
        # Annotations stand behind the images: they wait beside.
        self._file, self._waiting = name.open("w", encoding="utf-8"), name.with_suffix(".annotations")
        self._annotations = self._waiting.open("w+", encoding="utf-8")
        self._file.write(json.dumps(COCO_HEAD | {"images": []})[:-2])
        return self

    def add(self, result: Result | LargeResult) -> None:
        """Append an image and its instances."""
        head, self._images = (result.head if isinstance(result, LargeResult) else result), self._images + 1
        self._file.write((", " if self._images > 1 else "") + _text(coco_image(head, self._images)))
        self._categories |= dict(zip(head.category_ids, head.class_names, strict=True))
        entries = (
            result.to_coco(self._images) if isinstance(result, LargeResult) else coco_entries(result, self._images)
        )
        for entry in entries:
            self._number += 1
            text = _text(coco_annotation(entry, self._number))
            self._annotations.write((", " if self._number > 1 else "") + text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.write('], "annotations": [')
                self._annotations.seek(0)
                while part := self._annotations.read(1 << 20):
                    self._file.write(part)
                self._file.write('], "categories": ' + _text(coco_categories(self._categories)) + "}\n")
        finally:
            self._file.close()
            self._annotations.close()
            self._waiting.unlink(missing_ok=True)
            self._aside.__exit__(kind, error, trace)


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace").decode("utf-8")
