"""The quickest runtime for a checkpoint, found by trying: what `use_hpip=True` asks for.

The checkpoint is exported once, to ONNX, into a folder beside it. Every runtime that is installed and can run that file
is timed against the compiled network on the machine at hand; the times stand in `choice.json` in that folder, so that
the next start takes the quickest without trying. An export that finds something else than the checkpoint is not used.
"""

import dataclasses
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instseg_jax.devices import make_mesh, select_devices
from instseg_jax.export.export import PARITY, Request, export_model
from instseg_jax.files import read_json, write_json
from instseg_jax.inference.pipeline_config import HighPerformance
from instseg_jax.inference.predictor import LoadedModel, bind
from instseg_jax.runtimes.exported import CONFIG, Export, open_export, read_export, with_backend
from instseg_jax.runtimes.formats import FORMATS, RUNTIMES
from instseg_jax.types import Detections
from instseg_jax.weights.checkpoint import checkpoint_folder

CHOICE = "choice.json"
COMPILED = "xla"  # the network as JAX compiles it
TRIED = FORMATS["onnx"].runtimes
REPEATS = 3

Detect = Callable[[np.ndarray], Detections]

log = logging.getLogger(__name__)


def accelerate(model: LoadedModel, wanted: HighPerformance, *, device: str, batch_size: int) -> LoadedModel:
    """The model as the quickest runtime runs it, or as it is where nothing is quicker.

    Raises: ImportError that names the extra when no other runtime is installed, or the one that `wanted` names is not.
    """
    if wanted.backend == COMPILED:
        return model
    if wanted.backend is None and (device.startswith(("gpu", "tpu")) or jax.default_backend() != "cpu"):
        log.info("use_hpip: on %s the compiled network is used", device)
        return model
    names = [wanted.backend] if wanted.backend else list(TRIED)
    installed = [name for name in names if importlib.util.find_spec(name)]
    if not installed or not importlib.util.find_spec("onnx"):
        missing = wanted.backend if wanted.backend and not installed else "onnxruntime"
        extras = ",".join(sorted({FORMATS["onnx"].extra, str(RUNTIMES[missing].extra)}))
        raise ImportError(f'use_hpip needs {missing} and onnx: pip install "instseg_jax[{extras}]"')
    folder = _cache_folder(model, batch_size)
    export = _read_cached(folder, model) or _export(model, folder, batch_size)
    if differences := read_json(folder / PARITY)["warnings"]:  # kept: the next start would find the same
        log.warning("use_hpip: the compiled network is used, since %s", "; ".join(differences))
        return model
    if wanted.backend is None:
        times = _times(model, export, folder, installed, wanted.num_threads, batch_size)
        ranked = sorted(times, key=lambda name: times[name])
        shown = ", ".join(f"{name} {1e3 * times[name]:.0f} ms" for name in ranked)
        log.info("use_hpip: %s is used (%s)", ranked[0], shown)
        if ranked[0] == COMPILED:
            return model
        wanted = HighPerformance(ranked[0], wanted.num_threads)
    # The checkpoint's own config and thresholds, which may have changed since it was exported.
    export = with_backend(export, wanted.backend, wanted.num_threads)
    return dataclasses.replace(model, model=None, variables={}, exported=export)


def _cache_folder(model: LoadedModel, batch_size: int) -> Path:
    """Where the export of a checkpoint is kept: beside its arrays, so that it goes when they are replaced."""
    name = f"hpip-{model.config.data.image_size}px-{batch_size}"
    inside, is_replaced_whole = checkpoint_folder(model.source)
    folder = inside / name if is_replaced_whole else inside.with_name(f"{inside.name}.{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="instseg-"))
        log.warning("use_hpip: nothing can be kept beside %s; the export is made anew each time", model.source)
    return folder


def _read_cached(folder: Path, model: LoadedModel) -> Export | None:
    """The export in a cache folder; None where there is none, or one of an older file or other settings."""
    try:
        export = read_export(folder)
    except ValueError:
        return None
    if not (folder / PARITY).is_file():
        return None
    source = Path(model.source)
    is_current = not source.is_file() or source.stat().st_mtime <= (folder / CONFIG).stat().st_mtime
    return export if is_current and export.settings["num_detections"] == model.config.eval.num_detections else None


def _export(model: LoadedModel, folder: Path, batch_size: int) -> Export:
    """Export into `folder`."""
    data = model.config.data
    log.info("use_hpip: exporting %s, once", model.source)
    rng = np.random.default_rng(0)
    coarse = rng.random((2, data.image_size // 32, data.image_size // 32, data.channels), np.float32)
    images = list(coarse.repeat(32, axis=1).repeat(32, axis=2))
    request = Request("onnx", batch_size, data.image_size)
    export_model(model, folder, request, source=str(model.source), images=images, say=log.info)
    return read_export(folder)


def _times(
    model: LoadedModel, export: Export, folder: Path, installed: list[str], threads: int | None, batch_size: int
) -> dict[str, float]:
    """Seconds a batch of each runtime; kept with the versions and threads that they hold for."""
    asked: dict[str, Any] = {
        "installed": installed,
        "threads": threads,
        "versions": export.settings["versions"],
    }
    try:
        kept = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
        if kept["for"] == asked:
            return kept["seconds"]
    except (OSError, ValueError, KeyError):
        pass
    height, width = export.size
    images = np.zeros((batch_size, height, width, model.config.data.channels), np.float32)
    count = model.config.eval.num_detections
    runs: dict[str, Detect] = {COMPILED: bind(model, make_mesh(select_devices("cpu")[:1]), device="cpu")}
    for name in installed:
        runs[name] = open_export(with_backend(export, name, threads), device="cpu", num_detections=count)
    seconds = {name: _time(run, images) for name, run in runs.items()}
    write_json(folder / CHOICE, {"for": asked, "seconds": seconds}, indent=2)
    return seconds


def _time(run: Detect, images: np.ndarray) -> float:
    """The least seconds of a call, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        jax.block_until_ready(run(images))
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
