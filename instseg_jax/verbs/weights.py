"""The verbs `import_weights` and `export_weights`: official weights in, weights under official names out."""

import argparse
import pathlib

from instseg_jax.commands import print_next
from instseg_jax.config import load_config
from instseg_jax.inference.predictor import describe, load_with_overrides
from instseg_jax.weights import checkpoint


def import_weights(options: argparse.Namespace) -> int:
    """Turn official weights into the best model of a workdir, and say what became of each tensor."""
    config = load_config(options.config, options.overrides)
    from instseg_jax.inference.predictor import import_checkpoint

    summary = import_checkpoint(config, options.weights, pathlib.Path(options.workdir) / checkpoint.BEST_MODEL)
    print(summary)
    print(f"checkpoint: {pathlib.Path(options.workdir) / checkpoint.BEST_MODEL}")
    print_next("predict", f"--weights={options.workdir}", "--input=YOUR_PICTURES")
    return 0


def export_weights(options: argparse.Namespace) -> int:
    """Write a checkpoint's weights to one file in the workdir, under the official names.

    Raises: ValueError for an export, which has no weights to write.
    """
    from instseg_jax.weights.state_dicts import export_weights as write_weights

    model = load_with_overrides(options.weights or options.workdir, options.config, options.overrides)
    _ = model.network  # an export has no weights to write
    path = pathlib.Path(options.workdir) / f"{model.config.model.name}.{options.format}"
    metadata = describe(model)
    write_weights(path, model.variables, format=options.format, metadata=metadata, half=options.half)
    print(f"weights: {path}")
    size = model.config.model.name[-1]
    print_next("import_weights", f"--weights={path}", f"--config=mask_rtdetr:{size}", comment="reads them back")
    return 0
