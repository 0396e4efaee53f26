"""VOC and YOLO to COCO: the same masks, names and pictures, worked out independently here."""

from pathlib import Path

import numpy as np
import pytest
from converted_data import HEIGHT, WIDTH, box_mask, convert, read, write_picture
from PIL import Image

from instseg_jax import masks


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


def test_voc_is_found_below_the_folder(tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012")
    convert(tmp_path / "VOCdevkit", "VOC", tmp_path / "out")
    assert len(read(tmp_path / "out")[0]["a.jpg"]) == 3


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
    done = convert(tmp_path / "in", "yolo", tmp_path / "out")
    assert [name for name, _ in read(tmp_path / "out")[0]["a.jpg"]] == ["class 2"]
    assert done.notes == ("objects whose class is called by its number, since no file names the classes: 1",)
    (tmp_path / "in" / "classes.txt").write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*a.txt has the class 2, which has no name in 2 names"):
        convert(tmp_path / "in", "yolo", tmp_path / "out")
    (tmp_path / "in" / "labels" / "a.txt").write_text("0 0.1 0.2 0.3 0.4 0.5")
    with pytest.raises(ValueError, match=r"Line 1 of .*a.txt has 5 coordinates"):
        convert(tmp_path / "in", "yolo", tmp_path / "out")
