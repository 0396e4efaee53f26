"""Labels of a map that are off, all by the same way, are told from those that fit, and from those of nothing."""

import functools
import json

import cv2
import numpy as np
import pytest
from places import EMBEDDED

from instseg_jax import masks
from instseg_jax.data import coco, overview, scenes, shifts

PX = 0.5  # metres
NORTH_UP = np.diag([PX, -PX])
SIDE = 320


@functools.cache
def tiles():
    """Pictures [SIDE, SIDE, 3] with the masks of the objects on them."""
    dataset = coco.read_coco(EMBEDDED / "annotations" / "instance_train.json", EMBEDDED / "images")
    rng = np.random.default_rng(0)
    examples = [scenes.scatter_objects(dataset, (SIDE, SIDE), rng, count=5, scale_range=(0.3, 0.5)) for _ in range(10)]
    return [(one.image, [masks.segmentation_to_mask(s, SIDE, SIDE) for s in one.segmentations]) for one in examples]


def moved(mask, right, down):
    return cv2.warpAffine(mask, np.float32([[1, 0, right], [0, 1, down]]), mask.shape[::-1], flags=cv2.INTER_NEAREST)


def find(change, ground=NORTH_UP, shown=lambda k: k):
    scale = shifts.reduced_scale((SIDE, SIDE))
    evidence = [
        shifts.weigh(tiles()[shown(k)][0], [masks.encode_mask(change(mask)) for mask in labels], 100)
        for k, (_, labels) in enumerate(tiles())
    ]
    return shifts.find_shift(evidence, [ground / scale] * len(evidence), [scale] * len(evidence))


def test_labels_that_fit_are_not_off():
    assert sum(len(labels) for _, labels in tiles()) >= 30
    assert find(lambda mask: mask) is None


@pytest.mark.parametrize("size", [5, 15])
def test_labels_that_are_drawn_wide_are_not_off(size):
    assert find(lambda mask: cv2.dilate(mask, np.ones((size, size), np.uint8))) is None


def test_labels_of_other_pictures_tell_nothing():
    assert find(lambda mask: mask, shown=lambda k: (k + 1) % 10) is None


@pytest.mark.parametrize("way", [(6, 0), (0, 10), (-24, 18), (60, -50)])
def test_the_way_that_all_are_off_is_found(way):
    found = find(lambda mask: moved(mask, *way))
    assert (found.east, found.north) == pytest.approx((way[0] * PX, -way[1] * PX), abs=0.5)
    assert found.score > shifts.MIN_SCORE


def test_the_way_is_told_on_the_ground_wherever_north_is():
    turn = np.radians(40)
    ground = np.array([[np.cos(turn), np.sin(turn)], [np.sin(turn), -np.cos(turn)]]) * PX  # mirrored, so y goes down
    found = find(lambda mask: moved(mask, -24, 18), ground)
    assert (found.east, found.north) == pytest.approx(tuple(ground @ [-24, 18]), abs=0.6)


def test_a_way_is_said_in_metres_and_direction():
    said = shifts.Shift(-3.0, -4.0, 20.0).say()
    assert "5.0 m south-west" in said and "-3.0 m east, -4.0 m north" in said
    names = [shifts.Shift(*way, 9.0).say().split(" m ")[1].split()[0] for way in ((9, 1), (1, 9), (-9, 0), (5, -5))]
    assert names == ["east", "north", "west", "south-east"]


def test_pictures_lie_on_the_overview_where_their_windows_are(tmp_path):
    drawn = []
    for number, (x, y, color) in enumerate([(100, 100, 60), (164, 100, 120)]):
        path = tmp_path / f"{number}.png"
        cv2.imwrite(str(path), np.full((64, 64, 3), color, np.uint8))
        label = (np.array([[10.0, 10], [30, 10], [30, 30], [10, 30]]),)
        split = ("train", "val")[number]
        drawn.append(overview.MapTile(split, path, (64, 64), "a.tif", (x, y, 64, 64), NORTH_UP, (label,)))
    alone = overview.draw_overview(drawn, None, None)
    assert alone.shape == (64, 128, 3) and alone[40, 40].tolist() == [60] * 3 and alone[40, 104].tolist() == [120] * 3
    for column, split in ((10, "train"), (64 + 30, "val")):
        assert np.abs(alone[20, column].astype(int) - overview.COLORS[split]).max() <= 20  # lines are smooth
    whole = overview.draw_overview(drawn, np.zeros((150, 200, 3), np.uint8), (300, 400))
    assert whole.shape == (300, 400, 3) and (whole[140, 140] == 60).all() and (whole[50, 50] == 117).all()


def test_pictures_that_are_left_out_are_frames(tmp_path):
    file = tmp_path / "instance_left_out.json"
    assert overview.find_left_out(file) == []
    good = {"id": 1, "file_name": "a.png", "raster": "a.tif", "window": [100, 100, 64, 64]}
    file.write_text(json.dumps({"images": [good, good | {"window": "odd"}, 3, good | {"raster": None}]}))
    (tile,) = overview.find_left_out(file)
    drawn = overview.draw_overview([tile], np.zeros((300, 400, 3), np.uint8), (300, 400))
    assert np.abs(drawn[100, 130].astype(int) - overview.COLORS["left_out"]).max() <= 5  # lines are smooth
    assert (drawn[130, 130] == 117).all()
    file.write_text('{"images": 3}')
    assert overview.find_left_out(file) == []
    file.write_text("{")
    assert overview.find_left_out(file) == []
