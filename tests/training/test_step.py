"""One training step on batches that are not as they should be: images without objects, images that are not numbers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from step_batch import CLASSES, TINY, make_batch

from instseg_jax.config import load_config
from instseg_jax.devices import check_batch_size, make_mesh, put_micro_batches, put_replicated
from instseg_jax.models.mask_rtdetr import abstract_variables, build_model, initial_variables
from instseg_jax.training.optimizer import build_optimizer, build_schedule
from instseg_jax.training.state import TrainState, initial_state
from instseg_jax.training.step import build_train_step
from instseg_jax.types import Batch, Targets


@pytest.fixture(scope="module")
def run_step():
    """Function from (batch, state or None for a fresh one) to (state before, state after, metrics), in numpy."""
    # Matched by class and box alone: the points of masks are drawn anew for each micro-batch.
    unmatched = {"loss.match_mask_bce_weight": "0.0", "loss.match_mask_dice_weight": "0.0"}
    config = load_config("configs/mask_rtdetr.py:n", TINY | unmatched)
    model = build_model(config.model, CLASSES)
    variables = initial_variables(model, seed=0)
    schedule = build_schedule(config.optimizer, total_steps=100, batch_size=4)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    mesh = make_mesh(jax.devices()[:1])
    options = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}  # a few steps only
    step = build_train_step(config, model, optimizer, schedule, multipliers, mesh, compiler_options=options)
    before = initial_state(variables, optimizer)

    def run(batch: Batch, state=before, micro_batches: int = 1) -> tuple:
        parts = put_micro_batches(batch, mesh, micro_batches)
        after, metrics = jax.tree.map(np.array, step(put_replicated(state, mesh), parts))
        return state, after, metrics

    return run


def assert_same_trees(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_an_image_without_objects_is_trained_on_beside_one_with_some(run_step):
    batch = make_batch((2, 0))
    before, after, metrics = run_step(batch)
    assert metrics["objects"] == 2 and not metrics["skipped"]
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    assert (after.step, after.num_updates) == (1, 1)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert np.mean(jax.tree.leaves(changed)) > 0.9

    # What the slots without an object hold makes no difference.
    targets = batch.targets
    unused = ~targets.valid
    other = Targets(
        np.where(unused, 1 - targets.labels.clip(0, 1), targets.labels),
        np.where(unused[..., None], np.float32(0.1), targets.boxes),
        np.where(unused[..., None, None], np.uint8(1), targets.masks),
        targets.valid,
    )
    assert (other.labels != targets.labels).any()
    _, same, same_metrics = run_step(dataclasses.replace(batch, targets=other))
    assert_same_trees((after, metrics), (same, same_metrics))


@pytest.mark.slow
def test_without_any_object_only_the_background_is_learned(run_step):
    _, after, metrics = run_step(make_batch((0, 0)))
    assert metrics["objects"] == 0 and not metrics["skipped"]
    by_term = {name: value for name, value in metrics.items() if name.startswith("loss/")}
    assert all(value == 0 for name, value in by_term.items() if "/class" not in name)
    assert by_term["loss/class"] > 0
    assert metrics["loss"] == pytest.approx(sum(by_term.values()), rel=1e-5)
    assert after.num_updates == 1 and metrics["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_changes_nothing_but_the_step(run_step, value):
    batch = make_batch((2, 1))
    _, trained, _ = run_step(batch)
    images = batch.images.copy()
    images[1, 3, 4, 0] = value
    before, after, metrics = run_step(dataclasses.replace(batch, images=images), trained)
    assert metrics["skipped"] == 1 and not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    assert (after.step, after.num_updates) == (2, 1)
    assert_same_trees(dataclasses.replace(after, step=before.step), before)

    _, recovered, metrics = run_step(batch, after)  # and training goes on
    assert not metrics["skipped"] and np.isfinite(metrics["loss"])
    assert (recovered.step, recovered.num_updates) == (3, 2)


@pytest.mark.slow
def test_gradients_of_micro_batches_add_up(run_step):
    """Halves that are alike have the statistics of the whole; their losses are divided by the objects of both."""
    batch = make_batch((2, 1))
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)  # micro-batches take every second image
    _, after, metrics = run_step(twice, micro_batches=2)
    _, once, once_metrics = run_step(batch)
    assert metrics["objects"] == 6 and once_metrics["objects"] == 3
    for name in ("loss/box_l1/encoder", "loss/class/encoder"):  # the encoder's set does not depend on the noise
        assert metrics[name] == pytest.approx(once_metrics[name], rel=1e-5)
    assert not metrics["skipped"] and after.num_updates == 1
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), after.batch_stats, once.batch_stats)
    assert all(jax.tree.leaves(changed))  # statistics have moved twice


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(jax.devices()[:1])
    with pytest.raises(ValueError, match=r"train.batch_size is 3; it must be a multiple .* micro-batches, 2"):
        check_batch_size(3, mesh, "train.batch_size", 2)
    with pytest.raises(ValueError, match=r"train\.micro_batches is 0"):
        check_batch_size(4, mesh, "train.batch_size", 0)


def test_small_pictures_have_fewer_queries_and_train_all_the_same():
    """Of 64 px there are 64 + 16 + 4 places to ask about; the forward program is traced, not compiled."""
    config = load_config("configs/mask_rtdetr.py:n", TINY | {"model.num_queries": "100"})
    model, batch, mesh = build_model(config.model, CLASSES), make_batch((2, 1)), make_mesh(jax.devices()[:1])
    variables = abstract_variables(model, 3)
    ones = jax.tree.map(lambda leaf: 1.0, variables["params"])
    shapes = []

    def jit(function, **options):
        def lower(*args):
            shapes.append(jax.eval_shape(function, *args).match_costs.shape)
            raise StopIteration

        traced = functools.partial(jax.eval_shape, function)
        traced.lower = lower
        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        step = build_train_step(config, model, None, None, ones, mesh)
        state = TrainState(np.int32(0), np.int32(0), variables["params"], variables["batch_stats"], {}, ())
        with pytest.raises(StopIteration):
            step(state, [batch])
    assert shapes[0][1:] == (2, 84, 3)
