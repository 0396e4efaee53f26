"""OpenVINO's format, made of the ONNX graph."""

import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.runtimes.onnx import make_graph
from instseg_jax.runtimes.shape import OUTPUTS, Shape, check_cpu


def write_openvino(
    path: Path, make_detect: Any, shape: Shape, precision: str, calibration: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write the file (model.bin beside it); `precision` "half" stores float16.

    8-bit graphs come quantized (`quantize.py`): NNCF's own quantization of everything cost 0.056 AP
    (N, facades).
    """
    import onnx

    openvino = import_openvino()
    graph, description = make_graph(make_detect, shape, precision, calibration)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        onnx.save(graph, str(plain))
        network = openvino.Core().read_model(str(plain))
        openvino.save_model(network, str(path), compress_to_fp16=precision == "half")
    return description


def import_openvino() -> Any:
    """The module openvino, without its telemetry: that reports every import over the network, from a forked process."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def open_openvino(path: Path, settings: Mapping[str, Any], device: str, num_threads: int | None) -> Any:
    """A function that runs an OpenVINO or ONNX file on the CPU. Raises ValueError for another device."""
    check_cpu(device, "openvino")
    openvino = import_openvino()
    # Without the hint OpenVINO computes in bfloat16 where the processor has it.
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": settings["compute_type"]}
    if num_threads:
        options["INFERENCE_NUM_THREADS"] = num_threads
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    ports = [compiled.output(name) for name in OUTPUTS]
    lock = threading.Lock()  # its one request is not for several threads

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        with lock:
            found = compiled(np.ascontiguousarray(images))
            return tuple(np.array(found[port]) for port in ports)

    return run
