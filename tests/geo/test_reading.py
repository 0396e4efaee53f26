"""New rasters are read as those were that a model was trained on: resolution, bands and stretch."""

import json

import cv2
import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("pyproj")

from instseg_jax.config import load_config  # noqa: E402
from instseg_jax.data.source import with_reading  # noqa: E402
from instseg_jax.geo.rasters import RasterImage, open_raster  # noqa: E402
from instseg_jax.geo.reading import Reading, build_reading, make_reading  # noqa: E402
from instseg_jax.inference.sources import find_sources  # noqa: E402
from instseg_jax.windows import Window  # noqa: E402

SIZE = (90, 120)
TURNS = (0, 40)


def smooth(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (*SIZE, 3))
    return np.clip(cv2.GaussianBlur(noise, (0, 0), 6) * 4 - 380, 0, 255).astype(np.uint8)


def write(path, pixels, *, metres=0.5, turn=0, **more):
    transform = rasterio.Affine.translation(500_000, 5_500_000) * rasterio.Affine.rotation(turn)
    transform = transform * rasterio.Affine.scale(metres, -metres)
    height, width, count = pixels.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype=pixels.dtype.name,
        crs="EPSG:32633", transform=transform, **more,
    ) as file:  # fmt: skip
        file.write(np.moveaxis(pixels, -1, 0))
    return path


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("gsd", [0.25, 1.0])
def test_another_resolution_is_read_at_the_trained_one(tmp_path, gsd, turn):
    pixels = smooth()
    plain = open_raster(write(tmp_path / "a.tif", pixels, turn=turn))
    raster = open_raster(tmp_path / "a.tif", Reading(gsd, None, None))
    scale = 0.5 / gsd
    assert raster.size == (SIZE[0] * scale, SIZE[1] * scale)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    expected = cv2.resize(pixels, raster.size[::-1], interpolation=method).astype(float)
    assert np.abs(raster.whole() - expected).mean() < 1.5
    part = raster.read(Window(20, 10, 30, 25)).astype(float)
    assert np.abs(part - expected[10:35, 20:50]).mean() < 2 and expected.std() > 10
    corners = np.array([[0, 0], [SIZE[1], 0], [SIZE[1], SIZE[0]], [13, 7]], float)
    on_ground = raster.georeference.to_ground(corners * scale)
    np.testing.assert_allclose(on_ground, plain.georeference.to_ground(corners), atol=1e-6)


def test_nearly_the_same_resolution_is_left_alone(tmp_path):
    raster = open_raster(write(tmp_path / "a.tif", smooth()), Reading(0.48, None, None))
    assert raster.size == SIZE
    np.testing.assert_array_equal(raster.whole(), smooth())


def test_a_resolution_that_is_unknown_is_said(tmp_path, caplog):
    cv2.imwrite(str(tmp_path / "a.png"), smooth())
    (tmp_path / "a.pgw").write_text("0.5\n0\n0\n-0.5\n0\n0\n")
    assert open_raster(tmp_path / "a.png", Reading(1.0, None, None)).size == SIZE
    assert "its resolution is unknown, the model was trained at 1 m a pixel" in caplog.text


def test_the_trained_stretch_and_bands_are_taken(tmp_path):
    pixels = smooth().astype(np.uint16) * 10
    path = write(tmp_path / "a.tif", pixels)
    reading = Reading(None, ("3", "2", "1"), ((100.0,) * 3, (2000.0,) * 3))
    (source,) = find_sources(str(path), channels="rgb", reading=reading)[0]
    expected = np.clip((pixels[..., ::-1] - 100.0) / 1900, 0, 1) * 255
    assert np.abs(source.read() - expected).max() <= 1
    assert np.abs(RasterImage(path).whole() - expected).mean() > 5


def test_a_raster_without_the_band_is_one_error(tmp_path):
    reading = Reading(None, ("nir", "red", "green"), None)
    files = [write(tmp_path / f"{name}.tif", smooth(), photometric="RGB") for name in "ab"]
    for source in find_sources(files, channels="rgb", reading=reading)[0]:
        with pytest.raises(ValueError, match="has no band 'nir'; it has 1 \\(red\\)"):
            source.read()


def test_training_puts_it_into_the_config():
    config = load_config("configs/quickstart.py")
    assert build_reading(config.data) is None and with_reading(config, {}) == config
    said = {"gsd": 0.3, "bands": None, "stretch": [[1, 2, 3], [10, 20, 30]]}
    filled = with_reading(config, {"map": said})
    assert build_reading(filled.data) == Reading(0.3, None, ((1, 2, 3), (10, 20, 30)))
    again = load_config("configs/quickstart.py", {"data.map_gsd": "0.5"})
    assert with_reading(again, {"map": said}).data.map_gsd == 0.5
    plain = json.loads(filled.to_json_best_effort())["data"]
    assert make_reading({"gsd": plain["map_gsd"], "stretch": plain["map_stretch"]}, "") == build_reading(filled.data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gsd", -1),
        ("gsd", "fine"),
        ("bands", ["red"]),
        ("stretch", [[1, 2, 3]]),
        ("stretch", [[5] * 3, [float("nan")] * 3]),
    ],
)
def test_what_no_convert_has_written_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"info\.map\.{name} is"):
        with_reading(load_config("configs/quickstart.py"), {"map": {name: value}})
