"""Reading COCO files: both layouts, every mask form, the filters, and one clear error for each flaw."""

import dataclasses
import json

import numpy as np
import pytest
from places import FIXTURES

from instseg_jax import masks
from instseg_jax.config import load_config
from instseg_jax.data import coco, source

SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]  # 4x4 pixels at (2, 1)


def annotation(id=1, **changes):
    entry = {"id": id, "image_id": 10, "category_id": 3, "segmentation": [SQUARE], "iscrowd": 0}
    entry |= {"bbox": [2, 1, 4, 4], "area": 16}
    entry |= changes
    return {key: value for key, value in entry.items() if value is not ...}


def content(*annotations):
    return {
        "images": [
            {"id": 10, "file_name": "a.jpg", "height": 8, "width": 12},
            {"id": 7, "file_name": "b.jpg", "height": 8, "width": 12},
        ],
        "annotations": list(annotations) or [annotation()],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 7, "name": "train"}],
    }


def write(folder, data, name="instance_train.json"):
    file = folder / "annotations" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return file


def read(tmp_path, data, **arguments):
    return coco.read_coco(write(tmp_path, data), tmp_path / "images", **arguments)


def test_class_index_is_the_rank_of_the_category_id(tmp_path):
    dataset = read(tmp_path, content(annotation(1, category_id=90), annotation(2), annotation(3, category_id=7)))
    assert dataset.categories == ("car", "train", "toothbrush")
    assert dataset.category_ids == (3, 7, 90)
    assert [a.label for a in dataset.annotations[0]] == [2, 0, 1]
    assert dataset.annotations[1] == ()
    assert len(dataset) == 2
    assert dataset.images[1] == coco.ImageRecord(id=7, file_name="b.jpg", height=8, width=12)
    assert dataset.image_path(1) == tmp_path / "images" / "b.jpg"


def test_all_forms_of_a_mask_are_the_same_mask(tmp_path):
    square = np.zeros((8, 12), np.uint8)
    square[1:5, 2:6] = 1
    compressed = masks.encode_mask(square)
    runs = [2 * 8 + 1, 4, 4, 4, 4, 4, 4, 4, 6 * 8 + 3]
    dataset = read(
        tmp_path,
        content(
            annotation(1),
            annotation(2, segmentation={"size": [8, 12], "counts": runs}),
            annotation(3, segmentation=compressed),
            annotation(4, segmentation=[[2.0, 1.0, 4.0, 1.0, 4.0, 5.0, 2.0, 5.0], [4, 1, 6, 1, 6, 5, 4, 5]]),
        ),
    )
    for record in dataset.annotations[0]:
        np.testing.assert_array_equal(masks.segmentation_to_mask(record.segmentation, 8, 12), square)


def test_missing_box_and_area_come_from_the_mask(tmp_path):
    dataset = read(tmp_path, content(annotation(1, bbox=..., area=...), annotation(2, bbox=None)))
    for record in dataset.annotations[0]:
        assert record.box_xywh_px == (2, 1, 4, 4)
        assert record.area == 16


def test_training_box_is_rounded_to_three_decimals(tmp_path):
    dataset = read(tmp_path, content(annotation(bbox=[1.00049, 2.0014, 3.0041, 4.0])))
    assert coco.training_box_xyxy_px(dataset.annotations[0][0]) == (1.0, 2.001, 4.005, 6.001)


def test_targets_are_put_together_once_and_belong_to_their_data_set(tmp_path):
    dataset = read(tmp_path, content(annotation(1, bbox=[1.00049, 2.0014, 3.0041, 4.0]), annotation(2)))
    boxes, labels, segmentations = dataset.training_targets(0)
    np.testing.assert_array_equal(boxes, np.array([[1, 2.001, 4.005, 6.001], [2, 1, 6, 5]], np.float32))
    assert len(labels) == len(segmentations) == 2
    assert dataset.training_targets(0)[0] is boxes
    with pytest.raises(ValueError, match="read-only"):
        boxes[0, 0] = 5
    fewer = dataclasses.replace(dataset, annotations=(dataset.annotations[0][1:],))
    np.testing.assert_array_equal(fewer.training_targets(0)[0], boxes[1:])


def test_select_trainable_names_what_goes(tmp_path):
    dataset = read(
        tmp_path,
        content(
            annotation(1),
            annotation(2, iscrowd=1, segmentation={"size": [8, 12], "counts": [96]}),
            annotation(3, area=0),
            annotation(4, bbox=[2, 1, 4, 1e-5]),
            annotation(5, bbox=[12, 1, 4, 4]),
            annotation(6, ignore=1),
            annotation(7, bbox=[-3, 1, 4, 4]),
        ),
    )
    assert [len(a) for a in dataset.annotations] == [7, 0]
    kept = coco.select_trainable(dataset, keep_empty=False)
    assert [a.id for a in kept.annotations[0]] == [1, 7]
    assert [image.id for image in kept.images] == [10]
    assert kept.skipped == (
        (2, "crowd"),
        (3, "area is not positive"),
        (4, "box has no width or height"),
        (5, "box is outside the image"),
        (6, "marked to be ignored"),
    )
    assert len(coco.select_trainable(dataset, keep_empty=True)) == 2


def test_image_with_only_a_crowd_is_not_trained_on(tmp_path):
    dataset = read(tmp_path, content(annotation(iscrowd=1)))
    assert dataset.annotations[0][0].is_crowd
    assert len(coco.select_trainable(dataset, keep_empty=False)) == 0


def test_real_coco_images_in_their_own_layout():
    dataset = coco.read_split(FIXTURES / "coco2017", "val")
    coco.check_images(dataset)
    assert dataset.name == "instances_val2017"
    assert len(dataset.categories) == 80
    assert (dataset.categories[79], dataset.category_ids[79]) == ("toothbrush", 90)
    assert sorted(len(a) for a in dataset.annotations) == [0, 18]
    objects = max(dataset.annotations, key=len)
    assert sum(a.is_crowd for a in objects) == 1
    image = dataset.images[dataset.annotations.index(objects)]
    for record in objects:
        rle = masks.segmentation_to_rle(record.segmentation, image.height, image.width)
        # The annotators' areas are of the polygons or masks; drawing changes the outline by a fraction of a pixel.
        assert masks.rle_area(rle) == pytest.approx(record.area, rel=0.1, abs=12)


def test_embedded_data_set():
    train, val = coco.read_split("embedded", "train"), coco.read_split("embedded", "val")
    coco.check_images(train)
    coco.check_images(val)
    coco.check_same_categories(train, val)
    assert train.categories == ("building",)
    assert (len(train), len(val)) == (83, 35)
    assert (sum(map(len, train.annotations)), sum(map(len, val.annotations))) == (198, 74)
    assert coco.select_trainable(train, keep_empty=False).skipped == ()
    streets = [{int(image.file_name.split("_")[0]) for image in split.images} for split in (train, val)]
    assert not streets[0] & streets[1]
    files = [f for f in coco.data_root("embedded").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 3_000_000


def test_find_split_in_the_tutorials_layout(tmp_path):
    file = write(tmp_path, content(), "instance_val.json")
    (tmp_path / "images").mkdir()
    assert coco.find_split(tmp_path, "val") == (file, tmp_path / "images")


def test_find_split_prefers_explicit_paths_relative_to_the_folder(tmp_path):
    write(tmp_path, content(), "instance_val.json")
    file = write(tmp_path, content(), "other.json")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "images").mkdir()
    found = coco.find_split(tmp_path, "val", annotations="annotations/other.json", images=tmp_path / "pictures")
    assert found == (file, tmp_path / "pictures")


def test_find_split_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set folder .*nowhere"):
        coco.find_split(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"instance_train\.json.* and no .*instances_train2017\.json"):
        coco.find_split(tmp_path, "train")
    write(tmp_path, content())
    with pytest.raises(FileNotFoundError, match=r"train images are missing: there is no folder .*images"):
        coco.find_split(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"mine.json"):
        coco.find_split(tmp_path, "train", annotations="mine.json")


def changed(**changes):
    return content() | changes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"images": [],\n "annotations": [,]}', "instance_train.json is not valid JSON: .* in line 2"),
        ("[]", "must hold a JSON object"),
        ({"images": [], "categories": []}, "lacks 'annotations'"),
        (changed(annotations={}), "'annotations' of .* must be a list"),
        (changed(categories=[]), "lists no categories"),
        (changed(categories=[{"id": 3}]), "Category number 1 of .* lacks 'name'"),
        (changed(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "Several categories .* share an id: 3"),
        (changed(images=[{"id": 1, "file_name": "a.jpg"}]), "Image number 1 of .* lacks 'height', 'width'"),
        (changed(images=[{"id": 1, "file_name": "a", "height": 0, "width": 4}]), "Image number 1 .* has the height 0"),
        (changed(images=[{"id": 1, "file_name": "a", "height": 4, "width": 10**9}]), "has the width 1000000000"),
        (changed(images=[{"id": 1, "file_name": "a", "height": float("nan"), "width": 4}]), "has the height nan"),
        (changed(images=[{"id": 1, "file_name": 7, "height": 4, "width": 4}]), "has the file name 7, not a string"),
        (changed(images=content()["images"] * 2), "Several images .* share an id: 10, 7"),
        (changed(images=[{"id": "x", "file_name": "a", "height": 1, "width": 4}]), "whole numbers, got 'x'"),
        (content(annotation(5), annotation(5)), "Several annotations .* share an id: 5"),
        (content(annotation(category_id=...)), "Annotation number 1 of .* lacks 'category_id'"),
        (content(annotation(4, image_id=11)), "Annotation 4 of .* belongs to the image id 11, which"),
        (content(annotation(4, category_id=[1])), r"Annotation 4 of .* has the category id \[1\], which"),
        (content(annotation(4, segmentation=[])), "Annotation 4 of .*: it has no segmentation"),
        (content(annotation(4, segmentation=...)), "Annotation 4 of .*: it has no segmentation"),
        (content(annotation(4, segmentation=[[]])), "Annotation 4 of .*: it has a polygon with 0 points"),
        (content(annotation(4, segmentation=[SQUARE, [1, 2, 3, 4]])), "Annotation 4 .* polygon with 2 points"),
        (content(annotation(4, segmentation=[[*SQUARE, 1]])), "polygon with 9 numbers"),
        (content(annotation(4, segmentation=SQUARE)), "not a flat list"),
        (content(annotation(4, segmentation=[["a"] * 6])), "coordinates that are not numbers"),
        (content(annotation(4, segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]])), "far outside its 12x8 image"),
        (content(annotation(4, segmentation=[[0, 0, float("nan"), 0, 1, 1]])), "far outside its 12x8 image"),
        (content(annotation(4, segmentation={"size": [12, 8], "counts": [96]})), "Annotation 4 .* 12x8 .* not 8x12"),
        (content(annotation(4, segmentation={"size": [8, 12], "counts": "00"})), "Annotation 4 .* add up to its 96"),
        (content(annotation(4, bbox=[1, 2, 3])), "Annotation 4 .* bbox must be four numbers"),
        (content(annotation(4, area="big")), "Annotation 4 .* area must be a number, got 'big'"),
    ],
)
def test_each_flaw_has_its_message(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, data)


def test_skip_invalid_leaves_out_and_names_malformed_objects(tmp_path):
    data = content(annotation(1), annotation(2, segmentation=[[]]), annotation(3, bbox=[1]))
    dataset = read(tmp_path, data, skip_invalid=True)
    assert [a.id for a in dataset.annotations[0]] == [1]
    assert [id for id, _ in dataset.skipped] == [2, 3]
    assert "polygon with 0 points" in dataset.skipped[0][1]
    with pytest.raises(ValueError, match="image id 11"):
        read(tmp_path, content(annotation(4, image_id=11)), skip_invalid=True)


def test_a_config_says_whether_malformed_objects_stop_training(tmp_path):
    (tmp_path / "images").mkdir()
    write(tmp_path, content(annotation(1), annotation(2, segmentation=[[]])))
    fields = {"data.dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"Annotation 2 of .*Run check_dataset .* or .*data\.skip_invalid=True"):
        source.build_dataset(load_config("configs/mask_rtdetr.py:s", fields).data, "train")
    config = load_config("configs/mask_rtdetr.py:s", fields | {"data.skip_invalid": "True"})
    dataset = source.build_dataset(config.data, "train")
    assert [a.id for a in dataset.annotations[0]] == [1] and dataset.skipped[0][0] == 2
    with pytest.raises(ValueError, match=r"data\.dir is empty"):
        source.build_dataset(load_config("configs/mask_rtdetr.py:s").data, "train")


def test_licences_are_kept(tmp_path):
    data = content()
    data["licenses"] = [{"id": 4, "name": "CC BY 2.0", "url": "x"}]
    data["images"][0]["license"], data["images"][1]["license"] = 4, 9
    assert [image.license for image in read(tmp_path, data).images] == ["CC BY 2.0", ""]


def test_missing_annotation_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*none.json"):
        coco.read_coco(tmp_path / "none.json", tmp_path)


def test_check_images_lists_the_first_few(tmp_path):
    data = content()
    data["images"] = [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 12} for i in range(10, 18)]
    dataset = read(tmp_path, data)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "10.jpg").touch()
    message = r"7 of 8 images .* are missing in .*images.*: 11.jpg, .*, 15.jpg and 2 more\."
    with pytest.raises(FileNotFoundError, match=message):
        coco.check_images(dataset)


def test_check_same_categories_names_the_difference(tmp_path):
    a = read(tmp_path, content())
    data = content()
    data["categories"][0]["name"] = "brush"
    data["categories"][2]["id"] = 8
    b = read(tmp_path, data)
    coco.check_same_categories(a, a)
    with pytest.raises(
        ValueError, match=r"id 7 is 'train' in .* and missing in .*, id 8 .*, id 90 is 'toothbrush' .*'brush'"
    ):
        coco.check_same_categories(a, b)


def test_byte_order_mark_and_non_ascii_names(tmp_path):
    data = content()
    data["categories"][0]["name"] = "Zahnbürste"
    file = write(tmp_path, data)
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(data, ensure_ascii=False).encode())
    assert coco.read_coco(file, tmp_path).categories[2] == "Zahnbürste"
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not a UTF-8 text file"):
        coco.read_coco(file, tmp_path)


def test_taken_images_keep_their_objects_and_order():
    whole = coco.read_split(coco.EMBEDDED, "train")
    taken = coco.take_images(whole, [5, 0, 5])
    assert [image.id for image in taken.images] == [whole.images[i].id for i in (5, 0, 5)]
    assert taken.annotations == (whole.annotations[5], whole.annotations[0], whole.annotations[5])
    assert taken.categories == whole.categories and whole.annotations[5] != whole.annotations[0]
    with pytest.raises(IndexError, match="83 images; there is none at position 83"):
        coco.take_images(whole, [0, 83])
