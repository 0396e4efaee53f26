"""Exported models in place of checkpoints: finding an export's folder, and running it as a function of images.

An export is a folder with `config.json` and a model file, made by `export/export.py`. It brings its own
post-selection: it takes images and gives the best detections, as `postprocess.select_detections` does. Which runtime
runs it follows from its format; ONNX files run in ONNX Runtime and in OpenVINO.
"""

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.devices import select_devices
from instseg_jax.files import write_json
from instseg_jax.types import Detections

CONFIG = "config.json"
MODEL_FILES = {
    "stablehlo": "model.stablehlo",
    "onnx": "model.onnx",
    "ort": "model.ort",
    "openvino": "model.xml",
    "litert": "model.tflite",
}
BACKENDS = {  # what runs a format, the usual one first
    "stablehlo": ("jax",),
    "onnx": ("onnxruntime", "openvino"),
    "ort": ("onnxruntime",),
    "openvino": ("openvino",),
    "litert": ("litert",),
}
EXTRAS = {"onnxruntime": "export", "openvino": "openvino", "litert": "litert"}
OUTPUTS = ("scores", "labels", "boxes_xyxy", "mask_logits")


Run = Callable[[np.ndarray], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class Export:
    """An export's folder and what its config.json says."""

    folder: Path
    settings: dict[str, Any]
    backend: str | None = None  # None: the usual one of its format
    num_threads: int | None = None  # of the CPU; None: as the runtime likes

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        height, width = self.settings["preprocessing"]["size"]
        return int(height), int(width)

    @property
    def batch_size(self) -> int | None:
        """Images a call; None where any number goes."""
        return None if self.settings["dynamic_batch"] else int(self.settings["batch"])


def find_export(source: str | os.PathLike[str]) -> Path | None:
    """The folder of the export that `source` names: the folder itself, or the model file in it; None for anything else.

    Raises FileNotFoundError for a model file without the config.json that belongs beside it.
    """
    path = Path(source)
    if path.is_file() and path.name in MODEL_FILES.values():
        if not (path.parent / CONFIG).is_file():
            raise FileNotFoundError(f"{path} has no {CONFIG} beside it; name the folder that the verb export wrote")
        path = path.parent
    has_model = any((path / name).is_file() for name in MODEL_FILES.values())
    return path if has_model and (path / CONFIG).is_file() else None


def read_export(folder: str | os.PathLike[str]) -> Export:
    """Read an export's config.json. Raises ValueError where it is none of ours, or its model file is missing."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model_file = MODEL_FILES[settings["format"]]
        complete = {"preprocessing", "batch", "dynamic_batch", "class_names", "config", "compute_type"} <= set(settings)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder / CONFIG} can't be read ({error})") from error
    if not complete or not (folder / model_file).is_file():
        raise ValueError(f"{folder} is no whole export: {model_file} or a part of {CONFIG} is missing; export again")
    return Export(folder, settings)


def open_export(export: Export, *, device: str, num_detections: int) -> Callable[[np.ndarray], Detections]:
    """A function from images [B, H, W, C] float32 to the `num_detections` best detections of each, in numpy.

    Any B goes: where the export has a fixed batch, images are split into parts of it and the last one is filled up.
    Several threads may call it.

    Raises: ValueError for a device or a number of detections that the export does not have, ImportError that names
      the extra where its runtime is not installed.
    """
    asked, size = export.settings["num_detections"], export.size
    channels = export.settings["preprocessing"]["channels"]
    if num_detections > asked:
        raise ValueError(f"eval.num_detections is {num_detections}, but {export.folder} was exported with {asked}")
    run = _open(export, device)

    def predict(images: np.ndarray) -> Detections:
        images = np.asarray(images, np.float32)
        if images.ndim != 4 or images.shape[1:] != (*size, channels):
            wanted = f"[B, {size[0]}, {size[1]}, {channels}]"
            raise ValueError(f"{export.folder} takes images of shape {wanted}, got {list(images.shape)}")
        outputs = run_in_batches(run, images, export.batch_size)
        scores, labels, boxes_xyxy, mask_logits = (output[:, :num_detections] for output in outputs)
        return Detections(
            scores=scores.astype(np.float32),
            labels=labels.astype(np.int32),
            boxes_xyxy=boxes_xyxy.astype(np.float32),
            mask_logits=mask_logits,
        )

    return predict


def run_in_batches(run: Run, images: np.ndarray, batch_size: int | None) -> tuple[np.ndarray, ...]:
    """Call `run` with `batch_size` images at a time (None: all at once); the last part is filled up with black."""
    count = len(images)
    if batch_size is None or count == batch_size:
        return run(images)
    parts = []
    for start in range(0, count, batch_size):
        part = images[start : start + batch_size]
        real = len(part)
        if real < batch_size:
            part = np.concatenate([part, np.zeros((batch_size - real, *images.shape[1:]), images.dtype)])
        parts.append([output[:real] for output in run(part)])
    return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))


def with_backend(export: Export, backend: str | None, num_threads: int | None) -> Export:
    """The export, run by another runtime or with a number of threads. Raises ValueError where that can't be."""
    allowed = BACKENDS[export.settings["format"]]
    if backend is not None and backend not in allowed:
        raise ValueError(f"backend is {backend!r}, but an export as {export.settings['format']} runs in {allowed}")
    return dataclasses.replace(export, backend=backend, num_threads=num_threads)


def save_export_thresholds(export: Export, thresholds: Mapping[str, Any]) -> Path:
    """Store score thresholds {"overall", "classes"} in the export's config.json, for its postprocess.py too."""
    names = export.settings["class_names"]
    by_class = [thresholds["classes"].get(name, thresholds["overall"]) for name in names]
    settings = export.settings | {"stored_thresholds": dict(thresholds), "thresholds": by_class}
    return write_json(export.folder / CONFIG, settings, indent=2)


def _open(export: Export, device: str) -> Run:
    path = export.folder / MODEL_FILES[export.settings["format"]]
    backend = export.backend or BACKENDS[export.settings["format"]][0]
    if ":" in device and "," in device:
        raise ValueError(f"device is {device!r}, but an export runs on one device; name a single one")
    try:
        if backend == "jax":
            return _open_stablehlo(path, device)
        if backend == "onnxruntime":
            return _open_onnxruntime(path, export, device)
        if device.split(":")[0] not in ("auto", "cpu"):
            raise ValueError(f"device is {device!r}, but {backend} runs on the CPU here")
        return _open_openvino(path, export) if backend == "openvino" else _open_litert(path, export)
    except ImportError as error:
        raise ImportError(
            f'{path.name} runs in {backend}, which is not installed: pip install "instseg_jax[{EXTRAS[backend]}]"'
        ) from error


def _open_stablehlo(path: Path, device: str) -> Run:
    import jax.export

    chosen = select_devices(device)[0]
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    platform = "cuda" if chosen.platform == "gpu" else chosen.platform
    if platform not in exported.platforms:
        raise ValueError(f"device is {device!r}, but {path} was exported for {' and '.join(exported.platforms)}")
    call = jax.jit(exported.call)
    return lambda images: tuple(jax.device_get(call(jax.device_put(images, chosen))))


def _open_onnxruntime(path: Path, export: Export, device: str) -> Run:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    kind, _, index = device.partition(":")
    if kind == "tpu" or (kind == "gpu" and "CUDAExecutionProvider" not in available):
        raise ValueError(f"device is {device!r}, but the installed onnxruntime has {', '.join(available)}")
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind != "cpu" and "CUDAExecutionProvider" in available:
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(index or 0)}))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = export.num_threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    name = session.get_inputs()[0].name
    return lambda images: tuple(session.run(list(OUTPUTS), {name: np.ascontiguousarray(images)}))


def import_openvino() -> Any:
    """The module openvino, without its telemetry: that reports every import over the network, from a forked process."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _open_openvino(path: Path, export: Export) -> Run:
    openvino = import_openvino()
    # Without the hint OpenVINO computes in bfloat16 where the processor has it.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": export.settings["compute_type"]}
    if export.num_threads:
        settings["INFERENCE_NUM_THREADS"] = export.num_threads
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    ports = [compiled.output(name) for name in OUTPUTS]
    lock = threading.Lock()  # its one request is not for several threads

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        with lock:
            found = compiled(np.ascontiguousarray(images))
            return tuple(np.array(found[port]) for port in ports)

    return run


def _open_litert(path: Path, export: Export) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path), num_threads=export.num_threads).get_signature_runner()
    name = export.settings["inputs"][0]["name"]
    lock = threading.Lock()

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        with lock:
            found = runner(**{name: np.ascontiguousarray(images)})
            return tuple(np.array(found[output]) for output in OUTPUTS)

    return run
