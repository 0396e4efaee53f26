"""instseg_jax: instance segmentation in JAX with Mask-RT-DETR.

The public face: `create_model`, `create_pipeline`, `train`, `evaluate`. The verbs of the command line do the same.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from instseg_jax.inference.pipeline import Pipeline
    from instseg_jax.models.mask_rtdetr import MaskRTDETR

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "create_pipeline", "evaluate", "train"]


def create_model(
    name: str | None = None,
    *,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    num_queries: int | None = None,
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
      seed: of fresh values.

    Returns: (model, variables); `variables` is {"params": every parameter, "batch_stats": ...} in numpy, and
      `model.apply(variables, images)` with images [B, H, W, 3] float32 RGB in 0..1, sides multiples of 32, gives
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
    model = make_model(name, num_classes=num_classes, num_queries=300 if num_queries is None else num_queries)
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


def train(config: "ConfigDict | str", workdir: str | os.PathLike[str]) -> dict:
    """Train as the verb `train` does; the same call on the same workdir goes on where it stopped.

    Args:
      config: from `instseg_jax.config.load_config`, or the name of one: "quickstart", "finetune:n".
      workdir: folder of the run; `instseg_jax.training.loop.train` lists what is written there.

    Returns: what train_result.json holds: done_flag, steps, best_score (0..1), models, seconds, and so on.

    Raises: ValueError or OSError in one sentence for anything that is wrong with config, data or workdir.
    """
    from instseg_jax.training.loop import train as run

    return run(_config_of(config), os.fspath(workdir))


def evaluate(config: "ConfigDict | str", weights: str | os.PathLike[str]) -> dict:
    """Score weights on the validation images of a config, as the verb `evaluate` does.

    Args:
      config: from `instseg_jax.config.load_config`, or the name of one; how the
        network is built and fed comes from a checkpoint itself.
      weights: workdir of a run, checkpoint, or official file.

    Returns: metrics by name, such as segm/AP, bbox/AP50 and segm/AP/<class>, 0..1; None where there is nothing to find.

    Raises: FileNotFoundError or ValueError in one sentence when there are no weights or they do not fit the data.
    """
    from instseg_jax.scoring.run import evaluate_weights

    metrics, _ = evaluate_weights(_config_of(config), weights)
    return metrics


def _config_of(config: "ConfigDict | str") -> "ConfigDict":
    from instseg_jax.config import load_config

    return load_config(config) if isinstance(config, str | os.PathLike) else config
