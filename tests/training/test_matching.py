"""Costs by hand and against Optax; assignments against trying all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instseg_jax.boxes import cxcywh_to_xyxy, generalized_box_iou
from instseg_jax.training.mask_planes import pack_masks
from instseg_jax.training.matching import TermWeights, assign, class_cost, mask_costs, match_cost
from instseg_jax.types import Predictions, Targets

WEIGHTS = TermWeights(class_=4.0, box_l1=5.0, box_giou=2.0, mask_bce=5.0, mask_dice=5.0)


def random_case(seed=0, sets=2, batch=2, queries=7, slots=5, classes=3, channels=4, size=8, counts=(3, 4)):
    rng = np.random.default_rng(seed)
    centres, sides = rng.uniform(0.3, 0.7, (batch, slots, 2)), rng.uniform(0.1, 0.5, (batch, slots, 2))
    valid = np.arange(slots) < np.array(counts)[:, None]
    targets = Targets(
        labels=rng.integers(0, classes, (batch, slots)).astype(np.int32),
        boxes=np.concatenate([centres, sides], axis=-1).astype(np.float32),
        masks=(rng.random((batch, slots, 2 * size, 2 * size)) < 0.4).astype(np.uint8),
        valid=valid,
    )
    shape = (sets, batch, queries)
    predictions = Predictions(
        class_logits=rng.standard_normal((*shape, classes)).astype(np.float32),
        boxes=np.concatenate([rng.uniform(0.3, 0.7, (*shape, 2)), rng.uniform(0.1, 0.5, (*shape, 2))], -1).astype(
            np.float32
        ),
        mask_queries=rng.standard_normal((*shape, channels)).astype(np.float32),
    )
    features = rng.standard_normal((batch, size, size, channels)).astype(np.float32)
    points = rng.random((sets, batch, 40, 2)).astype(np.float32)
    return jax.tree.map(jnp.asarray, (predictions, features, targets, points))


def run(function, predictions, features, targets, points):
    @jax.jit
    def compiled(predictions, features, targets, points):
        num_slots = jnp.asarray(targets.valid.shape[1])
        planes = pack_masks(targets.masks, num_slots)
        return function(predictions, features, targets, planes, num_slots, points, WEIGHTS)

    return np.asarray(compiled(predictions, features, targets, points))


def match(predictions, features, targets, points) -> np.ndarray:
    return np.asarray(assign(run(match_cost, predictions, features, targets, points), targets.valid))


def test_class_cost_by_hand():
    logits = jnp.array([[[0.0, np.log(3.0)]]])  # scores 0.5 and 0.75
    cost = class_cost(logits, jnp.array([[0, 1]]))
    half = 0.25 * 0.25 * np.log(2) - 0.75 * 0.25 * np.log(2)
    three_quarters = 0.25 * 0.0625 * np.log(4 / 3) - 0.75 * 0.5625 * np.log(4)
    np.testing.assert_allclose(cost[0, 0], [half, three_quarters], rtol=1e-5)


@pytest.mark.slow
def test_mask_costs_against_optax_and_counting():
    """With points at pixel centres, costs are those of the masks themselves."""
    rng = np.random.default_rng(1)
    size, slots = 4, 3
    masks = (rng.random((1, slots, size, size)) < 0.5).astype(np.uint8)
    features = rng.standard_normal((1, size, size, 2)).astype(np.float32)
    queries = rng.standard_normal((1, 5, 2)).astype(np.float32)
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    points = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(1, -1, 2)
    num_slots = jnp.asarray(slots)
    bce, dice = mask_costs(
        jnp.asarray(queries),
        jnp.asarray(features),
        pack_masks(jnp.asarray(masks), num_slots),
        num_slots,
        jnp.asarray(points),
        slots,
    )
    logits = np.einsum("qc,hwc->qhw", queries[0], features[0])
    for q, n in itertools.product(range(5), range(slots)):
        expected = optax.sigmoid_binary_cross_entropy(logits[q], masks[0, n].astype(np.float32)).mean()
        np.testing.assert_allclose(bce[0, q, n], expected, rtol=1e-5)
        p = 1 / (1 + np.exp(-logits[q]))
        overlap = p[masks[0, n] == 1].sum()
        np.testing.assert_allclose(dice[0, q, n], 1 - (2 * overlap + 1) / (p.sum() + masks[0, n].sum() + 1), rtol=1e-5)


def test_cost_is_the_weighted_sum():
    predictions, features, targets, points = random_case()
    cost = run(match_cost, predictions, features, targets, points)
    s, b, q, n = 1, 0, 4, 2
    num_slots = jnp.asarray(5)
    planes = pack_masks(targets.masks, num_slots)
    bce, dice = mask_costs(predictions.mask_queries[s], features, planes, num_slots, points[s], 5)
    box, target_box = predictions.boxes[s, b, q], targets.boxes[b, n]
    giou = generalized_box_iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(target_box))
    label = class_cost(predictions.class_logits[s], targets.labels)[b, q, n]
    l1 = np.abs(np.asarray(box) - np.asarray(target_box)).sum()
    expected = 4 * label + 5 * l1 - 2 * giou + 5 * bce[b, q, n] + 5 * dice[b, q, n]
    np.testing.assert_allclose(cost[s, b, q, n], expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_cheapest_of_all(seed):
    rng = np.random.default_rng(seed)
    cost = rng.standard_normal((1, 1, 5, 4)).astype(np.float32)
    valid = np.array([[True, False, True, True]])
    found = np.asarray(assign(jnp.asarray(cost), jnp.asarray(valid)))[0, 0]
    assert found[1] == -1
    real = [0, 2, 3]
    least = min(
        itertools.permutations(range(5), 3),
        key=lambda queries: sum(cost[0, 0, q, n] for q, n in zip(queries, real, strict=True)),
    )
    assert tuple(found[real]) == least


def test_more_objects_than_queries():
    cost = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 2, 5)), jnp.float32)
    found = np.asarray(assign(cost, jnp.ones((1, 5), bool)))[0, 0]
    assert sorted(found) == [-1, -1, -1, 0, 1]


def test_no_objects():
    found = np.asarray(assign(jnp.zeros((2, 1, 3, 4)), jnp.zeros((1, 4), bool)))
    assert found.shape == (2, 1, 4) and (found == -1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_survived(bad):
    cost = np.zeros((1, 1, 4, 2), np.float32)
    cost[0, 0, 1] = bad
    found = np.asarray(assign(jnp.asarray(cost), jnp.ones((1, 2), bool)))[0, 0]
    assert len(set(found)) == 2 and min(found) >= 0
    assert (1 in found) == (bad == -np.inf)  # what is not a number is never the best choice


def test_each_object_finds_its_own_query():
    predictions, features, targets, points = random_case(counts=(5, 5))
    chosen = np.array([[6, 1, 3, 0, 4], [2, 5, 0, 6, 1]])
    boxes, logits = np.array(predictions.boxes), np.full(predictions.class_logits.shape, -5.0, np.float32)
    for b, n in itertools.product(range(2), range(5)):
        boxes[:, b, chosen[b, n]] = targets.boxes[b, n]
        logits[:, b, chosen[b, n], targets.labels[b, n]] = 5.0
    predictions = Predictions(jnp.asarray(logits), jnp.asarray(boxes), 0 * predictions.mask_queries)
    np.testing.assert_array_equal(match(predictions, features, targets, points), np.stack([chosen, chosen]))


def test_permuting_targets_permutes_matches():
    predictions, features, targets, points = random_case(counts=(5, 5))
    order = np.array([3, 0, 4, 1, 2])
    before = match(predictions, features, targets, points)
    after = match(predictions, features, jax.tree.map(lambda x: x[:, order], targets), points)
    assert len({tuple(row) for row in before.reshape(-1, 5)}) > 1
    np.testing.assert_array_equal(after, before[..., order])


def test_slots_that_are_not_valid_change_nothing():
    predictions, features, targets, points = random_case(counts=(3, 4))
    before = match(predictions, features, targets, points)
    rng = np.random.default_rng(3)
    wider = Targets(
        labels=jnp.pad(targets.labels, [(0, 0), (0, 20)], constant_values=1),
        boxes=jnp.concatenate([targets.boxes, jnp.asarray(rng.uniform(0.2, 0.5, (2, 20, 4)), jnp.float32)], axis=1),
        masks=jnp.concatenate([targets.masks, jnp.ones((2, 20, 16, 16), jnp.uint8)], axis=1),
        valid=jnp.pad(targets.valid, [(0, 0), (0, 20)]),
    )
    after = match(predictions, features, wider, points)
    np.testing.assert_array_equal(after[..., :5], before)
    assert (after[..., 5:] == -1).all()
