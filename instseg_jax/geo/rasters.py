"""GeoTIFFs (extra `geo`: rasterio): read in windows, so that an image need not fit into memory; written whole.

Where an image lies on the ground, and files of maps, are in `geo.py`.
"""

import importlib.util
import logging
import math
import mmap
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike

from instseg_jax import pixels
from instseg_jax.files import is_regular, write_bytes
from instseg_jax.geo.placing import georeference_of, world_file
from instseg_jax.geo.reading import Reading
from instseg_jax.messages import quote
from instseg_jax.windows import Window, fill_up, view_size

SUFFIXES = (".tif", ".tiff")
REMOTE = ("https://", "http://", "s3://", "gs://")  # read by GDAL in ranges, with the credentials of its environment
PICTURE_DRIVERS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP"}  # that a world file may place
# Only who names such a map has it read: folders and patterns give none, and its driver is that of its name alone.
MAP_DRIVERS = {".vrt": "VRT", ".jp2": "JP2OpenJPEG", ".img": "HFA"}
MOST_AT_ONCE = 2**32 - 1  # pixels; masks of larger images can't be counted
CACHE_BYTES = 128 << 20  # of decoded blocks; GDAL's own default is a part of the machine's memory
PREVIEW_SIDE = 4096  # pixels of the picture that is kept for drawing, where the image itself is too large to hold
SAME_GSD = 1.1  # resolutions that differ by less are one
STRETCH = (2.0, 98.0)  # percentiles that become 0 and 255 where pixels are not 8 bits
STRETCH_SIDE = 1024  # pixels of the view from which they are taken
# Of an alpha band that part is 0 or opaque; another is a fourth channel, near infrared, that a program has called so.
MIN_CLEAR = 0.9
log = logging.getLogger(__name__)


def open_raster(path: Path, reading: Reading | None = None) -> "RasterImage | None":
    """Open a raster for reading in windows, where rasterio is installed; None for what is better decoded as a picture.

    That is a TIFF that has a georeference or is plain 8 bit RGB or grey, a file of MAP_DRIVERS, and a picture beside
    which lies a world file.
    `reading` is that of the rasters a model was trained on: a georeferenced TIFF is read with the same bands and
    stretch, and at their resolution. Raises ValueError where it lacks a band, or rasterio is not there for a map.
    """
    if not path.is_file():  # a pipe would be waited for
        return None
    suffix = path.suffix.lower()
    is_tiff, is_map = suffix in SUFFIXES, suffix in MAP_DRIVERS
    if not (is_tiff or is_map) and (suffix not in PICTURE_DRIVERS or world_file(path) is None):
        return None
    if importlib.util.find_spec("rasterio") is None:
        if is_map:
            raise ValueError(f'{str(path)!r} is a map, which is read with pip install "instseg_jax[geo]".')
        if not is_tiff:
            log.warning('%s: its map is in pixels; world files are read with pip install "instseg_jax[geo]"', path)
        return None
    driver = "GTiff" if is_tiff else {**MAP_DRIVERS, **PICTURE_DRIVERS}[suffix]
    try:
        raster = RasterImage(path, driver=driver)
    except ValueError:
        if is_map:  # which nothing else reads
            raise
        return None
    if raster.georeference is None:
        return raster if is_map or (is_tiff and raster.is_plain) else None
    if reading is None:
        return raster
    if (is_tiff or is_map) and (reading.bands or (raster.is_stretched and reading.stretch)):
        raster.close()
        raster = RasterImage(path, driver=driver, bands=reading.bands, stretch=reading.stretch)
    if reading.gsd is not None:
        _scale_to(raster, reading.gsd)
    return raster


def _scale_to(raster: "RasterImage", gsd: float) -> None:
    """Have a raster read at a resolution in metres, where its own is known and another."""
    from instseg_jax.geo.layers import pixel_sides

    sides = None
    if importlib.util.find_spec("pyproj") and raster.georeference is not None:
        sides = pixel_sides(raster.georeference, raster.size)
    if sides is None:
        log.warning("%s: its resolution is unknown, the model was trained at %.3g m a pixel", raster.name, gsd)
        return
    scale = math.sqrt(sides[0] * sides[1]) / gsd
    if not 1 / SAME_GSD < scale < SAME_GSD:
        raster.scale(scale)
        log.info("%s: read at %.3g m a pixel, as an image of %d x %d px", raster.name, gsd, *raster.size[::-1])


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
        raise ValueError(f"pixel_size is {quote(pixel_size)}, it must be above 0.")
    layout = {"driver": "GTiff", "tiled": True, "compress": "deflate", "photometric": "RGB"}
    place = {"crs": f"EPSG:{epsg}", "transform": from_origin(*origin, pixel_size, pixel_size)}
    shape = {"height": image.shape[0], "width": image.shape[1], "count": 3, "dtype": "uint8"}
    with rasterio.MemoryFile() as memory:
        with memory.open(**layout, **place, **shape) as file:
            file.write(np.moveaxis(image, -1, 0))
        return write_bytes(path, memory.read())


class RasterImage:
    """A raster file: windows of it as uint8 RGB, and where it lies.

    Bands are colours by what the file says they are: a colour table is looked up, blue-green-red put in order, alpha
    left out. Where it says nothing, the first three are red, green and blue, and a single one is grey. Pixels of other
    types than uint8 are stretched linearly, the same for all windows; what is masked out, transparent or declared as
    nodata takes no part in that, and is black. Threads may share it.

    `bands` names the three to read instead, by colour or number from 1; `stretch` [2, 3] the values that become 0 and
    255, instead of percentiles of this file. `driver` None takes any format, and files at URLs: only for what a person
    has named himself. Raises ValueError when the file is no raster, or has no such band.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        driver: str | None = "GTiff",
        bands: Sequence[str] | None = None,
        stretch: ArrayLike | None = None,
    ) -> None:
        import rasterio
        from rasterio.enums import MaskFlags
        from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

        self._lock = threading.Lock()
        # What lies elsewhere is read by its address alone: listing the folder asks for more.
        listing = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"} if is_remote(path) else {}
        self._environment = rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, **listing)
        try:
            with self._environment, warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                # By its content of this driver, whatever the name: others read other files, or the network.
                target = str(path) if is_remote(path) else Path(path).absolute()
                self._file: Any = rasterio.open(target, driver=driver)
        except (RasterioIOError, OSError) as error:
            raise ValueError(f"{str(path)!r} can't be read as a raster ({' '.join(str(error).split())}).") from error
        self.name = str(path)
        if self._file.dtypes[0].startswith("complex"):
            raise ValueError(f"{str(path)!r} has complex values, which are no picture.")
        self._stored = (self._file.height, self._file.width)
        photometric, self._orientation = _read_tags(Path(path), driver or self._file.driver)
        self.size = self._stored if self._orientation < 5 else self._stored[::-1]
        self._scales = (1.0, 1.0)  # (x, y) pixels of this image for one of the file
        place = georeference_of(self._file, Path(path))
        self.georeference = place and place.after(_to_stored(self._orientation, *self._stored))
        colors = [color.name for color in self._file.colorinterp]
        is_bytes = self._file.dtypes[0] == "uint8"
        is_usual = photometric in (pixels.BLACK_IS_ZERO, pixels.RGB)
        self.is_plain = is_bytes and colors[0] in ("red", "gray") and is_usual
        self._bands = _color_bands(colors) if bands is None else find_bands(colors, bands, self.name)
        self._table = _color_table(self._file) if colors[self._bands[0] - 1] == "palette" else None
        self._is_inverted = self._file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES" and self._table is None
        flags = [self._file.mask_flag_enums[band - 1] for band in set(self._bands)]
        self._is_masked = any(MaskFlags.all_valid not in each for each in flags)
        if self._is_masked and all(MaskFlags.alpha in each for each in flags):
            alpha = self._read(out_shape=view_size(self._stored, STRETCH_SIDE))[1]
            self._is_masked = ((alpha == 0) | (alpha == alpha.max())).mean() >= MIN_CLEAR
        self._range: tuple[np.ndarray, np.ndarray] | None = None
        self.is_stretched = not is_bytes and self._table is None
        if self.is_stretched:
            low, high = find_stretch([self.sample()]) if stretch is None else np.asarray(stretch, np.float64)
            self._range = low, np.maximum(high - low, 1e-12)

    def sample(self) -> np.ndarray:
        """Values [3, N] float64 of the file's own scale from all over it; NaN where nothing is valid."""
        values, valid = self._read(out_shape=view_size(self._stored, STRETCH_SIDE))
        return np.where((valid > 0) & np.isfinite(values), values, np.nan).astype(np.float64).reshape(3, -1)

    def close(self) -> None:
        """Close the file; also done when nobody holds the raster any more."""
        try:  # not suppress(), which is gone when Python ends
            self._file.close()
        except Exception:
            return

    __del__ = close

    def scale(self, factor: float) -> None:
        """Be an image of `factor` times as many pixels in width and height from now on."""
        size = tuple(max(1, round(length * factor)) for length in self.size)
        x, y = (self.size[1] / size[1], self.size[0] / size[0])
        self._scales = self._scales[0] / x, self._scales[1] / y
        self.georeference = self.georeference and self.georeference.after(np.array([[x, 0, 0], [0, y, 0]]))
        self.size = size[0], size[1]

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window [height, width, 3]; black beyond the image."""
        from rasterio.enums import Resampling
        from rasterio.windows import Window as FileWindow

        width = min(window.width, self.size[1] - window.x)
        height = min(window.height, self.size[0] - window.y)
        corners = np.array([[window.x, window.y, 1], [window.x + width, window.y + height, 1]])
        options: dict[str, Any] = {}
        if self._scales != (1.0, 1.0):
            corners = corners / [*self._scales, 1]
            shape = (height, width) if self._orientation < 5 else (width, height)
            is_number = self._table is not None  # those of a colour table have no average
            smooth = Resampling.average if max(self._scales) < 1 else Resampling.bilinear
            options = {"out_shape": shape, "resampling": Resampling.nearest if is_number else smooth}
        (x1, x2), (y1, y2) = np.sort(_to_stored(self._orientation, *self._stored) @ corners.T, axis=1).tolist()
        part = self._read(window=FileWindow(x1, y1, x2 - x1, y2 - y1), **options)
        return fill_up(self._to_rgb(*part), window)

    def whole(self) -> np.ndarray:
        """All pixels [height, width, 3]. Raises ValueError where they are more than MOST_AT_ONCE."""
        if self.size[0] * self.size[1] > MOST_AT_ONCE:
            width, height = self.size[::-1]
            raise ValueError(
                f"{self.name!r} has {width} x {height} pixels, at most {MOST_AT_ONCE} are read at once; --tile cuts it."
            )
        return self.read(Window(0, 0, self.size[1], self.size[0]))

    def view(self, side: int) -> np.ndarray:
        """The whole image, its longer side at most `side` pixels: from its overviews where it has them."""
        from rasterio.enums import Resampling

        # Numbers of a colour table have no average.
        resampling = Resampling.average if self._table is None else Resampling.nearest
        height, width = view_size(self.size, side)
        shape = (height, width) if self._orientation < 5 else (width, height)
        return self._to_rgb(*self._read(out_shape=shape, resampling=resampling))

    def picture(self) -> np.ndarray:
        """A view for drawing; the whole image where it is not larger."""
        return self.view(PREVIEW_SIDE)

    def _read(self, *, out_shape: tuple[int, int] | None = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Bands [3, h, w] of the file's type, and where they are valid: not 0, of that shape."""
        from rasterio.errors import RasterioIOError

        shape = None if out_shape is None else (3, *out_shape)
        try:
            with self._lock, self._environment:
                bands = self._file.read(self._bands, out_shape=shape, **options)
                if not self._is_masked:
                    return bands, np.ones_like(bands, bool)
                options.pop("resampling", None)
                return bands, self._file.read_masks(self._bands, out_shape=shape, **options)
        except RasterioIOError as error:
            raise ValueError(f"{self.name!r} can't be read ({' '.join(str(error).split())}).") from error

    def _to_rgb(self, bands: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """[3, h, w] of the file's type to [h, w, 3] uint8; turned as the file says, black where no band is valid."""
        if self._table is not None:
            values = self._table[np.minimum(bands[0], len(self._table) - 1)]
        else:
            if self._range is not None:
                low, extent = (limit[:, None, None] for limit in self._range)
                bands = np.clip(np.nan_to_num((bands - low) / extent), 0, 1) * 255
            values = cv2.merge(list(bands.astype(np.uint8, copy=False)))  # many times as fast as a transposed copy
        if self._is_inverted:
            values = 255 - values
        if self._is_masked:
            values[~(valid > 0).any(axis=0)] = 0
        return pixels.turn(values, self._orientation)


def is_remote(path: str | Path) -> bool:
    """Whether GDAL gets a raster from elsewhere."""
    return str(path).startswith(REMOTE)


def find_stretch(samples: Sequence[np.ndarray]) -> np.ndarray:
    """The values [2, 3] that become 0 and 255: percentiles of the samples [3, N] of rasters shown alike."""
    view = np.concatenate(samples, axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of bands without a valid pixel
        return np.nan_to_num(np.nanpercentile(view, STRETCH, axis=1))


def find_bands(colors: Sequence[str], wanted: Sequence[str], name: str) -> tuple[int, int, int]:
    """The numbers, from 1, of three bands that are named by colour (`red`, `nir`, ...) or number. Raises ValueError."""
    found = []
    for band in wanted:
        if band.isdecimal() and 1 <= int(band) <= len(colors):
            found.append(int(band))
        elif band in colors:
            found.append(colors.index(band) + 1)
        else:
            known = ", ".join(f"{number} ({color})" for number, color in enumerate(colors, start=1))
            raise ValueError(f"{name} has no band {quote(band)}; it has {known}.")
    if len(found) != 3:
        raise ValueError(f"Bands are {quote(','.join(wanted))}; three are shown as red, green and blue.")
    return found[0], found[1], found[2]


def _color_bands(colors: list[str]) -> tuple[int, int, int]:
    """The numbers, from 1, of the bands that are red, green and blue; three times one that is grey or a palette."""
    if {"red", "green", "blue"} <= set(colors):
        return colors.index("red") + 1, colors.index("green") + 1, colors.index("blue") + 1
    if "palette" in colors:
        return (colors.index("palette") + 1,) * 3
    shown = [number for number, color in enumerate(colors, start=1) if color != "alpha"] or [1]
    return (shown[0], shown[1], shown[2]) if len(shown) >= 3 else (shown[0],) * 3


def _color_table(file: Any) -> np.ndarray:
    """The colours [N, 3] uint8 of a file's palette, where some are opaque the others black."""
    table = file.colormap([color.name for color in file.colorinterp].index("palette") + 1)
    colors = np.zeros((max(table) + 1, 4), np.uint8)
    for number, color in table.items():
        colors[number] = color
    return colors[:, :3] * (colors[:, 3:] > 0) if colors[:, 3].any() else colors[:, :3]


def _read_tags(path: Path, driver: str) -> tuple[int | None, int]:
    """Photometric interpretation (of a TIFF) and EXIF orientation, which GDAL leaves to its callers."""
    if driver not in ("GTiff", *PICTURE_DRIVERS.values()) or not is_regular(path):
        return None, 1
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if driver != "GTiff":
            return None, pixels.find_orientation(mapped[:])
        return pixels.tiff_tags(mapped).get(pixels.PHOTOMETRIC), pixels.exif_orientation(mapped)


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
