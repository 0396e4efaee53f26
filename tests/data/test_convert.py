"""LabelMe to COCO: the same masks, names and pictures, worked out independently here; and what holds for all."""

import base64

import cv2
import numpy as np
import pytest
from broken_data import run_check
from converted_data import HEIGHT, WIDTH, box_mask, convert, read, write_picture
from labelme_files import shape, square, write_labelme

from instseg_jax.data import coco


def png_base64(mask) -> str:
    return base64.b64encode(cv2.imencode(".png", mask)[1].tobytes()).decode()


def test_every_shape_of_labelme(tmp_path):
    ring = np.full((11, 21), 255, np.uint8)
    ring[3:8, 5:15] = 0
    shapes = [
        shape("polygon", square(2, 3, 10)),
        shape("rectangle", [[30, 20], [20, 5]], "rectangle"),  # any two opposite corners
        shape("circle", [[50, 20], [50, 30]], "circle"),
        shape("mask", [[10, 40], [30, 50]], "mask", mask=png_base64(ring)),
        shape("line", [[40, 40], [60, 40]], "line"),
        shape("point", [[70, 10]], "point"),
        shape("strip", [[40, 55], [60, 55], [70, 45]], "linestrip"),
    ]
    write_labelme(tmp_path / "in", "a", shapes)
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    (objects,) = read(tmp_path / "out")[0].values()
    found = dict(objects)
    assert list(found) == [s["label"] for s in shapes] == list(done.categories)
    np.testing.assert_array_equal(found["polygon"], box_mask(2, 3, 12, 13))
    np.testing.assert_array_equal(found["rectangle"], box_mask(20, 5, 30, 20))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    disc = np.hypot(x - 50, y - 20) <= 10
    assert (found["circle"] != disc).sum() <= 12  # pixels that the circle's line crosses
    whole = box_mask(10, 40, 31, 51) - box_mask(15, 43, 25, 48)  # the hole stays
    np.testing.assert_array_equal(found["mask"], whole)
    assert found["line"][40, 40:61].all()
    assert int(found["line"].sum()) == pytest.approx(20 * 10 + np.pi * 25, rel=0.15)  # with round ends
    assert found["point"][10, 70] and int(found["point"].sum()) == pytest.approx(np.pi * 25, rel=0.2)
    assert found["strip"][55, 50] and found["strip"][50, 65]
    assert len(done.notes) == 3


def test_groups_join_and_labels_are_ignored(tmp_path):
    parts = [square(2, 3, 10), square(40, 30, 12)]
    shapes = [
        shape("a", parts[0], group_id=7),
        shape("__ignore__", square(1, 1, 50)),
        shape("a", parts[1], group_id=7),
        shape("b", square(20, 20, 8), group_id=7),  # another class is another object
        shape("", square(1, 1, 50)),
        shape("b", square(60, 40, 8), flags={"ignore": True}),
        shape("b", square(60, 2, 8), flags={"crowd": True}),
        shape("b", square(-5, 50, 8)),  # reaches beyond the picture
        shape("b", square(200, 200, 8)),
    ]
    write_labelme(tmp_path / "in", "a", shapes)
    done = convert(tmp_path / "in", "labelme", tmp_path / "out")
    found, dataset = read(tmp_path / "out")
    objects = found["a.png"]
    assert [name for name, _ in objects] == ["a", "b", "b", "b"]
    np.testing.assert_array_equal(objects[0][1], box_mask(2, 3, 12, 13) | box_mask(40, 30, 52, 42))
    np.testing.assert_array_equal(objects[3][1], box_mask(0, 50, 3, 58))
    assert [a.is_crowd for a in dataset.annotations[0]] == [False, False, True, False]
    assert len(dataset.annotations[0][0].segmentation) == 2
    assert "shapes left out, unlabelled or to be ignored: 3" in done.notes
    assert "shapes left out, without a pixel in their picture: 1" in done.notes


def test_pictures_embedded_elsewhere_and_with_the_same_name(tmp_path):
    embedded = base64.b64encode(write_picture(tmp_path / "elsewhere.png", seed=9)).decode()
    source = tmp_path / "in"
    objects = [shape("a", square(2, 3, 10))]
    write_labelme(source / "annotations", "one", objects, picture=False, imageData=embedded)
    write_labelme(source / "annotations", "two", objects, picture=False, imagePath="..\\images\\deep\\two.png")
    write_picture(source / "images" / "deep" / "two.png", seed=2)
    write_labelme(source / "other", "x", objects)
    write_labelme(source / "third", "x", objects)
    (source / "third" / "x.png").write_bytes((tmp_path / "elsewhere.png").read_bytes())
    convert(source, "LabelMe", tmp_path / "out")
    found, dataset = read(tmp_path / "out")
    assert sorted(found) == ["one.png", "two.png", "x.png", "x_1.png"]
    pictures = {name: (tmp_path / "out" / "images" / name).read_bytes() for name in found}
    assert pictures["one.png"] == pictures["x_1.png"] == (tmp_path / "elsewhere.png").read_bytes()
    again = convert(source, "LabelMe", source)
    names = {image.file_name for image in coco.read_split(source, "train").images}
    assert "deep/two.png" in names and len(names) == 4 and again.parts["train"][1] == 4
    assert len(dataset) == 4


def test_the_official_lists(tmp_path):
    source = tmp_path / "in"
    for i in range(10):
        write_labelme(source / "annotations", f"p{i}", [shape("ab"[i % 2], square(2 + i, 3, 10))])
    (source / "train_anno_list.txt").write_text("".join(f"annotations/p{i}.json\n" for i in range(10)))
    first = convert(source, "LabelMe", tmp_path / "a", seed=1).parts
    assert (first["train"][1], first["val"][1]) == (8, 2)
    names = {image.file_name for part in ("train", "val") for image in coco.read_split(tmp_path / "a", part).images}
    assert names == {f"p{i}.png" for i in range(10)}
    assert (
        first["train"][0].read_bytes()
        == convert(source, "LabelMe", tmp_path / "b", seed=1).parts["train"][0].read_bytes()
    )
    (source / "train_anno_list.txt").write_text("p annotations/p3.json\nq annotations\\p4.json\n")
    (source / "val_anno_list.txt").write_text("annotations/p5.json\n")
    convert(source, "LabelMe", tmp_path / "c")
    assert sorted(read(tmp_path / "c")[0]) == ["p3.png", "p4.png"]
    assert sorted(read(tmp_path / "c", "val")[0]) == ["p5.png"]
    train, val = (coco.read_split(tmp_path / "c", part) for part in ("train", "val"))
    coco.check_same_categories(train, val)
    (source / "val_anno_list.txt").write_text("annotations/none.json\n")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        convert(source, "LabelMe", tmp_path / "c")


@pytest.mark.parametrize(
    ("shapes", "more", "message"),
    [
        ([shape("a", [[1, 2], [3, 4]], "rotation")], {}, "Shape 1 of .*a.json, a rotation, has 2 points"),
        ([shape("a", [[1, 2]], "circle")], {}, "a circle, has 1 points"),
        ([shape("a", square(1, 1, 4), "spiral")], {}, "unknown shape type 'spiral'"),
        ([shape("a", "xy")], {}, "points that are not pairs"),
        ([shape("a", [[1, 2]], "mask", mask="!!")], {}, "holds no PNG"),
        ([], {"imageHeight": 99}, "says 80x99, but its picture is 80x60"),
        ([], {"imagePath": "gone.png"}, "names the picture 'gone.png'"),
        ([], {}, "no object"),
        (None, {}, "no list of shapes"),
    ],
)
def test_flaws_of_labelme_files_are_named(tmp_path, shapes, more, message):
    write_labelme(tmp_path / "in", "a", shapes, picture="imagePath" not in more, **more)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    assert not (tmp_path / "out" / "annotations").exists()


def test_points_follow_a_picture_that_was_resized(tmp_path):
    write_labelme(tmp_path / "in", "a", [shape("a", square(4, 6, 20))], imageHeight=2 * HEIGHT, imageWidth=2 * WIDTH)
    convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out")[0]["a.png"][0][1], box_mask(2, 3, 12, 13))


def test_what_is_converted_and_split_passes_the_check(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        shapes = [shape("ab"[k], square(*rng.integers(-5, 50, 2).tolist(), 15)) for k in range(2)]
        write_labelme(tmp_path / "in", "x" * (i + 1), shapes)
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out", percentages=(75, 25))
    assert (done.parts["train"][1], done.parts["val"][1]) == (9, 3)
    result = run_check(tmp_path / "out")
    assert result.passed, result.flaws


def test_kinds_and_folders_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="one of LabelMe, VOC, YOLO, LabelStudio, CVAT, COCO, got 'CSV'"):
        convert(tmp_path, "CSV", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", "VOC", tmp_path / "out")
    for kind in ("LabelMe", "VOC", "YOLO"):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            convert(tmp_path, kind, tmp_path / "out")
