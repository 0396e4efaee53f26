"""instseg_jax: instance segmentation in JAX with Mask-RT-DETR.

The public face: `create_model`, `create_pipeline`, `train`, `evaluate`. The verbs of the command line do the same.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from instseg_jax.inference.pipeline import Pipeline
    from instseg_jax.models.mask_rtdetr import MaskRTDETR

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "create_pipeline", "evaluate", "train"]


def create_model(
    name: str,
    *,
    num_classes: int = 80,
    weights: str | os.PathLike[str] | None = None,
    num_queries: int = 300,
    seed: int = 0,
) -> tuple["MaskRTDETR", dict]:
    """Create a network and its variables.

    Args:
      name: mask_rtdetr_n, _s, _m, _l, _x or _h; the official spelling Mask-RT-DETR-L works too.
      num_classes: K.
      weights: None for fresh values, else an official `.pdparams` file, a checkpoint, the folder of a run, or a
        known name such as mask_rtdetr_l_coco. The file must have num_classes classes.
      num_queries: Q; any number, no parameter depends on it.
      seed: of fresh values.

    Returns: (model, variables); `variables` is {"params": every parameter, "batch_stats": ...} in numpy, and
      `model.apply(variables, images)` with images [B, H, W, 3] float32 RGB in 0..1, sides multiples of 32, gives
      class_logits [B, Q, K], boxes [B, Q, 4] (normalised cxcywh) and mask_logits [B, Q, H/4, W/4].

    Raises: ValueError for an unknown name (lists the names) or weights that do not fit.
    """
    from instseg_jax.models.mask_rtdetr import initial_variables, make_model

    model = make_model(name, num_classes=num_classes, num_queries=num_queries)
    variables = initial_variables(model, seed=seed)
    if weights is not None:
        from instseg_jax.weights import merge_weights, read_weights

        variables, _ = merge_weights(variables, read_weights(weights))
    return model, variables


def create_pipeline(pipeline: str | os.PathLike[str] | None = None, **options: Any) -> "Pipeline":
    """Create a pipeline that finds the instances in images; see `instseg_jax.inference.pipeline.create_pipeline`.

    Args:
      pipeline: "instance_segmentation" (the default) or the path of a pipeline's YAML file.
      options: config, device, weights, threshold, batch_size, use_hpip, hpi_config, model_config.

    Returns: a pipeline; `for result in pipeline.predict(images): result.save_all("results")`.
    """
    from instseg_jax.inference.pipeline import create_pipeline as create

    def accelerate(*args: Any, **settings: Any) -> Any:
        from instseg_jax.export.accelerate import accelerate as quickest  # only when use_hpip asks for it

        return quickest(*args, **settings)

    return create(pipeline, accelerate=accelerate, **options)


def train(config: "ConfigDict", workdir: str | os.PathLike[str]) -> dict:
    """Train as the verb `train` does; the same call on the same workdir goes on where it stopped.

    Args:
      config: from `instseg_jax.config.load_config`.
      workdir: folder of the run; `instseg_jax.training.loop.train` lists what is written there.

    Returns: what train_result.json holds: done_flag, steps, best_score (0..1), models, seconds, and so on.

    Raises: ValueError or OSError in one sentence for anything that is wrong with config, data or workdir.
    """
    from instseg_jax.training.loop import train as run

    return run(config, os.fspath(workdir))


def evaluate(config: "ConfigDict", weights: str | os.PathLike[str]) -> dict:
    """Score weights on the validation images of a config, as the verb `evaluate` does.

    Args:
      config: from `instseg_jax.config.load_config`; how the network is built and fed comes from a checkpoint itself.
      weights: workdir of a run, checkpoint, or official file.

    Returns: metrics by name, such as segm/AP, bbox/AP50 and segm/AP/<class>, 0..1; None where there is nothing to find.

    Raises: FileNotFoundError or ValueError in one sentence when there are no weights or they do not fit the data.
    """
    from instseg_jax.scoring.run import evaluate_weights

    metrics, _ = evaluate_weights(config, weights)
    return metrics
