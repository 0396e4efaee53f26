"""Splitting: no picture lost or doubled, ids unique, classes in proportion, series together, originals kept."""

import collections
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg_jax.data import coco, split


def content(images, categories=((1, "a"), (2, "b"))):
    """COCO content of (id, file name, category ids of its objects); annotation ids count from 0."""
    result = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in categories]}
    for image_id, name, labels in images:
        result["images"].append({"id": image_id, "file_name": name, "height": 10, "width": 10})
        for label in labels:
            number = len(result["annotations"])
            entry = {
                "id": number,
                "image_id": image_id,
                "category_id": label,
                "segmentation": [[number, 0, 9, 0, 9, 9]],
            }
            result["annotations"].append(entry | {"bbox": [0, 0, 9, 9], "area": 40, "iscrowd": 0})
    return result


def write(root: Path, **parts):
    (root / "annotations").mkdir(exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    for part, data in parts.items():
        (root / "annotations" / f"instance_{part}.json").write_text(json.dumps(data))


def run(root, train=80, val=20, **changes):
    arguments = {"train_percent": train, "val_percent": val, "group_by": None, "seed": 0} | changes
    split.check_percentages(train, val)
    split.split_dataset(
        root, lambda whole: dict(zip(("train", "val"), split.split_images(whole, **arguments), strict=True))
    )
    return {part: json.loads((root / "annotations" / f"instance_{part}.json").read_text()) for part in ("train", "val")}


def objects_by_name(*contents):
    """{file name: sorted (category name, segmentation)} over several contents."""
    found = collections.defaultdict(list)
    for data in contents:
        names = {entry["id"]: entry["name"] for entry in data["categories"]}
        files = {entry["id"]: entry["file_name"] for entry in data["images"]}
        for name in files.values():
            found[name] += []
        for entry in data["annotations"]:
            found[files[entry["image_id"]]].append((names[entry["category_id"]], str(entry["segmentation"])))
    return {name: sorted(objects) for name, objects in found.items()}


picture_lists = st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=2, max_size=25)


@given(picture_lists, picture_lists, st.integers(1, 99), st.integers(0, 5), st.booleans())
@settings(max_examples=120, deadline=None)
def test_nothing_is_lost_or_doubled(train, val, percent, seed, same_ids):
    categories = ((1, "a"), (2, "b"), (3, "c"))
    first = content([(i, f"t{i}.jpg", labels) for i, labels in enumerate(train)], categories)
    offset = 0 if same_ids else 100  # both files count from 0, as converters do
    second = content([(i + offset, f"v{i}.jpg", labels) for i, labels in enumerate(val)], categories[::-1])
    parts = split.split_images(
        split.merge_contents([first, second]),
        train_percent=percent,
        val_percent=100 - percent,
        group_by=None,
        seed=seed,
    )
    before, after = objects_by_name(first, second), objects_by_name(*parts)
    assert before == after
    for key in ("images", "annotations"):
        ids = [entry["id"] for part in parts for entry in part[key]]
        assert len(ids) == len(set(ids))
    total = len(train) + len(val)
    assert sum(len(part["images"]) for part in parts) == total
    wanted = min(max(total * (100 - percent) / 100, 1), total - 1)
    assert abs(len(parts[1]["images"]) - wanted) <= 0.5
    assert parts[0]["categories"] == parts[1]["categories"]


def test_pictures_and_categories_that_both_files_list_are_joined():
    first = content([(0, "same.jpg", (1, 1)), (1, "t.jpg", (2,))])
    second = content([(0, "v.jpg", (5,)), (1, "same.jpg", ())], ((5, "b"), (2, "c")))
    second["annotations"].append(dict(first["annotations"][0], image_id=1, category_id=5))  # other class: kept
    second["annotations"].append(dict(first["annotations"][0], id=9, image_id=1, category_id=2))
    merged = split.merge_contents([first, second])
    assert [entry["file_name"] for entry in merged["images"]] == ["same.jpg", "t.jpg", "v.jpg"]
    assert [entry["name"] for entry in merged["categories"]] == ["a", "b", "c"]
    assert len({entry["id"] for entry in merged["categories"]}) == 3
    assert len(objects_by_name(merged)["same.jpg"]) == 4
    twice = split.merge_contents([first, first])
    assert objects_by_name(twice) == objects_by_name(first)


def test_classes_keep_their_shares():
    images = [(i, f"{i}.jpg", [1] * (i % 3) + [2] * (i % 5 == 0) + [3] * (i in (7, 63))) for i in range(200)]
    data = content(images, ((1, "a"), (2, "b"), (3, "c")))
    for seed in range(5):
        parts = split.split_images(data, train_percent=75, val_percent=25, group_by=None, seed=seed)
        counts = [collections.Counter(entry["category_id"] for entry in part["annotations"]) for part in parts]
        assert counts[1][1] / (counts[0][1] + counts[1][1]) == pytest.approx(0.25, abs=0.02)
        assert counts[1][2] / (counts[0][2] + counts[1][2]) == pytest.approx(0.25, abs=0.02)
        assert counts[0][3] == counts[1][3] == 1  # of two pictures with the rarest class each part has one
        assert len(parts[1]["images"]) == 50


def test_seed_decides():
    data = content([(i, f"{i}.jpg", (1,)) for i in range(40)])

    def chosen(seed):
        part = split.split_images(data, train_percent=50, val_percent=50, group_by=None, seed=seed)[1]
        return [entry["id"] for entry in part["images"]]

    assert chosen(3) == chosen(3) != chosen(4)


def test_groups_stay_together():
    data = content([(i, f"house{i // 4}_view{i % 4}.jpg", (1,)) for i in range(40)])
    parts = split.split_images(data, train_percent=70, val_percent=30, group_by=r"house(\d+)", seed=1)
    houses = [{entry["file_name"].split("_")[0] for entry in part["images"]} for part in parts]
    assert not houses[0] & houses[1] and len(houses[0] | houses[1]) == 10
    assert len(parts[1]["images"]) == 12
    with pytest.raises(ValueError, match=r"group_by='x\+' is not in the file name 'house0_view0.jpg'"):
        split.split_images(data, train_percent=70, val_percent=30, group_by="x+", seed=1)
    with pytest.raises(ValueError, match=r"group_by='\(' is no regular expression"):
        split.split_images(data, train_percent=70, val_percent=30, group_by="(", seed=1)
    with pytest.raises(ValueError, match="1 group of pictures can't be split"):
        split.split_images(data, train_percent=70, val_percent=30, group_by="house", seed=1)


def test_a_group_larger_than_the_rest_leaves_no_part_empty():
    names = [f"a{i}.jpg" for i in range(9)] + ["b.jpg"]
    data = content([(i, name, (1,)) for i, name in enumerate(names)])
    for percent in (10, 50, 90):
        parts = split.split_images(data, train_percent=percent, val_percent=100 - percent, group_by="^[ab]", seed=0)
        assert sorted(len(part["images"]) for part in parts) == [1, 9]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (50, 40, r"should equal 100, got 50 \+ 40 = 90"),
        (100, 0, "train_percent must be a whole number between 1 and 99, got 100"),
        (80, None, "val_percent must be .* got None"),
        (80.0, 20, "train_percent .* got 80.0"),
    ],
)
def test_percentages_are_checked_before_anything_is_touched(tmp_path, train, val, message):
    write(tmp_path, train=content([(0, "a.jpg", (1,)), (1, "b.jpg", (1,))]))
    before = (tmp_path / "annotations" / "instance_train.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, train, val)
    assert (tmp_path / "annotations" / "instance_train.json").read_bytes() == before
    assert len(list((tmp_path / "annotations").iterdir())) == 1


def test_small_sets(tmp_path):
    write(tmp_path, train=content([(0, "a.jpg", (1,)), (1, "b.jpg", (1,))]))
    parts = run(tmp_path, 90, 10)
    assert len(parts["train"]["images"]) == len(parts["val"]["images"]) == 1
    single = tmp_path / "single"
    single.mkdir()
    write(single, train=content([(0, "a.jpg", (1,))]))
    with pytest.raises(ValueError, match="1 picture can't be split"):
        run(single)
    with pytest.raises(FileNotFoundError, match=r"instance_train\.json"):
        run(tmp_path / "images")


def test_originals_stay_and_older_ones_too(tmp_path):
    write(
        tmp_path,
        train=content([(i, f"t{i}.jpg", (1,)) for i in range(8)]),
        val=content([(0, "v0.jpg", (2,)), (1, "v1.jpg", ())]),
    )
    folder = tmp_path / "annotations"
    original = {part: (folder / f"instance_{part}.json").read_bytes() for part in ("train", "val")}
    run(tmp_path, 50, 50)
    second = {part: (folder / f"instance_{part}.json").read_bytes() for part in ("train", "val")}
    parts = run(tmp_path, 70, 30, seed=4)
    for part in ("train", "val"):
        assert (folder / f"instance_{part}.json.bak").read_bytes() == original[part]
        assert (folder / f"instance_{part}.json.bak2").read_bytes() == second[part]
    assert len(list(folder.iterdir())) == 6
    assert len(parts["train"]["images"]) == 7 and len(objects_by_name(*parts.values())) == 10


def test_contradictions_are_refused():
    data = content([(0, "a.jpg", (1,)), (0, "b.jpg", (1,))])
    with pytest.raises(ValueError, match="share the id 0"):
        split.merge_contents([data])
    data = content([(0, "a.jpg", (7,)), (1, "b.jpg", ())])
    with pytest.raises(ValueError, match="category id 7 that its file does not list"):
        split.merge_contents([data])
    data = content([("x", "a.jpg", ()), (1, "b.jpg", ())])
    with pytest.raises(ValueError, match="without a whole number as its id"):
        split.merge_contents([data])


def test_parts_have_what_pycocotools_asks_for(tmp_path):
    """2.0.9 and 2.0.10 look `info` up in the truth whenever results are loaded; the source here has none."""
    write(tmp_path, train=content([(i, f"{i}.png", [1]) for i in range(10)]))
    run(tmp_path)
    parts = [json.loads((tmp_path / "annotations" / f"instance_{part}.json").read_text()) for part in ("train", "val")]
    assert all("info" in part for part in parts) and sum(len(part["images"]) for part in parts) == 10


@pytest.mark.parametrize("at", range(5))
def test_a_split_that_is_killed_between_its_files_is_begun_again_from_what_was_there(tmp_path, monkeypatch, at):
    parts = {
        "train": content([(i, f"{i}.jpg", [1]) for i in range(1, 9)]),
        "val": content([(i, f"{i}.jpg", [2]) for i in range(9, 13)]),
        "left_out": content([(13, "13.jpg", [1])]),
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for root in (whole, cut):
        root.mkdir()
        write(root, **parts)
    wanted = run(whole, 60, 40)
    renamed, rename = [], Path.rename

    def killed(path, target):
        if len(renamed) == at:
            raise KeyboardInterrupt  # nothing that is left to do is done
        renamed.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cut, 60, 40)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="are half replaced, split or convert was cut off"):
        coco.read_split(cut, "val")
    assert run(cut, 60, 40) == wanted != parts
    names = [sorted(path.name for path in (root / "annotations").iterdir()) for root in (whole, cut)]
    assert names[0] == names[1] and not [name for name in names[0] if name.startswith(".")]
    for name in names[0]:
        assert (whole / "annotations" / name).read_bytes() == (cut / "annotations" / name).read_bytes()


def test_a_split_that_can_not_be_moved_into_place_leaves_what_was_there(tmp_path, monkeypatch):
    parts = {part: content([(i, f"{part}{i}.jpg", [1]) for i in range(1, 5)]) for part in ("train", "val")}
    write(tmp_path, **parts)
    rename = Path.rename

    def fail(path, target):
        if path.name == "instance_val.json":
            raise PermissionError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        run(tmp_path)
    there = {path.name: json.loads(path.read_text()) for path in (tmp_path / "annotations").iterdir()}
    assert there == {f"instance_{part}.json": parts[part] for part in parts}


@pytest.mark.parametrize("step", [{"file": "../../mine", "backup": None, "new": None}, {"file": None}, 1])
def test_a_mark_of_somebody_else_moves_nothing(tmp_path, step):
    root = tmp_path / "data"
    root.mkdir()
    write(root, train=content([(i, f"{i}.jpg", [1]) for i in range(1, 5)]))
    (tmp_path / "mine").write_text("")
    (root / "annotations/.replacing.json").write_text(json.dumps({"steps": [step]}))
    with pytest.raises(ValueError, match="none of ours"):
        run(root)
    assert (tmp_path / "mine").exists()
