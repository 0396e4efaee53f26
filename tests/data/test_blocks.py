"""Splits by blocks on the ground: nothing of one side is seen on the other, and nothing is lost."""

import json
import math

import numpy as np
import pytest

from instseg_jax.cli import main
from instseg_jax.data import blocks
from instseg_jax.data.split import LEFT_OUT

DEGREE = 111_195.0


def grid(columns: int, rows: int, *, side: float, step: float, lon: float = 10.0, lat: float = 45.0) -> dict:
    """Pictures of `side` metres every `step` metres, each with an object of one of two classes."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}
    for number in range(columns * rows):
        row, column = divmod(number, columns)
        place = [lon + column * step / DEGREE / math.cos(math.radians(lat)), lat + row * step / DEGREE]
        content["images"].append(
            {
                "id": number,
                "file_name": f"{number}.png",
                "height": 8,
                "width": 8,
                "lon_lat": place,
                "metres": [side] * 2,
            }
        )
        box = {"bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}
        content["annotations"].append({"id": number, "image_id": number, "category_id": 1 + number % 2} | box)
    return content


def distance(one: dict, other: dict) -> float:
    """Metres between the grounds of two pictures; below 0: they overlap."""
    (x1, y1), (x2, y2) = one["lon_lat"], other["lon_lat"]
    dx = abs(x1 - x2) * DEGREE * math.cos(math.radians(y1)) - one["metres"][0]
    return max(dx, abs(y1 - y2) * DEGREE - one["metres"][1])


@pytest.mark.parametrize("gap", [0.0, 60.0])
def test_no_ground_is_on_both_sides(gap):
    content = grid(12, 12, side=64, step=50)  # neighbours overlap
    train, val, left_out = blocks.split_blocks(content, val_share=0.2, block=200, gap=gap, seed=0)
    nearest = min(distance(a, b) for a in train["images"] for b in val["images"])
    assert nearest >= gap - 0.5
    ids = sorted(image["id"] for part in (train, val, left_out) for image in part["images"])
    assert ids == list(range(144)) and left_out["images"]
    assert 0.12 <= len(val["images"]) / 144 <= 0.3
    assert all(distance(image, other) < gap + 0.5 for image in left_out["images"] for other in [nearest_of(image, val)])
    for part in (train, val, left_out):
        assert {a["image_id"] for a in part["annotations"]} == {i["id"] for i in part["images"]}


def nearest_of(image: dict, part: dict) -> dict:
    return min(part["images"], key=lambda other: distance(image, other))


def test_pictures_that_touch_share_no_ground():
    content = grid(4, 1, side=50.1, step=50)  # the metres of a projection are not quite those of the plane
    assert not blocks.split_blocks(content, val_share=0.5, block=50, gap=0, seed=0)[2]["images"]


@pytest.mark.parametrize("turn", [0, 20, 45])
def test_pictures_that_lie_askew_are_near_by_their_own_sides(turn):
    """A row of pictures that touch, turned: neighbours share no ground, however their outlines' boxes overlap."""
    content = grid(4, 1, side=50, step=50)
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    for number, image in enumerate(content["images"]):
        east, north = number * 50 * cos / DEGREE / math.cos(math.radians(45.0)), number * 50 * sin / DEGREE
        image |= {
            "lon_lat": [10.0 + east, 45.0 + north],
            "east_north": [[50 / 8 * cos, 50 / 8 * sin], [50 / 8 * sin, -50 / 8 * cos]],
        }
    for gap in (0.0, 20.0):
        train, val, left_out = (
            {image["id"] for image in part["images"]}
            for part in blocks.split_blocks(content, val_share=0.3, block=40, gap=gap, seed=0)
        )
        beside = {number + step for number in val for step in (-1, 1)} & (train | left_out)
        assert val and beside and left_out == (beside if gap else set())
    corners = blocks.place_images(content["images"])
    assert np.linalg.norm(corners[0, 2] - corners[0, 0]) == pytest.approx(50 * math.sqrt(2), rel=1e-3)


def test_each_picture_is_validated_in_one_fold():
    content = grid(10, 10, side=50, step=50)
    folds = blocks.fold_blocks(content, folds=4, block=120, gap=0, seed=0)
    validated = sorted(image["id"] for _, val, _ in folds for image in val["images"])
    assert validated == list(range(100))
    for train, val, _ in folds:
        assert min(distance(a, b) for a in train["images"] for b in val["images"]) >= -0.5
        assert 15 <= len(val["images"]) <= 35


def test_one_large_block_leaves_no_fold_empty():
    content = grid(1, 4, side=10, step=1000)
    heavy = grid(30, 1, side=10, step=20, lat=45.1)
    for entry in heavy["images"]:
        entry.update(id=entry["id"] + 100, file_name=f"h{entry['file_name']}")
    content["images"] += heavy["images"]
    folds = blocks.fold_blocks(content, folds=5, block=900, gap=0, seed=0)
    assert all(val["images"] and train["images"] for train, val, _ in folds)
    assert sum(len(val["images"]) for _, val, _ in folds) == 34


def test_across_the_date_line():
    content = grid(10, 4, side=64, step=50, lon=179.998, lat=0.0)
    for image in content["images"]:
        image["lon_lat"][0] = (image["lon_lat"][0] + 180) % 360 - 180
    assert min(i["lon_lat"][0] for i in content["images"]) < 0 < max(i["lon_lat"][0] for i in content["images"])
    places = blocks.place_images(content["images"])
    assert np.ptp(places[..., 0]) == pytest.approx(9 * 50 + 64, abs=1)


def test_from_the_shell_and_back(tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    file = tmp_path / "annotations" / "instance_train.json"
    content = grid(12, 12, side=64, step=50)
    file.write_text(json.dumps(content))
    percentages = ["--train_percent=80", "--val_percent=20"]
    options = [f"--config.data.dir={tmp_path}", "--by=blocks", "--block=0.2km", "--gap=10m"]
    assert main(["split", *options, *percentages]) == 0
    left_out = json.loads((tmp_path / "annotations" / LEFT_OUT).read_text())
    assert left_out["images"] and "left_out: " in capsys.readouterr().out
    assert main(["split", f"--config.data.dir={tmp_path}", *percentages]) == 0  # by names: none is left out
    parts = [json.loads((tmp_path / "annotations" / f"instance_{part}.json").read_text()) for part in ("train", "val")]
    assert sorted(image["id"] for part in parts for image in part["images"]) == list(range(144))
    assert not (tmp_path / "annotations" / LEFT_OUT).exists()
    before = file.read_bytes()
    assert main(["split", *options, "--folds=3"]) == 0
    assert "sweep" in capsys.readouterr().out and file.read_bytes() == before
    folds = [json.loads((tmp_path / "annotations" / f"instance_fold{n}_val.json").read_text()) for n in (1, 2, 3)]
    assert sorted(image["id"] for fold in folds for image in fold["images"]) == list(range(144))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by=blocks"], "--block is missing"),
        (["--by=blocks", "--block=0"], "--block is 0, it must be above 0"),
        (["--by=blocks", "--block=900km"], "lie in one block"),
        (["--by=blocks", "--block=100m", "--gap=9km"], "No picture is farther than 9000 m"),
        (["--by=blocks", "--block=100m", "--group_by=a"], "--group_by is for --by=names"),
        (["--block=100m"], "are for --by=blocks"),
        (["--by=blocks", "--block=100m", "--folds=2"], "leave --train_percent"),
    ],
)
def test_errors_say_what_is_allowed(tmp_path, capsys, options, message):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    file = tmp_path / "annotations" / "instance_train.json"
    file.write_text(json.dumps(grid(4, 4, side=64, step=50)))
    shown = ["split", f"--config.data.dir={tmp_path}", "--train_percent=80", "--val_percent=20"]
    assert main([*shown, *options]) != 0
    assert message in capsys.readouterr().err and [file.name] == [p.name for p in file.parent.iterdir()]


def test_pictures_that_do_not_say_where_they_lie():
    content = grid(3, 3, side=64, step=50)
    del content["images"][4]["metres"]
    with pytest.raises(ValueError, match=r"'4\.png' doesn't say where it lies"):
        blocks.split_blocks(content, val_share=0.2, block=100, gap=0, seed=0)
