"""What passes the check trains, what is broken is found, and --fix mends it."""

import collections
import copy
import dataclasses
import json
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from broken_data import (
    DEFECTS,
    HEIGHT,
    WIDTH,
    change_annotation,
    change_image,
    cut_json,
    rectangle,
    renumber_category,
    run_check,
    write_dataset,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from instseg_jax import masks
from instseg_jax.config import load_config
from instseg_jax.data import check, coco, findings, loader, repair
from instseg_jax.data.polygons import crosses_itself, is_degenerate

ERRORS = {
    "missing_image", "undecodable_image", "duplicate_image_id", "duplicate_annotation_id", "unknown_category",
    "unknown_image", "size_mismatch", "degenerate_polygon", "outside_image", "broken_rle", "categories_differ",
    "broken_json",
}  # fmt: skip
WARNINGS = {"leak", "box_mask_mismatch", "crowd", "empty_image", "class_imbalance", "not_trained", "vanishing_mask"}
WARNINGS |= {"duplicate_object", "shifted_labels"}


def codes_of(result) -> set[str]:
    return {flaw.code for flaw in result.flaws}


def load_everything(source: check.Source) -> None:
    """Do what training does before the network: read, and make a batch of every picture, finite and with objects."""
    fields = {"data.num_workers": "0", "train.batch_size": "2", "data.image_size": "32", "data.train_sizes": "(32,)"}
    config = load_config("configs/quickstart.py", fields)
    datasets = {split: coco.read_coco(*paths) for split, paths in source.splits.items()}
    for dataset in datasets.values():
        coco.check_images(dataset)
    coco.check_same_categories(datasets["train"], datasets["val"])
    for built in (
        loader.build_train_loader(config, datasets["train"]),
        loader.build_eval_loader(config, datasets["val"], use_targets=True),
    ):
        batches = built.batches()
        objects = 0
        for _ in range(built.num_batches + 1):
            batch = next(batches, None)
            if batch is None:
                break
            for array in (batch.images, batch.targets.boxes):
                assert np.isfinite(array).all()
            assert set(np.unique(batch.targets.masks)) <= {0, 1}
            objects += int(batch.targets.masks.any(axis=(2, 3)).sum())
        assert objects > 0


ALL_DEFECTS = [(code, i) for code, edits in DEFECTS.items() for i in range(len(edits))]


def test_sound_data_pass_without_a_word(tmp_path):
    result = run_check(write_dataset(tmp_path / "set"))
    assert result.passed and not result.flaws
    load_everything(result.source)
    assert result.measured["train"]["objects"] == 8
    assert result.measured["val"]["objects_per_image"]["max"] == 2
    # The first object has 12 x 9 pixels, and a picture of 32 x 24 becomes 64 x 64.
    side = (12 * 9) ** 0.5 * (64 / 32 * 64 / 24) ** 0.5
    assert result.measured["train"]["object_side_at_training_size_px"]["min"] == pytest.approx(side, abs=0.01)


@pytest.mark.parametrize(("code", "variant"), ALL_DEFECTS)
def test_each_defect_is_found_and_mended(tmp_path, code, variant):
    result = run_check(write_dataset(tmp_path / "set", DEFECTS[code][variant]))
    assert code in codes_of(result)
    assert result.passed == (code not in ERRORS)
    severity = findings.CODES[code][0]
    assert severity == ("error" if code in ERRORS else "warning" if code in WARNINGS else "advice")
    repaired = repair.write_repaired(result, tmp_path / "fixed")
    source, changes = repaired.source, repaired.changes
    if cut_json in DEFECTS[code][variant : variant + 1]:
        return  # there is nothing to repair in a file that can't be read
    again = run_check(source)
    assert again.passed, again.flaws
    load_everything(source)
    if not result.passed or code in ("box_mask_mismatch", "zero_area", "empty_mask"):
        assert changes and code not in codes_of(again)


@given(st.lists(st.sampled_from(ALL_DEFECTS), max_size=6, unique_by=lambda defect: defect[0]))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_passes_can_be_loaded_and_what_is_broken_is_found(chosen):
    """Of several defects at once one may hide another, but errors never pass, and what passes loads."""
    chosen = sorted(chosen, key=lambda defect: (defect[0] in ERRORS, defect[0] == "broken_json"))
    if "size_mismatch" in dict(chosen):  # a turned picture and swapped sides may fit again
        chosen = [defect for defect in chosen if defect[0] != "exif_rotation"]

    def edit(contents, folder):
        for code, variant in chosen:
            DEFECTS[code][variant](contents, folder)

    with tempfile.TemporaryDirectory() as place:
        result = run_check(write_dataset(Path(place) / "set", edit))
        if any(code in ERRORS for code, _ in chosen):
            assert not result.passed
        if result.passed:
            load_everything(result.source)


NASTY = [
    None,
    True,
    -1,
    0,
    1,
    3,
    1e9,
    -0.5,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    [[]],
    {},
    [1, 2],
    [[1, 2, 3]],
    "4",
]


def leaves(node, path=()):
    """Paths of all places of a JSON document."""
    found = [path] if path else []
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in entries:
        found += leaves(child, (*path, key))
    return found


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_damage_never_crashes_and_never_passes_unless_it_loads(data):
    def edit(contents, folder):
        for _ in range(data.draw(st.integers(1, 3))):
            split = data.draw(st.sampled_from(["train", "val"]))
            *way, last = data.draw(st.sampled_from(leaves(contents[split])))
            node = contents[split]
            for key in way:
                node = node[key]
            node[last] = copy.deepcopy(data.draw(st.sampled_from(NASTY)))

    with tempfile.TemporaryDirectory() as place:
        result = run_check(write_dataset(Path(place) / "set", edit))
        if result.passed:
            load_everything(result.source)
        source = repair.write_repaired(result, Path(place) / "fixed").source
        again = run_check(source)
        if again.passed and len(source.splits) == 2:
            load_everything(source)


def test_repairs_are_the_right_ones(tmp_path):
    def edit(contents, folder):
        (folder / "train0.jpg").rename(folder / "TRAIN0.JPG")
        change_image("train", 1, height=2 * HEIGHT, width=2 * WIDTH)(contents, folder)  # pictures were halved
        contents["train"]["annotations"][2]["segmentation"] = rectangle(4, 6, 28, 24)
        change_annotation("train", 4, segmentation=rectangle(-6, 3, 14, 12))(contents, folder)
        renumber_category(contents, folder)

    result = run_check(write_dataset(tmp_path / "set", edit))
    before = (tmp_path / "set" / "annotations" / "instance_train.json").read_bytes()
    repaired = repair.write_repaired(result, tmp_path / "fixed")
    source, changes = repaired.source, repaired.changes
    assert (tmp_path / "set" / "annotations" / "instance_train.json").read_bytes() == before
    fixed = {s: json.loads(paths[0].read_text()) for s, paths in source.splits.items()}
    assert fixed["train"]["images"][0]["file_name"] == "TRAIN0.JPG"
    by_id = {entry["id"]: entry for entry in fixed["train"]["annotations"]}
    assert by_id[10]["segmentation"] == rectangle(2, 3, 14, 12) and by_id[10]["bbox"] == [2, 3, 12, 9]
    mask = masks.rasterize_polygons([np.reshape(by_id[20]["segmentation"][0], (-1, 2))], HEIGHT, WIDTH)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[3:12, :14] = 1
    np.testing.assert_array_equal(mask, expected)
    assert by_id[20]["bbox"] == [0, 3, 14, 9] and by_id[20]["area"] == 14 * 9
    assert fixed["train"]["categories"] == [{"id": 4, "name": "a"}, {"id": 9, "name": "b"}]
    assert fixed["val"]["categories"] == fixed["train"]["categories"]
    assert collections.Counter(e["category_id"] for e in fixed["val"]["annotations"]) == {4: 3, 9: 3}
    assert any("TRAIN0.JPG" in change for change in changes) and any("scaled" in change for change in changes)


def test_a_missing_size_is_that_of_the_picture(tmp_path):
    def edit(contents, folder):
        del contents["train"]["images"][0]["height"], contents["train"]["images"][0]["width"]
        change_image("train", 1, width="wide")(contents, folder)

    result = run_check(write_dataset(tmp_path / "set", edit))
    assert not result.passed
    repaired = repair.write_repaired(result, tmp_path / "fixed")
    source, changes = repaired.source, repaired.changes
    dataset = coco.read_coco(*source.splits["train"])
    assert len(dataset) == 4 and sum(map(len, dataset.annotations)) == 8
    assert {(image.height, image.width) for image in dataset.images} == {(HEIGHT, WIDTH)}
    assert sum("are those of the picture" in change for change in changes) == 2


@pytest.mark.parametrize("orientation", range(2, 9))
def test_objects_of_a_picture_turned_by_exif_are_turned_with_it(tmp_path, orientation):
    """A mark that is painted on the object stays under it."""

    def edit(contents, folder):
        picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        picture[3:12, 2:14] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture).save(folder / "train0.jpg", quality=98, exif=exif.tobytes())
        contents["train"]["annotations"][0]["segmentation"] = rectangle(2, 3, 14, 12)
        runs = masks.encode_mask(picture[..., 0])
        contents["train"]["annotations"][1].update(segmentation=runs, bbox=[2, 3, 12, 9])

    result = run_check(write_dataset(tmp_path / "set", edit))
    source = repair.write_repaired(result, tmp_path / "fixed").source
    if orientation < 5:  # size and frame as the file says: nothing can be known
        return
    assert "size_mismatch" in codes_of(result)
    dataset = coco.read_coco(*source.splits["train"])
    position = [image.file_name for image in dataset.images].index("train0.jpg")
    shown = cv2.imread(str(dataset.image_path(position)), cv2.IMREAD_GRAYSCALE)
    for annotation in dataset.annotations[position]:
        drawn = masks.segmentation_to_mask(annotation.segmentation, *shown.shape)
        np.testing.assert_array_equal(drawn, shown > 127)


def test_advice_follows_the_numbers(tmp_path):
    result = run_check(write_dataset(tmp_path / "set"), num_queries=2)
    assert "more_queries" in codes_of(result) and result.passed
    result = run_check(tmp_path / "set", max_instances=2)
    assert "more_queries" in codes_of(result)
    result = run_check(tmp_path / "set", image_size=(16, 16))
    assert "small_objects" in codes_of(result)
    assert not run_check(tmp_path / "set", num_queries=3, max_instances=3).flaws


def test_missing_parts_are_findings_and_a_missing_folder_an_error(tmp_path):
    root = write_dataset(tmp_path / "set")
    (root / "annotations" / "instance_val.json").unlink()
    result = run_check(root)
    assert [(flaw.code, flaw.split) for flaw in result.flaws] == [("missing_annotations", "val")]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_check(tmp_path / "nowhere")


def test_findings_are_grouped_with_all_ids():
    flaws = [findings.Flaw("crowd", "val", (i,), f"annotation {i}", is_of_annotation=True) for i in range(30)]
    flaws += [findings.Flaw("leak", None, (1, 2), "twins"), findings.Flaw("missing_image", "val", (3,), "gone")]
    grouped = findings.group(flaws)
    assert [finding["code"] for finding in grouped] == ["missing_image", "leak", "crowd"]
    assert grouped[2]["ids"] == list(range(30)) and grouped[2]["count"] == 30 and len(grouped[2]["details"]) == 20
    assert grouped[2]["id_of"] == "annotation" and grouped[0]["severity"] == "error"
    assert all(finding["what_to_do"] for finding in grouped)


def test_crossing_and_degenerate_polygons():
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], float)
    assert not crosses_itself(square) and not is_degenerate(square)
    assert crosses_itself(square[[0, 2, 1, 3]])
    notched = np.array([[0, 0], [6, 0], [6, 4], [3, 1], [0, 4]], float)
    assert not crosses_itself(notched)
    touching = np.array([[0, 0], [2, 2], [4, 0], [4, 4], [2, 2], [0, 4]], float)
    assert not crosses_itself(touching)
    assert is_degenerate(np.array([[0, 0], [3, 1], [6, 2], [9, 3]], float))
    assert is_degenerate(np.full((5, 2), 3.0))
    assert not is_degenerate(np.array([[0, 0], [1000, 0], [500, 0.01]], float))
    assert not is_degenerate(square[[0, 2, 1, 3]])  # its signed area is 0, its extent is not


def test_all_flaws_are_dataclasses_with_known_codes(tmp_path):
    for code, edits in DEFECTS.items():
        result = run_check(write_dataset(tmp_path / code, edits[0]))
        for flaw in result.flaws:
            assert flaw.code in findings.CODES and dataclasses.asdict(flaw)["detail"]
    assert {code for code, entry in findings.CODES.items() if entry[0] == "warning"} == WARNINGS
    assert {code for code, entry in findings.CODES.items() if entry[0] == "error"} >= ERRORS
