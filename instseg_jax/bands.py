"""Pictures that are not 8-bit colour: any number of channels, 16 bits, floats; brought to uint8 everywhere alike.

A channel's range (low, high) becomes 0..255, linearly, and what lies beyond is cut. Ranges are percentiles of the
training pictures; they stand in the config (`data.channel_ranges`), so a checkpoint carries them. Files are what
OpenCV decodes, numpy's .npy of [height, width] or [height, width, channels], and TIFFs (extra `geo`).
"""

import dataclasses
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from ml_collections import ConfigDict

from instseg_jax.files import read_regular
from instseg_jax.images import decode_image

SCALINGS = ("none", "percentile")
TIFF_MARKS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
JPEG_MARK, NUMPY_MARK = b"\xff\xd8", b"\x93NUMPY"
MAX_PICTURES = 200  # from which ranges are taken, evenly over the data set
MAX_SAMPLES = 1 << 14  # pixels of each of them


@dataclasses.dataclass(frozen=True)
class Bands:
    """How many channels pictures have, and the (low, high) of each that become 0 and 255; None: they are uint8."""

    channels: int
    ranges: tuple[tuple[float, float], ...] | None

    def __post_init__(self):
        if not isinstance(self.channels, int) or self.channels < 1:
            raise ValueError(f"data.channels must be a whole number of at least 1, got {self.channels!r}.")
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
        raise ValueError(f"data.scaling must be one of {', '.join(SCALINGS)}, got {data.scaling!r}.")
    if data.scaling == "none":
        return None if data.channels == 3 else Bands(data.channels, None)
    ranges = data.channel_ranges
    if ranges is None:
        raise ValueError("data.channel_ranges is None; training fills it in, a checkpoint holds it.")
    return Bands(data.channels, tuple((float(low), float(high)) for low, high in ranges))


def read_bands(path: str | Path, bands: Bands) -> np.ndarray:
    """Decode a file to uint8 [h, w, channels]. Raises FileNotFoundError or ValueError that names it."""
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image {str(path)!r}.") from None
    return decode_bands(data, bands, str(path))


def decode_bands(data: bytes, bands: Bands, name: str) -> np.ndarray:
    """Decode the bytes of a file to uint8 [h, w, channels]."""
    return scale_bands(decode_raw(data, bands.channels, name), bands, name)


def decode_raw(data: bytes, channels: int, name: str) -> np.ndarray:
    """Decode the bytes of a file to [h, w, channels] of whatever type its pixels have; colours are RGB.

    Raises: ValueError that says `name` for what can't be read or has another number of channels.
    """
    if data.startswith(JPEG_MARK) and channels == 3:
        return decode_image(data, name)  # turned as its EXIF orientation says
    if data.startswith(NUMPY_MARK):
        array = _load_numpy(data, name)
    elif data.startswith(TIFF_MARKS):
        array = _load_tiff(data, name)
    else:
        array = _load_picture(data, name)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] != channels:
        found = array.shape[2] if array.ndim == 3 else f"the shape {list(array.shape)} instead of"
        raise ValueError(f"{name!r} has {found} channels, data.channels is {channels}.")
    return array


def scale_bands(array: np.ndarray, bands: Bands, name: str) -> np.ndarray:
    """Bring pixels [h, w, channels] to uint8: each channel's range to 0..255.

    Raises: ValueError that says `name` for pixels that are not uint8 where there are no ranges.
    """
    if bands.ranges is None:
        if array.dtype != np.uint8:
            raise ValueError(f"{name!r} has pixels of {array.dtype}; set data.scaling=percentile to scale them.")
        return np.ascontiguousarray(array)
    low, high = np.array(bands.ranges, np.float32).T
    scaled = (array.astype(np.float32) - low) * (255 / np.maximum(high - low, np.finfo(np.float32).tiny))
    return np.rint(np.clip(np.nan_to_num(scaled), 0, 255)).astype(np.uint8)


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


def _load_numpy(data: bytes, name: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name!r} can't be read as an array: {error}.") from error
    if array.dtype.kind not in "uif":
        raise ValueError(f"{name!r} holds {array.dtype}, not numbers.")
    return array


def _load_tiff(data: bytes, name: str) -> np.ndarray:
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ImportError as error:
        raise ImportError('TIFFs of many channels need rasterio: pip install "instseg_jax[geo]".') from error
    try:
        with warnings.catch_warnings(), rasterio.MemoryFile(data) as memory:
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with memory.open(driver="GTiff") as file:
                return np.moveaxis(file.read(), 0, 2)
    except RasterioError as error:
        raise ValueError(f"{name!r} can't be read as a TIFF: {error}.") from error


def _load_picture(data: bytes, name: str) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    except cv2.error:
        image = None
    if image is None:
        raise ValueError(f"{name!r} can't be read as an image.")
    if image.ndim == 3 and image.shape[2] in (3, 4):  # OpenCV's order is blue, green, red
        image = image[..., [2, 1, 0, 3][: image.shape[2]]]
    return image
