"""What training carries from step to step, and nothing else: the model and the optimizer are closed over."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from instseg_jax import weights as weights_room
from instseg_jax.messages import quote
from instseg_jax.packing import cut
from instseg_jax.types import HostOrDeviceArray
from instseg_jax.weights.merge import MergeSummary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a checkpoint must hold for training to go on as if it had never stopped.

    `step` counts batches, `num_updates` those of them that changed the weights: a batch whose loss or
    gradient is not finite is skipped. Randomness is a function of seed and step, so no key is kept.
    """

    step: HostOrDeviceArray  # [] int32
    num_updates: HostOrDeviceArray  # [] int32
    params: dict
    batch_stats: dict
    average: Mapping[str, HostOrDeviceArray]  # {"params": [P], "batch_stats": [S]}: all leaves joined
    opt_state: tuple

    @property
    def ema_variables(self) -> dict:
        """What is evaluated, shown and shipped: {"params": ..., "batch_stats": ...}, in numpy outside of `jit`."""
        like = {"params": self.params, "batch_stats": self.batch_stats}
        return {name: cut(_on_host(vector), like[name]) for name, vector in self.average.items()}


def _zeros(tree: dict) -> np.ndarray:
    leaves = jax.tree.leaves(tree)
    return np.zeros(sum(leaf.size for leaf in leaves), np.result_type(*leaves))


def _on_host(vector: HostOrDeviceArray) -> HostOrDeviceArray:
    # A copy: the next step takes the memory of this state.
    return vector if isinstance(vector, jax.core.Tracer) else np.array(vector)


def initial_state(variables: dict, optimizer) -> TrainState:
    """State before the first step. Moving averages start from zero, as in the reference."""
    return TrainState(
        step=np.zeros((), np.int32),
        num_updates=np.zeros((), np.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        average={name: _zeros(variables[name]) for name in ("params", "batch_stats")},
        opt_state=jax.tree.map(np.asarray, optimizer.init(jax.tree.map(jnp.asarray, variables["params"]))),
    )


def start_from_weights(config: ConfigDict, variables: dict, class_names: Sequence[str]) -> tuple[dict, MergeSummary]:
    """Return `variables` with the values of `model.weights`, and a summary. Raises ValueError where they don't fit."""
    found = weights_room.read_weights(config.weights)
    try:
        return weights_room.merge_weights(variables, found, class_names=class_names, skip=config.weights_skip or ())
    except ValueError as error:
        raise ValueError(
            f"model.weights={quote(config.weights)}: {error}; model.weights_skip takes such patterns, "
            "--config.model.weights= starts from nothing"
        ) from error
