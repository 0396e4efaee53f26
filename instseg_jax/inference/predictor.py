"""Weights in, a function from images to detections out."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instseg_jax import weights as weights_room
from instseg_jax.config import add_missing_fields, check_sizes, load_config, override
from instseg_jax.devices import put_batch, put_replicated, split_over_batch
from instseg_jax.files import digest_file
from instseg_jax.geo.reading import MAP_FIELDS
from instseg_jax.inference.optimize import optimize_for_inference
from instseg_jax.inference.postprocess import select_detections
from instseg_jax.models.mask_rtdetr import MaskRTDETR, abstract_variables, build_model
from instseg_jax.runtimes.exported import Export, open_export, read_export
from instseg_jax.types import Detections, HostOrDeviceArray, Outputs
from instseg_jax.weights import Weights, checkpoint
from instseg_jax.weights.locate import Located, locate

Predict = Callable[[dict, HostOrDeviceArray], Detections]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A network with weights and what is needed to use them on pictures."""

    model: MaskRTDETR | None  # None of an export
    variables: dict
    config: ConfigDict
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    metadata: dict  # of the checkpoint; empty for other files
    summary: str  # how many tensors were loaded
    thresholds: dict | None = None  # of scores, stored by an evaluation: {"overall": 0.4, "classes": {name: 0.3}}
    exported: Export | None = None  # an exported model in place of network and variables
    source: str = ""  # where it was loaded from

    @property
    def network(self) -> MaskRTDETR:
        """The network. Raises ValueError where there is none that can be looked into."""
        if self.model is None:
            where = self.exported.folder if self.exported else "this"
            raise ValueError(f"{where} is an exported model; name the checkpoint it was made from")
        return self.model


def make_predict(model: MaskRTDETR, *, num_detections: int, mesh: Mesh | None = None) -> Predict:
    """A compiled function (variables, images [B, H, W, 3]) -> `Detections`; one compilation a shape.

    With a mesh over which the images are split, each device keeps the detections of its own.
    """

    def predict(variables: dict, images: HostOrDeviceArray) -> Detections:
        outputs = cast(Outputs, model.apply(variables, images))
        return select_detections(outputs, num_detections=num_detections)

    return jax.jit(predict, out_shardings=None if mesh is None else split_over_batch(mesh))


def bind(model: LoadedModel, mesh: Mesh, *, device: str, split: bool = False) -> Callable[[np.ndarray], Detections]:
    """A function from images [B, H, W, C] float32 to `Detections`: the optimised network on a mesh, or the export.

    `device` is the text that named the devices; exports run on the first. `split`: see `make_predict`.
    Raises ValueError where an export does not fit what the model's config asks for.
    """
    count = model.config.eval.num_detections
    if model.exported is not None:
        size = model.exported.size
        if (model.config.data.image_size,) * 2 != size:
            raise ValueError(
                f"data.image_size is {model.config.data.image_size}, but {model.exported.folder} was exported with "
                f"{size[0]}; export again with --size={model.config.data.image_size}"
            )
        return open_export(model.exported, device=device, num_detections=count)
    network, variables = optimize_for_inference(model.network, model.variables)
    variables = put_replicated(variables, mesh)
    predict = make_predict(network, num_detections=count, mesh=mesh if split else None)
    return lambda images: predict(variables, put_batch(images, mesh))


def fingerprint(model: LoadedModel) -> str:
    """16 hex digits of what a model computes with: its weights or its exported file, and how pictures are fed to it."""
    whole = hashlib.sha256()
    sections = {name: model.config[name].to_json_best_effort() for name in ("model", "data", "eval")}
    whole.update(json.dumps(sections, sort_keys=True).encode())
    if model.exported is not None:
        whole.update(str(model.exported.backend).encode())
        for path in sorted(path for path in model.exported.folder.iterdir() if path.is_file()):
            whole.update(f"{path.name} {digest_file(path)}".encode())
    for key, value in jax.tree_util.tree_leaves_with_path(model.variables):
        whole.update(jax.tree_util.keystr(key).encode())
        whole.update(np.ascontiguousarray(value).data)
    return whole.hexdigest()[:16]


def load_model(
    source: str | os.PathLike[str] | Located | Weights,
    config: ConfigDict | None = None,
    overrides: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Load a run's best weights, a checkpoint, an export, or an official file; the last needs a config.

    A checkpoint brings its own config; the sections `model` and `data` that say how the network is built and
    fed always come from it, the rest from `config` where one is given. `overrides` {field: text} change what came out
    of that, before the network is built.

    Raises: FileNotFoundError or ValueError in one sentence when there are no weights or they do not fit.
    """
    overrides = overrides or {}
    if isinstance(source, Weights):
        found = source
    else:
        located = locate(source)
        if located.kind == "export":
            return _load_exported_with(located.path, config, overrides)
        found = weights_room.read_weights(located)
    source = found.source
    num_classes = found.num_classes
    if num_classes is None:
        raise ValueError(f"{source} holds a backbone alone; it can start a training, but predicts nothing")
    if found.metadata.get("config"):
        saved = ConfigDict(found.metadata["config"])
        add_missing_fields(saved, load_config(f"configs/mask_rtdetr.py:{saved.model.name[-1]}"))
        config = saved if config is None else merge_configs(config, saved)
    elif config is None:
        raise ValueError(f"{source} does not say which model it is; name one with --config=configs/mask_rtdetr.py:SIZE")
    for field, text in overrides.items():
        override(config, field, text)
    check_sizes(config.data, ["image_size"])
    class_names = found.class_names or tuple(f"class {i}" for i in range(num_classes))
    category_ids = found.metadata.get("category_ids") or tuple(range(1, num_classes + 1))
    model = build_model(config.model, num_classes)
    variables, summary = weights_room.merge_weights(
        abstract_variables(model, config.data.channels), found, class_names=class_names
    )
    ids = tuple(category_ids)
    return LoadedModel(
        model,
        variables,
        config,
        class_names,
        ids,
        found.metadata,
        str(summary),
        thresholds=found.thresholds,
        source=str(source),
    )


def _load_exported_with(folder: Path, config: ConfigDict | None, overrides: Mapping[str, str]) -> LoadedModel:
    exported = load_exported(read_export(folder), config)
    for field, text in overrides.items():
        if field.startswith("model."):
            raise ValueError(f"config.{field}={text} can't change the network of the export {folder}; export again")
        override(exported.config, field, text)
    return exported


def load_exported(export: Export, config: ConfigDict | None = None) -> LoadedModel:
    """An export as `load_model` gives a checkpoint, with the config and classes that it carries."""
    settings = export.settings
    saved = ConfigDict(settings["config"])
    add_missing_fields(saved, load_config(f"configs/mask_rtdetr.py:{saved.model.name[-1]}"))
    saved = saved if config is None else merge_configs(config, saved)
    summary = f"{settings['format']}, {settings['precision']}, exported from {settings['source']}"
    return LoadedModel(
        None,
        {},
        saved,
        tuple(settings["class_names"]),
        tuple(settings["category_ids"]),
        settings,
        summary,
        thresholds=settings["stored_thresholds"],
        exported=export,
        source=str(export.folder),
    )


def merge_configs(config: ConfigDict, saved: ConfigDict) -> ConfigDict:
    """`config` with the saved model, and with the saved way of feeding it pictures."""
    merged = ConfigDict(config.to_dict())
    merged.model = saved.model
    for field in ("image_size", "resize", "eval_interpolation", "channels", "scaling", "channel_ranges", *MAP_FIELDS):
        merged.data[field] = saved.data[field]
    return merged


def describe(model: LoadedModel) -> dict:
    """What a file of these weights needs to say about itself, as JSON values: config, classes, ids, thresholds."""
    kept = {name: model.metadata[name] for name in ("step", "score") if name in model.metadata}
    return {
        "config": json.loads(model.config.to_json_best_effort()),
        "class_names": list(model.class_names),
        "category_ids": list(model.category_ids),
        "thresholds": model.thresholds,
        "versions": checkpoint.library_versions(),
        **kept,
    }


def import_checkpoint(config: ConfigDict, source: str, folder: str | os.PathLike[str]) -> str:
    """Turn official weights into a self-describing checkpoint at `folder`; returns what was loaded, to print.

    The model is the one of `config`, with the classes of the file. A backbone alone is refused: name it as
    `model.weights` of a training instead.
    """
    found = weights_room.read_weights(source)
    model = load_model(found, config)
    metadata = {"step": 0, "score": None} | describe(model) | {"source": str(source)}
    checkpoint.save_inference_checkpoint(folder, model.variables, metadata)
    return model.summary


def load_with_overrides(source: str | os.PathLike[str], spec: str | None, overrides: dict[str, str]) -> LoadedModel:
    """A model by its weights, with the config that `spec` (`--config`) names, else its own; overrides apply to it."""
    config = None if spec is None else load_config(spec, overrides)
    return load_model(source, config, overrides)
