"""Loss formulas, point selection and bit planes: by hand, against Optax, SciPy, sorting and jax.image."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage

from instseg_jax.models.sampling import sample_map
from instseg_jax.training.losses import (
    box_losses,
    box_quality,
    double_axis,
    mask_losses,
    mask_quality,
    sigmoid_cross_entropy,
    smallest_limit,
    uncertain_point_weights,
    varifocal_loss,
)
from instseg_jax.training.mask_planes import gather_words, pack_masks, read_bits, read_points, resize_planes


def test_cross_entropy():
    x = jnp.array([-80.0, -3.0, -1e-3, 0.0, 0.7, 3.0, 80.0])
    for t in (0.0, 0.3, 1.0):
        targets = jnp.full_like(x, t)
        loss = sigmoid_cross_entropy(x, targets)
        np.testing.assert_allclose(loss, optax.sigmoid_binary_cross_entropy(x, targets), rtol=1e-5, atol=2e-7)
        slope = jax.grad(lambda x, t=targets: sigmoid_cross_entropy(x, t).sum())(x)
        np.testing.assert_allclose(slope, jax.nn.sigmoid(x) - t, atol=1e-7)
    assert sigmoid_cross_entropy(jnp.array(0.0), jnp.array(1.0)) == pytest.approx(np.log(2), rel=1e-6)


def test_varifocal_by_hand():
    """Scores of one half: log 2 each, weighted by the quality for the label and by alpha / 4 for the others."""
    loss = varifocal_loss(jnp.zeros((2, 3)), jnp.array([1, 3]), jnp.array([0.6, 0.9]), alpha=0.75, gamma=2.0)
    other = 0.75 * 0.25 * np.log(2)
    np.testing.assert_allclose(loss, [0.6 * np.log(2) + 2 * other, 3 * other], rtol=1e-6)


def test_varifocal_weight_has_a_gradient():
    logits, labels, quality = jnp.array([[0.3, -1.2]]), jnp.array([0]), jnp.array([0.7])

    def loss(x):
        return varifocal_loss(x, labels, quality, alpha=0.75, gamma=2.0).sum()

    slope, step = jax.grad(loss)(logits), 1e-2
    for k in (0, 1):
        change = jnp.zeros_like(logits).at[0, k].set(step)
        np.testing.assert_allclose(slope[0, k], (loss(logits + change) - loss(logits - change)) / (2 * step), rtol=1e-3)
    p = jax.nn.sigmoid(-1.2)
    assert abs(slope[0, 1]) > 1.5 * abs(0.75 * p**2 * p)  # what a detached weight would give


def test_box_losses_by_hand():
    a = jnp.array([[0.5, 0.5, 0.2, 0.2], [0.25, 0.5, 0.5, 1.0]])
    b = jnp.array([[0.5, 0.5, 0.2, 0.2], [0.75, 0.5, 0.5, 1.0]])
    l1, giou = box_losses(a, b)
    np.testing.assert_allclose(l1, [0, 0.5], atol=1e-6)
    np.testing.assert_allclose(giou, [0, 1], atol=1e-5)  # side by side: no overlap, no gap
    np.testing.assert_allclose(box_quality(a, b), [1, 0], atol=1e-5)
    assert (jax.grad(lambda a: box_quality(a, b + 0.01).sum())(a) == 0).all()


def test_mask_losses_by_hand():
    x, t = jnp.array([[0.0, 0.0, 100.0, -100.0]]), jnp.array([[1.0, 0.0, 1.0, 0.0]])
    bce, dice = mask_losses(x, t, jnp.ones_like(x))
    np.testing.assert_allclose(bce, 2 * np.log(2) / 4, rtol=1e-6)
    np.testing.assert_allclose(dice, 1 - (2 * 1.5 + 1) / (2 + 2 + 1), rtol=1e-6)


def test_weights_count_points():
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.standard_normal((3, 5)), jnp.float32), jnp.asarray(rng.random((3, 5)), jnp.float32)
    repeats = np.array([2, 0, 1, 3, 1])
    weighted = mask_losses(x, t, jnp.broadcast_to(jnp.asarray(repeats, jnp.float32), x.shape))
    repeated = mask_losses(*(jnp.repeat(v, repeats, axis=1) for v in (x, t)), jnp.ones((3, 7)))
    np.testing.assert_allclose(weighted, repeated, rtol=1e-5)


@pytest.mark.parametrize("kind", ["normal", "wide", "few values", "zeros", "tiny"])
def test_limit_takes_the_smallest(kind):
    rng = np.random.default_rng(0)
    values = {
        "normal": np.abs(rng.standard_normal((6, 1000))),
        "wide": 10.0 ** rng.uniform(-30, 30, (6, 1000)),
        "few values": rng.integers(0, 4, (6, 1000)) * 0.5,
        "zeros": np.zeros((6, 1000)),
        "tiny": rng.integers(0, 3, (6, 1000)) * np.finfo(np.float32).tiny,
    }[kind].astype(np.float32)
    for count in (1, 250, 999, 1000):
        limit, share = (np.asarray(x)[:, None] for x in jax.jit(smallest_limit, static_argnums=1)(values, count))
        weights = np.where(values < limit, 1, np.where(values == limit, share, 0))
        np.testing.assert_allclose(weights.sum(axis=1), count, rtol=1e-5)
        exact = np.sort(values, axis=1)[:, :count]
        np.testing.assert_allclose((weights * values).sum(axis=1), exact.sum(axis=1), rtol=1e-5)
        assert (values[weights == 0] >= np.broadcast_to(exact[:, -1:], values.shape)[weights == 0]).all()


def test_limit_survives_what_is_not_finite():
    values = jnp.array([[1.0, jnp.nan, 0.5, jnp.inf, 2.0], [jnp.nan] * 5])
    limit, share = jax.jit(smallest_limit, static_argnums=1)(values, 2)
    weights = jnp.where(values[0] < limit[0], 1, jnp.where(values[0] == limit[0], share[0], 0))
    np.testing.assert_array_equal(weights, [1, 0, 1, 0, 0])


def test_uncertain_points():
    logits = jnp.array([[5.0, -0.1, 0.2, -3.0, 7.0, 9.0], [1.0, 1.0, -1.0, 4.0, 0.0, 0.0]])
    weights = uncertain_point_weights(logits, 4, 2)
    np.testing.assert_allclose(weights, [[0, 1, 1, 0, 1, 1], [2 / 3, 2 / 3, 2 / 3, 0, 1, 1]], rtol=1e-6)
    assert (jax.grad(lambda x: uncertain_point_weights(x, 4, 2).sum())(logits) == 0).all()


def test_doubling_against_jax_image():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32)
    wanted = jax.image.resize(x, (2, 10, 3), "bilinear")
    even, odd = double_axis(x, 1)
    np.testing.assert_allclose(even, wanted[:, 0::2], atol=1e-6)
    np.testing.assert_allclose(odd, wanted[:, 1::2], atol=1e-6)


def test_mask_quality_against_jax_image():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((4, 6, 5)).astype(np.float32)
    target = rng.random((4, 12, 10)) < 0.5
    predicted = np.asarray(jax.image.resize(logits, (4, 12, 10), "bilinear")) > 0
    overlap, union = ((f(predicted, target)).sum(axis=(1, 2)) for f in (np.logical_and, np.logical_or))
    phases = tuple(tuple(jnp.asarray(target[:, i::2, j::2], jnp.uint16) for j in (0, 1)) for i in (0, 1))
    quality = mask_quality(jnp.asarray(logits), phases)
    np.testing.assert_allclose(quality, (overlap + 0.01) / (union + 0.01), rtol=1e-6)
    nothing = mask_quality(jnp.full((1, 3, 3), -1.0), ((jnp.zeros((1, 3, 3)),) * 2,) * 2)
    np.testing.assert_allclose(nothing, 1)  # two empty masks agree


def test_sampling_against_scipy():
    rng = np.random.default_rng(0)
    feature_map = rng.standard_normal((2, 5, 7, 3)).astype(np.float32)
    points = rng.uniform(-0.2, 1.2, (2, 50, 2)).astype(np.float32)
    sampled = sample_map(jnp.asarray(feature_map), jnp.asarray(points))
    for b in range(2):
        rows, columns = points[b, :, 1] * 5 - 0.5, points[b, :, 0] * 7 - 0.5
        for c in range(3):
            wanted = scipy.ndimage.map_coordinates(
                feature_map[b, :, :, c], [rows, columns], order=1, mode="grid-constant"
            )
            np.testing.assert_allclose(sampled[b, :, c], wanted, atol=1e-5)


def test_sampling_is_linear_and_its_gradient_is_the_transpose():
    rng = np.random.default_rng(0)
    m = jnp.asarray(rng.standard_normal((2, 4, 4, 3)), jnp.float32)
    points, g = (
        jnp.asarray(rng.uniform(-0.1, 1.1, (2, 9, 2)), jnp.float32),
        jnp.asarray(rng.standard_normal((2, 9, 3)), jnp.float32),
    )
    value, vjp = jax.vjp(lambda m: sample_map(m, points), m)
    np.testing.assert_allclose(jnp.sum(vjp(g)[0] * m), jnp.sum(value * g), rtol=1e-5)
    other = jnp.asarray(rng.standard_normal(m.shape), jnp.float32)
    np.testing.assert_allclose(jnp.sum(vjp(g)[0] * other), jnp.sum(sample_map(other, points) * g), rtol=1e-4)


SLOTS = 37


def random_masks(height=9, width=11) -> np.ndarray:
    return (np.random.default_rng(2).random((2, SLOTS, height, width)) < 0.4).astype(np.uint8)


@pytest.mark.parametrize("slots", [1, 15, 16, 17, SLOTS])
def test_packed_masks_come_back(slots):
    masks = random_masks()[:, :slots]
    planes = pack_masks(jnp.asarray(masks), jnp.asarray(slots))
    assert planes.shape == (2, -(-slots // 16), 9, 11)
    np.testing.assert_array_equal(read_bits(planes, jnp.arange(slots)), masks)


def test_planes_of_few_objects():
    planes = pack_masks(jnp.asarray(random_masks()), jnp.asarray(5))
    np.testing.assert_array_equal(read_bits(planes, jnp.arange(5)), random_masks()[:, :5])
    assert (planes[:, 1:] == 0).all()


def test_points_of_planes_are_points_of_masks():
    masks, rng = random_masks(), np.random.default_rng(0)
    num_slots = jnp.asarray(SLOTS)
    planes = pack_masks(jnp.asarray(masks), num_slots)
    slots = jnp.array([36, 0, 16, 16, 3])
    feature_map = jnp.moveaxis(jnp.asarray(masks[:, np.asarray(slots)], jnp.float32), 1, -1)
    shared = jnp.asarray(rng.uniform(-0.1, 1.1, (2, 1, 20, 2)), jnp.float32)
    wanted = jnp.moveaxis(sample_map(feature_map, shared[:, 0]), -1, 1)
    assert 0 < wanted.mean() < 1
    np.testing.assert_allclose(read_points(*gather_words(planes, shared, num_slots), slots), wanted, atol=1e-6)
    own = jnp.asarray(rng.random((2, 5, 20, 2)), jnp.float32)
    wanted = jnp.stack([sample_map(feature_map[..., i : i + 1], own[:, i])[..., 0] for i in range(5)], axis=1)
    np.testing.assert_allclose(read_points(*gather_words(planes, own, num_slots), slots), wanted, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(8, 12), (4, 6), (16, 24), (5, 7), (3, 24)])
def test_resized_planes_against_jax_image(height, width):
    masks, num_slots = random_masks(8, 12), jnp.asarray(SLOTS)
    resized = resize_planes(pack_masks(jnp.asarray(masks), num_slots), height, width, num_slots)
    found = np.asarray(read_bits(resized, jnp.arange(SLOTS)))
    values = np.asarray(
        jax.image.resize(masks.astype(np.float32), (2, SLOTS, height, width), "bilinear", antialias=False)
    )
    clear = np.abs(values - 0.5) > 1e-5
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(found[clear], values[clear] > 0.5)
    if (height, width) == (4, 6):
        assert (~clear).any() and (found[~clear] == 0).all()  # exactly one half is not above one half
