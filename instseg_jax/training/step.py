"""One training step: forward, matching, loss and backward, update. Pure functions, compiled once an input size.

The step is three compiled programs with the matching between the first two:

    forward   network and matching costs                      for each input size
    assign    SciPy on the host (`matching.assign`)
    backward  losses and gradients                            for each input size
    update    optimizer, moving average, skipping bad steps   once

On one device the three are compiled side by side, as each keeps a single core busy.

A host callback inside one program would do the same, but JAX keeps no program with a callback in its compilation
cache: every start of a run would compile for minutes. Gradients of several micro-batches add up between backward
and update.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from instseg_jax.devices import replicated
from instseg_jax.models.denoising import make_denoising_queries
from instseg_jax.models.mask_rtdetr import MaskRTDETR, count_queries
from instseg_jax.training.criterion import (
    LossSettings,
    PointDraws,
    build_loss_settings,
    compute_losses,
    compute_match_costs,
    draw_match_points,
    draw_points,
)
from instseg_jax.training.matching import assign
from instseg_jax.training.optimizer import ema_decay, gradient_norm, update_ema
from instseg_jax.training.state import TrainState
from instseg_jax.types import Array, Batch, DenoisingQueries, HostOrDeviceArray, Targets, TrainingOutputs

TrainStep = Callable[[TrainState, Sequence[Batch]], tuple[TrainState, dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """What the forward program leaves for matching and the backward program."""

    outputs: TrainingOutputs
    pull_back: Callable[[TrainingOutputs], tuple[dict]]  # gradient to the outputs -> gradient to the parameters
    batch_stats: dict
    denoising: DenoisingQueries | None
    match_costs: Array  # [S, B, Q, N]


def build_train_step(
    config: ConfigDict,
    model: MaskRTDETR,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    multipliers: dict,
    mesh: Mesh,
    *,
    compiler_options: dict | None = None,
) -> TrainStep:
    """The step that a config describes: (state, micro-batches on the mesh) -> (state, metrics).

    It consumes the state that it is given. All micro-batches have the same size; losses are divided by the number
    of objects in all of them, so that their gradients add up to the whole batch's.

    Raises: ValueError for a loss that `build_loss_settings` refuses; the step itself, when it is given no micro-batch.
    """
    settings = build_loss_settings(config.loss)
    noise = dict(config.denoising)
    copied = replicated(mesh)

    def program(function: Callable, **options) -> Any:
        return jax.jit(function, compiler_options=compiler_options, **options)

    def random_keys(step: HostOrDeviceArray, part: int) -> Array:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        return jax.random.split(jax.random.fold_in(key, part), 3)  # of the noise, of both kinds of points

    def forward(params: dict, batch_stats: dict, step: HostOrDeviceArray, part: int, batch: Batch) -> Forward:
        noise_key, match_key, _ = random_keys(step, part)
        denoising = make_denoising_queries(
            batch.targets,
            num_classes=model.num_classes,
            num_queries=count_queries(model.num_queries, *batch.images.shape[1:3]),
            rng=noise_key,
            **noise,
        )
        return run_forward(
            params,
            batch_stats,
            batch,
            denoising,
            lambda outputs: draw_match_points(match_key, settings, outputs),
            model=model,
            multipliers=multipliers,
            settings=settings,
            mesh=mesh,
        )

    def backward(
        forward: Forward, targets: Targets, query_index: Array, num_objects: Array, step: HostOrDeviceArray, part: int
    ) -> tuple[dict, Array, dict[str, Array]]:
        draws = draw_points(random_keys(step, part)[2], settings, forward.outputs)
        return run_backward(forward, targets, query_index, draws, num_objects, settings=settings, mesh=mesh)

    def update(state: TrainState, gradients: dict, batch_stats: dict, loss: Array, terms: dict):
        return update_state(
            state,
            gradients,
            batch_stats,
            loss,
            terms,
            optimizer=optimizer,
            schedule=schedule,
            multipliers=multipliers,
            decay=config.optimizer.ema_decay,
            ramp_steps=config.optimizer.ema_ramp_steps,
        )

    run_ahead = program(forward)
    run_back = program(backward, out_shardings=copied)
    run_update = program(update, in_shardings=copied, out_shardings=copied, donate_argnums=0)
    count_objects = program(lambda valid: sum(jnp.sum(v, dtype=jnp.int32) for v in valid), out_shardings=copied)
    add = program(lambda *trees: jax.tree.map(jnp.add, *trees), donate_argnums=0)

    def compile_together(state: TrainState, batch: Batch, num_objects: Array) -> tuple[Callable, ...]:
        """The three programs for pictures of one size; XLA compiles each on one core."""
        with ThreadPoolExecutor(3) as pool:
            first = run_ahead.lower(state.params, state.batch_stats, state.step, 0, batch)
            compiled = [pool.submit(first.compile)]
            ahead = jax.tree.map(_abstract, first.out_info)
            sets, images, _, slots = ahead.match_costs.shape
            query_index = jax.ShapeDtypeStruct((sets, images, slots), jnp.int32)
            second = run_back.lower(ahead, batch.targets, query_index, num_objects, state.step, 0)
            compiled.append(pool.submit(second.compile))
            if not programs:
                gradients, loss, terms = jax.tree.map(_abstract, second.out_info)
                third = run_update.lower(state, gradients, ahead.batch_stats, loss, terms)
                compiled.append(pool.submit(third.compile))
            fresh = tuple(future.result() for future in compiled)
        return fresh if not programs else (*fresh, next(iter(programs.values()))[2])

    programs: dict[tuple[int, ...], tuple[Callable, ...]] = {}  # by the shape of the images

    def programs_of(state: TrainState, batch: Batch, num_objects: Array) -> tuple[Callable, ...]:
        if mesh.size > 1:  # how the results of one program lie on the devices is known when it is compiled
            return run_ahead, run_back, run_update
        shape = batch.images.shape
        if shape not in programs:
            programs[shape] = compile_together(state, batch, num_objects)
        return programs[shape]

    def step(state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, dict[str, Array]]:
        if not batches:
            raise ValueError("a step needs at least one micro-batch")
        with jax.set_mesh(mesh):  # for the parts of the network that go device by device
            num_objects = count_objects([batch.targets.valid for batch in batches])
            go_ahead, go_back, finish = programs_of(state, batches[0], num_objects)
            batch_stats = state.batch_stats
            sums: tuple = ()
            for part, batch in enumerate(batches):
                ahead = go_ahead(state.params, batch_stats, state.step, part, batch)
                batch_stats = ahead.batch_stats
                query_index = assign(ahead.match_costs, batch.targets.valid)
                found = go_back(ahead, batch.targets, query_index, num_objects, state.step, part)
                del ahead  # frees what the backward pass has read
                sums = add(sums, found) if sums else found
            gradients, loss, terms = sums
            state, metrics = finish(state, gradients, batch_stats, loss, terms)
        return state, {**metrics, "objects": num_objects}

    return step


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def run_forward(
    params: dict,
    batch_stats: dict,
    batch: Batch,
    denoising: DenoisingQueries | None,
    draw: Callable[[TrainingOutputs], Array],
    *,
    model: MaskRTDETR,
    multipliers: dict,
    settings: LossSettings,
    mesh: Mesh | None,
) -> Forward:
    """Run the network and compute the matching costs.

    Args:
      denoising: noised objects, or None.
      draw: training outputs -> the points of matching.
      multipliers: learning rate factor of each parameter; those with 0 get no gradient.
    """

    def apply(params: dict) -> tuple[TrainingOutputs, dict]:
        params = jax.tree.map(lambda p, factor: p if factor > 0 else jax.lax.stop_gradient(p), params, multipliers)
        outputs, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch.images,
            train=True,
            denoising=denoising,
            mutable=["batch_stats"],
        )
        return outputs, updated["batch_stats"]

    outputs, pull_back, batch_stats = jax.vjp(apply, params, has_aux=True)
    costs = compute_match_costs(outputs, batch.targets, draw(outputs), settings, mesh=mesh)
    return Forward(outputs, pull_back, batch_stats, denoising, costs)


def run_backward(
    forward: Forward,
    targets: Targets,
    query_index: Array,
    draws: PointDraws,
    num_objects: Array,
    *,
    settings: LossSettings,
    mesh: Mesh | None,
) -> tuple[dict, Array, dict[str, Array]]:
    """Score the matches and differentiate.

    Args:
      query_index: [S, B, N] from `matching.assign`.
      draws: points of the mask losses.
      num_objects: [] in the whole batch, of which this may be a part.

    Returns: gradients of the parameters (zeros for frozen ones), the loss [], and its terms by name.
    """

    def score(outputs: TrainingOutputs) -> tuple[Array, dict[str, Array]]:
        return compute_losses(
            outputs, targets, forward.denoising, query_index, draws, settings, num_objects=num_objects, mesh=mesh
        )

    (loss, terms), to_outputs = jax.value_and_grad(score, has_aux=True)(forward.outputs)
    (gradients,) = forward.pull_back(to_outputs)
    return gradients, loss, terms


def update_state(
    state: TrainState,
    gradients: dict,
    batch_stats: dict,
    loss: Array,
    terms: dict[str, Array],
    *,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    multipliers: dict,
    decay: float,
    ramp_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
    """Take the optimizer's step; a batch whose loss or gradient is not finite changes nothing but `step`.

    Returns: the state, and metrics: `loss`, every loss term, `grad_norm` (before clipping, without learning rate
      factors), `learning_rate` (where there is a schedule), `skipped` (1 for a step that changed nothing).
    """
    grad_norm = gradient_norm(gradients, multipliers)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = keep(optax.apply_updates(state.params, updates), state.params)
    batch_stats = keep(batch_stats, state.batch_stats)
    now = ema_decay(state.num_updates, decay=decay, ramp_steps=ramp_steps)
    is_trained = jax.tree.map(lambda factor: factor > 0, multipliers)
    average = {
        "params": update_ema(state.average["params"], params, now, is_trained),
        "batch_stats": update_ema(state.average["batch_stats"], batch_stats, now),
    }
    updated = TrainState(
        step=state.step + 1,
        num_updates=state.num_updates + is_finite,
        params=params,
        batch_stats=batch_stats,
        average=keep(average, state.average),
        opt_state=keep(opt_state, state.opt_state),
    )
    metrics = {
        "loss": loss,
        **terms,
        "grad_norm": grad_norm,
        **({} if schedule is None else {"learning_rate": schedule(state.num_updates)}),
        "skipped": ~is_finite,
    }
    return updated, metrics
