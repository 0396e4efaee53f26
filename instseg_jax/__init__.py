"""instseg_jax: instance segmentation in JAX with Mask-RT-DETR.

The public face, for Python. Nothing heavy is imported before it is used. The verbs of the command line do the same.
"""

import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from instseg_jax.cli import call
    from instseg_jax.compiled import keep_compiled_programs
    from instseg_jax.config import load_config
    from instseg_jax.data.coco import CocoDataset
    from instseg_jax.data.feeding import batches, load_batches, read_data
    from instseg_jax.data.own import dense_masks, make_example, own_data
    from instseg_jax.data.transforms import Transform
    from instseg_jax.inference.pipeline import Pipeline
    from instseg_jax.inference.predictor import LoadedModel
    from instseg_jax.models.anatomy import features, look_inside
    from instseg_jax.models.mask_rtdetr import MaskRTDETR
    from instseg_jax.results import figures
    from instseg_jax.results.result import Result
    from instseg_jax.training.functional import Assign, ExtraLoss, Init, Losses, Step
    from instseg_jax.training.optimizer import Optimizer
    from instseg_jax.training.trackers import Tracker

__version__ = "0.1.0"
_ELSEWHERE = {  # public names that are defined in a room: they are imported when they are asked for
    "batches": "data.feeding",
    "call": "cli",
    "dense_masks": "data.own",
    "features": "models.anatomy",
    "figures": "results.figures",  # the module itself
    "keep_compiled_programs": "compiled",
    "load_batches": "data.feeding",
    "load_config": "config",
    "look_inside": "models.anatomy",
    "make_example": "data.own",
    "own_data": "data.own",
    "read_data": "data.feeding",
    "Tracker": "training.trackers",
}
# fmt: off
__all__ = [
    "Tracker", "__version__", "batches", "call", "create_model", "create_pipeline", "dense_masks", "evaluate",
    "features", "figures", "keep_compiled_programs", "load", "load_batches", "load_config", "look_inside", "losses",
    "make_example", "make_train_step", "own_data", "predict", "read_data", "train",
]
# fmt: on


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'instseg_jax' has no attribute {name!r}")
    module = importlib.import_module(f"instseg_jax.{_ELSEWHERE[name]}")
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def create_model(
    name: str | None = None,
    *,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    num_queries: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> tuple["MaskRTDETR", dict]:
    """Create a network and its variables.

    Args:
      name: mask_rtdetr_n, _s, _m, _l, _x or _h; the official spelling Mask-RT-DETR-L works too. May be left out for
        weights that say it themselves.
      num_classes: K; None: as the weights have it, else 80.
      weights: None for fresh values, else the folder of a run, a checkpoint, an official `.pdparams` file, or a known
        name such as mask_rtdetr_l_coco. A run or checkpoint describes its network whole: name, classes, queries,
        layers, prototypes, `mask_enhanced` and dtype come from it.
      num_queries: Q; any number, no parameter depends on it. None: as the weights have it, else 300.
      dtype: float32 or bfloat16, in which a network without a config of its own computes; parameters stay float32.
      seed: of fresh values.

    Returns: (model, variables); `variables` is {"params": every parameter, "batch_stats": ...} in numpy, and
      model.apply(variables, images) with images [B, H, W, 3] float32 RGB in 0..1, sides multiples of 32, gives
      class_logits [B, Q, K], boxes [B, Q, 4] (normalised cxcywh) and mask_logits [B, Q, H/4, W/4].

    Raises: ValueError for an unknown name (lists the names), weights that do not fit, or a value that differs from what
      the weights say of themselves (names both).
    """
    from instseg_jax.models.mask_rtdetr import initial_variables, make_model
    from instseg_jax.models.variants import canonical_name

    found = None
    if weights is not None:
        from instseg_jax.weights import merge_weights, read_weights

        found = read_weights(weights)
        if found.metadata.get("config"):
            from instseg_jax.inference.predictor import load_model

            loaded = load_model(found)
            own = {"name": loaded.config.model.name, "num_classes": len(loaded.class_names)}
            own["num_queries"] = loaded.network.num_queries
            given = {"name": None if name is None else canonical_name(name), "num_classes": num_classes}
            given["num_queries"] = num_queries
            for field, value in given.items():
                if value is not None and value != own[field]:
                    raise ValueError(f"{field} is {value}, but the weights {weights} were made with {own[field]}")
            return loaded.network, loaded.variables
    if name is None:
        raise ValueError("name is None; name a size such as mask_rtdetr_l, or weights that say it themselves")
    if num_classes is None:
        num_classes = 80 if found is None or found.num_classes is None else found.num_classes
    num_queries = 300 if num_queries is None else num_queries
    model = make_model(name, num_classes=num_classes, num_queries=num_queries, dtype=dtype)
    variables = initial_variables(model, seed=seed)
    if found is not None:
        variables, _ = merge_weights(variables, found)
    return model, variables


def create_pipeline(
    pipeline: str | os.PathLike[str] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    device: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    threshold: "float | Mapping[str, float] | None" = None,
    batch_size: int | None = None,
    use_hpip: bool | None = None,
    hpi_config: Mapping[str, Any] | None = None,
    model_config: "ConfigDict | None" = None,
) -> "Pipeline":
    """Create a pipeline that finds the instances in images.

    Args:
      pipeline: "instance_segmentation" (the default), or the path of a pipeline's YAML file.
      config: the content of such a file; it goes before `pipeline`.
      device: auto, cpu, gpu, tpu, or gpu:0,1 for several, which share every batch.
      weights: workdir of a run, checkpoint, export, or official file.
      threshold: lowest score, for all classes or by class name.
      batch_size: images a call of the network.
      use_hpip: True asks for the quickest runtime that is installed.
      hpi_config: settings of that runtime, {"backend": "onnxruntime", "backend_config": {"cpu_num_threads": 4}}.
      model_config: how the network is built, for files that don't say.

    What None stands for, and errors: `instseg_jax.inference.pipeline.create_pipeline`.

    Returns: a pipeline; `for result in pipeline.predict(images): result.save_all("results")`.
    """
    from instseg_jax.inference.pipeline import create_pipeline as create

    def accelerate(*args: Any, **settings: Any) -> Any:
        from instseg_jax.export.accelerate import accelerate as quickest  # only when use_hpip asks for it

        return quickest(*args, **settings)

    return create(
        pipeline,
        config=config,
        device=device,
        weights=weights,
        threshold=threshold,
        batch_size=batch_size,
        use_hpip=use_hpip,
        hpi_config=hpi_config,
        model_config=model_config,
        accelerate=accelerate,
    )


def load(
    weights: str | os.PathLike[str], *, config: "ConfigDict | str | None" = None, dtype: str | None = None
) -> tuple["MaskRTDETR", dict, "LoadedModel"]:
    """Load weights of any kind with what is known about them.

    Args:
      weights: workdir of a run, checkpoint, official file, or a known name such as mask_rtdetr_n_pretrained.
      config: how the network is built, for files that don't say: a config or the name of one.
      dtype: float32 or bfloat16, in which the network computes; None: as it was trained.

    Returns: (model, variables, info); `info` has class_names, category_ids, config, metadata, thresholds and summary.

    Raises: FileNotFoundError or ValueError in one sentence when there are no weights or they do not fit.
    """
    from instseg_jax.config import as_config
    from instseg_jax.inference.predictor import load_model

    overrides = {} if dtype is None else {"model.dtype": dtype}
    loaded = load_model(weights, None if config is None else as_config(config), overrides)
    return loaded.network, loaded.variables, loaded


def predict(
    image: Any, weights: str | os.PathLike[str] = "mask_rtdetr_n_pretrained", *, threshold: float | None = None
) -> "Result":
    """Find the instances in one picture; the pipeline of the last weights is kept for the next call.

    Args:
      image: a path, a URL, an array [h, w, 3] RGB uint8, or a PIL image.
      weights: as of `create_pipeline`; without any, the small ones that come with the package.
      threshold: lowest score that is kept; None: that of the weights, else 0.5.

    Returns: the result, which notebooks show as a picture.

    Raises: FileNotFoundError or ValueError in one sentence for weights or a picture that can't be read.
    """
    return next(iter(_pipeline_of(os.fspath(weights)).predict(image, threshold)))


@functools.lru_cache(maxsize=1)
def _pipeline_of(weights: str) -> "Pipeline":
    return create_pipeline(weights=weights)


def losses(
    model: "MaskRTDETR",
    settings: "ConfigDict | str",
    *,
    extra: "ExtraLoss | None" = None,
    assign: "str | Assign" = "callback",
) -> "Losses":
    """The whole training loss as one pure function, for `jax.jit`, `jax.grad` and training loops of one's own.

    Args:
      model: from `create_model` or `load`.
      settings: config, or the name of one, whose sections `loss` and `denoising` are read.
      extra: (outputs, batch, query_index) -> terms of one's own {name: [] weighted}, which are added. `outputs` is a
        `types.TrainingOutputs`, `batch` a `types.Batch`; `query_index` [S, B, N] says which query each object was
        matched with in each prediction set, the last set being that of the last layer; -1 for none.
      assign: who solves the matching: "callback" (SciPy on the host, from inside the program; quickest on a CPU),
        "program" (without the host: such a program is kept compiled from run to run), or a function
        (costs [S, B, Q, N], valid [B, N]) -> query_index [S, B, N] int32, -1 for none.

    Returns: (params, batch_stats, batch, key) -> loss, (terms, batch_stats): the sum [], its terms by name, and the
      running statistics after the batch. Equal keys give equal losses.

    Raises: ValueError for settings or an assignment that are not allowed.
    """
    from instseg_jax.config import as_config
    from instseg_jax.training.functional import build_losses

    return build_losses(model, as_config(settings), extra=extra, assign=assign)


def make_train_step(
    model: "MaskRTDETR",
    optimizer: "Optimizer",
    settings: "ConfigDict | str",
    *,
    extra: "ExtraLoss | None" = None,
    frozen: Sequence[str] | None = None,
    assign: "str | Assign" = "callback",
) -> "tuple[Init, Step]":
    """A training step as one pure function, with an optimizer, loss terms and frozen parts of one's own.

    Args:
      model: from `create_model` or `load`.
      optimizer: any of Optax.
      settings: config, or the name of one: its loss, denoising and moving average.
      extra: as of `losses`.
      frozen: patterns; parameters in whose path one is found stay as they are. None: those of the config.
      assign: as of `losses`.

    Returns: `init(variables) -> state` and `step(state, batch, key) -> (state, metrics)`, for `jax.jit`. One key does
      for a whole run: the number of the step is folded into it. `state.ema_variables` are the averaged weights. A step
      whose loss or gradient is not finite changes nothing, and has `skipped` in its metrics.

    Raises: ValueError for settings that are not allowed; `init`, for a pattern that is found in no parameter's path.
    """
    from instseg_jax.config import as_config
    from instseg_jax.training.functional import build_train_step

    return build_train_step(model, optimizer, as_config(settings), extra=extra, frozen=frozen, assign=assign)


def train(
    config: "ConfigDict | str",
    workdir: str | os.PathLike[str],
    *,
    dataset: "CocoDataset | None" = None,
    val_dataset: "CocoDataset | None" = None,
    optimizer: "Optimizer | None" = None,
    transforms: "Sequence[Transform]" = (),
    trackers: "Mapping[str, Tracker] | None" = None,
) -> dict:
    """Train as the verb `train` does; the same call on the same workdir goes on where it stopped.

    Args:
      config: from `load_config`, or the name of one: "quickstart", "finetune:n".
      workdir: folder of the run; `instseg_jax.training.loop.train` lists what is written there.
      dataset: from `own_data`, in place of what the config names.
      val_dataset: to validate on, where `dataset` is given; None: no validation, the last weights count as the best.
      optimizer: any of Optax, in place of AdamW and schedule of the config, whose frozen parts stay frozen.
      transforms: functions (example, rng) -> example for training pictures, before the augmentation of the config.
      trackers: of one's own, by name, beside those that `log.trackers` names.

    Returns: what train_result.json holds: done_flag, steps, best_score (0..1), models, seconds, and so on.

    Raises: ValueError or OSError in one sentence for anything that is wrong with config, data or workdir.
    """
    from instseg_jax.config import as_config
    from instseg_jax.data.coco import CocoDataset
    from instseg_jax.training.loop import train as run
    from instseg_jax.training.setup import Own

    for name, given in (("dataset", dataset), ("val_dataset", val_dataset)):
        if not isinstance(given, CocoDataset | None):
            raise ValueError(f"{name} is a {type(given).__name__}; make it one with own_data(items, class_names)")
    if val_dataset is not None and dataset is None:
        raise ValueError("val_dataset is given without dataset; give both, or name both in the config")
    return run(
        as_config(config), os.fspath(workdir), Own(dataset, val_dataset, optimizer, tuple(transforms), trackers or {})
    )


def evaluate(config: "ConfigDict | str", weights: str | os.PathLike[str]) -> dict:
    """Score weights on the validation images of a config, as the verb `evaluate` does.

    Args:
      config: from `instseg_jax.config.load_config`, or the name of one; how the
        network is built and fed comes from a checkpoint itself.
      weights: workdir of a run, checkpoint, or official file.

    Returns: metrics by name, such as segm/AP, bbox/AP50 and segm/AP/<class>, 0..1; None where there is nothing to find.

    Raises: FileNotFoundError or ValueError in one sentence when there are no weights or they do not fit the data.
    """
    from instseg_jax.config import as_config
    from instseg_jax.scoring.run import evaluate_weights

    metrics, _ = evaluate_weights(as_config(config), weights)
    return metrics
