"""The verb `suggest`: unsure and unlike pictures first, and files that lead back to a data set."""

import json

import numpy as np
import pytest
from fake_model import make_pipeline, picture
from PIL import Image

from instseg_jax.cli import main
from instseg_jax.data import coco
from instseg_jax.data.convert import convert_dataset
from instseg_jax.results.suggesting import choose, uncertainty
from instseg_jax.verbs import predict


def test_uncertainty_by_hand():
    assert uncertainty(np.array([0.5])) == 1
    assert uncertainty(np.array([0.75, 0.25, 0.05])) == 0.5  # what is below 0.1 is no sign of anything
    assert uncertainty(np.array([0.05])) == uncertainty(np.array([])) == 0


def test_the_unsure_and_the_unlike_are_chosen():
    looks = np.array([[0.0], [0.0], [1.0], [3.0]])
    assert choose([0.5, 0.9, 0.4, 0.1], looks, 3) == [1, 2, 3]  # 0.4 * 1 > 0.1 * 3 > 0.5 * 0; then 0.1 * 2 > 0
    assert choose([0.0, 0.0], looks[:2], 9) == [0, 1]


def test_a_folder_is_looked_through_and_comes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "_pipeline", lambda options: make_pipeline())
    drawn = {
        "a/one.png": picture((0, 5, 5, 30, 30)),
        "b/one.png": picture((1, 5, 5, 30, 30), (2, 40, 40, 60, 60)),
        "b/two.png": picture((0, 5, 5, 30, 30)),
    }
    for name, pixels in drawn.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    arguments = ["suggest", f"--input={tmp_path / 'in'}/**/*.png", "--n=2", f"--save_path={out}"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 of 3 pictures with 3 predictions to correct" in said and "convert --src_dataset_type=LabelMe" in said
    listed = json.loads((out / "suggested.json").read_text())["suggested"]
    assert {entry["picture"].split("/in/")[1] for entry in listed} == {"b/one.png", "a/one.png"}
    assert listed[0]["uncertainty"] >= listed[1]["uncertainty"] > 0
    whole = json.loads((out / "coco.json").read_text())
    assert {image["file_name"] for image in whole["images"]} == {"one.png", "one_2.png"}
    assert all((out / image["file_name"]).is_file() for image in whole["images"])
    for kind in ("LabelMe", "LabelStudio", "CVAT", "COCO"):
        done = convert_dataset(
            out, kind, tmp_path / kind, labels=None, percentages=None, group_by=None, seed=0, progress=lambda x, _: x
        )
        assert done.parts["train"][1:] == (2, 3), kind
        areas = sorted(a.area for objects in coco.read_split(tmp_path / kind, "train").annotations for a in objects)
        assert areas == pytest.approx(sorted(a["area"] for a in whole["annotations"]), rel=0.1)
    assert main([*arguments[:2], "--n=0"]) == 1
    assert "--n is 0, it must be at least 1" in capsys.readouterr().err
