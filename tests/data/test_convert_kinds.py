"""Converters leave nothing out unsaid and invent nothing: what people's LabelMe, YOLO and VOC folders hold."""

import json
import shutil

import numpy as np
import pytest
from converted_data import HEIGHT, WIDTH, box_mask, convert, read, write_picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from labelme_files import shape, square, write_labelme
from PIL import Image

from instseg_jax.data import check, coco


def note_counts(done):
    return {note.rpartition(": ")[0]: int(note.rpartition(": ")[2]) for note in done.notes}


# --- LabelMe ---------------------------------------------------------------------------------------------------------


def test_a_class_may_be_called_0(tmp_path):
    write_labelme(
        tmp_path / "in", "a", [shape("0", square(5, 5, 10)), shape(0, square(30, 5, 10)), shape(1, square(5, 30, 9))]
    )
    assert convert(tmp_path / "in", "LabelMe", tmp_path / "out").categories == ("0", "1")


@pytest.mark.parametrize("data", [b'{"shapes": [', '{"version": "\xe4'.encode("latin-1"), "标签".encode("gbk")])
def test_a_damaged_file_is_an_error_or_a_note_but_never_gone(tmp_path, data):
    write_labelme(tmp_path / "in", "a", [shape("x", square(5, 5, 10))])
    (tmp_path / "in" / "b.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"b\.json is not .*--skip_invalid"):
        convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out", skip_invalid=True)
    assert len(done.notes) == 1 and "b.json" in done.notes[0] and done.parts["train"][1] == 1


@pytest.mark.parametrize("name", ["x" * 100_000, "x" * 501, "\ud800"])
def test_a_name_that_no_data_set_may_have_is_told_and_left_out(tmp_path, name):
    write_labelme(tmp_path / "in", "a", [shape("x", square(5, 5, 10))])
    write_labelme(tmp_path / "in", "bc", [shape(name, square(5, 5, 10))])
    with pytest.raises(ValueError, match=r"(?s)^.{,900}bc\.json.*--skip_invalid") as caught:
        convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    assert len(str(caught.value)) < 1500 and not (tmp_path / "out").exists()
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out", skip_invalid=True)
    assert done.categories == ("x",) and done.parts["train"][1] == 1 and "bc.json" in done.notes[0]
    (tmp_path / "labels.txt").write_text("x\n" + "y" * 100_000)
    with pytest.raises(ValueError, match="has a name of 100000 letters, at most 500 are allowed"):
        convert(tmp_path / "in", "LabelMe", tmp_path / "other", labels=tmp_path / "labels.txt", skip_invalid=True)


def test_a_name_is_written_as_it_is_read(tmp_path):
    write_labelme(tmp_path / "in", "a", [shape(" red\r\ncar ", square(5, 5, 10)), shape("red car", square(30, 5, 10))])
    assert convert(tmp_path / "in", "LabelMe", tmp_path / "out").categories == ("red car",)
    assert coco.read_split(tmp_path / "out", "train").categories == ("red car",)


def test_hidden_files_are_left_alone(tmp_path):
    write_labelme(tmp_path / "in", "a", [shape("x", square(5, 5, 10))])
    (tmp_path / "in" / "._a.json").write_bytes(b"\0\5\26\7")
    shutil.copytree(tmp_path / "in", tmp_path / "in" / ".ipynb_checkpoints")
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    assert done.parts["train"][1:] == (1, 1) and done.notes == ()


def test_a_renamed_file_belongs_to_the_picture_beside_it(tmp_path):
    for name, side in (("p1", 10), ("p2", 20)):
        write_labelme(
            tmp_path / "in", name, [shape("x", square(5, 5, side))], imagePath=f"{'p2' if name == 'p1' else 'p1'}.png"
        )
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    areas = {name: objects[0][1].sum() for name, objects in read(tmp_path / "out")[0].items()}
    assert areas == {"p1.png": 100, "p2.png": 400}
    assert next(iter(note_counts(done))).startswith("files whose imagePath names another picture")


def test_two_files_of_one_picture_are_noted(tmp_path):
    write_labelme(tmp_path / "in", "a", [shape("x", square(5, 5, 10))])
    write_labelme(tmp_path / "in", "b", [shape("x", square(30, 5, 10))], picture=False, imagePath="a.png")
    assert "pictures that several annotation files are of, as a.png" in note_counts(
        convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    )


def test_slips_lists_of_flags_and_huge_circles(tmp_path):
    shapes = [
        shape("x", [[1, 2], [3, 4]]),
        shape("x", square(5, 5, 10), flags=["difficult"]),
        shape("x", square(25, 5, 10), flags=["crowd"]),
        shape("x", [[40, 30], [1e15, 30]], "circle"),
        shape("x", [[5, 30], [15, 30], [15, 40], [5, 40]], "oriented_rectangle"),
    ]
    write_labelme(tmp_path / "in", "a", shapes)
    done = convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    dataset = read(tmp_path / "out")[1]
    assert [a.is_crowd for a in dataset.annotations[0]] == [False, True, False, False]
    assert [a.area for a in dataset.annotations[0]] == [100, 100, HEIGHT * WIDTH, 100]
    assert note_counts(done) == {"polygons left out, with fewer than 3 points": 1}


def test_a_list_may_have_spaces_a_bom_and_backslashes(tmp_path):
    for name in ("my a", "my b", "c"):
        write_labelme(tmp_path / "in" / "sub", name, [shape("x", square(5, 5, 10))])
    (tmp_path / "in" / "train_anno_list.txt").write_bytes("\ufeffsub/my a.json\r\nsub\\c.json\r\n".encode())
    (tmp_path / "in" / "val_anno_list.txt").write_text("sub/my b.png sub/c.json\n")
    convert(tmp_path / "in", "LabelMe", tmp_path / "out")
    assert sorted(read(tmp_path / "out")[0]) == ["c.png", "my a.png"]


# --- YOLO ------------------------------------------------------------------------------------------------------------


def line(label, box=(8, 6, 40, 30)):
    x1, y1, x2, y2 = box
    points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]) / (WIDTH, HEIGHT)
    return f"{label} " + " ".join(f"{v:.6f}" for v in points.ravel()) + "\n"


def write_yolo(root, description, *, labels=("a",), beside=False, text=None):
    for name in ("a", "b"):
        write_picture(root / "images" / "train" / f"{name}.jpg", seed=ord(name))
    folder = root / "images" / "train" if beside else root / "labels" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    for name in labels:
        (folder / f"{name}.txt").write_text(line(0) if text is None else text)
    (root / "data.yaml").write_text(description)
    return root


@pytest.mark.parametrize(
    ("names", "number", "name"),
    [
        ("names: [c0, c1]", 1, "c1"),
        ("names: {'10': ten, '2': two, '0': zero}", 2, "two"),
        ("names: {10: ten, 2: two}", 10, "ten"),
        ("names: {1: one, 2: two}", 1, "one"),
    ],
)
def test_names_are_found_by_their_number(tmp_path, names, number, name):
    root = write_yolo(tmp_path / "in", f"train: images/train\n{names}\n", text=line(number))
    convert(root, "YOLO", tmp_path / "out")
    assert [found for found, _ in read(tmp_path / "out")[0]["a.jpg"]] == [name]


@pytest.mark.parametrize(("names", "number"), [("[c0, c1]", 2), ("{1: one, 2: two}", 0), ("{0: a, 5: b}", 3)])
def test_a_number_without_a_name_is_an_error(tmp_path, names, number):
    root = write_yolo(tmp_path / "in", f"train: images/train\nnames: {names}\n", text=line(number))
    with pytest.raises(ValueError, match=rf"a\.txt has the class {number}, which has no name"):
        convert(root, "YOLO", tmp_path / "out")


@pytest.mark.parametrize("beside", [False, True])
def test_pictures_without_a_label_file_are_counted(tmp_path, beside):
    root = write_yolo(tmp_path / "in", "train: images/train\nnames: [c]\n", beside=beside)
    (root / "images" / "train" / "._a.jpg").write_bytes(b"\0\5\26\7")
    done = convert(root, "YOLO", tmp_path / "out")
    assert done.parts["train"][1:] == (2, 1)
    assert note_counts(done) == {"pictures without a label file, taken as background": 1}


def test_an_export_for_another_folder_means_what_lies_inside(tmp_path):
    root = write_yolo(tmp_path / "mine", "train: ../images/train\nnames: [c]\n")
    write_yolo(tmp_path, "train: images/train\nnames: [c]\n", labels=("a", "b"))  # another data set beside
    assert convert(root, "YOLO", tmp_path / "out").parts["train"][1:] == (2, 1)


def test_poses_are_no_outlines(tmp_path):
    root = write_yolo(tmp_path / "in", "train: images/train\nnames: [person]\nkpt_shape: [17, 3]\n")
    with pytest.raises(ValueError, match="kpt_shape: these are poses"):
        convert(root, "YOLO", tmp_path / "out")


# --- VOC -------------------------------------------------------------------------------------------------------------


def write_voc(root, classes, instances, names=("a",), **save):
    for name in names:
        write_picture(root / "JPEGImages" / f"{name}.jpg")
        for folder, pixels in (("SegmentationClass", classes), ("SegmentationObject", instances)):
            if pixels is not None:
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"{name}.png", **save)
    return root


def test_colours_of_a_labelmap_name_the_classes(tmp_path):
    mask = box_mask(10, 10, 40, 40)
    colours = np.where(mask[..., None] > 0, np.uint8([250, 50, 83]), np.uint8([0, 0, 0]))
    root = write_voc(tmp_path / "in", colours.astype(np.uint8), mask)
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nkite:1,2,3::\nballoon:250,50,83::\n"
    )
    done = convert(root, "VOC", tmp_path / "out")
    assert [name for name, _ in read(tmp_path / "out")[0]["a.jpg"]] == ["balloon"] and done.categories == (
        "kite",
        "balloon",
    )
    (root / "labelmap.txt").write_text("balloon 250 50 83\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*labelmap\.txt"):
        convert(root, "VOC", tmp_path / "out")


def test_number_255_counts_in_16_bits_and_is_void_in_8(tmp_path):
    instances = np.where(box_mask(10, 10, 40, 40) > 0, 255, 0) + 3 * box_mask(50, 10, 60, 20)
    (tmp_path / "labels.txt").write_text("_background_\nx\n")
    classes = (instances > 0).astype(np.uint8)
    for dtype, areas in ((np.uint16, [100, 900]), (np.uint8, [100])):
        root = write_voc(tmp_path / dtype.__name__, classes, instances.astype(dtype))
        convert(root, "VOC", tmp_path / f"out{dtype.__name__}", labels=tmp_path / "labels.txt")
        dataset = read(tmp_path / f"out{dtype.__name__}")[1]
        assert sorted(a.area for a in dataset.annotations[0]) == areas


def test_pictures_without_an_instance_mask_stay(tmp_path):
    root = write_voc(tmp_path / "in", box_mask(10, 10, 40, 40), box_mask(10, 10, 40, 40))
    write_voc(root, box_mask(5, 5, 20, 20), None, names=("b",))
    (root / "labels.txt").write_text("_background_\nx\n")
    assert convert(root, "VOC", tmp_path / "out").parts["train"][1:] == (2, 2)


def test_the_classes_of_the_challenge_are_never_taken_unsaid(tmp_path):
    root = write_voc(tmp_path / "in", box_mask(10, 10, 40, 40), box_mask(10, 10, 40, 40))
    done = convert(root, "VOC", tmp_path / "out")
    assert done.categories == ("aeroplane",) and "Pascal VOC challenge" in done.notes[0]


def test_lists_of_voc_may_have_spaces_flags_and_a_bom(tmp_path):
    root = write_voc(tmp_path / "in", box_mask(10, 10, 40, 40), box_mask(10, 10, 40, 40), names=("my a", "b"))
    (root / "labels.txt").write_text("_background_\nx\n")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_bytes("\ufeffmy a  1\r\nb -1\r\n".encode())
    assert convert(root, "VOC", tmp_path / "out").parts["train"][1:] == (2, 2)


# --- all three -------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 30), st.integers(2, 25), st.integers(2, 25)),
        min_size=1,
        max_size=5,
    )
)
def test_the_same_objects_come_back_from_every_format(tmp_path_factory, boxes):
    folder = tmp_path_factory.mktemp("formats")
    truth = [box_mask(x, y, min(x + w, WIDTH), min(y + h, HEIGHT)) for x, y, w, h in boxes]
    corners = [(x, y, min(x + w, WIDTH), min(y + h, HEIGHT)) for x, y, w, h in boxes]
    rectangles = [[[x1, y1], [x2, y1], [x2, y2], [x1, y2]] for x1, y1, x2, y2 in corners]
    write_labelme(folder / "labelme", "a", [shape("c", points) for points in rectangles])
    root = write_yolo(
        folder / "yolo", "train: images/train\nnames: [c]\n", text="".join(line(0, box) for box in corners)
    )
    instances = np.zeros((HEIGHT, WIDTH), np.uint16)
    for number, mask in enumerate(truth, start=1):
        instances[mask > 0] = number  # a format without overlaps: the last one stays whole
    voc = write_voc(folder / "voc", (instances > 0).astype(np.uint8), instances)
    (voc / "labels.txt").write_text("_background_\nc\n")
    visible = [instances == number for number in range(1, len(truth) + 1)]
    for kind, source, wanted in (("LabelMe", folder / "labelme", truth), ("YOLO", root, truth), ("VOC", voc, visible)):
        done = convert(source, kind, folder / f"out_{kind}")
        pictures = read(folder / f"out_{kind}")[0]
        found = next(objects for name, objects in pictures.items() if name.startswith("a."))
        expected = [mask for mask in wanted if mask.any()]
        assert len(found) == len(expected) and {name for name, _ in found} == {"c"}
        for mask, (_, other) in zip(expected, found, strict=True):
            assert (mask.astype(bool) & other.astype(bool)).sum() / (
                mask.astype(bool) | other.astype(bool)
            ).sum() > 0.99
        assert all("left out" not in note for note in done.notes)


# --- layouts ---------------------------------------------------------------------------------------------------------


def write_coco(file, folder, names=("a.jpg",)):
    for name in names:
        write_picture(folder / name)
    images = [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(names)]
    polygon = [[5, 5, 20, 5, 20, 20]]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "segmentation": polygon} for i in range(len(names))]
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_{}.json", "images"),
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/instance_{}.json", "images/{}"),
        ("annotations/instances_{}2017.json", "{}2017"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
def test_layouts_are_recognised(tmp_path, file, folder):
    for split in ("train", "val"):
        write_coco(tmp_path / file.format(split), tmp_path / folder.format(split), names=(f"{split}.jpg",))
    (tmp_path / "images").mkdir(exist_ok=True)  # also where it holds only folders, or nothing
    for split in ("train", "val"):
        coco.check_images(coco.read_split(tmp_path, split))


def test_roboflow_calls_validation_valid(tmp_path):
    write_coco(tmp_path / "train/_annotations.coco.json", tmp_path / "train")
    write_coco(tmp_path / "valid/_annotations.coco.json", tmp_path / "valid")
    assert coco.find_split(tmp_path, "val") == (tmp_path / "valid/_annotations.coco.json", tmp_path / "valid")


@pytest.mark.parametrize("kind", ["LabelMe", "YOLO", "VOC", "COCO", "LabelStudio", "CVAT"])
def test_another_format_is_told_about_convert(tmp_path, kind):
    root = tmp_path / "in"
    if kind == "LabelMe":
        write_labelme(root, "a", [shape("x", square(5, 5, 10))])
    elif kind == "YOLO":
        write_yolo(root, "train: images/train\nnames: [c]\n")
    elif kind == "VOC":
        write_voc(root, box_mask(1, 1, 9, 9), box_mask(1, 1, 9, 9))
    elif kind == "COCO":
        write_coco(root / "result.json", root)
    else:
        root.mkdir()
        (root / "tasks.json").write_text(
            '[{"data": {"image": "a.png"}, "annotations": []}]' if kind != "CVAT" else "[]"
        )
        (root / "a.xml").write_text("<annotations/>")
    _, flaws = check.find_source(root, {"train": None, "val": None}, {"train": None, "val": None})
    assert f"this looks like {kind}: run convert --src_dataset_type={kind}" in flaws[0].detail


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("my%20a.jpg", "my a.jpg"),
        ("Stra\u00dfe u\u0308.jpg", "Stra\u00dfe \u00fc.jpg"),
        ("a.jpg", "down/a.jpg"),
        ("A.JPG", "a.jpg"),
    ],
)
def test_names_that_differ_in_writing_are_found(tmp_path, listed, there):
    from instseg_jax.data.check_images import find_file

    write_picture(tmp_path / there)
    assert find_file(tmp_path, listed) == tmp_path / there
