"""The verb `quickstart`: data, training, evaluation and prediction in one go."""

import argparse
import functools
import pathlib
import time

from instseg_jax.commands import print_next
from instseg_jax.config import load_config
from instseg_jax.data import coco
from instseg_jax.data.source import build_dataset
from instseg_jax.inference.pipeline import create_pipeline
from instseg_jax.inference.predictor import load_model
from instseg_jax.progress import track
from instseg_jax.results.saving import save_results
from instseg_jax.scoring.outcome import write_outcome
from instseg_jax.scoring.run import score_model
from instseg_jax.training import loop
from instseg_jax.verbs.evaluate import print_metrics
from instseg_jax.verbs.export import check_best_export, export_best
from instseg_jax.weights import checkpoint


def quickstart(options: argparse.Namespace) -> int:
    """Check the data, train, evaluate, predict on the validation images."""
    spec = "configs/quickstart.py" if options.from_nothing else options.config
    config = load_config(spec, options.overrides)
    started = time.monotonic()
    check_best_export(config)
    workdir = pathlib.Path(options.workdir)
    print("1/4  data")
    splits = {split: build_dataset(config.data, split) for split in ("train", "val")}
    for name, dataset in splits.items():
        coco.check_images(dataset)
        objects = sum(len(annotations) for annotations in dataset.annotations)
        print(f"     {name}: {len(dataset)} images, {objects} objects of {', '.join(dataset.categories)}")
    coco.check_same_categories(*splits.values())
    print("2/4  training (the first step compiles the network)")
    result = loop.train(config, workdir, finish=functools.partial(export_best, config, workdir))
    if not result["done_flag"]:
        print("stopped early; the same command goes on")
        return 1
    print("3/4  evaluation of the best checkpoint")
    evaluated = score_model(load_model(workdir, config), str(workdir), ())
    write_outcome(workdir, evaluated)
    print_metrics(evaluated.metrics)
    print("4/4  prediction")
    images = [splits["val"].image_path(i) for i in range(len(splits["val"]))]
    predictions = workdir / "predictions"
    pipeline = create_pipeline(weights=workdir, model_config=config, threshold=options.threshold)
    results = track(pipeline.predict(images), "predicting", len(images))
    save_results(results, predictions, formats=("img", "json"))
    minutes = (time.monotonic() - started) / 60
    print(f"done in {minutes:.1f} minutes")
    print(f"     pictures: {predictions}")
    print(f"     numbers:  {workdir / 'evaluate_result.json'}")
    print(f"     report:   {workdir / 'report.html'}")
    print(f"     model:    {workdir / checkpoint.BEST_MODEL}")
    print_next("predict", f"--weights={workdir}", "--input=YOUR_PICTURES")
    return 0
