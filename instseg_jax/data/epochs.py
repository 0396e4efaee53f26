"""Which images each training step shows: a function of (seed, step) alone, the same on every host."""

import dataclasses
import math

import numpy as np

from instseg_jax.data import coco
from instseg_jax.messages import quote

ORDER_STREAM = 1  # of random numbers: default_rng([seed, stream, ...]); the loader has others


@dataclasses.dataclass(frozen=True)
class Pool:
    """Which images an epoch is made of: all with objects, and some of those without."""

    with_objects: np.ndarray  # positions in the data set
    without: np.ndarray
    num_without: int  # of them are drawn in each epoch

    @property
    def size(self) -> int:
        """Images in an epoch."""
        return len(self.with_objects) + self.num_without

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The images of an epoch in random order: positions in the data set."""
        drawn = self.without
        if self.num_without < len(drawn):
            drawn = rng.choice(drawn, self.num_without, replace=False)
        return rng.permutation(np.sort(np.concatenate([self.with_objects, drawn])))


def make_pool(dataset: coco.CocoDataset, empty_share: float | None) -> Pool:
    """Choose how many images without objects an epoch has: `empty_share` of its images, as far as there are so many.

    None takes all that the data set has. Raises ValueError for a share outside 0..1.
    """
    if empty_share is not None and not 0 <= empty_share < 1:
        raise ValueError(f"data.empty_share must be None or between 0 and 1, got {quote(empty_share)}.")
    is_empty = np.array([not objects for objects in dataset.annotations], bool)
    with_objects, without = np.flatnonzero(~is_empty), np.flatnonzero(is_empty)
    wanted = len(without) if empty_share is None else round(len(with_objects) * empty_share / (1 - empty_share))
    return Pool(with_objects, without, min(wanted, len(without)))


def batch_entries(pool: Pool, batch_size: int, *, seed: int, step: int) -> tuple[int, list[tuple[int, int]]]:
    """Epoch of a step, and the (image index, repeat) of each place of its global batch.

    The repeat is 0 unless an epoch is smaller than the batch: then it tells copies of an image apart.
    """
    per_epoch = steps_per_epoch(pool.size, batch_size)
    epoch, position = divmod(step, per_epoch)
    entries = []
    for repeat in range(math.ceil(batch_size / pool.size)):
        order = pool.order(np.random.default_rng([seed, ORDER_STREAM, epoch, repeat]))
        entries += [(int(index), repeat) for index in order[position * batch_size : (position + 1) * batch_size]]
    return epoch, entries[:batch_size]


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in an epoch; a data set smaller than one batch makes one, with repeats."""
    return max(1, num_images // batch_size)
