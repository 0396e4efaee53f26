"""Pictures: decoding, and resizing to the network's input. Numpy and OpenCV only."""

import pathlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from instseg_jax.files import read_regular

UNIT = 1 / 255  # of 8-bit pixels
GROUP = 4  # channels that all functions of OpenCV work on at once
INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


def read_image(path: str | Path) -> np.ndarray:
    """Decode a picture to uint8 RGB [h, w, 3], turned as its EXIF orientation says.

    Raises FileNotFoundError or, when the file is no readable picture, ValueError.
    """
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image {str(path)!r}.") from None
    return decode_image(data, str(path))


def decode_image(data: bytes | np.ndarray, name: str) -> np.ndarray:
    """Decode the bytes of an image file as `read_image` does; ValueError that says `name` when they are none."""
    buffer = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB) if len(buffer) else None
    except cv2.error:  # more pixels than OpenCV takes
        image = None
    if image is None:
        raise ValueError(f"{name!r} can't be read as an image.")
    return image


def to_rgb(array: np.ndarray, *, channels: str) -> np.ndarray:
    """Bring an array of pixels to uint8 RGB [h, w, 3].

    It may be [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (whose alpha is left out), of uint8, uint16 (0..65535) or
    floats in 0..1. `channels` is "rgb" or "bgr", the order of OpenCV. Raises ValueError for anything else.
    """
    array = np.asarray(array)
    shape = list(array.shape)
    if channels not in ("rgb", "bgr"):
        raise ValueError(f"channels must be 'rgb' or 'bgr', got {channels!r}.")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"An image must be [height, width, 3], [height, width] or [height, width, 4], got {shape}.")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("An image of floats must lie in 0..1; pass uint8 for 0..255.")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"An image must be of uint8, uint16 or floats in 0..1, got {array.dtype}.")
    color = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]
    return np.ascontiguousarray(color if channels == "rgb" else color[..., ::-1])


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
