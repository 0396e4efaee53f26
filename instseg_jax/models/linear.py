"""Linear maps and stacks of them."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from instseg_jax.models.initial_values import Initializer, constant, declare, fan_in_uniform, xavier_uniform

NORM_EPS = 1e-5  # batch norm and layer norm of the reference
Activation = Callable[[Array], Array] | None


def with_rank(x: Shaped[Array, "..."], ndim: int) -> Shaped[Array, "..."]:
    """Put axes of one before those of x until there are `ndim`: nothing here is broadcast by rank unsaid."""
    return jnp.expand_dims(x, tuple(range(ndim - x.ndim)))


class Dense(nn.Module):
    """y = x @ kernel + bias over the last axis: [..., I] -> [..., features]."""

    features: int
    kernel_init: Callable[[int, int], Initializer] = xavier_uniform
    bias_init: Callable[[int], Initializer] = fan_in_uniform
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        fan_in = x.shape[-1]
        kernel = declare(self, "kernel", self.kernel_init(fan_in, self.features), (fan_in, self.features))
        bias = declare(self, "bias", self.bias_init(fan_in), (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + with_rank(bias, x.ndim)


def linear_default(fan_in: int, fan_out: int) -> Initializer:
    """The kernel initialiser of a plain linear layer of the reference: +-1 / sqrt(fan_in)."""
    del fan_out
    return fan_in_uniform(fan_in)


def zero_kernel(fan_in: int, fan_out: int) -> Initializer:
    """A kernel of zeros, for heads that the reference starts at zero."""
    del fan_in, fan_out
    return constant(0.0)


def zero_bias(fan_in: int) -> Initializer:
    """A bias of zeros."""
    del fan_in
    return constant(0.0)


class MLP(nn.Module):
    """Dense layers with ReLU between them, named layers_0, layers_1, ..."""

    features: tuple[int, ...]
    kernel_init: Callable[[int, int], Initializer] = linear_default
    last_kernel_init: Callable[[int, int], Initializer] | None = None
    last_bias_init: Callable[[int], Initializer] = fan_in_uniform
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        last = len(self.features) - 1
        for i, features in enumerate(self.features):
            is_last = i == last
            kernel_init = self.last_kernel_init if is_last and self.last_kernel_init else self.kernel_init
            bias_init = self.last_bias_init if is_last else fan_in_uniform
            x = Dense(features, kernel_init, bias_init, dtype=self.dtype, name=f"layers_{i}")(x)
            if not is_last:
                x = nn.relu(x)
        return x
