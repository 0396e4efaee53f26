"""Exports: the folder and what it says, parity, and what is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from export_case import CATEGORY_IDS, CLASS_NAMES, DETECTIONS, QUERIES, SIZE, make_run

from instseg_jax.cli import main
from instseg_jax.config import load_config
from instseg_jax.data import coco
from instseg_jax.export import export as export_room
from instseg_jax.export.export import Request, export_model
from instseg_jax.export.parity import find_warnings
from instseg_jax.inference.predictor import load_model, make_predict
from instseg_jax.runtimes.agreement import Found, compare_runs, pair_detections
from instseg_jax.runtimes.exported import find_export, open_export, read_export
from instseg_jax.scoring.pictures import comparison_images
from instseg_jax.types import Detections
from instseg_jax.verbs.export import check_best_export, export_best
from instseg_jax.weights import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A StableHLO export of the run for any number of images, and its parity."""
    folder = tmp_path_factory.mktemp("exports") / "stablehlo"
    model = load_model(run)
    request = Request("stablehlo", 1, SIZE, dynamic_batch=True)
    report = export_model(model, folder, request, source="a run", images=comparison_images(model, SIZE)[:2])
    return folder, report


@pytest.fixture(autouse=True)
def no_second_start(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


def test_the_folder_says_everything(exported):
    folder, report = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.stablehlo", "config.json", "postprocess.py", "parity.json"}
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert said["class_names"] == list(CLASS_NAMES) and said["category_ids"] == list(CATEGORY_IDS)
    assert said["thresholds"] == [0.5] * 3 and said["stored_thresholds"] is None
    assert said["preprocessing"]["size"] == [SIZE, SIZE] and said["preprocessing"]["interpolation"] == "cubic"
    assert [(one["name"], one["shape"]) for one in said["inputs"]] == [("images", ["batch", SIZE, SIZE, 3])]
    shapes = {one["name"]: one["shape"] for one in said["outputs"]}
    assert shapes == {
        "scores": ["batch", DETECTIONS],
        "labels": ["batch", DETECTIONS],
        "boxes_xyxy": ["batch", DETECTIONS, 4],
        "mask_logits": ["batch", DETECTIONS, SIZE // 4, SIZE // 4],
    }
    assert said["versions"]["jax"] and said["config"]["model"]["num_queries"] == QUERIES
    assert report == json.loads((folder / "parity.json").read_text(encoding="utf-8"))


def test_parity_is_told(exported):
    _, report = exported
    assert report["compared"] == 2 * DETECTIONS and report["matched_share"] == 1 and report["warnings"] == []
    assert 0 < report["mask_iou_min"] <= 1 and report["mask_iou_mean"] > 0.999
    assert all(value < 1e-3 for value in report["largest_difference"].values())
    assert report["megabytes"] > 1 and report["ap"] is None


def test_it_gives_what_the_checkpoint_gives(run, exported):
    model = load_model(run)
    images = np.stack(comparison_images(model, SIZE)[:3])
    wanted = make_predict(model.network, num_detections=DETECTIONS)(model.variables, images)
    found = open_export(read_export(exported[0]), device="cpu", num_detections=DETECTIONS)(images)
    assert len(np.unique(np.asarray(wanted.scores).round(4))) > DETECTIONS  # images differ, and so do detections
    np.testing.assert_array_equal(found.labels, wanted.labels)
    for name in ("scores", "boxes_xyxy", "mask_logits"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-3)
    few = open_export(read_export(exported[0]), device="cpu", num_detections=4)(images)
    np.testing.assert_array_equal(few.scores, found.scores[:, :4])


ALONE = """
    import sys, json
    sys.modules["instseg_jax"] = None  # whoever imports it fails
    import numpy as np, jax, jax.export
    folder = sys.argv[1]
    exported = jax.export.deserialize(bytearray(open(folder + "/model.stablehlo", "rb").read()))
    assert set(exported.platforms) == {"cpu", "cuda"}, exported.platforms
    images = np.load(sys.argv[2])
    np.savez(sys.argv[3], *exported.call(images))
    sys.path.insert(0, folder)
    import postprocess
    export = postprocess.load(folder)
    picture = (images[0] * 255).astype(np.uint8)
    print(json.dumps(postprocess.segment(export, picture, 0.05)))
    assert not any(name.split(".")[0] in ("flax", "instseg_jax") for name, module in sys.modules.items() if module)
"""


@pytest.mark.slow
def test_stablehlo_runs_with_jax_alone(run, exported, tmp_path):
    model = load_model(run)
    images = np.stack(comparison_images(model, SIZE)[:2])
    np.save(tmp_path / "images.npy", images)
    arguments = [str(exported[0]), str(tmp_path / "images.npy"), str(tmp_path / "found.npz")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", textwrap.dedent(ALONE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    wanted = open_export(read_export(exported[0]), device="cpu", num_detections=DETECTIONS)(images)
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_allclose(found["arr_0"], wanted.scores, atol=1e-5)
        np.testing.assert_allclose(found["arr_3"], wanted.mask_logits, atol=1e-3)
    assert len(json.loads(done.stdout)["boxes"]) == DETECTIONS


@pytest.mark.slow
def test_half_is_smaller_and_near(run, exported, tmp_path):
    model = load_model(run)
    images = comparison_images(model, SIZE)
    request = Request("stablehlo", 1, SIZE, precision="half")
    half = export_model(model, tmp_path / "half", request, source="", images=images)
    assert half["precision"] == "bfloat16" and half["megabytes"] < 0.6 * exported[1]["megabytes"]
    assert 1e-5 < half["largest_difference"]["scores"] < 0.2 and half["matched_share"] > 0.8


# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_verb_tells_ap_before_and_after(run, tmp_path, capsys):
    arguments = ["--format=stablehlo", "--dynamic_batch", "--data=embedded_copy"]
    data = tmp_path / "embedded_copy"
    source = coco.data_root(coco.EMBEDDED)
    content = json.loads((source / "annotations" / "instance_val.json").read_text(encoding="utf-8"))
    kept = {image["id"] for image in content["images"][:4]}
    content["images"] = content["images"][:4]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    (data / "annotations").mkdir(parents=True)
    (data / "annotations" / "instance_val.json").write_text(json.dumps(content), encoding="utf-8")
    (data / "images").symlink_to(source / "images")
    arguments[2] = f"--data={data}"
    assert main(["export", f"--weights={run}", f"--workdir={tmp_path}", *arguments]) == 0
    report = json.loads((tmp_path / "export" / "stablehlo" / "parity.json").read_text(encoding="utf-8"))
    before, after = report["ap"]["checkpoint"], report["ap"]["export"]
    assert set(before) == {"segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50"}
    assert before["segm/AP"] == pytest.approx(after["segm/AP"], abs=1e-3) and report["ap"]["loss"] is not None
    assert "segm/AP: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format=tensorrt"], "--format is 'tensorrt', it must be one of stablehlo, onnx"),
        (["--format=stablehlo", "--size=100"], "--size is 100, it must be a multiple of 32"),
        (["--format=stablehlo", "--batch=0"], "--batch is 0"),
        (["--format=stablehlo", "--int8"], "--int8 is not there for stablehlo, which has --half"),
        (["--format=stablehlo", "--half", "--int8"], "exclude each other"),
        (["--format=litert", "--dynamic_batch"], "one batch size"),
    ],
)
def test_a_request_that_cannot_be_met_is_told_at_once(options, message, tmp_path, capsys):
    assert main(["export", "--weights=no/such/run", f"--workdir={tmp_path}", *options]) == 1
    assert message in capsys.readouterr().err


def test_an_export_cannot_be_exported(exported, tmp_path, capsys):
    for verb in (["export", "--format=stablehlo"], ["export_weights"]):
        assert main([*verb, f"--weights={exported[0]}", f"--workdir={tmp_path}"]) == 1
        assert "is an exported model; name the checkpoint" in capsys.readouterr().err


@pytest.fixture
def write_a_copy(exported, monkeypatch):
    """Writes the export that is there, in place of tracing the network once more."""

    def write(path, *arguments, **options):
        shutil.copy(exported[0] / path.name, path)
        return {"inputs": [], "outputs": []}

    copying = dataclasses.replace(export_room.FORMATS["stablehlo"], write=write)
    monkeypatch.setitem(export_room.FORMATS, "stablehlo", copying)


@pytest.mark.slow
def test_a_failure_leaves_what_was_there(run, exported, write_a_copy, tmp_path, monkeypatch):
    folder = tmp_path / "export"
    shutil.copytree(exported[0], folder)
    model = load_model(run)
    images = comparison_images(model, SIZE)[:1]

    def fail(*arguments, **options):
        raise ValueError("the comparison fails")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the comparison fails"):
        patch.setattr(export_room, "compare_runs", fail)
        export_model(model, folder, Request("stablehlo", 1, SIZE), source="", images=images)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert read_export(folder).settings["dynamic_batch"] is True
    export_model(model, folder, Request("stablehlo", 1, SIZE), source="", images=images)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert read_export(folder).settings["dynamic_batch"] is False


def test_a_folder_of_something_else_is_not_replaced(run, tmp_path):
    model = load_model(run)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.jpg").write_bytes(b"sand")
    with pytest.raises(ValueError, match="holds something else than an export"):
        export_model(model, tmp_path / "holiday", Request("stablehlo", 1, SIZE), source="", images=[])
    assert (tmp_path / "holiday" / "beach.jpg").read_bytes() == b"sand"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export_model(model, tmp_path / "file", Request("stablehlo", 1, SIZE), source="", images=[])
    with pytest.raises(OSError, match=r"can't write an export to .*inside"):
        export_model(model, tmp_path / "file" / "inside", Request("stablehlo", 1, SIZE), source="", images=[])


def test_training_ends_with_an_export_where_the_config_says(run, write_a_copy, tmp_path):
    shutil.copytree(run / checkpoint.BEST_MODEL, tmp_path / checkpoint.BEST_MODEL)
    folder = tmp_path / "best_model" / "inference"
    export_best(load_config("configs/quickstart.py"), tmp_path)
    assert not folder.exists()
    export_best(load_config("configs/quickstart.py", {"checkpoint.export": "stablehlo"}), tmp_path)
    assert find_export(folder) == folder
    assert find_export(tmp_path) is None and find_export(tmp_path / "best_model") is None  # still the checkpoint
    assert load_model(tmp_path).exported is None and load_model(folder).exported is not None
    check_best_export(load_config("configs/quickstart.py", {"checkpoint.export": "stablehlo"}))
    with pytest.raises(ValueError, match=r"checkpoint\.export is 'onx'"):
        check_best_export(load_config("configs/quickstart.py", {"checkpoint.export": "onx"}))
    assert main(["train", "--config=configs/quickstart.py", "--config.checkpoint.export=onx"]) == 1


# --- parity ---------------------------------------------------------------------------------------------------------


def detections(scores, labels, boxes, logits) -> Detections:
    return Detections(
        scores=np.array([scores], np.float32),
        labels=np.array([labels]),
        boxes_xyxy=np.array([boxes], np.float32),
        mask_logits=np.array([logits], np.float32),
    )


LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
LEFT_MASK, RIGHT_MASK = [[3.0, -3.0]], [[-3.0, 3.0]]


def test_parity_by_hand():
    one = detections([0.9, 0.8], [0, 1], [LEFT, RIGHT], [LEFT_MASK, RIGHT_MASK])
    # In the other order, a score off by 0.05, a box by 0.1, half of one mask missing, and one that is of no pair.
    other = detections(
        [0.85, 0.84, 0.1], [1, 0, 2], [[0.5, 0.0, 1.0, 0.9], LEFT, LEFT], [[[-3.0, 2.0]], [[3.0, 1.0]], LEFT_MASK]
    )
    report = compare_runs(lambda images: one, lambda images: other, [np.zeros((4, 8, 3), np.float32)])
    assert report["compared"] == 2 and report["matched_share"] == 1
    assert report["largest_difference"]["scores"] == pytest.approx(0.06)
    assert report["largest_difference"]["boxes_xyxy"] == pytest.approx(0.1)
    assert report["largest_difference"]["mask_logits"] == pytest.approx(4)
    assert report["mask_iou_mean"] == pytest.approx(0.75) and report["mask_iou_min"] == pytest.approx(0.5)
    assert len(find_warnings(report, "float32")) == 1 and "mean mask IoU is 0.7500" in find_warnings(report, "int8")[0]


def test_what_is_lost_is_told():
    one = detections([0.9, 0.8], [0, 1], [LEFT, RIGHT], [LEFT_MASK, RIGHT_MASK])
    other = detections([0.9, 0.8], [0, 0], [LEFT, RIGHT], [LEFT_MASK, RIGHT_MASK])
    report = compare_runs(lambda images: one, lambda images: other, [np.zeros((4, 8, 3), np.float32)])
    assert report["matched_share"] == 0.5 and "found again is 0.5000" in find_warnings(report, "float32")[0]
    report |= {"matched_share": 1.0, "ap": {"loss": 0.03}}
    assert find_warnings(report, "int8") == ["the export loses 0.0300 mask AP, more than 0.005 for int8"]
    assert find_warnings(report | {"ap": {"loss": -0.03}}, "float32") == []


def test_each_detection_is_in_one_pair():
    boxes = np.array([LEFT, LEFT, RIGHT], np.float32)
    one = Found(np.array([0.9, 0.7, 0.5]), np.zeros(3, int), boxes, np.zeros((3, 1, 2)))
    other = Found(np.array([0.71, 0.5, 0.9]), np.zeros(3, int), boxes[[0, 2, 1]], np.zeros((3, 1, 2)))
    assert sorted(pair_detections(one, other, 3)) == [(0, 2), (1, 0), (2, 1)]
    assert pair_detections(one, other, 0) == []
