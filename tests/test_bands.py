"""Pictures of 16 bits and of other than three channels: read, scaled, augmented, trained on and predicted on alike."""

import dataclasses
import json

import numpy as np
import pytest
from bands_data import HEIGHT, WIDTH, write_dataset
from broken_data import run_check
from example_data import RECIPE, make_example

from instseg_jax import bands, images
from instseg_jax.bands import Bands
from instseg_jax.config import load_config
from instseg_jax.data import batches, coco, copy_paste, examples, loader, source, transforms
from instseg_jax.weights import merge
from instseg_jax.weights.names import flatten_tree, unflatten_tree


def config_of(root, channels, **fields):
    fields = {name.replace("__", "."): str(value) for name, value in fields.items()}
    fixed = {
        "data.dir": str(root),
        "data.channels": str(channels),
        "data.scaling": "percentile",
        "data.image_size": "64",
        "data.train_sizes": "(64,)",
        "train.batch_size": "4",
        "data.num_workers": "1",
    }
    return load_config("configs/mask_rtdetr.py:n", fixed | fields)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize(("channels", "suffix"), [(1, ".png"), (3, ".png"), (4, ".png"), (5, ".npy"), (5, ".tif")])
def test_sixteen_bits_and_many_channels_train_and_evaluate(tmp_path, channels, suffix):
    config = source.with_channel_ranges(config_of(write_dataset(tmp_path / "set", channels, suffix), channels))
    assert config.is_locked and len(config.data.channel_ranges) == channels
    for c, (low, high) in enumerate(config.data.channel_ranges):
        assert low == pytest.approx(500 * (c + 1) - 80, abs=40) and high == pytest.approx(500 * (c + 1) + 1080, abs=40)
    dataset = source.build_dataset(config.data, "train")
    picture = dataset.read_image(0)
    assert picture.shape == (HEIGHT, WIDTH, channels) and picture.dtype == np.uint8
    inside, outside = picture[12:28, 14:30], picture[32:]
    # Of the range of about 1170 the noise is around 85, the object 1000 above it.
    assert np.abs(inside.mean(axis=(0, 1)) - 255 * 1085 / 1170).max() < 12
    assert np.abs(outside.mean(axis=(0, 1)) - 255 * 85 / 1170).max() < 12
    train = loader.build_train_loader(config, dataset).batches()
    for _ in range(4):
        batch = next(train)
        assert batch.images.shape == (4, 64, 64, channels)
        assert np.isfinite(batch.images).all() and batch.images.std() > 0.05
        assert batch.targets.valid.any() and batch.targets.masks.any()
    train.close()
    val = next(loader.build_eval_loader(config, source.build_dataset(config.data, "val")).batches())
    expected, _ = images.preprocess(picture, (64, 64), resize="stretch", interpolation="cubic")
    np.testing.assert_array_equal(val.images[0], expected)


def test_ranges_are_those_of_the_training_pictures_and_fixed(tmp_path):
    root = write_dataset(tmp_path / "set", 4, ".png")
    config = source.with_channel_ranges(config_of(root, 4))
    assert source.with_channel_ranges(config) is config
    assert source.with_channel_ranges(config_of(root, 4)).data.channel_ranges == config.data.channel_ranges
    stored = json.loads(config.to_json_best_effort())["data"]
    assert bands.build_bands(load_config("configs/mask_rtdetr.py:n").data) is None
    loaded = load_config("configs/mask_rtdetr.py:n")
    with loaded.unlocked():
        loaded.data.update({name: stored[name] for name in ("channels", "scaling")})
        loaded.data.channel_ranges = tuple(stored["channel_ranges"])
    assert bands.build_bands(loaded.data) == bands.build_bands(config.data)


@pytest.mark.parametrize(
    ("channels", "fields", "message"),
    [
        (4, {"data__scaling": "none"}, "pixels of uint16; set data.scaling=percentile"),
        (3, {}, r"0\.png' has 4 channels, data.channels is 3"),
        (4, {"data__scaling": "log"}, "data.scaling must be one of none, percentile, got 'log'"),
        (4, {"data__scale_percentiles": (50, 20)}, "data.scale_percentiles must be"),
        (4, {"data__channel_ranges": ((0.0, 1.0),)}, "holds 1 ranges, but data.channels is 4"),
        (0, {"data__channel_ranges": ()}, "data.channels must be a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, channels, fields, message):
    root = write_dataset(tmp_path / "set", 4, ".png")
    with pytest.raises(ValueError, match=message):
        config = source.with_channel_ranges(config_of(root, channels, **fields))
        source.build_dataset(config.data, "train").read_image(0)


def test_scaling_by_hand():
    array = np.array([[[0, 10], [100, 20], [200, 30], [300, 40]]], np.uint16)
    scaled = images.to_pixels(array, Bands(2, ((100.0, 300.0), (10.0, 40.0))))
    assert scaled[..., 0].tolist() == [[0, 0, 128, 255]]  # 127.5 rounds to the even neighbour
    assert scaled[..., 1].tolist() == [[0, 85, 170, 255]]
    assert bands.find_ranges([np.full((3, 3, 1), 7.0)], (1, 99)) == ((7.0, 8.0),)
    floats = np.array([[[np.nan], [0.5]]], np.float32)
    assert images.to_pixels(floats, Bands(1, ((0.0, 1.0),))).tolist() == [[[0], [128]]]


def many_channels(channels):
    example = make_example()
    rng = np.random.default_rng(channels)
    return dataclasses.replace(example, image=rng.integers(0, 256, (*example.image.shape[:2], channels), np.uint8))


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 9])
def test_geometry_treats_every_channel_as_a_picture_of_its_own(channels):
    """Crops, flips, turns, canvases and resizing of C channels against those of each channel as a grey picture."""
    recipe = dataclasses.replace(RECIPE, photometric_probability=0.0, quarter_turns=True, scale_jitter=(0.5, 1.5))
    example, layout = many_channels(channels), examples.Layout("letterbox", 1, "exact", False, 9)
    for seed in range(12):
        interpolation = ("nearest", "linear", "area", "cubic", "lanczos")[seed % 5]

        def finish(example, seed=seed, interpolation=interpolation):
            done = transforms.augment(example, np.random.default_rng(seed), recipe)
            return examples.finish(done, (32, 48), interpolation, layout)

        whole = finish(example)
        assert whole.image.shape == (32, 48, channels)
        for c in range(channels):
            single = finish(dataclasses.replace(example, image=example.image[..., [c]]))
            np.testing.assert_allclose(whole.image[..., [c]], single.image, atol=1.5 / 255)
            np.testing.assert_array_equal(whole.masks, single.masks)


def test_colours_of_other_channels_are_brightness_and_contrast():
    example = many_channels(5)
    changed = [
        transforms.distort_colors(example, np.random.default_rng(seed), probability=1.0).image for seed in range(20)
    ]
    assert all(image.shape == example.image.shape and image.dtype == np.uint8 for image in changed)
    assert sum((image != example.image).any() for image in changed) >= 10
    assert len({image.mean().round(3) for image in changed}) > 5


def test_copy_paste_of_many_channels():
    example, donor = many_channels(5), many_channels(5)
    result = copy_paste.paste_objects(example, donor, np.random.default_rng(0), max_objects=2, scale_range=(0.5, 1.5))
    assert result.image.shape == example.image.shape and len(result.labels) > len(example.labels) - 2


def test_the_check_reads_them_too(tmp_path):
    root = write_dataset(tmp_path / "set", 5, ".npy")
    assert run_check(root, bands=Bands(5, ((0.0, 1.0),) * 5)).passed
    found = {flaw.code for flaw in run_check(root, bands=Bands(4, ((0.0, 1.0),) * 4)).flaws}
    assert "undecodable_image" in found
    (root / "images" / "2.npy").write_bytes((root / "images" / "2.npy").read_bytes()[:500])
    assert "undecodable_image" in {flaw.code for flaw in run_check(root, bands=Bands(5, ((0.0, 1.0),) * 5)).flaws}


def test_stem_of_colours_becomes_one_of_other_channels():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 3, 8)).astype(np.float32)
    grey = rng.normal(size=(3, 3, 1)).astype(np.float32)
    for channels in (1, 2, 4, 5, 12):
        inflated = merge.inflate_stem(kernel, channels)
        assert inflated.shape == (3, 3, channels, 8)
        # A picture of equal channels gives what it gave: the sum over the channels is the same.
        before, after = np.einsum("hwc,hwko->o", grey, kernel), np.einsum("hwc,hwko->o", grey, inflated)
        np.testing.assert_allclose(after, before, rtol=1e-5)
    np.testing.assert_allclose(merge.inflate_stem(kernel, 6)[:, :, :3], kernel / 2)


@pytest.mark.parametrize("path", [stem.removeprefix("params/") for stem in merge.STEMS])
def test_merging_inflates_only_the_stem(path):
    def tree(channels: int, width: int, value: float) -> dict:
        return unflatten_tree({f"params/{path}": np.full((3, 3, channels, width), value, np.float32)})

    merged, summary = merge.merge_variables(tree(5, 8, 0), tree(3, 8, 1))
    kernel = flatten_tree(merged)[f"params/{path}"]
    assert kernel.shape == (3, 3, 5, 8) and kernel.sum() == pytest.approx(3 * 3 * 3 * 8)
    assert summary.reshaped == (path,) and summary.loaded == ()
    with pytest.raises(ValueError, match=path):
        merge.merge_variables(tree(5, 16, 0), tree(3, 8, 1))


def test_a_picture_to_look_at():
    picture = np.arange(2 * 2 * 5, dtype=np.uint8).reshape(2, 2, 5)
    np.testing.assert_array_equal(bands.show_bands(picture), picture[..., :3])
    assert bands.show_bands(picture[..., :1]).shape == (2, 2, 3)


def test_sample_of_a_batch_has_all_channels(tmp_path):
    root = write_dataset(tmp_path / "set", 5, ".npy")
    config = source.with_channel_ranges(config_of(root, 5))
    dataset = coco.select_trainable(source.build_dataset(config.data, "train"), keep_empty=False)
    layout = examples.Layout("stretch", 2, "polygon", False, 4)
    sample = batches.make_sample(dataset, 0, np.random.default_rng(0), RECIPE, (32, 32), "area", layout)
    assert sample.image.shape == (32, 32, 5)
