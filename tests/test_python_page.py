"""The examples of `.github/docs/python.md` run, and the API page is what the docstrings say of every public name.

`python -m pytest -m slow -n 0 tests/test_python_page.py` runs the blocks that compile a training step, too.
"""

import ast
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


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_blocks(slow=False)
    assert names["shapes"] == [(64, 64, 3), (2,), (2 * names["mesh"].size,)]
    assert names["value"].shape == () and "confident" in names["terms"] and "loss/mask_dice" in names["terms"]


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
    for node in source.body:
        if isinstance(node, ast.FunctionDef) and node.name in defined:
            text = ast.get_docstring(node) or ""
            arguments = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            assert [name for name in arguments if f"{name}:" not in text and f"`{name}`" not in text] == [], node.name
            assert "Returns:" in text
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        instseg_jax.nothing  # noqa: B018
