"""The command line as a person meets it: help, verbs, one-line errors, nothing half-written."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from places import EMBEDDED, ROOT

from instseg_jax.cli import build_parser, call, main, split_overrides
from instseg_jax.progress import track

HAS_SERVER = importlib.util.find_spec("fastapi") is not None


@pytest.fixture(autouse=True)
def _no_relaunch(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


def run(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and what went to the error stream."""
    code = main(list(arguments))
    return code, capsys.readouterr().err


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for verb in (
        "quickstart",
        "train",
        "sweep",
        "evaluate",
        "predict",
        "get_pipeline_config",
        "benchmark",
        "import_weights",
        "export_weights",
    ):
        assert verb in shown


def test_an_unknown_verb_lists_the_verbs(capsys):
    code = main(["trian"])
    error = capsys.readouterr().err
    assert code == 1
    assert "trian" in error and "train" in error and "evaluate" in error
    assert "Traceback" not in error


def test_overrides_are_parted_from_options():
    rest, overrides = split_overrides(["train", "--config.a.b=1=2", "--workdir=x", "--config.c", "3"])
    assert rest == ["train", "--workdir=x"]
    assert overrides == {"a.b": "1=2", "c": "3"}
    with pytest.raises(ValueError, match=r"--config\.c has no value"):
        split_overrides(["--config.c"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config=configs/none.py"], "there is no config file 'configs/none.py'"),
        (["train", "--config.data.dir=/no/such/folder"], "/no/such/folder"),
        (["train"], "data.dir is empty"),
        *(
            (
                [verb, "--config=quickstart", *rest, "--config.data.image_size=100"],
                "image_size is 100, it must be a mul",
            )
            for verb, *rest in (
                ["train"],
                ["quickstart"],
                ["check_dataset"],
                ["sweep", "--axis=train.epochs=1,2"],
                ["benchmark"],
                ["evaluate", "--weights=mask_rtdetr_n_pretrained"],
            )
        ),
        (["train", "--config.train.epoch=3"], "did you mean config.train.epochs"),
        (["train", "--config.device=tpu:7"], "device is 'tpu:7'"),
        (["train", "--config.device=toaster"], "device is 'toaster'"),
        (["predict", "--weights=/no/weights", "--input=/no/picture"], "/no/picture"),
        (["predict", "--weights=/no/weights", "--input={picture}"], "/no/weights"),
        (["predict", "--weights={folder}", "--input={picture}"], "no checkpoint"),
        (["evaluate", "--weights=/no/weights"], "/no/weights"),
        (["predict", "--input={picture}", "--threshold=7"], "threshold is 7.0, it must be between 0 and 1"),
        (["predict", "--input={empty}", "--weights=x"], "there is no picture"),
        (["predict", "--input={picture}", "--formats=img,gif"], "got gif"),
        (["predict", "--input={picture}", "--weights=x", "--pipeline=none.yaml"], "none.yaml"),
        (["serve", "--weights={folder}"], "no checkpoint" if HAS_SERVER else 'pip install "instseg_jax[serve]"'),
        (["serve", "--queue_size=0"], "queue_size is 0" if HAS_SERVER else 'pip install "instseg_jax[serve]"'),
        (["get_pipeline_config", "--save_path={folder}", "--pipeline=OCR"], "'OCR'"),
        (["benchmark", "--repeats=0"], "--repeats is 0"),
        (["predict", "--input={picture}", "--thresold=0.2"], "--thresold=0.2; did you mean --threshold? `"),
        (["train", "--qqq"], "unknown: --qqq; `"),
    ],
)
def test_bad_input_is_one_sentence(capsys, tmp_path, arguments, message):
    picture = next((EMBEDDED / "images").iterdir())
    (tmp_path / "empty").mkdir()
    places = {"picture": str(picture), "folder": str(tmp_path), "empty": str(tmp_path / "empty")}
    arguments = [argument.format(**places) for argument in arguments]
    code, error = run(capsys, *arguments, f"--workdir={tmp_path / 'work'}")
    assert code == 1
    assert message in error
    assert error.count("\n") == 1 and "Traceback" not in error


def copy_embedded(folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(EMBEDDED, folder)
    return folder


def break_json(data: dict) -> str:
    return json.dumps(data)[:-20]


def unknown_image(data: dict) -> str:
    data["annotations"][3]["image_id"] = 987654
    return json.dumps(data)


def unknown_category(data: dict) -> str:
    data["annotations"][3]["category_id"] = 55
    return json.dumps(data)


def empty_polygon(data: dict) -> str:
    data["annotations"][3]["segmentation"] = [[]]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, "instance_train.json"),
        (unknown_image, "987654"),
        (unknown_category, "55"),
        (empty_polygon, "polygon"),
    ],
)
def test_broken_annotations_are_named_and_nothing_is_written(capsys, tmp_path, damage, message):
    folder = copy_embedded(tmp_path / "data")
    file = folder / "annotations" / "instance_train.json"
    file.write_text(damage(json.loads(file.read_text())))
    work = tmp_path / "work"
    code, error = run(
        capsys, "train", "--config=configs/quickstart.py", f"--config.data.dir={folder}", f"--workdir={work}"
    )
    assert code == 1
    assert message in error and error.count("\n") == 1
    assert not work.exists()


def test_a_missing_image_is_named(capsys, tmp_path):
    folder = copy_embedded(tmp_path / "data")
    gone = sorted((folder / "images").iterdir())[0]
    gone.unlink()
    code, error = run(capsys, "train", "--config=configs/quickstart.py", f"--config.data.dir={folder}",
                      f"--workdir={tmp_path / 'work'}")  # fmt: skip
    assert code == 1 and gone.name in error and error.count("\n") == 1


def test_debug_shows_where(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["train", "--debug", "--config=configs/none.py", f"--workdir={tmp_path}"])


def test_run_py_relaunches_with_huge_pages_once(tmp_path):
    """The exit code and the message survive the second start."""
    command = [sys.executable, str(ROOT / "run.py"), "train", "--config=configs/none.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no config file")


def test_a_notebook_calls_a_verb_and_hears_of_errors(tmp_path, capsys):
    assert call("get_pipeline_config", f"--save_path={tmp_path}") == 0
    assert list(tmp_path.glob("*.yaml")) and str(tmp_path) in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"unknown field config\.data\.folder"):
        call("split", "--config.data.folder=x", "--train_percent=80", "--val_percent=20")


def test_progress_goes_through_everything_and_is_quiet_in_a_notebook(monkeypatch, capsys, recwarn):
    assert list(track(iter("abc"), "counting", 3)) == ["a", "b", "c"]
    assert "counting" in capsys.readouterr().out
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert list(track(iter("abc"), "counting", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == "" and not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--input=samples", "--save_path={}"], "can't write to the folder {} (File exists)"),
        (["predict", "--input=samples", "--workdir={}"], "{}/leases can't be made or read: a file is where"),
        (["convert", "--src_dataset_type=COCO", "--save_path={}"], "{}/images can't be made or read: a file is where"),
    ],
)
def test_a_file_where_a_folder_is_needed_is_told_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    file = tmp_path / "file"
    file.write_text("kept")
    given = [argument.format(file) for argument in arguments]
    given += [f"--config.data.dir={EMBEDDED}"] if arguments[0] == "convert" else []
    assert main(given) == 1
    said = capsys.readouterr()
    assert message.format(file) in said.err and "pictures," not in said.out
    assert file.read_text() == "kept"
