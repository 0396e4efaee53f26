"""No result overwrites another or the user's own, and one odd input never ends the run."""

import io
import json
import os

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from fake_model import make_pipeline, picture
from PIL import Image
from pycocotools.coco import COCO

from instseg_jax.inference.pipeline import thresholds_by_class
from instseg_jax.inference.sources import find_sources
from instseg_jax.results.result import Result
from instseg_jax.results.saving import save_results

SCENE = picture((0, 8, 16, 40, 40), size=(60, 90))
ALL = ("img", "json", "coco", "labelme", "yolo", "geojson")


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def write_video(path, count=3):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 64))
    for i in range(count):
        writer.write(picture((0, 8 * i, 16, 8 * i + 16, 40))[..., ::-1])
    writer.release()


def test_inputs_of_one_stem_have_files_of_their_own(pipe, tmp_path):
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
    for path in ("v1/clip.avi", "v2/clip.avi"):
        write_video(tmp_path / path)
    Image.fromarray(SCENE).save(tmp_path / "v1/clip.jpg")
    inputs = [tmp_path / "v1/clip.avi", tmp_path / "v1/clip.jpg", tmp_path / "v2/clip.avi", tmp_path / "v2/clip.avi"]
    summary = save_results(pipe.predict(inputs), tmp_path / "out", formats=("img", "json"))
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(found) == summary.files == 8 and summary.images == 10
    assert "clip_res.mp4" in found and "clip_3_res.mp4" in found and "clip_2_res.jpg" in found
    frames = [
        json.loads((tmp_path / "out" / f"{stem}_res.json").read_text())["frames"]
        for stem in ("clip", "clip_3", "clip_4")
    ]
    assert [len(each) for each in frames] == [3, 3, 3]


def test_formats_of_two_inputs_do_not_meet(pipe, tmp_path):
    for name in ("a.png", "a_res.png", "coco.png", "A.png"):
        Image.fromarray(SCENE).save(tmp_path / name)
    summary = save_results(pipe.predict(tmp_path), tmp_path / "out", formats=ALL)
    found = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(found) == summary.files == 5 * 4 + 1 and len({name.casefold() for name in found}) == len(found)
    inner = json.loads((tmp_path / "out" / "A_res.json").read_text())
    assert {"input_path", "page_index", "size", "boxes", "masks"} == set(inner)  # what PaddleX's scripts read
    assert len(json.loads((tmp_path / "out" / "coco.json").read_text())["images"]) == 4


@pytest.mark.parametrize(
    ("name", "kind", "text"), [("a.json", "labelme", '{"shapes": []}'), ("a.txt", "yolo", "0 0.5 0.5 1 1\n")]
)
def test_labels_made_by_hand_stay(pipe, tmp_path, name, kind, text):
    Image.fromarray(SCENE).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    summary = save_results(pipe.predict(tmp_path / "a.png"), tmp_path, formats=(kind,))
    assert (tmp_path / name).read_text() == text and summary.renamed == 1
    assert (tmp_path / name.replace("a.", "a_2.")).is_file() and summary.files == 1
    save_results(pipe.predict(tmp_path / "a.png"), tmp_path, formats=(kind,), overwrite=True)
    assert (tmp_path / name).read_text() != text


def test_labels_of_a_run_that_was_killed_are_not_taken_for_a_persons(pipe, tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(SCENE).save(tmp_path / name)
    save_results(pipe.predict(tmp_path / "a.png"), tmp_path, formats=("yolo", "labelme"))
    summary = save_results(pipe.predict(tmp_path), tmp_path, formats=("yolo", "labelme"))
    assert summary.renamed == 0
    labels = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png")
    assert labels == ["a.json", "a.txt", "b.json", "b.txt"] and (tmp_path / "a.txt").read_text()


def test_an_earlier_run_may_be_replaced(pipe, tmp_path):
    Image.fromarray(SCENE).save(tmp_path / "a.png")
    for _ in range(2):
        summary = save_results(pipe.predict(tmp_path / "a.png"), tmp_path, formats=("labelme", "json"))
        assert summary.files == 2 and summary.renamed == 0
    corrected = json.loads((tmp_path / "a.json").read_text())
    corrected["shapes"][0]["label"] = "blue"  # in LabelMe, by hand
    (tmp_path / "a.json").write_text(json.dumps(corrected))
    summary = save_results(pipe.predict(tmp_path / "a.png"), tmp_path, formats=("labelme",))
    assert json.loads((tmp_path / "a.json").read_text()) == corrected and summary.renamed == 1
    (tmp_path / "a_2.json").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png", "a_res.json"]


def test_save_all_in_a_loop_keeps_every_array(pipe, tmp_path):
    results = [pipe(SCENE)[0] for _ in range(3)]
    files = [file for result in results for file in result.save_all(tmp_path)]
    assert len(set(files)) == 6 and all(file.is_file() for file in files)
    assert results[1].save_all(tmp_path) == files[2:4]  # its own may be written again


def test_a_name_that_can_not_be_written_fails_alone(pipe, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(SCENE).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / ("x" * 248 + ".png"))
    Image.fromarray(SCENE).save(tmp_path / "in" / "b.png")
    odd = os.fsencode(str(tmp_path / "in")) + b"/caf\xe9.png"
    with open(odd, "wb") as file:  # noqa: PTH123 (a name that is no UTF-8)
        file.write((tmp_path / "in" / "b.png").read_bytes())
    summary = save_results(pipe.predict(tmp_path / "in"), tmp_path / "out", formats=("json", "coco"))
    assert [name.endswith("x.png") for name, _ in summary.failed] == [True] and "json: " in summary.failed[0][1]
    assert (tmp_path / "out" / "b_res.json").is_file() and summary.images == 3
    content = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert len(content["images"]) == 3 and content["info"]
    assert len(COCO(tmp_path / "out" / "coco.json").imgs) == 3


PNG = cv2.imencode(".png", SCENE[..., ::-1])[1].tobytes()


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: jnp.asarray(SCENE), 1),
        (lambda: [jnp.asarray(SCENE)] * 2, 2),
        (lambda: jnp.stack([SCENE] * 3), 3),
        (lambda: np.stack([SCENE] * 3), 3),
        (lambda: PNG, 1),
        (lambda: bytearray(PNG), 1),
        (lambda: memoryview(PNG), 1),
        (lambda: memoryview(SCENE), 1),
        (lambda: io.BytesIO(PNG), 1),
        (lambda: [io.BytesIO(PNG), PNG, SCENE], 3),
    ],
)
def test_whatever_holds_a_picture_is_one(make, count):
    sources, number = find_sources(make(), channels="rgb")
    found = list(sources)
    assert len(found) == count == number
    for source in found:
        np.testing.assert_array_equal(source.read(), SCENE)


def test_paths_of_the_home_folder_and_file_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").write_bytes(PNG)
    for name in ("~/a b.png", f"file://{tmp_path}/a%20b.png"):
        (source,) = find_sources(name, channels="rgb")[0]
        np.testing.assert_array_equal(source.read(), SCENE)
    with (tmp_path / "a b.png").open("rb") as file:
        assert len(list(find_sources(file, channels="rgb")[0])) == 1
    with (tmp_path / "a b.png").open(encoding="latin-1") as file, pytest.raises(ValueError, match="mode 'rb'"):
        find_sources(file, channels="rgb")


def test_thresholds_may_be_numbers_of_numpy_and_go_by_index():
    default = np.array([0.5, 0.5])
    np.testing.assert_allclose(thresholds_by_class(np.float32(0.25), ("a", "b"), default), 0.25)
    np.testing.assert_allclose(thresholds_by_class({1: 0.25}, ("a", "b"), default), [0.5, 0.25])
    np.testing.assert_allclose(thresholds_by_class({"a": np.int64(1)}, ("a", "b"), default), [1, 0.5])
    for wrong in ({2: 0.5}, {True: 0.5}, {"c": 0.5}):
        with pytest.raises(ValueError, match="the classes are a, b"):
            thresholds_by_class(wrong, ("a", "b"), default)


def test_a_result_shows_itself(pipe):
    (result,) = pipe(SCENE)
    assert repr(result) == "Result('array_0', 90x60 px, 1 instances: 1 red)"
    assert Image.open(io.BytesIO(result._repr_png_())).size == (90, 60)
    masks = result.masks_array()
    assert masks.dtype == bool and masks.shape == (1, 60, 90) and masks[0, 20, 20] and not masks[0, 0, 0]
    empty = Result("x", (5, 4), [], [])
    assert empty.masks_array().shape == (0, 5, 4) and empty._repr_png_() is None and len(repr(empty)) < 60
    assert repr(Result.failed("x.jpg", "broken")) == "Result('x.jpg', failed: broken)"


def test_a_table_of_instances(pipe):
    pandas = pytest.importorskip("pandas")
    (result,) = pipe(SCENE)
    table = result.to_pandas()
    assert isinstance(table, pandas.DataFrame) and list(table["label"]) == ["red"]
    assert table["area_px"][0] == result.masks_array().sum()
