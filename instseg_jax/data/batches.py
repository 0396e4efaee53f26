"""What a worker makes of one batch: samples in their places, and the arrays of static shape that they become.

Everything here is a plain function of its arguments, so that a process can be given it; which images a batch
shows is `data/epochs.py`, who works on it `data/loader.py`.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from instseg_jax.data import coco, copy_paste, examples, transforms
from instseg_jax.data.epochs import Pool, batch_entries
from instseg_jax.messages import quote
from instseg_jax.types import Batch, Targets

Size = tuple[int, int]

# Streams of random numbers: default_rng([seed, stream, ...]); the first is that of epochs.py.
BATCH_STREAM, SAMPLE_STREAM = 2, 3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How training batches are made of a data set."""

    seed: int
    batch_size: int  # of all hosts together
    sizes: tuple[Size, ...]  # (height, width), one is drawn for a batch
    interpolations: tuple[str, ...]  # likewise
    augmentation: transforms.Augmentation
    layout: examples.Layout
    own_transforms: tuple[transforms.Transform, ...] = ()  # applied to the decoded picture, before the augmentation


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a worker makes of a batch: the images in their places, and the targets of each."""

    pixels: np.ndarray  # [B, H, W, C] float32
    samples: tuple[examples.Sample, ...]
    indices: tuple[int, ...]


def train_parts(
    step: int,
    *,
    dataset: coco.CocoDataset,
    pool: Pool,
    own: slice,
    recipe: Recipe,
) -> Parts:
    """Make the slice `own` of a step's batch; size and interpolation are drawn once for all of it."""
    seed, augmentation, layout = recipe.seed, recipe.augmentation, recipe.layout
    rng = np.random.default_rng([seed, BATCH_STREAM, step])
    size = recipe.sizes[int(rng.integers(len(recipe.sizes)))]
    interpolation = recipe.interpolations[int(rng.integers(len(recipe.interpolations)))]
    epoch, entries = batch_entries(pool, recipe.batch_size, seed=seed, step=step)
    pixels = np.empty((own.stop - own.start, *size, dataset.channels), np.float32)
    samples = []
    for (index, repeat), place in zip(entries[own], pixels, strict=True):
        sample_rng = np.random.default_rng([seed, SAMPLE_STREAM, epoch, index, repeat])
        sample = make_sample(
            dataset, index, sample_rng, augmentation, size, interpolation, layout, place, recipe.own_transforms
        )
        samples.append(sample)
    return Parts(pixels, tuple(samples), tuple(index for index, _ in entries[own]))


def eval_parts(
    start: int,
    *,
    dataset: coco.CocoDataset,
    offset: int,
    own_size: int,
    size: Size,
    interpolation: str,
    layout: examples.Layout,
) -> Parts:
    """Make up to `own_size` images from position `start + offset` on, without augmentation."""
    first = start + offset
    indices = range(first, min(first + own_size, len(dataset)))
    rng = np.random.default_rng([SAMPLE_STREAM, first])
    pixels = np.zeros((own_size, *size, dataset.channels), np.float32)
    samples = [
        make_sample(dataset, index, rng, None, size, interpolation, layout, place)
        for index, place in zip(indices, pixels, strict=False)
    ]
    return Parts(pixels, tuple(samples), tuple(indices))


def make_sample(
    dataset: coco.CocoDataset,
    index: int,
    rng: np.random.Generator,
    augmentation: transforms.Augmentation | None,
    size: Size,
    interpolation: str,
    layout: examples.Layout,
    out: np.ndarray | None = None,
    own_transforms: Sequence[transforms.Transform] = (),
) -> examples.Sample:
    """Decode, augment (unless for evaluation) and resize the image at a position of the data set.

    Of more than `max_instances` objects a random choice stays. `out` is the image's place in a batch. Errors name
    the image file.
    """
    try:
        example = apply_transforms(examples.load_example(dataset, index), rng, own_transforms)
        if augmentation is not None:
            example = _paste_from_another(example, dataset, rng, augmentation)
            example = transforms.augment(example, rng, augmentation)
        example, num_dropped = transforms.limit_objects(example, rng, max_instances=layout.max_instances)
        sample = examples.finish(example, size, interpolation, layout, out)
        return dataclasses.replace(sample, num_dropped=num_dropped)
    except Exception as error:
        path = str(dataset.image_path(index))
        if path in str(error):
            raise
        raise RuntimeError(f"{path!r} can't be made a sample: {error}") from error


def apply_transforms(
    example: examples.Example, rng: np.random.Generator, own_transforms: Sequence[transforms.Transform]
) -> examples.Example:
    """Put an example through transforms of one's own. Raises ValueError where one returns something else."""
    for transform in own_transforms:
        example = transform(example, rng)
        if not isinstance(example, examples.Example):
            raise ValueError(f"the transform {quote(transform)} returned {type(example).__name__}, not an Example")
    return example


def _paste_from_another(
    example: examples.Example,
    dataset: coco.CocoDataset,
    rng: np.random.Generator,
    augmentation: transforms.Augmentation,
) -> examples.Example:
    """Paste objects of a picture that is drawn from the data set, with the probability of the augmentation."""
    probability = augmentation.copy_paste_probability
    if probability == 0 or rng.random() >= probability:
        return example
    donor = examples.load_example(dataset, int(rng.integers(len(dataset))))
    return copy_paste.paste_objects(
        example,
        donor,
        rng,
        max_objects=augmentation.copy_paste_max_objects,
        scale_range=augmentation.copy_paste_scale,
    )


def collate(parts: Parts, layout: examples.Layout) -> Batch:
    """Put targets into arrays of static shape; places beyond the samples are not valid and have the index -1."""
    batch_size, height, width, _ = parts.pixels.shape
    size, slots = (height, width), layout.max_instances
    image_index = np.full(batch_size, -1, np.int32)
    original_sizes = np.ones((batch_size, 2), np.int32)
    content_sizes = np.tile(np.array(size, np.int32), (batch_size, 1))
    labels = np.zeros((batch_size, slots), np.int32)
    boxes = np.zeros((batch_size, slots, 4), np.float32)
    masks = np.zeros((batch_size, slots, height // layout.mask_stride, width // layout.mask_stride), np.uint8)
    valid = np.zeros((batch_size, slots), bool)
    for i, (sample, index) in enumerate(zip(parts.samples, parts.indices, strict=True)):
        n = len(sample.labels)
        image_index[i] = index
        original_sizes[i] = sample.original_size
        content_sizes[i] = sample.content_size
        labels[i, :n] = sample.labels
        boxes[i, :n] = sample.boxes
        masks[i, :n] = sample.masks
        valid[i, :n] = True
    return Batch(
        images=parts.pixels,
        targets=Targets(labels=labels, boxes=boxes, masks=masks, valid=valid),
        image_valid=np.arange(batch_size) < len(parts.samples),
        image_index=image_index,
        original_sizes=original_sizes,
        content_sizes=content_sizes,
    )


def count(samples: Sequence[examples.Sample]) -> collections.Counter[str]:
    """How many images, objects and dropped objects there are in samples."""
    return collections.Counter(
        images=len(samples),
        objects=sum(len(sample.labels) for sample in samples),
        dropped_objects=sum(sample.num_dropped for sample in samples),
    )
