"""The examples of `.github/docs/python.md` run, and the API page is what the docstrings say of every public name.

`python -m pytest -m slow -n 0 tests/test_python_page.py` runs the blocks that compile a training step, too.
"""

import ast
import inspect
import re

import pytest
from api_page import PAGE, api_page
from places import ROOT

import instseg_jax

BLOCK = re.compile(r"^```python( run=slow)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(*, slow: bool) -> dict:
    """Run the blocks in one namespace, as a reader would; gives the namespace."""
    page = ROOT / ".github" / "docs" / "python.md"
    names: dict = {}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert len(blocks) > 8 and any(marked for marked, _ in blocks)
    for marked, source in blocks:
        if slow or not marked:
            exec(compile(source, str(page), "exec"), names)
    return names


def test_the_page_tells_every_public_name():
    blocks = BLOCK.findall((ROOT / ".github" / "docs" / "python.md").read_text(encoding="utf-8"))
    code = "\n".join(source for _, source in blocks)
    names = set(instseg_jax.__all__) - {"__version__"}
    assert [name for name in sorted(names) if not re.search(rf"instseg_jax\.{name}\b", code)] == []


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(slow=False)
    assert names["shapes"] == [(64, 64, 3), (2,), (2 * names["mesh"].size,)]
    assert names["value"].shape == () and "missed" in names["terms"] and "loss/mask_dice" in names["terms"]


@pytest.mark.slow
def test_the_examples_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(slow=True)
    assert names["outputs"].mask_logits.shape[2:] == (16, 16)
    assert len(names["found"]) >= 2
    assert int(names["state"].step) == 4 and not names["metrics"]["skipped"]
    assert (tmp_path / "runs" / "own" / "best_model").is_dir()


def test_the_api_page_is_made_from_the_docstrings():
    assert PAGE.read_text(encoding="utf-8") == api_page(), "run python tests/helpers/api_page.py"


def test_every_public_name_is_told_whole():
    """Each has a docstring that names its parameters, and is on the page; `__all__` has all that the module defines."""
    source = ast.parse((ROOT / "instseg_jax" / "__init__.py").read_text(encoding="utf-8"))
    defined = {n.name for n in source.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
    assert {*defined, *instseg_jax._ELSEWHERE, "__version__"} == set(instseg_jax.__all__)
    for name in instseg_jax.__all__:
        function = getattr(instseg_jax, name)
        if inspect.isfunction(function):
            text = inspect.getdoc(function) or ""
            arguments = [argument.lstrip("*") for argument in inspect.signature(function).parameters]
            assert [a for a in arguments if f"{a}:" not in text and f"`{a}`" not in text] == [], name
            assert "Returns:" in text or inspect.signature(function).return_annotation in (None, "None"), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        instseg_jax.nothing  # noqa: B018
