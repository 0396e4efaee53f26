"""A run's folder: one training at a time, the data that it began with, and rows of its logs that are damaged."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest
from places import ROOT
from tiny_runs import write_subset

from instseg_jax.data import coco
from instseg_jax.training import workdir


def test_two_at_once_are_told_apart_and_a_dead_one_leaves_no_lock(tmp_path):
    code = f"""
    import sys, time
    sys.path.insert(0, {str(ROOT)!r})
    from pathlib import Path
    from instseg_jax.training.workdir import lock_workdir
    with lock_workdir(Path({str(tmp_path)!r})):
        print("locked", flush=True)
        time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=rf"process {other.pid} on .* is training in "), workdir.lock_workdir(tmp_path):
        pass
    other.kill()
    other.wait()
    with workdir.lock_workdir(tmp_path):
        pass


@pytest.fixture
def data(tmp_path):
    return write_subset(tmp_path / "data", 4)


def described(folder):
    return workdir.describe_data({split: coco.read_split(folder, split) for split in ("train", "val")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].pop(), "train: pictures were 4, are 3"),
        (lambda c: c["annotations"].pop(), "train: objects were"),
        (lambda c: c["categories"][0].update(name="roof"), "train: classes were building, are roof"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 1, 9, 1, 9, 9]]), "another annotation file"),
        (lambda c: c["images"][0].update(file_name=c["images"][1]["file_name"]), "other pictures, as many as before"),
    ],
)
def test_a_run_does_not_go_on_with_other_data_unsaid(data, change, message):
    before = described(data)
    workdir.check_same_data(before, described(data))
    file = data / "annotations/instance_train.json"
    content = json.loads(file.read_text())
    change(content)
    known = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in known]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"(?s){message}.*allow_change=True"):
        workdir.check_same_data(before, described(data))
    workdir.check_same_data(None, described(data))  # runs of before this was noted


def test_a_part_that_came_or_went_is_said(data):
    both = described(data)
    for saved, mine, text in (
        ({"train": both["train"]}, both, "there was no val part"),
        (both, {"train": both["train"]}, "there is no val part"),
    ):
        with pytest.raises(ValueError, match=text):
            workdir.check_same_data(saved, mine)


def test_damaged_rows_are_lost_alone_and_gaps_are_found(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in range(6)]
    rows[2], rows[4] = rows[2][:9], '{"step": 4, "loss": 1.0'
    file.write_bytes("\n".join(rows).encode() + b"\n\xff\xfe\n[1]\n" + b'{"step": 6, "lo')
    assert [row["step"] for row in workdir.read_rows(file)] == [0, 1, 3, 5]
    assert workdir.find_gaps(file, 1) == [(1, 3), (3, 5)] and workdir.find_gaps(file, 2) == []


def test_the_data_may_have_no_file(data):
    dataset = dataclasses.replace(coco.read_split(data, "train"), annotation_file=data / "gone.json")
    assert workdir.describe_data({"train": dataset})["train"]["annotations"] is None
