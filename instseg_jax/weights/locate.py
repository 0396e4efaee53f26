"""What lies at a path, a name or an address of weights: asked once, and handed on."""

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Literal

from instseg_jax.files import check_regular
from instseg_jax.runtimes.exported import find_export
from instseg_jax.weights.download import KNOWN_WEIGHTS, fetch_weights, is_downloadable

PRETRAINED = "mask_rtdetr_n_pretrained"
PACKAGED_WEIGHTS = {PRETRAINED: Path(__file__).parent / "pretrained" / "mask_rtdetr_n.safetensors"}
"""Weights that come with the package, by name; what they were trained on stands beside them in SOURCES.md."""
FILE_SUFFIXES = (".pdparams", ".pdema", ".safetensors")


@dataclasses.dataclass(frozen=True)
class Located:
    """A source of weights that is there."""

    kind: Literal["export", "checkpoint", "file"]
    path: Path  # the export's folder, the checkpoint's or run's folder as it was named, or the file
    source: str  # as it was named

    def __str__(self) -> str:
        return self.source


def locate(source: str | os.PathLike[str] | Located) -> Located:
    """Say what lies at `source`: an export, a checkpoint or run, or a file of weights; downloads what has an address.

    Args:
      source: path, http(s) address, or known name (`PACKAGED_WEIGHTS`, `download.KNOWN_WEIGHTS`).

    Raises: FileNotFoundError when there is nothing, ValueError when it is no weights.
    """
    if isinstance(source, Located):
        return source
    name = str(source)
    if name in PACKAGED_WEIGHTS:
        return Located("file", PACKAGED_WEIGHTS[name], name)
    if is_downloadable(name):
        return Located("file", fetch_weights(name), name)
    path = Path(source)
    if folder := find_export(path):
        return Located("export", folder, name)
    if path.suffix in FILE_SUFFIXES:
        if not path.exists():
            raise FileNotFoundError(f"there is no such file of weights: {path}{_nearest(path)}")
        check_regular(path)
        return Located("file", path, name)
    if path.is_file():
        raise ValueError(f"weights file {path} does not end with one of {', '.join(FILE_SUFFIXES)}")
    from instseg_jax.weights.checkpoint import is_checkpoint  # Orbax is slow to import

    if not path.exists() and not is_checkpoint(path):
        known = ", ".join([*KNOWN_WEIGHTS, *PACKAGED_WEIGHTS])
        raise FileNotFoundError(
            f"there is no such folder of weights: {name}{_nearest(path)} (weights with a name are {known})"
        )
    return Located("checkpoint", path, name)


def _nearest(path: Path) -> str:
    """`; did you mean ...?`, where something beside has nearly this name."""
    beside = sorted(child.name for child in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*beside, *(PACKAGED_WEIGHTS if path.parent == Path() else ())], 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def is_there(path: str | os.PathLike[str]) -> bool:
    """Say whether a folder holds an export or a checkpoint."""
    from instseg_jax.weights.checkpoint import is_checkpoint

    return find_export(path) is not None or is_checkpoint(path)
