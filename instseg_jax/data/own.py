"""Data from Python instead of annotation files: sequences and streams of pictures with their objects.

An item is a mapping:

    image          uint8 [h, w, 3] RGB, or a PIL image
    labels         n class indices, 0..K-1
    masks          [n, h, w] of 0 and 1; or instead
    segmentations  n COCO segmentations: [[x1, y1, x2, y2, ...], ...] in pixels, or a run-length code
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from instseg_jax import images, masks
from instseg_jax.data import coco, coco_entries, examples, rasterize, transforms
from instseg_jax.data.batches import Parts, Size, apply_transforms, collate
from instseg_jax.types import Batch


class Items(Protocol):
    """What can be asked for its length and for the item at a position: a list, a Grain source, a Hugging Face set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """Pictures by image id, asked for one at a time."""

    items: Items

    def __call__(self, image_id: int) -> np.ndarray:
        return images.to_pixels(self.items[image_id - 1]["image"], None, f"The image of item {image_id - 1}")


def own_data(items: Items, class_names: Sequence[str], *, name: str = "own data") -> coco.CocoDataset:
    """A data set of the items of a sequence, as if it had been read from COCO files.

    Every item is looked at once: objects and sizes are kept, pictures are asked for again when a batch shows them.

    Args:
      items: with `__len__` and `__getitem__`; each a mapping of image (uint8 [h, w, 3] or PIL), labels (n indices),
        and masks [n, h, w] or segmentations as COCO has them. Arrays may be NumPy's, JAX's or PyTorch's.
      class_names: of the indices.
      name: of the set, in messages.

    Returns: the data set, for `train`, `load_batches` and scoring.

    Raises: ValueError that names the item, for one that lacks something or does not fit together.
    """
    records, annotations, number = [], [], itertools.count(1)
    for index in range(len(items)):
        try:
            record, objects = _read_item(items[index], index + 1, len(class_names), number)
        except ValueError as error:
            raise ValueError(f"Item {index} of {name}: {error}") from error
        records.append(record)
        annotations.append(objects)
    return coco.CocoDataset(
        name=name,
        annotation_file=Path(name),
        image_folder=Path(name),
        images=tuple(records),
        annotations=tuple(annotations),
        categories=tuple(class_names),
        category_ids=tuple(range(1, len(class_names) + 1)),
        pictures=_Pictures(items),
    )


def _read_item(
    item: Mapping[str, Any], image_id: int, num_classes: int, number: Iterator[int]
) -> tuple[coco_entries.ImageRecord, tuple[coco_entries.Annotation, ...]]:
    if missing := [key for key in ("image", "labels") if key not in item]:
        raise ValueError(f"it lacks {', '.join(missing)}; an item has image, labels, and masks or segmentations")
    if ("masks" in item) == ("segmentations" in item):
        raise ValueError("it must have either masks or segmentations")
    height, width = images.to_pixels(item["image"], None, "its image").shape[:2]
    record = coco_entries.ImageRecord(image_id, f"item {image_id - 1}", height, width)
    labels = [int(label) for label in item["labels"]]
    if "masks" in item:
        dense = np.asarray(item["masks"])
        if dense.shape != (len(labels), height, width) and not (len(labels) == 0 and dense.size == 0):
            raise ValueError(f"its masks have the shape {list(dense.shape)}, not {[len(labels), height, width]}")
        segmentations: Sequence[Any] = [masks.encode_mask(mask != 0) for mask in dense]
    else:
        segmentations = item["segmentations"]
    if len(segmentations) != len(labels):
        raise ValueError(f"it has {len(labels)} labels and {len(segmentations)} segmentations")
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"a label is {label}, it must be from 0 to {num_classes - 1}")
    objects = tuple(
        coco_entries.read_annotation({"id": next(number), "segmentation": segmentation}, label, record)
        for segmentation, label in zip(segmentations, labels, strict=True)
    )
    return record, objects


def dense_masks(example: examples.Example) -> np.ndarray:
    """The masks of an example, as a transform of one's own begins with.

    Args:
      example: what a transform gets: image uint8 [h, w, 3], labels [n].

    Returns: uint8 0/1 [n, h, w], of the whole picture.
    """
    size = example.image.shape[:2]
    drawn = [masks.segmentation_to_mask(segmentation, *size) for segmentation in example.segmentations]
    return np.stack(drawn) if drawn else np.zeros((0, *size), np.uint8)


def make_example(image: np.ndarray, labels: Sequence[int] | np.ndarray, dense: np.ndarray) -> examples.Example:
    """An example of pixels and masks, as a transform of one's own ends with, whatever it does in between.

    Args:
      image: uint8 [h, w, 3] RGB.
      labels: class indices [n].
      dense: masks [n, h, w].

    Returns: the example; objects without a pixel left are not in it.

    Raises: ValueError for shapes that don't fit together.
    """
    height, width = image.shape[:2]
    if np.shape(dense) != (len(labels), height, width):
        raise ValueError(f"masks have the shape {list(np.shape(dense))}, not {[len(labels), height, width]}")
    boxes = [masks.mask_box_xyxy_px(mask) for mask in dense]
    kept = [i for i, box in enumerate(boxes) if box is not None]
    return examples.Example(
        image=image,
        view=rasterize.whole_view(height, width),
        is_float=False,
        boxes_xyxy_px=np.array([boxes[i] for i in kept], np.float32).reshape(-1, 4),
        labels=np.asarray(labels, np.int32)[kept],
        segmentations=tuple(masks.compress_rle(masks.encode_mask(dense[i] != 0)) for i in kept),
    )


def stream_batches(
    items: Iterable[Mapping[str, Any]],
    *,
    batch_size: int,
    num_classes: int,
    size: Size,
    interpolation: str,
    layout: examples.Layout,
    own_transforms: Sequence[transforms.Transform],
    seed: int,
) -> Iterator[Batch]:
    """Batches of a stream of items, such as `tf_dataset.as_numpy_iterator()` or a PyTorch loader of `batch_size=None`.

    A last part that fills no batch is left out. Where there are more objects than slots, a random choice stays.

    Raises: ValueError that names the item, counted from 0, for one that lacks something or does not fit together.
    """
    rng, pixels = np.random.default_rng(seed), np.empty((batch_size, *size, 3), np.float32)
    samples: list[examples.Sample] = []
    for index, item in enumerate(items):
        one = own_data([item], ["class"] * num_classes, name=f"the stream (item {index})")
        example = apply_transforms(examples.load_example(one, 0), rng, own_transforms)
        example, dropped = transforms.limit_objects(example, rng, max_instances=layout.max_instances)
        sample = examples.finish(example, size, interpolation, layout, pixels[len(samples)])
        samples.append(dataclasses.replace(sample, num_dropped=dropped))
        if len(samples) == batch_size:
            yield collate(Parts(pixels, tuple(samples), tuple(range(index + 1 - batch_size, index + 1))), layout)
            samples, pixels = [], np.empty_like(pixels)
