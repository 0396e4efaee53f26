"""Reads the reference's numbers: cases, tensors whole or as samples (`NAME@s`), synthetic weights and images.

A case folder has the layout `VARIANT/eval_*`, `VARIANT/train_*`, `unit/*`, `preprocess/*`; it may lack any of
them. `$INSTSEG_PARITY` names another folder than the one kept here.
"""

import dataclasses
import functools
import json
import os
import pathlib

import numpy as np
import pytest
import synth

HERE = pathlib.Path(__file__).parent
CASES = pathlib.Path(os.environ.get("INSTSEG_PARITY", HERE / "cases"))
NOISE_FACTOR = 5.0  # tolerance of a float32 run, in units of the official float32 run's own error
RELATIVE_FLOOR = 1e-6  # ... and never asked below this


def find_cases(pattern: str) -> list[str]:
    """Names such as `s/eval_640` of the cases that match a glob over their .json files."""
    return sorted(str(path.relative_to(CASES).with_suffix("")) for path in CASES.glob(pattern))


@functools.cache
def official_weights(variant: str) -> dict[str, np.ndarray]:
    """Synthetic weights under their official names, rebuilt from names and shapes."""
    path = CASES / variant / "state_shapes.json"
    if not path.exists():
        path = HERE / "cases" / variant / "state_shapes.json"
    table = json.loads(path.read_text())["state"]
    return synth.synth_state({name: entry["shape"] for name, entry in table.items()})


@dataclasses.dataclass(frozen=True)
class Case:
    """One whole-model case. Tensors are NCHW, as the reference has them."""

    name: str
    info: dict
    tensors: dict[str, np.ndarray]
    tensors_f64: dict[str, np.ndarray]

    @property
    def variant(self) -> str:
        return self.info["_case"]["variant"]

    @property
    def original_sizes(self) -> list[tuple[int, int]]:
        return [tuple(size) for size in self.info["_case"]["orig_hw"]]

    def images(self) -> np.ndarray:
        """[B, H, W, 3] float32."""
        case = self.info["_case"]
        nchw = synth.synth_image(case["image_seed"], case["h"], case["w"], case["batch"])
        return nchw.transpose(0, 2, 3, 1)


def load_case(name: str) -> Case:
    path = CASES / name
    double = path.with_name(path.name + "_f64.npz")
    return Case(
        name,
        json.loads(path.with_suffix(".json").read_text()),
        dict(np.load(path.with_suffix(".npz"))),
        dict(np.load(double)) if double.exists() else {},
    )


def stored_values(
    tensors: dict[str, np.ndarray], name: str, mine: np.ndarray, drawn_as: str | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """(reference, mine) over the values that are stored of a tensor, whole or as samples; None when there are none.

    Args:
      drawn_as: name whose samples they are, where it is another one.
    """
    if name in tensors and tensors[name].shape == mine.shape:
        return tensors[name], mine
    reference = tensors.get(f"{name}@s", tensors.get(name) if drawn_as else None)
    if reference is None:
        assert name not in tensors, f"{name}: {tensors[name].shape} and {mine.shape}"
        return None
    return reference.reshape(-1), mine.reshape(-1)[synth.subsample_indices(drawn_as or name, mine.size, reference.size)]


def whole_tensor(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """A tensor of which all values are stored, as such or as samples; None when they aren't."""
    stored = tensors.get(name, tensors.get(f"{name}@s"))
    return stored.reshape(shape) if stored is not None and stored.size == np.prod(shape) else None


def relative_error(mine: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> float:
    """2-norm of the difference over that of the reference, or over `floor` where the reference is smaller."""
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), floor, np.finfo(np.float64).tiny))


def load_json(name: str) -> dict:
    """A JSON file of the case folder, or the one kept here where the folder lacks it."""
    path = CASES / name
    return json.loads((path if path.exists() else HERE / "cases" / name).read_text())


# What takes minutes is slow for the cases kept here; a folder that is named is always looked at whole.
HEAVY = [pytest.mark.slow] if "INSTSEG_PARITY" not in os.environ else []
REPORT: list[tuple[str, str, str]] = []  # (case, stage, figure), printed at the end of the run
