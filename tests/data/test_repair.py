"""`--fix` repairs what is certain, leaves out what is not, says what is lost, and never calls moved masks passed."""

import json

import numpy as np
import pytest
from broken_data import run_check
from PIL import Image
from rectangle_data import rectangle, write_set

from instseg_jax import masks
from instseg_jax.data import check_report, repair


def edit(root, change, splits=("train", "val")):
    for split in splits:
        file = root / "annotations" / f"instance_{split}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))


def mend(root, folder):
    result = run_check(root)
    repaired = repair.write_repaired(result, folder)
    return result, repaired, run_check(repaired.source)


def read(repaired, split="train"):
    return json.loads(repaired.source.splits[split][0].read_text())


@pytest.fixture
def root(tmp_path):
    objects = [{"segmentation": rectangle(5, 5, 20, 30)}, {"segmentation": rectangle(50, 20, 30, 20)}]
    return write_set(tmp_path / "set", objects)


@pytest.mark.parametrize("size", [(60, 45), (30, 90), (64, 64), (60, 80), (58, 90)])
def test_a_picture_that_one_factor_does_not_explain_is_left_out(root, tmp_path, size):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(root / "images/train0.png")
    _, repaired, again = mend(root, tmp_path / "fixed")
    assert [image["file_name"] for image in read(repaired)["images"]] == ["train1.png"]
    assert repaired.lost["train"] == (1, 2, 2, 3) and repaired.moved == 0 and again.passed
    lines = check_report.describe_repair(
        {"files": {"train": "f"}, "check_pass": True, "changes": [], "moved": 0,
         "lost": {"train": {"images": 1, "of_images": 2, "objects": 2, "of_objects": 3}}}
    )  # fmt: skip
    assert lines[0] == "left out in the repaired copies: train: 2 of 3 objects and 1 of 2 pictures"


def test_one_factor_scales_the_objects_and_is_not_called_passed(root, tmp_path):
    Image.fromarray(np.zeros((30, 45, 3), np.uint8)).save(root / "images/train0.png")
    _, repaired, again = mend(root, tmp_path / "fixed")
    moved = read(repaired)["annotations"][0]
    assert moved["segmentation"] == [[2.5, 2.5, 12.5, 2.5, 12.5, 17.5, 2.5, 17.5]] and repaired.moved == 2
    assert again.passed  # nothing is left to find; the verb does not call it passed all the same


def test_text_ids_flat_polygons_and_points_are_brought_to_form(root, tmp_path):
    def change(content):
        for entry in content["images"]:
            entry["id"] = str(entry["id"])
        first, second, third = content["annotations"]
        first |= {"id": "1", "image_id": "0", "segmentation": first["segmentation"][0]}
        x = second["segmentation"][0]
        second["segmentation"] = [x[i : i + 2] for i in range(0, 8, 2)][:3]  # an odd number of points
        third["segmentation"] = [[[10, 10], [40, 10], [40, 40], [10, 40]], [[50, 10], [60, 10], [60, 20]]]
        del third["id"]

    edit(root, change)
    before, repaired, again = mend(root, tmp_path / "fixed")
    assert not before.passed and again.passed and repaired.moved == 0
    assert repaired.lost["train"] == (0, 2, 0, 3)
    first, second, third = read(repaired)["annotations"]
    assert first["image_id"] == 0 and first["segmentation"] == rectangle(5, 5, 20, 30)
    assert second["segmentation"] == [[50, 20, 80, 20, 80, 40]]
    assert third["segmentation"] == [[10, 10, 40, 10, 40, 40, 10, 40], [50, 10, 60, 10, 60, 20]] and third["id"] == 3


def test_scrambled_masks_are_suspected_and_nothing_is_touched(root, tmp_path):
    def along_rows(content):
        for entry in content["annotations"]:
            image = content["images"][entry["image_id"]]
            height, width = image["height"], image["width"]
            rle = masks.segmentation_to_rle(tuple(np.reshape(p, (-1, 2)) for p in entry["segmentation"]), height, width)
            x1, y1, x2, y2 = masks.rle_box_xyxy_px(rle)
            counts, value = [0], 0
            for pixel in masks.decode_rle(rle).ravel():  # along the rows, as no reader expects it
                if pixel != value:
                    counts.append(0)
                    value = pixel
                counts[-1] += 1
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": {"size": [height, width], "counts": counts}}

    edit(root, along_rows)
    before, repaired, again = mend(root, tmp_path / "fixed")
    assert {flaw.code for flaw in before.flaws if flaw.is_error} == {"suspect_masks"}
    assert "box_mask_mismatch" not in {flaw.code for flaw in before.flaws}
    assert read(repaired) == json.loads((root / "annotations/instance_train.json").read_text()) and not again.passed


def test_one_file_stands_for_one_entry(root, tmp_path):
    def flatten(content):
        for entry in content["images"]:
            entry["file_name"] = f"cam{entry['id']}/{content['images'][0]['file_name'].split('/')[-1]}"

    edit(root, flatten, splits=("train",))
    _, repaired, _ = mend(root, tmp_path / "fixed")
    assert read(repaired)["images"] == [] and repaired.lost["train"] == (2, 2, 3, 3)


def test_the_same_object_twice_is_found_and_left_once(root, tmp_path):
    def double(content):
        twin = dict(content["annotations"][0], id=77)
        other = dict(content["annotations"][0], id=78, category_id=2)  # another class: another object
        content["annotations"] += [twin, other]

    edit(root, double)
    before, repaired, again = mend(root, tmp_path / "fixed")
    assert before.passed and [f.ids for f in before.flaws if f.code == "duplicate_object"] == [(77,), (77,)]
    assert [entry["id"] for entry in read(repaired)["annotations"]] == [1, 2, 999, 78]
    assert "duplicate_object" not in {flaw.code for flaw in again.flaws}


def test_nothing_read_is_nothing_repaired(root, tmp_path):
    edit(root, lambda content: content.pop("categories"))
    _, repaired, _ = mend(root, tmp_path / "fixed")
    assert repaired.source.splits == {} and not (tmp_path / "fixed").exists()
    lines = check_report.describe_repair({"files": {}, "lost": {}, "moved": 0, "changes": [], "check_pass": True})
    assert lines == ["nothing could be repaired: there is no annotation file that can be read"]
