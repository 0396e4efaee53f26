"""What every exported model takes and gives, whatever its format.

    images      [B, H, W, C] float32, 0..1; C = 3: RGB
    scores      [B, T] float32, falling
    labels      [B, T] int32, class index
    boxes_xyxy  [B, T, 4] float32, normalised corners, not clipped
    mask_logits [B, T, H/4, W/4] float32

Weights are inside the file: there is nothing that could get lost or mixed up, and compilers fold what follows from
them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from instseg_jax.messages import quote

INPUT = "images"
OUTPUTS = ("scores", "labels", "boxes_xyxy", "mask_logits")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of what a file takes."""

    batch: int
    size: tuple[int, int]  # (height, width) of the input in pixels, multiples of 32
    channels: int
    dynamic_batch: bool

    @property
    def images(self) -> tuple[int | None, int, int, int]:
        """[B, H, W, C]; B is None where any number of images goes."""
        return (None if self.dynamic_batch else self.batch, *self.size, self.channels)


def describe(name: str, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
    """An input or output as config.json says it; a length that is not fixed is "batch"."""
    lengths = [side if isinstance(side, int) and side > 0 else "batch" for side in shape]
    return {"name": name, "shape": lengths, "dtype": str(np.dtype(dtype))}


def check_cpu(device: str, runtime: str) -> None:
    """Raise ValueError where `device` names something else than the CPU, for a runtime that runs there alone."""
    if device.split(":")[0] not in ("auto", "cpu"):
        raise ValueError(f"device is {quote(device)}, but {runtime} runs on the CPU here")
