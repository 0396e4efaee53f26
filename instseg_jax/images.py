"""Pictures: decoding, and resizing to the network's input. Numpy and OpenCV only."""

from pathlib import Path

import cv2
import numpy as np

INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}


def read_image(path: str | Path) -> np.ndarray:
    """Decode a picture to uint8 RGB [h, w, 3], turned as its EXIF orientation says.

    Raises FileNotFoundError or, when the file is no readable picture, ValueError.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image {str(path)!r}.") from None
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        raise ValueError(f"{str(path)!r} can't be read as an image.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def content_size(view_size: tuple[int, int], size: tuple[int, int], resize: str) -> tuple[int, int]:
    """(height, width) that a picture fills of the network input: all of it stretched, its shape letterboxed."""
    if resize == "stretch":
        return size
    scale = min(size[0] / view_size[0], size[1] / view_size[1])
    height, width = (min(s, max(1, int(v * scale + 0.5))) for v, s in zip(view_size, size, strict=True))
    return height, width


def resize_pixels(
    pixels: np.ndarray, content: tuple[int, int], size: tuple[int, int], interpolation: str
) -> np.ndarray:
    """Resize [h, w, 3] to the content size and put it into the top left of a black float32 [H, W, 3] in 0..1.

    uint8 pixels are resized as uint8, rounded and saturated. float32 pixels may leave 0..1 a little
    with cubic and lanczos.
    """
    height, width = content
    resized = cv2.resize(pixels, (width, height), interpolation=INTERPOLATIONS[interpolation]).astype(np.float32)
    resized *= 1.0 / 255.0
    if content == size:
        return resized
    network_input = np.zeros((*size, pixels.shape[2]), np.float32)
    network_input[:height, :width] = resized
    return network_input


def preprocess(
    image: np.ndarray, size: tuple[int, int], *, resize: str, interpolation: str
) -> tuple[np.ndarray, tuple[int, int]]:
    """Bring a picture [h, w, 3] uint8 RGB to the network's input `size` (height, width).

    Returns: the input [H, W, 3] float32 in 0..1, and the (height, width) of it that the picture fills.
    "stretch" with "cubic" is the reference's preprocessing for evaluation.
    """
    content = content_size(image.shape[:2], size, resize)
    return resize_pixels(image, content, size, interpolation), content
