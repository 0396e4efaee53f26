"""The assignment inside a program against SciPy's."""

import time

import jax
import numpy as np
import pytest

from instseg_jax.training.assignment import assign_in_program
from instseg_jax.training.matching import _assign_on_host, assign_by_callback


def total(cost: np.ndarray, found: np.ndarray) -> float:
    """Cost of all pairs that were made, the sets and images together."""
    places = np.argwhere(found >= 0)
    return float(sum(cost[s, b, found[s, b, n], n] for s, b, n in places))


@pytest.mark.parametrize(("queries", "slots"), [(9, 4), (5, 5), (3, 6)])  # the last: more objects than queries
@pytest.mark.parametrize("magnitude", [1.0, 1000.0])
def test_as_scipy_for_any_number_of_queries_and_objects(queries, slots, magnitude):
    rng = np.random.default_rng(queries)
    cost = (magnitude * rng.normal(size=(3, 4, queries, slots))).astype(np.float32)
    valid = np.arange(slots) < np.array([slots, slots - 1, 1, 0])[:, None]
    valid[1] = valid[1][::-1]
    expected = _assign_on_host(cost, valid)
    np.testing.assert_array_equal(jax.jit(assign_in_program)(cost, valid), expected)
    pairs = (expected >= 0).sum(axis=(0, 2)).tolist()
    assert pairs == [3 * min(queries, n) for n in (slots, slots - 1, 1, 0)]


def test_ties_cost_the_same_and_nobody_is_given_twice():
    cost = np.random.default_rng(0).integers(0, 3, (2, 2, 6, 5)).astype(np.float32)
    valid = np.ones((2, 5), bool)
    found = np.asarray(jax.jit(assign_in_program)(cost, valid))
    assert total(cost, found) == total(cost, _assign_on_host(cost, valid))
    assert all(len(set(row)) == 5 for row in found.reshape(-1, 5).tolist())


def test_costs_that_are_no_numbers_end_too():
    cost = np.random.default_rng(1).normal(size=(1, 1, 4, 3)).astype(np.float32)
    cost[0, 0, 0, :] = np.nan
    cost[0, 0, 1, 0] = np.inf
    found = np.asarray(jax.jit(assign_in_program)(cost, np.ones((1, 3), bool)))
    assert sorted(found[0, 0].tolist()) == [1, 2, 3]  # the query without a cost is left over
    np.testing.assert_array_equal(found, _assign_on_host(cost, np.ones((1, 3), bool)))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 16])
def test_what_it_costs_beside_scipy(batch):
    """Prints the CPU time of both for size S: 5 sets of 300 queries. The pairs cost the same."""
    rng = np.random.default_rng(0)
    boxes, truth = rng.random((5, batch, 300, 1, 4)), rng.random((1, batch, 1, 100, 4))
    cost = (5 * np.abs(boxes - truth).sum(-1) + rng.normal(size=(5, batch, 300, 100))).astype(np.float32)
    for objects in (10, 40, 100):
        valid = np.broadcast_to(np.arange(100) < objects, (batch, 100))
        expected = total(cost, _assign_on_host(cost, valid))
        for assign in (assign_by_callback, assign_in_program):
            run = jax.jit(assign)
            assert total(cost, np.asarray(run(cost, valid))) == pytest.approx(expected, rel=1e-6)
            spent = []
            for _ in range(8):
                before = time.process_time()
                jax.block_until_ready(run(cost, valid))
                spent.append(time.process_time() - before)
            print(f"{batch} images, {objects} objects, {assign.__name__}: {1e3 * min(spent):.1f} ms of CPU time")
