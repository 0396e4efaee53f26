"""The verbs that prepare data, as a person calls them: exit codes, what they print, what they leave behind."""

import json

import numpy as np
import pytest
from broken_data import DEFECTS, change_annotation, write_dataset
from labelme_files import shape, square, write_labelme
from PIL import Image

from instseg_jax.cli import main

WORDS = ["--config=configs/quickstart.py"]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


def check(capsys, root, work, *options):
    code = main(["check_dataset", *WORDS, f"--config.data.dir={root}", f"--workdir={work}", *options])
    said = capsys.readouterr()
    return code, json.loads((work / "check_dataset_result.json").read_text()), said


def test_check_that_passes_leaves_the_official_result(tmp_path, capsys):
    work = tmp_path / "output"
    code, result, said = check(capsys, write_dataset(tmp_path / "my_data"), work)
    assert code == 0 and said.out.strip().endswith("Check dataset passed !")
    assert result["done_flag"] is True and result["check_pass"] is True and result["findings"] == []
    attributes = result["attributes"]
    assert (attributes["num_classes"], attributes["train_samples"], attributes["val_samples"]) == (2, 8, 6)
    assert (attributes["train_images"], attributes["val_images"]) == (4, 3)
    assert result["analysis"]["histogram"] == "check_dataset/histogram.png"
    assert (result["dataset_path"], result["show_type"], result["dataset_type"]) == (
        "my_data", "image", "COCOInstSegDataset",
    )  # fmt: skip
    paths = attributes["train_sample_paths"] + attributes["val_sample_paths"]
    assert len(set(paths)) == 7 and all(path.startswith("check_dataset/demo_img/") for path in paths)
    for path in [*paths, "check_dataset/histogram.png"]:
        with Image.open(work / path) as picture:
            assert np.asarray(picture).std() > 5
    page = (work / "check_dataset.html").read_text()
    assert "Check dataset passed !" in page and all(path in page for path in paths)


def test_check_that_fails_lists_what_is_wrong_and_fix_mends_it(tmp_path, capsys):
    def edit(contents, folder):
        DEFECTS["missing_image"][0](contents, folder)
        change_annotation(number=4, category_id=77)(contents, folder)

    root, work = write_dataset(tmp_path / "set", edit), tmp_path / "output"
    before = (root / "annotations" / "instance_train.json").read_bytes()
    code, result, said = check(capsys, root, work, "--fix")
    assert code == 1 and "Check dataset failed: 2 errors." in said.out
    assert "'train1.jpg'" in said.out and "category id 77" in said.out
    found = {finding["code"]: finding for finding in result["findings"]}
    assert found["missing_image"]["ids"] == [1] and found["missing_image"]["severity"] == "error"
    assert found["unknown_category"]["ids"] == [20] and found["unknown_category"]["id_of"] == "annotation"
    assert result["check_pass"] is False and result["fixed"]["check_pass"] is True
    assert (root / "annotations" / "instance_train.json").read_bytes() == before
    page = (work / "check_dataset.html").read_text()
    assert "missing_image" in page and "Repaired copies" in page
    # The printed options are those to go on with.
    options = [line.strip() for line in said.out.splitlines() if line.strip().startswith("--config.data.")]
    assert len(options) == 2
    assert check(capsys, root, tmp_path / "again", *options)[0] == 0


def test_check_of_a_folder_that_is_not_there(tmp_path, capsys):
    code, result, said = check(capsys, tmp_path / "nowhere", tmp_path / "output")
    assert code == 1 and "nowhere" in said.err and said.err.count("\n") == 1
    assert result["done_flag"] is False and result["err_type"] == "FileNotFoundError" and "nowhere" in result["err_msg"]
    code = main(["check_dataset", *WORDS, "--config.data.dir=", f"--workdir={tmp_path}"])
    assert code == 1 and "data.dir is empty" in capsys.readouterr().err


def test_check_with_one_file_missing_or_cut_still_reports(tmp_path, capsys):
    root = write_dataset(tmp_path / "set")
    text = (root / "annotations" / "instance_val.json").read_text()
    (root / "annotations" / "instance_val.json").write_text(text[:100])
    code, result, _ = check(capsys, root, tmp_path / "a")
    assert code == 1 and [finding["code"] for finding in result["findings"]] == ["broken_json"]
    (root / "annotations" / "instance_val.json").unlink()
    code, result, said = check(capsys, root, tmp_path / "b")
    assert code == 1 and [finding["code"] for finding in result["findings"]] == ["missing_annotations"]
    assert "instance_val.json" in said.out


def test_convert_and_split_in_one_call_then_check(tmp_path, capsys):
    for i in range(8):
        write_labelme(tmp_path / "in", f"p{i}", [shape("ab"[i % 2], square(2 + i, 3, 20))])
    words = ["convert", f"--config.data.dir={tmp_path / 'in'}", "--src_dataset_type=LabelMe"]
    target = [f"--save_path={tmp_path / 'out'}", f"--workdir={tmp_path}"]
    assert main([*words, *target, "--train_percent=75", "--val_percent=25"]) == 0
    said = capsys.readouterr().out
    assert "2 classes: a, b" in said and "train: 6 images, 6 objects" in said and "val: 2 images, 2 objects" in said
    code, result, _ = check(capsys, tmp_path / "out", tmp_path / "checked")
    assert code == 0 and result["attributes"]["num_classes"] == 2
    assert main([*words, *target, "--train_percent=75"]) == 1
    assert "val_percent" in capsys.readouterr().err
    assert main([*words[:2], "--src_dataset_type=CSV", *target]) == 1
    assert "LabelMe, VOC, YOLO" in capsys.readouterr().err


def test_split_says_what_it_did_and_refuses_wrong_sums(tmp_path, capsys):
    root = write_dataset(tmp_path / "set")
    words = ["split", f"--config.data.dir={root}", f"--workdir={tmp_path}"]
    assert main([*words, "--train_percent=80", "--val_percent=30"]) == 1
    assert "should equal 100" in capsys.readouterr().err
    assert not list((root / "annotations").glob("*.bak*"))
    assert main([*words, "--train_percent=50", "--val_percent=50", r"--group_by=(\d)"]) == 0
    assert "train: " in capsys.readouterr().out
    parts = [json.loads((root / "annotations" / f"instance_{part}.json").read_text()) for part in ("train", "val")]
    names = [{entry["file_name"][-5] for entry in part["images"]} for part in parts]
    assert not names[0] & names[1]  # train0.jpg stays with val0.jpg
    assert sum(len(part["images"]) for part in parts) == 7


def test_prepare_says_how_to_use_it(tmp_path, capsys):
    root = write_dataset(tmp_path / "set")
    words = ["prepare", f"--config.data.dir={root}", f"--save_path={tmp_path / 'out'}", f"--workdir={tmp_path}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "train: 4 images, 8 objects" in said and "--config.data.source=tfds" in said
    assert main(words) == 1
    assert "is there already" in capsys.readouterr().err


def test_classes_have_the_colours_of_their_index(tmp_path, capsys, monkeypatch):
    """As in predictions of a model that is trained on the data, whatever the category ids are."""
    from instseg_jax.verbs import data

    drawn = []

    def draw_instances(image, *, labels, names, **_):
        drawn.extend(zip(names, labels, strict=True))
        return image

    monkeypatch.setattr(data, "draw_instances", draw_instances)
    root = write_dataset(tmp_path / "my_data")
    assert check(capsys, root, tmp_path / "output")[0] == 0
    content = json.loads((root / "annotations/instance_train.json").read_text())
    ids = sorted(category["id"] for category in content["categories"])
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert ids != [0, 1] and set(drawn) == {(names[id_], i) for i, id_ in enumerate(ids)}
