"""The pictures that an export is compared and calibrated on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instseg_jax import images
from instseg_jax.bands import build_bands
from instseg_jax.data import coco
from instseg_jax.data.source import build_dataset
from instseg_jax.geo.reading import build_reading
from instseg_jax.inference.predictor import LoadedModel
from instseg_jax.inference.sources import find_sources

COMPARED = 8  # images that checkpoint and export are compared on
CALIBRATION_IMAGES = 100  # evenly over those there are


def comparison_images(model: LoadedModel, size: int) -> list[np.ndarray]:
    """Images to compare on, [size, size, C]: validation images of the model's data, where that is there.

    Else the embedded pictures; a model of other channels then gets noise.
    """
    data = model.config.data
    try:
        dataset = build_dataset(data, "val")
        if not len(dataset):
            raise ValueError(coco.say_empty(dataset))
        return _network_inputs(dataset, model, size, COMPARED)
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
        data = model.config.data
        sources, _ = find_sources(folder, channels="rgb", bands=build_bands(data), reading=build_reading(data))
        listed = list(sources)
        chosen = [listed[i] for i in _evenly(len(listed), CALIBRATION_IMAGES)]
        return [_prepare(source.read(), model, size) for source in chosen]
    try:
        dataset = build_dataset((_with_data(model, folder) if folder else model).config.data, "train")
        return _network_inputs(dataset, model, size, CALIBRATION_IMAGES)
    except (OSError, ValueError) as error:
        raise ValueError(f"--int8 has no pictures to calibrate on ({error}); name some with --calibration") from error


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
