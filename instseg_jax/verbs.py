"""What each verb of the command line does. Puts rooms together; holds no logic of theirs.

Every function takes the config (for `evaluate`, `predict` and `export_weights` the overrides of the
checkpoint's own config when none is given) and the parsed options.
"""

import argparse
import functools
import pathlib
import time

from ml_collections import ConfigDict
from rich.progress import track

from instseg_jax.config import override
from instseg_jax.data import check, check_report, coco, findings, repair
from instseg_jax.files import write_json
from instseg_jax.inference.pipeline import find_images, predict_files
from instseg_jax.inference.predictor import LoadedModel, load_model
from instseg_jax.inference.visualize import draw_instances
from instseg_jax.training import loop
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
    model = load_model(workdir, config)
    predict_files(model, images, predictions, threshold=options.threshold, progress=_progress("predicting"))
    minutes = (time.monotonic() - started) / 60
    print(f"done in {minutes:.1f} minutes")
    print(f"     pictures: {predictions}")
    print(f"     numbers:  {workdir / 'evaluate_result.json'}")
    print(f"     report:   {workdir / 'report.html'}")
    print(f"     model:    {workdir / checkpoint.BEST_MODEL}")
    print(f"     next:     python run.py predict --weights={workdir} --input=YOUR_PICTURES")
    return 0


def check_dataset(config: ConfigDict, options: argparse.Namespace) -> int:
    """Look for everything that is wrong with a data set; 0 when it can be trained on."""
    workdir, data = pathlib.Path(options.workdir), config.data
    try:
        if not data.dir:
            raise ValueError("data.dir is empty; name the data set's folder with --config.data.dir=DIR")
        splits = ("train", "val")
        source, flaws = check.find_source(
            data.dir,
            annotations={split: data[f"{split}_annotations"] for split in splits},
            images={split: data[f"{split}_images"] for split in splits},
        )
        run = functools.partial(
            check.check_dataset,
            num_queries=config.model.num_queries,
            max_instances=data.max_instances,
            image_size=(data.image_size, data.image_size),
            resize=data.resize,
            num_workers=data.num_workers,
            progress=_progress("checking"),
            pictures={},
        )
        result = run(source, flaws)
        fixed = None
        if options.fix:
            repaired, changes = repair.write_repaired(result, workdir / check_report.FOLDER / "fixed")
            again = run(repaired, flaws)
            fixed = {
                "files": {split: str(file) for split, (file, _) in repaired.splits.items()},
                "check_pass": again.passed,
                "changes": changes,
                "findings": findings.group(again.flaws),
            }
        report = check_report.write_report(workdir, result, draw_instances, fixed)
    except (ValueError, OSError) as error:
        failure = {"done_flag": False, "check_pass": False, "err_type": type(error).__name__, "err_msg": str(error)}
        write_json(workdir / "check_dataset_result.json", failure, indent=2)
        raise
    print("\n".join(check_report.summarise(report, workdir)))
    return 0 if result.passed else 1


def train(config: ConfigDict, options: argparse.Namespace) -> int:
    result = loop.train(config, options.workdir)
    best = result["best_score"]
    print(f"{result['steps']} of {result['total_steps']} steps in {options.workdir}")
    print(f"best {result['best_metric']}: {'none yet' if best is None else f'{best:.3f}'}")
    return 0


def predict(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> int:
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold is {options.threshold}, it must be between 0 and 1")
    images = find_images(options.input)
    model = load_with_overrides(config, options.weights or options.workdir)
    folder = pathlib.Path(options.save_path or pathlib.Path(options.workdir) / "predictions")
    summary = predict_files(model, images, folder, threshold=options.threshold, progress=_progress("predicting"))
    print(
        f"{summary['images']} pictures, {summary['instances']} instances, "
        f"{summary['seconds'] / max(1, summary['images']):.2f} s a picture: {folder}"
    )
    for path, error in summary["failed"]:
        print(f"failed: {path}: {error}")
    return 1 if summary["failed"] else 0


def benchmark(config: ConfigDict, options: argparse.Namespace) -> int:
    from instseg_jax.training.benchmark import run_benchmark

    table = run_benchmark(config, repeats=options.repeats)
    path = write_json(pathlib.Path(options.workdir) / "benchmark.json", table, indent=2)
    print(f"all numbers: {path}")
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


def _progress(text: str):
    return lambda items, total: track(items, text, total)
