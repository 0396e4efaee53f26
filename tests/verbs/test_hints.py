"""What a person is told who does not know the next step, the field or the name yet."""

import ast
import inspect
import re
import shlex
import shutil
import sys

import pytest
from places import EMBEDDED, ROOT

import instseg_jax
from instseg_jax import commands
from instseg_jax.cli import VERB_FILES, build_parser, main
from instseg_jax.config import find_config, list_fields, load_config
from instseg_jax.verbs.config import read_fields
from instseg_jax.weights.locate import locate

NEVER_ENDING = ("serve",)


@pytest.fixture(autouse=True)
def _no_relaunch(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/instseg"])


def verbs() -> list[str]:
    return list(next(action for action in build_parser()._actions if action.dest == "verb").choices)


def last_command(text: str) -> str:
    """The command that the last line names, which the command line must take."""
    found = re.fullmatch(r"next: instseg ([^#]*)(#.*)?", text.strip().splitlines()[-1])
    assert found, text
    words = shlex.split(found[1])
    options = build_parser().parse_args([word for word in words if not word.startswith("--config.")])
    load_config(options.config or "mask_rtdetr:n", dict(
        word.removeprefix("--config.").split("=", 1) for word in words if word.startswith("--config.")
    ))  # fmt: skip
    return found[1].strip()


def test_the_program_is_called_as_it_was_started(monkeypatch):
    assert (commands.program(), commands.shown("train", "--x=a b")) == ("instseg", "instseg train '--x=a b'")
    assert "usage: instseg " in build_parser().format_help() and "run.py" not in build_parser().format_help()
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert commands.shown("train") == "python run.py train"
    assert "`python run.py VERB --help`" in " ".join(build_parser().format_help().split())
    monkeypatch.setattr(sys, "argv", ["/opt/ipykernel_launcher.py", "-f", "x.json"])
    assert commands.changed("train", {"--workdir": "b"}) == "instseg train --config=CONFIG --workdir=b"


def test_no_hint_of_the_package_names_a_script_that_pip_does_not_install():
    """`run.py` stands in comments, docstrings and `program` alone; what a person reads asks `program`."""
    texts = {}
    for path in sorted((ROOT / "instseg_jax").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        with_docstring = (ast.Module, ast.FunctionDef, ast.ClassDef)
        docstrings = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, with_docstring)}
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        texts[path.name] = {text for text in strings - docstrings if "run.py" in text}
    assert texts.pop("commands.py") == {"run.py", "python run.py"}
    assert not {name: found for name, found in texts.items() if found}


def test_every_verb_ends_by_naming_the_next_one():
    for verb in verbs():
        if verb in NEVER_ENDING:
            continue
        module = __import__(f"instseg_jax.verbs.{VERB_FILES.get(verb, verb)}", fromlist=["_"])
        source = inspect.getsource(getattr(module, verb))
        called = "".join(inspect.getsource(f) for name, f in vars(module).items() if f"{name}(" in source
                         and inspect.isfunction(f) and f.__module__ == module.__name__)  # fmt: skip
        assert "print_next(" in source + called, verb


def test_data_verbs_lead_to_a_training(tmp_path, capsys):
    data = tmp_path / "my data"
    shutil.copytree(EMBEDDED, data)
    told = [f"--config.data.dir={data}", f"--workdir={tmp_path / 'work'}"]
    assert main(["split", *told, "--train_percent=80", "--val_percent=20"]) == 0
    after_split = last_command(capsys.readouterr().out)
    assert after_split == f"check_dataset --config=finetune:n '--config.data.dir={data}'"
    assert main([*shlex.split(after_split), *told[1:]]) == 0
    said, verdict = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert verdict == "Check dataset passed !"
    assert last_command(said) == f"train --config=finetune:n '--config.data.dir={data}'"
    assert main(["check_dataset", "--config=quickstart", *told]) == 0
    assert "train --config=quickstart " in last_command(capsys.readouterr().out.strip().rsplit("\n", 1)[0])
    assert main(["get_pipeline_config", f"--save_path={tmp_path}"]) == 0
    assert last_command(capsys.readouterr().out).startswith("predict --pipeline=")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--epochs=10"], "did you mean --config.train.epochs=10?"),
        (["train", "--epoch", "10"], "did you mean --config.train.epochs?"),
        (["train", "--batch-size=8"], "did you mean --config.eval.batch_size=8 or --config.train.batch_size=8?"),
        (["train", "--train.epochs=10"], "did you mean --config.train.epochs=10?"),
        (["train", "--data=my_data"], "did you mean --config.data.dir=my_data?"),
        (["train", "--wordir=x"], "did you mean --workdir?"),
        (["train", "--learning_rate=1"], "did you mean --config.optimizer.learning_rate=1?"),
        (["sweep", "--image_size=64"], "did you mean --config.data.image_size=64?"),
        (["predict", "--input=x", "--channels=4"], "did you mean --config.data.channels=4?"),
        (["train", "--config=finetune:q", "--epochs=10"], "unknown: --epochs=10; "),
        (["predict", "--weights=/no/such", "--input={picture}"], "there is no such folder of weights: /no/such "),
        (["evaluate", "--weights={folder}/mien"], "/mien; did you mean {folder}/mine? ("),
        (["evaluate", "--weights={folder}/none.pdparams"], "there is no such file of weights: {folder}/none.pdparams"),
        (["config", "finetne"], "there is no config file 'finetne'; did you mean finetune? The project has configs/"),
        (["trian"], "there is no verb 'trian'; did you mean train? There are 'quickstart'"),
        (["xyzzy"], "there is no verb 'xyzzy'; There are "),
    ],
)
def test_what_is_not_there_leads_to_what_is(tmp_path, capsys, arguments, hint):
    (tmp_path / "mine").mkdir()
    places = {"picture": str(next((EMBEDDED / "images").iterdir())), "folder": str(tmp_path)}
    assert main([argument.format(**places) for argument in arguments]) == 1
    assert hint.format(**places) in capsys.readouterr().err


def test_a_known_name_with_a_typo_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"pretraned; did you mean mask_rtdetr_n_pretrained\?"):
        locate("mask_rtdetr_n_pretraned")


def test_every_field_is_shown_with_its_value_and_comment(capsys):
    assert main(["config", "finetune:n", "--config.train.epochs=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    config = load_config("finetune:n", {"train.epochs": 7})
    fields = [line.split("=")[0].removeprefix("--config.") for line in lines if line.startswith("--config.")]
    assert sorted(fields) == list_fields(config) and fields[:3] == ["seed", "device", "model.name"]
    shown = dict(shlex.split(line, comments=True)[0].split("=", 1) for line in lines[1:-1])
    overrides = {name.removeprefix("--config."): value for name, value in shown.items()}
    assert load_config("mask_rtdetr:n", overrides).to_dict() == config.to_dict()  # what is shown can be typed
    assert "--config.train.epochs=7  # in the official recipe 72" in lines
    said = next(line for line in lines if line.startswith("--config.model.num_decoder_layers"))
    assert said == "--config.model.num_decoder_layers=None  # None: as the size has it"
    assert last_command("\n".join(lines)) == (
        "train --config=finetune:n --config.train.epochs=7 --config.data.dir=YOUR_DATA"
    )


def test_comments_reach_nested_sections_renamed_ones_and_loops():
    fields = read_fields(find_config("mask_rtdetr").read_text())
    comments = {field: comment for field, comment in fields.items() if comment}
    assert comments["data.augment.copy_paste_scale"] == "(least, most) of a pasted object"
    assert comments["eval.engine"].startswith("or faster-coco-eval")
    assert comments["loss.match_class_weight"] == comments["loss.class_weight"]
    assert sorted(fields) == list_fields(load_config("mask_rtdetr:n"))


def test_without_a_name_the_configs_are_listed(capsys):
    assert main(["config"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert {"quickstart", "finetune", "mask_rtdetr", "ablations/denoising"} <= set(listed)
    for name in listed:
        assert list_fields(load_config(name))


def test_a_name_will_do_in_python(tmp_path):
    with pytest.raises(ValueError, match=r"data\.dir is empty"):
        instseg_jax.train("finetune:n", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no such folder of weights"):
        instseg_jax.evaluate("quickstart", tmp_path / "run")
