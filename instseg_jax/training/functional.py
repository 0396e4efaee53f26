"""The loss and the step as plain functions, one program each: for training loops of one's own.

`step.py` is what the verb `train` runs: three programs that the compilation cache keeps. Here the matching is called
from inside the program, so that the whole is one function of arrays, to be differentiated, compiled and composed; a
program with a callback in it is compiled anew in every process.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from instseg_jax.messages import quote
from instseg_jax.models.denoising import make_denoising_queries
from instseg_jax.models.mask_rtdetr import MaskRTDETR, count_queries
from instseg_jax.training.assignment import assign_in_program
from instseg_jax.training.criterion import (
    LossSettings,
    build_loss_settings,
    compute_losses,
    compute_match_costs,
    draw_match_points,
    draw_points,
)
from instseg_jax.training.matching import assign_by_callback
from instseg_jax.training.optimizer import learning_rate_multipliers, train_alone
from instseg_jax.training.state import TrainState, initial_state
from instseg_jax.training.step import update_state
from instseg_jax.types import Array, Batch, TrainingOutputs

Assign = Callable[[Array, Array], Array]  # costs [S, B, Q, N], valid [B, N] -> query_index [S, B, N], -1 for none
ExtraLoss = Callable[[TrainingOutputs, Batch, Array], Mapping[str, Array]]  # the array: query_index, as of Assign
Losses = Callable[[dict, dict, Batch, Array], tuple[Array, tuple[dict[str, Array], dict]]]
Init = Callable[[dict], TrainState]
Step = Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]

ASSIGNMENTS: dict[str, Assign] = {"callback": assign_by_callback, "program": assign_in_program}


def build_losses(
    model: MaskRTDETR, config: ConfigDict, *, extra: ExtraLoss | None = None, assign: str | Assign = "callback"
) -> Losses:
    """The loss that a config's sections `loss` and `denoising` describe; see `make_losses`."""
    return make_losses(
        model, build_loss_settings(config.loss), denoising=dict(config.denoising), extra=extra, assign=assign
    )


def make_losses(
    model: MaskRTDETR,
    settings: LossSettings,
    *,
    denoising: Mapping[str, Any],
    extra: ExtraLoss | None = None,
    assign: str | Assign = "callback",
) -> Losses:
    """The whole loss as a pure function (params, batch_stats, batch, key) -> loss, (terms, batch_stats).

    It can be compiled with `jax.jit` and differentiated by params, and computes what a step of the verb `train` does.

    Args:
      model: the network.
      settings: of the loss.
      denoising: num_denoising, label_noise_ratio and box_noise_scale, as in a config.
      extra: (outputs, batch, query_index) -> terms of one's own {name: [] weighted}; they are added, and appear among
        the terms. query_index [S, B, N] is the query of each object in each prediction set, -1 for none.
      assign: "callback" (SciPy on the host), "program" (part of the program, see `assignment.py`), or one's own
        function (costs [S, B, Q, N], valid [B, N]) -> query_index [S, B, N] int32, -1 for none; no gradient flows
        through it.

    Returns: the function. Its key draws noise and points; equal keys give equal losses.

    Raises: ValueError for an unknown assignment; the function, where a term of `extra` has the name of another.
    """
    if isinstance(assign, str):
        if assign not in ASSIGNMENTS:
            raise ValueError(f"assign is {quote(assign)}, it must be one of {', '.join(ASSIGNMENTS)}, or a function")
        assign = ASSIGNMENTS[assign]
    match = assign

    def losses(params: dict, batch_stats: dict, batch: Batch, key: Array) -> tuple[Array, tuple[dict, dict]]:
        noise_key, match_key, points_key = jax.random.split(key, 3)
        noised = make_denoising_queries(
            batch.targets,
            num_classes=model.num_classes,
            num_queries=count_queries(model.num_queries, *batch.images.shape[1:3]),
            rng=noise_key,
            **denoising,
        )
        variables = {"params": params, "batch_stats": batch_stats}
        outputs, updated = model.apply(
            variables, jnp.asarray(batch.images), train=True, denoising=noised, mutable=["batch_stats"]
        )
        points = draw_match_points(match_key, settings, outputs)
        costs = compute_match_costs(outputs, batch.targets, points, settings)
        query_index = match(jax.lax.stop_gradient(costs), jnp.asarray(batch.targets.valid))
        draws = draw_points(points_key, settings, outputs)
        loss, terms = compute_losses(outputs, batch.targets, noised, query_index, draws, settings)
        for name, value in (extra(outputs, batch, query_index) if extra else {}).items():
            if name in terms:
                raise ValueError(f"extra has a term {quote(name)}, which the loss has already; give it another name")
            terms[name] = value
            loss = loss + value
        return loss, (terms, updated["batch_stats"])

    return losses


def build_train_step(
    model: MaskRTDETR,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    *,
    extra: ExtraLoss | None = None,
    frozen: Sequence[str] | None = None,
    assign: str | Assign = "callback",
) -> tuple[Init, Step]:
    """A step with an optimizer of one's own; loss, moving average and, unless given, `frozen` as the config says."""
    return make_train_step(
        build_losses(model, config, extra=extra, assign=assign),
        optimizer,
        frozen=config.optimizer.frozen if frozen is None else frozen,
        decay=config.optimizer.ema_decay,
        ramp_steps=config.optimizer.ema_ramp_steps,
    )


def make_train_step(
    losses: Losses,
    optimizer: optax.GradientTransformation,
    *,
    frozen: Sequence[str],
    decay: float,
    ramp_steps: int,
) -> tuple[Init, Step]:
    """A training step as one pure function: loss, gradients, optimizer, moving average.

    Args:
      losses: from `make_losses`, or a function of one's own of the same form.
      optimizer: any of Optax.
      frozen: patterns; parameters in whose path one is found get no gradient, no moments and no update.
      decay: of the moving average, to which it grows over `ramp_steps` updates.
      ramp_steps: see `optimizer.ema_decay`.

    Returns: `init(variables) -> state` and `step(state, batch, key) -> (state, metrics)`. The step number is folded
      into the key, so that one key does for a whole run. A step whose loss or gradient is not finite changes nothing
      but the number. Metrics are `loss`, every term, `grad_norm` and `skipped`.

    Raises: ValueError from `init`, for a pattern that is found in no parameter's path.
    """

    def factors(params: dict) -> dict:
        return learning_rate_multipliers(params, (), tuple(frozen))

    def init(variables: dict) -> TrainState:
        return initial_state(variables, train_alone(optimizer, factors(variables["params"])))

    def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Array]]:
        multipliers = factors(state.params)

        def loss_of(params: dict) -> tuple[Array, tuple[dict, dict]]:
            params = jax.tree.map(lambda p, factor: p if factor > 0 else jax.lax.stop_gradient(p), params, multipliers)
            return losses(params, state.batch_stats, batch, jax.random.fold_in(key, state.step))

        (loss, (terms, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return update_state(
            state,
            gradients,
            batch_stats,
            loss,
            terms,
            optimizer=train_alone(optimizer, multipliers),
            schedule=None,
            multipliers=multipliers,
            decay=decay,
            ramp_steps=ramp_steps,
        )

    return init, step
