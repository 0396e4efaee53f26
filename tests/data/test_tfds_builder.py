"""The data set as TFDS: every record as the file has it, the same batches as from the folder, no TensorFlow."""

import dataclasses
import itertools
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from places import FIXTURES

from instseg_jax import masks
from instseg_jax.config import load_config
from instseg_jax.data import coco, loader, source, tfds_builder

COCO = FIXTURES / "coco2017"
SMALL = {"data.image_size": "64", "data.train_sizes": "(64,)", "train.batch_size": "2", "data.num_workers": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two real pictures, crowd and run-length codes among 18 objects and none at all, as both splits; licences kept."""
    root = tmp_path_factory.mktemp("set")
    (root / "annotations").mkdir()
    shutil.copytree(COCO / "val2017", root / "images")
    content = json.loads((COCO / "annotations" / "instances_val2017.json").read_text())
    content["licenses"] = [{"id": 4, "name": "Attribution License", "url": "x"}]
    for entry, license in zip(content["images"], (4, "CC0"), strict=True):
        entry["license"] = license
    for split in ("train", "val"):
        (root / "annotations" / f"instance_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    datasets = {split: coco.read_split(folder, split) for split in ("train", "val")}
    return tfds_builder.prepare_dataset(datasets, tmp_path_factory.mktemp("tfds"))


def test_other_programs_read_everything(folder, prepared):
    truth = coco.read_split(folder, "train")
    builder = tfds.builder_from_directory(str(prepared))
    names = builder.info.features["objects"]["label"].names
    assert names == list(truth.categories) and list(builder.info.metadata["category_ids"]) == list(truth.category_ids)
    records = builder.as_data_source("train")
    assert len(records) == len(truth) == 2
    assert [record["image/license"].decode() for record in records] == ["Attribution License", "CC0"]
    seen = set()
    for index, record in enumerate(records):
        image, annotations = truth.images[index], truth.annotations[index]
        assert (record["image/id"], record["image/height"], record["image/width"]) == (
            image.id, image.height, image.width,
        )  # fmt: skip
        assert record["image/file_name"].decode() == image.file_name
        np.testing.assert_array_equal(record["image"], truth.read_image(index))
        objects = record["objects"]
        assert len(objects["id"]) == len(annotations)
        for k, annotation in enumerate(annotations):
            assert objects["id"][k] == annotation.id and objects["label"][k] == annotation.label
            assert bool(objects["is_crowd"][k]) == annotation.is_crowd
            np.testing.assert_allclose(objects["bbox"][k], annotation.box_xywh_px, rtol=1e-6)
            np.testing.assert_allclose(objects["area"][k], annotation.area, rtol=1e-6)
            read = json.loads(objects["segmentation"][k])
            if isinstance(read, list):
                read = tuple(np.reshape(polygon, (-1, 2)) for polygon in read)
            np.testing.assert_array_equal(
                masks.segmentation_to_mask(read, image.height, image.width),
                masks.segmentation_to_mask(annotation.segmentation, image.height, image.width),
            )
            seen.add((isinstance(read, dict), annotation.is_crowd))
    assert seen == {(False, False), (True, True)}


def test_batches_are_those_of_the_folder(folder, prepared):
    batches = []
    for fields in ({"data.dir": str(folder)}, {"data.dir": str(prepared), "data.source": "tfds"}):
        config = load_config("configs/mask_rtdetr.py:s", SMALL | fields)
        train = loader.build_train_loader(config, source.build_dataset(config.data, "train"))
        val = loader.build_eval_loader(config, source.build_dataset(config.data, "val"), use_targets=True)
        batches.append([*itertools.islice(train.batches(), 3), *val.batches()])
    for a, b in zip(*batches, strict=True):
        assert a.targets.valid.any()
        for x, y in ((a.images, b.images), (a.targets.boxes, b.targets.boxes), (a.targets.masks, b.targets.masks)):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(a.image_index, b.image_index)


def test_pictures_cross_processes_and_fit_their_index(folder, prepared, tmp_path):
    dataset = pickle.loads(pickle.dumps(tfds_builder.read_prepared(prepared, "val")))
    np.testing.assert_array_equal(dataset.read_image(1), coco.read_split(folder, "val").read_image(1))
    coco.check_images(dataset)
    other = shutil.copytree(prepared, tmp_path / "other")
    index = json.loads((other / "index_val.json").read_text())
    index["images"].reverse()
    (other / "index_val.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="don't fit their index"):
        tfds_builder.read_prepared(other, "val").read_image(0)


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 10**400], ids=["above", "below", "huge"])
@pytest.mark.parametrize("place", ["images", "annotations"])
def test_ids_beyond_64_bits_are_told_before_anything_is_written(folder, tmp_path, number, place):
    dataset = coco.read_split(folder, "train")
    if place == "images":
        images = (dataclasses.replace(dataset.images[0], id=number), *dataset.images[1:])
        dataset = dataclasses.replace(dataset, images=images)
    else:
        with_number = [tuple(dataclasses.replace(a, id=number) for a in each) for each in dataset.annotations]
        dataset = dataclasses.replace(dataset, annotations=tuple(with_number))
    with pytest.raises(
        ValueError, match=rf"instance_train.* has ids beyond the 64 bits that TFDS has for them: {str(number)[:79]}"
    ):
        tfds_builder.prepare_dataset({"train": dataset}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_of_64_bits_are_kept(folder, tmp_path):
    dataset = coco.read_split(folder, "train")
    images = tuple(
        dataclasses.replace(image, id=id) for image, id in zip(dataset.images, (-(1 << 63), (1 << 63) - 1), strict=True)
    )
    dataset = dataclasses.replace(dataset, images=images)
    out = tfds_builder.prepare_dataset({"train": dataset}, tmp_path / "out")
    read = tfds_builder.read_prepared(out, "train")
    assert [image.id for image in read.images] == [-(1 << 63), (1 << 63) - 1]
    np.testing.assert_array_equal(read.read_image(1), dataset.read_image(1))
    huge = (dataclasses.replace(images[0], width=1 << 31), images[1])
    with pytest.raises(ValueError, match="has sizes beyond the 32 bits that TFDS has for them: 2147483648"):
        tfds_builder.prepare_dataset({"train": dataclasses.replace(dataset, images=huge)}, tmp_path / "other")


def test_it_is_found_below_the_folder_and_never_overwritten(folder, prepared):
    root = prepared.parents[1]
    assert len(tfds_builder.read_prepared(root, "train")) == 2
    with pytest.raises(ValueError, match="is there already"):
        tfds_builder.prepare_dataset({"train": coco.read_split(folder, "train")}, root)
    with pytest.raises(FileNotFoundError, match=r"no prepared train split in .*images"):
        tfds_builder.read_prepared(folder / "images", "train")


def test_what_was_killed_before_its_index_was_written_can_be_prepared_again(folder, tmp_path, monkeypatch):
    datasets = {split: coco.read_split(folder, split) for split in ("train", "val")}
    to_coco, done = coco.to_coco, []

    def killed(dataset):
        if done:
            raise KeyboardInterrupt  # nothing that is left to do is done
        done.append(dataset)
        return to_coco(dataset)

    monkeypatch.setattr(coco, "to_coco", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        tfds_builder.prepare_dataset(datasets, tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="no prepared train split"):
        tfds_builder.read_prepared(tmp_path, "train")
    tfds_builder.prepare_dataset(datasets, tmp_path)
    assert [len(tfds_builder.read_prepared(tmp_path, split)) for split in datasets] == [2, 2]


def test_config_says_where_data_come_from(folder):
    config = load_config("configs/mask_rtdetr.py:s", {"data.dir": str(folder), "data.source": "webdataset"})
    with pytest.raises(ValueError, match=r"data\.source must be one of folder, tfds, got 'webdataset'"):
        source.build_dataset(config.data, "train")


def test_without_tensorflow(prepared):
    """Reading a prepared data set imports none, also where it is installed."""
    code = (
        "import sys\n"
        "from instseg_jax.data import tfds_builder\n"
        f"print(tfds_builder.read_prepared({str(prepared)!r}, 'val').read_image(0).shape, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stdout.strip().endswith("3) False"), done.stdout + done.stderr
