"""The verb `train`."""

import argparse
import functools

import jax

from instseg_jax.commands import changed, print_next
from instseg_jax.config import load_config
from instseg_jax.peers import REQUEUE
from instseg_jax.training import loop
from instseg_jax.verbs.export import check_best_export, export_best


def train(options: argparse.Namespace) -> int:
    """Train, or go on with the run in the workdir; the first process says how it ended and exports."""
    config = load_config(options.config, options.overrides)
    check_best_export(config)
    result = loop.train(config, options.workdir, finish=functools.partial(export_best, config, options.workdir))
    code = REQUEUE if result["end"] == "requeue" else 0
    if jax.process_index() != 0:
        return code
    best = result["best_score"]
    print(f"{result['steps']} of {result['total_steps']} steps in {options.workdir}")
    has_weights = "best" in result["models"]
    nothing = "none, best_model has the last weights" if has_weights else "none yet"
    print(f"best {result['best_metric']}: {nothing if best is None else f'{best:.3f}'}")
    if not result["done_flag"]:
        print(f"next: {changed('train', {})}")
        return code
    verb = ("evaluate",) if best is not None else ("predict", "--input=YOUR_PICTURES")
    print_next(*verb, f"--weights={options.workdir}", f"--workdir={options.workdir}")
    return 0
