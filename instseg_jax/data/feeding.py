"""Data for training loops of one's own: the data set that a config names, and batches of it or of a stream."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from instseg_jax.config import as_config
from instseg_jax.data.coco import CocoDataset
from instseg_jax.data.loader import build_eval_loader, build_stream, build_train_loader
from instseg_jax.data.source import build_dataset
from instseg_jax.data.transforms import Transform
from instseg_jax.types import Batch


def read_data(config: ConfigDict | str | os.PathLike[str], split: str = "train") -> CocoDataset:
    """Read the data set that a config names.

    Args:
      config: or the name of one; its section `data` is read.
      split: train or val.

    Returns: the data set, no picture read yet; `len(dataset)`, `dataset.categories`, `dataset.read_image(index)`.

    Raises: ValueError or FileNotFoundError in one sentence for data that are not there or can't be read.
    """
    return build_dataset(as_config(config).data, split)


def load_batches(
    config: ConfigDict | str | os.PathLike[str],
    dataset: CocoDataset,
    *,
    train: bool = True,
    transforms: Sequence[Transform] = (),
) -> Iterator[Batch]:
    """Batches of a data set, made ahead of time, as training or evaluation gets them.

    Args:
      config: or the name of one: batch sizes, sizes, augmentation, layout.
      dataset: from `read_data` or `own_data`.
      train: True: shuffled anew each epoch, augmented, without end. False: every picture once, in order, as it is; a
        last part is filled up, where `image_valid` is False.
      transforms: functions (example, rng) -> example, before the augmentation of the config; for training only.

    Returns: an iterator; `close()` ends its workers.

    Raises: ValueError for fields of the config that are out of range, or transforms where there is no training.
    """
    if train:
        return build_train_loader(as_config(config), dataset, own_transforms=transforms).batches()
    if transforms:
        raise ValueError(f"transforms has {len(transforms)} functions, but train=False shows pictures as they are")
    return build_eval_loader(as_config(config), dataset, use_targets=True).batches()


def batches(
    items: Iterable[Mapping[str, Any]],
    settings: ConfigDict | str | os.PathLike[str],
    *,
    num_classes: int,
    transforms: Sequence[Transform] = (),
    seed: int = 0,
) -> Iterator[Batch]:
    """Batches for `losses` and `make_train_step` from any iterable of items; no work is done ahead.

    Args:
      items: mappings with image, labels, and masks or segmentations, as `own_data` takes them: a list, a generator,
        `tf_dataset.as_numpy_iterator()`, or a PyTorch DataLoader with batch_size=None.
      settings: config, or the name of one: batch size, layout and slots; the size is data.image_size.
      num_classes: K; labels are below it.
      transforms: functions (example, rng) -> example, applied in this order.
      seed: of what the transforms draw.

    Returns: an iterator, as long as `items`; a last part that fills no batch is left out.

    Raises: ValueError that names the item, for one that lacks something or does not fit together.
    """
    return build_stream(as_config(settings), items, num_classes=num_classes, own_transforms=transforms, seed=seed)
