"""What may be segmented: paths, URLs, folders, patterns, arrays, PIL images, videos, and lists of these.

`find_sources` names the images; each is decoded only when its turn comes. Rasters that are read in windows are in
`rasters.py`; images that a server gets are checked in `serving/`.
"""

import dataclasses
import functools
import glob
import pathlib
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

from instseg_jax.bands import Bands
from instseg_jax.files import check_regular, read_address
from instseg_jax.geo.rasters import RasterImage, open_raster
from instseg_jax.geo.reading import Reading
from instseg_jax.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, decode_image, is_video, read_image, to_pixels
from instseg_jax.pixels import from_pil

URL_PREFIXES = ("http://", "https://")
MAX_DOWNLOAD = 256 << 20  # bytes of a picture at a URL
DOWNLOAD_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Source:
    """One image: how it is called, and how to get its pixels [h, w, 3] uint8 RGB.

    `read` raises ValueError or OSError when there is none. `size` (height, width) is that of the image where `read`
    gives a smaller view of it.
    """

    name: str
    read: Callable[[], np.ndarray]
    page_index: int | None = None  # frame of a video
    size: tuple[int, int] | None = None
    georeference: Any = None  # `geo.Georeference` of an image that has one
    raster: RasterImage | None = None  # of a file that can be read in windows


def find_sources(
    x: Any, *, channels: str, bands: Bands | None = None, reading: Reading | None = None
) -> tuple[Iterator[Source], int | None]:
    """Say what is to be segmented: (sources in order, how many they are; None when only reading tells).

    `x` is a path (`~` and file:// too), URL, folder, pattern (`**` for all folders below), array ([h, w, 3], see
    `pixels.to_uint8`, of numpy, jax or any other library; [b, h, w, 3] are b images), PIL image, the bytes of a
    picture or a file that gives them, video, or an iterable of these. `channels` ("rgb" or "bgr") is the order in
    arrays, `bands` how all pixels are read; None: as 8-bit colour; `reading` how rasters of maps are. What cannot be
    found raises FileNotFoundError at once; within a list it becomes a source whose `read` raises, so that the rest
    goes on.
    """
    x = _as_plain(x)
    if isinstance(x, np.ndarray) and x.ndim == 4:  # a batch
        x = list(x)
    if isinstance(x, (str, pathlib.Path, np.ndarray, Image.Image, bytes)):
        return _one(x, channels=channels, bands=bands, reading=reading, number=0)
    if isinstance(x, dict) or not isinstance(x, Iterable):
        raise ValueError(
            f"An input must be a path, URL, folder, array, PIL image or a list of these, got {type(x).__name__}."
        )
    items = x if isinstance(x, (list, tuple)) else None
    return _many(x, channels=channels, bands=bands, reading=reading), _count(items, channels)


def find_files(source: str | pathlib.Path) -> list[pathlib.Path]:
    """The pictures and videos that a path, folder or pattern names, in order of their names.

    A folder stands for its pictures. Raises: FileNotFoundError when there is nothing.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"there is no picture ({', '.join(IMAGE_SUFFIXES)}) in {path}")
        return found
    if path.exists():
        return [path]
    if glob.has_magic(str(source)):
        known = IMAGE_SUFFIXES + VIDEO_SUFFIXES
        matches = (pathlib.Path(p) for p in glob.glob(str(source), recursive=True))  # noqa: PTH207 (absolute patterns too)
        found = sorted(p for p in matches if p.suffix.lower() in known and p.is_file())
        if not found:
            raise FileNotFoundError(f"there is no picture or video that matches {str(source)!r}")
        return found
    raise FileNotFoundError(f"there is no file or folder {path}")


def read_video(path: str | pathlib.Path) -> Iterator[np.ndarray]:
    """The frames of a video, one after another, as [h, w, 3] uint8 RGB. Raises ValueError when it has none."""
    check_regular(path)
    capture = cv2.VideoCapture(str(path))
    try:
        found = False
        while True:
            is_read, frame = capture.read()
            if not is_read:
                break
            found = True
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()
    if not found:
        raise ValueError(f"{str(path)!r} can't be read as a video.")


def count_frames(path: str | pathlib.Path) -> int | None:
    """The number of frames that a video says it has; None when it does not say."""
    if not pathlib.Path(path).is_file():  # a pipe would be waited for
        return None
    capture = cv2.VideoCapture(str(path))
    try:
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    finally:
        capture.release()
    return count if count > 0 else None


def _as_plain(x: Any) -> Any:
    """An input as one of the few types below: arrays of other libraries, encoded pictures in memory, `~`, file://."""
    if isinstance(x, bytearray):
        return bytes(x)
    if isinstance(x, memoryview):
        return bytes(x) if x.ndim == 1 and x.format == "B" else np.asarray(x)
    if hasattr(x, "read") and not isinstance(x, (str, pathlib.Path, Image.Image)):  # a file, or what reads like one
        data = x.read()
        if not isinstance(data, bytes):
            raise ValueError(f"An open file must give bytes; open {getattr(x, 'name', 'it')} with mode 'rb'.")
        return data
    if isinstance(x, str) and x.startswith("file://"):
        x = urllib.request.url2pathname(urllib.parse.urlsplit(x).path)
    if isinstance(x, (str, pathlib.Path)) and str(x).startswith("~"):
        return type(x)(pathlib.Path(x).expanduser())
    if not isinstance(x, (np.ndarray, Image.Image)) and hasattr(x, "__array__"):  # jax, torch, tensorflow
        return np.asarray(x)
    return x


def _one(
    x: Any, *, channels: str, bands: Bands | None, reading: Reading | None, number: int
) -> tuple[Iterator[Source], int | None]:
    x = _as_plain(x)
    if isinstance(x, bytes):
        return iter([Source(f"bytes_{number}", lambda: decode_image(x, f"bytes_{number}", bands))]), 1
    if isinstance(x, np.ndarray):
        image = to_pixels(x, bands, order=channels)
        return iter([Source(f"array_{number}", lambda: image)]), 1
    if isinstance(x, Image.Image):
        name = getattr(x, "filename", "") or f"image_{number}"
        return iter([Source(name, lambda: to_pixels(from_pil(x), bands))]), 1
    if isinstance(x, str) and x.startswith(URL_PREFIXES):
        return iter(
            [Source(x, lambda: decode_image(read_address(x, most=MAX_DOWNLOAD, seconds=DOWNLOAD_SECONDS), x, bands))]
        ), 1
    if not isinstance(x, (str, pathlib.Path)):
        raise ValueError(f"An input must be a path, URL, array or PIL image, got {type(x).__name__}.")
    files = find_files(x)
    frames = [count_frames(path) if is_video(path) else 1 for path in files]
    known = [count for count in frames if count is not None]
    return _from_files(files, bands, reading), sum(known) if len(known) == len(frames) else None


def _many(items: Iterable, *, channels: str, bands: Bands | None, reading: Reading | None) -> Iterator[Source]:
    for number, item in enumerate(items):
        name = str(item) if isinstance(item, (str, pathlib.Path)) else f"item_{number}"
        try:
            sources, _ = _one(item, channels=channels, bands=bands, reading=reading, number=number)
        except (ValueError, OSError) as error:
            yield Source(name, functools.partial(_raise, error))
        else:
            yield from sources


def _count(items: list | tuple | None, channels: str) -> int | None:
    """How many images a list holds, where that is plain without opening folders and videos."""
    if items is None:
        return None
    is_plain = [not isinstance(item, (str, pathlib.Path)) or _is_single(str(item)) for item in items]
    return len(items) if all(is_plain) else None


def _is_single(name: str) -> bool:
    return not (glob.has_magic(name) or is_video(name) or pathlib.Path(name).is_dir())


def _from_files(files: list[pathlib.Path], bands: Bands | None, reading: Reading | None) -> Iterator[Source]:
    for path in files:
        if not is_video(path):
            try:
                raster = open_raster(path, reading)
            except ValueError as error:  # a band that the model needs is not there
                yield Source(str(path), functools.partial(_raise, error))
                continue
            read = functools.partial(read_image, path, bands)
            if raster is None:
                yield Source(str(path), read)
            elif bands is not None:  # by ranges of their own, not by those of the file
                yield Source(str(path), read, georeference=raster.georeference)
            else:
                yield Source(str(path), raster.whole, georeference=raster.georeference, raster=raster)
            continue
        try:
            for index, frame in enumerate(read_video(path)):
                yield Source(str(path), functools.partial(to_pixels, frame, bands), page_index=index)
        except ValueError as error:
            yield Source(str(path), functools.partial(_raise, error))


def _raise(error: Exception) -> np.ndarray:
    raise error
