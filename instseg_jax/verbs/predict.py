"""The verbs that run a pipeline: `predict`, `suggest`, `serve`, `get_pipeline_config`."""

import argparse
import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from instseg_jax.commands import print_next
from instseg_jax.config import load_config
from instseg_jax.export.accelerate import accelerate
from instseg_jax.files import make_folder, write_json, written_aside
from instseg_jax.inference.pipeline import Pipeline, create_pipeline
from instseg_jax.inference.pipeline_config import write_pipeline_config
from instseg_jax.inference.sources import find_sources
from instseg_jax.messages import shorten
from instseg_jax.progress import track
from instseg_jax.results.result import Result
from instseg_jax.results.saving import Summary, check_formats, save_results
from instseg_jax.results.suggesting import SEEN, choose, describe, uncertainty
from instseg_jax.verbs import jobs
from instseg_jax.weights import PACKAGED_WEIGHTS, PRETRAINED

SHOWN_CLASSES = 15  # names told where nothing was found
SAMPLES = PACKAGED_WEIGHTS[PRETRAINED].parent / "samples"  # pictures of what the package's weights know


def predict(options: argparse.Namespace) -> int:
    """Segment pictures, videos and rasters, and write what was found."""
    formats = check_formats(options.formats.split(","))
    given = SAMPLES if options.input == "samples" and not pathlib.Path(options.input).exists() else options.input
    if jobs.is_job(options):
        return jobs.predict_job(options, formats, str(given), functools.partial(_pipeline, options), _say)
    _, count = find_sources(given, channels="rgb")  # before the weights: a wrong path is told at once
    pipeline = _pipeline(options)
    folder = pathlib.Path(options.save_path or pathlib.Path(options.workdir) / "predictions")
    make_folder(folder)  # one that can't be is told before hours of work
    tiles = {"tile": options.tile, "overlap": options.overlap, "whole_image": options.whole_image}
    with Progress(transient=False) as bars:

        def windows(found: Iterable[Any], number: int) -> Iterator[Any]:
            bar = bars.add_task("windows", total=number)
            yield from bars.track(found, task_id=bar)
            bars.remove_task(bar)

        layer = jobs.begin_layer(options, pipeline.class_names)
        results = pipeline.predict(given, **tiles, progress=windows)
        started = time.monotonic()
        pipeline.warm_up()
        ready = time.monotonic()
        shown = bars.track(results, total=count, description="predicting")
        summary = save_results(
            shown if layer is None else layer.follow(shown),
            folder,
            formats=formats,
            masks_format=options.masks_format,
            overwrite=options.overwrite,
        )
        seconds = time.monotonic() - ready
    if layer is not None:
        layer.write()
    pace = f"{seconds:.1f} s, {seconds / max(1, summary.images):.2f} s each, {summary.images / seconds:.1f} a second; "
    pace += f"before that {ready - started:.1f} s to get ready"
    _say(summary, folder, pace, pipeline.class_names, float(min(pipeline.thresholds)))
    if layer is not None:
        print("\n".join(layer.say()))
    weights = [f"--weights={options.weights}"] if options.weights else [f"--workdir={options.workdir}"]
    print_next("serve", *weights, comment="the same over HTTP; `export` writes the model for other programs")
    return 1 if summary.failed else 0


def _say(summary: Summary, folder: pathlib.Path, pace: str, class_names: Sequence[str], threshold: float) -> None:
    pictures = _count(summary.images, "frame" if summary.frames else "picture")
    instances, files = _count(summary.instances, "instance"), _count(summary.files, "file")
    print(f"{pictures}, {instances}, {files} in {folder}")
    if summary.images:
        print(pace)
    if summary.images and not summary.instances:
        print(nothing_found(class_names, threshold))
    if summary.renamed:
        kept = _count(summary.renamed, "label file")
        print(f"{kept} beside the pictures stayed as they were, ours have numbers; --overwrite replaces them")
    for name, error in summary.failed:
        print(f"failed: {name}: {error}")


def nothing_found(class_names: Sequence[str], threshold: float) -> str:
    """What it means that no picture had an instance: what the weights know, and what can be done."""
    more = f" and {len(class_names) - SHOWN_CLASSES} more" if len(class_names) > SHOWN_CLASSES else ""
    known = ", ".join(class_names[:SHOWN_CLASSES]) + more
    return (
        f"Nothing has a score of at least {threshold:.2f}. These weights know {known}; "
        "a lower --threshold shows what is less sure, and for other things they must be trained on pictures of them."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def suggest(options: argparse.Namespace) -> int:
    """Choose pictures to label next and write them, with what was found in them, into a folder."""
    formats = check_formats(options.formats.split(","))
    if options.n < 1:
        raise ValueError(f"--n is {options.n}, it must be at least 1")
    _, count = find_sources(options.input, channels="rgb")
    folder = pathlib.Path(options.save_path or pathlib.Path(options.workdir) / "suggested")
    if folder.resolve() == pathlib.Path(options.input).resolve():
        raise ValueError(f"--save_path is the folder of the pictures, {folder}; name another one")
    pipeline = _pipeline(options)
    make_folder(folder)
    found, unsure, looks, failed = [], [], [], []
    for result in track(pipeline.predict(options.input, threshold=SEEN), "looking", count):
        reason = result.error
        if reason is None and (result.page_index is not None or not pathlib.Path(result.input_path).is_file()):
            reason = "only pictures in files can be suggested"
        if reason is not None:
            failed.append((result.input_path, reason))
            continue
        unsure.append(uncertainty(np.array([box["score"] for box in result.boxes])))
        looks.append(describe(result))
        kept = result.filter(dict(enumerate(map(float, pipeline.thresholds))))
        found.append(dataclasses.replace(kept, image=None))
    for path, reason in failed:
        print(f"left out: {path}: {shorten(reason)}")
    if not found:
        raise ValueError(f"--input is {options.input}, in which there is no picture that can be read")
    order = choose(unsure, np.array(looks), options.n)
    summary = save_results(_copied([found[i] for i in order], folder), folder, formats=formats)
    listed = [{"picture": found[i].input_path, "uncertainty": round(unsure[i], 4)} for i in order]
    write_json(folder / "suggested.json", {"suggested": listed}, indent=2)
    for path, reason in summary.failed:
        print(f"failed: {path}: {shorten(reason)}")
    print(f"{len(order)} of {len(found)} pictures with {summary.instances} predictions to correct are in {folder}")
    print_next(
        "convert",
        *("--src_dataset_type=LabelMe", f"--config.data.dir={folder}", "--save_path=my_data"),
        comment="once they are corrected; LabelStudio, CVAT and COCO too",
    )
    return 1 if failed or summary.failed else 0


def _copied(results: list[Result], folder: pathlib.Path) -> Iterator[Result]:
    """The results with copies of their pictures in the folder, each under a name of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for result in results:
        path = pathlib.Path(result.input_path)
        names = itertools.chain([path.name], (f"{path.stem}_{number}{path.suffix}" for number in itertools.count(2)))
        # Label files have the name of their picture without its ending.
        name = next(name for name in names if pathlib.Path(name).stem.casefold() not in taken)
        taken.add(pathlib.Path(name).stem.casefold())
        with written_aside(folder / name) as aside:
            shutil.copyfile(path, aside)
        yield dataclasses.replace(result, input_path=str(folder / name))


def serve(options: argparse.Namespace) -> int:
    """Answer requests over HTTP until a signal comes."""
    from instseg_jax.serving.app import run_server  # needs the extra `serve`
    from instseg_jax.serving.server import Limits

    limits = Limits(
        queue_size=options.queue_size,
        max_wait=options.max_wait_ms / 1000,
        timeout=options.timeout,
        max_body=int(options.max_body_mb * 1e6),
        max_pixels=int(options.max_megapixels * 1e6),
        allowed_hosts=frozenset(host.strip().lower() for host in options.allow_urls.split(",") if host.strip()),
        token=options.token or os.environ.get("INSTSEG_TOKEN") or None,
    )
    run_server(_pipeline(options), limits, host=options.host, port=options.port)
    return 0


def get_pipeline_config(options: argparse.Namespace) -> int:
    """Write the YAML file of a pipeline, for changing."""
    path = write_pipeline_config(options.save_path, pipeline=options.pipeline, model_dir=options.weights)
    print(f"pipeline: {path}")
    print_next("predict", f"--pipeline={path}", "--input=YOUR_PICTURES")
    return 0


def _pipeline(options: argparse.Namespace) -> Pipeline:
    """The pipeline that a command names: by its YAML, its weights, and fields of the config."""
    return create_pipeline(
        options.pipeline,
        device=options.device,
        weights=options.weights,
        threshold=options.threshold,
        batch_size=options.batch_size,
        use_hpip=options.use_hpip or None,
        model_config=load_config(options.config, options.overrides) if options.config else None,
        overrides={} if options.config else options.overrides,
        default_weights=options.workdir,
        accelerate=accelerate,
    )
