"""How a file or an array becomes pixels: the one place that decides, for the check, training, prediction and exports.

`decode` gives the pixels of a file as they are, `to_uint8` what a network is fed with. Every export carries the text
of this module in its `postprocess.py`: it imports nothing of the package, and reads pictures with OpenCV or Pillow,
whichever is there. EXIF orientation is read here, since neither library turns every format and depth.
"""

import contextlib
import importlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

NUMPY_MARK = b"\x93NUMPY"
JPEG_MARK = b"\xff\xd8"
PNG_MARK = b"\x89PNG\r\n\x1a\n"
TIFF_MARKS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
EXIF_HEAD = b"Exif\x00\x00"
# Tags of TIFFs, which EXIF's blocks are too.
WIDTH, HEIGHT, BITS, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 262, 274
SAMPLES, PLANAR, KIND = 277, 284, 339
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # of PHOTOMETRIC
NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types of TIFF tags that are whole numbers
MAX_TAGS = 4096  # of a directory
PLAIN_DEPTHS = ((8, 1), (16, 1), (32, 3), (64, 3))  # (bits, kind) of TIFFs that OpenCV reads right; 3: floats


def decode(data: bytes, name: str, *, is_color: bool = False) -> np.ndarray:
    """Decode the bytes of a file to [h, w, C] of whatever type its pixels have.

    Colours are RGB or RGBA, turned as the EXIF orientation says. `is_color` says that 8 bits of three colours are all
    that is wanted, which Pillow can give of some files that it can't read whole.

    Raises: ValueError that says `name` for what can't be read.
    """
    if data.startswith(NUMPY_MARK):
        return _load_numpy(data, name)
    array = _decode_tiff(data, name) if data.startswith(TIFF_MARKS) else _decode_picture(data, name, is_color)
    if array is None:
        raise ValueError(f"{name!r} can't be read as an image.")
    return array[..., None] if array.ndim == 2 else array


def to_uint8(array: np.ndarray, what: str, *, channels: int, ranges: Any, is_bgr: bool = False) -> np.ndarray:
    """Bring pixels [h, w] or [h, w, C] to what the network takes, uint8 [h, w, channels].

    `ranges` has the (low, high) of each channel that become 0 and 255, linearly; what lies beyond is cut. Without
    them three channels are 8-bit colour: of grey, RGB or RGBA (the alpha is left out), of uint8, uint16 (its upper
    byte) or floats in 0..1. Other numbers of channels must be there and uint8. `is_bgr`: the order is OpenCV's.

    Raises: ValueError that begins with `what` for anything else.
    """
    shape = list(array.shape)
    array = array[..., None] if array.ndim == 2 else array
    if is_bgr and array.ndim == 3 and array.shape[2] in (3, 4):
        array = array[..., [2, 1, 0, 3][: array.shape[2]]]
    if channels == 3 and ranges is None:
        return _to_color(array, what, shape)
    expect_channels(array, what, channels)
    if ranges is None:
        if array.dtype != np.uint8:
            raise ValueError(f"{what} has pixels of {array.dtype}; set data.scaling=percentile to scale them.")
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "uif":
        raise ValueError(f"{what} has pixels of {str(array.dtype)[:80]}, they must be numbers.")
    low, high = np.array(ranges, np.float32).T
    scaled = (array.astype(np.float32) - low) * (255 / np.maximum(high - low, np.finfo(np.float32).tiny))
    return np.rint(np.clip(np.nan_to_num(scaled), 0, 255)).astype(np.uint8)


def expect_channels(array: np.ndarray, what: str, channels: int) -> None:
    """Raise ValueError that begins with `what` unless pixels are [h, w, channels] and not empty."""
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        found = f"{array.shape[2]} channels" if array.ndim == 3 else f"the shape {list(array.shape)}"
        raise ValueError(f"{what} has {found}, data.channels is {channels}.")


def from_pil(image: Any) -> np.ndarray:
    """The pixels of a PIL image [h, w] or [h, w, C] in its own depth, turned as its EXIF orientation says."""
    if getattr(image, "tile", None) and image.format == "TIFF":
        name, image.filename = image.filename, ""  # a file that is mapped into memory is not turned right
        image.load()
        image.filename = name
    image.load()
    orientation = exif_orientation(image.info.get("exif") or b"")
    if image.mode.startswith("I;16"):
        array = np.asarray(image, np.uint16)
    elif image.mode in ("L", "RGB", "RGBA", "I", "F"):
        array = np.asarray(image)
    elif image.mode == "1":
        array = np.asarray(image.convert("L"))
    else:
        has_alpha = image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info
        array = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    return turn(array, orientation)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [H, W, ...] as it is stored to how EXIF's orientation (1..8) says to show it."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def find_orientation(data: bytes) -> int:
    """EXIF orientation (1..8) of the bytes of a JPEG, PNG, WebP, TIFF or AVIF file; 1 where nothing is said."""
    if data.startswith(TIFF_MARKS):
        return exif_orientation(data)
    if is_avif(data):
        with contextlib.suppress(ImportError, ValueError, OSError, SyntaxError):
            return exif_orientation(open_by_pillow(data).info.get("exif") or b"")
        return 1
    return exif_orientation(_exif_block(data))


def exif_orientation(block: Any) -> int:
    """The orientation (1..8) that an EXIF block or a TIFF says; 1 where it says nothing or nonsense."""
    block = block[len(EXIF_HEAD) :] if block[: len(EXIF_HEAD)] == EXIF_HEAD else block
    found = tiff_tags(block).get(ORIENTATION, 1)
    return found if 1 <= found <= 8 else 1


def tiff_tags(data: Any) -> dict[int, int]:
    """The whole numbers in the first directory of a TIFF (bytes, or a map of a file): tag to its first value."""
    return dict(_tiff_entries(data))


def _tiff_entries(data: Any) -> list[tuple[int, int]]:
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    entries: list[tuple[int, int]] = []
    if order is None:
        return entries
    with contextlib.suppress(struct.error, OverflowError):
        is_big = struct.unpack_from(order + "H", data, 2)[0] == 43
        offset, count, head, value = ("Q", "Q", 8, 8) if is_big else ("I", "H", 2, 4)
        start = struct.unpack_from(order + offset, data, 8 if is_big else 4)[0]
        number = struct.unpack_from(order + count, data, start)[0]
        for i in range(min(number, MAX_TAGS)):
            entry = start + head + i * (4 + 2 * value)
            tag, kind, length = struct.unpack_from(f"{order}HH{offset}", data, entry)
            if kind in NUMBERS and length:
                place, code = entry + 4 + value, order + NUMBERS[kind]
                if length * struct.calcsize(code) > value:
                    place = struct.unpack_from(order + offset, data, place)[0]
                entries.append((tag, struct.unpack_from(code, data, place)[0]))
    return entries


def is_avif(data: bytes) -> bool:
    """Whether the bytes of a file are an AVIF picture."""
    return data[4:8] == b"ftyp" and (data[8:12] in (b"avif", b"avis") or b"avif" in data[16:64])


def open_by_pillow(data: bytes) -> Any:
    """As PIL.Image.open, with neither its bound on pixels nor that on text: pixels alone count.

    Raises: what Pillow raises, among it SyntaxError for files that it does not know.
    """
    from PIL import Image

    kinds = {"Jpeg": data.startswith(JPEG_MARK), "Png": data.startswith(PNG_MARK), "Avif": is_avif(data)}
    kinds |= {"Tiff": data.startswith(TIFF_MARKS), "Bmp": data.startswith(b"BM")}
    kinds["WebP"] = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    for kind, is_this in kinds.items():
        if is_this:
            plugin = importlib.import_module(f"PIL.{kind}ImagePlugin")
            return getattr(plugin, f"{kind}ImageFile")(io.BytesIO(_without_text(data) if kind == "Png" else data))
    return Image.open(io.BytesIO(data))


def _load_numpy(data: bytes, name: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name!r} can't be read as an array: {str(error)[:80]}.") from error
    if array.dtype.kind not in "uif":
        raise ValueError(f"{name!r} holds {str(array.dtype)[:80]}, not numbers.")
    return array[..., None] if array.ndim == 2 else array


def _decode_picture(data: bytes, name: str, is_color: bool) -> np.ndarray | None:
    if is_avif(data):  # OpenCV does not turn them
        with contextlib.suppress(ImportError):
            return _by_pillow(data)
        raise ValueError(f"{name!r} is an AVIF picture, which needs Pillow of at least 11.3.")
    with contextlib.suppress(ImportError):
        array = _by_opencv(data)
        return None if array is None else turn(array, exif_orientation(_exif_block(data)))
    if data.startswith(PNG_MARK) and data[24:25] == b"\x10" and data[25:26] != b"\0" and not is_color:
        raise ValueError(f"{name!r} has colours of 16 bits, which only OpenCV reads; or give it as .npy.")
    return _by_pillow(data)


def _decode_tiff(data: bytes, name: str) -> np.ndarray | None:
    """Each layout by a library that reads it right: OpenCV mistakes planes and extra samples, Pillow deep colours."""
    entries = _tiff_entries(data)
    tags = dict(entries)
    for what, tag in (("width", WIDTH), ("height", HEIGHT)):
        if len(said := {value for found, value in entries if found == tag}) > 1:  # one for each library
            raise ValueError(f"{name!r} can't be read as an image: it says more than one {what}, {sorted(said)[:4]}.")
    bits, samples, photometric = tags.get(BITS, 1), tags.get(SAMPLES, 1), tags.get(PHOTOMETRIC, BLACK_IS_ZERO)
    depth = (bits, tags.get(KIND, 1))
    is_grey = samples == 1 and photometric == BLACK_IS_ZERO
    is_rgb = (samples == 3 or (samples == 4 and bits > 8)) and photometric == RGB and tags.get(PLANAR, 1) == 1
    array = None
    if depth in PLAIN_DEPTHS and (is_grey or is_rgb):
        with contextlib.suppress(ImportError):
            array = _by_opencv(data)  # turned by OpenCV
    is_deep = bits > 8 and not (samples == 1 and depth in ((16, 1), (32, 3)))
    if array is None and samples <= 4 and not is_deep:
        with contextlib.suppress(ImportError):
            array = _by_pillow(data)  # turned by Pillow
        is_short = array is not None and photometric <= RGB and (1 if array.ndim == 2 else array.shape[2]) < samples
        array = None if is_short else array
    if array is not None:
        return array
    array = _by_rasterio(data, name)
    return None if array is None else turn(array, exif_orientation(data))


def _by_opencv(data: bytes) -> np.ndarray | None:
    """Pixels as they are stored (TIFFs are turned), None for what OpenCV can't read. Raises ImportError."""
    import cv2

    flag = cv2.IMREAD_UNCHANGED
    if data.startswith(JPEG_MARK):
        kind = cv2.IMREAD_GRAYSCALE if _is_grey_jpeg(data) else cv2.IMREAD_COLOR_RGB
        flag = kind | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
    except cv2.error:  # more pixels than OpenCV takes
        return None
    if image is None or image.ndim == 2 or data.startswith(JPEG_MARK):
        return image
    if image.dtype == np.uint8 and image.shape[2] in (3, 4):
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return image[..., [2, 1, 0, 3][: image.shape[2]]] if image.shape[2] in (3, 4) else image


def _by_pillow(data: bytes) -> np.ndarray | None:
    """Pixels as they are to be shown, None for what Pillow can't read. Raises ImportError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return from_pil(open_by_pillow(data))
        except ImportError:
            raise
        except Exception:  # Pillow's plugins raise all kinds on files that are damaged or unknown
            return None


def _by_rasterio(data: bytes, name: str) -> np.ndarray | None:
    """Pixels [h, w, C] as they are stored, None for what GDAL can't read. Raises ValueError where it is missing."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ImportError as error:
        wanted = 'pip install "instseg_jax[geo]"'
        raise ValueError(f"{name!r} is damaged or a TIFF of a layout that needs rasterio: {wanted}.") from error
    try:
        with warnings.catch_warnings(), rasterio.MemoryFile(data) as memory:
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with memory.open(driver="GTiff") as file:
                return np.moveaxis(file.read(), 0, 2)
    except RasterioError:
        return None


def _to_color(array: np.ndarray, what: str, shape: list[int]) -> np.ndarray:
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"{what} must be [height, width, 3], [height, width] or [height, width, 4], got {shape}.")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{what} of floats must lie in 0..1; give uint8 for 0..255, or set data.scaling.")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{what} must be of uint8, uint16 or floats in 0..1, got {array.dtype}.")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.ascontiguousarray(array[..., :3])


def _exif_block(data: bytes) -> bytes:
    """The EXIF block of a JPEG, PNG or WebP file, empty where there is none."""
    if data.startswith(JPEG_MARK):
        heads = (body for marker, body in _jpeg_segments(data) if marker == 0xE1)
        return next((body for body in heads if body.startswith(EXIF_HEAD)), b"")
    if data.startswith(PNG_MARK):
        return next((data[start + 8 : end - 4] for kind, start, end in _png_chunks(data) if kind == b"eXIf"), b"")
    position = 12
    while data[:4] == b"RIFF" and data[8:12] == b"WEBP" and position + 8 <= len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"EXIF":
            return data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    return b""


def _is_grey_jpeg(data: bytes) -> bool:
    frames = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
    return next((body[5:6] == b"\x01" for marker, body in _jpeg_segments(data) if marker in frames), False)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of the segments before the pixels."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        if data[position + 1] == 0xFF:  # filling
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield data[position + 1], data[position + 4 : end]
        position = end


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each chunk, its first byte, and the one beyond its last."""
    start = len(PNG_MARK)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8], start, end
        start = end


def _without_text(data: bytes) -> bytes:
    """A PNG file of what its pixels need: megabytes of text, which Pillow refuses, say nothing about them."""
    needed = (b"tRNS", b"eXIf")
    return PNG_MARK + b"".join(
        data[start:end] for kind, start, end in _png_chunks(data) if kind[:1].isupper() or kind in needed
    )
