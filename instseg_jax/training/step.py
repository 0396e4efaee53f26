"""One training step: forward, loss, backward, update, moving average. Pure, compiled once an input size."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instseg_jax.models.denoising import make_denoising_queries
from instseg_jax.models.mask_rtdetr import MaskRTDETR
from instseg_jax.training import sharding
from instseg_jax.training.criterion import LossSettings, build_loss_settings, compute_losses, draw_points
from instseg_jax.training.optimizer import ema_decay, gradient_norm, update_ema
from instseg_jax.training.state import TrainState
from instseg_jax.types import Array, Batch, DenoisingQueries

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def build_train_step(
    config: ConfigDict,
    model: MaskRTDETR,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    multipliers: dict,
    mesh: Mesh,
) -> TrainStep:
    """The step that a config describes, compiled for the mesh; it consumes the state that it is given."""
    settings = build_loss_settings(config.loss)
    noise = dict(config.denoising)
    seed, decay, ramp_steps = config.seed, config.optimizer.ema_decay, config.optimizer.ema_ramp_steps

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        noise_key, points_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        denoising = make_denoising_queries(
            batch.targets, num_classes=model.num_classes, num_queries=model.num_queries, rng=noise_key, **noise
        )
        return train_step(
            state,
            batch,
            denoising,
            lambda outputs: draw_points(points_key, settings, outputs),
            model=model,
            optimizer=optimizer,
            schedule=schedule,
            multipliers=multipliers,
            settings=settings,
            decay=decay,
            ramp_steps=ramp_steps,
            mesh=mesh,
        )

    copied, split = sharding.replicated(mesh), sharding.split_over_batch(mesh)
    return jax.jit(step, in_shardings=(copied, split), out_shardings=(copied, copied), donate_argnums=0)


def train_step(
    state: TrainState,
    batch: Batch,
    denoising: DenoisingQueries | None,
    draw: Callable,
    *,
    model: MaskRTDETR,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    multipliers: dict,
    settings: LossSettings,
    decay: float,
    ramp_steps: int,
    mesh: Mesh | None,
) -> tuple[TrainState, dict[str, Array]]:
    """Update the state by one batch; a batch whose loss or gradient is not finite changes nothing but `step`.

    Args:
      denoising: noised objects, or None.
      draw: training outputs -> the points of the loss.
      multipliers: learning rate factor of each parameter; 0: frozen, without gradient and moving average.

    Returns: the state, and metrics: `loss`, every loss term, `grad_norm` (before clipping, without learning rate
      factors), `learning_rate`, `objects`, `skipped` (1 for a step that changed nothing).
    """
    trainable = jax.tree.map(lambda factor: factor > 0, multipliers)

    def loss_function(params: dict) -> tuple[Array, tuple[dict, dict]]:
        params = jax.tree.map(lambda p, train: p if train else jax.lax.stop_gradient(p), params, trainable)
        outputs, updated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch.images,
            train=True,
            denoising=denoising,
            mutable=["batch_stats"],
        )
        total, terms = compute_losses(outputs, batch.targets, denoising, draw(outputs), settings, mesh=mesh)
        return total, (terms, updated["batch_stats"])

    (loss, (terms, batch_stats)), gradients = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    grad_norm = gradient_norm(gradients, multipliers)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    now = ema_decay(state.num_updates, decay=decay, ramp_steps=ramp_steps)
    updated = TrainState(
        step=state.step,
        num_updates=state.num_updates + 1,
        params=params,
        batch_stats=batch_stats,
        ema_params=update_ema(state.ema_params, params, now, trainable),
        ema_batch_stats=update_ema(state.ema_batch_stats, batch_stats, now),
        opt_state=opt_state,
    )
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    state_after = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, state)
    metrics = {
        "loss": loss,
        **terms,
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.num_updates),
        "objects": jnp.sum(jnp.asarray(batch.targets.valid)),
        "skipped": ~is_finite,
    }
    return _with_step(state_after, state.step + 1), metrics


def _with_step(state: TrainState, step: Array) -> TrainState:
    return TrainState(**{**vars(state), "step": step})
