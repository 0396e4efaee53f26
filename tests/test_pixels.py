"""One reading of pixels: the check, the loader, predict and the reader of exports give what was written, everywhere."""

import dataclasses
import functools
import io
import itertools
import json
import struct
import sys
import types
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, features
from turned_pictures import turned, with_orientation

from instseg_jax import images, pixels
from instseg_jax.bands import Bands
from instseg_jax.data import check_images, coco
from instseg_jax.data.coco_entries import ImageRecord
from instseg_jax.export.export import standalone_text
from instseg_jax.inference.sources import find_sources

HEIGHT, WIDTH = 24, 40
LOSSY = {"JPEG": 12, "AVIF": 4}  # grey levels by which they differ from what was written
SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "AVIF": ".avif", "BMP": ".bmp"}
DEPTHS = {
    "JPEG": ("grey", "rgb"),
    "PNG": ("grey", "rgb", "rgba", "grey16", "rgb16"),
    "WEBP": ("rgb",),
    "TIFF": ("grey", "rgb", "rgba", "grey16", "rgb16", "floats", "rgb_floats"),
    "AVIF": ("rgb",),
    "BMP": ("grey", "rgb"),
}
KINDS = [(file_format, depth) for file_format, depths in DEPTHS.items() for depth in depths]


def scene(depth):
    """A picture without any symmetry, [24, 40] or [24, 40, C]."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    picture = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, 40 + x + y], -1).astype(np.uint8)
    picture[4:12, 6:20] = (230, 40, 20)
    if depth == "rgba":
        return np.dstack([picture, np.full((HEIGHT, WIDTH), 90, np.uint8)])
    picture = picture if "rgb" in depth else picture[..., 0]
    if "16" in depth:
        return picture.astype(np.uint16) * 256 + np.arange(WIDTH, dtype=np.uint16).reshape(
            WIDTH, *[1] * (picture.ndim - 2)
        )
    return picture.astype(np.float32) / 255 if "floats" in depth else picture


def with_exif_chunk(png, block):
    chunk = b"eXIf" + block
    return png[:33] + struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


@functools.cache
def encode(file_format, depth, orientation):
    """The bytes of the scene in a file that says to turn it."""
    array, data, exif = scene(depth), io.BytesIO(), Image.Exif()
    exif[pixels.ORIENTATION] = orientation
    if depth in ("rgb16", "rgb_floats"):  # which Pillow can't write
        encoded = cv2.imencode(SUFFIX[file_format], np.ascontiguousarray(array[..., ::-1]))[1].tobytes()
        if file_format == "TIFF":
            return with_orientation(encoded, orientation)
        return with_exif_chunk(encoded, exif.tobytes().removeprefix(b"Exif\0\0"))
    if file_format == "TIFF":
        Image.fromarray(array).save(data, "TIFF")
        return with_orientation(data.getvalue(), orientation)
    options = {
        "JPEG": {"quality": 98, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    about = {} if file_format == "BMP" else {"exif": exif}
    Image.fromarray(array).save(data, file_format, **about, **options.get(file_format, {}))
    return data.getvalue()


@pytest.fixture(scope="module")
def reader():
    """The reader that every export carries."""
    module = types.ModuleType("postprocess")
    sys.modules["postprocess"] = module  # where dataclasses look
    exec(compile(standalone_text(), "postprocess.py", "exec"), module.__dict__)
    yield module
    del sys.modules["postprocess"]


def expected(array, bands):
    """By hand: what the rules say."""
    array = np.atleast_3d(array)
    if bands is not None and bands.ranges is not None:
        return np.stack(
            [
                np.clip((array[..., c].astype(float) - low) * 255 / (high - low), 0, 255)
                for c, (low, high) in enumerate(bands.ranges)
            ],
            -1,
        )
    eight = array / 256 if array.dtype == np.uint16 else array * (255.0 if array.dtype.kind == "f" else 1.0)
    if bands is not None:
        return eight
    return np.repeat(eight, 3, -1) if array.shape[2] == 1 else eight[..., :3]


def settings(depth):
    """Ways of reading that suit a picture: 8-bit colour, its own channels, its own channels by ranges."""
    array = np.atleast_3d(scene(depth))
    high = {"u": float(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else 0.0, "f": 1.0}[array.dtype.kind]
    ways = [None, Bands(array.shape[2], tuple((0.1 * high, (0.9 - 0.1 * c) * high) for c in range(array.shape[2])))]
    return [*ways, Bands(array.shape[2], None)] if array.dtype == np.uint8 and array.shape[2] != 3 else ways


def write(tmp_path, file_format, depth, orientation):
    path = tmp_path / f"{depth}_{orientation}{SUFFIX[file_format]}"
    path.write_bytes(encode(file_format, depth, orientation))
    return path


def readings(path, bands, reader):
    """What everybody makes of a file."""
    size = images.decode_image(path.read_bytes(), "x", bands).shape[:2]
    record = ImageRecord(1, path.name, *size)
    content = {"images": [{"id": 1, "file_name": path.name, "height": size[0], "width": size[1]}], "annotations": []}
    (path.parent / "set.json").write_text(json.dumps(content | {"categories": [{"id": 1, "name": "a"}]}))
    dataset = dataclasses.replace(coco.read_coco(path.parent / "set.json", path.parent), bands=bands)
    facts = check_images.inspect_picture(path, bands)
    assert facts.error is None and facts.size == size
    assert (
        check_images.find_picture_flaws("train", record, facts, path.parent) == []
        or facts.is_cut
        or facts.orientation > 1
    )
    channels, ranges = (3, None) if bands is None else (bands.channels, bands.ranges)
    config = {"preprocessing": {"channels": channels, "channel_ranges": ranges}}
    yield "the loader", dataset.read_image(0)
    given = {"a path": path, "bytes": path.read_bytes()}
    if not path.name.startswith(("rgb16", "rgb_floats")):  # of which Pillow has no images
        given["PIL"] = Image.open(path)
    for name, x in given.items():
        (source,) = find_sources(x, channels="rgb", bands=bands)[0]
        yield f"predict of {name}", source.read()
    yield "an export", reader.read_image(path, config)


@pytest.mark.parametrize(("file_format", "depth"), KINDS, ids=["-".join(kind) for kind in KINDS])
def test_all_read_the_same_pixels(tmp_path, reader, file_format, depth):
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for orientation in range(1, 9) if file_format != "BMP" else (1,):
        path = write(tmp_path, file_format, depth, orientation)
        for bands in settings(depth):
            wanted = expected(turned(scene(depth), orientation), bands)
            found = dict(readings(path, bands, reader))
            assert len(found) >= 4
            for name, array in found.items():
                what = f"{name}, orientation {orientation}, {bands}"
                assert array.dtype == np.uint8 and array.shape == wanted.shape, what
                scale = 1 if bands is None or bands.ranges is None else 2.6  # a level is more of a narrower range
                bound = LOSSY.get(file_format, 1) * scale if file_format in LOSSY else 1
                assert np.abs(array - wanted).max() <= bound, what
                assert np.abs(array.astype(int) - found["the loader"]).max() <= 1, what


@pytest.mark.parametrize(("file_format", "depth"), KINDS, ids=["-".join(kind) for kind in KINDS])
def test_the_reader_of_exports_needs_but_one_library(tmp_path, reader, monkeypatch, file_format, depth):
    """Pillow alone reads the same or says what it can't; OpenCV alone too."""
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    read = 0
    for orientation, bands in itertools.product((1, 6, 7) if file_format != "BMP" else (1,), settings(depth)):
        data = encode(file_format, depth, orientation)
        with_both = images.decode_image(data, "x", bands)
        channels, ranges = (3, None) if bands is None else (bands.channels, bands.ranges)
        path = write(tmp_path, file_format, depth, orientation)
        for gone in ("cv2", "PIL"):
            with monkeypatch.context() as without:
                without.setitem(sys.modules, gone, None)
                without.setitem(sys.modules, "rasterio", None)
                try:
                    array = reader.read_image(path, {"preprocessing": {"channels": channels, "channel_ranges": ranges}})
                except ValueError as error:
                    assert any(word in str(error) for word in ("OpenCV", "Pillow", "rasterio")), error
                    continue
            read += 1
            assert array.shape == with_both.shape
            assert np.abs(array.astype(int) - with_both).max() <= 1, (gone, orientation, bands)
    assert read >= 1 or depth == "rgb_floats"


def test_arrays_are_read_as_files_are():
    for depth in ("grey", "rgb", "rgba", "grey16", "rgb16", "floats", "rgb_floats"):
        for bands in settings(depth):
            (source,) = find_sources(scene(depth), channels="rgb", bands=bands)[0]
            assert np.abs(source.read() - expected(scene(depth), bands)).max() <= 1
    five = np.dstack([scene("rgb"), scene("rgb")[..., :2]])
    (source,) = find_sources(five, channels="rgb", bands=Bands(5, None))[0]
    np.testing.assert_array_equal(source.read(), five)
    with pytest.raises(ValueError, match=r"An image has 5 channels, data\.channels is 4"):
        find_sources(five, channels="rgb", bands=Bands(4, None))
    bgr = find_sources(scene("rgba")[..., [2, 1, 0, 3]], channels="bgr", bands=Bands(4, None))[0]
    np.testing.assert_array_equal(next(bgr).read(), scene("rgba"))


def test_deep_modes_of_pil_are_read_or_refused_as_arrays_are():
    grey = scene("grey")
    for image in (
        Image.fromarray(scene("grey16")),
        Image.fromarray(scene("floats")),
        Image.frombytes("I;16B", (WIDTH, HEIGHT), scene("grey16").astype(">u2").tobytes()),
    ):
        (source,) = find_sources(image, channels="rgb")[0]
        assert np.abs(source.read().astype(int) - grey[..., None]).max() <= 1
    for image, message in (
        (Image.fromarray(grey.astype(np.int32)), "must be of uint8, uint16 or floats in 0..1, got int32"),
        (Image.fromarray(grey.astype(np.float32)), r"must lie in 0\.\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            next(find_sources(image, channels="rgb")[0]).read()
    for mode in ("1", "P", "LA", "PA", "CMYK", "YCbCr", "RGBX"):
        image = Image.fromarray(scene("rgb"))
        image = image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
        (source,) = find_sources(image, channels="rgb")[0]
        assert np.abs(source.read().astype(int) - np.asarray(image.convert("RGB"))).max() <= 1, mode


def text_png(tmp_path, megabytes):
    data, text = io.BytesIO(), b"history\0\0" + zlib.compress(b" " * (megabytes << 20))
    Image.fromarray(scene("rgb")).save(data, "PNG")
    chunk = b"zTXt" + text
    path = tmp_path / "text.png"
    plain = data.getvalue()
    path.write_bytes(
        plain[:33] + struct.pack(">I", len(text)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]
    )
    return path


def test_the_check_refuses_nothing_that_training_reads(tmp_path, reader, monkeypatch):
    path = text_png(tmp_path, 3)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(path).load()
    assert check_images.inspect_picture(path).error is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of so many Pillow opens twice, and no more
    with pytest.raises(Image.DecompressionBombError):
        Image.open(write(tmp_path, "PNG", "rgb", 1))
    config = {"preprocessing": {"channels": 3, "channel_ranges": None}}
    for gone in (None, "cv2"):
        with monkeypatch.context() as without:
            if gone:
                without.setitem(sys.modules, gone, None)
            np.testing.assert_array_equal(reader.read_image(path, config), scene("rgb"))
    for file_format in ("JPEG", "WEBP", "TIFF", "BMP"):
        assert check_images.inspect_picture(write(tmp_path, file_format, "rgb", 1)).error is None


def test_the_check_passes_nothing_that_training_refuses(tmp_path):
    deep = write(tmp_path, "PNG", "grey16", 1)
    for bands, message in (
        (Bands(1, None), "pixels of uint16; set data.scaling=percentile"),
        (Bands(2, None), "has 1 channels, data.channels is 2"),
    ):
        assert message in check_images.inspect_picture(deep, bands).error
        with pytest.raises(ValueError, match=message.split(";")[0]):
            images.read_image(deep, bands)
    wide = tmp_path / "wide.tif"
    Image.fromarray(scene("grey").astype(np.float32)).save(wide)  # 0..255
    assert "must lie in 0..1" in check_images.inspect_picture(wide).error
    cut = tmp_path / "cut.png"
    cut.write_bytes(encode("PNG", "rgb", 1)[:-40])
    assert check_images.inspect_picture(cut).error is not None


def test_layouts_of_tiffs_that_libraries_mistake(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    rng = np.random.default_rng(0)
    for dtype, channels, options in (
        ("uint16", 3, {"photometric": "RGB", "interleave": "band"}),
        ("uint16", 3, {"photometric": "MINISBLACK"}),
        ("uint16", 3, {"photometric": "RGB", "interleave": "pixel", "compress": "deflate", "predictor": 2}),
        ("uint8", 2, {}),
        ("uint8", 3, {"interleave": "band"}),
        ("uint8", 4, {"photometric": "RGB", "alpha": "yes"}),
        ("float64", 4, {}),
        ("float32", 2, {}),
        ("int16", 2, {}),
        ("uint16", 3, {"photometric": "RGB", "tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "zstd"}),
    ):
        array = rng.integers(1, 120, (HEIGHT, WIDTH, channels)).astype(dtype)
        path = tmp_path / "layout.tif"
        shape = {"width": WIDTH, "height": HEIGHT, "count": channels, "dtype": dtype}
        with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
            file.write(np.moveaxis(array, 2, 0))
        np.testing.assert_array_equal(pixels.decode(path.read_bytes(), "x"), array, err_msg=str((dtype, options)))
        assert check_images.inspect_picture(path, Bands(channels, ((0.0, 200.0),) * channels)).error is None


@pytest.mark.parametrize("tag", [256, 257])
def test_a_tiff_of_two_sizes_is_refused(tag):
    """One library would take 8 pixels, another 30,000."""
    sizes = [(256, 8), (257, 8), (tag, 30_000)]
    entries = [*sorted(sizes), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64)]
    body = b"".join(struct.pack("<HHII", found, 4, 1, value) for found, value in entries)
    data = b"II*\0" + struct.pack("<I", 72) + bytes(64) + struct.pack("<H", len(entries)) + body + bytes(4)
    what = "width" if tag == 256 else "height"
    with pytest.raises(
        ValueError, match=rf"'a\.tif' can't be read as an image: it says more than one {what}, \[8, 30000\]"
    ):
        pixels.decode(data, "a.tif")
