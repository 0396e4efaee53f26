"""GeoTIFFs (extra `geo`: rasterio): read in windows, so that an image need not fit into memory; written whole.

Where an image lies on the ground, and files of maps, are in `geo.py`.
"""

import contextlib
import importlib.util
import mmap
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax import pixels
from instseg_jax.files import write_bytes
from instseg_jax.geo.georeference import Georeference
from instseg_jax.windows import Window, fill_up, view_size

SUFFIXES = (".tif", ".tiff")
CACHE_BYTES = 128 << 20  # of decoded blocks; GDAL's own default is a part of the machine's memory
PREVIEW_SIDE = 4096  # pixels of the picture that is kept for drawing, where the image itself is too large to hold
STRETCH = (2.0, 98.0)  # percentiles that become 0 and 255 where pixels are not 8 bits
STRETCH_SIDE = 1024  # pixels of the view from which they are taken


def open_raster(path: Path) -> "RasterImage | None":
    """Open a TIFF for reading in windows, where rasterio is installed; None for what is better decoded as a picture.

    That is every other format, and TIFFs without a georeference that are not plain 8 bit RGB or grey.
    """
    is_candidate = path.suffix.lower() in SUFFIXES and path.is_file()  # a pipe would be waited for
    if not is_candidate or importlib.util.find_spec("rasterio") is None:
        return None
    with contextlib.suppress(ValueError):
        raster = RasterImage(path)
        if raster.georeference is not None or raster.is_plain:
            return raster
    return None


def write_geotiff(
    path: str | Path, image: np.ndarray, *, epsg: int, origin: tuple[float, float], pixel_size: float
) -> Path:
    """Write a picture [height, width, 3] uint8 RGB as a tiled GeoTIFF, north up; return the file.

    `origin` is the (x, y) of its top left corner in the CRS of the EPSG code, `pixel_size` the side of a pixel there.
    """
    import rasterio
    from rasterio.transform import from_origin

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"A GeoTIFF is written of uint8 [height, width, 3], got {image.dtype} {list(image.shape)}.")
    if not pixel_size > 0:
        raise ValueError(f"pixel_size is {pixel_size!r}, it must be above 0.")
    layout = {"driver": "GTiff", "tiled": True, "compress": "deflate", "photometric": "RGB"}
    place = {"crs": f"EPSG:{epsg}", "transform": from_origin(*origin, pixel_size, pixel_size)}
    shape = {"height": image.shape[0], "width": image.shape[1], "count": 3, "dtype": "uint8"}
    with rasterio.MemoryFile() as memory:
        with memory.open(**layout, **place, **shape) as file:
            file.write(np.moveaxis(image, -1, 0))
        return write_bytes(path, memory.read())


class RasterImage:
    """A raster file: windows of it as uint8 RGB, and where it lies.

    Of three or more bands the first three are red, green and blue; a single one is grey. Pixels of other types than
    uint8 are stretched linearly, the same for all windows. Threads may share it. Raises ValueError when the file is
    no raster.
    """

    def __init__(self, path: str | Path) -> None:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

        self._lock = threading.Lock()
        self._environment = rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES)
        try:
            with self._environment, warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                # By its content a GeoTIFF, whatever the name: other drivers read other files, or the network.
                self._file: Any = rasterio.open(Path(path).absolute(), driver="GTiff")
        except (RasterioIOError, OSError) as error:
            raise ValueError(f"{str(path)!r} can't be read as a raster ({' '.join(str(error).split())}).") from error
        self.name = str(path)
        self._stored = (self._file.height, self._file.width)
        tags = _read_tags(Path(path))
        self._orientation = tags.get(pixels.ORIENTATION, 1) if tags.get(pixels.ORIENTATION) in range(1, 9) else 1
        self.size = self._stored if self._orientation < 5 else self._stored[::-1]
        place = Georeference.of_raster(self._file)
        self.georeference = place and place.after(_to_stored(self._orientation, *self._stored))
        self.is_plain = (
            self._file.dtypes[0] == "uint8"
            and self._file.colorinterp[0].name in ("red", "gray")
            and tags.get(pixels.PHOTOMETRIC) in (pixels.BLACK_IS_ZERO, pixels.RGB)
        )
        self._bands = (1, 2, 3) if self._file.count >= 3 else (1, 1, 1)
        self._range: tuple[np.ndarray, np.ndarray] | None = None
        if self._file.dtypes[0] != "uint8":
            shape = view_size(self._stored, STRETCH_SIDE)
            view = self._read(out_shape=shape).reshape(3, -1).astype(np.float64)
            low, high = np.nanpercentile(view, STRETCH, axis=1)
            self._range = low, np.maximum(high - low, 1e-12)

    def close(self) -> None:
        """Close the file; also done when nobody holds the raster any more."""
        with contextlib.suppress(Exception):
            self._file.close()

    __del__ = close

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window [height, width, 3]; black beyond the image."""
        from rasterio.windows import Window as FileWindow

        width = min(window.width, self.size[1] - window.x)
        height = min(window.height, self.size[0] - window.y)
        corners = np.array([[window.x, window.y, 1], [window.x + width, window.y + height, 1]])
        (x1, x2), (y1, y2) = np.sort(_to_stored(self._orientation, *self._stored) @ corners.T, axis=1).tolist()
        part = self._read(window=FileWindow(x1, y1, x2 - x1, y2 - y1))
        return fill_up(self._to_rgb(part), window)

    def whole(self) -> np.ndarray:
        """All pixels [height, width, 3]."""
        return self.read(Window(0, 0, self.size[1], self.size[0]))

    def view(self, side: int) -> np.ndarray:
        """The whole image, its longer side at most `side` pixels: from its overviews where it has them."""
        from rasterio.enums import Resampling

        return self._to_rgb(self._read(out_shape=view_size(self._stored, side), resampling=Resampling.average))

    def picture(self) -> np.ndarray:
        """A view for drawing; the whole image where it is not larger."""
        return self.view(PREVIEW_SIDE)

    def _read(self, *, out_shape: tuple[int, int] | None = None, **options: Any) -> np.ndarray:
        from rasterio.errors import RasterioIOError

        shape = None if out_shape is None else (3, *out_shape)
        try:
            with self._lock, self._environment:
                return self._file.read(self._bands, out_shape=shape, **options)
        except RasterioIOError as error:
            raise ValueError(f"{self.name!r} can't be read ({' '.join(str(error).split())}).") from error

    def _to_rgb(self, bands: np.ndarray) -> np.ndarray:
        """[3, h, w] of the file's type to [h, w, 3] uint8, turned as the file says."""
        values = np.moveaxis(bands, 0, -1)
        if self._range is not None:
            low, extent = self._range
            values = np.clip(np.nan_to_num((values - low) / extent), 0, 1) * 255
        return pixels.turn(values.astype(np.uint8), self._orientation)


def _read_tags(path: Path) -> dict[int, int]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return pixels.tiff_tags(mapped)


def _to_stored(orientation: int, height: int, width: int) -> np.ndarray:
    """Matrix [2, 3] from (x, y, 1) of a turned image to (x, y) of it as stored, height x width."""
    x, y = ([1, 0, 0], [0, 1, 0]) if orientation < 5 else ([0, 1, 0], [1, 0, 0])
    right, down = np.array([0, 0, width]), np.array([0, 0, height])
    return np.stack(
        [
            right - x if orientation in (2, 3, 7, 8) else np.array(x),
            down - y if orientation in (3, 4, 6, 7) else np.array(y),
        ]
    )
