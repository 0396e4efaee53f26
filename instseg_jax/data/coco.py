"""COCO annotation files as plain records: finding, reading and filtering them.

The layouts that are recognised are in `data/layouts.py`. Masks stay polygons or run-length codes;
drawing them is `masks.py` and `data/rasterize.py`; single entries of a file are read by
`data/coco_entries.py`. No image is opened here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax import files, images, masks
from instseg_jax.bands import Bands
from instseg_jax.commands import shown
from instseg_jax.data import coco_entries, layouts, replacing
from instseg_jax.data.coco_entries import Annotation, ImageRecord
from instseg_jax.messages import first_few, quote

MIN_BOX_SIDE_PX = 1e-5  # of the reference: a training box must be wider and higher than this
INVALID_HINT = "Run check_dataset to see all that is wrong, or leave such objects out with data.skip_invalid=True."
EMBEDDED = "embedded"  # the name, instead of a folder, of the data set that comes with the package


@dataclasses.dataclass(frozen=True)
class CocoDataset:
    """Pictures and their objects; `annotations[i]` belongs to `images[i]`.

    Class index k is `categories[k]` and stands for `category_ids[k]`, ids ascending. `skipped` names
    every annotation of the file that is not in here: (annotation id, reason).
    """

    name: str
    annotation_file: Path
    image_folder: Path
    images: tuple[ImageRecord, ...]
    annotations: tuple[tuple[Annotation, ...], ...]
    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    skipped: tuple[tuple[int, str], ...] = ()
    pictures: Callable[[int], bytes | np.ndarray] | None = None  # by image id, encoded or not, where they are no files
    bands: Bands | None = None  # how to read them, where they are not 8-bit colour
    info: dict = dataclasses.field(default_factory=dict)  # what the file says of itself
    allow_outside: bool = False  # pictures that a name or a link leads to from out of the folder

    def __len__(self) -> int:
        return len(self.images)

    def image_path(self, index: int) -> Path:
        """Path of the picture at a position of the data set. Raises ValueError for one outside of the folder."""
        name = self.images[index].file_name
        if self.pictures is None and not self.allow_outside and not files.is_inside(self.image_folder, name):
            raise ValueError(say_outside(self, [name]))
        return self.image_folder / name

    def read_image(self, index: int) -> np.ndarray:
        """Decode the picture at a position of the data set, from wherever it is: uint8 [h, w, C].

        Raises FileNotFoundError or ValueError that names the file.
        """
        path = self.image_path(index)
        if self.pictures is not None:
            data = self.pictures(self.images[index].id)
            if isinstance(data, np.ndarray):
                return images.to_pixels(data, self.bands, repr(str(path)))
            return images.decode_image(data, str(path), self.bands)
        return images.read_image(path, self.bands)

    def training_targets(self, index: int) -> tuple[np.ndarray, np.ndarray, tuple[masks.Segmentation, ...]]:
        """Boxes [n, 4] float32 xyxy in pixels, labels [n] int32 and segmentations of an image's objects.

        They are put together once and kept: the arrays can't be written to.
        """
        targets = self._training_targets.get(index)
        if targets is None:
            annotations = self.annotations[index]
            corners = [training_box_xyxy_px(annotation) for annotation in annotations]
            boxes = np.array(corners, np.float32).reshape(-1, 4)
            labels = np.array([annotation.label for annotation in annotations], np.int32)
            boxes.setflags(write=False)
            labels.setflags(write=False)
            targets = boxes, labels, tuple(annotation.segmentation for annotation in annotations)
            self._training_targets[index] = targets
        return targets

    @functools.cached_property
    def _training_targets(self) -> dict[int, tuple[np.ndarray, np.ndarray, tuple[masks.Segmentation, ...]]]:
        return {}

    @property
    def channels(self) -> int:
        """C of the pictures."""
        return 3 if self.bands is None else self.bands.channels


def data_root(dir: str | Path) -> Path:
    """Folder of a data set; the name "embedded" stands for the one that comes with the package.

    Raises FileNotFoundError when it does not exist. A folder of one's own of that name is "./embedded".
    """
    root = Path(__file__).parent / EMBEDDED if dir == EMBEDDED else Path(dir)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no data set folder {str(root)!r}.")
    return root


class MissingAnnotations(FileNotFoundError):
    """A data set has no annotation file of a split."""


def say_empty(dataset: "CocoDataset") -> str:
    """What is wrong with a split without images, and the way to one that has some."""
    return f"{dataset.annotation_file} has no image to load{_say_split(dataset.annotation_file.parent.parent)}"


def _say_split(root: Path) -> str:
    command = shown("split", f"--config.data.dir={root}", "--train_percent=80", "--val_percent=20")
    return f"; `{command}` deals the pictures out anew"


def find_split(
    dir: str | Path, split: str, annotations: str | Path | None = None, images: str | Path | None = None
) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of a split ("train", "val") below `dir`.

    Paths given explicitly win; relative ones are relative to `dir`. Raises FileNotFoundError that
    names everything that was looked for (`MissingAnnotations` for the file), ValueError for files half replaced.
    """
    root = data_root(dir)
    replacing.check_whole(root / "annotations")
    candidates = [root / annotations] if annotations is not None else layouts.annotation_files(root, split)
    file = next((path for path in candidates if files.is_regular(path)), None)
    if file is None:
        others = (path for name in ("train", "val") for path in layouts.annotation_files(root, name))
        is_ours = any(map(files.is_regular, others))  # with one split only: nothing to convert
        hint = (not is_ours and layouts.describe_other(root)) or _say_split(root)
        raise MissingAnnotations(f"The {split} annotations are missing: there is no {_either(candidates[:2])}{hint}")
    folders = [root / images] if images is not None else layouts.image_folders(root, split, file)
    folder = layouts.choose_folder(folders, file)
    if folder is None:
        raise FileNotFoundError(f"The {split} images are missing: there is no folder {_either(folders[:3])}.")
    return file, folder


def read_split(
    dir: str | Path,
    split: str,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    skip_invalid: bool = False,
) -> CocoDataset:
    """Find and read a split with everything in it; see `find_split` and `read_coco`."""
    return read_coco(*find_split(dir, split, annotations, images), skip_invalid=skip_invalid)


def read_coco(
    annotation_file: str | Path,
    image_folder: str | Path,
    *,
    skip_invalid: bool = False,
    pictures: Callable[[int], bytes | np.ndarray] | None = None,
) -> CocoDataset:
    """Read a COCO instance file with everything in it: crowds, images without objects, tiny objects.

    That is what evaluation wants; training takes `select_trainable` of it. A missing `bbox` or `area`
    is computed from the mask. `skip_invalid` leaves out annotations whose mask or box is malformed
    and names them in `skipped`; otherwise they raise ValueError, as all other flaws of the file do. `pictures`
    gives the bytes of a picture by its id where they are no files of the folder.
    """
    file = Path(annotation_file)
    content = coco_entries.read_json(file)
    categories = coco_entries.read_categories(content["categories"], file)
    label_of_id = {category_id: label for label, (category_id, _) in enumerate(categories)}
    records = coco_entries.read_images(content["images"], file, content.get("licenses"))
    position_of_id = {image.id: position for position, image in enumerate(records)}
    annotations: list[list[Annotation]] = [[] for _ in records]
    skipped: list[tuple[int, str]] = []
    for number, entry in enumerate(content["annotations"]):
        coco_entries.require_keys(entry, ("id", "image_id", "category_id"), f"Annotation number {number + 1} of {file}")
    coco_entries.check_ids([entry["id"] for entry in content["annotations"]], "annotations", file)
    for entry in content["annotations"]:
        what = f"Annotation {quote(entry['id'])} of {file}"
        position, label = _find(position_of_id, entry["image_id"]), _find(label_of_id, entry["category_id"])
        if position is None:
            raise ValueError(
                f"{what} belongs to the image id {quote(entry['image_id'])}, which the file does not list."
            )
        if label is None:
            raise ValueError(f"{what} has the category id {quote(entry['category_id'])}, which the file does not list.")
        try:
            annotations[position].append(coco_entries.read_annotation(entry, label, records[position]))
        except ValueError as error:
            if not skip_invalid:
                raise ValueError(f"{what}: {error} {INVALID_HINT}") from error
            skipped.append((entry["id"], str(error)))
    return CocoDataset(
        name=file.stem,
        annotation_file=file,
        info=content["info"] if isinstance(content.get("info"), dict) else {},
        image_folder=Path(image_folder),
        images=tuple(records),
        annotations=tuple(tuple(of_image) for of_image in annotations),
        categories=tuple(name for _, name in categories),
        category_ids=tuple(category_id for category_id, _ in categories),
        skipped=tuple(skipped),
        pictures=pictures,
    )


def select_trainable(dataset: CocoDataset, *, keep_empty: bool) -> CocoDataset:
    """Keep what training uses, as the reference does; whatever goes is named in `skipped`.

    Crowds and ignored objects go, and objects without area or with a box that is thinner than 1e-5
    pixels or outside the picture. Images that are left without objects go unless `keep_empty`.
    """
    skipped = list(dataset.skipped)
    records, annotations = [], []
    for image, of_image in zip(dataset.images, dataset.annotations, strict=True):
        kept = []
        for annotation in of_image:
            reason = untrainable_reason(annotation, image)
            if reason is None:
                kept.append(annotation)
            else:
                skipped.append((annotation.id, reason))
        if kept or keep_empty:
            records.append(image)
            annotations.append(tuple(kept))
    return dataclasses.replace(dataset, images=tuple(records), annotations=tuple(annotations), skipped=tuple(skipped))


def take_images(dataset: CocoDataset, positions: Sequence[int]) -> CocoDataset:
    """Keep the images at the given positions, in that order, with their objects.

    Raises IndexError that names the first position that is not in 0..len(dataset) - 1.
    """
    for position in positions:
        if not 0 <= position < len(dataset):
            raise IndexError(f"{dataset.name} has {len(dataset)} images; there is none at position {position}.")
    return dataclasses.replace(
        dataset,
        images=tuple(dataset.images[i] for i in positions),
        annotations=tuple(dataset.annotations[i] for i in positions),
    )


def training_box_xyxy_px(annotation: Annotation) -> tuple[float, float, float, float]:
    """Corners of an annotation's box in pixels, rounded to 3 decimals as the reference does."""
    x, y, w, h = annotation.box_xywh_px
    return round(x, 3), round(y, 3), round(x + w, 3), round(y + h, 3)


def to_coco(dataset: CocoDataset) -> dict[str, Any]:
    """The data set as COCO writes it: images, annotations, categories; what evaluation scores against."""
    annotations = []
    for image, of_image in zip(dataset.images, dataset.annotations, strict=True):
        for annotation in of_image:
            annotations.append(
                {
                    "id": annotation.id,
                    "image_id": image.id,
                    "category_id": dataset.category_ids[annotation.label],
                    "bbox": list(annotation.box_xywh_px),
                    "area": annotation.area,
                    "iscrowd": int(annotation.is_crowd),
                    "ignore": int(annotation.is_ignored),
                    "segmentation": segmentation_to_json(annotation.segmentation),
                }
            )
    return {
        "info": dataset.info | {"description": dataset.name},  # pycocotools 2.0.9 and 2.0.10 ask for it
        "images": [dataclasses.asdict(image) for image in dataset.images],
        "annotations": annotations,
        "categories": [
            {"id": i, "name": name} for i, name in zip(dataset.category_ids, dataset.categories, strict=True)
        ],
    }


def segmentation_to_json(segmentation: masks.Segmentation) -> list[list[float]] | dict[str, Any]:
    """A segmentation as COCO writes it: lists of coordinates, or an RLE with its counts as text."""
    if not isinstance(segmentation, dict):
        return [np.asarray(polygon).ravel().tolist() for polygon in segmentation]
    counts = segmentation["counts"]
    return {
        "size": list(segmentation["size"]),
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def map_categories(dataset: CocoDataset, class_names: Sequence[str]) -> tuple[int | None, ...]:
    """Category id in the data set of each of a model's classes, by name; None for a class that it does not have.

    Raises ValueError when the data set has a category that the model does not know.
    """
    ids = dict(zip(dataset.categories, dataset.category_ids, strict=True))
    if dataset.categories == tuple(class_names):  # also where a name occurs twice
        return dataset.category_ids
    unknown = [name for name in dataset.categories if name not in class_names]
    if unknown:
        raise ValueError(
            f"{dataset.name} has categories that the model does not know: {first_few(unknown)}; "
            f"the model knows {first_few(list(class_names))}."
        )
    return tuple(ids.get(name) for name in class_names)


def say_outside(dataset: CocoDataset, names: Sequence[str]) -> str:
    """What is wrong with pictures that lie outside of their folder, and the two ways to have them."""
    return (
        f"{len(names)} of {len(dataset)} images of {dataset.name} lie outside of {str(dataset.image_folder)!r}: "
        f"{first_few(names)}; name their own folder (--config.data.train_images, val_images), or allow it "
        "with --config.data.allow_outside=True."
    )


def check_images(dataset: CocoDataset) -> None:
    """Raise, listing the first few, unless every image file exists and lies in the folder; none is opened.

    Raises: FileNotFoundError for those that are missing or no regular files, ValueError for those outside.
    """
    if dataset.pictures is not None:
        return
    names = [] if dataset.allow_outside else [image.file_name for image in dataset.images]
    outside = [name for name in names if not files.is_inside(dataset.image_folder, name)]
    if outside:
        raise ValueError(say_outside(dataset, outside))
    missing = [
        image.file_name for image in dataset.images if not files.is_regular(dataset.image_folder / image.file_name)
    ]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(dataset)} images of {dataset.name} are missing in "
            f"{str(dataset.image_folder)!r}: {first_few(missing)}."
        )


def check_same_categories(a: CocoDataset, b: CocoDataset) -> None:
    """Raise ValueError, naming what differs, unless both have the same category ids with the same names."""
    of_a = dict(zip(a.category_ids, a.categories, strict=True))
    of_b = dict(zip(b.category_ids, b.categories, strict=True))
    differing = [
        f"id {quote(i)} is {_name(of_a, i)} in {a.name} and {_name(of_b, i)} in {b.name}"
        for i in sorted(of_a.keys() | of_b.keys())
        if of_a.get(i) != of_b.get(i)
    ]
    if differing:
        raise ValueError(f"The categories of {a.name} and {b.name} differ: {first_few(differing)}.")


def untrainable_reason(annotation: Annotation, image: ImageRecord) -> str | None:
    """Why training leaves an object out, as the reference does; None where it is trained on."""
    x, y, w, h = annotation.box_xywh_px
    if annotation.is_crowd:
        return "crowd"
    if annotation.is_ignored:
        return "marked to be ignored"
    if annotation.area <= 0:
        return "area is not positive"
    if w <= MIN_BOX_SIDE_PX or h <= MIN_BOX_SIDE_PX:
        return "box has no width or height"
    inside_w, inside_h = min(x + w, image.width) - max(x, 0), min(y + h, image.height) - max(y, 0)
    if min(inside_w, inside_h) <= MIN_BOX_SIDE_PX:
        return "box is outside the image"
    return None


def _find(table: dict[int, int], key: Any) -> int | None:
    return table.get(key) if isinstance(key, int) else None


def _either(paths: Sequence[Path]) -> str:
    return " and no ".join(repr(str(path)) for path in paths)


def _name(names: dict[int, str], category_id: int) -> str:
    return repr(names[category_id]) if category_id in names else "missing"
