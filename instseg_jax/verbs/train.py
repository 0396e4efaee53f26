"""The verb `train`."""

import argparse

import jax

from instseg_jax.config import load_config
from instseg_jax.training import loop
from instseg_jax.verbs.export import check_best_export, export_best


def train(options: argparse.Namespace) -> int:
    """Train, or go on with the run in the workdir; the first process says how it ended and exports."""
    config = load_config(options.config, options.overrides)
    check_best_export(config)
    result = loop.train(config, options.workdir)
    if jax.process_index() != 0:
        return 0
    best = result["best_score"]
    print(f"{result['steps']} of {result['total_steps']} steps in {options.workdir}")
    print(f"best {result['best_metric']}: {'none yet' if best is None else f'{best:.3f}'}")
    if result["done_flag"] and config.checkpoint.export:
        export_best(options.workdir, config.checkpoint.export)
    return 0
