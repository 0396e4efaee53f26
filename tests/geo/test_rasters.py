"""Rasters mean what they say: colours by name, no content where there are no data, a place however it is given."""

import cv2
import numpy as np
import pytest
from PIL import Image

from instseg_jax.geo.rasters import RasterImage, open_raster
from instseg_jax.inference.sources import find_sources
from instseg_jax.windows import Window

rasterio = pytest.importorskip("rasterio")
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.enums import ColorInterp  # noqa: E402

PLACE = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_500_000)
SIZE = (60, 90)


def scene() -> np.ndarray:
    """A picture [60, 90, 3] uint8 without black pixels, its channels unlike each other."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    image = np.stack([40 + 2 * x, 30 + 3 * y, 60 + 0 * x], axis=-1).astype(np.uint8)
    image[10:30, 20:50] = (230, 90, 20)
    return image


def write(path, pixels, *, crs="EPSG:32633", transform=PLACE, after=lambda file: None, **options):
    """Write [h, w] or [h, w, C] as a GeoTIFF; `after` may change the open file."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, count = pixels.shape
    place = {} if transform is None else {"crs": crs, "transform": transform}
    shape = {"height": height, "width": width, "count": count, "dtype": pixels.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place, **options) as file:
        file.write(np.moveaxis(pixels, -1, 0))
        after(file)
    return path


@pytest.mark.parametrize(
    "names", ["red green blue", "blue green red undefined", "alpha red green blue", "undefined gray blue red green"]
)
def test_colors_are_found_by_name(tmp_path, names):
    image = scene()
    bands = dict(zip(("red", "green", "blue"), np.moveaxis(image, -1, 0), strict=True))
    others = {"alpha": np.full(SIZE, 255, np.uint8), "undefined": image[..., 0] // 2, "gray": image[..., 0] // 3}
    pixels = np.stack([(bands | others)[name] for name in names.split()], axis=-1)

    def name_bands(file):
        file.colorinterp = [ColorInterp[name] for name in names.split()]

    raster = RasterImage(write(tmp_path / "a.tif", pixels, photometric="MINISBLACK", after=name_bands))
    np.testing.assert_array_equal(raster.whole(), image)


def test_bands_without_names_are_taken_in_order(tmp_path):
    image = scene()
    for count, wanted in ((1, image[..., [0, 0, 0]]), (2, image[..., [0, 0, 0]]), (4, image)):
        pixels = np.concatenate([image, image[..., :1] // 2], axis=-1)[..., :count]
        raster = RasterImage(write(tmp_path / f"{count}.tif", pixels, photometric="MINISBLACK"))
        np.testing.assert_array_equal(raster.whole(), wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_color_table_is_looked_up(tmp_path, dtype):
    image = Image.fromarray(scene()).quantize(64)
    table = np.array(image.getpalette()).reshape(-1, 3)
    colors = {i: (*map(int, color), 255) for i, color in enumerate(table)}
    path = write(
        tmp_path / "a.tif", np.asarray(image).astype(dtype), photometric="PALETTE",
        after=lambda file: file.write_colormap(1, colors),
    )  # fmt: skip
    raster = RasterImage(path)
    truth = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(raster.whole(), truth)
    small = raster.view(30).reshape(-1, 3)
    assert {tuple(color) for color in small.tolist()} <= {tuple(color) for color in truth.reshape(-1, 3).tolist()}


def test_where_white_is_zero(tmp_path):
    grey = scene()[..., 0]
    raster = RasterImage(write(tmp_path / "a.tif", grey, photometric="MINISWHITE"))
    np.testing.assert_array_equal(raster.whole()[..., 0], 255 - grey)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.tif"), cv2.IMREAD_GRAYSCALE), 255 - grey)


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [
        ("uint16", 65535),
        ("uint16", 0),
        ("int16", -32768),
        ("float32", -9999.0),
        ("float32", float("nan")),
        ("float64", 1e38),
        ("uint8", 255),
        ("uint8", 0),
    ],
)
def test_nodata_stays_out_of_the_stretch(tmp_path, dtype, nodata):
    """60 % of the rows without data, between others: the rest looks as it does without them, and they are black."""
    pixels = scene().astype(dtype) * (1 if dtype == "uint8" else 7)
    alone = RasterImage(write(tmp_path / "alone.tif", pixels)).whole()
    full = np.full((150, 90, 3), nodata, pixels.dtype)
    full[90:] = pixels
    raster = RasterImage(write(tmp_path / "full.tif", full, nodata=nodata))
    assert alone.std() > 30
    np.testing.assert_array_equal(raster.read(Window(0, 90, 90, 60)), alone)
    assert not raster.read(Window(0, 0, 90, 90)).any()
    assert not raster.view(50)[:20].any()


@pytest.mark.parametrize("kind", ["mask in the file", "mask beside it", "alpha"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_what_is_masked_out_is_no_content(tmp_path, kind, dtype):
    pixels = scene().astype(dtype) * (1 if dtype == "uint8" else 7)
    alone = RasterImage(write(tmp_path / "alone.tif", pixels)).whole()
    full = np.full((150, 90, 3), np.iinfo(dtype).max, pixels.dtype)
    full[90:] = pixels
    valid = np.zeros(full.shape[:2], np.uint8)
    valid[90:] = 255
    if kind == "alpha":
        opaque = (valid > 0).astype(dtype) * np.iinfo(dtype).max
        path = write(tmp_path / "a.tif", np.dstack([full, opaque]), photometric="RGB", alpha="YES")
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "mask in the file"):
            path = write(tmp_path / "a.tif", full, photometric="RGB", after=lambda file: file.write_mask(valid))
    assert (tmp_path / "a.tif.msk").exists() == (kind == "mask beside it")
    raster = RasterImage(path)
    np.testing.assert_array_equal(raster.read(Window(0, 90, 90, 60)), alone)
    assert not raster.read(Window(0, 0, 90, 90)).any()


def test_a_fourth_channel_called_alpha_hides_nothing(tmp_path):
    """GDAL calls the fourth of four bands of bytes alpha unless it is told otherwise."""
    image = scene()
    near_infrared = np.tile(np.arange(90, dtype=np.uint8), (60, 1))  # 0 in the first column
    path = write(tmp_path / "a.tif", np.dstack([image, near_infrared]))
    with rasterio.open(path) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    np.testing.assert_array_equal(RasterImage(path).whole(), image)


def test_a_raster_without_any_data_is_black(tmp_path):
    raster = RasterImage(write(tmp_path / "a.tif", np.full((*SIZE, 3), 65535, np.uint16), nodata=65535))
    assert raster.whole().shape == (*SIZE, 3) and not raster.whole().any()


def test_ground_control_points_that_an_affine_transform_fits(tmp_path, caplog):
    corners = [(0, 0), (0, 90), (60, 0), (60, 90), (30, 45)]

    def place(file, off=0.0):
        points = [GroundControlPoint(row, column, *(PLACE @ (column, row))) for row, column in corners]
        points[-1].x += off
        file.gcps = (points, rasterio.crs.CRS.from_epsg(32633))

    raster = open_raster(write(tmp_path / "a.tif", scene(), transform=None, after=place))
    assert raster is not None and raster.georeference is not None and raster.georeference.epsg == 32633
    np.testing.assert_allclose(raster.georeference.transform, tuple(PLACE)[:6], atol=1e-6)
    assert not caplog.text
    bent = open_raster(write(tmp_path / "b.tif", scene(), transform=None, after=lambda file: place(file, 5.0)))
    assert bent is not None and bent.georeference is None and "5 ground control points" in caplog.text


def test_a_crs_without_a_transform_is_no_place(tmp_path, caplog):
    raster = open_raster(write(tmp_path / "a.tif", scene(), transform=rasterio.Affine.identity()))
    assert raster is not None and raster.georeference is None and "no transform" in caplog.text


@pytest.mark.parametrize(
    ("picture", "world"),
    [
        ("a.jpg", "a.jgw"),
        ("a.jpeg", "a.jpegw"),
        ("a.png", "a.pgw"),
        ("a.png", "a.wld"),
        ("a.bmp", "a.bpw"),
        ("a.tif", "a.tfw"),
    ],
)
def test_world_files(tmp_path, picture, world):
    Image.fromarray(scene()).save(tmp_path / picture, quality=95)
    (tmp_path / world).write_text("0.5\n0\n0\n-0.5\n500000.25\n5499999.75\n")
    (source,), _ = find_sources(tmp_path / picture, channels="rgb")
    assert source.georeference.transform == tuple(PLACE)[:6] and source.georeference.wkt is None
    assert np.abs(source.read().astype(int) - scene()).mean() < 3
    (tmp_path / "a.prj").write_text(rasterio.crs.CRS.from_epsg(32633).to_wkt())
    (source,), _ = find_sources(tmp_path / picture, channels="rgb")
    assert source.georeference.epsg == 32633


def test_pictures_without_world_files_are_decoded_as_ever(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    (tmp_path / "b.pgw").write_text("1\n0\n0\n-1\n0\n0\n")
    assert open_raster(tmp_path / "a.png") is None


def test_transparent_colors_of_a_table_are_no_content(tmp_path):
    entries = "".join(
        f'<Entry c1="{c}" c2="{c}" c3="{c}" c4="{alpha}"/>' for c, alpha in ((10, 255), (200, 0), (7, 255))
    )
    numbers = write(tmp_path / "numbers.tif", np.array([[0, 1], [2, 1]], np.uint8))
    (tmp_path / "a.vrt").write_text(
        '<VRTDataset rasterXSize="2" rasterYSize="2"><VRTRasterBand dataType="Byte" band="1"><ColorInterp>Palette'
        f"</ColorInterp><ColorTable>{entries}</ColorTable><SimpleSource><SourceFilename>{numbers}</SourceFilename>"
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    found = RasterImage(tmp_path / "a.vrt", driver=None).whole()
    assert found[..., 0].tolist() == [[10, 0], [7, 0]]
