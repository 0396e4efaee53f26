"""Pictures: reading (by the rules of `pixels.py`), and resizing to the network's input."""

import pathlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from instseg_jax.bands import Bands
from instseg_jax.files import read_regular
from instseg_jax.messages import quote
from instseg_jax.pixels import decode, to_uint8

UNIT = 1 / 255  # of 8-bit pixels
GROUP = 4  # channels that all functions of OpenCV work on at once
INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}

WRITTEN_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IMAGE_SUFFIXES = (*WRITTEN_SUFFIXES, ".avif")  # that are read; AVIF by Pillow of at least 11.3

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


def read_image(path: str | Path, bands: Bands | None = None) -> np.ndarray:
    """Read a file to uint8 [h, w, C], turned as its EXIF orientation says; without `bands` to 8-bit RGB.

    Raises FileNotFoundError or, when the file is no readable picture or of other bands, ValueError.
    """
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image {str(path)!r}.") from None
    return decode_image(data, str(path), bands)


def decode_image(data: bytes, name: str, bands: Bands | None = None) -> np.ndarray:
    """Decode the bytes of a file as `read_image` does; ValueError that says `name` when they are no picture."""
    return to_pixels(decode(data, name, is_color=bands is None), bands, repr(name))


def to_pixels(array: np.ndarray, bands: Bands | None, what: str = "An image", *, order: str = "rgb") -> np.ndarray:
    """Bring an array of pixels to uint8 [h, w, C] by the rules of `pixels.to_uint8`, without `bands` to 8-bit RGB.

    `order` is "rgb" or "bgr", that of OpenCV. Raises ValueError that begins with `what`.
    """
    if order not in ("rgb", "bgr"):
        raise ValueError(f"channels must be 'rgb' or 'bgr', got {quote(order)}.")
    channels, ranges = (3, None) if bands is None else (bands.channels, bands.ranges)
    return to_uint8(np.asarray(array), what, channels=channels, ranges=ranges, is_bgr=order == "bgr")


def content_size(view_size: tuple[int, int], size: tuple[int, int], resize: str) -> tuple[int, int]:
    """(height, width) that a picture fills of the network input: all of it stretched, its shape letterboxed."""
    if resize == "stretch":
        return size
    scale = min(size[0] / view_size[0], size[1] / view_size[1])
    height, width = (min(s, max(1, int(v * scale + 0.5))) for v, s in zip(view_size, size, strict=True))
    return height, width


def resize_pixels(
    pixels: np.ndarray,
    content: tuple[int, int],
    size: tuple[int, int],
    interpolation: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resize [h, w, C] to the content size and put it into the top left of a black float32 [H, W, C] in 0..1.

    uint8 pixels are resized as uint8, rounded and saturated. float32 pixels may leave 0..1 a little
    with cubic and lanczos. `out` is where the result goes, a place in a batch for instance.
    """
    height, width = content
    flag = INTERPOLATIONS[interpolation]
    resized = in_groups(lambda x: cv2.resize(x, (width, height), interpolation=flag), pixels)
    network_input = np.empty((*size, pixels.shape[2]), np.float32) if out is None else out
    network_input[height:] = 0
    network_input[:, width:] = 0
    _scale_to_unit(resized, network_input[:height, :width])
    return network_input


def _scale_to_unit(pixels: np.ndarray, out: np.ndarray) -> None:
    """Write pixels [h, w, C] of 0..255 to `out` float32 as 0..1."""
    if pixels.dtype == np.uint8:  # np.multiply converts in small blocks first: OpenCV needs two thirds of its time
        cv2.addWeighted(pixels, UNIT, pixels, 0, 0, dst=out, dtype=cv2.CV_32F)
    else:
        np.multiply(pixels, UNIT, out=out)


def in_groups(function: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """Apply a function of OpenCV to pixels [h, w, C], no more than four channels at once."""
    if pixels.shape[2] <= GROUP:
        done = function(pixels)
        return done[..., None] if done.ndim == 2 else done
    starts = range(0, pixels.shape[2], GROUP)
    return np.concatenate(
        [in_groups(function, np.ascontiguousarray(pixels[..., start : start + GROUP])) for start in starts], axis=2
    )


def preprocess(
    image: np.ndarray, size: tuple[int, int], *, resize: str, interpolation: str
) -> tuple[np.ndarray, tuple[int, int]]:
    """Bring a picture [h, w, 3] uint8 RGB to the network's input `size` (height, width).

    Returns: the input [H, W, 3] float32 in 0..1, and the (height, width) of it that the picture fills.
    "stretch" with "cubic" is the reference's preprocessing for evaluation.
    """
    content = content_size(image.shape[:2], size, resize)
    return resize_pixels(image, content, size, interpolation), content


def is_video(path: str | pathlib.Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return pathlib.PurePath(path).suffix.lower() in VIDEO_SUFFIXES
