"""The verb `evaluate`: a model, or a results file, scored."""

import argparse
import functools
import os
import time
from pathlib import Path

import jax

from instseg_jax.commands import print_next
from instseg_jax.config import load_config
from instseg_jax.evaluation.analysis import Analysis
from instseg_jax.evaluation.read import read_results, read_truth
from instseg_jax.files import write_json
from instseg_jax.images import read_image
from instseg_jax.inference.predictor import LoadedModel, load_with_overrides
from instseg_jax.inference.tiling import Tiles
from instseg_jax.runtimes.exported import read_export, save_export_thresholds
from instseg_jax.scoring import tta as tta_room
from instseg_jax.scoring.outcome import Evaluated, score_results, write_outcome
from instseg_jax.scoring.run import score_model
from instseg_jax.verbs.maps import evaluate_map
from instseg_jax.weights import checkpoint
from instseg_jax.weights.locate import locate

SHOWN_METRICS = ("AP", "AP50", "AP75")
DEFAULTS = "configs/mask_rtdetr.py:l"  # where there is no model


def evaluate(options: argparse.Namespace) -> int:
    """Score a model, or a results file, and write numbers, results and report."""
    if options.against:
        return evaluate_map(options)
    workdir = Path(options.workdir)
    try:
        _check_options(options)
        if options.predictions:
            evaluated = _score_file(options)
        else:
            weights = options.weights or options.workdir
            model = load_with_overrides(weights, options.config, options.overrides)
            tiles = None if options.tile is None else Tiles(options.tile, options.overlap, options.whole_image)
            evaluated = score_model(model, str(weights), tta_room.parse_views(options.tta), tiles)
        analyses = write_outcome(workdir, evaluated)
        if jax.process_index() != 0:
            return 0
        if options.save_thresholds:
            _save_thresholds(model, options.weights or options.workdir, next(iter(analyses.values())))
    except (ValueError, OSError) as error:
        if workdir.is_dir() and jax.process_index() == 0:
            failure = {"done_flag": False, "err_type": type(error).__name__, "err_msg": str(error)}
            write_json(workdir / "evaluate_result.json", failure, indent=4)
        raise
    print_metrics(evaluated.metrics)
    for analysis in analyses.values():
        if analysis.edges is not None:
            print(analysis.edges.say())
    print(f"all numbers: {workdir / 'evaluate_result.json'}")
    print(f"report:      {workdir / 'report.html'}")
    if options.predictions:
        print_next("compare", str(workdir), "ANOTHER_RUN", comment="with bootstrap intervals")
    else:
        print_next("predict", f"--weights={options.weights or options.workdir}", "--input=YOUR_PICTURES")
    return 0


def print_metrics(metrics: dict[str, float | None]) -> None:
    """Print the metrics that matter most, each with its kind."""
    for name, value in metrics.items():
        if name.split("/")[-1] in SHOWN_METRICS and name.count("/") == 1:
            print(f"     {name:13s} {'no objects' if value is None else f'{value:.3f}'}")


def _check_options(options: argparse.Namespace) -> None:
    if options.regions:
        raise ValueError("--regions goes with --predictions and --against, layers of a map")
    if tta_room.parse_views(options.tta) and options.tile is not None:
        raise ValueError("--tta and --tile can't be combined")
    if options.predictions:
        if not options.annotations:
            raise ValueError("--predictions needs --annotations=FILE, the COCO ground truth to score against")
        useless = [name for name in ("weights", "save_thresholds", "tta", "tile") if getattr(options, name)]
        if useless:
            raise ValueError(f"--{useless[0]} is about a model, and --predictions scores a file without one")
    elif options.annotations or options.images:
        name = "annotations" if options.annotations else "images"
        raise ValueError(f"--{name} goes with --predictions; for a model set --config.data.dir and its siblings")


def _score_file(options: argparse.Namespace) -> Evaluated:
    """Score a COCO results file."""
    config = load_config(options.config or DEFAULTS, options.overrides)
    started = time.perf_counter()
    truth = read_truth(options.annotations)
    results, kinds = read_results(options.predictions)
    metrics = score_results(truth, results, kinds, engine=config.eval.engine, boundary=config.eval.boundary)
    paths = {}
    if options.images:
        folder = Path(options.images)
        paths = {image["id"]: folder / image["file_name"] for image in truth["images"]}
        missing = [path for path in paths.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of {len(paths)} images are missing, the first is {missing[0]}")
    return Evaluated(
        metrics=metrics,
        results=results,
        ground_truth=truth,
        kinds=kinds,
        gallery_size=config.eval.gallery_size,
        facts={
            "results": Path(options.predictions).name,
            "truth": f"{Path(options.annotations).name} ({len(truth['images'])} images)",
        },
        run={"reading and scoring": f"{time.perf_counter() - started:.2f} s", "engine": config.eval.engine},
        images={image_id: functools.partial(read_image, path) for image_id, path in paths.items()},
        annotations=str(Path(options.annotations).resolve()),
    )


def _save_thresholds(model: LoadedModel, weights: str | os.PathLike[str], analysis: Analysis) -> None:
    if analysis.thresholds is None:
        raise ValueError("--save_thresholds: nothing was found on the validation images, so no score is a threshold")
    located = locate(weights)
    if located.kind == "export":
        file = save_export_thresholds(read_export(located.path), analysis.thresholds)
    else:
        if located.kind == "checkpoint" and checkpoint.read_metadata(located.path) != model.metadata:
            raise ValueError(f"--save_thresholds: {located} was replaced while it was evaluated, by a training perhaps")
        file = checkpoint.save_thresholds(located.path, analysis.thresholds)
    print(f"thresholds:  {file}")
