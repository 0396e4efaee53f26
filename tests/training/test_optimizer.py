"""Learning rates, frozen parameters, clipping and the moving average, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instseg_jax.config import load_config
from instseg_jax.models.mask_rtdetr import initial_variables, make_model
from instseg_jax.training.optimizer import (
    build_optimizer,
    build_schedule,
    ema_decay,
    learning_rate_multipliers,
    make_optimizer,
    make_schedule,
    update_ema,
)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 1e-7), (1, 1.4995e-7), (10, 5.995e-7), (1000, 5.005e-5), (1999, 9.995005e-5), (2000, 1e-4), (500_000, 1e-4)],
)
def test_the_official_schedule(step, rate):
    config = load_config("configs/mask_rtdetr.py:s")
    schedule = build_schedule(config.optimizer, total_steps=527_688, batch_size=16)
    assert float(schedule(step)) == pytest.approx(rate, rel=2e-4)


def test_cosine_and_step_schedules():
    shared = {"learning_rate": 1.0, "total_steps": 110, "warmup_steps": 10, "warmup_start": 0.0}
    cosine = make_schedule(schedule="cosine", final_fraction=0.1, step_milestones=(), step_factor=1.0, **shared)
    assert float(cosine(5)) == pytest.approx(0.5)
    assert float(cosine(10)) == pytest.approx(1.0)
    assert float(cosine(60)) == pytest.approx(0.55)
    assert float(cosine(110)) == pytest.approx(0.1)
    steps = make_schedule(schedule="step", final_fraction=0.0, step_milestones=(0.5,), step_factor=0.1, **shared)
    assert [float(steps(i)) for i in (10, 54, 56)] == pytest.approx([1.0, 1.0, 0.1])
    with pytest.raises(ValueError, match="'linear'"):
        make_schedule(schedule="linear", final_fraction=0.0, step_milestones=(), step_factor=1.0, **shared)


def test_the_official_recipe_freezes_and_slows_what_the_reference_does():
    config = load_config("configs/mask_rtdetr.py:s")
    params = initial_variables(make_model("mask_rtdetr_s", num_classes=80, num_queries=300), seed=0)["params"]
    _, factors = build_optimizer(config.optimizer, params, optax.constant_schedule(1.0))
    sizes = jax.tree.map(np.size, params)
    trainable = sum(n for n, f in zip(jax.tree.leaves(sizes), jax.tree.leaves(factors), strict=True) if f > 0)
    assert trainable == 14_605_716  # the official number
    assert factors["backbone"]["stem"]["stem1"]["conv"]["kernel"] == 0
    assert factors["backbone"]["stages_1"]["downsample"]["bn"]["scale"] == 0
    assert factors["backbone"]["stages_1"]["downsample"]["conv"]["kernel"] == pytest.approx(0.1)
    assert factors["neck"]["input_proj_0_1"]["scale"] == 1


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'\^bacbone/'"):
        learning_rate_multipliers({"backbone": {"kernel": np.ones(2)}}, ((r"^bacbone/", 0.1),), ())


def test_one_update_by_hand():
    """Adam's first update is the sign of the gradient; decay and rate are per parameter."""
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([4.0]), "c": jnp.array([8.0])}
    optimizer = make_optimizer(
        optax.constant_schedule(0.1),
        multipliers={"a": 1.0, "b": 0.5, "c": 0.0},
        decayed={"a": True, "b": False, "c": True},
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-12,
        clip_norm=1e9,
    )
    gradients = {"a": jnp.array([3.0, -5.0]), "b": jnp.array([7.0]), "c": jnp.array([0.0])}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], [-0.1 * (1 + 0.01), -0.1 * (-1 - 0.02)], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], [-0.05], rtol=1e-5)
    np.testing.assert_array_equal(updates["c"], [0.0])


def test_the_moving_average_starts_low_and_copies_frozen_parameters():
    assert float(ema_decay(0, decay=0.9999, ramp_steps=2000)) == pytest.approx(0.9999 * (1 - np.exp(-1 / 2000)))
    assert float(ema_decay(1999, decay=0.9999, ramp_steps=2000)) == pytest.approx(0.9999 * (1 - np.exp(-1)))
    values = {"a": jnp.array(4.0), "b": jnp.full((2, 1), 4.0)}
    assert update_ema(jnp.full(3, 2.0), values, jnp.array(0.75), {"a": True, "b": False}).tolist() == [2.5, 4.0, 4.0]
    assert update_ema(jnp.full(3, 2.0), values, jnp.array(0.75)).tolist() == [2.5, 2.5, 2.5]
