"""The formats of exported models, each described once: everybody who asks about a format asks here."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.runtimes import deepness, litert, onnx, openvino, stablehlo
from instseg_jax.runtimes.shape import Shape

# Gives the function from images to the arrays of `shape.OUTPUTS`, in a floating type (None: as the network has it).
MakeDetect = Callable[[Any], Callable[..., tuple[Any, ...]]]
Compute = Callable[[np.ndarray], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What runs a model file."""

    open: Callable[..., Compute]  # (path, settings of the export, device, number of CPU threads or None)
    extra: str | None  # that installs it; None: it is there


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of model file."""

    file: str  # its name in an export's folder
    write: Callable[[Path, MakeDetect, Shape, str, Sequence[np.ndarray]], dict[str, Any]]  # what config.json says of it
    runtimes: tuple[str, ...]  # what runs it, the usual one first
    precisions: Mapping[str, str]  # what --half and --int8 make of it; one that is missing can't be asked for
    needs: tuple[str, ...]  # modules that write it
    extra: str = ""  # extras that install these
    has_dynamic_batch: bool = True
    # Changes the written file by what config.json says; gives what that says anew.
    finish: Callable[[Path, Mapping[str, Any]], dict[str, Any]] | None = None


RUNTIMES = {
    "jax": Runtime(stablehlo.open_stablehlo, None),
    "onnxruntime": Runtime(onnx.open_onnx, "export"),
    "openvino": Runtime(openvino.open_openvino, "openvino"),
    "litert": Runtime(litert.open_litert, "litert"),
    "deepness": Runtime(deepness.open_deepness, "export"),
}
FORMATS = {
    "stablehlo": Format("model.stablehlo", stablehlo.write_stablehlo, ("jax",), {"half": "bfloat16"}, ()),
    "onnx": Format(
        "model.onnx",
        onnx.write_onnx,
        ("onnxruntime", "openvino"),
        {"half": "float16", "int8": "int8"},
        ("onnx", "onnxruntime"),
        "export",
    ),
    "ort": Format(
        "model.ort",
        onnx.write_ort,
        ("onnxruntime",),
        {"int8": "int8"},  # its optimizer would turn stored float16 back
        ("onnx", "onnxruntime"),
        "export",
    ),
    "openvino": Format(
        "model.xml",
        openvino.write_openvino,
        ("openvino",),
        {"half": "bfloat16", "int8": "int8"},
        ("onnx", "onnxruntime", "openvino"),
        "export,openvino",
    ),
    "litert": Format(
        "model.tflite",
        litert.write_litert,
        ("litert",),
        {"half": "float16"},
        ("tensorflow", "ai_edge_litert"),
        "litert",
        has_dynamic_batch=False,
    ),
    "deepness": Format(
        "model.deepness.onnx",
        deepness.write_deepness,
        ("deepness",),
        {"half": "float16"},
        ("onnx", "onnxruntime"),
        "export",
        has_dynamic_batch=False,
        finish=deepness.finish_deepness,
    ),
}


def require(name: str) -> None:
    """Raise ImportError that names the extra where a library that writes the format `name` is not installed."""
    format = FORMATS[name]
    missing = [module for module in format.needs if not importlib.util.find_spec(module)]
    if missing:
        raise ImportError(f'{name} needs {" and ".join(missing)}: pip install "instseg_jax[{format.extra}]"')
