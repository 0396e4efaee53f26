"""The notebooks: kept outputs that are small and clean, cells without logic, and that they run from top to bottom.

`python -m pytest -m slow -n 0 tests/test_notebooks.py` runs them all, in one temporary folder and in their order, so
that a model that one has trained is found by the next.
"""

import ast
import os
import pathlib
import re
import shutil

import pytest
from places import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES, MAX_BYTES_IN_ALL = 400_000, 2_000_000
QUICK = "01_data_and_augmentations.ipynb"
NEEDS_GEO = "06_from_qgis_to_a_map.ipynb"
OWN_LOSS = "07_own_loss.ipynb", "tversky"
# Import lines of rooms, by notebook: what it looks into has no public name. All else is of the public face.
INSIDE = {"01": 1, "02": 4, "03": 1, "04": 1, "05": 1, "06": 3}
# A folder of somebody's machine, in an output: /home/anna, /Users/anna, /tmp/x, C:\Users.
PLACES = re.compile(r"(?<![\w.])/(home|Users|root|tmp|work|mnt|var|opt)/|[A-Z]:\\\\")


def read(path: pathlib.Path):
    return nbformat.read(path, as_version=4)


def code_cells(path: pathlib.Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def shown_text(path: pathlib.Path) -> str:
    """All text that the kept outputs show."""
    parts = []
    for cell in code_cells(path):
        for output in cell.outputs:
            parts.append(output.get("text", ""))
            parts += [str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)


def python_of(source: str) -> str:
    """The cell without the lines that only a notebook understands: %magic and !command."""
    return "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))


def test_there_are_seven():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_", "06_", "07_"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MAX_BYTES_IN_ALL


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name[:2])
class TestKept:
    def test_is_valid_and_small(self, path):
        nbformat.validate(read(path))
        assert path.stat().st_size < MAX_BYTES

    def test_ran_from_top_to_bottom_and_shows_pictures(self, path):
        counts = [cell.execution_count for cell in code_cells(path)]
        assert counts == list(range(1, len(counts) + 1))
        outputs = [output for cell in code_cells(path) for output in cell.outputs]
        kinds = [kind for output in outputs for kind in output.get("data", {})]
        assert sum(kind.startswith("image/") for kind in kinds) >= 2
        assert not any(output.output_type == "error" for output in outputs)

    def test_outputs_hold_no_warnings_and_no_places_of_a_machine(self, path):
        for cell in code_cells(path):
            assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.source
        text = shown_text(path)
        assert len(text) > 100
        assert not PLACES.search(text), PLACES.search(text)
        assert not re.search(r"Warning\b|\bWARNING\b", text)
        streams = [output.text for cell in code_cells(path) for output in cell.outputs if "text" in output]
        assert "\x1b" not in "".join(streams)  # colours of a terminal; tables have them beside their HTML

    def test_cells_hold_no_logic(self, path):
        """What is worth a function is worth a place in the package, with a test; but for the loss that one writes."""
        for cell in code_cells(path):
            tree = ast.parse(python_of(cell.source))
            for node in ast.walk(tree):
                named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)
                is_own = isinstance(node, ast.FunctionDef) and (path.name, node.name) == OWN_LOSS
                assert is_own or not named, f"{path.name}: line {node.lineno} of\n{cell.source}"
            assert len(cell.source.splitlines()) <= 40, cell.source

    def test_imports_the_public_face(self, path):
        lines = "\n".join(cell.source for cell in code_cells(path)).splitlines()
        inside = [line for line in lines if re.match(r"\s*(from|import) instseg_jax\.", line)]
        assert len(inside) <= INSIDE.get(path.name[:2], 0), inside
        assert any(line.startswith(("from instseg_jax import", "import instseg_jax")) for line in lines)

    def test_reads_like_a_chapter(self, path):
        cells = read(path).cells
        assert cells[0].cell_type == "markdown"
        assert re.match(rf"# {int(path.name[:2])} · ", cells[0].source)
        assert "?" in cells[0].source  # it begins with a question
        assert "*To run it anywhere: " in cells[0].source
        markdown = sum(cell.cell_type == "markdown" for cell in cells)
        assert markdown >= 0.4 * len(cells)


def run(name: str, folder: pathlib.Path, monkeypatch) -> list:
    """Run a copy of a notebook in a folder; returns its cells. nbclient raises where one fails."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    shutil.copy(ROOT / "notebooks" / name, folder)
    notebook = read(folder / name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook.cells


def kinds_of(cells: list) -> list[set[str]]:
    """Of each code cell the kinds of its outputs: stream, text/plain, image/jpeg, ..."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", {output.output_type: None})}
        for cell in cells
        if cell.cell_type == "code"
    ]


def check_run(name: str, folder: pathlib.Path, monkeypatch) -> None:
    cells = run(name, folder, monkeypatch)
    assert kinds_of(cells) == kinds_of(read(ROOT / "notebooks" / name).cells)  # what is kept is what comes


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("notebooks")


def test_the_quick_one_runs(tmp_path, monkeypatch):
    check_run(QUICK, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name != QUICK], ids=lambda path: path.name[:2])
def test_runs(path, workshop, monkeypatch):
    if path.name == NEEDS_GEO:
        pytest.importorskip("rasterio")
    check_run(path.name, workshop, monkeypatch)
