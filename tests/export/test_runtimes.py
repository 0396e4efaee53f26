"""Exports where a checkpoint is expected: the same instances, thresholds, classes and ids, from every runtime."""

import functools
import json
import logging
import shutil
import subprocess
import sys
import threading
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_case import CATEGORY_IDS, CLASS_NAMES, DETECTIONS, SIZE, make_run, same_instances
from PIL import Image

import instseg_jax
from instseg_jax import files
from instseg_jax.cli import main
from instseg_jax.data import coco
from instseg_jax.export import accelerate as accelerate_room
from instseg_jax.export import standalone
from instseg_jax.export.export import Request, export_model
from instseg_jax.export.parity import BOUNDS
from instseg_jax.images import INTERPOLATIONS, resize_pixels
from instseg_jax.inference.pipeline_config import HighPerformance, parse_hpi_config
from instseg_jax.inference.postprocess import upsample_masks
from instseg_jax.inference.predictor import load_model
from instseg_jax.masks import encode_mask
from instseg_jax.models import deformable_attention
from instseg_jax.runtimes import exported, formats, litert
from instseg_jax.runtimes.exported import find_export, open_export, read_export, run_in_batches
from instseg_jax.runtimes.formats import RUNTIMES
from instseg_jax.runtimes.onnx import halve_weights
from instseg_jax.scoring.pictures import calibration_images, comparison_images
from instseg_jax.verbs.export import print_report
from instseg_jax.weights import PRETRAINED, checkpoint

FORMATS = ("stablehlo", "onnx", "ort", "openvino", "litert")


def needs(format: str) -> None:
    """Skip a test whose runtime is not installed."""
    try:
        formats.require(format)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pictures():
    dataset = coco.read_split(coco.EMBEDDED, "val")
    return [dataset.image_path(i) for i in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run"), {"data.resize": "letterbox"})
    thresholds = {"overall": 0.3, "classes": {"building": 0.7, "tree": 0.6, "car": 0.8}}
    checkpoint.save_thresholds(folder, thresholds)
    return folder


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """Exports of the run by format, each made once when it is asked for."""
    folder, model = tmp_path_factory.mktemp("exports"), load_model(run)
    made = {}

    def get(format: str):
        needs(format)
        if format not in made:
            images = comparison_images(model, SIZE)[:1]
            request = Request(format, 1, SIZE)
            report = export_model(model, folder / format, request, source="a run", images=images)
            assert report["warnings"] == [], report
            made[format] = folder / format
        return made[format]

    return get


@pytest.fixture(scope="module")
def wanted(run, pictures):
    """What the checkpoint finds, with the thresholds that are stored with it."""
    results = instseg_jax.create_pipeline(weights=run, device="cpu")(pictures)
    assert all(len(result) for result in results) and min(map(len, results)) < DETECTIONS
    assert len({box["label"] for result in results for box in result.boxes}) > 1
    return results


@pytest.fixture(autouse=True)
def no_second_start(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


@pytest.mark.parametrize("format", [pytest.param("stablehlo", marks=pytest.mark.slow), *FORMATS[1:]])
def test_the_pipeline_finds_the_same(format, exports, wanted, pictures):
    pipeline = instseg_jax.create_pipeline(weights=exports(format), device="cpu", batch_size=2)
    assert (pipeline.class_names, pipeline.category_ids) == (CLASS_NAMES, CATEGORY_IDS)
    np.testing.assert_array_equal(pipeline.thresholds, [0.7, 0.6, 0.8])
    for found, one in zip(pipeline(pictures), wanted, strict=True):
        assert same_instances(found, one), (found.boxes, one.boxes)
        assert found.to_coco()[0]["category_id"] == one.to_coco()[0]["category_id"]
    assert [box["label"] for box in pipeline(pictures[0], threshold={"building": 0.0})[0].boxes].count("building") > 0


@pytest.mark.parametrize("format", [pytest.param("stablehlo", marks=pytest.mark.slow), *FORMATS[1:]])
def test_the_file_that_ships_finds_the_same(format, exports, wanted, pictures, tmp_path):
    folder = exports(format)
    command = [sys.executable, str(folder / "postprocess.py"), *map(str, pictures[:2]), "--threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    for one, found in zip(wanted, json.loads(done.stdout), strict=False):
        result, expected = found["res"], one.json["res"]
        assert set(result) == set(expected) and result["size"] == expected["size"]
        for box, other in zip(result["boxes"], expected["boxes"], strict=True):
            assert box["label"] == other["label"] and box["score"] == pytest.approx(other["score"], abs=1e-3)
        assert [mask["size"] for mask in result["masks"]] == [mask["size"] for mask in expected["masks"]]
        share = [a["counts"] == b["counts"] for a, b in zip(result["masks"], expected["masks"], strict=True)]
        assert np.mean(share) >= 0.5  # a pixel whose logit is nearly 0 may fall to the other side


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_onnx_file_runs_in_two_runtimes(backend, exports, wanted, pictures):
    needs("openvino" if backend == "openvino" else "onnx")
    hpi_config = {"backend": backend, "backend_config": {"cpu_num_threads": 1}}
    model = exports("onnx") / "model.onnx"
    pipeline = instseg_jax.create_pipeline(weights=model, device="cpu", use_hpip=True, hpi_config=hpi_config)
    assert same_instances(pipeline(pictures[0])[0], wanted[0])
    with pytest.raises(ValueError, match="backend is 'openvino', but an export as stablehlo runs in"):
        instseg_jax.create_pipeline(weights=exports("stablehlo"), hpi_config={"backend": "openvino"})


@pytest.mark.slow
def test_an_onnx_file_for_any_batch(run, wanted, pictures, tmp_path):
    needs("onnx")
    model = load_model(run)
    request = Request("onnx", 1, SIZE, dynamic_batch=True)
    export_model(model, tmp_path / "any", request, source="", images=comparison_images(model, SIZE)[:1])
    settings = read_export(tmp_path / "any").settings
    assert settings["inputs"][0]["shape"] == ["batch", SIZE, SIZE, 3] and settings["opset"] == {"ai.onnx": 21}
    assert settings["outputs"][3]["shape"] == ["batch", DETECTIONS, SIZE // 4, SIZE // 4]
    pipeline = instseg_jax.create_pipeline(weights=tmp_path / "any", device="cpu", batch_size=3)
    assert all(same_instances(found, one) for found, one in zip(pipeline(pictures), wanted, strict=True))


def test_several_threads_may_ask_at_once(exports):
    export = read_export(exports("stablehlo"))
    run = open_export(export, device="cpu", num_detections=DETECTIONS)
    images = np.random.default_rng(0).random((4, SIZE, SIZE, 3), np.float32)
    wanted, found = [run(image[None]).scores for image in images], [None] * 4

    def ask(i):
        found[i] = run(images[i][None]).scores

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.array(found), np.array(wanted))


def test_prediction_takes_an_export(exports, wanted, pictures, tmp_path):
    options = [f"--weights={exports('stablehlo')}", f"--workdir={tmp_path}", f"--input={pictures[0]}"]
    assert main(["predict", *options, "--formats=json"]) == 0
    (file,) = (tmp_path / "predictions").glob("*_res.json")
    boxes = json.loads(file.read_text(encoding="utf-8"))["boxes"]
    assert [box["label"] for box in boxes] == [box["label"] for box in wanted[0].boxes]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_evaluation_takes_an_export(format, exports, run, tmp_path):
    scores = []
    for name, weights in (("export", exports(format)), ("checkpoint", run)):
        options = [f"--weights={weights}", f"--workdir={tmp_path / name}", "--config.eval.gallery_size=0"]
        assert main(["evaluate", *options]) == 0
        said = json.loads((tmp_path / name / "evaluate_result.json").read_text(encoding="utf-8"))
        scores.append(said["metrics"]["AP"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and scores[0] is not None


def test_thresholds_are_stored_in_an_export(exports, tmp_path):
    shutil.copytree(exports("stablehlo"), tmp_path / "e")
    exported.save_export_thresholds(read_export(tmp_path / "e"), {"overall": 0.6, "classes": {"tree": 0.1}})
    pipeline = instseg_jax.create_pipeline(weights=tmp_path / "e", device="cpu")
    np.testing.assert_array_equal(pipeline.thresholds, [0.6, 0.1, 0.6])
    assert standalone.load(tmp_path / "e").config["thresholds"] == [0.6, 0.1, 0.6]


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_other_batches_are_split_and_filled_up():
    seen = []

    def run(images):
        seen.append(images.shape)
        return images[:, 0, 0, 0], images[:, :1, 0, 0]

    images = np.arange(5 * 4, dtype=np.float32).reshape(5, 2, 2, 1)
    for batch, shapes in ((2, [2, 2, 2]), (5, [5]), (8, [8]), (None, [5])):
        seen.clear()
        first, second = run_in_batches(run, images, batch)
        assert [shape[0] for shape in seen] == shapes
        np.testing.assert_array_equal(first, images[:, 0, 0, 0])
        np.testing.assert_array_equal(second, images[:, :1, 0, 0])


def test_errors_name_the_thing(exports, tmp_path):
    folder = exports("stablehlo")
    export = read_export(folder)
    with pytest.raises(ValueError, match=r"eval\.num_detections is 50, but .* exported with 10"):
        open_export(export, device="cpu", num_detections=50)
    with pytest.raises(ValueError, match=r"takes images of shape \[B, 64, 64, 3\], got \[1, 32, 64, 3\]"):
        open_export(export, device="cpu", num_detections=5)(np.zeros((1, 32, 64, 3), np.float32))
    with pytest.raises(ValueError, match="runs on one device"):
        open_export(export, device="cpu:0,1", num_detections=5)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json beside it"):
        find_export(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text('{"format": "onnx"}')
    with pytest.raises(ValueError, match="is no whole export"):
        read_export(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        read_export(tmp_path)


def test_evaluation_at_another_size_is_refused(exports, tmp_path, capsys):
    options = [f"--weights={exports('stablehlo')}", f"--workdir={tmp_path}"]
    assert main(["evaluate", *options, "--config.data.image_size=96"]) == 1
    assert "data.image_size is 96, but" in capsys.readouterr().err
    assert main(["evaluate", *options, "--tta=scales"]) == 1
    assert "--tta=scales needs other sizes" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "litert"])
def test_a_missing_runtime_names_its_extra(backend, monkeypatch, tmp_path):
    format = {"onnxruntime": "onnx"}.get(backend, backend)
    settings = {"format": format, "num_detections": 5, "dynamic_batch": False, "batch": 1, "compute_type": "f32"}
    settings["preprocessing"] = {"size": [64, 64], "channels": 3}
    export = exported.Export(tmp_path, settings)
    monkeypatch.setitem(sys.modules, {"litert": "ai_edge_litert.interpreter"}.get(backend, backend), None)
    extra = RUNTIMES[backend].extra
    with pytest.raises(ImportError, match=rf'not installed: pip install "instseg_jax\[{extra}\]"'):
        open_export(export, device="cpu", num_detections=5)


@pytest.mark.parametrize("format", ["onnx", "openvino", "litert"])
def test_a_missing_writer_names_its_extra(format, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"{format} needs .*pip install \"instseg_jax\["):
        formats.require(format)


# --- the quickest runtime -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_quickest_runtime_is_taken_and_remembered(run, exports, wanted, pictures, monkeypatch, caplog):
    made, exported = [], exports("onnx")

    def export_model(model, folder, request, **_):  # what there is, in place of exporting it once more
        made.append(request)
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        return {"warnings": []}

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(accelerate_room, "export_model", export_model)
    monkeypatch.setattr(accelerate_room, "TRIED", ("onnxruntime",))
    for seconds, quickest in ((0.1, "onnxruntime"), (0.3, "xla")):
        times = iter((0.2, seconds))
        monkeypatch.setattr(accelerate_room, "_time", functools.partial(lambda times, *_: next(times), times))
        for _ in range(2):  # the second time nothing is exported and nothing timed
            caplog.clear()
            pipeline = instseg_jax.create_pipeline(weights=run, device="cpu", use_hpip=True)
            assert f"use_hpip: {quickest} is used" in caplog.text
            assert same_instances(pipeline(pictures[0])[0], wanted[0])
        next((run / "best_model").glob("hpip-*/choice.json")).unlink()
    assert len(made) == 1 and (made[0].format, made[0].batch, made[0].size) == ("onnx", 1, SIZE)
    assert load_model(run).exported is None  # the run is still a checkpoint


def test_an_export_that_finds_something_else_is_not_taken_by_the_next_start_either(tmp_path, monkeypatch, caplog):
    made = []

    def export_model(model, folder, request, **_):
        made.append(folder)
        report = {"warnings": ["the mean mask IoU is 0.2"]}
        (folder / "parity.json").write_text(json.dumps(report))
        return report

    monkeypatch.setattr(accelerate_room, "export_model", export_model)
    monkeypatch.setattr(accelerate_room, "read_export", lambda folder: "an export")
    monkeypatch.setattr(accelerate_room, "_read_cached", lambda folder, model: "an export" if made else None)
    monkeypatch.setattr(accelerate_room, "_cache_folder", lambda model, batch_size: tmp_path)
    monkeypatch.setattr(accelerate_room.importlib.util, "find_spec", lambda name: name)
    data = types.SimpleNamespace(image_size=SIZE, channels=3)
    model = types.SimpleNamespace(config=types.SimpleNamespace(data=data), source="run")
    for _ in range(2):
        caplog.clear()
        taken = accelerate_room.accelerate(model, HighPerformance("onnxruntime"), device="cpu", batch_size=1)
        assert taken is model and "the compiled network is used, since the mean mask IoU is 0.2" in caplog.text
    assert made == [tmp_path]


def test_a_named_runtime_is_taken(run, wanted, pictures, monkeypatch):
    needs("onnx")
    hpi_config = {"backend": "onnxruntime", "backend_config": {"onnxruntime": {"cpu_num_threads": 1}}}
    pipeline = instseg_jax.create_pipeline(weights=run, device="cpu", use_hpip=True, hpi_config=hpi_config)
    assert same_instances(pipeline(pictures[0])[0], wanted[0])
    monkeypatch.setattr(accelerate_room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"use_hpip needs onnxruntime and onnx: pip install"):
        instseg_jax.create_pipeline(weights=run, device="cpu", use_hpip=True)


def test_hpi_config_says_what_it_understands():
    assert parse_hpi_config(None) == HighPerformance()
    both = {
        "backend": "openvino",
        "backend_config": {"onnxruntime": {"cpu_num_threads": 2}, "openvino": {"cpu_num_threads": 4}},
    }
    assert parse_hpi_config(both) == HighPerformance("openvino", 4)
    assert parse_hpi_config({"auto_config": True, "backend_config": {"cpu_num_threads": 3}}).num_threads == 3
    for wrong, message in (
        ({"auto_paddle2onnx": True}, r"hpi_config\.auto_paddle2onnx means nothing here"),
        ({"backend": "tensorrt"}, r"hpi_config\.backend is 'tensorrt', it must be one of onnxruntime"),
        (
            {"backend": "onnxruntime", "backend_config": {"precision": "fp16"}},
            r"\.precision means nothing",
        ),
        ({"backend_config": {"cpu_num_threads": 0}}, "cpu_num_threads is 0"),
        ({"auto_config": False}, "auto_config is off"),
        ({"backend": "xla", "backend_config": {"cpu_num_threads": 2}}, "can't be set for xla"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_hpi_config(wrong)


# --- 8 bits, and pictures that are not 8-bit colour -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_int8_is_calibrated_and_smaller(format, exports, tmp_path, capsys):
    """On the trained weights of the package, and held to the bound that an export warns of itself."""
    needs(format)
    model = load_model(PRETRAINED, overrides={"data.dir": "embedded"})
    size = model.config.data.image_size
    images = comparison_images(model, size)  # a share of few detections would be chance
    request = Request(format, 1, size, precision="int8")
    with pytest.raises(ValueError, match="--calibration"):
        export_model(model, tmp_path / "int8", request, source="", images=images)
    calibration = calibration_images(model, size, None)[:24]
    report = export_model(model, tmp_path / "int8", request, source="", images=images, calibration=calibration)
    full = json.loads((exports(format) / "parity.json").read_text(encoding="utf-8"))
    assert report["megabytes"] < 0.75 * full["megabytes"] and report["precision"] == "int8"
    assert 1e-4 < report["largest_difference"]["scores"] < 0.5
    assert report["matched_share"] > BOUNDS["int8"]["matched_share"]
    assert report["mask_iou_mean"] > BOUNDS["int8"]["mask_iou_mean"]
    said, kept = report["quantization"], read_export(tmp_path / "int8").settings["quantization"]
    assert said["in_8_bits"] + said["in_float32"] == said["layers"] == kept["layers"] > 100
    assert said["work_in_8_bits"] >= 0.5 and kept["agreement"]["matched_share"] > 0.95
    assert "backbone/stem/conv" in [name for group in kept["in_float32"] for name in group["layers"]]
    print_report(report, tmp_path / "int8")
    assert f"{said['in_8_bits']} of {said['layers']} layers in 8 bits" in capsys.readouterr().out


def test_half_in_onnx_stores_less(exports, tmp_path):
    import onnx

    file = exports("onnx") / "model.onnx"
    shutil.copytree(file.parent, tmp_path / "half")
    onnx.save(halve_weights(onnx.load(file)), tmp_path / "half" / "model.onnx")
    settings = json.loads((tmp_path / "half" / "config.json").read_text())
    files.write_json(tmp_path / "half" / "config.json", files.seal(settings | {"files": {}}))
    assert (tmp_path / "half" / "model.onnx").stat().st_size < 0.6 * file.stat().st_size
    images = np.random.default_rng(0).random((1, SIZE, SIZE, 3), np.float32)
    full, half = (
        open_export(read_export(folder), device="cpu", num_detections=DETECTIONS)(images)
        for folder in (file.parent, tmp_path / "half")
    )
    np.testing.assert_array_equal(half.labels, full.labels)
    assert 0 < np.abs(half.scores - full.scores).max() < 0.01


def test_no_pictures_to_calibrate_on(run, tmp_path):
    model = load_model(run)
    with model.config.unlocked():
        model.config.data.dir = str(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no pictures to calibrate on .*--calibration"):
        calibration_images(model, SIZE, None)
    Image.fromarray(np.full((40, 50, 3), 200, np.uint8)).save(tmp_path / "a.png")
    (image,) = calibration_images(model, SIZE, str(tmp_path))
    assert image.shape == (SIZE, SIZE, 3) and image[0, 0, 0] == pytest.approx(200 / 255) and image[-1, 0, 0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "stablehlo"])
def test_channels_and_16_bits_travel_with_the_export(format, tmp_path):
    needs(format)
    ranges = ((0.0, 1000.0), (100.0, 3000.0))
    overrides = {"data.channels": "2", "data.scaling": "percentile", "data.channel_ranges": str(ranges), "data.dir": ""}
    run = make_run(tmp_path / "run", overrides)
    model = load_model(run)
    array = np.random.default_rng(0).integers(0, 3000, (70, 90, 2)).astype(np.uint16)
    np.save(tmp_path / "bands.npy", array)
    (one,) = instseg_jax.create_pipeline(weights=run, device="cpu", threshold=0.1)(str(tmp_path / "bands.npy"))
    folder = tmp_path / format
    images = comparison_images(model, SIZE)[:1]
    export_model(model, folder, Request(format, 1, SIZE), source="", images=images)
    assert read_export(folder).settings["preprocessing"]["channel_ranges"] == [list(pair) for pair in ranges]
    pipeline = instseg_jax.create_pipeline(weights=folder, device="cpu", threshold=0.1)
    assert same_instances(pipeline(str(tmp_path / "bands.npy"))[0], one)
    export = standalone.load(folder)
    picture = standalone.read_image(tmp_path / "bands.npy", export.config)
    found = standalone.segment(export, picture, 0.1)
    assert [box["label"] for box in found["boxes"]] == [box["label"] for box in one.boxes]
    with pytest.raises(ValueError, match="the model takes 2 channels"):
        standalone.scale_channels(np.zeros((4, 4, 3), np.uint16), export.config)


# --- what LiteRT gets in place of operations that it lacks ------------------------------------------------------------


def test_top_k_for_litert_is_that_of_jax():
    x = np.random.default_rng(0).integers(0, 9, (2, 3, 40)).astype(np.float32)  # with many equal values
    for wanted, found in zip(jax.lax.top_k(x, 7), jax.jit(litert.top_k, static_argnums=1)(x, 7), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_sampling_for_litert_is_that_of_the_network():
    rng = np.random.default_rng(0)
    shapes = ((6, 5), (3, 4), (2, 2))
    value = jnp.asarray(rng.normal(size=(2, 30 + 12 + 4, 3, 8)), jnp.float32)
    locations = jnp.asarray(rng.uniform(-0.3, 1.3, (2, 7, 3, 3, 4, 2)), jnp.float32)
    weights = jnp.asarray(rng.random((2, 7, 3, 3, 4)), jnp.float32)
    wanted, found = (
        jax.jit(function, static_argnums=1)(value, shapes, locations, weights)
        for function in (deformable_attention.sample_levels, litert.sample_levels)
    )
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    before = jax.lax.top_k, deformable_attention.sample_levels
    with litert.replaced_operations():
        assert jax.lax.top_k is litert.top_k and deformable_attention.sample_levels is litert.sample_levels
    assert (jax.lax.top_k, deformable_attention.sample_levels) == before


def test_the_network_can_be_traced_with_what_litert_gets():
    """Also where TensorFlow is not installed: the replacements take what the network calls them with."""
    model, variables = instseg_jax.create_model("mask_rtdetr_n", num_classes=3)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    wanted = jax.eval_shape(model.apply, variables, images)
    with (
        litert.replaced_operations(),
        mock.patch.object(deformable_attention, "sample_levels", wraps=litert.sample_levels) as sampling,
    ):
        found = jax.eval_shape(lambda v, x: model.apply(v, x), variables, images)
    assert sampling.call_count == 3  # decoder layers
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)


# --- the file that ships --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resizing_in_numpy_is_that_of_opencv_to_a_grey_level(interpolation):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (37, 53, 3)).astype(np.uint8)
    for content in ((64, 64), (20, 30), (64, 30), (20, 90), (37, 53)):
        wanted = resize_pixels(noise, content, content, interpolation) * 255
        found = standalone.resize_numpy(noise, content, interpolation).astype(np.float32)
        assert np.abs(found - wanted).max() <= 1.01, content


def test_masks_are_enlarged_and_encoded_as_in_the_package():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (3, 16, 16)).astype(np.float32)
    for content, original in (((64, 64), (100, 77)), ((48, 64), (30, 40)), ((64, 33), (200, 101))):
        sizes = {"input_size": (64, 64), "content_size": content, "original_size": original}
        for mask, wanted in zip(logits, upsample_masks(logits, **sizes), strict=True):
            found = standalone.enlarge_mask(mask, (64, 64), content, original)
            assert 0 < wanted.sum() < wanted.size
            np.testing.assert_array_equal(found, wanted)
            assert standalone.mask_to_rle(found) == encode_mask(wanted)
    for mask in (np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool)):
        assert standalone.mask_to_rle(mask) == encode_mask(mask)
