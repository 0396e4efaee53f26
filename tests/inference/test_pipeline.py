"""The pipeline: every kind of input, results in order, nothing compiled twice, thresholds, failures at their place."""

import dataclasses
import http.server
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import threading

import cv2
import numpy as np
import pytest
import yaml
from fake_model import CATEGORY_IDS, CLASS_NAMES, make_model, picture
from PIL import Image
from places import HELPERS, ROOT

import instseg_jax
from instseg_jax.inference import pipeline as pipeline_module
from instseg_jax.inference import sources, streaming
from instseg_jax.inference.pipeline import build_pipeline, create_pipeline, pick_threshold, thresholds_by_class
from instseg_jax.inference.pipeline_config import load_pipeline_config, write_pipeline_config
from instseg_jax.masks import decode_rle
from instseg_jax.weights.locate import Located

ONE = picture((0, 10, 20, 30, 50), (2, 40, 8, 60, 28))
TWO = picture((1, 5, 5, 25, 15))


def build(*, batch_size: int = 1, thresholds: dict | None = None, default: float = 0.5, **options):
    model = make_model(thresholds=thresholds, **options)
    settings = load_pipeline_config({"SubModules": {"InstanceSegmentation": {"threshold": default}}})
    return build_pipeline(model, device="cpu", threshold=pick_threshold(None, model, settings), batch_size=batch_size)


@pytest.fixture(scope="module")
def pipe():
    return build()


@pytest.fixture
def folder(tmp_path):
    """Three pictures and a file that is none, in the order of their names."""
    for name, image in (("a.png", ONE), ("b.bmp", TWO), ("d.png", ONE)):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "c.jpg").write_bytes(b"no picture")
    return tmp_path


def found(result) -> list[tuple[str, list[int]]]:
    return [(box["label"], [round(v) for v in box["coordinate"]]) for box in result.boxes]


IN_ONE = [("red", [10, 20, 30, 50]), ("blue", [40, 8, 60, 28])]
IN_TWO = [("green", [5, 5, 25, 15])]


def test_an_array(pipe):
    (result,) = pipe.predict(ONE)
    assert found(result) == IN_ONE
    np.testing.assert_array_equal(decode_rle(result.masks[0]), (ONE == [255, 0, 0]).all(axis=2))
    np.testing.assert_array_equal(result.image, ONE)
    assert [entry["category_id"] for entry in result.to_coco()] == [CATEGORY_IDS[0], CATEGORY_IDS[2]]


@pytest.mark.parametrize(
    ("change", "channels"),
    [
        (lambda image: image[..., ::-1], "bgr"),
        (lambda image: np.dstack([image, image[..., :1]]), "rgb"),
        (lambda image: image.astype(np.uint16) * 257, "rgb"),
        (lambda image: image.astype(np.float32) / 255, "rgb"),
        (Image.fromarray, "rgb"),
        (lambda image: Image.fromarray(image).quantize(8), "rgb"),
    ],
    ids=["bgr", "alpha", "16 bits", "floats", "PIL", "palette"],
)
def test_pixels_in_other_forms(pipe, change, channels):
    (result,) = pipe.predict(change(ONE), channels=channels)
    assert found(result) == IN_ONE


def test_a_grey_picture_is_a_picture(pipe):
    (result,) = pipe.predict(np.full((20, 30), 200, np.uint8))
    assert len(result) == 0 and result.size == (20, 30)


def test_files_folders_and_patterns(pipe, folder):
    assert found(next(pipe.predict(folder / "a.png"))) == IN_ONE
    assert found(next(pipe.predict(str(folder / "b.bmp")))) == IN_TWO
    for x in (folder, str(folder), f"{folder}/*", [folder / name for name in ("a.png", "b.bmp", "c.jpg", "d.png")]):
        results = list(pipe.predict(x))
        assert [result.name for result in results] == ["a.png", "b.bmp", "c.jpg", "d.png"]
        assert [found(result) for result in results] == [IN_ONE, IN_TWO, [], IN_ONE]
        assert [result.error is None for result in results] == [True, True, False, True]
        assert "c.jpg" in results[2].error
    assert [result.name for result in pipe.predict(f"{folder}/*.png")] == ["a.png", "d.png"]


def test_a_list_of_everything(pipe, folder):
    results = list(pipe.predict([ONE, str(folder / "b.bmp"), Image.fromarray(ONE), str(folder / "gone.png"), TWO]))
    assert [found(result) for result in results] == [IN_ONE, IN_TWO, IN_ONE, [], IN_TWO]
    assert "gone.png" in results[3].error
    assert len({result.stem for result in results}) == 5


def test_a_generator_of_pictures(pipe):
    assert [found(result) for result in pipe.predict(image for image in (ONE, TWO))] == [IN_ONE, IN_TWO]


def test_a_turned_photograph(pipe, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    turned = Image.fromarray(np.rot90(picture((0, 10, 20, 30, 50), size=(64, 48)), 1).copy())
    turned.save(tmp_path / "turned.png", exif=exif)
    for x in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        (result,) = pipe.predict(x)
        assert result.size == (64, 48) and found(result) == [("red", [10, 20, 30, 50])]


def test_a_url(pipe, folder):
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        (result,) = pipe.predict(f"{address}/a.png?size=3")
        assert found(result) == IN_ONE and result.stem == "a"
        with pytest.raises(ValueError, match=r"gone\.png can't be fetched"):
            list(pipe.predict(f"{address}/gone.png"))
        with pytest.raises(ValueError, match=r"c\.jpg' can't be read as an image"):
            list(pipe.predict(f"{address}/c.jpg"))
    finally:
        server.shutdown()
        server.server_close()


def write_video(path, frames, rate=10.0):
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, (width, height))
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()


def test_a_video(pipe, tmp_path):
    write_video(tmp_path / "clip.avi", [picture((0, 8 * i, 16, 8 * i + 16, 40)) for i in range(5)])
    results = list(pipe.predict(tmp_path / "clip.avi", batch_size=2))
    assert [result.page_index for result in results] == list(range(5))
    for i, result in enumerate(results):
        ((label, box),) = found(result)
        assert label == "red" and np.abs(np.subtract(box, [8 * i, 16, 8 * i + 16, 40])).max() <= 1
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (failed,) = list(pipe.predict([tmp_path / "broken.mp4"]))
    assert "broken.mp4" in failed.error


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ("/no/such/picture.png", FileNotFoundError, "/no/such/picture.png"),
        ("/no/such/*.png", FileNotFoundError, "matches"),
        (5, ValueError, "got int"),
        (object(), ValueError, "got object"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"\[4, 4, 2\]"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "int64"),
        (np.full((4, 4, 3), 200.0), ValueError, "0..1"),
    ],
)
def test_what_is_no_input_raises_at_once(pipe, x, error, message):
    with pytest.raises(error, match=message):
        pipe.predict(x)


def test_one_broken_file_alone_raises(pipe, folder):
    with pytest.raises(ValueError, match=r"c\.jpg"):
        list(pipe.predict(folder / "c.jpg"))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_batches_change_nothing(batch_size):
    pipe = build(batch_size=batch_size)
    images = [picture((i % 3, i, 2 * i, i + 12, 2 * i + 9), size=(50 + i, 64)) for i in range(7)]
    results = list(pipe.predict(images))
    assert [found(result) for result in results] == [
        [(CLASS_NAMES[i % 3], [i, 2 * i, i + 12, 2 * i + 9])] for i in range(7)
    ]


def test_nothing_is_compiled_twice(folder):
    model = make_model()
    pipe = build_pipeline(model, device="cpu", threshold=np.full(3, 0.5), batch_size=4)
    pipe.warm_up()
    assert model.model.traced == [(4, 64, 64, 3)]
    for x in (ONE, folder, [ONE] * 5, picture(size=(300, 200))):
        list(pipe.predict(x))
    assert model.model.traced == [(4, 64, 64, 3)]
    list(pipe.predict(ONE, batch_size=2))
    list(pipe.predict([ONE] * 3, batch_size=2))
    assert model.model.traced == [(4, 64, 64, 3), (2, 64, 64, 3)]


def test_decoding_and_encoding_go_on_while_the_device_works(pipe, monkeypatch):
    decoded, encoded, waited = threading.Semaphore(0), threading.Event(), []
    decode, keep = streaming._decode, streaming.keep_instances

    def decode_and_say(*arguments):
        try:
            return decode(*arguments)
        finally:
            decoded.release()

    def keep_and_say(*arguments, **sizes):
        encoded.set()
        return keep(*arguments, **sizes)

    def run(images):
        if not waited:  # the first picture, and while the device has it, the second
            waited.append(all(decoded.acquire(timeout=20) for _ in range(2)))
        elif len(waited) == 1:  # the masks of the first, while the device has the second
            waited.append(encoded.wait(20))
        return pipe.run(images)

    monkeypatch.setattr(streaming, "_decode", decode_and_say)
    monkeypatch.setattr(streaming, "keep_instances", keep_and_say)
    results = list(dataclasses.replace(pipe, run=run).predict([ONE, TWO, ONE]))
    assert waited == [True, True]
    assert [found(result) for result in results] == [IN_ONE, IN_TWO, IN_ONE]


def test_work_ahead_is_bounded(pipe):
    taken = []

    def images():
        for i in range(1000):
            taken.append(i)
            yield ONE

    results = pipe.predict(images())
    next(results)
    results.close()
    assert len(taken) < 20


# --- thresholds ----------------------------------------------------------------------------------------------------


def test_the_threshold_of_the_call_comes_first():
    stored = {"overall": 0.93, "classes": {"blue": 0.97}}
    pipe = build(thresholds=stored, default=0.1)
    # Scores are 0.95 for red and 0.9 for blue: the stored thresholds keep red alone.
    assert [label for label, _ in found(next(pipe.predict(ONE)))] == ["red"]
    assert [label for label, _ in found(next(pipe.predict(ONE, 0.5)))] == ["red", "blue"]
    assert [label for label, _ in found(next(pipe.predict(ONE, threshold=0.99)))] == []
    assert [label for label, _ in found(next(pipe.predict(ONE, threshold={"blue": 0.6, "red": 0.96})))] == ["blue"]
    assert [label for label, _ in found(next(build(default=0.92).predict(ONE)))] == ["red"]


def test_a_threshold_must_make_sense(pipe):
    for wrong, message in ((1.5, "between 0 and 1"), ("high", "between 0 and 1"), ({"pink": 0.5}, "'pink'")):
        with pytest.raises(ValueError, match=message):
            pipe.predict(ONE, threshold=wrong)
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipe.predict(ONE, batch_size=0)
    np.testing.assert_array_equal(thresholds_by_class({"b": 0.2}, "abb", np.full(3, 0.7)), [0.7, 0.2, 0.2])


# --- the pipeline's file -------------------------------------------------------------------------------------------


def test_the_written_file_has_the_official_schema(tmp_path):
    path = write_pipeline_config(tmp_path, pipeline="instance_segmentation", model_dir="runs/mine")
    content = yaml.safe_load(path.read_text())
    assert path.name == "instance_segmentation.yaml"
    assert content["pipeline_name"] == "instance_segmentation"
    module = content["SubModules"]["InstanceSegmentation"]
    assert set(module) == {"module_name", "model_name", "model_dir", "batch_size", "threshold"}
    assert module["model_dir"] == "runs/mine" and module["threshold"] == 0.5
    settings = load_pipeline_config(path)
    assert (settings.model_dir, settings.batch_size, settings.visualize) == ("runs/mine", 1, True)
    assert load_pipeline_config("instance_segmentation").model_dir is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"SubModule": {}}, "'SubModule'; did you mean SubModules"),
        ({"SubModules": {"InstanceSegmentation": {"treshold": 1}}}, "did you mean threshold"),
        ({"pipeline_name": "OCR"}, "'OCR'"),
        ({"SubModules": {"InstanceSegmentation": {"batch_size": 0}}}, "batch_size is 0"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, content, message):
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        load_pipeline_config(path)


def test_a_missing_or_odd_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        load_pipeline_config(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="'segmentation'"):
        load_pipeline_config("segmentation")
    (tmp_path / "odd.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="no YAML"):
        load_pipeline_config(tmp_path / "odd.yaml")


@pytest.fixture
def everything_is_there(monkeypatch):
    """Any weights are found: what has a suffix, or a known name, as a file, the rest as a checkpoint."""

    def locate(source):
        is_file = pathlib.Path(source).suffix or "coco" in str(source)
        return Located("file" if is_file else "checkpoint", pathlib.Path(source), str(source))

    monkeypatch.setattr(pipeline_module, "locate", locate)


def test_create_pipeline_without_weights_takes_those_of_the_package_and_says_so(tmp_path, monkeypatch, caplog):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        pipeline_module.predictor,
        "load_model",
        lambda source, *rest: asked.append(str(source)) or make_model(thresholds=None),
    )
    instseg_jax.create_pipeline("instance_segmentation", device="cpu")
    assert asked == ["mask_rtdetr_n_pretrained"]
    assert "quickstart" in caplog.text and "weights=" in caplog.text


def test_create_pipeline_takes_weights_and_settings_in_their_order(tmp_path, monkeypatch, everything_is_there):
    loaded = []

    def load_model(source, config=None, overrides=None):
        loaded.append(str(source))
        return make_model(thresholds=None)

    monkeypatch.setattr(pipeline_module.predictor, "load_model", load_model)
    path = write_pipeline_config(tmp_path, pipeline="instance_segmentation", model_dir="from/yaml")
    pipe = instseg_jax.create_pipeline(path, device="cpu")
    assert [label for label, _ in found(next(pipe.predict(ONE)))] == ["red", "blue"]
    pipe = create_pipeline(path, weights="from/call", threshold=0.92, batch_size=3, device="cpu")
    assert [label for label, _ in found(next(pipe.predict(ONE)))] == ["red"] and pipe.batch_size == 3
    config = {"SubModules": {"InstanceSegmentation": {"model_dir": "from/config", "model_name": "Mask-RT-DETR-L"}}}
    with pytest.raises(ValueError, match=r"model_name is Mask-RT-DETR-L, but the weights from/config are of"):
        create_pipeline(config=config)
    assert loaded == ["from/yaml", "from/call", "from/config"]


@pytest.mark.parametrize(
    ("weights", "model_name", "size"),
    [
        ("mask_rtdetr_l_coco", None, "l"),
        ("models/Mask-RT-DETR-S.pdparams", None, "s"),
        ("mine.pdparams", "Mask-RT-DETR-X", "x"),
        ("mine.pdparams", None, None),
        ("mask_rtdetr_small.pdparams", None, None),
    ],
)
def test_official_files_are_known_by_their_name(monkeypatch, everything_is_there, weights, model_name, size):
    given = []

    def load_model(source, config=None, overrides=None):
        given.append(None if config is None else config.model.name)
        raise FileNotFoundError("read no further")

    monkeypatch.setattr(pipeline_module.predictor, "load_model", load_model)
    config = {"SubModules": {"InstanceSegmentation": {"model_dir": weights, "model_name": model_name}}}
    with pytest.raises(FileNotFoundError, match="read no further"):
        create_pipeline(config=config)
    assert given == [size and f"mask_rtdetr_{size}"]


def test_high_performance_is_not_promised_in_vain(monkeypatch, caplog, everything_is_there):
    monkeypatch.setattr(pipeline_module.predictor, "load_model", lambda *_: make_model())
    create_pipeline(weights="x", device="cpu", use_hpip=True)
    assert "use_hpip" in caplog.text


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device is 'tpu:5'"):
        build_pipeline(make_model(), device="tpu:5", threshold=np.full(3, 0.5), batch_size=1)


TWO_DEVICES = """
    import numpy as np
    from fake_model import make_model, picture
    from instseg_jax.inference.pipeline import build_pipeline

    images = [picture((i % 3, i, 2 * i, i + 12, 2 * i + 9)) for i in range(7)]
    found = []
    for device, batch_size in (("cpu", 1), ("cpu:0,1", 4)):
        pipe = build_pipeline(make_model(), device=device, threshold=np.full(3, 0.5), batch_size=batch_size)
        found.append([result.json for result in pipe.predict(images)])
    assert found[0] == found[1] and len(found[0]) == 7 and found[0][3]["res"]["boxes"]
    try:
        build_pipeline(make_model(), device="cpu:0,1", threshold=np.full(3, 0.5), batch_size=3)
    except ValueError as error:
        print(error)
"""


def test_several_devices_share_a_batch():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": f"{HELPERS}:{ROOT}",
    }
    command = [sys.executable, "-c", textwrap.dedent(TWO_DEVICES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "must be a multiple of the number of devices, 2" in done.stdout


def test_the_json_of_a_result(pipe, tmp_path):
    (result,) = pipe.predict(ONE)
    files = result.save_all(tmp_path)
    assert sorted(path.name for path in files) == ["array_0_res.json", "array_0_res.png"]
    assert json.loads((tmp_path / "array_0_res.json").read_text()) == result.json["res"]


def test_sources_are_counted_where_that_is_cheap(folder):
    def count(x):
        return sources.find_sources(x, channels="rgb")[1]

    assert count(ONE) == count(folder / "a.png") == 1 and count(folder) == 4
    assert count([ONE, str(folder / "a.png")]) == 2 and count([folder]) is None


def test_the_device_of_the_yaml_counts_where_the_call_names_none(tmp_path, monkeypatch, everything_is_there):
    named = []
    monkeypatch.setattr(pipeline_module.predictor, "load_model", lambda *arguments: make_model(thresholds=None))
    monkeypatch.setattr(pipeline_module, "build_pipeline", lambda model, **settings: named.append(settings["device"]))
    content = {"pipeline_name": "instance_segmentation", "device": "cpu:0"}
    instseg_jax.create_pipeline(config=content, weights=tmp_path)
    instseg_jax.create_pipeline(config=content, weights=tmp_path, device="auto")
    assert named == ["cpu:0", "auto"]


def test_a_yaml_of_paddlex_means_the_official_weights(tmp_path, monkeypatch, caplog):
    """Its model_dir is null; a training in the default folder of another model is told, with their name."""
    module = {"module_name": "instance_segmentation", "model_name": "Mask-RT-DETR-S", "model_dir": None}
    settings = load_pipeline_config({"SubModules": {"InstanceSegmentation": module}})
    loaded = []

    def load(located, *_):
        loaded.append(located)
        return make_model()

    monkeypatch.setattr(pipeline_module, "locate", lambda source: Located("file", tmp_path / str(source), str(source)))
    monkeypatch.setattr(pipeline_module.predictor, "load_model", load)
    with pytest.raises(ValueError, match=r"official ones are model_dir: mask_rtdetr_s_coco"):  # the fake is another
        pipeline_module.load_pipeline_model(settings, None, None, default=tmp_path / "none")
    assert loaded[0].source == "mask_rtdetr_s_coco" and "official weights mask_rtdetr_s_coco" in caplog.text
    nameless = load_pipeline_config({})
    pipeline_module.load_pipeline_model(nameless, None, None, default=tmp_path / "none")
    assert loaded[1].source == "mask_rtdetr_n_pretrained"
