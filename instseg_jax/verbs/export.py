"""The verb `export`, and the export at the end of a training: put data, model and export together."""

import argparse
import os
from pathlib import Path

from ml_collections import ConfigDict

from instseg_jax.commands import print_next
from instseg_jax.inference.predictor import LoadedModel, load_with_overrides
from instseg_jax.messages import quote
from instseg_jax.scoring.pictures import _with_data, calibration_images, comparison_images
from instseg_jax.scoring.run import score_loaded
from instseg_jax.weights import checkpoint

SCORES = ("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50")  # that are told before and after
BEST_EXPORT = "inference"  # in best_model/, as the official workflow has it


def export(options: argparse.Namespace) -> int:
    """Write an export, and say how far it is from the checkpoint."""
    from instseg_jax.export.export import Request, export_model

    if options.half and options.int8:
        raise ValueError("--half and --int8 exclude each other")
    weights = options.weights or options.workdir
    precision = "half" if options.half else "int8" if options.int8 else ""
    is_triton = options.format == "triton"
    if is_triton:  # a repository around an ONNX file of any batch size
        options.format, batch, options.batch, options.dynamic_batch = "onnx", options.batch, 1, True
    # What is wrong with the request alone is told before weights are read.
    Request(options.format, options.batch, options.size or 640, options.dynamic_batch, precision)
    model = load_with_overrides(weights, options.config, options.overrides)
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
    if is_triton:
        from instseg_jax.export.triton import write_repository

        name = "-".join(filter(None, ["triton", precision]))
        print(f"model repository: {write_repository(folder, folder.with_name(name), batch=batch)}")
    print_next("predict", f"--weights={folder}", "--input=YOUR_PICTURES")
    return 0


def check_best_export(config: ConfigDict) -> None:
    """Before a training: raise ValueError when `checkpoint.export` names no format, ImportError without its extra."""
    from instseg_jax.runtimes.formats import FORMATS, require

    name = config.checkpoint.export
    if name and name not in FORMATS:
        raise ValueError(f"checkpoint.export is {quote(name)}, it must be empty or one of {', '.join(FORMATS)}")
    if name:
        require(name)


def export_best(config: ConfigDict, workdir: str | os.PathLike[str]) -> None:
    """Export the best model of a run into best_model/inference, where `checkpoint.export` asks for it."""
    if not config.checkpoint.export:
        return
    from instseg_jax.export.export import Request, export_model
    from instseg_jax.inference.predictor import load_model

    best = Path(workdir) / checkpoint.BEST_MODEL
    model = load_model(best)
    size = model.config.data.image_size
    folder = best / BEST_EXPORT
    images = comparison_images(model, size)
    request = Request(config.checkpoint.export, 1, size)
    print_report(export_model(model, folder, request, source=checkpoint.BEST_MODEL, images=images), folder)


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
    if "quantization" in report:
        said = report["quantization"]
        print(
            f"     {said['in_8_bits']} of {said['layers']} layers in 8 bits, {said['work_in_8_bits']:.0%} of the work; "
            f"{said['in_float32']} sensitive ones stay float32 (config.json names them)"
        )
    if report["ap"]:
        for name, before in report["ap"]["checkpoint"].items():
            after = report["ap"]["export"][name]
            if before is not None and after is not None:
                print(f"     {name}: {before:.4f} before, {after:.4f} after")
    for warning in report["warnings"]:
        print(f"WARNING: {warning}")
    print(f"{report['format']}, {report['precision']}, {report['megabytes']:.1f} MB: {folder}")


def _score(model: LoadedModel) -> dict[str, float | None]:
    """The metrics that an export tells before and after."""
    metrics, _ = score_loaded(model)
    return {name: metrics[name] for name in SCORES}
