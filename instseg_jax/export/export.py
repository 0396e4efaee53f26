"""Exports: a trained model as a folder that other runtimes read, with proof that it finds the same.

    model.FORMAT        takes images, gives the best detections (`runtimes/shape.py`); beside OpenVINO's lies model.bin
    config.json         classes, preprocessing, thresholds, inputs and outputs, versions
    postprocess.py      runs the export with numpy and its runtime alone, from a picture to instances
    parity.json         how far the export is from the checkpoint, on real images

The folder is written aside and moved into place, so that an export that was there is lost to no failure. Where images
and scores come from is the caller's: no data set is read here.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from instseg_jax import pixels
from instseg_jax.config import check_side
from instseg_jax.export import parity
from instseg_jax.files import digest_file, replace_folder, seal, sync_tree, write_json, write_text
from instseg_jax.inference.optimize import optimize_for_inference
from instseg_jax.inference.pipeline import pick_threshold
from instseg_jax.inference.pipeline_config import load_pipeline_config
from instseg_jax.inference.postprocess import select_detections
from instseg_jax.inference.predictor import LoadedModel, load_exported, make_predict
from instseg_jax.messages import quote
from instseg_jax.models.mask_rtdetr import MaskRTDETR
from instseg_jax.runtimes.agreement import compare_runs
from instseg_jax.runtimes.exported import CONFIG, open_export, read_export
from instseg_jax.runtimes.formats import FORMATS, require
from instseg_jax.runtimes.onnx import build_graph
from instseg_jax.runtimes.shape import OUTPUTS, Shape
from instseg_jax.types import Outputs

VERSIONED = (
    "instseg_jax",
    "jax",
    "flax",
    "onnx",
    "onnxruntime",
    "openvino",
    "litert-torch",
    "numpy",
)

PARITY = "parity.json"
STANDALONE, PIXELS = Path(__file__).with_name("standalone.py"), Path(pixels.__file__)

if TYPE_CHECKING:
    import onnx

Score = Callable[[LoadedModel], dict[str, float | None]]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for."""

    format: str
    batch: int
    size: int  # of the square input, in pixels
    dynamic_batch: bool = False
    precision: str = ""  # "", half or int8

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"--format is {quote(self.format)}, it must be one of {', '.join(FORMATS)}")
        check_side("--size", self.size)
        if self.batch < 1:
            raise ValueError(f"--batch is {self.batch}, it must be at least 1")
        allowed = FORMATS[self.format].precisions
        if self.precision and self.precision not in allowed:
            others = ", ".join(f"--{name}" for name in allowed) or "neither"
            raise ValueError(f"--{self.precision} is not there for {self.format}, which has {others}")
        if self.dynamic_batch and not FORMATS[self.format].has_dynamic_batch:
            raise ValueError(f"--dynamic_batch is not there for {self.format}: its files have one batch size")

    @property
    def precision_name(self) -> str:
        """What the weights are stored as, by format: float32, float16, bfloat16 or int8."""
        return FORMATS[self.format].precisions[self.precision] if self.precision else "float32"


def export_model(
    model: LoadedModel,
    folder: str | os.PathLike[str],
    request: Request,
    *,
    source: str,
    images: Sequence[np.ndarray],
    calibration: Sequence[np.ndarray] = (),
    score: Score | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write an export of a loaded checkpoint into `folder`, replacing what is there; return its parity.json.

    Args:
      source: where the checkpoint is, to be told in the export.
      images: [size, size, C] float32, as the network takes them, on which checkpoint and export are compared.
      calibration: the same, from which the ranges of int8 values are taken.
      score: metrics of a model with the key "segm/AP", to tell before and after; None: no AP is told.
      say: told what is being done.

    Raises: ValueError for what can't be exported, OSError where `folder` can't be written, ImportError that names the
      extra where a library is missing.
    """
    folder = Path(folder).absolute()
    network = model.network
    if request.precision == "int8" and not len(calibration):
        raise ValueError("--int8 needs pictures to calibrate on; name a folder of them with --calibration=DIR")
    aside = _make_aside(folder)
    try:
        say(f"writing {request.format}, {request.precision_name}, {request.size} px")
        started = time.monotonic()
        require(request.format)
        data = model.config.data
        shape = Shape(request.batch, (request.size, request.size), data.channels, request.dynamic_batch)
        make_detect = functools.partial(
            make_detect_function, network, model.variables, model.config.eval.num_detections
        )
        path = aside / FORMATS[request.format].file
        said = FORMATS[request.format].write(path, make_detect, shape, request.precision, calibration)
        config = _describe(model, request, source, said)
        finish = FORMATS[request.format].finish
        config |= {} if finish is None else finish(path, config)
        seconds = time.monotonic() - started
        config["files"] = {file.name: digest_file(file) for file in sorted(aside.glob("model.*"))}
        write_json(aside / CONFIG, seal(config), indent=2)
        write_text(aside / "postprocess.py", standalone_text())
        report = _compare(model, aside, request, images, score, say)
        if "quantization" in config:
            report["quantization"] = _in_short(config["quantization"])
        report["seconds"] = {"writing": round(seconds, 1), "all": round(time.monotonic() - started, 1)}
        report["megabytes"] = round(sum(file.stat().st_size for file in aside.glob("model.*")) / 1e6, 2)
        write_json(aside / PARITY, report, indent=2)
        sync_tree(aside)
        replace_folder(folder, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def make_detect_function(
    model: Any, variables: dict, num_detections: int, dtype: Any = None
) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """A function from images to the arrays of OUTPUTS, weights inside; with a dtype they are kept and used in it."""
    if isinstance(model, MaskRTDETR):
        model = model.clone(dtype=dtype)  # without one: half precision is for the runtime to choose
    model, variables = optimize_for_inference(model, variables)
    variables = jax.tree.map(lambda x: np.asarray(x, dtype or jnp.float32), variables)

    def detect(images: jax.Array) -> tuple[jax.Array, ...]:
        # Weights that are kept in fewer bits are float32 for the network, which casts where it may.
        restored = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), variables)
        outputs = cast(Outputs, model.apply(restored, images))
        found = select_detections(outputs, num_detections=num_detections)
        return tuple(getattr(found, name).astype(_TYPES[name]) for name in OUTPUTS)

    return detect


_TYPES = {"scores": jnp.float32, "labels": jnp.int32, "boxes_xyxy": jnp.float32, "mask_logits": jnp.float32}


def build_onnx(model: Any, variables: dict, shape: Shape, *, num_detections: int) -> "onnx.ModelProto":
    """The ONNX graph of a network (as trained, or optimised already) with `select_detections` behind it."""
    return build_graph(make_detect_function(model, variables, num_detections), shape)


def _compare(
    model: LoadedModel,
    folder: Path,
    request: Request,
    images: Sequence[np.ndarray],
    score: Score | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What parity.json says."""
    say(f"comparing with the checkpoint on {len(images)} images")
    sized = _with_size(model, request.size)
    export = read_export(folder)
    exported = load_exported(export)
    count = model.config.eval.num_detections
    predict = make_predict(model.network, num_detections=count)
    report: dict[str, Any] = {
        "format": request.format,
        "precision": request.precision_name,
        "images": len(images),
        **compare_runs(
            lambda batch: predict(model.variables, jnp.asarray(batch)),
            open_export(export, device="auto", num_detections=count),
            images,
        ),
        "ap": None,
        "bounds": parity.BOUNDS[request.precision_name],
    }
    if score is not None:
        say("scoring the checkpoint and the export")
        before, after = score(sized), score(exported)
        ap, ap_after = before["segm/AP"], after["segm/AP"]
        loss = None if ap is None or ap_after is None else ap - ap_after
        report["ap"] = {"checkpoint": before, "export": after, "loss": loss}
    report["warnings"] = parity.find_warnings(report, request.precision_name)
    return report


def _in_short(quantization: dict[str, Any]) -> dict[str, Any]:
    """What parity.json says of the search that config.json tells in full."""
    in_float = sum(len(group["layers"]) for group in quantization["in_float32"])
    kept = {name: quantization[name] for name in ("layers", "in_8_bits", "work_in_8_bits", "agreement")}
    return kept | {"in_float32": in_float}


def _with_size(model: LoadedModel, size: int) -> LoadedModel:
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.image_size = size
    return dataclasses.replace(model, config=config)


def _describe(model: LoadedModel, request: Request, source: str, said: dict[str, Any]) -> dict[str, Any]:
    """What config.json says."""
    config = _with_size(model, request.size).config
    ranges = config.data.channel_ranges if config.data.scaling == "percentile" else None
    return {
        "format": request.format,
        "model_file": FORMATS[request.format].file,
        "precision": request.precision_name,
        "compute_type": "bf16" if request.precision_name == "bfloat16" else "f32",
        "model_name": config.model.name,
        "source": source,
        "batch": request.batch,
        "dynamic_batch": request.dynamic_batch,
        "num_detections": config.eval.num_detections,
        **said,
        "class_names": list(model.class_names),
        "category_ids": list(model.category_ids),
        "thresholds": pick_threshold(None, model, load_pipeline_config("instance_segmentation")).tolist(),
        "stored_thresholds": model.thresholds,
        "preprocessing": {
            "size": [request.size, request.size],
            "resize": config.data.resize,
            "interpolation": config.data.eval_interpolation,
            "channels": config.data.channels,
            "channel_ranges": None if ranges is None else [list(pair) for pair in ranges],
            "layout": "[batch, height, width, channel], RGB, float32, 0..1",
        },
        "config": json.loads(config.to_json_best_effort()),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _make_aside(folder: Path) -> Path:
    """A new folder beside `folder`, hidden, on the same file system. Raises OSError that says what can't be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; an export is a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds something else than an export, and an export would replace it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        aside.mkdir()
    except OSError as error:
        raise type(error)(f"can't write an export to {folder} ({error.strerror})") from error
    return aside


def standalone_text() -> str:
    """The text of postprocess.py: `standalone.py`, and in place of its import the whole of `pixels.py`."""
    shared = "from instseg_jax.pixels import decode, to_uint8\n"
    return STANDALONE.read_text(encoding="utf-8").replace(shared, PIXELS.read_text(encoding="utf-8"), 1)
