"""The loss and the step as pure functions: the numbers of the step in three programs, and what one may add to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_batch import CLASSES, TINY, make_batch

from instseg_jax.config import load_config
from instseg_jax.devices import make_mesh, put_micro_batches, put_replicated
from instseg_jax.models.mask_rtdetr import build_model, initial_variables
from instseg_jax.training import functional
from instseg_jax.training.matching import _assign_on_host, assign_by_callback
from instseg_jax.training.optimizer import build_optimizer, build_schedule
from instseg_jax.training.state import initial_state
from instseg_jax.training.step import build_train_step

QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}  # a few steps only
FROZEN = ("backbone",)


def mean_logit(outputs, batch, query_index) -> dict:
    assert query_index.shape == (len(outputs.matching.boxes), *batch.targets.valid.shape)
    return {"mean_logit": 0.1 * jnp.mean(jnp.square(outputs.matching.class_logits))}


@pytest.fixture(scope="module")
def case():
    # As in test_step.py, so that its three programs are compiled once: matched by class and box alone.
    unmatched = {"loss.match_mask_bce_weight": "0.0", "loss.match_mask_dice_weight": "0.0"}
    config = load_config("configs/mask_rtdetr.py:n", TINY | unmatched)
    model = build_model(config.model, CLASSES)
    variables = initial_variables(model, seed=0)
    return config, model, variables, make_batch((2, 1))


@pytest.fixture(scope="module")
def stepped(case):
    """(state before, state after, metrics) of a step with an own optimizer, an own term and a frozen backbone."""
    config, model, variables, batch = case
    optimizer = optax.adamw(1e-3, weight_decay=0.5)
    init, step = functional.build_train_step(model, optimizer, config, extra=mean_logit, frozen=FROZEN)
    before = init(variables)
    run = jax.jit(step, compiler_options=QUICK)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return before, *run(before, batch, key)


@pytest.mark.slow
def test_one_program_computes_what_three_do(case, stepped):
    config, model, variables, batch = case
    schedule = build_schedule(config.optimizer, total_steps=100, batch_size=4)
    optimizer, multipliers = build_optimizer(config.optimizer, variables["params"], schedule)
    mesh = make_mesh(jax.devices()[:1])
    step = build_train_step(config, model, optimizer, schedule, multipliers, mesh, compiler_options=QUICK)
    state = put_replicated(initial_state(variables, optimizer), mesh)
    after, of_three = step(state, put_micro_batches(batch, mesh, 1))
    _, state, of_one = stepped
    terms = [name for name in of_three if name.startswith("loss/")]
    assert len(terms) > 20
    for name in terms:
        assert float(of_one[name]) == pytest.approx(float(of_three[name]), rel=2e-5, abs=1e-7), name
    own = float(of_one["mean_logit"])
    assert own > 0
    assert float(of_one["loss"]) == pytest.approx(float(of_three["loss"]) + own, rel=1e-5)
    moved = jax.tree.map(lambda a, b, c: (np.abs(a - b).max(), np.abs(b - c).max()), state.batch_stats,
                         jax.device_get(after.batch_stats), variables["batch_stats"])  # fmt: skip
    pairs = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
    assert max(change for _, change in pairs) > 1e-3 and max(error for error, _ in pairs) < 1e-5


@pytest.mark.slow
def test_what_is_frozen_stays_whatever_the_optimizer_does(stepped):
    before, after, metrics = stepped
    assert not metrics["skipped"] and metrics["grad_norm"] > 0
    changed = jax.tree_util.tree_map(lambda a, b: bool((np.asarray(a) != b).any()), after.params, before.params)
    assert not any(jax.tree.leaves(changed["backbone"]))
    others = [leaf for name, tree in changed.items() if name != "backbone" for leaf in jax.tree.leaves(tree)]
    assert np.mean(others) > 0.9
    moments = sum(x.size for x in jax.tree.leaves(after.opt_state))
    trained = sum(x.size for name in changed if name != "backbone" for x in jax.tree.leaves(before.params[name]))
    assert 2 * trained <= moments < 2 * trained + 10


@pytest.mark.slow
def test_the_loss_is_a_function_to_differentiate_and_its_matching_one_to_replace(case):
    """Traced, not compiled: what comes out has the form of the parameters, the own term is there, the own matching is
    asked for the costs of every set."""
    config, model, variables, batch = case
    asked = []

    def in_order(costs, valid):
        asked.append(costs.shape)
        return jnp.broadcast_to(jnp.where(valid, jnp.arange(valid.shape[1]), -1), (len(costs), *valid.shape))

    loss = functional.build_losses(model, config, extra=mean_logit, assign=in_order)
    given = variables["params"], variables["batch_stats"], batch, jax.random.key(0)
    gradients, (terms, batch_stats) = jax.eval_shape(jax.grad(loss, has_aux=True), *given)
    assert jax.tree.map(lambda x: x.shape, gradients) == jax.tree.map(lambda x: x.shape, variables["params"])
    assert jax.tree.structure(batch_stats) == jax.tree.structure(variables["batch_stats"])
    assert {"mean_logit", "loss/class", "loss/mask_dice"} <= set(terms)
    assert asked == [(3, 2, 8, 3)]
    twice = functional.build_losses(
        model, config, extra=lambda outputs, batch, query_index: {"loss/class": jnp.zeros(())}
    )
    with pytest.raises(ValueError, match="extra has a term 'loss/class', which the loss has already"):
        jax.eval_shape(twice, *given)


def test_assigning_inside_a_program_is_assigning_on_the_host():
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(2, 3, 7, 4)).astype(np.float32)
    cost[0, 0, 0, 0] = np.nan
    valid = np.array([[True] * 4, [False, True, False, True], [False] * 4])
    expected = _assign_on_host(cost, valid)
    np.testing.assert_array_equal(jax.jit(assign_by_callback)(cost, valid), expected)
    assert (expected[:, 0] >= 0).all() and (expected[:, 2] == -1).all()
    one_by_one = jax.vmap(lambda c: assign_by_callback(c[None], valid)[0])(jnp.asarray(cost))
    np.testing.assert_array_equal(one_by_one, expected)


def test_wrong_names_are_refused(case):
    config, model, variables, _ = case
    with pytest.raises(ValueError, match="assign is 'host', it must be one of callback, program"):
        functional.build_losses(model, config, assign="host")
    init, _ = functional.build_train_step(model, optax.sgd(0.1), config, frozen=["backbon3"])
    with pytest.raises(ValueError, match="no parameter's path contains 'backbon3'"):
        init(variables)
