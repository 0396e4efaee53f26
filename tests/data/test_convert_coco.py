"""COCO files of other tools: several of them, run-length codes, boxes alone, and what makes no sense together."""

import json

import numpy as np
import pytest
from converted_data import HEIGHT, WIDTH, box_mask, convert, read, write_picture

from instseg_jax import masks

RING = box_mask(5, 5, 30, 40) - box_mask(10, 10, 20, 30)
SQUARE = [[40.0, 10.0, 50.0, 10.0, 50.0, 20.0, 40.0, 20.0]]
TWO_SQUARES = [*SQUARE, [60.0, 30.0, 70.0, 30.0, 70.0, 40.0, 60.0, 40.0]]


def counts_of(mask):
    """The runs of a mask, column after column, as a list."""
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges])).tolist()


def write(file, folder, pictures, *, categories=({"id": 3, "name": "roof"}, {"id": 7, "name": "tree"}), **more):
    """A COCO file with pictures {name: [annotation without ids]}; ids count from 100 and 500."""
    images, annotations = [], []
    for image_id, (name, entries) in enumerate(pictures.items(), start=100):
        write_picture(folder / name, seed=image_id)
        images.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        annotations += [{"id": 500 + len(annotations) + n, "image_id": image_id} | e for n, e in enumerate(entries)]
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": list(categories)} | more
    file.write_text(json.dumps(content))
    return content


def entry(segmentation, category=3, **more):
    return {"category_id": category, "segmentation": segmentation, **more}


def test_every_kind_of_mask_comes_back(tmp_path):
    entries = [
        entry(masks.encode_mask(RING)),
        entry({"size": [HEIGHT, WIDTH], "counts": counts_of(RING)}, 7, iscrowd=1),
        entry(TWO_SQUARES, 7, ignore=1),
        entry([], bbox=[1, 2, 10, 20]),
        entry([[200.0, 1, 210, 1, 210, 9]]),  # beside the picture
    ]
    write(tmp_path / "in" / "result.json", tmp_path / "in", {"a.png": entries, "b.png": []})
    done = convert(tmp_path / "in", "COCO", tmp_path / "out")
    assert done.categories == ("roof", "tree")
    assert done.notes == (
        "boxes without a mask, made rectangles: 1",
        "objects left out, without a pixel in their picture: 1",
    )
    found, dataset = read(tmp_path / "out")
    assert [name for name, _ in found["a.png"]] == ["roof", "tree", "tree", "roof"] and found["b.png"] == []
    two = box_mask(40, 10, 50, 20) | box_mask(60, 30, 70, 40)
    for (_, mask), truth in zip(found["a.png"], [RING, RING, two, box_mask(1, 2, 11, 22)], strict=True):
        np.testing.assert_array_equal(mask, truth)
    assert [a.is_crowd for a in dataset.annotations[0]] == [False, True, False, False]
    assert [a.is_ignored for a in dataset.annotations[0]] == [False, False, True, False]
    again = convert(tmp_path / "out", "coco", tmp_path / "out")  # into itself: nothing changes
    assert not again.notes and read(tmp_path / "out")[1].categories == done.categories
    for (_, mask), (_, before) in zip(read(tmp_path / "out")[0]["a.png"], found["a.png"], strict=True):
        np.testing.assert_array_equal(mask, before)


def test_several_files_become_two_splits(tmp_path):
    """Classes go by name, whatever their ids; equal names of pictures in two folders stay two pictures."""
    root = tmp_path / "in"
    other = [{"id": 1, "name": "tree"}, {"id": 2, "name": "car"}]
    write(root / "one" / "a.json", root / "one", {"x.png": [entry(SQUARE, 7)]})
    write(root / "two" / "b.json", root / "two" / "images", {"x.png": [entry(SQUARE, 1)]}, categories=other)
    write(root / "valid" / "_annotations.coco.json", root / "valid", {"v.png": [entry(SQUARE, 2)]}, categories=other)
    write(root / "test" / "_annotations.coco.json", root / "test", {"t.png": [entry(SQUARE)]})
    (root / "one" / "other.json").write_text("[1]")
    done = convert(root, "COCO", tmp_path / "out")
    assert done.categories == ("roof", "tree", "car")
    assert {part: counts for part, (_, *counts) in done.parts.items()} == {"train": [2, 2], "val": [1, 1]}
    assert done.notes == (
        "COCO files left out, of no split, as _annotations.coco.json: 1",
        "pictures of the folder that are not in the result, as t.png: 1",
    )
    train, _ = read(tmp_path / "out")
    assert {name: objects[0][0] for name, objects in train.items()} == {"x.png": "tree", "x_1.png": "tree"}
    assert read(tmp_path / "out", "val")[0]["v.png"][0][0] == "car"


def test_a_known_layout_counts_alone(tmp_path):
    """Beside instances_train2017.json lie files of key points, which list the same pictures."""
    facts = {"licenses": [{"id": 4, "name": "CC BY 4.0"}]}
    content = write(
        tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017", {"a.png": [entry(SQUARE)]}
    )
    content["images"][0] |= {"license": 4, "source": "somewhere"}
    for name in ("instances_train2017", "person_keypoints_train2017"):
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(content | facts))
    done = convert(tmp_path, "COCO", tmp_path / "out")
    assert done.notes == ("COCO files left out, of no split, as person_keypoints_train2017.json: 1",)
    written = json.loads(done.parts["train"][0].read_text())["images"][0]
    assert (written["license"], written["source"]) == ("CC BY 4.0", "somewhere")


@pytest.mark.parametrize(
    ("annotation", "image", "told"),
    [
        (entry([[1, 2, 3]]), {}, r"Annotation 500 of .*r\.json: it has a polygon with 1 points"),
        (entry(SQUARE, 9), {}, "Annotation 500 of .*: its category_id is 9, which the file does not list"),
        (entry({"size": [2, 2], "counts": [1, 3]}), {}, "Annotation 500 of .*: The RLE is for 2x2"),
        (entry([]), {}, "Annotation 500 of .*: it has no segmentation"),
        (entry(SQUARE), {"width": 90}, "Image 100 of .* is said to have 90 x 60 pixels, but has 80 x 60"),
        (entry(SQUARE), {"file_name": "../a.png"}, None),
        (entry(SQUARE), {"file_name": "gone.png"}, "Image 100 of .* names the picture 'gone.png', which is not there"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, annotation, image, told):
    content = write(tmp_path / "in" / "r.json", tmp_path / "in", {"a.png": [annotation], "b.png": [entry(SQUARE)]})
    content["images"][0] |= image
    (tmp_path / "in" / "r.json").write_text(json.dumps(content))
    if told is None:  # its name is found inside of the folder
        assert convert(tmp_path / "in", "COCO", tmp_path / "out").parts["train"][1:] == (2, 2)
        return
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        convert(tmp_path / "in", "COCO", tmp_path / "out")
    done = convert(tmp_path / "in", "COCO", tmp_path / "out", skip_invalid=True)
    assert done.parts["train"][1:] == (1, 1) and any(note.startswith("left out, ") for note in done.notes)


def test_a_picture_of_two_files_and_folders_without_any_are_refused(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.json", tmp_path / "in", {"p.png": [entry(SQUARE)]})
    with pytest.raises(ValueError, match=r"a\.json and .*b\.json both list the picture 'p\.png'; keep one"):
        convert(tmp_path / "in", "COCO", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no JSON file of images, annotations, categories below"):
        convert(tmp_path / "empty", "COCO", tmp_path / "out")
