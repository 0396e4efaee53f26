"""What each verb of the command line does. Puts rooms together; holds no logic of theirs.

Every function takes the config (for `evaluate`, `predict` and `export_weights` the overrides of the
checkpoint's own config when none is given) and the parsed options.
"""

import argparse
import pathlib
import time

import jax
from ml_collections import ConfigDict

from instseg_jax.data import coco
from instseg_jax.data.source import build_dataset
from instseg_jax.inference.pipeline_config import load_pipeline_config
from instseg_jax.inference.predictor import describe, load_model
from instseg_jax.inference.saving import save_results
from instseg_jax.progress import track
from instseg_jax.training import loop
from instseg_jax.verbs_benchmark import benchmark as benchmark
from instseg_jax.verbs_comparison import compare as compare
from instseg_jax.verbs_data import check_dataset as check_dataset
from instseg_jax.verbs_data import convert as convert
from instseg_jax.verbs_data import prepare as prepare
from instseg_jax.verbs_data import split as split
from instseg_jax.verbs_evaluation import evaluate as evaluate
from instseg_jax.verbs_evaluation import load_with_overrides, print_metrics, score_model, write_outcome
from instseg_jax.verbs_export import check_best_export, export_best
from instseg_jax.verbs_export import export as export
from instseg_jax.verbs_pipeline import build_from
from instseg_jax.verbs_pipeline import get_pipeline_config as get_pipeline_config
from instseg_jax.verbs_pipeline import predict as predict
from instseg_jax.verbs_pipeline import serve as serve
from instseg_jax.verbs_sweep import sweep as sweep
from instseg_jax.weights import PRETRAINED, checkpoint


def quickstart(config: ConfigDict, options: argparse.Namespace) -> int:
    """Check the data, train, evaluate, predict on the validation images."""
    started = time.monotonic()
    check_best_export(config)
    workdir = pathlib.Path(options.workdir)
    if options.from_pretrained:
        config.model.weights = config.model.weights or PRETRAINED
    print("1/4  data")
    splits = {split: build_dataset(config.data, split) for split in ("train", "val")}
    for name, dataset in splits.items():
        coco.check_images(dataset)
        objects = sum(len(annotations) for annotations in dataset.annotations)
        print(f"     {name}: {len(dataset)} images, {objects} objects of {', '.join(dataset.categories)}")
    coco.check_same_categories(*splits.values())
    print("2/4  training (the first step compiles the network)")
    result = loop.train(config, workdir)
    if not result["done_flag"]:
        print("stopped early; the same command goes on")
        return 1
    if config.checkpoint.export:
        export_best(workdir, config.checkpoint.export)
    print("3/4  evaluation of the best checkpoint")
    evaluated = score_model(load_with_overrides(config, workdir), str(workdir), ())
    write_outcome(workdir, evaluated)
    print_metrics(evaluated.metrics)
    print("4/4  prediction")
    images = [splits["val"].image_path(i) for i in range(len(splits["val"]))]
    predictions = workdir / "predictions"
    pipeline = build_from(load_model(workdir, config), options.threshold, load_pipeline_config("instance_segmentation"))
    results = track(pipeline.predict(images), "predicting", len(images))
    save_results(results, predictions, formats=("img", "json"))
    minutes = (time.monotonic() - started) / 60
    print(f"done in {minutes:.1f} minutes")
    print(f"     pictures: {predictions}")
    print(f"     numbers:  {workdir / 'evaluate_result.json'}")
    print(f"     report:   {workdir / 'report.html'}")
    print(f"     model:    {workdir / checkpoint.BEST_MODEL}")
    print(f"     next:     python run.py predict --weights={workdir} --input=YOUR_PICTURES")
    return 0


def train(config: ConfigDict, options: argparse.Namespace) -> int:
    """Train, or go on with the run in the workdir; the first process says how it ended and exports."""
    check_best_export(config)
    result = loop.train(config, options.workdir)
    if jax.process_index() != 0:
        return 0
    best = result["best_score"]
    print(f"{result['steps']} of {result['total_steps']} steps in {options.workdir}")
    print(f"best {result['best_metric']}: {'none yet' if best is None else f'{best:.3f}'}")
    if result["done_flag"] and config.checkpoint.export:
        export_best(options.workdir, config.checkpoint.export)
    return 0


def import_weights(config: ConfigDict, options: argparse.Namespace) -> int:
    """Turn official weights into the best model of a workdir, and say what became of each tensor."""
    from instseg_jax.inference.predictor import import_checkpoint

    summary = import_checkpoint(config, options.weights, pathlib.Path(options.workdir) / checkpoint.BEST_MODEL)
    print(summary)
    print(f"checkpoint: {pathlib.Path(options.workdir) / checkpoint.BEST_MODEL}")
    return 0


def export_weights(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> int:
    """Write a checkpoint's weights to one file in the workdir, under the official names.

    Raises: ValueError for an export, which has no weights to write.
    """
    from instseg_jax.weights.export import export_weights as write_weights

    model = load_with_overrides(config, options.weights or options.workdir)
    _ = model.network  # an export has no weights to write
    path = pathlib.Path(options.workdir) / f"{model.config.model.name}.{options.format}"
    metadata = describe(model)
    write_weights(path, model.variables, format=options.format, metadata=metadata, half=options.half)
    print(f"weights: {path}")
    return 0
