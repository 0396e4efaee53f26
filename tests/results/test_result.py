"""Results: boxes and masks stay together, files are whole and named after the input."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from instseg_jax import files
from instseg_jax.evaluation.coco import coco_metrics
from instseg_jax.inference.postprocess import detections_to_instances
from instseg_jax.masks import decode_rle, encode_mask
from instseg_jax.results.result import Result
from instseg_jax.types import Detections, Instances

HEIGHT, WIDTH = 40, 60
CLASS_NAMES = ("cat", "dog", "Käfer")


def filled(x1: int, y1: int, x2: int, y2: int) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return encode_mask(mask)


def four_instances() -> Instances:
    """The third box lies outside the image and the fourth reaches over its border; every mask is another one."""
    return Instances(
        scores=np.array([0.9, 0.8, 0.7, 0.3], np.float32),
        labels=np.array([1, 0, 2, 1], np.int32),
        boxes_xyxy_px=np.array([[1, 2, 11, 12], [20, 5, 30, 25], [80, -20, 90, -10], [50, 30, 70, 45]], np.float32),
        masks=[filled(1, 2, 11, 12), filled(20, 5, 30, 25), filled(0, 0, 0, 0), filled(50, 30, 60, 40)],
    )


def make(input_path: str = "photos/cat.jpg", *, with_image: bool = True, **changes) -> Result:
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8) if with_image else None
    arguments = {"class_names": CLASS_NAMES, "input_path": input_path, "size": (HEIGHT, WIDTH), "image": image}
    return Result.from_instances(four_instances(), **(arguments | changes))


def test_boxes_are_clipped_and_keep_their_masks():
    result = make()
    assert len(result) == len(result.boxes) == len(result.masks) == 4
    assert [box["label"] for box in result.boxes] == ["dog", "cat", "Käfer", "dog"]
    assert [box["cls_id"] for box in result.boxes] == [1, 0, 2, 1]
    assert [box["coordinate"] for box in result.boxes] == [
        [1, 2, 11, 12],
        [20, 5, 30, 25],
        [60, 0, 60, 0],
        [50, 30, 60, 40],
    ]
    assert [box["score"] for box in result.boxes] == pytest.approx([0.9, 0.8, 0.7, 0.3])
    # The degenerate box keeps its place: the box after it still has its own mask.
    np.testing.assert_array_equal(mask_api.toBbox(result.masks[3]), [50, 30, 10, 10])
    assert mask_api.area(result.masks[2]) == 0


def test_filter_by_one_threshold():
    kept = make().filter(0.6)
    assert [box["label"] for box in kept.boxes] == ["dog", "cat", "Käfer"]
    last = make().filter(0.0).filter({"dog": 0.0, "cat": 1.1}, default=1.1)
    assert [box["score"] for box in last.boxes] == pytest.approx([0.9, 0.3])
    np.testing.assert_array_equal(mask_api.toBbox(last.masks[1]), [50, 30, 10, 10])
    assert len(make().filter(1.1)) == 0


def test_filter_by_class():
    assert [box["label"] for box in make().filter({"dog": 0.2, 0: 0.85}).boxes] == ["dog", "Käfer", "dog"]
    assert [box["label"] for box in make().filter({"Käfer": 0.75}, default=0.2).boxes] == ["dog", "cat", "dog"]


def test_filter_leaves_the_result_alone():
    result = make()
    before = json.dumps(result.json)
    result.filter(0.8).boxes[0]["label"]
    assert len(result) == 4 and json.dumps(result.json) == before


def test_json_is_plain_and_complete():
    content = make(page_index=2).json
    assert json.loads(json.dumps(content)) == content
    inner = content["res"]
    assert set(inner) == {"input_path", "page_index", "size", "boxes", "masks"}
    assert inner["input_path"] == "photos/cat.jpg" and inner["page_index"] == 2 and inner["size"] == [HEIGHT, WIDTH]
    assert set(inner["boxes"][0]) == {"cls_id", "label", "score", "coordinate"}
    assert decode_rle(inner["masks"][1]).sum() == 200


def test_changing_the_json_does_not_change_the_result():
    result = make()
    content = result.json["res"]
    content["boxes"][0]["coordinate"][0] = -5
    content["masks"][0]["counts"] = ""
    content["boxes"].pop()
    assert result.boxes[0]["coordinate"][0] == 1 and len(result.boxes) == 4
    assert decode_rle(result.masks[0]).sum() == 100


def test_print_shows_boxes_and_not_masks(capsys):
    make().print()
    printed = capsys.readouterr().out
    shown = json.loads(printed)["res"]
    assert shown["masks"] == "..." and len(shown["boxes"]) == 4
    assert "Käfer" in printed
    make().print(ensure_ascii=True)
    assert "K\\u00e4fer" in capsys.readouterr().out
    make().print(format_json=False)
    assert "'masks': '...'" in capsys.readouterr().out


def test_coco_entries():
    entries = make().to_coco(17, category_ids=[3, 7, 90])
    assert [entry["category_id"] for entry in entries] == [7, 3, 90, 7]
    assert entries[1]["bbox"] == [20, 5, 10, 20] and {entry["image_id"] for entry in entries} == {17}
    assert [entry["category_id"] for entry in make().to_coco(17)] == [1, 0, 2, 1]
    truth = {
        "images": [{"id": 17, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "Käfer"}],
        "annotations": [
            {"id": 1, "image_id": 17, "category_id": 3, "bbox": [20, 5, 10, 20], "segmentation": filled(20, 5, 30, 25)}
        ],
    }
    metrics = coco_metrics(truth, entries)
    assert metrics["segm/AP/cat"] == metrics["bbox/AP/cat"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("input_path", "json_name", "image_name"),
    [
        ("photos/cat.jpg", "cat_res.json", "cat_res.jpg"),
        ("cat.JPEG", "cat_res.json", "cat_res.JPEG"),
        ("a/b.c/cat.v2.png", "cat.v2_res.json", "cat.v2_res.png"),
        (r"C:\photos\cat.bmp", "cat_res.json", "cat_res.bmp"),
        ("https://host/a/cat%20two.webp?size=3#top", "cat two_res.json", "cat two_res.webp"),
        ("https://host/", "image_res.json", "image_res.png"),
        ("array_3", "array_3_res.json", "array_3_res.png"),
        ("scan.pdf", "scan_res.json", "scan_res.png"),
        ("Käfer.tif", "Käfer_res.json", "Käfer_res.tif"),
    ],
)
def test_files_are_named_after_the_input(tmp_path, input_path, json_name, image_name):
    result = make(input_path)
    assert result.save_to_json(tmp_path / "new") == tmp_path / "new" / json_name
    assert result.save_to_img(str(tmp_path / "new")) == tmp_path / "new" / image_name
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted([json_name, image_name])
    with Image.open(tmp_path / "new" / image_name) as picture:
        assert picture.size == (WIDTH, HEIGHT)
        formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}
        suffix = Path(image_name).suffix.lower()
        assert picture.format == formats.get(suffix, suffix[1:].upper())


def test_pages_do_not_overwrite_each_other(tmp_path):
    saved = [make("scan.pdf", page_index=page).save_to_json(tmp_path) for page in (0, 1)]
    assert [path.name for path in saved] == ["scan_0_res.json", "scan_1_res.json"]


def test_files_with_a_name_of_their_own(tmp_path):
    result = make()
    assert result.save_to_json(tmp_path / "a" / "x.json") == tmp_path / "a" / "x.json"
    assert result.save_to_img(tmp_path / "a" / "y.png") == tmp_path / "a" / "y.png"
    # A folder may look like a file, and a folder to be made may have a dot.
    (tmp_path / "set.json").mkdir()
    assert result.save_to_json(tmp_path / "set.json") == tmp_path / "set.json" / "cat_res.json"
    assert result.save_to_img(tmp_path / "run.1") == tmp_path / "run.1" / "cat_res.jpg"


def test_saved_json_reads_back(tmp_path):
    result = make()
    text = result.save_to_json(tmp_path).read_text(encoding="utf-8")
    assert json.loads(text) == result.json["res"] and "Käfer" in text
    assert text.startswith('{\n    "input_path"')
    assert "\\u00e4" in result.save_to_json(tmp_path, ensure_ascii=True).read_text(encoding="utf-8")
    assert "\n" not in result.save_to_json(tmp_path, indent=None).read_text(encoding="utf-8").rstrip("\n")


def test_json_of_many_masks_is_small(tmp_path):
    mask = np.zeros((480, 640), bool)
    mask[90:390, 70:570] = np.hypot(*np.mgrid[-1:1:300j, -1:1:500j]) < 1
    boxes = [{"cls_id": 0, "label": "cat", "score": 0.5, "coordinate": [70.0, 90.0, 570.0, 390.0]}] * 100
    result = Result("a.jpg", (480, 640), boxes, [encode_mask(mask)] * 100)
    assert result.save_to_json(tmp_path).stat().st_size < 300_000


def test_image_with_instances():
    result = make()
    picture = np.asarray(result.img["res"])
    assert picture.shape == (HEIGHT, WIDTH, 3) and picture.dtype == np.uint8
    assert (picture != 90).any()
    assert (result.image == 90).all()
    np.testing.assert_array_equal(picture, np.asarray(result.img["res"]))


def test_a_result_without_its_image(tmp_path):
    result = make(with_image=False)
    assert result.save_to_json(tmp_path).exists()
    with pytest.raises(ValueError, match=r"photos/cat\.jpg was made without its image"):
        result.save_to_img(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cat_res.json"]


def test_an_image_without_instances(tmp_path):
    nothing = make().filter(2.0)
    assert nothing.json["res"]["boxes"] == nothing.json["res"]["masks"] == nothing.to_coco(1) == []
    np.testing.assert_array_equal(np.asarray(nothing.img["res"]), nothing.image)
    assert nothing.save_to_json(tmp_path).exists() and nothing.save_to_img(tmp_path).exists()


def test_from_detections_to_a_result():
    logits = np.full((1, 2, 10, 15), -3, np.float32)
    logits[0, 0, 2:6, 3:9] = 3
    logits[0, 1, 8, 14] = 3
    detections = Detections(
        scores=np.array([[0.9, 0.4]], np.float32),
        labels=np.array([[1, 0]]),
        boxes_xyxy=np.array([[[0.2, 0.2, 0.6, 0.6], [0.9, 0.8, 1.1, 0.9]]], np.float32),
        mask_logits=logits,
    )
    sizes = {"input_size": (40, 60), "content_size": (40, 60), "original_size": (HEIGHT, WIDTH)}
    result = Result.from_instances(
        detections_to_instances(detections, 0, **sizes),
        class_names=CLASS_NAMES,
        input_path="a.png",
        size=(HEIGHT, WIDTH),
    )
    np.testing.assert_allclose(result.boxes[0]["coordinate"], [12, 8, 36, 24], rtol=1e-6)
    np.testing.assert_array_equal(mask_api.toBbox(result.masks[0]), [12, 8, 24, 16])
    assert result.boxes[1]["coordinate"] == pytest.approx([54, 32, 60, 36])


def test_what_does_not_belong_together():
    with pytest.raises(ValueError, match="a mask for each box, got 1 boxes, 2 masks"):
        Result("a.png", (4, 4), [{}], [{}, {}])
    with pytest.raises(ValueError, match=r"must be \[4, 4, 3\], got \[5, 4, 3\]"):
        Result("a.png", (4, 4), [], [], np.zeros((5, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="must be below 2, got"):
        make(class_names=("cat", "dog"))


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = files.write_json(tmp_path / "a.json", {"a": 1})
    for broken in (float("nan"), float("inf"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(path, {"a": 2, "b": broken})

    def full_disk(self, data):
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_written_values(tmp_path):
    values = {
        "float": np.float32(0.5),
        "int": np.int64(3),
        "array": np.arange(3),
        "path": Path("x"),
        "none": None,
        "ä": "ß",
    }
    path = files.write_json(tmp_path / "deep" / "a.json", values)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"float": 0.5, "int": 3, "array": [0, 1, 2], "path": "x", "none": None, "ä": "ß"}
    assert "ß" in text and text.endswith("}\n")
    assert files.write_text(tmp_path / "b.txt", "a\nb").read_bytes() == b"a\nb"
