"""Batches of static shape from a data set: training without end, evaluation once through.

What a batch holds is a function of (seed, step) alone, so training resumes at any step and every host
of several builds its own slice of the same global batch. Batches are made ahead by threads, which on
two cores were measured twice as fast as processes.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import cv2
import numpy as np
from ml_collections import ConfigDict

from instseg_jax import images
from instseg_jax.data import coco, examples, transforms
from instseg_jax.types import Batch, Targets

Size = tuple[int, int]
Item = TypeVar("Item")
Result = TypeVar("Result")
Batches = Generator[Batch, None, None]

# Streams of random numbers: default_rng([seed, stream, ...]).
ORDER_STREAM, BATCH_STREAM, SAMPLE_STREAM = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Loader:
    """A data set with the way to batch it.

    `batches()` iterates; for training `batches(start_step=k)` goes on where step k would be.
    `num_batches` is one epoch. `counters` adds up, over what was handed out, "images", "objects" and
    "dropped_objects" (those beyond max_instances).
    """

    dataset: coco.CocoDataset
    num_batches: int
    counters: collections.Counter[str]
    batches: Callable[..., Batches]


def build_train_loader(
    config: ConfigDict, dataset: coco.CocoDataset, *, process_index: int = 0, process_count: int = 1
) -> Loader:
    """Build the training loader of a config; objects and images that can't be trained on are left out.

    Raises ValueError when no image is left or a field of the config is out of range.
    """
    data = config.data
    dataset = coco.select_trainable(dataset, keep_empty=data.keep_empty)
    counters: collections.Counter[str] = collections.Counter()

    def batches(start_step: int = 0) -> Batches:
        return train_batches(
            dataset,
            seed=config.seed,
            start_step=start_step,
            batch_size=config.train.batch_size,
            sizes=[_as_size(size, data.mask_stride) for size in data.train_sizes],
            interpolations=tuple(data.interpolations),
            augmentation=transforms.Augmentation(**data.augment),
            layout=_build_layout(config, data.max_instances),
            num_workers=data.num_workers,
            prefetch=data.prefetch,
            counters=counters,
            process_index=process_index,
            process_count=process_count,
        )

    batches()  # checks the arguments; no work starts before the first batch is asked for
    return Loader(dataset, steps_per_epoch(len(dataset), config.train.batch_size), counters, batches)


def build_eval_loader(
    config: ConfigDict,
    dataset: coco.CocoDataset,
    *,
    use_targets: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Build the evaluation loader of a config: every image once, in order.

    Targets are empty ([B, 0, ...]) unless `use_targets`; they then leave out crowds, as in training.
    """
    data = config.data
    counters: collections.Counter[str] = collections.Counter()
    if use_targets:
        shown = coco.select_trainable(dataset, keep_empty=True)
    else:
        shown = dataclasses.replace(dataset, annotations=((),) * len(dataset))

    def batches() -> Batches:
        return eval_batches(
            shown,
            batch_size=config.eval.batch_size,
            size=_as_size(data.image_size, data.mask_stride),
            interpolation=data.eval_interpolation,
            layout=_build_layout(config, data.max_instances if use_targets else 0),
            num_workers=data.num_workers,
            prefetch=data.prefetch,
            counters=counters,
            process_index=process_index,
            process_count=process_count,
        )

    batches()
    return Loader(dataset, math.ceil(len(dataset) / config.eval.batch_size), counters, batches)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in an epoch; a data set smaller than one batch makes one, with repeats."""
    return max(1, num_images // batch_size)


def train_batches(
    dataset: coco.CocoDataset,
    *,
    seed: int,
    start_step: int,
    batch_size: int,
    sizes: Sequence[Size],
    interpolations: Sequence[str],
    augmentation: transforms.Augmentation,
    layout: examples.Layout,
    num_workers: int,
    prefetch: int,
    counters: collections.Counter[str],
    process_index: int,
    process_count: int,
) -> Batches:
    """Yield batches from step `start_step` on, without end; batch_size is that of all hosts together.

    Each epoch is a permutation of (seed, epoch) without its incomplete last batch. Size and
    interpolation are drawn once a batch, from (seed, step).
    """
    _check_loading(dataset, batch_size, interpolations, num_workers, prefetch, process_index, process_count)
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must not be negative, got {seed} and {start_step}.")
    own = slice(process_index * batch_size // process_count, (process_index + 1) * batch_size // process_count)

    def make_batch(step: int) -> tuple[Batch, collections.Counter[str]]:
        rng = np.random.default_rng([seed, BATCH_STREAM, step])
        size = sizes[int(rng.integers(len(sizes)))]
        interpolation = interpolations[int(rng.integers(len(interpolations)))]
        epoch, entries = batch_entries(len(dataset), batch_size, seed=seed, step=step)
        pixels = np.empty((own.stop - own.start, *size, 3), np.float32)
        samples = []
        for (index, repeat), place in zip(entries[own], pixels, strict=True):
            sample_rng = np.random.default_rng([seed, SAMPLE_STREAM, epoch, index, repeat])
            samples.append(make_sample(dataset, index, sample_rng, augmentation, size, interpolation, layout, place))
        return collate(samples, [index for index, _ in entries[own]], pixels, layout), _count(samples)

    return _yield_batches(make_batch, itertools.count(start_step), num_workers, prefetch, counters)


def eval_batches(
    dataset: coco.CocoDataset,
    *,
    batch_size: int,
    size: Size,
    interpolation: str,
    layout: examples.Layout,
    num_workers: int,
    prefetch: int,
    counters: collections.Counter[str],
    process_index: int,
    process_count: int,
) -> Batches:
    """Yield every image once, in order; the last batch is filled up with entries that are not valid.

    With several hosts each yields its slice of every global batch, equally many batches on all.
    """
    _check_loading(dataset, batch_size, [interpolation], num_workers, prefetch, process_index, process_count)
    own_size = batch_size // process_count

    def make_batch(start: int) -> tuple[Batch, collections.Counter[str]]:
        first = start + process_index * own_size
        indices = range(first, min(first + own_size, len(dataset)))
        rng = np.random.default_rng([SAMPLE_STREAM, first])
        pixels = np.zeros((own_size, *size, 3), np.float32)
        samples = [
            make_sample(dataset, index, rng, None, size, interpolation, layout, place)
            for index, place in zip(indices, pixels, strict=False)
        ]
        return collate(samples, indices, pixels, layout), _count(samples)

    return _yield_batches(make_batch, range(0, len(dataset), batch_size), num_workers, prefetch, counters)


def batch_entries(num_images: int, batch_size: int, *, seed: int, step: int) -> tuple[int, list[tuple[int, int]]]:
    """Epoch of a step, and the (image index, repeat) of each place of its global batch.

    The repeat is 0 unless the data set is smaller than the batch: then it tells copies of an image apart.
    """
    per_epoch = steps_per_epoch(num_images, batch_size)
    epoch, position = divmod(step, per_epoch)
    entries = []
    for repeat in range(math.ceil(batch_size / num_images)):
        order = np.random.default_rng([seed, ORDER_STREAM, epoch, repeat]).permutation(num_images)
        entries += [(int(index), repeat) for index in order[position * batch_size : (position + 1) * batch_size]]
    return epoch, entries[:batch_size]


def make_sample(
    dataset: coco.CocoDataset,
    index: int,
    rng: np.random.Generator,
    augmentation: transforms.Augmentation | None,
    size: Size,
    interpolation: str,
    layout: examples.Layout,
    out: np.ndarray | None = None,
) -> examples.Sample:
    """Decode, augment (unless for evaluation) and resize the image at a position of the data set.

    Of more than `max_instances` objects a random choice stays. `out` is the image's place in a batch. Errors name
    the image file.
    """
    try:
        example = examples.load_example(dataset, index)
        if augmentation is not None:
            example = transforms.augment(example, rng, augmentation)
        example, num_dropped = transforms.limit_objects(example, rng, max_instances=layout.max_instances)
        sample = examples.finish(example, size, interpolation, layout, out)
        return dataclasses.replace(sample, num_dropped=num_dropped)
    except Exception as error:
        path = str(dataset.image_path(index))
        if path in str(error):
            raise
        raise RuntimeError(f"{path!r} can't be made a sample: {error}") from error


def collate(
    samples: Sequence[examples.Sample], indices: Sequence[int], pixels: np.ndarray, layout: examples.Layout
) -> Batch:
    """Put samples into arrays of static shape; places beyond them are not valid and have the index -1.

    `pixels` [B, H, W, 3] holds the samples' images already.
    """
    batch_size, height, width, _ = pixels.shape
    size, slots = (height, width), layout.max_instances
    image_index = np.full(batch_size, -1, np.int32)
    original_sizes = np.ones((batch_size, 2), np.int32)
    content_sizes = np.tile(np.array(size, np.int32), (batch_size, 1))
    labels = np.zeros((batch_size, slots), np.int32)
    boxes = np.zeros((batch_size, slots, 4), np.float32)
    masks = np.zeros((batch_size, slots, height // layout.mask_stride, width // layout.mask_stride), np.uint8)
    valid = np.zeros((batch_size, slots), bool)
    for i, (sample, index) in enumerate(zip(samples, indices, strict=True)):
        n = len(sample.labels)
        image_index[i] = index
        original_sizes[i] = sample.original_size
        content_sizes[i] = sample.content_size
        labels[i, :n] = sample.labels
        boxes[i, :n] = sample.boxes
        masks[i, :n] = sample.masks
        valid[i, :n] = True
    return Batch(
        images=pixels,
        targets=Targets(labels=labels, boxes=boxes, masks=masks, valid=valid),
        image_valid=np.arange(batch_size) < len(samples),
        image_index=image_index,
        original_sizes=original_sizes,
        content_sizes=content_sizes,
    )


def prefetch_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, prefetch: int
) -> Generator[Result, None, None]:
    """Yield function(item) in order; `num_workers` threads work on up to `prefetch` items ahead.

    With no workers it computes inline. An error is raised where its result would have been yielded.
    Closing the iterator ends the threads.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    items = iter(items)
    pending: collections.deque[Future] = collections.deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader")
    try:
        for item in itertools.islice(items, prefetch):
            pending.append(pool.submit(function, item))
        while pending:
            result = pending.popleft().result()
            for item in itertools.islice(items, 1):
                pending.append(pool.submit(function, item))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _yield_batches(
    make_batch: Callable[[int], tuple[Batch, collections.Counter[str]]],
    items: Iterable[int],
    num_workers: int,
    prefetch: int,
    counters: collections.Counter[str],
) -> Batches:
    cv2.setNumThreads(0)  # the threads here are ours: OpenCV's own would compete with them for the cores
    for batch, counts in prefetch_map(make_batch, items, num_workers=num_workers, prefetch=prefetch):
        counters.update(counts)
        yield batch


def _count(samples: Sequence[examples.Sample]) -> collections.Counter[str]:
    return collections.Counter(
        images=len(samples),
        objects=sum(len(sample.labels) for sample in samples),
        dropped_objects=sum(sample.num_dropped for sample in samples),
    )


def _build_layout(config: ConfigDict, max_instances: int) -> examples.Layout:
    data = config.data
    return examples.Layout(
        resize=data.resize,
        mask_stride=data.mask_stride,
        mask_rasterization=data.mask_rasterization,
        refit_boxes=data.refit_boxes,
        max_instances=max_instances,
    )


def _as_size(size: int | Sequence[int], mask_stride: int) -> Size:
    """(height, width) of a config's size, which is one number for a square or a pair."""
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if min(height, width) < 1 or height % mask_stride or width % mask_stride:
        raise ValueError(f"An image size must be a multiple of data.mask_stride = {mask_stride}, got {size!r}.")
    return int(height), int(width)


def _check_loading(
    dataset: coco.CocoDataset,
    batch_size: int,
    interpolations: Sequence[str],
    num_workers: int,
    prefetch: int,
    process_index: int,
    process_count: int,
) -> None:
    if not len(dataset):
        raise ValueError(f"{dataset.name} has no image to load.")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"The batch size must be a multiple of the {process_count} hosts, got {batch_size}.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"The host must be one of 0..{process_count - 1}, got {process_index}.")
    if num_workers < 0 or prefetch < 1:
        raise ValueError(f"data.num_workers must be >= 0 and data.prefetch >= 1, got {num_workers} and {prefetch}.")
    for name in interpolations:
        if name not in images.INTERPOLATIONS:
            raise ValueError(f"An interpolation must be one of {', '.join(images.INTERPOLATIONS)}, got {name!r}.")
