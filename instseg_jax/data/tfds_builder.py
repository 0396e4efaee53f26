"""The data set as TFDS: one ArrayRecord example a picture, with its file's own bytes; no TensorFlow is needed.

Other programs read it with `tfds.builder_from_directory(FOLDER).as_data_source("train")`. Our loader does too, but
takes the annotations from the index that `prepare` writes beside the records, so that none is read before its turn.
"""

import functools
import json
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from instseg_jax import files
from instseg_jax.data import coco, coco_entries

NAME = "instance_segmentation"  # TFDS calls a builder after its class


class InstanceSegmentation(tfds.core.GeneratorBasedBuilder):
    """Pictures with instance masks, of COCO data sets that have been read.

    Features of an example, in the order of the annotation file:
      image: the picture, encoded as its file is; image/id, image/file_name, image/height, image/width (original
        pixels, upright), image/license (name or address, "" where the source names none).
      objects, a sequence: id, label (class index), bbox [x, y, width, height] in pixels, area, is_crowd, is_ignored,
        segmentation: JSON text of polygons [[x1, y1, x2, y2, ...], ...] or of an RLE {"size", "counts"}.
    Boxes and areas are float32, as all floats of TFDS. The metadata holds category_ids.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look for files of checksums beside the code, with a library that it doesn't require

    def __init__(self, *, datasets: Mapping[str, coco.CocoDataset], **arguments: Any):
        self.datasets = dict(datasets)
        super().__init__(**arguments)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        first = next(iter(self.datasets.values()))
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures with instance masks, from a COCO data set.",
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, None)),
                    "image/id": features.Scalar(np.int64),
                    "image/file_name": features.Text(),
                    "image/height": features.Scalar(np.int32),
                    "image/width": features.Scalar(np.int32),
                    "image/license": features.Text(),
                    "objects": features.Sequence(
                        {
                            "id": features.Scalar(np.int64),
                            "label": features.ClassLabel(names=list(first.categories)),
                            "bbox": features.Tensor(shape=(4,), dtype=np.float32),
                            "area": features.Scalar(np.float32),
                            "is_crowd": features.Scalar(np.bool_),
                            "is_ignored": features.Scalar(np.bool_),
                            "segmentation": features.Text(),
                        }
                    ),
                }
            ),
            metadata=tfds.core.MetadataDict({"category_ids": list(first.category_ids)}),
            disable_shuffling=True,  # record i is picture i of the annotation file
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(dataset) for split, dataset in self.datasets.items()}

    def _generate_examples(self, dataset: coco.CocoDataset) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, annotations) in enumerate(zip(dataset.images, dataset.annotations, strict=True)):
            yield (
                index,
                {
                    "image": str(dataset.image_path(index)),
                    "image/id": image.id,
                    "image/file_name": image.file_name,
                    "image/height": image.height,
                    "image/width": image.width,
                    "image/license": image.license,
                    "objects": [
                        {
                            "id": a.id,
                            "label": a.label,
                            "bbox": a.box_xywh_px,
                            "area": a.area,
                            "is_crowd": a.is_crowd,
                            "is_ignored": a.is_ignored,
                            "segmentation": json.dumps(coco.segmentation_to_json(a.segmentation)),
                        }
                        for a in annotations
                    ],
                },
            )


class RecordPictures:
    """The encoded pictures of a prepared split, by image id; opened when first used, anew in every process."""

    def __init__(self, folder: Path, split: str, positions: Mapping[int, int]):
        self.folder, self.split, self.positions = folder, split, dict(positions)
        self._source: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "split": self.split, "positions": self.positions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, image_id: int) -> bytes:
        """The bytes of a picture's file; ValueError when the record is of another picture than the index says."""
        with self._lock:
            if self._source is None:
                self._source = _open(self.folder).as_data_source(
                    self.split, decoders={"image": tfds.decode.SkipDecoding()}
                )
        record = self._source[self.positions[image_id]]
        if record["image/id"] != image_id:
            raise ValueError(f"The records in {str(self.folder)!r} don't fit their index; prepare the data set again.")
        return record["image"]


def prepare_dataset(datasets: Mapping[str, coco.CocoDataset], target: str | Path) -> Path:
    """Write splits as ArrayRecord below `target`; returns the folder of the prepared data set.

    Raises ValueError when there is one already, or when the splits, their class names or numbers don't allow it.
    """
    first, *others = datasets.values()
    for other in others:
        coco.check_same_categories(first, other)
    if len(set(first.categories)) < len(first.categories):
        raise ValueError(f"Several categories of {first.name} have the same name, which TFDS doesn't know.")
    for dataset in datasets.values():
        coco.check_images(dataset)
        ids = [image.id for image in dataset.images] + [a.id for each in dataset.annotations for a in each]
        _check_bits(dataset, "ids", ids, 64)
        _check_bits(dataset, "sizes", [side for image in dataset.images for side in (image.height, image.width)], 32)
    make = functools.partial(InstanceSegmentation, datasets=datasets, file_format="array_record")
    folder = Path(make(data_dir=str(target)).data_dir)
    if folder.exists():
        raise ValueError(f"{str(folder)!r} is there already; name another --save_path, or remove it.")
    # Aside: records without their index would be there already, and no data set.
    aside = folder.parents[1] / f".{NAME}.{secrets.token_hex(4)}.tmp"
    try:
        builder = make(data_dir=str(aside))
        builder.download_and_prepare()
        for split, dataset in datasets.items():
            files.write_json(_index_file(Path(builder.data_dir), split), coco.to_coco(dataset))
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(builder.data_dir).rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _check_bits(dataset: coco.CocoDataset, what: str, values: list[int], bits: int) -> None:
    beyond = [value for value in values if not -(1 << bits - 1) <= value < 1 << bits - 1]
    if beyond:
        listed = coco_entries.first_few(beyond)
        raise ValueError(f"{dataset.name} has {what} beyond the {bits} bits that TFDS has for them: {listed}.")


def read_prepared(dir: str | Path, split: str) -> coco.CocoDataset:
    """Read a split that `prepare_dataset` wrote at or below a folder; its pictures stay in the records.

    Raises FileNotFoundError when there is none.
    """
    root = Path(dir)
    version = str(InstanceSegmentation.VERSION)
    folders = [root, root / version, root / NAME / version]
    folder = next((f for f in folders if (f / "dataset_info.json").is_file() and _index_file(f, split).is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"There is no prepared {split} split in {str(root)!r}; write one with the verb prepare, or set "
            "data.source=folder."
        )
    file = _index_file(folder, split)
    positions = {entry["id"]: position for position, entry in enumerate(coco_entries.read_json(file)["images"])}
    return coco.read_coco(file, folder, pictures=RecordPictures(folder, split, positions))


def _open(folder: Path) -> Any:
    try:
        return tfds.builder_from_directory(str(folder))
    except ImportError as error:
        raise ImportError("Prepared data sets need array_record, which pip installs on Linux only.") from error


def _index_file(folder: Path, split: str) -> Path:
    return folder / f"index_{split}.json"
