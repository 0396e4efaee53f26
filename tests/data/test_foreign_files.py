"""Files that a data set may name but that are none of it: pipes, devices, sockets, and what lies outside of it."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from broken_data import run_check, write_dataset
from converted_data import box_mask, convert, write_picture
from labelme_files import shape, square, write_labelme
from PIL import Image

from instseg_jax import files
from instseg_jax.config import load_config
from instseg_jax.data import coco, repair
from instseg_jax.data.source import build_dataset
from instseg_jax.evaluation.read import read_results
from instseg_jax.inference.sources import find_sources

SECONDS = 20  # for what would wait for ever


@pytest.fixture(autouse=True)
def ends():
    """What hangs is an error, not a test run that hangs."""

    def stop(*_):
        raise TimeoutError("it waited for a file that is none")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may be short only
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(here)


def link_to(target):
    return lambda path: path.symlink_to(target)


SPECIAL = {
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a device": link_to("/dev/zero"),
    "a folder": Path.mkdir,
}


@pytest.fixture(params=SPECIAL)
def special(request, tmp_path):
    """What it is, and a function that puts it in the place of a file."""

    def put(path: Path) -> Path:
        path.unlink(missing_ok=True)
        SPECIAL[request.param](path)
        return path

    return request.param, put


def details(result, code):
    return [flaw.detail for flaw in result.flaws if flaw.code == code]


def test_only_regular_files_are_read(special, tmp_path):
    kind, put = special
    path = put(tmp_path / "a.jpg")
    for read in (files.read_regular, files.read_json, read_results):
        with pytest.raises(ValueError, match=f"no regular file but {kind}"):
            read(path)
    (tmp_path / "b").write_bytes(b"content")
    assert files.read_regular(tmp_path / "b") == b"content"
    with pytest.raises(FileNotFoundError):
        files.read_regular(tmp_path / "c")


def test_a_file_of_holes_is_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="at most 4294967296 are read"):
        files.read_regular(tmp_path / "a.jpg")


def test_a_listed_special_file_fails_the_check_and_the_training(special, tmp_path):
    kind, put = special
    root = write_dataset(tmp_path / "set")
    put(root / "images" / "train1.jpg")
    result = run_check(root)
    if kind == "a device":  # the link leads out of the folder
        assert "lies outside of" in details(result, "outside_folder")[0]
    else:
        assert f"no regular file but {kind}" in details(result, "undecodable_image")[0]
    dataset = coco.read_split(root, "train")
    with pytest.raises((FileNotFoundError, ValueError), match=r"train1\.jpg"):
        coco.check_images(dataset)
    with pytest.raises(ValueError, match=f"no regular file but {kind}|lie outside of"):
        dataset.read_image(1)


def test_a_special_annotation_file_is_said(special, tmp_path):
    _, put = special
    root = write_dataset(tmp_path / "set")
    put(root / "annotations" / "instance_train.json")
    assert not run_check(root).passed
    shutil.rmtree(root / "images")
    put(root / "x.json")  # looked into to tell what a folder without annotations is
    with pytest.raises(FileNotFoundError):
        coco.find_split(root, "train")


def test_pictures_to_segment(special, tmp_path):
    kind, put = special
    for name in ("a.jpg", "b.tif", "c.mp4"):
        put(tmp_path / name)
    sources, _ = find_sources([str(tmp_path / name) for name in ("a.jpg", "b.tif", "c.mp4")], channels="rgb")
    if kind == "a folder":
        for source in sources:
            with pytest.raises((ValueError, OSError)):
                source.read()
        return
    for source in sources:
        with pytest.raises(ValueError, match=f"no regular file but {kind}"):
            source.read()


# --- outside ---------------------------------------------------------------------------------------------------------


def copied_outside(root: Path) -> Path:
    """A sound picture beside the data set."""
    outside = root.parent / "private.jpg"
    shutil.copy(root / "images" / "train1.jpg", outside)
    return outside


WAYS_OUT = {
    "dots": lambda root: "../../private.jpg",
    "absolute": lambda root: str(copied_outside(root).absolute()),
    "link": lambda root: _linked(root / "images" / "link.jpg", copied_outside(root), "link.jpg"),
    "linked folder": lambda root: _linked(root / "images" / "down", root.parent, "down/private.jpg"),
    "dots behind a link": lambda root: _linked(root / "images" / "down", root.parent / "a/b", "down/../../private.jpg"),
}


def _linked(path: Path, target: Path, name: str) -> str:
    target.mkdir(parents=True, exist_ok=True) if not target.suffix else None
    path.symlink_to(target)
    return name


@pytest.fixture(params=WAYS_OUT)
def leading_out(request, tmp_path):
    """A data set one of whose pictures lies outside."""
    root = write_dataset(tmp_path / "set")
    copied_outside(root)
    file = root / "annotations" / "instance_train.json"
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = WAYS_OUT[request.param](root)
    file.write_text(json.dumps(content))
    return root


def config_of(root, **fields):
    return load_config("configs/quickstart.py", {"data.dir": str(root)} | fields)


def test_pictures_outside_of_the_folder_are_found_and_not_opened(leading_out):
    result = run_check(leading_out)
    assert [flaw.code for flaw in result.flaws if flaw.is_error] == ["outside_folder"]
    assert result.pictures["train"][1].thumbnail is None and "outside of" in details(result, "outside_folder")[0]
    dataset = build_dataset(config_of(leading_out).data, "train")
    with pytest.raises(ValueError, match=r"1 of 4 images .* lie outside of .*allow_outside=True"):
        coco.check_images(dataset)
    with pytest.raises(ValueError, match="outside of"):
        dataset.read_image(1)
    assert dataset.read_image(0).any()
    contents, changes, _ = repair.repair_dataset(result)
    assert len(contents["train"]["images"]) == 3 and "outside of" in changes[0]


def test_a_person_may_allow_them(leading_out):
    result = run_check(leading_out, allow_outside=True)
    assert result.passed and result.pictures["train"][1].size == (24, 32)
    dataset = build_dataset(config_of(leading_out, **{"data.allow_outside": True}).data, "train")
    coco.check_images(dataset)
    assert dataset.read_image(1).any()


def test_names_that_stay_inside_are_fine(tmp_path):
    root = write_dataset(tmp_path / "set")
    (root / "images").rename(tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")  # of one's own: the folder itself may be anywhere
    (root / "images" / "twin.jpg").symlink_to("train1.jpg")
    file = root / "annotations" / "instance_train.json"
    for name in ("../elsewhere/train1.jpg", str(tmp_path / "elsewhere" / "train1.jpg"), "twin.jpg", "./train1.jpg"):
        content = json.loads(file.read_text())
        content["images"][1]["file_name"] = name
        file.write_text(json.dumps(content))
        assert run_check(root).passed, name
        coco.check_images(coco.read_split(root, "train"))
    moved = config_of(root, **{"data.train_images": str(tmp_path / "elsewhere")})  # an absolute path of one's own
    coco.check_images(build_dataset(moved.data, "train"))


# --- converters ------------------------------------------------------------------------------------------------------


def write_voc(folder: Path, name: str) -> None:
    write_picture(folder / "JPEGImages" / "a.jpg")
    for kind in ("SegmentationObject", "SegmentationClass"):
        (folder / kind).mkdir(parents=True)
        Image.fromarray(box_mask(5, 5, 20, 20)).save(folder / kind / "a.png")
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text(f"a\n{name}\n")
    (folder / "labels.txt").write_text("one\n")


def write_yolo(folder: Path, train: str) -> None:
    write_picture(folder / "images" / "a.jpg")
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (folder / "data.yaml").write_text(f"names: [one]\ntrain: {train}\n")


def test_labelme_takes_no_picture_from_outside(tmp_path):
    write_picture(tmp_path / "private.png")
    for number, named in enumerate(("../private.png", str(tmp_path / "private.png"), "link.png")):
        folder = tmp_path / f"in{number}"
        write_labelme(folder, "a", [shape("x", square(5, 5, 10))])
        write_labelme(folder, "b", [shape("x", square(5, 5, 10))], picture=False, imagePath=named)
        if named == "link.png":
            (folder / named).symlink_to(tmp_path / "private.png")
        with pytest.raises(ValueError, match=r"b\.json leads to .*private\.png', outside of|link\.png', outside of"):
            convert(folder, "LabelMe", tmp_path / "out")
        done = convert(folder, "LabelMe", tmp_path / f"out{number}", skip_invalid=True)
        assert [path.name for path in (tmp_path / f"out{number}" / "images").iterdir()] == ["a.png"]
        assert done.parts["train"][1] == 1 and "outside of" in done.notes[0]


def test_voc_takes_nothing_from_outside(tmp_path):
    write_voc(tmp_path / "in", "../../private")
    write_picture(tmp_path / "private.jpg")
    with pytest.raises(ValueError, match=r"private\.jpg', outside of"):
        convert(tmp_path / "in", "VOC", tmp_path / "out")
    (tmp_path / "in" / "SegmentationObject" / "a.png").unlink()
    (tmp_path / "in" / "SegmentationObject" / "a.png").symlink_to(tmp_path / "mask.png")
    Image.fromarray(box_mask(5, 5, 20, 20)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"a\.png', outside of"):
        convert(tmp_path / "in", "VOC", tmp_path / "out")


@pytest.mark.parametrize("train", ["../other/images", "list.txt", "images"])
def test_yolo_takes_nothing_from_outside(tmp_path, train):
    write_yolo(tmp_path / "in", train)
    write_picture(tmp_path / "other" / "images" / "b.jpg")
    (tmp_path / "in" / "list.txt").write_text(f"images/a.jpg\n{tmp_path}/other/images/b.jpg\n")
    if train == "images":
        (tmp_path / "in" / "images" / "b.jpg").symlink_to(tmp_path / "other" / "images" / "b.jpg")
    with pytest.raises(ValueError, match="outside of"):
        convert(tmp_path / "in", "YOLO", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_list_of_classes_is_no_way_out(tmp_path):
    (tmp_path / "secret.txt").write_text("root:x\n")
    write_labelme(tmp_path / "in", "a", [shape("x", square(5, 5, 10))])
    (tmp_path / "in" / "labels.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="outside of"):
        convert(tmp_path / "in", "LabelMe", tmp_path / "out")


def test_converters_wait_for_no_special_file(special, tmp_path):
    _, put = special
    write_labelme(tmp_path / "labelme", "a", [shape("x", square(5, 5, 10))])
    put(tmp_path / "labelme" / "b.json")
    write_labelme(tmp_path / "labelme", "c", [shape("x", square(5, 5, 10))])
    put(tmp_path / "labelme" / "c.png")
    write_yolo(tmp_path / "yolo", "images")
    put(tmp_path / "yolo" / "images" / "b.jpg")
    write_voc(tmp_path / "voc", "b")
    put(tmp_path / "voc" / "JPEGImages" / "b.jpg")
    for folder in ("LabelMe", "YOLO", "VOC"):
        with pytest.raises((ValueError, OSError)):
            convert(tmp_path / folder.lower(), folder, tmp_path / f"{folder}-out")
        done = convert(tmp_path / folder.lower(), folder, tmp_path / f"{folder}-out", skip_invalid=True)
        assert done.parts["train"][1] == 1, folder
