"""What each verb of the command line does. Puts rooms together; holds no logic of theirs.

Every function takes the config (for `evaluate`, `predict` and `export_weights` the overrides of the
checkpoint's own config when none is given) and the parsed options.
"""

import argparse
import os
import pathlib
import time

from ml_collections import ConfigDict
from rich.progress import track

from instseg_jax.config import override
from instseg_jax.data import coco
from instseg_jax.inference.pipeline import Pipeline, build_pipeline, load_pipeline_model, pick_threshold
from instseg_jax.inference.pipeline_config import PipelineConfig, load_pipeline_config, write_pipeline_config
from instseg_jax.inference.predictor import LoadedModel, load_model
from instseg_jax.inference.saving import check_formats, save_results
from instseg_jax.inference.sources import find_sources
from instseg_jax.training import loop
from instseg_jax.verbs_benchmark import benchmark as benchmark
from instseg_jax.verbs_comparison import compare as compare
from instseg_jax.verbs_data import check_dataset as check_dataset
from instseg_jax.verbs_data import convert as convert
from instseg_jax.verbs_data import prepare as prepare
from instseg_jax.verbs_data import split as split
from instseg_jax.verbs_evaluation import evaluate as evaluate
from instseg_jax.verbs_evaluation import load_with_overrides, print_metrics, score_model, write_outcome
from instseg_jax.weights import checkpoint


def quickstart(config: ConfigDict, options: argparse.Namespace) -> int:
    """Check the data, train, evaluate, predict on the validation images."""
    started = time.monotonic()
    workdir = pathlib.Path(options.workdir)
    print("1/4  data")
    splits = {split: loop.read_split(config.data, split) for split in ("train", "val")}
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
    print("3/4  evaluation of the best checkpoint")
    evaluated = score_model(load_with_overrides(config, workdir), str(workdir), ())
    write_outcome(workdir, evaluated)
    print_metrics(evaluated.metrics)
    print("4/4  prediction")
    images = [splits["val"].image_path(i) for i in range(len(splits["val"]))]
    predictions = workdir / "predictions"
    pipeline = _build(load_model(workdir, config), options.threshold, load_pipeline_config("instance_segmentation"))
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
    result = loop.train(config, options.workdir)
    best = result["best_score"]
    print(f"{result['steps']} of {result['total_steps']} steps in {options.workdir}")
    print(f"best {result['best_metric']}: {'none yet' if best is None else f'{best:.3f}'}")
    return 0


def predict(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> int:
    """Segment pictures, videos and rasters, and write what was found."""
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold is {options.threshold}, it must be between 0 and 1")
    formats = check_formats(options.formats.split(","))
    _, count = find_sources(options.input, channels="rgb")  # before the weights: a wrong path is told at once
    pipeline = _pipeline(config, options)
    folder = pathlib.Path(options.save_path or pathlib.Path(options.workdir) / "predictions")
    tiles = {"tile": options.tile, "overlap": options.overlap, "whole_image": options.whole_image}
    results = pipeline.predict(options.input, **tiles)
    started = time.monotonic()
    pipeline.warm_up()
    ready = time.monotonic()
    summary = save_results(
        track(results, "predicting", count), folder, formats=formats, masks_format=options.masks_format
    )
    seconds = time.monotonic() - ready
    pictures = f"{summary.images} {'frames' if summary.frames else 'pictures'}"
    print(f"{pictures}, {summary.instances} instances, {summary.files} files in {folder}")
    if summary.images:
        pace = f"{seconds / summary.images:.2f} s each, {summary.images / seconds:.1f} a second"
        print(f"{seconds:.1f} s, {pace}; before that {ready - started:.1f} s to get ready")
    for name, error in summary.failed:
        print(f"failed: {name}: {error}")
    return 1 if summary.failed else 0


def serve(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> int:
    """Answer requests over HTTP until a signal comes."""
    from instseg_jax.deploy.server import Limits, run_server  # needs the extra `serve`

    limits = Limits(
        queue_size=options.queue_size,
        max_wait=options.max_wait_ms / 1000,
        timeout=options.timeout,
        max_body=int(options.max_body_mb * 1e6),
        max_pixels=int(options.max_megapixels * 1e6),
        allowed_hosts=frozenset(host.strip().lower() for host in options.allow_urls.split(",") if host.strip()),
        token=options.token or os.environ.get("INSTSEG_TOKEN") or None,
    )
    run_server(_pipeline(config, options), limits, host=options.host, port=options.port)
    return 0


def get_pipeline_config(config: ConfigDict | None, options: argparse.Namespace) -> int:
    """Write the YAML file of a pipeline, for changing."""
    path = write_pipeline_config(options.save_path, pipeline=options.pipeline, model_dir=options.weights)
    print(f"pipeline: {path}")
    print(f"use it:   python run.py predict --pipeline={path} --input=YOUR_PICTURES")
    return 0


def import_weights(config: ConfigDict, options: argparse.Namespace) -> int:
    from instseg_jax.inference.predictor import import_checkpoint

    summary = import_checkpoint(config, options.weights, pathlib.Path(options.workdir) / checkpoint.BEST_MODEL)
    print(summary)
    print(f"checkpoint: {pathlib.Path(options.workdir) / checkpoint.BEST_MODEL}")
    return 0


def export_weights(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> int:
    from instseg_jax.weights.export import export_weights as write_weights

    model = load_with_overrides(config, options.weights or options.workdir)
    path = pathlib.Path(options.workdir) / f"{model.config.model.name}.{options.format}"
    print(f"weights: {write_weights(path, model.variables, format=options.format)}")
    return 0


def _pipeline(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> Pipeline:
    """The pipeline that a command names: by its YAML, its weights, and fields of the config."""
    settings = load_pipeline_config(options.pipeline)
    given = config if isinstance(config, ConfigDict) else None
    model = load_pipeline_model(settings, options.weights, given, default=options.workdir)
    if not isinstance(config, ConfigDict):
        for field, text in config.items():
            override(model.config, field, text)
    return _build(model, options.threshold, settings, options.batch_size, options.device)


def _build(
    model: LoadedModel,
    threshold: float | None,
    settings: PipelineConfig,
    batch_size: int | None = None,
    device: str | None = None,
) -> Pipeline:
    return build_pipeline(
        model,
        device=device or model.config.device,
        threshold=pick_threshold(threshold, model, settings),
        batch_size=batch_size or settings.batch_size,
        visualize=settings.visualize,
    )


def _progress(text: str):
    return lambda items, total: track(items, text, total)
