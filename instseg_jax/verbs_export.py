"""The verb `export`, and the export at the end of a training: put data, model and export together."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from instseg_jax import images
from instseg_jax.bands import build_bands
from instseg_jax.data import coco
from instseg_jax.data.source import build_dataset
from instseg_jax.inference.predictor import LoadedModel
from instseg_jax.inference.sources import find_sources, with_bands
from instseg_jax.verbs_evaluation import load_with_overrides, score_loaded
from instseg_jax.weights import checkpoint

COMPARED = 8  # images that checkpoint and export are compared on
CALIBRATION_IMAGES = 100  # evenly over those there are
SCORES = ("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50")  # that are told before and after
BEST_EXPORT = "inference"  # in best_model/, as the official workflow has it


def export(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> int:
    """Write an export, and say how far it is from the checkpoint."""
    from instseg_jax.deploy.export import Request, export_model

    if options.half and options.int8:
        raise ValueError("--half and --int8 exclude each other")
    weights = options.weights or options.workdir
    precision = "half" if options.half else "int8" if options.int8 else ""
    # What is wrong with the request alone is told before weights are read.
    Request(options.format, options.batch, options.size or 640, options.dynamic_batch, precision)
    model = load_with_overrides(config, weights)
    _ = model.network
    size = options.size or model.config.data.image_size
    request = Request(options.format, options.batch, size, options.dynamic_batch, precision)
    if options.data:
        model = _with_data(model, options.data)
    folder = Path(options.workdir) / "export" / "-".join(filter(None, [options.format, precision]))
    report = export_model(
        model,
        folder,
        request,
        source=str(weights),
        images=comparison_images(model, size),
        calibration=calibration_images(model, size, options.calibration) if options.int8 else (),
        score=_score if options.data else None,
    )
    print_report(report, folder)
    return 0


def check_best_export(config: ConfigDict) -> None:
    """Before a training: raise ValueError when `checkpoint.export` names no format, ImportError without its extra."""
    from instseg_jax.deploy.export import FORMATS
    from instseg_jax.deploy.writers import require

    name = config.checkpoint.export
    if name and name not in FORMATS:
        raise ValueError(f"checkpoint.export is {name!r}, it must be empty or one of {', '.join(FORMATS)}")
    if name:
        require(name)


def export_best(workdir: str | os.PathLike[str], format: str, say: Callable[[str], None] = print) -> Path:
    """Export the best model of a run into best_model/inference, as `checkpoint.export` asks for."""
    from instseg_jax.deploy.export import Request, export_model
    from instseg_jax.inference.predictor import load_model

    best = Path(workdir) / checkpoint.BEST_MODEL
    model = load_model(best)
    size = model.config.data.image_size
    folder = best / BEST_EXPORT
    images = comparison_images(model, size)
    report = export_model(model, folder, Request(format, 1, size), source=checkpoint.BEST_MODEL, images=images, say=say)
    print_report(report, folder)
    return folder


def print_report(report: dict, folder: Path) -> None:
    """The parity of an export, in a few lines; warnings last."""
    largest = report["largest_difference"]
    if largest["scores"] is not None:
        print(
            f"     {report['matched_share']:.1%} of {report['compared']} detections found again; "
            f"mask IoU {report['mask_iou_mean']:.4f} (least {report['mask_iou_min']:.3f}); "
            f"largest difference of scores {largest['scores']:.2g}, boxes {largest['boxes_xyxy']:.2g}, "
            f"mask logits {largest['mask_logits']:.2g}"
        )
    if report["ap"]:
        for name, before in report["ap"]["checkpoint"].items():
            after = report["ap"]["export"][name]
            if before is not None and after is not None:
                print(f"     {name}: {before:.4f} before, {after:.4f} after")
    for warning in report["warnings"]:
        print(f"WARNING: {warning}")
    print(f"{report['format']}, {report['precision']}, {report['megabytes']:.1f} MB: {folder}")


def comparison_images(model: LoadedModel, size: int) -> list[np.ndarray]:
    """Images to compare on, [size, size, C]: validation images of the model's data, where that is there.

    Else the embedded pictures; a model of other channels then gets noise.
    """
    data = model.config.data
    try:
        return _network_inputs(build_dataset(data, "val"), model, size, COMPARED)
    except (OSError, ValueError):
        if build_bands(data) is not None:
            rng = np.random.default_rng(0)
            return list(rng.random((COMPARED, size, size, data.channels), np.float32))
    embedded = coco.read_split(coco.EMBEDDED, "val")
    return _network_inputs(embedded, model, size, COMPARED)


def calibration_images(model: LoadedModel, size: int, folder: str | None) -> list[np.ndarray]:
    """Images to calibrate on: the pictures of a folder, or the training images of a data set or of the model's data.

    Raises: ValueError where there are none.
    """
    if folder is not None and not (Path(folder) / "annotations").is_dir():
        sources, _ = find_sources(folder, channels="rgb")
        bands = build_bands(model.config.data)
        listed = list(sources)
        chosen = [listed[i] for i in _evenly(len(listed), CALIBRATION_IMAGES)]
        pictures = [(with_bands(source, bands=bands) if bands else source).read() for source in chosen]
        return [_prepare(picture, model, size) for picture in pictures]
    try:
        dataset = build_dataset((_with_data(model, folder) if folder else model).config.data, "train")
        return _network_inputs(dataset, model, size, CALIBRATION_IMAGES)
    except (OSError, ValueError) as error:
        raise ValueError(f"--int8 has no pictures to calibrate on ({error}); name some with --calibration") from error


def _score(model: LoadedModel) -> dict[str, float | None]:
    """The metrics that an export tells before and after."""
    metrics, _ = score_loaded(model)
    return {name: metrics[name] for name in SCORES}


def _network_inputs(dataset: coco.CocoDataset, model: LoadedModel, size: int, count: int) -> list[np.ndarray]:
    """Pictures evenly over a data set, as the network takes them."""
    return [_prepare(dataset.read_image(i), model, size) for i in _evenly(len(dataset), count)]


def _prepare(picture: np.ndarray, model: LoadedModel, size: int) -> np.ndarray:
    data = model.config.data
    return images.preprocess(picture, (size, size), resize=data.resize, interpolation=data.eval_interpolation)[0]


def _evenly(length: int, count: int) -> Sequence[int]:
    """At most `count` positions, evenly over `length`."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


def _with_data(model: LoadedModel, folder: str) -> LoadedModel:
    """The model with another folder of data."""
    config = model.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.update(dir=folder, source="folder")
        for field in ("train_annotations", "val_annotations", "train_images", "val_images"):
            config.data[field] = None
    return dataclasses.replace(model, config=config)
