"""Convolutions and their gradients against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instseg_jax.models.convolution import _sum_at_once, _sum_in_a_loop, convolve, normalize
from instseg_jax.models.efficientnet_lite import relu6
from instseg_jax.models.linear import NORM_EPS


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (2, 1)])
@pytest.mark.parametrize("shape", [(2, 8, 12, 6), (1, 7, 5, 6)])
def test_depthwise_convolution_and_its_gradients(size, stride, shape):
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 1, shape[-1])), jnp.float32)
    before = (size - 1) // 2
    padding = (before, size - 1 - before)

    def own(x, kernel):
        return convolve(x, kernel, stride, padding)

    def library(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        strides, paddings = (stride, stride), (padding, padding)
        return jax.lax.conv_general_dilated(
            x, kernel, strides, paddings, dimension_numbers=dimensions, feature_group_count=shape[-1]
        )

    results = []
    for function in (own, library):
        value, pull_back = jax.vjp(function, x, kernel)
        gradient = jnp.asarray(np.random.default_rng(1).standard_normal(value.shape), jnp.float32)
        results.append((value, *pull_back(gradient)))
    for mine, theirs in zip(*results, strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_loop_over_taps_is_the_sum_at_once():
    """Gradients to a depthwise kernel on a CPU and elsewhere, bit for bit."""
    rng = np.random.default_rng(0)
    for size, stride in ((3, 1), (5, 2)):
        gradient = jnp.asarray(rng.standard_normal((2, 4, 5, 6)), jnp.float32)
        height, width = ((n - 1) * stride + size for n in gradient.shape[1:3])
        x = jnp.asarray(rng.standard_normal((2, height, width, 6)), jnp.float32)
        sums = [jax.jit(f, static_argnums=(0, 1))(size, stride, x, gradient) for f in (_sum_in_a_loop, _sum_at_once)]
        np.testing.assert_array_equal(*sums)


@pytest.mark.parametrize("activation", [None, relu6])
def test_batch_norm_and_its_gradients(activation):
    """Against the plain formula differentiated by JAX, both in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, cotangent = (jnp.asarray(3 * rng.standard_normal((2, 5, 4, 3))) for _ in range(2))
        scale, bias = (jnp.asarray(rng.standard_normal(3)) for _ in range(2))

        def own(x, scale, bias):
            y, mean, var = normalize(x, scale, bias, x.dtype)
            return y if activation is None else activation(y), (mean, var)

        def plain(x, scale, bias):
            mean, var = x.mean(axis=(0, 1, 2), keepdims=True), x.var(axis=(0, 1, 2), keepdims=True)
            y = (x - mean) / jnp.sqrt(var + NORM_EPS) * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)
            return y if activation is None else jnp.clip(y, 0, 6), (mean.ravel(), var.ravel())

        results = []
        for function in (own, plain):
            value, pull_back, statistics = jax.vjp(function, x, scale, bias, has_aux=True)
            results.append((value, *statistics, *pull_back(cotangent)))
        for mine, theirs in zip(*results, strict=True):
            assert float(jnp.abs(theirs).max()) > 0.1
            np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-11)


def test_batch_norm_of_half_precision_counts_in_single_precision():
    x = jnp.asarray(1000 + np.random.default_rng(0).standard_normal((2, 32, 32, 2)), jnp.bfloat16)
    y, mean, var = normalize(x, jnp.ones(2), jnp.zeros(2), jnp.dtype(jnp.bfloat16))
    wide = np.asarray(x, np.float64)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(mean, wide.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, wide.var(axis=(0, 1, 2)), rtol=1e-4)
    gradient = jax.grad(lambda x: normalize(x, jnp.ones(2), jnp.zeros(2), x.dtype)[0].astype(jnp.float32).sum())(x)
    assert gradient.dtype == jnp.bfloat16 and bool(jnp.isfinite(gradient).all())
