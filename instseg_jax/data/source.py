"""Which data set a config means: a folder of pictures, or one that `prepare` wrote as TFDS; and how to read them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from instseg_jax import files
from instseg_jax.bands import MAX_PICTURES, build_bands, find_ranges
from instseg_jax.data import coco
from instseg_jax.geo.reading import MAP_FIELDS, make_reading
from instseg_jax.messages import quote
from instseg_jax.pixels import decode, expect_channels

SOURCES = ("folder", "tfds")
FILLED_IN = ("channel_ranges", *MAP_FIELDS)  # fields of data that training finds out


def build_dataset(data: ConfigDict, split: str) -> coco.CocoDataset:
    """Read one split ("train", "val") of the data set that a config's section `data` names.

    Raises: ValueError when no folder is named or a field has a value that it can't have, and what reading raises.
    """
    bands = build_bands(data)
    if not data.dir:
        raise ValueError("data.dir is empty; name the data set's folder with --config.data.dir=DIR")
    if data.source not in SOURCES:
        raise ValueError(f"data.source must be one of {', '.join(SOURCES)}, got {quote(data.source)}.")
    if data.source == "tfds":
        from instseg_jax.data import tfds_builder  # importing TFDS takes a second

        dataset = tfds_builder.read_prepared(data.dir, split)
    else:
        dataset = coco.read_split(
            data.dir,
            split,
            annotations=data[f"{split}_annotations"],
            images=data[f"{split}_images"],
            skip_invalid=data.skip_invalid,
        )
    return dataclasses.replace(dataset, bands=bands, allow_outside=bool(data.allow_outside))


def with_channel_ranges(config: ConfigDict) -> ConfigDict:
    """The config with data.channel_ranges filled in from the training pictures, where data.scaling needs it.

    Up to 200 pictures, evenly over the split, are looked at; the same data set gives the same ranges.

    Raises: ValueError for percentiles that are not rising within 0..100, and what reading the pictures raises.
    """
    data = config.data
    if data.scaling != "percentile" or data.channel_ranges is not None:
        return config
    percentiles = tuple(data.scale_percentiles)
    if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise ValueError(f"data.scale_percentiles must be (low, high) within 0..100, got {quote(percentiles)}.")
    filled = ConfigDict(config.to_dict())
    with filled.unlocked():
        filled.data.update(scaling="none", channel_ranges=None)
        dataset = build_dataset(filled.data, "train")
        coco.check_images(dataset)
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(MAX_PICTURES, len(dataset))).round().astype(int))
        raw = [_read_raw(dataset, int(index), data.channels) for index in chosen]
        filled.data.update(scaling="percentile", channel_ranges=find_ranges(raw, percentiles))
    return filled.lock() if config.is_locked else filled


def with_reading(config: ConfigDict, info: Mapping[str, Any]) -> ConfigDict:
    """The config with data.map_* filled in from what the annotation file of maps says, where they are not set.

    Raises ValueError for what no `convert` has written.
    """
    said = info.get("map")
    if not isinstance(said, Mapping) or any(config.data[field] is not None for field in MAP_FIELDS):
        return config
    filled = ConfigDict(config.to_dict())
    with filled.unlocked():
        filled.data.update(make_reading(said, "The annotation file's info.map.").as_fields())
    return filled.lock() if config.is_locked else filled


def _read_raw(dataset: coco.CocoDataset, index: int, channels: int) -> np.ndarray:
    path = dataset.image_path(index)
    data = files.read_regular(path) if dataset.pictures is None else dataset.pictures(dataset.images[index].id)
    array = data if isinstance(data, np.ndarray) else decode(data, str(path))
    expect_channels(array, repr(str(path)), channels)
    return array
