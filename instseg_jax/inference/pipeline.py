"""The pipeline: whatever holds images in, a stream of results out.

What an input may be is in `sources.py`, how the work overlaps in `streaming.py`, large images in `tiling.py`, the YAML
file in `pipeline_config.py`. Files of results are written in `results.py` and `saving.py`.
"""

import dataclasses
import functools
import logging
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from instseg_jax.bands import build_bands
from instseg_jax.commands import shown
from instseg_jax.config import load_config
from instseg_jax.devices import make_mesh, select_devices
from instseg_jax.geo.reading import build_reading
from instseg_jax.inference import predictor, tiling
from instseg_jax.inference.pipeline_config import PipelineConfig, load_pipeline_config, parse_hpi_config
from instseg_jax.inference.sources import Source, find_sources
from instseg_jax.inference.streaming import Feeding, Found, stream_instances
from instseg_jax.messages import first_few, quote, shorten
from instseg_jax.models.variants import canonical_name
from instseg_jax.progress import Track
from instseg_jax.results.result import Result
from instseg_jax.runtimes.exported import with_backend
from instseg_jax.types import Detections
from instseg_jax.weights.download import KNOWN_WEIGHTS
from instseg_jax.weights.locate import PACKAGED_WEIGHTS, PRETRAINED, is_there, locate

DEFAULT_WEIGHTS = "output"  # where a training leaves its weights when it is not told otherwise
DEFAULT_THRESHOLD = 0.5  # where neither call nor weights nor YAML say one
Threshold = float | Mapping[str, float]
Accelerate = Callable[..., predictor.LoadedModel]  # see `export/accelerate.py`

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A network that is ready for images. `create_pipeline` makes one."""

    run: Callable[[np.ndarray], Detections]  # [B, H, W, 3] float32 on; compiles once for every B
    feeding: Feeding
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    thresholds: np.ndarray  # [K] lowest scores by class index, where a call says none
    batch_size: int
    visualize: bool = True  # whether a server draws, where a request does not say
    fingerprint: Callable[[], str] = str  # of the model: `predictor.fingerprint`; "" of one that is made by hand

    def predict(
        self,
        x: Any,
        threshold: Threshold | None = None,
        batch_size: int | None = None,
        *,
        channels: str = "rgb",
        tile: int | None = None,
        overlap: float = 0.2,
        whole_image: bool = True,
        progress: Track | None = None,
    ) -> Iterator[Result]:
        """Segment images, one result after another in the order of the input.

        Args:
          x: a path, URL, folder, pattern such as "shots/**/*.jpg", array [h, w, 3], PIL image, video, or a list of
            these.
          threshold: the lowest score that is kept, for all classes or by class name (the others keep theirs).
          batch_size: images a call of the network; every size is compiled once.
          channels: "rgb" or "bgr", of arrays.
          tile: side in pixels of the windows in which larger images are worked on; None: as a whole.
          overlap: of neighbouring windows, as a part of their side.
          whole_image: look for objects that are larger than the overlap in the whole image, scaled down, too.
          progress: called with the windows of each large image and their number; it yields them on and may show that.

        A file among several that can't be read gives a result with `error` and no instances at its place; one alone
        raises. Raises FileNotFoundError or ValueError at once for an input that is not there, or wrong arguments.
        """
        size = self.batch_size if batch_size is None else batch_size
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_size is {quote(batch_size)}, it must be a whole number of at least 1")
        thresholds = thresholds_by_class(threshold, self.class_names, self.thresholds)
        tiles = None if tile is None else tiling.Tiles(tile, overlap, whole_image, progress)
        sources, count = find_sources(x, channels=channels, bands=self.feeding.bands, reading=self.feeding.reading)
        if tiles is not None:
            return self._results(tiling.stream_tiled(sources, self.stream, tiles, size, thresholds), count == 1)
        return self._results(self.stream(sources, size, thresholds), count == 1)

    def __call__(self, x: Any, **options: Any) -> list[Result]:
        """All results of `predict` at once."""
        return list(self.predict(x, **options))

    def segment(self, sources: Sequence[Source], thresholds: Sequence[np.ndarray]) -> list[Result]:
        """Segment at most `batch_size` images in one call, each with thresholds [K] of its own.

        For callers that form batches themselves, from several threads if need be.
        """
        results = self._results(self.stream(iter(sources), self.batch_size, np.min(thresholds, axis=0)), False)
        return [
            result.filter(dict(enumerate(map(float, own)))) for result, own in zip(results, thresholds, strict=True)
        ]

    def warm_up(self) -> None:
        """Compile for the default batch size, so that the first image does not wait for it."""
        jax.block_until_ready(
            self.run(np.zeros((self.batch_size, *self.feeding.size, self.feeding.channels), np.float32))
        )

    def stream(self, sources: Iterator[Source], batch_size: int, thresholds: np.ndarray) -> Iterator[Found]:
        """Find the instances of each source, in order; `thresholds` [K] by class index."""
        return stream_instances(sources, self.run, feeding=self.feeding, batch_size=batch_size, thresholds=thresholds)

    def _results(self, found: Iterator[Found], is_single: bool) -> Iterator[Result]:
        for one in found:
            if one.error is not None or one.instances is None:
                if is_single:
                    raise ValueError(one.error)
                yield Result.failed(one.source.name, one.error or "unknown")
                continue
            yield Result.from_instances(
                one.instances,
                class_names=self.class_names,
                category_ids=self.category_ids,
                input_path=one.source.name,
                size=one.size,
                image=one.image,
                page_index=one.source.page_index,
                georeference=one.source.georeference,
            )


def create_pipeline(
    pipeline: str | os.PathLike[str] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    device: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    threshold: Threshold | None = None,
    batch_size: int | None = None,
    use_hpip: bool | None = None,
    hpi_config: Mapping[str, Any] | None = None,
    model_config: ConfigDict | None = None,
    overrides: Mapping[str, str] | None = None,
    default_weights: str | os.PathLike[str] = DEFAULT_WEIGHTS,
    accelerate: Accelerate | None = None,
) -> Pipeline:
    """Create a pipeline that finds the instances in images.

    Args:
      pipeline: "instance_segmentation" (the default), or the path of a YAML file as `get_pipeline_config` writes it.
      config: the content of such a file; it goes before `pipeline`.
      device: auto, cpu, gpu, tpu for the first of a kind, gpu:0,1 for several, which share every batch.
        None: that of the YAML, else of `model_config` or `overrides`, else auto.
      weights: workdir of a run, checkpoint, export, or official file; None: those of the YAML, else the run in
        `output`.
      threshold: lowest score, for all classes or by class name; None: as stored with the weights, else of the YAML.
      batch_size: images a call of the network; None: that of the YAML.
      use_hpip: True asks for the quickest runtime that is installed: a checkpoint is exported once, beside itself.
      hpi_config: settings of that runtime: {"backend": "onnxruntime", "backend_config": {"cpu_num_threads": 4}}; they
        also hold for an export. None: those of the YAML.
      model_config: how the network is built, for files that don't say, see `load_model`.
      overrides: fields of the config of the weights, {field: text}, to change.
      default_weights: folder of the run whose weights are used where neither call nor YAML name some.
      accelerate: what `use_hpip` calls, `deploy.accelerate.accelerate` where this is `instseg_jax.create_pipeline`.

    Raises: FileNotFoundError without weights; ValueError for settings that are wrong or contradict each other.
    """
    settings = load_pipeline_config(config if config is not None else Path(pipeline or "instance_segmentation"))
    if config is not None and pipeline is not None:
        log.warning("both pipeline=%s and config are given; config is used", pipeline)
    batch_size = settings.batch_size if batch_size is None else batch_size
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size is {quote(batch_size)}, it must be a whole number of at least 1")
    _check_score(threshold)
    model = load_pipeline_model(settings, weights, model_config, overrides, default=default_weights)
    # That of a checkpoint's own config is the machine's on which it was trained.
    configured = (overrides or {}).get("device") or (model_config.device if model_config is not None else None)
    device = device or settings.device or configured or "auto"
    model = prepare_runtime(
        model,
        settings.use_hpip if use_hpip is None else use_hpip,
        settings.hpi_config if hpi_config is None else hpi_config,
        device=device,
        batch_size=batch_size,
        accelerate=accelerate,
    )
    return build_pipeline(
        model,
        device=device,
        threshold=pick_threshold(threshold, model, settings),
        batch_size=batch_size,
        visualize=settings.visualize,
    )


def prepare_runtime(
    model: predictor.LoadedModel,
    use_hpip: bool | None,
    hpi_config: Mapping[str, Any] | None,
    *,
    device: str,
    batch_size: int,
    accelerate: Accelerate | None,
) -> predictor.LoadedModel:
    """The model as `use_hpip` and `hpi_config` ask for it. Raises ValueError for settings that mean nothing."""
    wanted = parse_hpi_config(hpi_config)
    if model.exported is not None:
        backend = None if wanted.backend == "xla" else wanted.backend
        return dataclasses.replace(model, exported=with_backend(model.exported, backend, wanted.num_threads))
    if use_hpip and accelerate is not None:
        return accelerate(model, wanted, device=device, batch_size=batch_size)
    if use_hpip:
        log.warning("use_hpip: a checkpoint alone has no faster runtime than the compiled network, which is used")
    return model


def load_pipeline_model(
    settings: PipelineConfig,
    weights: str | os.PathLike[str] | None,
    model_config: ConfigDict | None,
    overrides: Mapping[str, str] | None = None,
    *,
    default: str | os.PathLike[str] = DEFAULT_WEIGHTS,
) -> predictor.LoadedModel:
    """Load the weights that the call or the YAML names, else those of the last training in `default`, else the official
    ones of the YAML's `model_name`, as PaddleX does, else the pretrained size N of the package; these two are told.

    Raises FileNotFoundError for weights that are not there, ValueError for weights of another model than the YAML's
    `model_name`.
    """
    source = weights or settings.model_dir
    if source is None and is_there(default):
        source = default
    elif source is None and (official := _official_weights(settings.model_name)):
        source = official
        log.warning("model_dir is null and no training is in %s: using the official weights %s", default, official)
    elif source is None:
        source = PRETRAINED
        log.warning(
            "there is no trained model in %s: using the small one that comes with the package (%s). For your own "
            "classes train one (`%s` takes minutes), or name weights (a run's workdir, a "
            "checkpoint, a .pdparams file) with weights=... or --weights=...",
            Path(default).resolve(),
            PRETRAINED,
            shown("quickstart"),
        )
    located = locate(source)
    if model_config is None and located.kind == "file" and located.source not in PACKAGED_WEIGHTS:
        model_config = _official_config(settings.model_name or located.path.name)
    model = predictor.load_model(located, model_config, overrides)
    if settings.model_name is not None and canonical_name(settings.model_name) != canonical_name(
        model.config.model.name
    ):
        official = _official_weights(settings.model_name)
        hint = f"; the official ones are model_dir: {official}" if official else ""
        raise ValueError(
            f"model_name is {shorten(settings.model_name)}, but the weights {source} are of "
            f"{model.config.model.name}{hint}"
        )
    return model


def _official_weights(model_name: str | None) -> str | None:
    """The name of the official weights of a model, as Mask-RT-DETR-L; None: there are none."""
    name = f"{canonical_name(model_name)}_coco" if model_name else ""
    return name if name in KNOWN_WEIGHTS else None


def _official_config(name: str) -> ConfigDict | None:
    """The recipe of the model that the name of a file tells, as mask_rtdetr_l_coco; None where it does not."""
    size = re.search(r"mask[-_]?rt[-_]?detr[-_]([nsmlxh])(?![a-z])", name.lower())
    return load_config(f"configs/mask_rtdetr.py:{size[1]}") if size else None


def pick_threshold(threshold: Threshold | None, model: predictor.LoadedModel, settings: PipelineConfig) -> np.ndarray:
    """Thresholds [K]: the given one first, then those stored with the weights, then the YAML's."""
    names = model.class_names
    default = np.full(len(names), DEFAULT_THRESHOLD)
    by_class = thresholds_by_class(settings.threshold, names, default)
    if model.thresholds is not None:
        by_class = np.full(len(names), model.thresholds["overall"], np.float64)
        stored = {name: score for name, score in model.thresholds["classes"].items() if name in names}
        by_class = thresholds_by_class(stored, names, by_class)
    return thresholds_by_class(threshold, names, by_class)


def thresholds_by_class(threshold: Threshold | None, class_names: Sequence[str], default: np.ndarray) -> np.ndarray:
    """Thresholds [K] of the classes: one number for all, or by class name or index, `default` [K] for the others.

    Raises ValueError for a score outside 0..1, or a class that is not there.
    """
    chosen = np.array(default, np.float64)
    given = threshold if isinstance(threshold, Mapping) else dict.fromkeys(class_names, threshold)
    for name, value in given.items():
        if value is None:
            continue
        _check_score(value)
        if isinstance(name, numbers.Integral) and not isinstance(name, bool) and 0 <= name < len(class_names):
            chosen[int(name)] = value
            continue
        if name not in class_names:
            raise ValueError(f"threshold for {quote(name)}, but the classes are {first_few(class_names)}")
        chosen[[i for i, known in enumerate(class_names) if known == name]] = value
    return chosen


def _check_score(threshold: Threshold | None) -> None:
    """Raise ValueError for a threshold, or one of a class, that is no score."""
    for value in threshold.values() if isinstance(threshold, Mapping) else [threshold]:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
        if value is not None and not (is_number and 0 <= value <= 1):
            raise ValueError(f"threshold is {quote(value)}, it must be between 0 and 1")


def build_pipeline(
    model: predictor.LoadedModel, *, device: str, threshold: np.ndarray, batch_size: int, visualize: bool = True
) -> Pipeline:
    """Put a loaded model on its devices; batches are split over them. Raises ValueError where they don't divide."""
    devices = select_devices(device)
    if ":" not in device:  # several only where they are named: a batch of one can't be shared
        devices = devices[:1]
    if batch_size < 1 or batch_size % len(devices):
        raise ValueError(f"batch_size is {batch_size}, it must be a multiple of the number of devices, {len(devices)}")
    data = model.config.data
    return Pipeline(
        run=predictor.bind(model, make_mesh(devices), device=device),
        feeding=Feeding(
            (data.image_size, data.image_size),
            data.resize,
            data.eval_interpolation,
            build_bands(data),
            build_reading(data),
        ),
        class_names=model.class_names,
        category_ids=model.category_ids,
        thresholds=threshold,
        batch_size=batch_size,
        visualize=visualize,
        fingerprint=functools.partial(predictor.fingerprint, model),
    )
