"""The verbs `evaluate` and `compare`: put model, data, devices and analysis together; hold no logic of theirs."""

import argparse
import copy
import dataclasses
import functools
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from instseg_jax import sharding
from instseg_jax.bands import show_bands
from instseg_jax.config import load_config
from instseg_jax.data import coco, loader
from instseg_jax.data.source import build_dataset
from instseg_jax.devices import select_devices
from instseg_jax.evaluation.analysis import Analysis, analyse
from instseg_jax.evaluation.coco import coco_metrics, collect_results, write_evaluation
from instseg_jax.evaluation.gallery import choose_cases, draw_cases
from instseg_jax.evaluation.processes import gather_results, local_rows
from instseg_jax.evaluation.read import read_results, read_truth
from instseg_jax.evaluation.report import write_report
from instseg_jax.files import write_json
from instseg_jax.images import read_image
from instseg_jax.inference import tta as tta_room
from instseg_jax.inference.benchmark import peak_memory_mb
from instseg_jax.inference.pipeline import build_pipeline
from instseg_jax.inference.predictor import LoadedModel, bind, load_model
from instseg_jax.inference.runtimes import find_export, read_export, save_export_thresholds
from instseg_jax.inference.tiling import Tiles
from instseg_jax.inference.visualize import draw_instances
from instseg_jax.progress import track
from instseg_jax.types import Batch, Detections
from instseg_jax.weights import checkpoint

SHOWN_METRICS = ("AP", "AP50", "AP75")
DEFAULTS = "configs/mask_rtdetr.py:l"  # where there is no model
SIZE_MULTIPLE = 32  # of the network's input, in pixels
MANY = 10_000  # detections: to score more takes long enough to say so


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Results with their score, and what a report needs beside them."""

    metrics: dict[str, float | None]
    results: list[dict]
    ground_truth: dict
    kinds: tuple[str, ...]  # segm, bbox or both
    max_detections: int
    facts: dict[str, str]
    run: dict[str, str]  # times and memory
    images: dict  # functions that read a picture to look at, by image id; empty without images
    annotations: str  # where the truth came from
    gallery_size: int


def evaluate(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> int:
    """Score a model, or a results file, and write numbers, results and report."""
    workdir = Path(options.workdir)
    try:
        _check_options(options)
        if options.predictions:
            evaluated = _score_file(config, options)
        else:
            weights = options.weights or options.workdir
            model = load_with_overrides(config, weights)
            tiles = None if options.tile is None else Tiles(options.tile, options.overlap, options.whole_image)
            evaluated = score_model(model, str(weights), tta_room.parse_views(options.tta), tiles)
        analyses = write_outcome(workdir, evaluated)
        if jax.process_index() != 0:
            return 0
        if options.save_thresholds:
            _save_thresholds(options.weights or options.workdir, next(iter(analyses.values())))
    except (ValueError, OSError) as error:
        if workdir.is_dir() and jax.process_index() == 0:
            failure = {"done_flag": False, "err_type": type(error).__name__, "err_msg": str(error)}
            write_json(workdir / "evaluate_result.json", failure, indent=4)
        raise
    print_metrics(evaluated.metrics)
    print(f"all numbers: {workdir / 'evaluate_result.json'}")
    print(f"report:      {workdir / 'report.html'}")
    return 0


def evaluate_weights(
    config: ConfigDict | dict[str, str], weights: str | os.PathLike[str]
) -> tuple[dict[str, float | None], list[dict]]:
    """Score weights on the validation images: (metrics, COCO result entries)."""
    return score_loaded(load_with_overrides(config, weights))


def score_loaded(model: LoadedModel) -> tuple[dict[str, float | None], list[dict]]:
    """Score a model on the validation images of its config: (metrics, COCO result entries)."""
    results, dataset, _ = _predict_split(model, ())
    return _score(coco.to_coco(dataset), results, ("segm", "bbox"), model.config.eval)["metrics"], results


def load_with_overrides(config: ConfigDict | dict[str, str], weights: str | os.PathLike[str]) -> LoadedModel:
    """A model by its weights, with the given config, or with its own and overrides."""
    return load_model(weights, config) if isinstance(config, ConfigDict) else load_model(weights, overrides=config)


def print_metrics(metrics: dict[str, float | None]) -> None:
    """Print the metrics that matter most, each with its kind."""
    for name, value in metrics.items():
        if name.split("/")[-1] in SHOWN_METRICS and name.count("/") == 1:
            print(f"     {name:13s} {'no objects' if value is None else f'{value:.3f}'}")


def _check_options(options: argparse.Namespace) -> None:
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


def _score_file(config: ConfigDict | dict[str, str], options: argparse.Namespace) -> Evaluated:
    """Score a COCO results file."""
    if not isinstance(config, ConfigDict):
        config = load_config(DEFAULTS, config)
    started = time.perf_counter()
    truth = read_truth(options.annotations)
    results, kinds = read_results(options.predictions)
    scored = _score(truth, results, kinds, config.eval)
    paths = {}
    if options.images:
        folder = Path(options.images)
        paths = {image["id"]: folder / image["file_name"] for image in truth["images"]}
        missing = [path for path in paths.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of {len(paths)} images are missing, the first is {missing[0]}")
    return Evaluated(
        **scored,
        facts={
            "results": Path(options.predictions).name,
            "truth": f"{Path(options.annotations).name} ({len(truth['images'])} images)",
        },
        run={"reading and scoring": f"{time.perf_counter() - started:.2f} s", "engine": config.eval.engine},
        images={image_id: functools.partial(read_image, path) for image_id, path in paths.items()},
        annotations=str(Path(options.annotations).resolve()),
    )


def score_model(model: LoadedModel, weights: str, tta: Sequence[str], tiles: Tiles | None = None) -> Evaluated:
    """Score a model on the validation images of its config; `weights` says where it came from."""
    evaluation = model.config.eval
    results, dataset, seconds = _predict_split(model, tta) if tiles is None else _predict_tiled(model, tiles)
    predicted = time.perf_counter()
    scored = _score(coco.to_coco(dataset), results, ("segm", "bbox"), evaluation)
    devices = select_devices(model.config.device)
    data = model.config.data
    first, others = seconds[0], seconds[1:]
    return Evaluated(
        **scored,
        facts={
            "model": model.config.model.name,
            "weights": weights,
            "images": f"{len(dataset)} of {dataset.name}",
            "input": f"{data.image_size} px, {data.resize}"
            + (f", TTA {', '.join(tta)}" if tta else "")
            + (f", in windows of {tiles.side} px with {tiles.overlap_px} px in common" if tiles else ""),
        },
        run={
            "first batch, with compiling": f"{first:.1f} s",
            "each later batch, from files to masks": f"{np.median(others):.2f} s (median)" if others else "none",
            "scoring": f"{time.perf_counter() - predicted:.1f} s with {evaluation.engine}",
            "highest memory of the process": f"{peak_memory_mb():.0f} MB",
            "batch size": str(evaluation.batch_size),
            "devices": ", ".join(f"{d.platform}:{d.id}" for d in devices),
        },
        images={image.id: functools.partial(_read_shown, dataset, i) for i, image in enumerate(dataset.images)},
        annotations=str(dataset.annotation_file.resolve()),
    )


def _score(truth: dict, results: list[dict], kinds: tuple[str, ...], evaluation: ConfigDict) -> dict:
    """The fields of `Evaluated` that follow from truth and results."""
    # COCO's 100, unless the network or an image has more.
    objects = Counter((entry["image_id"], entry["category_id"]) for entry in truth["annotations"])
    limit = max(100, evaluation.num_detections, *objects.values())
    if len(results) > MANY and jax.process_index() == 0:
        print(f"scoring {len(results)} detections with {evaluation.engine}", flush=True)
    scored = (*kinds, "boundary") if evaluation.boundary and "segm" in kinds else kinds
    metrics = coco_metrics(truth, results, iou_types=scored, max_detections=limit, engine=evaluation.engine)
    metrics.setdefault("AP", metrics.get("bbox/AP"))  # boxes alone
    return {
        "metrics": metrics,
        "results": results,
        "ground_truth": truth,
        "kinds": kinds,
        "max_detections": limit,
        "gallery_size": evaluation.gallery_size,
    }


def _predict_split(model: LoadedModel, tta: Sequence[str]) -> tuple[list[dict], coco.CocoDataset, list[float]]:
    """Result entries of the validation images, the same in every process, the data set, and seconds a batch."""
    dataset, categories = _open_split(model)
    times = [time.perf_counter()]

    def timed_pairs() -> Iterator[tuple[Detections, Batch]]:
        for pair in detect(model, dataset, tta):
            yield pair
            times.append(time.perf_counter())

    image_ids = [image.id for image in dataset.images]
    results = collect_results(timed_pairs(), image_ids=image_ids, category_ids=categories)
    return gather_results(results), dataset, np.diff(times).tolist()


def _predict_tiled(model: LoadedModel, tiles: Tiles) -> tuple[list[dict], coco.CocoDataset, list[float]]:
    """The same with images larger than a window worked on in windows, without a lowest score."""
    config = model.config
    dataset, categories = _open_split(model)
    every_score = np.zeros(len(model.class_names))
    pipeline = build_pipeline(model, device=config.device, threshold=every_score, batch_size=config.eval.batch_size)
    paths = [dataset.image_path(i) for i in range(len(dataset))]
    found = pipeline.predict(paths, tile=tiles.side, overlap=tiles.overlap, whole_image=tiles.whole_image)
    results: list[dict] = []
    times = [time.perf_counter()]
    for image, result in zip(dataset.images, track(found, "evaluating", len(paths)), strict=True):
        if result.error is not None:
            raise ValueError(result.error)
        entries = zip(result.boxes, result.to_coco(image.id), strict=True)
        known = ((categories[box["cls_id"]], entry) for box, entry in entries)
        results += [entry | {"category_id": category} for category, entry in known if category is not None]
        times.append(time.perf_counter())
    return results, dataset, np.diff(times).tolist()


def _open_split(model: LoadedModel) -> tuple[coco.CocoDataset, tuple[int | None, ...]]:
    """The validation images of the model's config, and the category id of each of its classes."""
    dataset = build_dataset(model.config.data, "val")
    coco.check_images(dataset)
    return dataset, coco.map_categories(dataset, model.class_names)


def detect(model: LoadedModel, dataset: coco.CocoDataset, tta: Sequence[str]) -> Iterator[tuple[Detections, Batch]]:
    """Detections of a data set with their batches, computed on all devices of the config.

    A batch is filled up to a multiple of the number of devices; of several processes each yields its own part.

    Raises: ValueError for views of other sizes of an export, which has one size.
    """
    config = model.config
    mesh = sharding.make_mesh(select_devices(config.device))
    predict = bind(model, mesh, device=config.device, split=True)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    scales = config.eval.tta_scales if "scales" in tta else ()
    if scales and model.exported is not None:
        raise ValueError(f"--tta=scales needs other sizes than the one of {model.exported.folder}; use the checkpoint")
    loaders = []
    for size in tta_room.scaled_sizes(config.data.image_size, scales, SIZE_MULTIPLE) if scales else [None]:
        sized = copy.deepcopy(config)
        if size is not None:
            sized.data.image_size = size
        loaders.append(loader.build_eval_loader(sized, dataset, num_devices=mesh.size, **process))
    batches = zip(*(each.batches() for each in loaders), strict=True)
    for views in track(batches, "evaluating", loaders[0].num_batches):
        found = []
        for view in views:
            found.append(predict(view.images))
            if "flip" in tta:
                mirrored = np.ascontiguousarray(view.images[:, :, ::-1])
                found.append(tta_room.flip_back(local_rows(predict(mirrored))))
        if len(found) > 1:
            merged = [local_rows(detections) for detections in found]
            yield tta_room.merge_views(merged, num_detections=config.eval.num_detections), views[0]
        else:
            yield found[0], views[0]


def write_outcome(workdir: Path, evaluated: Evaluated) -> dict[str, Analysis]:
    """Analyse, and write report.html, predictions.json and, last, evaluate_result.json; returns the analyses.

    Of several processes all may call this; the first one writes.
    """
    analyses = {
        kind: analyse(evaluated.ground_truth, evaluated.results, iou_type=kind, max_detections=evaluated.max_detections)
        for kind in evaluated.kinds
    }
    if jax.process_index() == 0:
        _write(workdir, evaluated, analyses)
    return analyses


def _read_shown(dataset: coco.CocoDataset, index: int) -> np.ndarray:
    """A picture as RGB, from wherever it is and of however many channels."""
    image = dataset.read_image(index)
    return image if dataset.bands is None else show_bands(image)


def _write(workdir: Path, evaluated: Evaluated, analyses: dict[str, Analysis]) -> None:
    main = next(iter(analyses.values()))
    galleries = {}
    if evaluated.images:
        galleries = {
            title: draw_cases(
                main,
                evaluated.results,
                cases,
                read_image=lambda image_id: evaluated.images[image_id](),
                draw=draw_instances,
            )
            for title, cases in choose_cases(main, evaluated.gallery_size).items()
        }
    write_report(
        workdir / "report.html",
        title="Evaluation",
        metrics=evaluated.metrics,
        analyses=analyses,
        facts=evaluated.facts,
        galleries=galleries,
        run=evaluated.run,
    )
    write_evaluation(
        workdir,
        evaluated.metrics,
        evaluated.results,
        analysis={kind: analysis.summary() for kind, analysis in analyses.items()},
        evaluated=evaluated.facts | {"annotations": evaluated.annotations},
        run=evaluated.run,
    )


def _save_thresholds(weights: str | os.PathLike[str], analysis: Analysis) -> None:
    if analysis.thresholds is None:
        raise ValueError("--save_thresholds: nothing was found on the validation images, so no score is a threshold")
    folder = find_export(weights)
    if folder is None:
        file = checkpoint.save_thresholds(weights, analysis.thresholds)
    else:
        file = save_export_thresholds(read_export(folder), analysis.thresholds)
    print(f"thresholds:  {file}")
