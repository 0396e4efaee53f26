"""Exported models in place of checkpoints: finding an export's folder, and running it as a function of images.

An export is a folder with `config.json` and a model file, made by `export/export.py`. It brings its own
post-selection: it takes images and gives the best detections, as `postprocess.select_detections` does.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.files import check_seal, digest_file, read_json, seal, write_json
from instseg_jax.messages import quote, shorten
from instseg_jax.runtimes.formats import FORMATS, RUNTIMES, Compute
from instseg_jax.types import Detections

CONFIG = "config.json"


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
    path, files = Path(source), {format.file for format in FORMATS.values()}
    if path.is_file() and path.name in files:
        if not (path.parent / CONFIG).is_file():
            raise FileNotFoundError(f"{path} has no {CONFIG} beside it; name the folder that the verb export wrote")
        path = path.parent
    has_model = any((path / name).is_file() for name in files)
    return path if has_model and (path / CONFIG).is_file() else None


def read_export(folder: str | os.PathLike[str]) -> Export:
    """Read an export's config.json. Raises ValueError where it is none of ours, or its model file is missing."""
    folder = Path(folder)
    try:
        settings = check_seal(read_json(folder / CONFIG), folder / CONFIG)
        model_file = FORMATS[settings["format"]].file
        complete = {"preprocessing", "batch", "dynamic_batch", "class_names", "config", "compute_type"} <= set(settings)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder / CONFIG} can't be read ({shorten(error)})") from error
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


def run_in_batches(run: Compute, images: np.ndarray, batch_size: int | None) -> tuple[np.ndarray, ...]:
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
    allowed = FORMATS[export.settings["format"]].runtimes
    if backend is not None and backend not in allowed:
        raise ValueError(f"backend is {quote(backend)}, but an export as {export.settings['format']} runs in {allowed}")
    return dataclasses.replace(export, backend=backend, num_threads=num_threads)


def save_export_thresholds(export: Export, thresholds: Mapping[str, Any]) -> Path:
    """Store score thresholds {"overall", "classes"} in the export's config.json, for its postprocess.py too."""
    names = export.settings["class_names"]
    by_class = [thresholds["classes"].get(name, thresholds["overall"]) for name in names]
    settings = export.settings | {"stored_thresholds": dict(thresholds), "thresholds": by_class}
    return write_json(export.folder / CONFIG, seal(settings), indent=2, durable=True)


def check_files(export: Export) -> None:
    """Raise ValueError that names a file of the export which is missing or not what was written.

    Exports of before there were digests pass.
    """
    for name, wanted in export.settings.get("files", {}).items():
        path = export.folder / name
        if not path.is_file():
            raise ValueError(f"{export.folder} is no whole export: {name} is missing; export again")
        if digest_file(path) != wanted:
            raise ValueError(f"{path} is damaged: its content is not what was written; export again")


def _open(export: Export, device: str) -> Compute:
    format = FORMATS[export.settings["format"]]
    name = export.backend or format.runtimes[0]
    check_files(export)
    if ":" in device and "," in device:
        raise ValueError(f"device is {quote(device)}, but an export runs on one device; name a single one")
    try:
        return RUNTIMES[name].open(export.folder / format.file, export.settings, device, export.num_threads)
    except ImportError as error:
        extra = RUNTIMES[name].extra
        raise ImportError(
            f'{format.file} runs in {name}, which is not installed: pip install "instseg_jax[{extra}]"'
        ) from error
