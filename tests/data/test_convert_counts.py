"""Whatever of a source is not in the result of a conversion is counted in its notes."""

import base64

import pytest
from converted_data import HEIGHT, WIDTH, box_mask, convert, read, write_picture
from labelme_files import shape, square, write_labelme
from PIL import Image

LINE = "0 0.1 0.1 0.6 0.1 0.6 0.6 0.1 0.6\n"


def note_counts(done):
    return {note.rpartition(": ")[0]: int(note.rpartition(": ")[2]) for note in done.notes}


def write_labelled(root, picture, label, text=LINE):
    write_picture(root / picture)
    (root / label).parent.mkdir(parents=True, exist_ok=True)
    (root / label).write_text(text)


def test_pictures_without_a_labelme_file_are_counted_also_the_second_time(tmp_path):
    write_labelme(tmp_path, "a", [shape("x", square(5, 5, 10))])
    write_picture(tmp_path / "b.jpg")
    for _ in range(2):  # into the folder itself, whose images/ holds a copy of a.png then
        done = convert(tmp_path, "LabelMe", tmp_path)
        assert note_counts(done) == {"pictures of the folder that are not in the result, as b.jpg": 1}


def test_labelme_files_that_no_list_names_are_counted(tmp_path):
    for name in ("a", "b", "c"):
        write_labelme(tmp_path / "in", name, [shape("x", square(5, 5, 10))])
    (tmp_path / "in" / "train_anno_list.txt").write_text("a.json\n")
    (tmp_path / "in" / "val_anno_list.txt").write_text("b.json\n")
    assert note_counts(convert(tmp_path / "in", "LabelMe", tmp_path / "out")) == {
        "LabelMe files left out, that no list names": 1,
        "pictures of the folder that are not in the result, as c.png": 1,
    }


def test_notes_of_a_file_that_is_left_out_do_not_count(tmp_path):
    write_labelme(tmp_path / "in", "a", [shape("x", square(5, 5, 10))])
    write_labelme(tmp_path / "in", "b", [shape("", square(5, 5, 10)), shape("x", [[0, float("nan")]] * 3)])
    notes = note_counts(convert(tmp_path / "in", "LabelMe", tmp_path / "out", skip_invalid=True))
    assert [note.split(",")[0] for note in notes] == ["left out", "pictures of the folder that are not in the result"]


@pytest.mark.parametrize("embedded", ["named", "beside", "neither"])
def test_objects_stay_on_the_picture_that_is_embedded(tmp_path, embedded):
    for seed, name in enumerate(("named", "beside", "neither")):
        write_picture(tmp_path / ("in" if name != "neither" else "elsewhere") / f"{name}.png", seed=seed)
    folder = tmp_path / ("in" if embedded != "neither" else "elsewhere")
    data = (folder / f"{embedded}.png").read_bytes()
    write_labelme(
        tmp_path / "in",
        "beside",
        [shape("x", square(5, 5, 10))],
        picture=False,
        imagePath="named.png",
        imageData=base64.b64encode(data).decode(),
    )
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    (written,) = (tmp_path / "out" / "images").iterdir()
    assert written.read_bytes() == data
    assert any(note.startswith("files whose imagePath") for note in done.notes) == (embedded != "named")


def test_yolo_labels_without_a_picture_and_the_test_part_are_counted(tmp_path):
    root = tmp_path / "in"
    for part in ("train", "test"):
        write_labelled(root, f"images/{part}/{part}.jpg", f"labels/{part}/{part}.txt")
    (root / "labels" / "train" / "gone.txt").write_text(LINE)
    (root / "data.yaml").write_text("train: images\\train\ntest: images/test\nnames: [c]\n")
    done = convert(root, "YOLO", tmp_path / "out")
    assert done.parts["train"][1:] == (1, 1)
    assert note_counts(done) == {
        "label files left out, of no picture of a part": 2,
        "pictures of the folder that are not in the result, as test.jpg": 1,
    }


def test_yolo_folders_may_call_validation_valid(tmp_path):
    root = tmp_path / "in"
    for part in ("train", "valid"):
        write_labelled(root, f"images/{part}/{part}.jpg", f"labels/{part}/{part}.txt")
    (root / "classes.txt").write_text("c\n")
    done = convert(root, "YOLO", tmp_path / "out")
    assert {part: counts[1:] for part, counts in done.parts.items()} == {"train": (1, 1), "val": (1, 1)}


def test_a_description_of_another_encoding_is_named(tmp_path):
    write_labelled(tmp_path / "in", "images/a.jpg", "labels/a.txt")
    (tmp_path / "in" / "data.yaml").write_bytes("names: [Äpfel]".encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.yaml is not a UTF-8 text file"):
        convert(tmp_path / "in", "YOLO", tmp_path / "out")


def test_objects_of_voc_xml_without_a_mask_are_counted(tmp_path):
    root = tmp_path / "in"
    write_picture(root / "JPEGImages" / "a.jpg")
    (root / "SegmentationObject").mkdir()
    Image.fromarray(box_mask(10, 10, 30, 30)).save(root / "SegmentationObject" / "a.png")
    (root / "Annotations").mkdir()
    boxes = {"cat": (11, 11, 30, 30), "dog": (41, 2, WIDTH, HEIGHT)}
    objects = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{side}>{v}</{side}>" for side, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for name, box in boxes.items()
    )
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    done = convert(root, "VOC", tmp_path / "out")
    assert [name for name, _ in read(tmp_path / "out")[0]["a.jpg"]] == ["cat"]
    assert note_counts(done) == {"objects of Annotations left out, since no mask has their box": 1}
