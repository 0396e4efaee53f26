"""The result of one image: what a person or a program reads, prints, saves and filters.

Drawing is in `visualize.py`. Masks stay COCO RLEs of the whole image: as nested lists they would be a thousand
times larger and take longer to write than the network to run.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from instseg_jax.files import write_bytes, write_json
from instseg_jax.inference.postprocess import Instances
from instseg_jax.inference.visualize import draw_instances

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGE_QUALITY = 95  # of formats with loss; the others take no notice


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The instances found in one image. `boxes[i]` and `masks[i]` always describe the same instance.

    A box is {"cls_id": int, "label": str, "score": 0..1, "coordinate": [x1, y1, x2, y2]} in pixels, clipped to the
    image; one that lies outside keeps its place with no extent.
    """

    input_path: str  # path, URL, or the name that the caller gave an array; names the files that are saved
    size: tuple[int, int]  # (height, width) of the image in pixels
    boxes: list[dict]  # n boxes as above
    masks: list[dict]  # n COCO RLEs {"size": [height, width], "counts": str} of the whole image
    image: np.ndarray | None = None  # [height, width, 3] uint8 RGB; only drawing needs it
    page_index: int | None = None  # page of a document, counted from 0

    def __post_init__(self) -> None:
        if len(self.boxes) != len(self.masks):
            raise ValueError(
                f"A result needs a mask for each box, got {len(self.boxes)} boxes, {len(self.masks)} masks."
            )
        if self.image is not None and self.image.shape != (*self.size, 3):
            raise ValueError(f"The image of a result must be {[*self.size, 3]}, got {list(self.image.shape)}.")

    @classmethod
    def from_instances(
        cls,
        instances: Instances,
        *,
        class_names: Sequence[str],
        input_path: str | Path,
        size: tuple[int, int],
        image: np.ndarray | None = None,
        page_index: int | None = None,
    ) -> "Result":
        """Build a result from post-processed instances and the names of the classes, by class index."""
        height, width = (int(side) for side in size)
        if len(instances) and not 0 <= instances.labels.min() <= instances.labels.max() < len(class_names):
            raise ValueError(
                f"Class indices must be below {len(class_names)}, got {sorted(set(instances.labels.tolist()))}."
            )
        coordinates = np.clip(instances.boxes_xyxy_px.astype(np.float64), 0, [width, height, width, height]).tolist()
        boxes = [
            {"cls_id": int(label), "label": class_names[label], "score": float(score), "coordinate": coordinate}
            for label, score, coordinate in zip(instances.labels, instances.scores, coordinates, strict=True)
        ]
        return cls(str(input_path), (height, width), boxes, list(instances.masks), image, page_index)

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def json(self) -> dict[str, Any]:
        """Everything but the image, in plain types: {"res": {input_path, page_index, size, boxes, masks}}."""
        return {
            "res": {
                "input_path": self.input_path,
                "page_index": self.page_index,
                "size": list(self.size),
                "boxes": [{**box, "coordinate": list(box["coordinate"])} for box in self.boxes],
                "masks": [dict(mask) for mask in self.masks],
            }
        }

    @property
    def img(self) -> dict[str, Image.Image]:
        """The image with its instances drawn: {"res": PIL image}. Raises ValueError when it was dropped."""
        if self.image is None:
            raise ValueError(f"The result of {self.input_path} was made without its image and cannot be drawn.")
        drawn = draw_instances(
            self.image,
            boxes_xyxy_px=np.array([box["coordinate"] for box in self.boxes]).reshape(-1, 4),
            labels=[box["cls_id"] for box in self.boxes],
            names=[box["label"] for box in self.boxes],
            scores=[box["score"] for box in self.boxes],
            masks=self.masks,
        )
        return {"res": Image.fromarray(drawn)}

    def filter(self, threshold: float | Mapping[int | str, float], *, default: float = 0.5) -> "Result":
        """Keep the instances whose score reaches a threshold.

        A mapping gives thresholds by class name or class index; `default` holds for the classes that it lacks.
        """

        def reaches(box: dict) -> bool:
            if not isinstance(threshold, Mapping):
                return box["score"] >= threshold
            return box["score"] >= threshold.get(box["label"], threshold.get(box["cls_id"], default))

        keep = [i for i, box in enumerate(self.boxes) if reaches(box)]
        return dataclasses.replace(self, boxes=[self.boxes[i] for i in keep], masks=[self.masks[i] for i in keep])

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict]:
        """Return COCO result entries; `category_ids[k]` is the id of class index k (the index itself if None)."""
        entries = []
        for box, mask in zip(self.boxes, self.masks, strict=True):
            x1, y1, x2, y2 = box["coordinate"]
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": box["cls_id"] if category_ids is None else int(category_ids[box["cls_id"]]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": box["score"],
                    "segmentation": dict(mask),
                }
            )
        return entries

    def print(self, *, format_json: bool = True, indent: int = 4, ensure_ascii: bool = False) -> None:
        """Print the result to standard output, with "..." for the masks."""
        shown = {"res": {**self.json["res"], "masks": "..."}}
        print(json.dumps(shown, indent=indent, ensure_ascii=ensure_ascii) if format_json else shown)

    def save_to_json(self, save_path: str | Path, *, indent: int | None = 4, ensure_ascii: bool = False) -> Path:
        """Write `json` to a .json file, or as `{stem}_res.json` into a folder; return the file."""
        path = self._target(Path(save_path), ".json", (".json",))
        return write_json(path, self.json, indent=indent, ensure_ascii=ensure_ascii)

    def save_to_img(self, save_path: str | Path) -> Path:
        """Write the drawn image to an image file, or as `{stem}_res{suffix}` into a folder; return the file.

        In a folder the suffix is that of the input, `.png` where that has none that can be written.
        """
        suffix = PurePosixPath(self._name()).suffix
        path = self._target(Path(save_path), suffix if suffix.lower() in IMAGE_SUFFIXES else ".png", IMAGE_SUFFIXES)
        data = io.BytesIO()
        image_format = Image.registered_extensions()[path.suffix.lower()]
        self.img["res"].save(data, format=image_format, quality=IMAGE_QUALITY)
        return write_bytes(path, data.getvalue())

    def _name(self) -> str:
        """File name of the input: the last part of its path, or of its URL without the query."""
        path = unquote(urlsplit(self.input_path).path) if "://" in self.input_path else self.input_path
        return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]

    def _target(self, save_path: Path, suffix: str, file_suffixes: Sequence[str]) -> Path:
        """The file to write: `save_path` itself if it is named as one, else one named after the input in it."""
        if save_path.suffix.lower() in file_suffixes and not save_path.is_dir():
            return save_path
        page = "" if self.page_index is None else f"_{self.page_index}"
        return save_path / f"{PurePosixPath(self._name()).stem or 'image'}{page}_res{suffix}"
