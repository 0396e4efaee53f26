"""Messages quote at most 80 characters of what others wrote, whatever the format and the field."""

import json
import re
import time
import tracemalloc

import numpy as np
import pytest
from broken_data import run_check, write_dataset
from converted_data import convert, write_picture
from labelme_files import shape, square, write_labelme

from instseg_jax import files
from instseg_jax.config import load_config
from instseg_jax.data import coco, repair
from instseg_jax.evaluation.read import read_results
from instseg_jax.inference.pipeline_config import load_pipeline_config, parse_hpi_config
from instseg_jax.messages import first_few, quote, shorten
from instseg_jax.weights.paddle import read_pdparams
from instseg_jax.weights.state_dicts import read_safetensors, read_safetensors_metadata

MANY = 200_000
NESTED: list = []
for _ in range(400):
    NESTED = [NESTED]
HUGE = {
    "text": "x" * MANY,
    "list": ["x"] * MANY,
    "object": {"x" * MANY: 1},
    "digits": int("9" * 4000),
    "nested": NESTED,
    "negative": -1,
    "null": None,
}


def check_message(error: BaseException | str) -> None:
    """Own words and paths have their room; of the input there are 80 characters at most, one time or two."""
    text = str(error)
    assert len(text) < 1000, f"{len(text)} characters: {text[:300]}"
    runs = re.findall(r"x{81,}|9{81,}|\[{81,}", text)
    assert not runs, text[:300]


def test_short_values_are_written_as_python_does():
    for value in ("a'b", b"\0", 5, -1.5, None, True, [1, "a"], (1,), (1, 2), {"a": [1]}, set(), [], {}, [[]], {1}):
        assert quote(value) == (repr(value) if value != set() else "{}")


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_long_ones_are_cut(value):
    assert len(quote(value)) <= 80 and len(shorten(value)) <= 80 if not isinstance(value, int) else len(quote(value))
    assert len(first_few([str(i) * MANY for i in range(9)])) < 6 * 82


def test_values_that_contain_themselves_many_times_are_cut_at_once():
    bomb = ["lol"] * 9
    for _ in range(40):
        bomb = [bomb] * 9
    started = time.monotonic()
    assert len(quote(bomb)) == 80 and len(quote({"a": bomb})) == 80
    assert time.monotonic() - started < 0.1


@pytest.mark.parametrize("huge", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("place", ["images", "annotations", "categories"])
def test_coco_files(tmp_path, place, huge):
    fields = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name")}
    fields["annotations"] = ("id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd")
    for number, field in enumerate(fields[place]):

        def plant(contents, folder, field=field):
            contents["train"][place][0][field] = huge

        root = write_dataset(tmp_path / str(number), plant)
        result = run_check(root)
        for flaw in result.flaws:
            check_message(flaw.detail)
        for change in repair.repair_dataset(result)[1]:
            check_message(change)
        try:
            coco.check_images(coco.read_split(root, "train"))
        except (ValueError, OSError) as error:
            check_message(error)


@pytest.mark.parametrize("huge", HUGE.values(), ids=HUGE)
def test_labelme_files(tmp_path, huge):
    places = ["imagePath", "imageHeight", "imageData", "shapes", "label", "points", "shape_type", "group_id", "flags"]
    for place in places:
        folder = tmp_path / place
        one = shape("a", square(5, 5, 10))
        is_of_shape = not place.startswith("image") and place != "shapes"
        file = write_labelme(folder, "a", [one | ({place: huge} if is_of_shape else {})])
        if not is_of_shape:
            file.write_text(json.dumps(json.loads(file.read_text()) | {place: huge}))
        write_labelme(folder, "b", [shape("b", square(5, 5, 10))])
        try:
            for note in convert(folder, "LabelMe", tmp_path / "out" / place, skip_invalid=True).notes:
                check_message(note)
        except (ValueError, OSError) as error:
            check_message(error)


X = "x" * MANY


@pytest.mark.parametrize("text", [X, f"0 {X}", f"{'9' * 4000} 0 0 1 0 1 1", "9" * 5000, f"7 {'0.5 ' * 40_001}"])
def test_yolo_files(tmp_path, text):
    write_picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text(text)
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    with pytest.raises(ValueError, match="Line 1 of") as caught:
        convert(tmp_path, "YOLO", tmp_path / "out")
    check_message(caught.value)


YAML = [
    f"names: {{{X[:9000]}: a}}", f"names: [a]\ntrain: {X[:9000]}", f"{X[:9000]}: [", f"!{X[:9000]} a", f"*{X[:9000]}",
    "names: " + "[" * 60_000, "names: " + "- " * 3000, f"names: {'9' * 5000}", "names: 2001-99-99", "x: " + X,
    "a: &a {b: c}\nd: {<<: [*a, *a]}", "a: &a [b]\nc: *a", "\0", "[a", "names: {1: a, x: b}", f"path: [{X[:9000]}]",
]  # fmt: skip


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml_files(tmp_path, text):
    write_picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("9 0.1 0.1 0.5 0.1 0.5 0.5\n")
    started = time.monotonic()
    for name in ("data.yaml", "pipeline.yaml"):
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, OSError)) as caught:
        load_pipeline_config(tmp_path / "pipeline.yaml")
    check_message(caught.value)
    try:
        convert(tmp_path, "YOLO", tmp_path / "out")
    except (ValueError, OSError) as error:
        check_message(error)
    assert time.monotonic() - started < 20


BOMB = "&a0 [lol,lol,lol,lol,lol,lol,lol,lol,lol]"
for level in range(1, 10):
    BOMB = f"&a{level} [{BOMB}{f',*a{level - 1}' * 8}]"


@pytest.mark.parametrize("key", ["SubModules", "pipeline_name", "device", "use_hpip", "hpi_config", "Serving", "lol"])
def test_a_small_yaml_file_does_not_grow(tmp_path, key):
    file = tmp_path / "a.yaml"
    file.write_text(f"pipeline_name: instance_segmentation\n{key}: {BOMB}\n")
    tracemalloc.start()
    with pytest.raises(ValueError, match="aliases") as caught:
        load_pipeline_config(file)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    check_message(caught.value)


@pytest.mark.parametrize("huge", HUGE.values(), ids=HUGE)
def test_pipelines_that_are_given_as_objects(huge):
    whole = {"pipeline_name": "instance_segmentation", "SubModules": {"InstanceSegmentation": {}}, "hpi_config": {}}
    for key in (*whole, "Serving", "model_name", "model_dir", "batch_size", "threshold"):
        content = json.loads(json.dumps(whole))
        where = content if key in (*whole, "Serving") else content["SubModules"]["InstanceSegmentation"]
        where[key] = huge
        try:
            config = load_pipeline_config(content)
            parse_hpi_config(config.hpi_config)
        except (ValueError, TypeError) as error:
            check_message(error)


@pytest.mark.parametrize("huge", HUGE.values(), ids=HUGE)
def test_result_files(tmp_path, huge):
    for key in ("image_id", "category_id", "score", "bbox", "segmentation"):
        entry = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 1, 1]} | {key: huge}
        (tmp_path / "a.json").write_text(json.dumps([entry]))
        try:
            read_results(tmp_path / "a.json")
        except ValueError as error:
            check_message(error)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "\0" * MANY, '{"a": ' + X, X.encode("utf-16")])
def test_json_files(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (files.read_json, read_results, lambda path: coco.read_coco(path, tmp_path)):
        with pytest.raises(ValueError, match=r"a\.json") as caught:
            read(tmp_path / "a.json")
        check_message(caught.value)


def test_weights_files(tmp_path):
    import pickle

    from safetensors.numpy import save_file

    for content in ({X: 1}, {"a": X}, [X], X, {"UnpackBigParamInfor@@": {X: {"slices": [X]}}, "a": np.zeros(1)}):
        (tmp_path / "a.pdparams").write_bytes(pickle.dumps(content, 2).replace(b"numpy._core", b"numpy.core"))
        with pytest.raises(ValueError, match=r"a\.pdparams") as caught:
            read_pdparams(tmp_path / "a.pdparams")
        check_message(caught.value)
    for data in (f"c{X}\n{X}\n.", f"I{X}\n.", f"L{'9' * 5000}L\n.", f"P{X}\n.", f"(S'{X}'\ni{X}\n{X}\n."):
        (tmp_path / "a.pdparams").write_bytes(data.encode())
        with pytest.raises(ValueError, match=r"a\.pdparams") as caught:
            read_pdparams(tmp_path / "a.pdparams")
        check_message(caught.value)
    header = json.dumps({X: {"dtype": X, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    for read in (read_safetensors, read_safetensors_metadata):
        with pytest.raises(ValueError, match="safetensors") as caught:
            read(tmp_path / "a.safetensors")
        check_message(caught.value)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "b.safetensors", {"instseg_jax": X})
    with pytest.raises(ValueError, match="safetensors") as caught:
        read_safetensors_metadata(tmp_path / "b.safetensors")
    check_message(caught.value)


@pytest.mark.parametrize("field", ["data.image_size", "seed", X[:9000], f"data.{X[:9000]}"])
def test_fields_of_the_command_line(field):
    with pytest.raises(ValueError, match="config") as caught:
        load_config("configs/quickstart.py", {field: X})
    check_message(caught.value)
