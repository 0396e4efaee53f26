"""The result of an image with too many instances, or too many pixels, to hold: written an instance at a time.

The files are those of a `Result`. A mask of an image of more than 2^32 pixels, in which COCO's codes can't count, is
the RLE of its own box with `offset`, the (x, y) of its top left pixel.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from instseg_jax.crops import crop_bounds, crop_rle, paste_mask
from instseg_jax.files import written_aside
from instseg_jax.geo import georeference
from instseg_jax.outlines import Polygon, rle_to_polygons
from instseg_jax.results.result import Result

COUNTABLE = 2**32 - 1  # pixels of an image whose masks COCO's codes can tell
FORMATS = ("json", "coco", "geojson", "gpkg")  # that are written an instance at a time

Found = tuple[dict, tuple[int, int], np.ndarray]  # box as in `Result`, corner (x, y) and mask [h, w] of its extent


@dataclasses.dataclass(frozen=True)
class LargeResult:
    """Instances that lie on the disk; `instances` reads them by falling score, as often as it is called."""

    head: Result  # the image, without instances
    count: int
    instances: Callable[[], Iterator[Found]]

    def __len__(self) -> int:
        return self.count

    @property
    def input_path(self) -> str:
        """Path of the image."""
        return self.head.input_path

    @property
    def georeference(self) -> Any:
        """Where it lies."""
        return self.head.georeference

    def outlines(self) -> Iterator[tuple[dict, list[Polygon]]]:
        """For each instance its box and the parts of its mask as polygons in pixels."""
        for box, corner, mask in self.instances():
            yield box, _polygons(corner, mask)

    def to_coco(self, image_id: int) -> Iterator[dict]:
        """COCO annotations without their own ids; boxes and areas are those of the masks."""
        for box, (x, y), mask in self.instances():
            category = self.head.category_ids[box["cls_id"]] if self.head.category_ids else box["cls_id"]
            yield {
                "image_id": image_id,
                "category_id": int(category),
                "bbox": [x, y, mask.shape[1], mask.shape[0]],
                "score": box["score"],
                "segmentation": self._rle((x, y), mask),
                "area": int(np.count_nonzero(mask)),
            }

    def save(self, name: str, folder: Path, stem: str, masks_format: str) -> None:
        """Write the file of a format. Raises ValueError for one that can't be written an instance at a time."""
        path = folder / f"{stem}_res.{name}"
        if name == "json":
            self._write_json(path, masks_format)
        elif name == "geojson":
            georeference.write_geojson(path, self)
        elif name == "gpkg":
            georeference.write_geopackage(path, self)
        else:
            possible = ", ".join(FORMATS)
            raise ValueError(f"{self.count} instances in {self.head.size} pixels; possible are {possible}")

    def _write_json(self, path: Path, masks_format: str) -> None:
        head = self.head.to_json()["res"]
        with written_aside(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            text = json.dumps({k: head[k] for k in ("input_path", "page_index", "size")}, indent=4, ensure_ascii=False)
            file.write(text[:-2])
            _write_list(file, "boxes", (box for box, _, _ in self.instances()))
            _write_list(file, "masks", (self._mask(*found, masks_format) for found in self.instances()))
            file.write("\n}\n")

    def _mask(self, box: dict, corner: tuple[int, int], mask: np.ndarray, masks_format: str) -> Any:
        if masks_format == "rle":
            return self._rle(corner, mask)
        if masks_format == "polygon":
            return [[ring.tolist() for ring in (part.outer, *part.holes)] for part in _polygons(corner, mask)]
        (x, y), (x1, y1, x2, y2) = corner, crop_bounds(box["coordinate"], self.head.size)
        return crop_rle(paste_mask(mask, (0, 0), mask.shape), (x1 - x, y1 - y, x2 - x, y2 - y)).tolist()

    def _rle(self, corner: tuple[int, int], mask: np.ndarray) -> dict:
        if self.head.size[0] * self.head.size[1] <= COUNTABLE:
            return paste_mask(mask, corner, self.head.size)
        return paste_mask(mask, (0, 0), mask.shape) | {"offset": list(corner)}


def _polygons(corner: tuple[int, int], mask: np.ndarray) -> list[Polygon]:
    found = rle_to_polygons(paste_mask(mask, (0, 0), mask.shape))
    place = np.array(corner, np.float64)
    return [Polygon(part.outer + place, tuple(hole + place for hole in part.holes)) for part in found]


def _write_list(file: IO[str], name: str, items: Iterator[Any]) -> None:
    """Write `,\n    "name": [...]` as json.dumps with indent=4 does, an item at a time."""
    file.write(f',\n    "{name}": [')
    is_empty = True
    for item in items:
        text = json.dumps(item, indent=4, ensure_ascii=False, allow_nan=False).replace("\n", "\n        ")
        file.write(("" if is_empty else ",") + "\n        " + text)
        is_empty = False
    file.write("]" if is_empty else "\n    ]")
