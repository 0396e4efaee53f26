"""AdamW with per-path learning rates, global-norm clipping, schedules, and the moving average of weights."""

import re

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from instseg_jax.messages import quote
from instseg_jax.packing import join, pack, unpack
from instseg_jax.types import Array, HostOrDeviceArray

SCHEDULES = ("constant", "cosine", "step")
Optimizer = optax.GradientTransformation


def make_schedule(
    *,
    learning_rate: float,
    schedule: str,
    total_steps: int,
    warmup_steps: int,
    warmup_start: float,
    final_fraction: float,
    step_milestones: tuple[float, ...],
    step_factor: float,
) -> optax.Schedule:
    """Learning rate by update, counted from 0: linear warm-up, then constant, cosine or steps.

    The warm-up starts at `warmup_start * learning_rate` in update 0 and is over in update `warmup_steps`; a
    cosine ends at `final_fraction * learning_rate` in update `total_steps`. `step_milestones` are fractions
    of `total_steps` at which the rate is multiplied by `step_factor`.

    Raises: ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule is {quote(schedule)}, it must be one of {', '.join(SCHEDULES)}")
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, max(1, total_steps - warmup_steps), final_fraction)
    elif schedule == "step":
        boundaries = {int(total_steps * fraction) - warmup_steps: step_factor for fraction in step_milestones}
        after = optax.piecewise_constant_schedule(learning_rate, boundaries)
    else:
        after = optax.constant_schedule(learning_rate)
    if warmup_steps < 1:
        return after
    before = optax.linear_schedule(warmup_start * learning_rate, learning_rate, warmup_steps)
    return optax.join_schedules([before, after], [warmup_steps])


def build_schedule(config: ConfigDict, total_steps: int, batch_size: int) -> optax.Schedule:
    """The schedule of a config's section `optimizer`; its rate scaled from base_batch_size where one is given.

    Raises: ValueError for an unknown schedule or a base_batch_size below one.
    """
    base = config.base_batch_size
    if base is not None and base < 1:
        raise ValueError(f"optimizer.base_batch_size is {base}, it must be at least 1")
    return make_schedule(
        learning_rate=config.learning_rate * (batch_size / base if base else 1),
        schedule=config.schedule,
        total_steps=total_steps,
        warmup_steps=config.warmup_steps,
        warmup_start=config.warmup_start,
        final_fraction=config.final_fraction,
        step_milestones=tuple(config.step_milestones),
        step_factor=config.step_factor,
    )


def say_longer(
    config: ConfigDict, epochs_before: int, steps: int, before: optax.Schedule, after: optax.Schedule
) -> str:
    """One sentence on a run whose `train.epochs` changed after `steps` steps, and on what its learning rate does."""
    text = f"train.epochs was {epochs_before} and is {config.train.epochs}"
    if config.optimizer.schedule == "constant":
        return f"{text}: training goes on, its learning rate stays constant"
    return (
        f"{text}: the {config.optimizer.schedule} schedule is stretched over the new total, so its rate goes on "
        f"at {float(after(steps)):.3g} from step {steps} (it was {float(before(steps)):.3g} there)"
    )


def build_optimizer(
    config: ConfigDict, params: dict, schedule: optax.Schedule
) -> tuple[optax.GradientTransformation, dict]:
    """The optimizer of a config's section `optimizer`, and each parameter's learning rate multiplier.

    Raises: ValueError for a pattern in `multipliers` or `frozen` that is found in no parameter's path.
    """
    multipliers = learning_rate_multipliers(params, tuple(config.multipliers), tuple(config.frozen))
    optimizer = make_optimizer(
        schedule,
        multipliers=multipliers,
        decayed=matches_none(params, tuple(config.decay_exclude)),
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        epsilon=config.epsilon,
        clip_norm=config.clip_norm,
    )
    return optimizer, multipliers


def parameter_path(key_path: tuple) -> str:
    """`backbone/stem/stem1/conv/kernel`, the form that patterns of a config are searched in."""
    return "/".join(str(key.key) for key in key_path)


def learning_rate_multipliers(
    params: dict, multipliers: tuple[tuple[str, float], ...], frozen: tuple[str, ...]
) -> dict:
    """A factor for each parameter: 0 where a frozen pattern is found, else of the first pattern found, else 1.

    Raises: ValueError when a pattern is found in no parameter: a silent typo would train what should rest.
    """
    rules = [(pattern, 0.0) for pattern in frozen] + [(pattern, float(factor)) for pattern, factor in multipliers]
    unused = {pattern for pattern, _ in rules}

    def factor_of(key_path: tuple, _) -> float:
        path = parameter_path(key_path)
        found = [(pattern, factor) for pattern, factor in rules if re.search(pattern, path)]
        unused.difference_update(pattern for pattern, _ in found)
        return found[0][1] if found else 1.0

    tree = jax.tree_util.tree_map_with_path(factor_of, params)
    if unused:
        raise ValueError(f"no parameter's path contains {', '.join(map(quote, sorted(unused)))}")
    return tree


def matches_none(params: dict, patterns: tuple[str, ...]) -> dict:
    """True for each parameter in whose path no pattern is found."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, _: not any(re.search(pattern, parameter_path(key_path)) for pattern in patterns), params
    )


def make_optimizer(
    schedule: optax.Schedule,
    *,
    multipliers: dict,
    decayed: dict,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """Clip the global norm, Adam, decoupled weight decay, then each parameter's own learning rate.

    Args:
      multipliers: factor of the learning rate of each parameter; 0 freezes it: it does not count in the norm and
        has no moments.
      decayed: whether weight decay applies to each parameter.

    Works on vectors of all parameters that are treated alike (`packing.py`); so are its moments.
    """
    groups, treatments = parameter_groups(multipliers, decayed)
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(beta1, beta2, epsilon),
        optax.add_decayed_weights(weight_decay, mask={group: decay for group, (_, decay) in treatments.items()}),
        optax.scale_by_learning_rate(schedule),
        optax.stateless(lambda updates, _: {group: u * treatments[group][0] for group, u in updates.items()}),
    )

    def init(params: dict) -> optax.OptState:
        return chain.init(pack(params, groups))

    def update(gradients: dict, state: optax.OptState, params: dict | None = None) -> tuple[dict, optax.OptState]:
        if params is None:
            raise ValueError("weight decay needs the parameters: give them to update")
        vectors, state = chain.update(pack(gradients, groups), state, pack(params, groups))
        return unpack(vectors, groups, params), state

    return optax.GradientTransformation(init, update)


def train_alone(optimizer: optax.GradientTransformation, multipliers: dict) -> optax.GradientTransformation:
    """An optimizer that sees those parameters alone whose factor is above 0; the others have no moments and stay."""
    return optax.masked(optimizer, jax.tree.map(lambda factor: factor > 0, multipliers))


def parameter_groups(multipliers: dict, decayed: dict) -> tuple[dict, dict[str, tuple[float, bool]]]:
    """Which parameters are updated alike: a group's name for each ("" for frozen ones), and its factor and decay."""
    kinds = zip(jax.tree.leaves(multipliers), jax.tree.leaves(decayed), strict=True)
    treatments = {f"group{i}": kind for i, kind in enumerate(sorted({kind for kind in kinds if kind[0] > 0}))}
    names = {kind: name for name, kind in treatments.items()}
    return jax.tree.map(lambda *kind: names.get(kind, ""), multipliers, decayed), treatments


def gradient_norm(gradients: dict, multipliers: dict) -> Array:
    """2-norm of all gradients together, without those of frozen parameters."""
    groups = jax.tree.map(lambda factor: "trained" if factor > 0 else "", multipliers)
    return jnp.linalg.norm(pack(gradients, groups)["trained"])


def ema_decay(count: HostOrDeviceArray, *, decay: float, ramp_steps: int) -> Array:
    """Decay of the moving average in its update `count` (from 0): grows from 0 towards `decay`."""
    if ramp_steps < 1:
        return jnp.asarray(decay, jnp.float32)
    return decay * -jnp.expm1(-(jnp.asarray(count, jnp.float32) + 1) / ramp_steps)


def update_ema(average: HostOrDeviceArray, values: dict, decay: Array, averaged: dict | None = None) -> Array:
    """average * decay + values * (1 - decay), the average as a vector; where `averaged` is False, the value itself."""
    if averaged is not None and not all(jax.tree.leaves(averaged)):
        decays = jax.tree.map(lambda value, use: jnp.broadcast_to(decay * use, value.shape), values, averaged)
        decay = join(decays)
    return decay * average + (1 - decay) * join(values)
