"""The weights that come with the package: small, self-describing, used where no others are named."""

import hashlib
import json
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image

import instseg_jax
from instseg_jax.config import load_config
from instseg_jax.data.source import build_dataset
from instseg_jax.inference.predictor import load_model
from instseg_jax.weights import PACKAGED_WEIGHTS, PRETRAINED, read_weights

PATH = PACKAGED_WEIGHTS[PRETRAINED]


def test_the_file_is_small_and_says_itself_what_it_is():
    assert PATH.stat().st_size < 11e6
    assert (PATH.parent / "SOURCES.md").is_file()
    found = read_weights(PRETRAINED)
    assert {"building", "balloon", "insect", "person"} < set(found.class_names) and len(found.class_names) == 15
    assert found.metadata["config"]["model"]["name"] == "mask_rtdetr_n"
    assert found.metadata["config"]["data"]["dir"] == ""
    assert "/tmp" not in json.dumps(found.metadata) and "/home" not in json.dumps(found.metadata)
    assert 0 < found.thresholds["overall"] < 1


def test_fields_of_the_model_change_before_it_is_built():
    as_saved, changed = load_model(PRETRAINED), load_model(PRETRAINED, overrides={"model.num_queries": "7"})
    assert as_saved.network.num_queries == 100
    assert changed.network.num_queries == 7
    with pytest.raises(ValueError, match="num_query"):
        load_model(PRETRAINED, overrides={"model.num_query": "7"})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("nothing_trained_here"))
        return instseg_jax.create_pipeline("instance_segmentation", device="cpu")


def test_predicting_works_at_once_after_installation(pipeline, tmp_path):
    """On validation pictures, which it has not seen in training, it finds buildings where there are some."""
    dataset = build_dataset(load_config("configs/quickstart.py").data, "val")
    found, overlaps = 0, []
    for i in range(4):
        (result,) = pipeline.predict(dataset.image_path(i), threshold=0.3)
        found += len(result.boxes)
        assert {box["label"] for box in result.boxes} <= {"building", "balloon"}
        pixels = np.zeros(np.asarray(Image.open(dataset.image_path(i))).shape[:2], bool)
        for box in result.boxes:
            x1, y1, x2, y2 = (int(v) for v in box["coordinate"])
            pixels[y1:y2, x1:x2] = True
        overlaps.append(pixels.mean())
    assert found >= 4
    assert np.std(overlaps) > 0  # it depends on the picture
    result.save_all(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_it_says_that_it_is_used(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        instseg_jax.create_pipeline("instance_segmentation", device="cpu")
    assert PRETRAINED in caplog.text


def test_the_preset_for_small_data_starts_from_them(tmp_path):
    config = load_config("configs/finetune.py:n", {"data.dir": "embedded", "train.epochs": "0"})
    instseg_jax.train(config, tmp_path / "run")
    log = (tmp_path / "run/train.log").read_text()
    assert "weights: 527 loaded, 3 reshaped, 0 fresh, 0 skipped" in log
    assert "classes: 1 of 1 by name: building" in log


def test_a_changed_network_starts_where_the_weights_fit(tmp_path):
    fields = {"data.dir": "embedded", "train.epochs": "0", "model.num_prototypes": "8"}
    with pytest.raises(ValueError, match=r"model.weights='mask_rtdetr_n_pretrained'.*4 of another shape.*weights_skip"):
        instseg_jax.train(load_config("configs/finetune.py:n", fields), tmp_path / "refused")
    fields["model.weights_skip"] = "('neck/enc_mask_output_1/*', 'transformer/mask_query_head/layers_2/*')"
    instseg_jax.train(load_config("configs/finetune.py:n", fields), tmp_path / "run")
    assert "523 loaded, 3 reshaped, 4 fresh, 4 skipped" in (tmp_path / "run/train.log").read_text()


def test_no_picture_that_a_score_is_told_of_was_seen():
    """By the files' SHA-256, and by difference hashes of 64 bits, which survive another size and quality."""
    listed = json.loads((PATH.parent / "pictures.json").read_text())
    trained, scored = listed["trained"], listed["scored"]
    assert len(trained) == 268 and {row["set"] for row in scored} >= {"VHR-10", "fruits and nuts", "embedded facades"}
    assert not {row["sha256"] for row in trained} & {row["sha256"] for row in scored}
    one, other = (np.array([int(row["dhash"], 16) for row in rows], np.uint64) for rows in (trained, scored))
    distance = np.bitwise_count(one[:, None] ^ other[None])
    assert distance.min() >= 8  # the same picture, reduced: 0 to 3

    for split, rows in (("val", scored), ("train", trained)):  # the list is that of the pictures
        dataset = build_dataset(load_config("configs/quickstart.py").data, split)
        names = [dataset.image_path(i) for i in range(len(dataset))]
        known = {row["sha256"] for row in rows if row["set"] == "embedded facades"}
        assert {hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest() for name in names} == known
