"""Pictures that are not 8-bit colour: any number of channels, 16 bits, floats; brought to uint8 everywhere alike.

A channel's range (low, high) becomes 0..255, linearly, and what lies beyond is cut. Ranges are percentiles of the
training pictures; they stand in the config (`data.channel_ranges`), so a checkpoint carries them. Files are pictures
of any depth, numpy's .npy of [height, width] or [height, width, channels], and TIFFs; see `pixels.py`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from instseg_jax.messages import quote

SCALINGS = ("none", "percentile")
MAX_PICTURES = 200  # from which ranges are taken, evenly over the data set
MAX_SAMPLES = 1 << 14  # pixels of each of them


@dataclasses.dataclass(frozen=True)
class Bands:
    """How many channels pictures have, and the (low, high) of each that become 0 and 255; None: they are uint8."""

    channels: int
    ranges: tuple[tuple[float, float], ...] | None

    def __post_init__(self):
        if not isinstance(self.channels, int) or self.channels < 1:
            raise ValueError(f"data.channels must be a whole number of at least 1, got {quote(self.channels)}.")
        if self.ranges is not None and len(self.ranges) != self.channels:
            raise ValueError(
                f"data.channel_ranges holds {len(self.ranges)} ranges, but data.channels is {self.channels}."
            )


def build_bands(data: ConfigDict) -> Bands | None:
    """How pictures are read: None for 8-bit colour as it is.

    With data.scaling=percentile the ranges must stand in data.channel_ranges, where training puts them.

    Raises: ValueError for an unknown scaling, and for ranges that are not there yet.
    """
    if data.scaling not in SCALINGS:
        raise ValueError(f"data.scaling must be one of {', '.join(SCALINGS)}, got {quote(data.scaling)}.")
    if data.scaling == "none":
        return None if data.channels == 3 else Bands(data.channels, None)
    ranges = data.channel_ranges
    if ranges is None:
        raise ValueError("data.channel_ranges is None; training fills it in, a checkpoint holds it.")
    return Bands(data.channels, tuple((float(low), float(high)) for low, high in ranges))


def find_ranges(pictures: Sequence[np.ndarray], percentiles: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    """The percentiles of each channel over pictures [h, w, C]; equal ones are moved apart by one."""
    samples = []
    for array in pictures:
        pixels = array.reshape(-1, array.shape[2])
        samples.append(pixels[:: max(1, len(pixels) // MAX_SAMPLES)].astype(np.float64))
    lows, highs = np.nanpercentile(np.concatenate(samples), percentiles, axis=0)
    return tuple((float(low), float(high if high > low else low + 1)) for low, high in zip(lows, highs, strict=True))


def show_bands(image: np.ndarray) -> np.ndarray:
    """A picture [h, w, C] uint8 as RGB to look at: the first three channels, or the first one in grey."""
    return np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2))
