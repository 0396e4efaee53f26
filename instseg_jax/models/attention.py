"""Attention, and the norm and activations around it.

Nothing here fixes a floating type. `dtype=None` computes in the type of inputs and parameters, so the same
module runs in float32 and float64; `dtype=jnp.bfloat16` computes in bfloat16 with parameters as they are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from instseg_jax.models.initial_values import (
    constant,
    declare,
    xavier_uniform,
)
from instseg_jax.models.linear import NORM_EPS, Dense, with_rank, zero_bias

MANY_TOKENS = 1024  # from which attention takes its heads one after the other


# Under `jax.jit` these keep their names in the traced program, where `runtimes/onnx_translate.py` looks for them.


@jax.jit
def layer_norm(x: Float[Array, "*n C"], scale: Float[Array, " C"], bias: Float[Array, " C"]) -> Float[Array, "*n C"]:
    """Over the last axis, statistics in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + NORM_EPS)
    return (centred * inverse).astype(x.dtype) * with_rank(scale, x.ndim) + with_rank(bias, x.ndim)


@jax.jit
def softmax(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Over the last axis."""
    return jax.nn.softmax(x, axis=-1)


@jax.jit
def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x times the normal distribution function of x, exact."""
    return jax.nn.gelu(x, approximate=False)


@jax.jit
def attend(
    q: Float[Array, "B T h d"], k: Float[Array, "B S h d"], v: Float[Array, "B S h d"]
) -> Float[Array, "B T h d"]:
    """Softmax attention of [B, T, heads, D] without a gradient in mind: the scores are divided after the sum.

    Many tokens are worked through head by head: the scores of one stay in a core's cache (1600 tokens: 19 ms of CPU
    time instead of 45).
    """

    def one_head(head: tuple[Array, Array, Array]) -> Array:  # [B, T, D] each
        q, k, v = head
        scores = jnp.einsum("bqd,bkd->bqk", q * q.shape[-1] ** -0.5, k)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        return (jnp.einsum("bqk,bkd->bqd", weights, v) / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)

    heads = jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0), jnp.moveaxis(v, 2, 0)
    found = jax.lax.map(one_head, heads) if q.shape[1] >= MANY_TOKENS else jax.vmap(one_head)(heads)
    return jnp.moveaxis(found, 0, 2)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, statistics in at least float32."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        channels = (x.shape[-1],)
        scale = declare(self, "scale", constant(1.0), channels)
        bias = declare(self, "bias", constant(0.0), channels)
        return layer_norm(*nn.dtypes.promote_dtype(x, scale, bias, dtype=self.dtype))


class MultiHeadAttention(nn.Module):
    """Softmax attention with one fused in-projection [C, 3C], columns in the order q, k, v.

    query, key [B, T, C], value [B, T, C]; `attention_mask` [T, T] is True where the row may attend to the
    column. Scores and softmax are computed in at least float32.
    """

    num_heads: int
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "B T C"],
        key: Float[Array, "B S C"],
        value: Float[Array, "B S C"],
        attention_mask: Bool[Array, "T S"] | None = None,
    ) -> Float[Array, "B T C"]:
        channels = query.shape[-1]
        kernel = declare(self, "in_proj_weight", xavier_uniform(channels, 3 * channels), (channels, 3 * channels))
        bias = declare(self, "in_proj_bias", constant(0.0), (3 * channels,))
        query, key, value, kernel, bias = nn.dtypes.promote_dtype(query, key, value, kernel, bias, dtype=self.dtype)
        kernels, biases = jnp.split(kernel, 3, axis=1), jnp.split(bias, 3)
        q, k, v = (
            (x @ w + with_rank(b, x.ndim)).reshape(*x.shape[:-1], self.num_heads, channels // self.num_heads)
            for x, w, b in zip((query, key, value), kernels, biases, strict=True)
        )
        if self.folded and attention_mask is None:
            x = attend(q, k, v).reshape(query.shape)
            return Dense(channels, bias_init=zero_bias, dtype=self.dtype, name="out_proj")(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (channels // self.num_heads) ** -0.5
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        if attention_mask is not None:
            scores = jnp.where(attention_mask, scores, -jnp.inf)
        weights = softmax(scores).astype(v.dtype)
        self.sow("intermediates", "attention_weights", weights)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(query.shape)
        return Dense(channels, bias_init=zero_bias, dtype=self.dtype, name="out_proj")(x)
