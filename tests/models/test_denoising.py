"""Noise within its bounds, groups in their places, and no way from the answers to the queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instseg_jax.models.denoising import count_slots, make_denoising_queries, noise_targets
from instseg_jax.types import Targets

CLASSES, QUERIES = 4, 6


def make_targets(counts, slots=5, seed=0) -> Targets:
    rng = np.random.default_rng(seed)
    batch = len(counts)
    valid = np.arange(slots) < np.array(counts)[:, None]
    boxes = np.concatenate(
        [rng.uniform(0.4, 0.6, (batch, slots, 2)), rng.uniform(0.1, 0.3, (batch, slots, 2))], axis=-1
    )
    return Targets(
        labels=np.where(valid, rng.integers(0, CLASSES, (batch, slots)), 0).astype(np.int32),
        boxes=np.where(valid[..., None], boxes, 0).astype(np.float32),
        masks=np.zeros((batch, slots, 4, 4), np.uint8),
        valid=valid,
    )


def make(targets, num_denoising=10, seed=0, **changes):
    options = {
        "num_classes": CLASSES,
        "num_queries": QUERIES,
        "label_noise_ratio": 0.5,
        "box_noise_scale": 1.0,
    } | changes
    make_jit = jax.jit(lambda t, rng: make_denoising_queries(t, num_denoising=num_denoising, rng=rng, **options))
    return jax.tree.map(np.asarray, make_jit(targets, jax.random.key(seed)))


def test_groups_without_noise_repeat_the_objects():
    targets = make_targets([3, 2])
    d = make(targets, label_noise_ratio=0.0, box_noise_scale=0.0)
    assert d.num_groups == 3  # 10 slots, 3 objects
    np.testing.assert_array_equal(d.object_index[:9], [0, 1, 2] * 3)
    np.testing.assert_array_equal(d.valid, [[1] * 9 + [0], [1, 1, 0] * 3 + [0]])
    np.testing.assert_array_equal(d.labels[0, :9], np.tile(targets.labels[0, :3], 3))
    a, b = targets.labels[1, :2]
    np.testing.assert_array_equal(d.labels[1], [a, b, CLASSES] * 3 + [CLASSES])
    sigmoid = 1 / (1 + np.exp(-d.boxes_unact))
    np.testing.assert_allclose(sigmoid[0, :9], np.tile(targets.boxes[0, :3], (3, 1)), rtol=1e-5)
    np.testing.assert_allclose(d.boxes_unact[1, 2], -11.5129, rtol=1e-5)  # the logit of the reference's 1e-5


def test_noise_is_bounded_and_of_the_asked_share():
    targets = make_targets([5] * 8, slots=5)
    targets = Targets(targets.labels, targets.boxes, targets.masks, targets.valid)
    d = make(targets, num_denoising=1000)
    labels, boxes = np.tile(targets.labels, (1, 200)), np.tile(targets.boxes, (1, 200, 1))
    changed = (d.labels != labels).mean()
    # A quarter is drawn again, of which a fourth hits the old class: 0.1875, standard error 0.0044.
    assert abs(changed - 0.1875) < 0.02
    noised = 1 / (1 + np.exp(-d.boxes_unact))
    reach = np.concatenate([boxes[..., 2:] / 2, boxes[..., 2:]], axis=-1)
    relative = (noised - boxes) / reach
    assert np.abs(relative).max() <= 1 + 1e-3
    np.testing.assert_allclose(relative.mean(), 0, atol=0.02)
    np.testing.assert_allclose(relative.std(axis=(0, 1)), 1 / np.sqrt(3), rtol=0.03)  # of a uniform number in -1..1


def test_given_draws_by_hand():
    targets = make_targets([1], slots=1)
    box = targets.boxes[0, 0]
    d = noise_targets(
        targets,
        u_flip=jnp.array([[0.24, 0.26]]),
        random_labels=jnp.array([[3, 3]]),
        u_box=jnp.array([[[1.0, 0.5, 0.0, 0.75], [0.5] * 4]]),
        num_denoising=2,
        num_classes=CLASSES,
        num_queries=QUERIES,
        label_noise_ratio=0.5,
        box_noise_scale=0.5,
    )
    np.testing.assert_array_equal(d.labels[0], [3, targets.labels[0, 0]])
    moved = box + 0.5 * np.array([box[2] / 2, 0, -box[2], 0.5 * box[3]])
    np.testing.assert_allclose(jax.nn.sigmoid(d.boxes_unact[0]), [moved, box], rtol=1e-5)


@pytest.mark.parametrize("counts", [[3, 2], [0, 4], [5, 5]])
def test_who_may_attend_to_whom(counts):
    d = make(make_targets(counts))
    n, slots = max(counts), len(d.object_index)
    mask, used = d.attention_mask, n * (10 // n)
    assert slots == 10 and mask.shape == (slots + QUERIES, slots + QUERIES)
    assert not mask[slots:, :slots].any(), "a query sees a denoising slot"
    assert mask[:, slots:].all()
    for i in range(slots):
        for j in range(slots):
            assert mask[i, j] == (i < used and j < used and i // n == j // n)


def test_no_objects():
    d = make(make_targets([0, 0]))
    assert not d.valid.any() and (d.labels == CLASSES).all()
    assert not d.attention_mask[:, :10].any()
    assert d.attention_mask.any(axis=1).all()  # a softmax over nothing would not be finite
    assert np.isfinite(d.boxes_unact).all() and d.num_groups >= 1


def test_more_objects_than_slots_make_one_group():
    d = make(make_targets([5, 3]), num_denoising=4)
    assert d.num_groups == 1
    np.testing.assert_array_equal(d.object_index, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(d.valid, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_spare_target_slots_change_nothing():
    a, b = make_targets([3, 2], slots=3), make_targets([3, 2], slots=5)
    b = Targets(
        *(
            np.concatenate([x, np.zeros_like(y[:, 3:])], axis=1)
            for x, y in zip((a.labels, a.boxes, a.masks, a.valid), (b.labels, b.boxes, b.masks, b.valid), strict=True)
        )
    )
    for x, y in zip(jax.tree.leaves(make(a)), jax.tree.leaves(make(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_switched_off():
    assert make_denoising_queries(
        make_targets([1]), num_denoising=0, num_classes=CLASSES, num_queries=QUERIES,
        label_noise_ratio=0.5, box_noise_scale=1.0, rng=jax.random.key(0),
    ) is None  # fmt: skip


def test_count_slots_reaches_to_the_last_object():
    assert count_slots(jnp.array([[True, False, False], [False, True, False]])) == 2
    assert count_slots(jnp.zeros((2, 3), bool)) == 0
    assert count_slots(jnp.zeros((2, 0), bool)) == 0


def test_attention_never_leaks():
    """Softmax attention under the mask: what queries get does not depend on what denoising slots hold."""
    d = make(make_targets([3, 2]))
    total = len(d.attention_mask)
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((total, 8)).astype(np.float32)

    def queries_out(values):
        scores = jnp.where(d.attention_mask, keys @ keys.T, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) @ values

    jacobian = np.asarray(jax.jacobian(queries_out)(jnp.asarray(rng.standard_normal(total), jnp.float32)))
    assert (jacobian[10:, :10] == 0).all()
    assert (jacobian[10:, 10:] > 0).all()
    assert (jacobian[:9, 10:] > 0).all()
    assert (jacobian[:, 9] == 0).all()  # the spare slot
    assert jacobian[0, 1] > 0 and jacobian[0, 3] == 0
