"""Batches of static shape from a data set: training without end, evaluation once through.

What a batch holds is a function of (seed, step) alone, so training resumes at any step and every host
of several builds its own slice of the same global batch (`data/batches.py`). Batches are made ahead by threads or by
processes; on two cores threads were measured twice as fast.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import cv2
from ml_collections import ConfigDict

from instseg_jax import images
from instseg_jax.data import coco, examples, transforms
from instseg_jax.data.batches import Parts, Recipe, Size, collate, count, eval_parts, train_parts
from instseg_jax.data.epochs import Pool, make_pool, steps_per_epoch
from instseg_jax.data.own import stream_batches
from instseg_jax.data.prefetch import prefetch_map
from instseg_jax.messages import quote
from instseg_jax.types import Batch

Batches = Generator[Batch, None, None]


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who makes batches ahead."""

    num_workers: int  # 0: nobody, the caller does
    prefetch: int  # batches that are made ahead at most
    use_processes: bool  # instead of threads


@dataclasses.dataclass(frozen=True)
class Share:
    """Which host of several this is: each makes its own part of every batch."""

    index: int
    count: int


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
    config: ConfigDict,
    dataset: coco.CocoDataset,
    *,
    own_transforms: Sequence[transforms.Transform] = (),
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Build the training loader of a config; objects and images that can't be trained on are left out.

    `own_transforms` are applied to every decoded picture with its objects, before the augmentation of the config.

    Raises ValueError when no image is left or a field of the config is out of range.
    """
    data = config.data
    whole = dataset
    dataset = coco.select_trainable(whole, keep_empty=data.keep_empty or data.empty_share is not None)
    if len(whole) and not len(dataset):
        kinds = f"none of its {len(whole)} images has an object to train on"
        raise ValueError(f"{whole.annotation_file} has no image to load: {kinds}")
    pool = make_pool(dataset, data.empty_share)
    counters: collections.Counter[str] = collections.Counter()

    recipe = Recipe(
        seed=config.seed,
        batch_size=config.train.batch_size,
        sizes=train_sizes(config),
        interpolations=tuple(data.interpolations),
        augmentation=transforms.Augmentation(**data.augment),
        layout=build_layout(config, data.max_instances),
        own_transforms=tuple(own_transforms),
    )

    def batches(start_step: int = 0) -> Batches:
        return train_batches(
            dataset,
            recipe,
            pool=pool,
            start_step=start_step,
            workers=Workers(data.num_workers, data.prefetch, data.use_processes),
            share=Share(process_index, process_count),
            counters=counters,
        )

    batches()  # checks the arguments; no work starts before the first batch is asked for
    return Loader(dataset, steps_per_epoch(pool.size, config.train.batch_size), counters, batches)


def build_eval_loader(
    config: ConfigDict,
    dataset: coco.CocoDataset,
    *,
    use_targets: bool = False,
    num_devices: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Build the evaluation loader of a config: every image once, in order.

    Targets are empty ([B, 0, ...]) unless `use_targets`; they then leave out crowds, as in training. The batch size
    is that of the config, raised to the next multiple of `num_devices`.
    """
    data = config.data
    batch_size = -(-config.eval.batch_size // num_devices) * num_devices
    counters: collections.Counter[str] = collections.Counter()
    if use_targets:
        shown = coco.select_trainable(dataset, keep_empty=True)
    else:
        shown = dataclasses.replace(dataset, annotations=((),) * len(dataset))

    def batches() -> Batches:
        return eval_batches(
            shown,
            batch_size=batch_size,
            size=_as_size(data.image_size, data.mask_stride),
            interpolation=data.eval_interpolation,
            layout=build_layout(config, data.max_instances if use_targets else 0),
            workers=Workers(data.num_workers, data.prefetch, data.use_processes),
            share=Share(process_index, process_count),
            counters=counters,
        )

    batches()
    return Loader(dataset, math.ceil(len(dataset) / batch_size), counters, batches)


def build_stream(
    config: ConfigDict,
    items: Iterable[Mapping[str, Any]],
    *,
    num_classes: int,
    own_transforms: Sequence[transforms.Transform],
    seed: int,
) -> Iterator[Batch]:
    """Batches of data.image_size from a stream of items; see `own.stream_batches`."""
    data = config.data
    return stream_batches(
        items,
        batch_size=config.train.batch_size,
        num_classes=num_classes,
        size=_as_size(data.image_size, data.mask_stride),
        interpolation=data.eval_interpolation,
        layout=build_layout(config, data.max_instances),
        own_transforms=own_transforms,
        seed=seed,
    )


def train_batches(
    dataset: coco.CocoDataset,
    recipe: Recipe,
    *,
    pool: Pool,
    start_step: int,
    workers: Workers,
    share: Share,
    counters: collections.Counter[str],
) -> Batches:
    """Yield batches from step `start_step` on, without end.

    Each epoch is a permutation of (seed, epoch) without its incomplete last batch. Size and
    interpolation are drawn once a batch, from (seed, step).

    Raises: ValueError for a negative seed or start_step; errors of a picture name its file.
    """
    _check_loading(dataset, recipe.batch_size, recipe.interpolations, workers, share)
    if recipe.seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must not be negative, got {recipe.seed} and {start_step}.")
    own = slice(*((share.index + i) * recipe.batch_size // share.count for i in (0, 1)))
    make_parts = functools.partial(train_parts, dataset=dataset, pool=pool, own=own, recipe=recipe)
    return _yield_batches(make_parts, itertools.count(start_step), recipe.layout, workers, counters)


def eval_batches(
    dataset: coco.CocoDataset,
    *,
    batch_size: int,
    size: Size,
    interpolation: str,
    layout: examples.Layout,
    workers: Workers,
    share: Share,
    counters: collections.Counter[str],
) -> Batches:
    """Yield every image once, in order; the last batch is filled up with entries that are not valid.

    With several hosts each yields its slice of every global batch, equally many batches on all.
    """
    _check_loading(dataset, batch_size, [interpolation], workers, share)
    own_size = batch_size // share.count
    make_parts = functools.partial(
        eval_parts,
        dataset=dataset,
        offset=share.index * own_size,
        own_size=own_size,
        size=size,
        interpolation=interpolation,
        layout=layout,
    )
    starts = range(0, len(dataset), batch_size)
    return _yield_batches(make_parts, starts, layout, workers, counters)


def _yield_batches(
    make_parts: Callable[[int], Parts],
    items: Iterable[int],
    layout: examples.Layout,
    workers: Workers,
    counters: collections.Counter[str],
) -> Batches:
    cv2.setNumThreads(0)  # the workers here are ours: OpenCV's own threads would compete with them for the cores

    def finish(parts: Parts) -> tuple[Batch, collections.Counter[str]]:
        return collate(parts, layout), count(parts.samples)

    if workers.use_processes and workers.num_workers:  # only what there is crosses over; unused slots are added here
        parts = prefetch_map(make_parts, items, **dataclasses.asdict(workers))
        ahead = (finish(made) for made in parts)
        closing = parts.close
    else:
        ahead = prefetch_map(
            lambda item: finish(make_parts(item)),
            items,
            num_workers=workers.num_workers,
            prefetch=workers.prefetch,
            use_processes=False,
        )
        closing = ahead.close
    try:
        for batch, counts in ahead:
            counters.update(counts)
            yield batch
    finally:
        closing()


def build_layout(config: ConfigDict, max_instances: int) -> examples.Layout:
    """How a config lays out samples, with a number of target slots."""
    data = config.data
    return examples.Layout(
        resize=data.resize,
        mask_stride=data.mask_stride,
        mask_rasterization=data.mask_rasterization,
        refit_boxes=data.refit_boxes,
        max_instances=max_instances,
        drop_empty_masks=bool(data.drop_empty_masks),
    )


def train_sizes(config: ConfigDict) -> tuple[Size, ...]:
    """(height, width) of the network inputs that a config trains at."""
    return tuple(_as_size(size, config.data.mask_stride) for size in config.data.train_sizes)


def _as_size(size: int | Sequence[int], mask_stride: int) -> Size:
    """(height, width) of a config's size, which is one number for a square or a pair."""
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if min(height, width) < 1 or height % mask_stride or width % mask_stride:
        raise ValueError(f"An image size must be a multiple of data.mask_stride = {mask_stride}, got {quote(size)}.")
    return int(height), int(width)


def _check_loading(
    dataset: coco.CocoDataset,
    batch_size: int,
    interpolations: Sequence[str],
    workers: Workers,
    share: Share,
) -> None:
    if not len(dataset):
        raise ValueError(coco.say_empty(dataset))
    if batch_size < 1 or batch_size % share.count:
        raise ValueError(f"The batch size must be a multiple of the {share.count} hosts, got {batch_size}.")
    if not 0 <= share.index < share.count:
        raise ValueError(f"The host must be one of 0..{share.count - 1}, got {share.index}.")
    if workers.num_workers < 0 or workers.prefetch < 1:
        raise ValueError(
            f"data.num_workers must be >= 0 and data.prefetch >= 1, got {workers.num_workers} and {workers.prefetch}."
        )
    for name in interpolations:
        if name not in images.INTERPOLATIONS:
            raise ValueError(f"An interpolation must be one of {', '.join(images.INTERPOLATIONS)}, got {quote(name)}.")
