"""What passes the check trains, whole: the loader's objects are those that the check says will be trained."""

import json
from pathlib import Path

import pytest
from broken_data import run_check
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rectangle_data import rectangle, write_set

from instseg_jax.config import load_config
from instseg_jax.data import coco, coco_entries, loader
from instseg_jax.data.source import build_dataset
from instseg_jax.training.setup import count_reasons


def loaded(root: Path, **fields: str) -> int:
    """Objects that a loader gives for the validation pictures, without augmentation."""
    fields = {
        "data.dir": str(root),
        "data.image_size": "64",
        "data.train_sizes": "(64,)",
        "data.num_workers": "0",
    } | fields
    config = load_config("configs/quickstart.py", fields)
    batches = loader.build_eval_loader(config, build_dataset(config.data, "val"), use_targets=True).batches()
    return sum(int(batch.targets.valid.sum()) for batch in batches)


def checked(root: Path):
    config = load_config("configs/quickstart.py", {"data.image_size": "64", "data.train_sizes": "(64,)"})
    layout = loader.build_layout(config, config.data.max_instances)
    return run_check(root, train_sizes=loader.train_sizes(config), layout=layout)


flags = st.sampled_from([None, 0, 1, True, False, "0", "1", "false", "True", 0.0])
sides = st.one_of(st.integers(0, 40), st.sampled_from([0.4, 0.5, 1.0, 1.3]))


@st.composite
def entries(draw):
    x, y, w, h = draw(st.integers(0, 45)), draw(st.integers(0, 15)), draw(sides), draw(sides)
    entry = {"segmentation": rectangle(x, y, w, h)}
    for name in ("iscrowd", "ignore"):
        value = draw(flags)
        if value is not None:
            entry[name] = value
    box = draw(st.sampled_from(["none", "right", "zero", "text"]))
    if box != "none":
        numbers = [x, y, w, h] if box != "zero" else [x, y, 0, 0]
        entry["bbox"] = [str(v) for v in numbers] if box == "text" else numbers
    area = draw(st.sampled_from([None, "right", "12.5", 0, -3]))
    if area is not None:
        entry["area"] = w * h if area == "right" else area
    return entry


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects=st.lists(entries(), max_size=6))
def test_the_loader_gives_what_the_check_says(tmp_path_factory, objects):
    root = write_set(tmp_path_factory.mktemp("set"), objects)
    result = checked(root)
    assume(result.passed)  # else it can't be read, or has nothing to train on
    expected = result.measured["val"]["objects_trained"]
    assert loaded(root) == expected
    # Whatever is not trained stands under a finding.
    named = {i for flaw in result.flaws if flaw.split == "val" and flaw.is_of_annotation for i in flaw.ids}
    assert len(objects) + 1 - expected <= len(named)


@pytest.mark.parametrize("value", ["0", "false", "False", 0, 0.0, False, None])
def test_what_is_not_ignored_trains(tmp_path, value):
    root = write_set(tmp_path / "set", [{"segmentation": rectangle(5, 5, 20, 20), "ignore": value, "iscrowd": value}])
    result = checked(root)
    assert result.passed and result.measured["train"]["objects_trained"] == 2 == loaded(root)
    assert not {flaw.code for flaw in result.flaws} & {"not_trained", "crowd"}


@pytest.mark.parametrize("value", ["yes", 2, [1], "maybe", float("1e999")])
def test_a_flag_that_is_neither_is_an_error(tmp_path, value):
    root = write_set(tmp_path / "set", [{"segmentation": rectangle(5, 5, 20, 20), "ignore": value}])
    result = checked(root)
    assert not result.passed and "its ignore must be 0 or 1" in next(f.detail for f in result.flaws if f.is_error)
    with pytest.raises(ValueError, match="its ignore must be 0 or 1"):
        coco.read_split(root, "train")


def test_ignored_objects_are_a_finding(tmp_path):
    root = write_set(tmp_path / "set", [{"segmentation": rectangle(5, 5, 20, 20), "ignore": 1}])
    result = checked(root)
    assert result.passed and result.measured["val"]["objects_trained"] == 1 == loaded(root)
    assert [flaw.ids for flaw in result.flaws if flaw.code == "not_trained"] == [(1,), (1,)]
    dataset = coco.select_trainable(coco.read_split(root, "train"), keep_empty=False)
    assert count_reasons(dataset.skipped) == {"marked to be ignored": 1}


@pytest.mark.parametrize("box", [None, [5, 5, 0, 0], [0, 0, 0, 20], ["5", "5", "20", "20"], [5, 5, -1, 20]])
def test_a_box_that_is_missing_or_empty_is_that_of_the_mask(tmp_path, box):
    entry = {"segmentation": rectangle(5, 5, 20, 20)} | ({} if box is None else {"bbox": box})
    root = write_set(tmp_path / "set", [entry])
    assert checked(root).passed and loaded(root) == 2
    assert coco.read_split(root, "train").annotations[0][0].box_xywh_px == (5, 5, 20, 20)


def test_a_mask_that_vanishes_is_said_and_left_out_where_the_recipe_says_so(tmp_path):
    line = {"segmentation": rectangle(9, 5, 30, 0.9)}  # one row of pixels, which every second row of 64 px misses
    root = write_set(tmp_path / "set", [line, {"segmentation": rectangle(50, 5, 20, 20)}])
    result = checked(root)
    assert result.passed and [flaw.ids for flaw in result.flaws if flaw.code == "vanishing_mask"] == [(1,), (1,)]
    assert result.measured["train"]["objects_trained"] == 2 == loaded(root)
    # As the reference has it, it is taught without a pixel.
    assert loaded(root, **{"data.drop_empty_masks": "False"}) == 3
    assert load_config("configs/mask_rtdetr.py:s", {}).data.drop_empty_masks is None
    assert all(load_config(f"configs/{name}.py", {}).data.drop_empty_masks for name in ("finetune", "aerial"))


def test_ids_that_pandas_wrote_are_whole(tmp_path):
    root = write_set(tmp_path / "set", [{"segmentation": rectangle(5, 5, 20, 20)}])
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        for entry in content["annotations"]:
            entry |= {name: float(entry[name]) for name in ("id", "image_id", "category_id")}
        file.write_text(json.dumps(content))
    assert checked(root).passed and loaded(root) == 2


@pytest.mark.parametrize(
    ("name", "read"),
    [("crane\n", "crane"), (" a\tb ", "a b"), ("x\x00y", "x y"), ("Gebäude 建物", "Gebäude 建物"), (7, "7")],
)
def test_a_class_name_is_one_line(name, read):
    assert coco_entries.read_name(name, "Category 1") == read


@pytest.mark.parametrize("name", ["", " \n", "\ud800", "x" * 501])
def test_a_class_name_that_is_none_is_a_sentence(tmp_path, name):
    with pytest.raises(ValueError, match=r"^Category 1 has "):
        coco_entries.read_name(name, "Category 1")
    root = write_set(tmp_path / "set", [], classes=(name, "b"))
    assert not checked(root).passed


def test_numbers_beyond_a_float_are_findings(tmp_path):
    huge = 10**400
    objects = [{"segmentation": rectangle(5, 5, 20, huge)}, {"segmentation": rectangle(5, 5, 20, 20), "area": huge}]
    root = write_set(tmp_path / "set", objects)
    result = checked(root)
    assert {flaw.ids for flaw in result.flaws if flaw.is_error} == {(1,), (2,)}


def test_errors_of_json_say_where(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(ValueError, match="line 2, column 18"):
        coco_entries.read_json(tmp_path / "a.json")
