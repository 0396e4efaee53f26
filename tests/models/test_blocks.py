"""Convolutions and their gradients against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instseg_jax.models.convolution import convolve


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
