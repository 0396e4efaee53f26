"""Pictures become the reference's network input (`preprocess/*`): bicubic on uint8, no antialiasing, / 255."""

import numpy as np
import pytest
import synth
from reference import CASES, load_json

from instseg_jax.images import preprocess, read_image, resize_pixels
from instseg_jax.masks import rasterize_polygons

FILE = CASES / "preprocess" / "preprocess.npz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the folder has no preprocess/preprocess.npz")
PHOTOGRAPHS = sorted(path.stem for path in (CASES / "preprocess").glob("*.jpg"))


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    return dict(np.load(FILE))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph(numbers, name):
    info = load_json("preprocess/preprocess.json")[name]
    image = read_image(CASES / "preprocess" / f"{name}.jpg")
    assert list(image.shape) == info["decoded_shape"]
    pixels, content = preprocess(image, (640, 640), resize="stretch", interpolation="cubic")
    assert content == (640, 640)
    mine = np.moveaxis(pixels, -1, 0).reshape(-1)
    reference = numbers[f"{name}@s"]
    # A decoder of another version may differ by a grey level in a few pixels.
    difference = np.abs(mine[synth.subsample_indices(name, mine.size, reference.size)] - reference)
    assert difference.max() <= 2 / 255
    assert (difference > 1e-6).mean() < 0.01
    assert mine.mean() == pytest.approx(info["mean"], abs=1e-4)


@pytest.mark.parametrize(("key", "size"), [("resize_out_uint8", (320, 320)), ("resize_down_uint8", (96, 128))])
def test_resizing(numbers, key, size):
    mine = resize_pixels(numbers["resize_in"], size, size, "cubic") * 255
    difference = np.abs(mine - numbers[key].astype(np.float32))
    assert numbers[key].shape == mine.shape
    assert difference.max() <= 1.001  # OpenCV versions round one value in a hundred thousand otherwise
    assert (difference > 0.5).mean() < 1e-4


def test_polygons_to_masks(numbers):
    info = load_json("preprocess/preprocess.json")["p2m"]
    height, width = info["hw"]
    for polygons, reference in zip(info["poly"], numbers["p2m"], strict=True):
        mine = rasterize_polygons([np.array(p).reshape(-1, 2) for p in polygons], height, width)
        np.testing.assert_array_equal(mine, reference)
