"""Who may import whom: the rooms of the package stay apart, and heavy libraries stay in theirs."""

import ast
import functools
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "instseg_jax"
GROUND = {
    "types",
    "boxes",
    "brush_rle",
    "masks",
    "crops",
    "outlines",
    "windows",
    "images",
    "cluster",
    "compiled",
    "bands",
    "pixels",
    "files",
    "commands",
    "messages",
    "peers",
    "config",
    "devices",
    "memory",
    "options",
    "packing",
    "progress",
}
ALLOWED = {
    "models": {"models"},
    "data": {"data", "geo"},
    "runtimes": {"runtimes", "models"},
    "weights": {"weights", "models", "runtimes"},
    "geo": {"geo"},
    "results": {"results", "geo"},
    "inference": {"inference", "models", "weights", "runtimes", "geo", "results"},
    "jobs": {"jobs", "inference", "results", "geo"},
    "evaluation": {"evaluation", "inference.postprocess"},
    "scoring": {"scoring", "data", "evaluation", "geo", "inference", "results"},
    "training": {"training", "models", "data", "weights", "evaluation", "inference", "scoring"},
    "export": {"export", "inference", "models", "weights", "runtimes"},
    "serving": {"serving", "inference", "results"},
    "benchmarks": {"benchmarks", "data", "export", "inference", "models", "runtimes", "training"},
    "sweeps": {"sweeps", "training.workdir"},
}
ONLY_IN = {
    "optax": "training/",
    "scipy": "training/matching.py",
    "orbax": "weights/checkpoint.py",
    "fastapi": "serving/",
    "uvicorn": "serving/connections.py",
    "h11": "serving/connections.py",
    "prometheus_client": "serving/metrics.py",
    "rasterio": ("pixels.py", "geo/"),
    "ray": "cluster.py",
    "yaml": ("files.py", "inference/pipeline_config.py"),
    "flax": "models/",
    "pycocotools": ("masks.py", "evaluation/", "data/", "inference/", "scoring/"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def imported_modules(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    # The public face and the command line may use every room; the ground floor uses none.
    room_may = ALLOWED.get(room, None if room in ("__init__", "cli", "verbs") else set())
    for module in imported_modules(path):
        if not module.startswith("instseg_jax.") or room_may is None:
            continue
        inner = module.removeprefix("instseg_jax.")
        is_allowed = inner.split(".")[0] in GROUND or any(inner.startswith(prefix) for prefix in room_may)
        assert is_allowed, f"{path.relative_to(PACKAGE)} imports {module}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_room(library):
    homes = ONLY_IN[library]
    users = [str(path.relative_to(PACKAGE)) for path in FILES if any(
        module.split(".")[0] == library for module in imported_modules(path)
    )]  # fmt: skip
    assert users, f"nothing imports {library}"
    assert all(user.startswith(homes) for user in users), users


def test_no_function_has_hidden_recipe_defaults():
    """Only the tops of verbs and `build_*` functions see a config; `config.get(name, default)` is nowhere."""
    for path in FILES:
        assert "config.get(" not in path.read_text(encoding="utf-8"), path


def test_the_table_for_contributors_is_the_one_above():
    text = (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (`.+`) \|$", text, re.MULTILINE))
    assert {room: set(re.findall("`([^`]+)`", cell)) for room, cell in rows.items()} == ALLOWED


def test_no_test_imports_another_test():
    """What several tests share is in `tests/helpers`."""
    for path in sorted((PACKAGE.parent / "tests").rglob("*.py")):
        imported = {module.split(".")[0] for module in imported_modules(path)}
        assert not [name for name in imported if name.startswith("test_")], path
