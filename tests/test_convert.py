"""LabelMe, VOC and YOLO to COCO: the same masks, names and pictures, worked out independently here."""

import base64
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from instseg_jax import masks
from instseg_jax.data import check, coco
from instseg_jax.data.convert import convert_dataset

HEIGHT, WIDTH = 60, 80


def convert(source, kind, target, **changes):
    arguments = {"labels": None, "percentages": None, "group_by": None, "seed": 0, "progress": lambda items, _: items}
    return convert_dataset(source, kind, target, **(arguments | changes))


def read(target, part="train"):
    """{picture's name: [(class name, mask)]} of a converted data set, and the data set."""
    dataset = coco.read_split(target, part)
    coco.check_images(dataset)
    found = {}
    for image, annotations in zip(dataset.images, dataset.annotations, strict=True):
        found[image.file_name] = [
            (dataset.categories[a.label], masks.segmentation_to_mask(a.segmentation, image.height, image.width))
            for a in annotations
        ]
        for a, (_, mask) in zip(annotations, found[image.file_name], strict=True):
            x1, y1, x2, y2 = masks.mask_box_xyxy_px(mask)
            assert a.box_xywh_px == (x1, y1, x2 - x1, y2 - y1) and a.area == mask.sum()
    return found, dataset


def box_mask(x1, y1, x2, y2):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y1:y2, x1:x2] = 1
    return mask


def write_picture(path: Path, seed: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    data = cv2.imencode(path.suffix, noise)[1].tobytes()
    path.write_bytes(data)
    return data


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}} | more


def write_labelme(folder: Path, name: str, shapes, *, picture=True, **more) -> Path:
    if picture:
        write_picture(folder / f"{name}.png", seed=len(name))
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png", "imageData": None}
    content |= {"imageHeight": HEIGHT, "imageWidth": WIDTH} | more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


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
        ([shape("a", [[1, 2], [3, 4]])], {}, "Shape 1 of .*a.json, a polygon, has 2 points"),
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


def voc_palette() -> np.ndarray:
    """The colours of the VOC palette [256, 3], in the words of its specification: bit k of channel c is bit 3 j + c."""
    colors = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for channel in range(3):
            bits = [(index >> (3 * j + channel)) & 1 for j in range(3) if 3 * j + channel < 8]
            colors[index, channel] = sum(bit << (7 - j) for j, bit in enumerate(bits))
    return colors


def write_voc(root: Path, *, classes=True, instances=True, xml=True, colored=False) -> dict:
    """One picture with three objects, one of them with a hole and in two parts; 255 around one."""
    write_picture(root / "JPEGImages" / "a.jpg")
    hole = box_mask(5, 5, 25, 25) - box_mask(10, 10, 20, 20) + box_mask(40, 5, 45, 10)
    objects = [("boat", hole), ("cat", box_mask(50, 30, 70, 50)), ("boat", box_mask(5, 40, 20, 55))]
    ids, indices = np.zeros((HEIGHT, WIDTH), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[28:52, 48:72] = indices[28:52, 48:72] = 255
    for number, (name, mask) in enumerate(objects, start=1):
        ids[mask > 0], indices[mask > 0] = number, {"boat": 2, "cat": 1}[name]
    for folder, values in (
        ("SegmentationObject", ids if instances else None),
        ("SegmentationClass", indices if classes else None),
    ):
        if values is None:
            continue
        (root / folder).mkdir()
        picture = Image.fromarray(voc_palette()[values] if colored else values)
        if not colored:
            picture.putpalette(voc_palette().ravel().tolist())
        picture.save(root / folder / "a.png")
    if xml:
        (root / "Annotations").mkdir()
        entries = ""
        for name, mask in objects:
            x1, y1, x2, y2 = masks.mask_box_xyxy_px(mask)
            corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            entries += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
        (root / "Annotations" / "a.xml").write_text(f"<annotation>{entries}</annotation>")
    return {"objects": objects}


@pytest.mark.parametrize("form", [{}, {"xml": False}, {"classes": False}, {"colored": True}])
def test_voc_masks_are_exact(tmp_path, form):
    truth = write_voc(tmp_path / "in", **form)["objects"]
    if form.get("classes", True):
        (tmp_path / "in" / "labels.txt").write_text("cat\nboat\n")
    convert(tmp_path / "in", "VOC", tmp_path / "out")
    objects = read(tmp_path / "out")[0]["a.jpg"]
    assert [name for name, _ in objects] == [name for name, _ in truth]
    for (_, mask), (_, expected) in zip(objects, truth, strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_voc_names_may_begin_with_the_background(tmp_path):
    write_voc(tmp_path / "in", xml=False)
    (tmp_path / "names.txt").write_text("__ignore__\n_background_\ncat\nboat\n")
    done = convert(tmp_path / "in", "VOC", tmp_path / "out", labels=tmp_path / "names.txt")
    assert done.categories == ("cat", "boat")
    assert [name for name, _ in read(tmp_path / "out")[0]["a.jpg"]] == ["boat", "cat", "boat"]


def test_voc_without_instances_and_without_masks(tmp_path):
    truth = write_voc(tmp_path / "in", instances=False)["objects"]
    (tmp_path / "in" / "labels.txt").write_text("cat\nboat\n")
    done = convert(tmp_path / "in", "VOC", tmp_path / "out")
    objects = read(tmp_path / "out")[0]["a.jpg"]
    assert sorted(name for name, _ in objects) == ["boat", "boat", "boat", "cat"]  # the part is an object of its own
    assert sum(mask.sum() for _, mask in objects) == sum(mask.sum() for _, mask in truth)
    assert any("connected region" in note for note in done.notes)
    write_voc(tmp_path / "boxes", instances=False, classes=False)
    done = convert(tmp_path / "boxes", "VOC", tmp_path / "out2")
    objects = read(tmp_path / "out2")[0]["a.jpg"]
    np.testing.assert_array_equal(objects[1][1], box_mask(50, 30, 70, 50))
    assert any("rectangles: 3" in note for note in done.notes)


def test_voc_image_sets_are_splits(tmp_path):
    root = tmp_path / "in"
    write_voc(root)
    suffixes = {"JPEGImages": ".jpg", "SegmentationObject": ".png", "SegmentationClass": ".png", "Annotations": ".xml"}
    for folder, suffix in suffixes.items():
        (root / folder / f"b{suffix}").write_bytes((root / folder / f"a{suffix}").read_bytes())
    sets = root / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("b\n")
    (sets / "val.txt").write_text("a\n")
    convert(root, "VOC", tmp_path / "out")
    assert list(read(tmp_path / "out")[0]) == ["b.jpg"] and list(read(tmp_path / "out", "val")[0]) == ["a.jpg"]


def test_an_object_without_a_name_is_an_error(tmp_path):
    write_voc(tmp_path / "in", xml=False)
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="Object 1 of 'a' has no class name"):
        convert(tmp_path / "in", "VOC", tmp_path / "out", labels=tmp_path / "names.txt")


def yolo_line(label, mask_corners):
    x1, y1, x2, y2 = mask_corners
    points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    return " ".join([str(label), *(f"{x / WIDTH} {y / HEIGHT}" for x, y in points)])


def test_yolo_with_a_description(tmp_path):
    root = tmp_path / "in"
    for part in ("train", "valid"):
        write_picture(root / part / "images" / f"{part}.jpg")
        (root / part / "labels").mkdir()
    write_picture(root / "train" / "images" / "empty.jpg")
    lines = [yolo_line(1, (8, 6, 40, 30)), yolo_line(0, (40, 30, 72, 54)), f"1 {0.5} {0.5} {0.25} {0.2}", ""]
    (root / "train" / "labels" / "train.txt").write_text("\n".join(lines))
    (root / "valid" / "labels" / "valid.txt").write_text(yolo_line(0, (8, 6, 40, 30)))
    (root / "data.yaml").write_text("names: {0: cat, 1: boat}\ntrain: ../train/images\nval: ../valid/images\n")
    done = convert(root, "YOLO", tmp_path / "out")
    found, _ = read(tmp_path / "out")
    assert found["empty.jpg"] == [] and done.categories == ("cat", "boat")
    assert [name for name, _ in found["train.jpg"]] == ["boat", "cat", "boat"]
    for (_, mask), corners in zip(
        found["train.jpg"], [(8, 6, 40, 30), (40, 30, 72, 54), (30, 24, 50, 36)], strict=True
    ):
        np.testing.assert_array_equal(mask, box_mask(*corners))
    assert list(read(tmp_path / "out", "val")[0]) == ["valid.jpg"]


def test_yolo_without_a_description(tmp_path):
    write_picture(tmp_path / "in" / "images" / "a.jpg")
    (tmp_path / "in" / "labels").mkdir()
    (tmp_path / "in" / "labels" / "a.txt").write_text(yolo_line(2, (8, 6, 40, 30)))
    (tmp_path / "in" / "classes.txt").write_text("x\ny\n")
    convert(tmp_path / "in", "yolo", tmp_path / "out")
    assert [name for name, _ in read(tmp_path / "out")[0]["a.jpg"]] == ["class 2"]
    (tmp_path / "in" / "labels" / "a.txt").write_text("0 0.1 0.2 0.3 0.4 0.5")
    with pytest.raises(ValueError, match=r"Line 1 of .*a.txt has 5 coordinates"):
        convert(tmp_path / "in", "yolo", tmp_path / "out")


def test_what_is_converted_and_split_passes_the_check(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        shapes = [shape("ab"[k], square(*rng.integers(-5, 50, 2).tolist(), 15)) for k in range(2)]
        write_labelme(tmp_path / "in", "x" * (i + 1), shapes)
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out", percentages=(75, 25))
    assert (done.parts["train"][1], done.parts["val"][1]) == (9, 3)
    nothing = {"train": None, "val": None}
    source, flaws = check.find_source(tmp_path / "out", nothing, nothing)
    result = check.check_dataset(
        source, flaws, num_queries=300, max_instances=100, image_size=(64, 64), resize="stretch", channels=None, num_workers=1,
        progress=lambda items, _: items, pictures={},
    )  # fmt: skip
    assert result.passed, result.flaws


def test_kinds_and_folders_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="one of LabelMe, VOC, YOLO, got 'CSV'"):
        convert(tmp_path, "CSV", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", "VOC", tmp_path / "out")
    for kind in ("LabelMe", "VOC", "YOLO"):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            convert(tmp_path, kind, tmp_path / "out")
