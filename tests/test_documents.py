"""The commands in the documents are commands that the command line takes, with fields that the configs have."""

import argparse
import re
import shlex

import pytest
import yaml
from ml_collections import ConfigDict
from places import ROOT

import instseg_jax
from instseg_jax.cli import build_parser, split_overrides
from instseg_jax.config import load_config, override
from instseg_jax.weights.download import KNOWN_WEIGHTS
from instseg_jax.weights.locate import PACKAGED_WEIGHTS

DOCUMENTS = [path for name in ("README.md", ".github/*.md", ".github/docs/*.md") for path in sorted(ROOT.glob(name))]
EVERY_FIELD = "configs/mask_rtdetr.py:n"  # for verbs that take the config of the weights
PLACEHOLDER = re.compile(r"\.\.\.|[A-Z][A-Z_]+|[A-Z]|.*/\.\.\.")  # stands for something that the reader has


def find_commands(text: str) -> list[tuple[int, str]]:
    """(line number, what follows `python run.py`) of each command in a code block or in backticks."""
    commands, is_code, begun, first = [], False, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
            continue
        pieces = [line] if is_code else re.findall(r"`([^`]*)`", line)
        for piece in pieces:
            if not begun:
                first = number
            begun += piece.strip()
            if is_code and begun.endswith("\\"):
                begun = begun[:-1]
                continue
            for part in begun.split("&&"):
                _, found, rest = part.partition("python run.py ")
                if found and not PLACEHOLDER.fullmatch(rest.split()[0]):
                    commands.append((first, rest))
            begun = ""
    return commands


def parse_command(command: str) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options and overrides of a command as it is written down: comments go, placeholders become a number."""
    words = [word.strip("[]") for word in shlex.split(command, comments=True)]
    arguments, overrides = split_overrides([word for word in words if word])
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and PLACEHOLDER.fullmatch(value):
            arguments[i] = "" if option == "--config" else f"{option}=1"
    return build_parser().parse_args([argument for argument in arguments if argument]), overrides


def check_command(command: str) -> None:
    """Raise ValueError or FileNotFoundError for an option, a config, a field or a value that there is not."""
    options, overrides = parse_command(command)
    config = load_config(options.config or EVERY_FIELD)
    for field, value in overrides.items():
        override(config, field, "None" if PLACEHOLDER.fullmatch(value) else value)


CASES = [(path, *found) for path in DOCUMENTS for found in find_commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("path", "number", "command"), CASES, ids=[f"{path.name}:{number}" for path, number, _ in CASES]
)
def test_a_command_of_the_documents_can_be_run(path, number, command):
    check_command(command)


def test_the_main_commands_are_found():
    """What finds the commands finds those that the README can't be without."""
    verbs = {shlex.split(command, comments=True)[0] for path, _, command in CASES if path.name == "README.md"}
    assert {"quickstart", "check_dataset", "train", "evaluate", "predict", "serve"} <= verbs


def test_commands_are_found_wherever_they_stand():
    text = "\n".join([
        "Say `python run.py predict --input=a` or `python -m pytest`.",
        "```bash",
        "python -m pip install . && python run.py quickstart  # minutes",
        "srun python run.py train --distributed \\",
        "    --workdir=SHARED",
        "run.py serve",
        "```",
        "python run.py nothing, `python run.py VERB --help`",
    ])  # fmt: skip
    found = [(1, "predict --input=a"), (3, "quickstart  # minutes"), (4, "train --distributed --workdir=SHARED")]
    assert find_commands(text) == found


def test_links_of_the_documents_lead_somewhere():
    """Links within the project are files of it; headings are found as GitHub names them."""
    missing = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        headings = re.findall(r"(?m)^#+ (.+)", text)
        anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            is_there = (path.parent / file).exists() if file else anchor in anchors
            if not is_there and not file.startswith(("http:", "https:")):
                missing.append((path.name, link))
    assert not missing


def test_a_newcomer_reads_what_it_does_and_how_before_how_well():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    order = [
        "## Two commands",
        "## Your own data",
        "## Predict",
        "## Models",
        "**Licences.**",
        "## Results",
        "## Licence",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    for name in (*KNOWN_WEIGHTS, *PACKAGED_WEIGHTS):
        if name.startswith("mask_rtdetr"):
            assert f"`{name}`" in text
    assert all(url in text for name, url in KNOWN_WEIGHTS.items() if name.startswith("mask_rtdetr"))


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / ".github/CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == instseg_jax.__version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f"## {instseg_jax.__version__}" in (ROOT / ".github/CHANGELOG.md").read_text(encoding="utf-8")


def test_files_of_tests_that_the_documents_name_are_there():
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    named = {name for text in texts for name in re.findall(r"tests/[\w*/]+\.py", text)}
    assert len(named) > 10
    assert not [name for name in named if not list(ROOT.glob(name))]


def test_fields_that_the_documents_name_are_there():
    config = load_config(EVERY_FIELD)
    sections = [name for name, value in config.items() if isinstance(value, ConfigDict)]
    pattern = rf"`(?:--config\.)?((?:{'|'.join(sections)})\.[a-z0-9_.]+)"
    # CONTRIBUTING makes fields up to show how one is added.
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name != "CONTRIBUTING.md"]
    named = {name for text in texts for name in re.findall(pattern, text)}
    named = {name for name in named if not name.endswith((".log", ".yaml", ".json", ".onnx"))}
    assert len(named) > 10
    assert "unknown field" in str(error_of(config, "train.epoch"))
    assert not [name for name in named if "unknown field" in str(error_of(config, name))]


def error_of(config: ConfigDict, field: str) -> ValueError | None:
    try:
        override(config, field, "None")
    except ValueError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "trian"),
        ("train --epochs=3", "--epochs"),
        ("predict --tile=640", "--input"),
        ("predict --input=a --tile=large", "'large'"),
        ("train --config=configs/none.py", "none.py"),
        ("train --config.train.epoch=3", "config.train.epochs"),
        ("evaluate --config.eval.tiles=3", "config.eval.tiles"),
        ("train --config.train.epochs=many  # not a placeholder", "'many'"),
    ],
)
def test_a_command_that_can_not_be_run_is_found(command, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        check_command(command)


def test_placeholders_stand_for_what_the_reader_has():
    options, overrides = parse_command("predict --tile=N --input=PICTURES [--weights=RUN] --config.data.dir=...")
    assert (options.tile, options.input, options.weights) == (1, "1", "1")
    assert overrides == {"data.dir": "..."}
    check_command("train --config=FILE --config.train.epochs=N --config.data.dir=DIR --workdir=runs/mine")
