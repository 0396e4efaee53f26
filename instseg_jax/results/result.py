"""The result of one image: what a person or a program reads, prints, saves and filters.

Drawing is in `visualize.py`, the forms of other tools in `formats.py`. Masks stay COCO RLEs of the whole image: as
nested lists they would be a thousand times larger and take longer to write than the network to run.
"""

import dataclasses
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from instseg_jax.crops import crop_rle, paste_mask
from instseg_jax.files import write_bytes, write_json
from instseg_jax.images import WRITTEN_SUFFIXES
from instseg_jax.masks import compress_rle, decode_rle, rle_area, rle_box_xyxy_px
from instseg_jax.outlines import Polygon, rle_to_polygons
from instseg_jax.results import formats
from instseg_jax.results.visualize import draw_instances
from instseg_jax.types import Instances

IMAGE_QUALITY = 95  # of formats with loss; the others take no notice


MOST_NAMED = 5  # classes that `repr` counts
_written: dict[Path, object] = {}  # files of this process: the token of the result that each is of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The instances found in one image. `boxes[i]` and `masks[i]` always describe the same instance.

    A box is {"cls_id": int, "label": str, "score": 0..1, "coordinate": [x1, y1, x2, y2]} in pixels, clipped to the
    image; one that lies outside keeps its place with no extent.
    """

    input_path: str  # path, URL, or the name that the caller gave an array; names the files that are saved
    size: tuple[int, int]  # (height, width) of the image in pixels
    boxes: list[dict]  # n boxes as above
    masks: list[dict]  # n COCO RLEs {"size": [height, width], "counts": str} of the whole image
    # [height, width, 3] uint8 RGB, or smaller for an image too large to hold; only drawing needs it.
    image: np.ndarray | None = None
    page_index: int | None = None  # frame of a video, counted from 0
    class_names: tuple[str, ...] = ()  # of the model, by class index
    category_ids: tuple[int, ...] = ()  # of the data that the model learned from, by class index
    georeference: Any = None  # `geo.Georeference` of an image that has one
    error: str | None = None  # why there is no result: the file could not be read
    _token: object = dataclasses.field(default_factory=object, repr=False, compare=False)  # whose files are whose

    def __post_init__(self) -> None:
        if len(self.boxes) != len(self.masks):
            raise ValueError(
                f"A result needs a mask for each box, got {len(self.boxes)} boxes, {len(self.masks)} masks."
            )
        if self.image is not None and (
            self.image.shape[2:] != (3,) or any(a > b for a, b in zip(self.image.shape, self.size, strict=False))
        ):
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
        category_ids: Sequence[int] | None = None,
        georeference: Any = None,
    ) -> "Result":
        """Build a result from post-processed instances and the names (and ids) of the classes, by class index.

        `size` is (height, width) of the whole image, in pixels of which boxes and masks are; boxes are clipped to it.
        `image` [h, w, 3] uint8 RGB may be a smaller view of it. Raises ValueError for a class index without a name.
        """
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
        return cls(
            str(input_path),
            (height, width),
            boxes,
            list(instances.masks),
            image,
            page_index,
            tuple(class_names),
            tuple(range(len(class_names)) if category_ids is None else category_ids),
            georeference,
        )

    @classmethod
    def failed(cls, input_path: str | Path, error: str) -> "Result":
        """Stand for an image that could not be read: no instances, and the reason in `error`."""
        return cls(str(input_path), (0, 0), [], [], error=error)

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Result({self.input_path!r}, failed: {self.error})"
        counts = Counter(box["label"] for box in self.boxes)
        named = ", ".join(f"{count} {name}" for name, count in counts.most_common(MOST_NAMED))
        more = ", ..." if len(counts) > MOST_NAMED else ""
        where = self.input_path if self.page_index is None else f"{self.input_path}, frame {self.page_index}"
        found = f"{len(self)} instances{': ' if named else ''}{named}{more}"
        return f"Result({where!r}, {self.size[1]}x{self.size[0]} px, {found})"

    def _repr_png_(self) -> bytes | None:
        """The drawn image, for a notebook; None where it was dropped."""
        if self.image is None:
            return None
        data = io.BytesIO()
        self.img["res"].save(data, format="PNG")
        return data.getvalue()

    def masks_array(self) -> np.ndarray:
        """The masks as an array [n, height, width] bool, of the whole image."""
        drawn = [decode_rle(mask).astype(bool) for mask in self.masks]
        return np.stack(drawn) if drawn else np.zeros((0, *self.size), bool)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row an instance: label, cls_id, score, x1, y1, x2, y2 and area_px of the mask.

        Raises: ImportError without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        columns = ("label", "cls_id", "score", "x1", "y1", "x2", "y2", "area_px")
        rows = [
            (box["label"], box["cls_id"], box["score"], *box["coordinate"], rle_area(compress_rle(mask)))
            for box, mask in zip(self.boxes, self.masks, strict=True)
        ]
        return pandas.DataFrame(rows, columns=list(columns))

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def json(self) -> dict[str, Any]:
        """Everything but the image, in plain types: {"res": {input_path, page_index, size, boxes, masks}}.

        Masks are COCO RLEs of the whole image. A failed result has `error` beside them.
        """
        return self.to_json()

    def to_json(self, *, masks_format: str = "rle") -> dict[str, Any]:
        """Return `json` with the masks as "rle", "crop" or "polygon"; see `formats.masks_to_json`."""
        content = {
            "input_path": self.input_path,
            "page_index": self.page_index,
            "size": list(self.size),
            "boxes": [{**box, "coordinate": list(box["coordinate"])} for box in self.boxes],
            "masks": formats.masks_to_json(self, masks_format),
        }
        return {"res": content if self.error is None else content | {"error": self.error}}

    @property
    def img(self) -> dict[str, Image.Image]:
        """The image with its instances drawn: {"res": PIL image}. Raises ValueError when it was dropped."""
        if self.image is None:
            reason = f"was made without its image and cannot be drawn ({self.error or 'it was dropped'})"
            raise ValueError(f"The result of {self.input_path} {reason}.")
        scale = self.image.shape[0] / self.size[0], self.image.shape[1] / self.size[1]
        drawn = draw_instances(
            self.image,
            boxes_xyxy_px=np.array([box["coordinate"] for box in self.boxes]).reshape(-1, 4)
            * (*scale[::-1], *scale[::-1]),
            labels=[box["cls_id"] for box in self.boxes],
            names=[box["label"] for box in self.boxes],
            scores=[box["score"] for box in self.boxes],
            masks=self.masks if scale == (1, 1) else [_shrink(mask, self.image.shape[:2]) for mask in self.masks],
        )
        return {"res": Image.fromarray(drawn)}

    def filter(self, threshold: float | Mapping[Any, float], *, default: float = 0.5) -> "Result":
        """Keep the instances whose score reaches a threshold.

        A mapping gives thresholds by class name or class index; `default` holds for the classes that it lacks.
        """

        def reaches(box: dict) -> bool:
            if not isinstance(threshold, Mapping):
                return box["score"] >= threshold
            return box["score"] >= threshold.get(box["label"], threshold.get(box["cls_id"], default))

        keep = [i for i, box in enumerate(self.boxes) if reaches(box)]
        return dataclasses.replace(self, boxes=[self.boxes[i] for i in keep], masks=[self.masks[i] for i in keep])

    def to_coco(self, image_id: int = 1, category_ids: Sequence[int] | None = None) -> list[dict]:
        """Return COCO result entries; `category_ids[k]` is the id of class index k (None: those of the model)."""
        category_ids = category_ids or self.category_ids
        entries = []
        for box, mask in zip(self.boxes, self.masks, strict=True):
            x1, y1, x2, y2 = box["coordinate"]
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": int(category_ids[box["cls_id"]]) if category_ids else box["cls_id"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": box["score"],
                    "segmentation": dict(mask),
                }
            )
        return entries

    def outlines(self) -> Iterator[tuple[dict, list[Polygon]]]:
        """For each instance its box, as in `boxes`, and the parts of its mask as polygons in pixels."""
        for box, mask in zip(self.boxes, self.masks, strict=True):
            yield box, rle_to_polygons(mask)

    def to_labelme(self, *, image_path: str | None = None, tolerance: float = 1.0) -> dict:
        """Return a LabelMe file, for correcting by hand; `image_path` as LabelMe is to find it (the file's name).

        Outlines keep within `tolerance` pixels: 0 follows every pixel. Holes and parts are kept.
        """
        return formats.to_labelme(self, image_path=image_path or self.name, tolerance=tolerance)

    def to_yolo(self, *, tolerance: float = 1.0) -> str:
        """Return YOLO segmentation labels, a line an instance; see `formats.to_yolo`."""
        return formats.to_yolo(self, tolerance=tolerance)

    def to_supervision(self) -> Any:
        """Return a `supervision.Detections`, where that library is installed."""
        return formats.to_supervision(self)

    def print(self, *, format_json: bool = True, indent: int = 4, ensure_ascii: bool = False) -> None:
        """Print the result to standard output, with "..." for the masks."""
        shown = {"res": {**self.json["res"], "masks": "..."}}
        print(json.dumps(shown, indent=indent, ensure_ascii=ensure_ascii) if format_json else shown)

    def save_to_json(
        self,
        save_path: str | Path,
        *,
        indent: int | None = 4,
        ensure_ascii: bool = False,
        masks_format: str = "rle",
    ) -> Path:
        """Write what `json` has under "res" to a .json file, or as `{stem}_res.json` into a folder; return the file.

        That is what the official pipeline writes: `input_path`, `page_index`, `boxes`, `masks` at the top.
        """
        path = self.target(save_path, ".json", (".json",))
        content = self.to_json(masks_format=masks_format)["res"]
        return write_json(path, content, indent=indent, ensure_ascii=ensure_ascii)

    def save_to_img(self, save_path: str | Path) -> Path:
        """Write the drawn image to an image file, or as `{stem}_res{suffix}` into a folder; return the file.

        In a folder the suffix is that of the input, `.png` where that has none that can be written.
        """
        path = self.target(save_path, self.image_suffix, WRITTEN_SUFFIXES)
        data = io.BytesIO()
        image_format = Image.registered_extensions()[path.suffix.lower()]
        self.img["res"].save(data, format=image_format, quality=IMAGE_QUALITY)
        return write_bytes(path, data.getvalue())

    def save_all(self, save_path: str | Path) -> list[Path]:
        """Write JSON and drawn image into a folder (of a failed result the JSON alone); return the files."""
        saved = [self.save_to_json(save_path)]
        return saved if self.error is not None else [*saved, self.save_to_img(save_path)]

    @property
    def name(self) -> str:
        """File name of the input: the last part of its path, or of its URL without the query."""
        path = unquote(urlsplit(self.input_path).path) if "://" in self.input_path else self.input_path
        return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]

    @property
    def image_suffix(self) -> str:
        """The suffix of the drawn image: that of the input, `.png` where that can't be written."""
        suffix = PurePosixPath(self.name).suffix
        return suffix if suffix.lower() in WRITTEN_SUFFIXES else ".png"

    @property
    def stem(self) -> str:
        """How files of this result begin: the input's name without suffix, with the number of a frame."""
        frame = "" if self.page_index is None else f"_{self.page_index}"
        return (PurePosixPath(self.name).stem or "image") + frame

    def target(self, save_path: str | Path, suffix: str, file_suffixes: Sequence[str]) -> Path:
        """The file to write: `save_path` itself if it is named as one, else `{stem}_res{suffix}` in it.

        Where another result of this process was written under that name, as of arrays in a loop, it gets a number.
        """
        save_path = Path(save_path)
        if save_path.suffix.lower() in file_suffixes and not save_path.is_dir():
            return save_path
        for number in itertools.count(1):
            path = (save_path / f"{self.stem}{'' if number == 1 else f'_{number}'}_res{suffix}").absolute()
            if _written.setdefault(path, self._token) is self._token:
                return path
        raise AssertionError


def _shrink(mask: dict, size: tuple[int, int]) -> dict:
    """Scale a mask down to `size` (height, width); of what is smaller than a pixel there, a pixel stays."""
    x1, y1, x2, y2 = rle_box_xyxy_px(compress_rle(mask))
    if x2 <= x1 or y2 <= y1:
        return paste_mask(np.zeros((1, 1), np.uint8), (0, 0), size)
    (height, width), (full_height, full_width) = size, mask["size"]
    left, top = x1 * width // full_width, y1 * height // full_height
    right, bottom = -(-x2 * width // full_width), -(-y2 * height // full_height)
    # Where pixel centres of the small mask lie in the large one.
    columns = ((np.arange(left, right) + 0.5) * full_width / width).astype(int)
    rows = ((np.arange(top, bottom) + 0.5) * full_height / height).astype(int)
    crop = crop_rle(mask, (x1, y1, x2, y2))
    inside = crop[np.clip(rows - y1, 0, y2 - y1 - 1)][:, np.clip(columns - x1, 0, x2 - x1 - 1)]
    inside[(rows < y1) | (rows >= y2)] = 0
    inside[:, (columns < x1) | (columns >= x2)] = 0
    if not inside.any():
        inside[len(inside) // 2, inside.shape[1] // 2] = 1
    return paste_mask(inside, (left, top), size)
