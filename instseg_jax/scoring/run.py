"""A loaded model scored on the validation images of its config."""

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from instseg_jax.bands import show_bands
from instseg_jax.config import SIZE_MULTIPLE
from instseg_jax.data import coco, loader
from instseg_jax.data.source import build_dataset
from instseg_jax.devices import make_mesh, select_devices
from instseg_jax.evaluation.coco import collect_results
from instseg_jax.evaluation.processes import gather_results, local_rows
from instseg_jax.inference.pipeline import build_pipeline
from instseg_jax.inference.predictor import LoadedModel, bind, load_model
from instseg_jax.inference.tiling import Tiles
from instseg_jax.memory import peak_memory_mb
from instseg_jax.progress import track
from instseg_jax.scoring import tta as tta_room
from instseg_jax.scoring.outcome import Evaluated, score_results
from instseg_jax.types import Batch, Detections

KINDS = ("segm", "bbox")  # of results of the network


def evaluate_weights(config: ConfigDict, weights: str | os.PathLike[str]) -> tuple[dict[str, float | None], list[dict]]:
    """Score weights on the validation images: (metrics, COCO result entries)."""
    return score_loaded(load_model(weights, config))


def score_loaded(model: LoadedModel) -> tuple[dict[str, float | None], list[dict]]:
    """Score a model on the validation images of its config: (metrics, COCO result entries)."""
    results, dataset, _ = _predict_split(model, ())
    evaluation = model.config.eval
    truth = coco.to_coco(dataset)
    metrics = score_results(truth, results, KINDS, engine=evaluation.engine, boundary=evaluation.boundary)
    return metrics, results


def score_model(model: LoadedModel, weights: str, tta: Sequence[str], tiles: Tiles | None = None) -> Evaluated:
    """Score a model on the validation images of its config; `weights` says where it came from."""
    evaluation = model.config.eval
    results, dataset, seconds = _predict_split(model, tta) if tiles is None else _predict_tiled(model, tiles)
    predicted = time.perf_counter()
    truth = coco.to_coco(dataset)
    metrics = score_results(truth, results, KINDS, engine=evaluation.engine, boundary=evaluation.boundary)
    devices = select_devices(model.config.device)
    data = model.config.data
    first, others = seconds[0], seconds[1:]
    return Evaluated(
        metrics=metrics,
        results=results,
        ground_truth=truth,
        kinds=KINDS,
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
        images={image.id: functools.partial(read_shown, dataset, i) for i, image in enumerate(dataset.images)},
        annotations=str(dataset.annotation_file.resolve()),
        gallery_size=evaluation.gallery_size,
    )


def _predict_split(model: LoadedModel, tta: Sequence[str]) -> tuple[list[dict], coco.CocoDataset, list[float]]:
    """Result entries of the validation images, the same in every process, the data set, and seconds a batch."""
    dataset, categories = _open_split(model)
    mesh = make_mesh(select_devices(model.config.device))
    if "scales" in tta and model.config.eval.tta_scales and model.exported is not None:
        raise ValueError(f"--tta=scales needs other sizes than the one of {model.exported.folder}; use the checkpoint")
    predict = bind(model, mesh, device=model.config.device, split=True)
    results, seconds = find_results(predict, model.config, dataset, categories, mesh, tta=tta)
    return results, dataset, seconds


def find_results(
    predict: Callable[[np.ndarray], Detections],
    config: ConfigDict,
    dataset: coco.CocoDataset,
    category_ids: Sequence[int | None],
    mesh: jax.sharding.Mesh,
    *,
    tta: Sequence[str] = (),
    is_shown: bool = True,
) -> tuple[list[dict], list[float]]:
    """COCO result entries of all images of a data set, the same in every process, and seconds a batch.

    `predict` takes images [B, H, W, C]; `category_ids[k]` is that of class index k, None for a class to leave out;
    `is_shown`: with a bar.
    """
    times = [time.perf_counter()]

    def timed_pairs() -> Iterator[tuple[Detections, Batch]]:
        for pair in detect(predict, config, dataset, mesh, tta=tta, is_shown=is_shown):
            yield pair
            times.append(time.perf_counter())

    image_ids = [image.id for image in dataset.images]
    results = collect_results(timed_pairs(), image_ids=image_ids, category_ids=category_ids)
    return gather_results(results), np.diff(times).tolist()


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


def detect(
    predict: Callable[[np.ndarray], Detections],
    config: ConfigDict,
    dataset: coco.CocoDataset,
    mesh: jax.sharding.Mesh,
    *,
    tta: Sequence[str],
    is_shown: bool,
) -> Iterator[tuple[Detections, Batch]]:
    """Detections of a data set with their batches.

    A batch is filled up to a multiple of the number of devices; of several processes each yields its own part.
    """
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    scales = config.eval.tta_scales if "scales" in tta else ()
    loaders = []
    for size in tta_room.scaled_sizes(config.data.image_size, scales, SIZE_MULTIPLE) if scales else [None]:
        sized = copy.deepcopy(config)
        if size is not None:
            sized.data.image_size = size
        loaders.append(loader.build_eval_loader(sized, dataset, num_devices=mesh.size, **process))
    batches = zip(*(each.batches() for each in loaders), strict=True)
    for views in track(batches, "evaluating", loaders[0].num_batches) if is_shown else batches:
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


def read_shown(dataset: coco.CocoDataset, index: int) -> np.ndarray:
    """A picture as RGB, from wherever it is and of however many channels."""
    image = dataset.read_image(index)
    return image if dataset.bands is None else show_bands(image)
