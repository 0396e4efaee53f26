"""Large images in windows: nothing twice, nothing lost, no memory for what is not looked at."""

import dataclasses
import itertools
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake_model import CATEGORY_IDS, CLASS_NAMES, make_model, make_pipeline, picture
from PIL import Image
from places import EMBEDDED, HELPERS

from instseg_jax.config import load_config
from instseg_jax.inference.mask_merging import merge_windows
from instseg_jax.inference.pieces import WindowInstances
from instseg_jax.inference.pipeline import build_pipeline
from instseg_jax.inference.tiling import Tiles, windows_of
from instseg_jax.masks import decode_rle, encode_mask, mask_box_xyxy_px, rasterize_polygons
from instseg_jax.scoring.run import score_model
from instseg_jax.types import Instances
from instseg_jax.windows import Window, fill_up, view_size

TILES = Tiles(64, 0.25, False)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline(batch_size=4)


def tiled(pipe, image, **options) -> list[tuple[str, np.ndarray]]:
    """(label, mask) of each instance, found in windows of 64 pixels."""
    (result,) = pipe.predict(image, tile=64, **({"overlap": 0.25, "whole_image": False} | options))
    for box, mask in zip(result.boxes, result.masks, strict=True):
        rows, columns = np.nonzero(decode_rle(mask))
        extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(box["coordinate"], extent, atol=1e-3)
    return [(box["label"], decode_rle(mask)) for box, mask in zip(result.boxes, result.masks, strict=True)]


def masks_of(image: np.ndarray, label: int) -> np.ndarray:
    return (image == np.eye(3, dtype=np.uint8)[label] * 255).all(axis=2)


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (200, 70), (10, 300), (129, 257)])
def test_windows_cover_the_image(size):
    windows = windows_of(size, TILES)
    seen = np.zeros(size, int)
    for window in windows:
        assert (window.width, window.height) == (64, 64)
        seen[window.y : window.y + 64, window.x : window.x + 64] += 1
    assert seen.min() == 1 or (seen.min() > 1 and len(windows) > 1)
    xs = sorted({window.x for window in windows})
    assert all(b - a <= 48 for a, b in itertools.pairwise(xs)) and xs[-1] == max(0, size[1] - 64)


def test_windows_without_overlap():
    assert [(w.x, w.y) for w in windows_of((128, 128), Tiles(64, 0.0, False))] == [(0, 0), (64, 0), (0, 64), (64, 64)]


@pytest.mark.parametrize(("tile", "overlap", "message"), [(8, 0.2, "tile is 8"), (64, 0.95, "overlap is 0.95")])
def test_wrong_tiles(pipe, tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        pipe.predict(picture(), tile=tile, overlap=overlap)


def test_parts_and_views():
    assert view_size((200, 100), 50) == (50, 25) and view_size((20, 10), 50) == (20, 10)
    full = fill_up(np.ones((2, 3, 3), np.uint8), Window(5, 5, 4, 4))
    assert full.shape == (4, 4, 3) and full.sum() == 18 and full[2:].sum() == 0


def test_every_object_is_found_once_wherever_it_lies(pipe):
    """A small rectangle is moved over all the borders of windows."""
    for x in range(0, 130, 7):
        image = picture((0, x, x // 2, x + 20, x // 2 + 14), size=(100, 160))
        ((label, mask),) = tiled(pipe, image)
        assert label == "red"
        np.testing.assert_array_equal(mask, masks_of(image, 0))


def test_an_object_larger_than_every_window(pipe):
    image = picture((2, 10, 20, 240, 150), (2, 250, 20, 258, 150), size=(170, 270))
    found = tiled(pipe, image)
    assert [label for label, _ in found] == ["blue", "blue"]
    np.testing.assert_array_equal(found[0][1] | found[1][1], masks_of(image, 2))
    assert sorted(int(mask.sum()) for _, mask in found) == [8 * 130, 230 * 130]


def test_neighbours_stay_apart(pipe):
    """Objects of one class a pixel apart, and touching objects of two classes, on the borders of windows."""
    image = picture((0, 40, 10, 55, 40), (0, 56, 10, 75, 40), (1, 75, 10, 95, 40), size=(64, 160))
    found = tiled(pipe, image)
    assert sorted((label, int(mask.sum())) for label, mask in found) == [("green", 600), ("red", 450), ("red", 570)]


def test_windows_of_a_mosaic_find_what_the_pictures_hold(pipe):
    """Without overlap, tiled results are those of the pictures that the mosaic is made of."""
    rng = np.random.default_rng(3)
    pictures = [
        picture(*[(int(k), int(x), int(y), int(x) + 9, int(y) + 7) for k, x, y in zip(
            rng.integers(0, 3, 4), rng.integers(4, 50, 4), rng.integers(4, 50, 4), strict=True)])
        for _ in range(6)
    ]  # fmt: skip
    mosaic = np.vstack([np.hstack(pictures[:3]), np.hstack(pictures[3:])])
    alone = [
        (box["label"], np.add(box["coordinate"], [64 * (i % 3), 64 * (i // 3)] * 2).tolist(), box["score"])
        for i, result in enumerate(pipe.predict(pictures))
        for box in result.boxes
    ]
    (result,) = pipe.predict(mosaic, tile=64, overlap=0.0, whole_image=False)
    together = [(box["label"], box["coordinate"], box["score"]) for box in result.boxes]
    assert len(alone) > 12
    assert sorted(together) == sorted(alone)


def test_a_picture_that_fits_into_a_window_is_worked_on_as_it_is(pipe):
    image = picture((0, 10, 20, 30, 50), size=(60, 50))
    (plain,), (windowed,) = pipe.predict(image), pipe.predict(image, tile=64)
    assert windowed.json == plain.json


def test_windows_go_through_the_same_program():
    model = make_model()
    pipe = build_pipeline(model, device="cpu", threshold=np.full(3, 0.1), batch_size=4)
    list(pipe.predict(picture(size=(200, 300)), tile=64, overlap=0.2))
    list(pipe.predict(picture(size=(100, 70)), tile=64, overlap=0.5))
    assert model.model.traced == [(4, 64, 64, 3)]


def test_windows_tell_how_far_they_are(pipe):
    image, seen = picture((0, 100, 20, 130, 50), size=(90, 200)), []

    def watched(found, number):
        for place, one in enumerate(found, start=1):
            seen.append((place, number))
            yield one

    (shown,), (plain,) = pipe.predict(image, tile=64, progress=watched), pipe.predict(image, tile=64)
    number = len(windows_of((90, 200), Tiles(64, 0.2, True))) + 1
    assert number == 9 and seen == [(place, 9) for place in range(1, 10)], "the whole image is one more"
    assert shown.json == plain.json and len(shown) == 1


def test_files_among_many(pipe, tmp_path):
    Image.fromarray(picture((0, 100, 20, 130, 50), size=(90, 200))).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    first, second = pipe.predict(tmp_path, tile=64, overlap=0.25)
    assert len(first) == 1 and first.size == (90, 200) and "b.png" in second.error


# --- merging, piece by piece ---------------------------------------------------------------------------------------


def instances(*found: tuple[int, float, tuple[int, int, int, int]], size: tuple[int, int] = (100, 100)) -> Instances:
    """Instances (class, score, rectangle) of a window or an image."""
    masks = []
    for _, _, (x1, y1, x2, y2) in found:
        mask = np.zeros(size, bool)
        mask[y1:y2, x1:x2] = True
        masks.append(encode_mask(mask))
    return Instances(
        scores=np.array([score for _, score, _ in found], np.float32),
        labels=np.array([label for label, _, _ in found], np.int32),
        boxes_xyxy_px=np.array([box for _, _, box in found], np.float32).reshape(-1, 4),
        masks=masks,
    )


LEFT, RIGHT = Window(0, 0, 100, 100), Window(80, 0, 100, 100)


def merge(left: Instances, right: Instances, whole: Instances | None = None):
    parts = [WindowInstances(LEFT, left), WindowInstances(RIGHT, right)]
    merged = merge_windows(parts, whole, size=(100, 180), overlap_px=20)
    return [
        (int(label), round(float(score), 3), [round(v) for v in box], int(decode_rle(mask).sum()))
        for label, score, box, mask in zip(
            merged.labels, merged.scores, merged.boxes_xyxy_px.tolist(), merged.masks, strict=True
        )
    ]


def test_the_window_that_shows_it_whole_decides():
    """The left window cuts the object and is surer of its half; the right one shows all of it."""
    cut, whole = instances((0, 0.9, (82, 10, 100, 30))), instances((0, 0.6, (3, 10, 40, 31)))
    assert merge(cut, whole) == [(0, 0.6, [83, 10, 120, 31], 37 * 21)]


def test_what_every_window_cuts_is_joined():
    found = merge(instances((0, 0.9, (20, 10, 100, 30))), instances((0, 0.6, (0, 11, 70, 30))))
    assert found == [(0, 0.9, [20, 10, 150, 30], 80 * 20 + 50 * 19)]


def test_boxes_end_with_their_windows():
    """What a network guesses beyond the left window is not in it: single pictures have their boxes clipped as well."""
    guessed = instances((0, 0.9, (40, 10, 100, 30)))
    guessed.boxes_xyxy_px[:] = [[-3, 8, 131, 33]]
    assert merge(guessed, instances()) == [(0, 0.9, [0, 8, 100, 33], 60 * 20)]


def test_little_in_common_is_not_one_object():
    """Both cross the overlap, at different heights, and share a third of it."""
    left, right = instances((0, 0.9, (20, 10, 100, 40))), instances((0, 0.6, (0, 30, 70, 60)))
    assert len(merge(left, right)) == 2


def test_one_object_that_windows_call_otherwise_is_found_once():
    """Whole in the right window: that one's class. Cut by both: the class that more of it speaks for."""
    cut, whole = instances((0, 0.9, (82, 10, 100, 30))), instances((1, 0.6, (2, 10, 40, 30)))
    assert merge(cut, whole) == [(1, 0.6, [82, 10, 120, 30], 38 * 20)]
    left, right = instances((0, 0.9, (60, 10, 100, 30))), instances((1, 0.6, (0, 10, 95, 30)))
    assert [(label, area) for label, _, _, area in merge(left, right)] == [(1, 115 * 20)]


def test_objects_of_two_classes_are_not_mixed():
    """What a window shows as two objects stays two, and so does one that only lies on the other."""
    on_each_other = instances((0, 0.9, (60, 10, 100, 50)), (1, 0.8, (62, 10, 100, 50)))
    same = instances((0, 0.7, (0, 10, 15, 50)))
    assert [label for label, *_ in merge(on_each_other, same)] == [0, 1]
    ship, car = instances((0, 0.9, (20, 10, 100, 60))), instances((1, 0.6, (3, 20, 17, 40)))
    assert [label for label, *_ in merge(ship, car)] == [0, 1]


def in_windows(objects: list[np.ndarray], tiles: Tiles, size: tuple[int, int]) -> Instances:
    """Merge what windows show of objects: each connected piece is an instance of its own."""
    parts = []
    for window in windows_of(size, tiles):
        masks = []
        for mask in objects:
            seen = fill_up(mask[window.y :, window.x :][: tiles.side, : tiles.side, None].repeat(3, 2), window)[..., 0]
            count, numbers = cv2.connectedComponents(np.ascontiguousarray(seen), connectivity=4)
            masks += [part for i in range(1, count) if (part := numbers == i).sum() > 3]
        found = instances(*[(0, 0.8, (0, 0, 1, 1))] * len(masks))
        found.boxes_xyxy_px[:] = np.array([mask_box_xyxy_px(mask) for mask in masks]).reshape(-1, 4)
        parts.append(WindowInstances(window, dataclasses.replace(found, masks=[encode_mask(mask) for mask in masks])))
    return merge_windows(parts, None, size=size, overlap_px=tiles.overlap_px)


def winding(name: str) -> np.ndarray:
    """A mask [300, 400] of which windows see pieces that don't touch."""
    mask = np.zeros((300, 400), np.uint8)
    if name == "E":
        mask[30:270, 60:90] = 1
        for y in (30, 135, 240):
            mask[y : y + 30, 60:360] = 1
    elif name == "ring":
        cv2.ellipse(mask, (200, 150), (170, 120), 0, 0, 360, 1, 20)
    elif name == "river":
        for x in range(400):
            middle = int(150 + 100 * np.sin(x / 25))
            mask[middle - 8 : middle + 8, x] = 1
    else:  # a spiral
        angles = np.linspace(0, 5 * np.pi, 400)
        points = np.stack([200 + 9 * angles * np.cos(angles), 150 + 9 * angles * np.sin(angles)], axis=1)
        cv2.polylines(mask, [np.rint(points).astype(np.int32)], False, 1, 12)
    return mask


@pytest.mark.parametrize("name", ["E", "ring", "river", "spiral"])
@pytest.mark.parametrize(("side", "overlap"), [(160, 0.2), (96, 0.5), (96, 0.75)])
def test_an_object_in_pieces_comes_back_whole(name, side, overlap):
    mask = winding(name)
    merged = in_windows([mask], Tiles(side, overlap, False), mask.shape)
    assert len(merged) == 1
    np.testing.assert_array_equal(decode_rle(merged.masks[0]), mask)


def test_parallel_neighbours_that_windows_cut_stay_apart():
    """Bars side by side, longer than every window, 1 and 12 pixels between them."""
    bars = []
    for x in (40, 61, 93, 125):
        bars.append(np.zeros((300, 400), np.uint8))
        bars[-1][10:290, x : x + 20] = 1
    merged = in_windows(bars, Tiles(96, 0.25, False), (300, 400))
    assert sorted(rle["counts"] for rle in merged.masks) == sorted(encode_mask(bar)["counts"] for bar in bars)


def test_merging_follows_the_pairs_not_their_square():
    """984 windows with 4,322 pieces: a few seconds of one core, and each object once."""
    objects = []
    for number, (y, x) in enumerate(itertools.product(range(5, 200, 40), range(5, 300, 40))):
        objects.append(np.zeros((200, 300), np.uint8))
        objects[-1][y : y + 15 + number % 5, x : x + 25] = 1
    before = time.process_time()
    merged = in_windows(objects, Tiles(64, 0.9, False), (200, 300))
    assert time.process_time() - before < 60  # all pairs of windows: minutes
    assert sorted(rle["counts"] for rle in merged.masks) == sorted(encode_mask(mask)["counts"] for mask in objects)


def test_one_window_may_find_several():
    """A fragment that the same window found beside the object goes; two real neighbours stay."""
    left = instances((0, 0.9, (70, 10, 95, 40)))
    assert len(merge(left, instances((0, 0.8, (0, 10, 15, 40)), (0, 0.4, (2, 12, 10, 30))))) == 1
    neighbours = instances((0, 0.9, (82, 10, 90, 40)), (0, 0.8, (91, 10, 97, 40)))
    same = instances((0, 0.7, (2, 10, 10, 40)), (0, 0.6, (11, 10, 17, 40)))
    assert [score for _, score, *_ in merge(neighbours, same)] == [0.9, 0.8]


@pytest.mark.parametrize(("side", "overlap"), [(320, 0.2), (250, 0.25), (200, 0.5)])
def test_real_objects_are_found_once_and_whole(side, overlap):
    """Facades that touch each other, in a mosaic: true masks cut by windows merge to the true masks."""
    truth = json.loads((EMBEDDED / "annotations" / "instance_val.json").read_text(encoding="utf-8"))
    height, width = size = (960, 1064)
    masks = []
    for place, image in enumerate(truth["images"][:12]):
        y, x = 320 * (place // 4), 266 * (place % 4)
        for annotation in truth["annotations"]:
            if annotation["image_id"] == image["id"]:
                polygons = [np.reshape(polygon, (-1, 2)) + np.array([x, y]) for polygon in annotation["segmentation"]]
                masks.append(rasterize_polygons(polygons, height, width))
    windows = windows_of(size, Tiles(side, overlap, False))
    parts, num_cut = [], 0
    for window in windows:
        seen = [mask[window.y : window.y + side, window.x : window.x + side] for mask in masks]
        shares = [part.sum() / mask.sum() for part, mask in zip(seen, masks, strict=True)]
        shown = [i for i, share in enumerate(shares) if share > 0.02]  # slivers are overlooked
        num_cut += sum(shares[i] < 1 for i in shown)
        whole = Window(0, 0, side, side).box
        found = Instances(
            scores=np.array([0.9 - 0.4 * shares[i] for i in shown], np.float32),  # surer of parts
            labels=np.zeros(len(shown), np.int32),
            boxes_xyxy_px=np.array([whole] * len(shown), np.float32).reshape(-1, 4),
            masks=[encode_mask(seen[i]) for i in shown],
        )
        parts.append(WindowInstances(window, found))
    merged = merge_windows(parts, None, size=size, overlap_px=0)
    assert len(masks) > 20 and num_cut > 15
    assert sorted(rle["counts"] for rle in merged.masks) == sorted(encode_mask(mask)["counts"] for mask in masks)


def test_a_tiny_whole_thing_does_not_hide_a_large_cut_one():
    found = merge(instances((0, 0.9, (20, 10, 100, 40))), instances((0, 0.5, (4, 12, 12, 20))))
    assert [area for *_, area in found] == [80 * 30]


def test_masks_without_pixels_are_left_out():
    assert merge(instances((0, 0.9, (0, 0, 0, 0))), instances()) == []


def test_the_whole_image_gives_the_large_objects():
    # One window found its part of the object, the other nothing of it; the whole image shows all of it but its edge.
    left = instances((0, 0.5, (10, 10, 100, 60)))
    right = instances((1, 0.7, (40, 80, 50, 90)), (0, 0.6, (60, 20, 70, 30)))
    large = instances((0, 0.8, (12, 10, 175, 58)), (1, 0.9, (121, 81, 129, 89)), size=(100, 180))
    found = merge(left, right, large)
    union = 163 * 48 + 90 * 50 - 88 * 48
    # Of the second class the window's stays: it is no longer than the overlap. So does a whole object in the large one.
    assert found == [
        (0, 0.8, [10, 10, 175, 60], union),
        (1, 0.7, [120, 80, 130, 90], 100),
        (0, 0.6, [140, 20, 150, 30], 100),
    ]


def test_a_crowd_is_no_large_object():
    """Scaled down, two neighbours look like one object of their class."""
    left = instances((0, 0.5, (10, 10, 40, 60)), (0, 0.4, (45, 10, 75, 60)))
    large = instances((0, 0.9, (8, 8, 80, 62)), size=(100, 180))
    assert [score for _, score, *_ in merge(left, instances(), large)] == [0.5, 0.4]


def test_the_whole_image_does_not_repeat_what_a_window_shows():
    left = instances((0, 0.5, (10, 10, 70, 60)))
    large = instances((0, 0.9, (11, 11, 71, 61)), size=(100, 180))
    assert merge(left, instances(), large) == [(0, 0.5, [10, 10, 70, 60], 3000)]


# --- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_in_windows(tmp_path):
    """Every object of pictures larger than the windows is found once and completely: nothing is left to gain."""
    images, annotations = [], []
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    (tmp_path / "data" / "images").mkdir()
    for i in range(3):
        rectangles = [(0, 20 + i, 10, 90, 40), (1, 51 + i, 45, 54 + i, 62), (2, 100, 20, 155, 90)]
        image = picture(*rectangles, size=(100, 160))
        Image.fromarray(image).save(tmp_path / "data" / "images" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 100, "width": 160})
        for label, x1, y1, x2, y2 in rectangles:
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": CATEGORY_IDS[label], "iscrowd": 0}
                | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                | {"segmentation": encode_mask(masks_of(image, label))}
            )
    categories = [{"id": id_, "name": name} for id_, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val"):
        (tmp_path / "data" / "annotations" / f"instance_{split}.json").write_text(json.dumps(truth))
    fields = {"data.dir": str(tmp_path / "data"), "data.image_size": "64", "data.resize": "letterbox"}
    config = load_config("configs/quickstart.py", fields | {"data.eval_interpolation": "nearest"})
    model = dataclasses.replace(make_model(), config=config)
    coarse = score_model(model, "fake", ()).metrics
    fine = score_model(model, "fake", (), Tiles(64, 0.25, False)).metrics
    assert fine["segm/AP"] == fine["bbox/AP"] == 1.0
    assert coarse["segm/AP"] < 1.0, "at once the pictures are scaled down, and the outlines are not exact"
    assert score_model(model, "fake", (), Tiles(400, 0.25, True)).metrics == coarse


# --- a raster that does not fit ------------------------------------------------------------------------------------

HUGE = """
    import sys, time
    import numpy as np, rasterio
    from fake_model import make_pipeline
    from instseg_jax.memory import peak_memory_mb
    from instseg_jax.results.saving import save_results

    path, side = sys.argv[1], int(sys.argv[2])
    options = dict(driver="GTiff", width=side, height=side, count=3, dtype="uint8", tiled=True, blockxsize=512,
                   blockysize=512, compress="deflate", zlevel=1, crs="EPSG:32633",
                   transform=rasterio.transform.from_origin(500000, 5000000, 0.1, 0.1))
    with rasterio.open(path, "w", **options) as file:
        for y in range(0, side, 512):
            for x in range(0, side, 512):
                block = np.full((3, min(512, side - y), min(512, side - x)), 110, np.uint8)
                block[:, 200:300, 150:350] = np.array([255, 0, 0])[:, None, None]
                file.write(block, window=rasterio.windows.Window(x, y, block.shape[2], block.shape[1]))
    pipe = make_pipeline(image_size=160, batch_size=4)
    started = time.monotonic()
    results = pipe.predict(path, tile=640, overlap=0.2)
    summary = save_results(results, path + ".out", formats=("img", "json", "geojson"))
    print(summary.instances, round(time.monotonic() - started, 1), round(peak_memory_mb()))
"""


def run_huge(tmp_path, side: int) -> tuple[int, float, float]:
    pytest.importorskip("rasterio")
    tests = str(HELPERS)
    command = [sys.executable, "-c", textwrap.dedent(HUGE), str(tmp_path / "huge.tif"), str(side)]
    environment = {"PYTHONPATH": f"{tests}:{Path(tests).parent}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=900)
    instances_found, seconds, peak = done.stdout.split()
    print(f"{side} x {side}: {instances_found} instances, {seconds} s, {peak} MB at most")
    return int(instances_found), float(seconds), float(peak)


def test_a_raster_in_windows(tmp_path):
    found, _, peak = run_huge(tmp_path, 2048)
    assert found == 16 and peak < 1500


@pytest.mark.slow
def test_a_huge_raster_in_under_two_gigabytes(tmp_path):
    found, _, peak = run_huge(tmp_path, 20_000)
    # 39 whole blocks a side; of the 40th, cut off at 32 pixels, nothing is left that is red.
    assert found == 39 * 39 and peak < 2000
