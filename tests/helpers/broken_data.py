"""A small data set of noise, every way to break it that `check_dataset` knows, and the check itself."""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from instseg_jax.data import check
from instseg_jax.data.examples import Layout

HEIGHT, WIDTH = 24, 32


def rectangle(x1, y1, x2, y2):
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def write_dataset(root: Path, edit=lambda contents, folder: None) -> Path:
    """Four training and three validation pictures of noise, two objects each; `edit` damages them."""
    folder = root / "images"
    folder.mkdir(parents=True)
    contents, number = {}, 0
    for split, count in (("train", 4), ("val", 3)):
        content = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "a"}, {"id": 9, "name": "b"}]}
        for i in range(count):
            number += 1
            noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
            picture = cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(folder / f"{split}{i}.jpg"), picture)
            content["images"].append({"id": i, "file_name": f"{split}{i}.jpg", "height": HEIGHT, "width": WIDTH})
            for k, corners in enumerate(((2, 3, 14, 12), (16, 8, 30, 22))):
                x1, y1, x2, y2 = corners
                content["annotations"].append(
                    {
                        "id": 10 * i + k,
                        "image_id": i,
                        "category_id": (4, 9)[k],
                        "segmentation": rectangle(*corners),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        contents[split] = content
    edit(contents, folder)
    (root / "annotations").mkdir()
    for split, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "annotations" / f"instance_{split}.json").write_text(text)
    return root


def run_check(root_or_source, flaws=(), **changes):
    source = root_or_source
    if isinstance(source, Path):
        nothing = {"train": None, "val": None}
        source, flaws = check.find_source(source, nothing, nothing)
    arguments = {
        "num_queries": 300,
        "max_instances": 100,
        "image_size": (64, 64),
        "train_sizes": ((64, 64),),
        "layout": Layout("stretch", mask_stride=1, mask_rasterization="exact", refit_boxes=False, max_instances=100),
    }
    arguments |= {"bands": None, "num_workers": 1, "progress": lambda items, total: items, "pictures": {}}
    arguments |= {"allow_outside": False, "shifted": None}
    return check.check_dataset(source, flaws, **(arguments | changes))


def change_annotation(split="train", number=0, **changes):
    def edit(contents, folder):
        contents[split]["annotations"][number].update(changes)

    return edit


def change_image(split="train", number=0, **changes):
    def edit(contents, folder):
        contents[split]["images"][number].update(changes)

    return edit


def delete_image(contents, folder):
    (folder / "train1.jpg").unlink()


def cut_image(contents, folder):
    data = (folder / "train2.jpg").read_bytes()
    (folder / "train2.jpg").write_bytes(data[: len(data) // 2])


def empty_file(contents, folder):
    (folder / "val0.jpg").write_bytes(b"")


def text_file(contents, folder):
    (folder / "val1.jpg").write_text("no picture")


def copy_image(contents, folder):
    (folder / "val0.jpg").write_bytes((folder / "train0.jpg").read_bytes())


def recompress_image(contents, folder):
    picture = cv2.resize(cv2.imread(str(folder / "train0.jpg")), (48, 36), interpolation=cv2.INTER_LINEAR)
    cv2.imwrite(str(folder / "val0.jpg"), np.clip(picture * 0.9 + 12, 0, 255).astype(np.uint8))
    change_image("val", 0, height=36, width=48)(contents, folder)


def rename_category(contents, folder):
    contents["val"]["categories"][1]["name"] = "c"


def renumber_category(contents, folder):
    contents["val"]["categories"][1]["id"] = 10
    for entry in contents["val"]["annotations"]:
        entry["category_id"] = {4: 4, 9: 10}[entry["category_id"]]


def cut_json(contents, folder):
    contents["val"] = json.dumps(contents["val"])[:-30]


def drop_annotation_key(contents, folder):
    del contents["train"]["annotations"][1]["image_id"]


def remove_objects(contents, folder):
    contents["train"]["annotations"] = contents["train"]["annotations"][:2]


def list_twice(contents, folder):
    contents["train"]["images"].append(dict(contents["train"]["images"][0], id=77))


def turn_image(contents, folder):
    with Image.open(folder / "train0.jpg") as picture:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(folder / "train0.jpg", exif=exif.tobytes())


def turn_image_and_annotations(contents, folder):
    turn_image(contents, folder)
    change_image("train", 0, height=WIDTH, width=HEIGHT)(contents, folder)
    change_annotation("train", 1, segmentation=rectangle(8, 16, 22, 30), bbox=[8, 16, 14, 14])(contents, folder)


def deepen_image(contents, folder):
    deep = cv2.imread(str(folder / "train0.jpg")).astype(np.uint16) * 257
    (folder / "train0.jpg").write_bytes(cv2.imencode(".png", deep)[1].tobytes())


RLE = {"size": [HEIGHT, WIDTH], "counts": [100, 5, HEIGHT * WIDTH - 105]}
DEFECTS = {
    "missing_image": [delete_image, change_image(file_name="elsewhere.jpg")],
    "undecodable_image": [cut_image, empty_file, text_file],
    "duplicate_image_id": [change_image(id=1), change_image("val", id=1)],
    "duplicate_annotation_id": [change_annotation(id=1), change_annotation("val", 2, id=0)],
    "unknown_category": [change_annotation(category_id=5), change_annotation(category_id=None)],
    "unknown_image": [change_annotation(image_id=55), change_annotation(image_id="0")],
    "size_mismatch": [change_image(width=WIDTH + 1), change_image(height=WIDTH, width=HEIGHT), turn_image],
    "degenerate_polygon": [
        change_annotation(segmentation=[[1, 1, 5, 5]]),
        change_annotation(segmentation=[[1, 1, 5, 5, 9, 9]]),
        change_annotation(segmentation=[[3, 3] * 4]),
        change_annotation(segmentation=[]),
        change_annotation(segmentation=None),
        change_annotation(segmentation=[rectangle(2, 3, 14, 12)[0], [0, 0, 1, 1]]),
        change_annotation(segmentation=[[2, 3, "x", 3, 14, 12]]),
        change_annotation(segmentation=[[2, 3, float("nan"), 3, 14, 12]]),
    ],
    "outside_image": [
        change_annotation(segmentation=rectangle(20, 3, WIDTH + 8, 12)),
        change_annotation(segmentation=rectangle(-9, 3, 14, 12)),
        change_annotation(segmentation=rectangle(1000, 1000, 1010, 1010)),
        change_annotation(segmentation=rectangle(0, 0, 1e9, 1e9)),
        change_annotation(bbox=[2, 3, 300, 9]),
    ],
    "broken_rle": [
        change_annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": [1, 2, 3]}),
        change_annotation(segmentation={"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}),
        change_annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": "abc"}),
        change_annotation(segmentation={"counts": [3]}),
    ],
    "categories_differ": [rename_category, renumber_category],
    "broken_json": [cut_json, drop_annotation_key, change_annotation(bbox="box"), change_image(height=None)],
    "leak": [copy_image, recompress_image],
    "box_mask_mismatch": [change_annotation(bbox=[2, 3, 28, 20]), change_annotation(bbox=[12, 10, 20, 14])],
    "crowd": [change_annotation(iscrowd=1)],
    "empty_image": [remove_objects],
    "zero_area": [change_annotation(area=0)],
    "self_crossing_polygon": [change_annotation(segmentation=[[2, 3, 14, 12, 14, 3, 2, 12]])],
    "exif_rotation": [turn_image_and_annotations],
    "duplicate_file_name": [list_twice],
    "deep_pixels": [deepen_image],
    "empty_mask": [change_annotation(segmentation=dict(RLE, counts=[HEIGHT * WIDTH]))],
}
