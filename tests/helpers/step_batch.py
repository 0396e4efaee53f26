"""A batch and a network for single training steps."""

import numpy as np

from instseg_jax.types import Batch, Targets

SIZE, SLOTS, CLASSES = 64, 3, 3
TINY = {
    "model.num_queries": "8",
    "model.num_decoder_layers": "1",
    "denoising.num_denoising": "4",
    "loss.num_points": "32",
    "optimizer.warmup_steps": "0",
}


def make_batch(counts: tuple[int, ...]) -> Batch:
    """Images with that many rectangles; slots beyond them hold an object that is not valid."""
    rng = np.random.default_rng(0)
    batch = len(counts)
    labels = rng.integers(0, CLASSES, (batch, SLOTS)).astype(np.int32)
    boxes = np.tile(np.array([0.5, 0.375, 0.5, 0.25], np.float32), (batch, SLOTS, 1))
    masks = np.zeros((batch, SLOTS, SIZE, SIZE), np.uint8)
    masks[:, :, 16:32, 16:48] = 1
    valid = np.arange(SLOTS) < np.array(counts)[:, None]
    sizes = np.full((batch, 2), SIZE, np.int32)
    index = np.arange(batch, dtype=np.int32)
    images = rng.random((batch, SIZE, SIZE, 3), np.float32)
    return Batch(images, Targets(labels, boxes, masks, valid), index >= 0, index, sizes, sizes)
