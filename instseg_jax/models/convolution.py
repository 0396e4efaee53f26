"""Convolutions with their norms.

Each takes the form that XLA runs fastest: 1x1 as a matrix product, depthwise as shifted multiply-adds (XLA's own
depthwise convolution takes 30 times as long on a CPU), the rest as a convolution. No floating type is fixed, see
`attention.py`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from instseg_jax.models.initial_values import Initializer, constant, declare, kaiming_normal
from instseg_jax.models.linear import NORM_EPS, Activation, with_rank

BATCH_NORM_MOMENTUM = 0.9  # part of the old running value that is kept


@functools.partial(jax.jit, static_argnums=(2, 3))
def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k 1 C"], stride: int, padding: tuple[int, int]
) -> Float[Array, "B _ _ C"]:
    """Depthwise convolution as a sum of shifted products: x [B, H, W, C], kernel [k, k, 1, C]."""
    return _depthwise(x, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """For the backward pass only x and the kernel are kept.

    Automatic differentiation keeps a shifted copy of x for each of the k x k products, a quarter of all that a
    training step of size L remembers.
    """
    windows = _shifted_windows(jnp.pad(x, ((0, 0), padding, padding, (0, 0))), kernel.shape[0], stride)
    return functools.reduce(jnp.add, (window * tap for window, tap in zip(windows, _taps(kernel), strict=True)))


def _taps(kernel: Array) -> list[Array]:
    """[k, k, 1, C] -> k * k of [1, 1, 1, C]."""
    return [kernel[dy, dx][None, None] for dy in range(kernel.shape[0]) for dx in range(kernel.shape[0])]


def _shifted_windows(x: Array, size: int, stride: int) -> list[Array]:
    """What each tap of a size x size kernel sees of the padded x, [B, H', W', C] each."""
    height, width = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    shifts = [(dy, dx) for dy in range(size) for dx in range(size)]
    return [x[:, dy : dy + height : stride, dx : dx + width : stride] for dy, dx in shifts]


def _depthwise_forward(x: Array, kernel: Array, stride: int, padding: tuple[int, int]):
    return _depthwise(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride: int, padding: tuple[int, int], kept: tuple[Array, Array], gradient: Array):
    x, kernel = kept
    size = kernel.shape[0]
    to_kernel = jax.lax.platform_dependent(
        jnp.pad(x, ((0, 0), padding, padding, (0, 0))),
        gradient,
        cpu=functools.partial(_sum_in_a_loop, size, stride),
        default=functools.partial(_sum_at_once, size, stride),
    )
    # To x: a convolution of the gradient, spread out by the stride, with the kernel turned round.
    unseen = [(n + sum(padding) - size) % stride for n in x.shape[1:3]]
    edges = [(size - 1 - padding[0], size - 1 - padding[1] + rest, stride - 1) for rest in unseen]
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return _depthwise(spread, kernel[::-1, ::-1], 1, (0, 0)), to_kernel.reshape(kernel.shape)


def _sum_at_once(size: int, stride: int, x: Array, gradient: Array) -> Array:
    """Gradient to the kernel, [k * k, C], of the padded x."""
    windows = _shifted_windows(x, size, stride)
    return jnp.stack([jnp.sum(window * gradient, axis=(0, 1, 2)) for window in windows])


def _sum_in_a_loop(size: int, stride: int, x: Array, gradient: Array) -> Array:
    """As `_sum_at_once`, bit for bit, with one kernel of code for all taps: a CPU compiles for 25 of 5 x 5 else."""
    batch, height, width, channels = gradient.shape
    seen = (batch, (height - 1) * stride + 1, (width - 1) * stride + 1, channels)

    def sum_tap(tap: Array) -> Array:
        window = jax.lax.dynamic_slice(x, (0, tap // size, tap % size, 0), seen)[:, ::stride, ::stride]
        return jnp.sum(window * gradient, axis=(0, 1, 2))

    return jax.lax.map(sum_tap, jnp.arange(size * size))


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k _ O"], stride: int, padding: tuple[int, int]
) -> Float[Array, "B _ _ O"]:
    """2-D convolution, NHWC x HWIO; a kernel with one input channel and as many outputs as x is depthwise."""
    size, channels = kernel.shape[0], x.shape[-1]
    if size == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    if kernel.shape[2] == 1 and kernel.shape[3] == channels > 1:
        return depthwise_conv(x, kernel, stride, padding)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv(nn.Module):
    """Convolution, by default with symmetric padding (k - 1) // 2, or one row more below and right when k is even."""

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    padding: tuple[int, int] | None = None  # rows above and below, columns left and right
    use_bias: bool = False
    kernel_init: Callable[[int, int], Initializer] = lambda fan_in, fan_out: kaiming_normal(fan_in)
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B _ _ O"]:
        k = self.kernel_size
        in_channels = 1 if self.depthwise else x.shape[-1]
        fan_in = k * k * in_channels
        init = self.kernel_init(fan_in, k * k * self.features)
        kernel = declare(self, "kernel", init, (k, k, in_channels, self.features))
        bias = declare(self, "bias", constant(0.0), (self.features,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        before = (k - 1) // 2
        y = convolve(x, kernel, self.stride, self.padding or (before, k - 1 - before))
        return y if bias is None else y + with_rank(bias, y.ndim)


class BatchNorm(nn.Module):
    """Batch norm over [B, H, W]; with `frozen` it always uses (and keeps) the running statistics.

    Under `jit` over a sharded batch the statistics are those of the global batch. The running variance is
    the biased one, as PaddlePaddle's on a CPU.
    """

    frozen: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H W C"]:
        channels = (x.shape[-1],)
        scale = declare(self, "scale", constant(1.0), channels)
        bias = declare(self, "bias", constant(0.0), channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        dtype = self.dtype or jnp.result_type(x, scale, bias)
        if train and not self.frozen:
            y, batch_mean, batch_var = normalize(x, scale, bias, dtype)
            if not self.is_initializing():
                keep = BATCH_NORM_MOMENTUM
                mean.value = keep * mean.value + (1 - keep) * batch_mean.astype(mean.value.dtype)
                var.value = keep * var.value + (1 - keep) * batch_var.astype(var.value.dtype)
            return y
        factor = scale * jax.lax.rsqrt(var.value + NORM_EPS)
        return _scale_and_shift(x, factor, bias - mean.value * factor, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: Float[Array, "B H W C"], scale: Float[Array, " C"], bias: Float[Array, " C"], dtype: jnp.dtype
) -> tuple[Float[Array, "B H W C"], Float[Array, " C"], Float[Array, " C"]]:
    """Batch norm by the batch's own statistics: the result in `dtype`, and mean and biased variance, without gradient.

    Statistics are taken in at least float32. For the backward pass x and vectors are kept; automatic differentiation
    keeps three arrays of the size of x and makes a dozen kernels of each layer.
    """
    return _normalize_forward(x, scale, bias, dtype)[0]


def _normalize_forward(x: Array, scale: Array, bias: Array, dtype: jnp.dtype):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(axis=(0, 1, 2))
    var = jnp.square(wide - with_rank(mean, x.ndim)).mean(axis=(0, 1, 2))
    deviation = jax.lax.rsqrt(var + NORM_EPS)
    factor = scale * deviation
    y = _scale_and_shift(x, factor, bias - mean * factor, dtype)
    return (y, mean, var), (x, scale, bias, mean, deviation)


def _normalize_backward(dtype: jnp.dtype, kept: tuple[Array, ...], gradients: tuple[Array, Array, Array]):
    del dtype
    x, scale, bias, mean, deviation = kept
    gradient = gradients[0].astype(mean.dtype)
    unit = (x.astype(mean.dtype) - with_rank(mean, x.ndim)) * with_rank(deviation, x.ndim)
    to_bias = gradient.sum(axis=(0, 1, 2))
    to_scale = (gradient * unit).sum(axis=(0, 1, 2))
    count = x.size // x.shape[-1]
    rest = with_rank(to_bias / count, x.ndim) + unit * with_rank(to_scale / count, x.ndim)
    to_x = with_rank(scale * deviation, x.ndim) * (gradient - rest)
    return to_x.astype(x.dtype), to_scale.astype(scale.dtype), to_bias.astype(bias.dtype)


normalize.defvjp(_normalize_forward, _normalize_backward)


def _scale_and_shift(x: Array, factor: Array, offset: Array, dtype: jnp.dtype) -> Array:
    x, factor, offset = nn.dtypes.promote_dtype(x, factor, offset, dtype=dtype)
    return x * with_rank(factor, x.ndim) + with_rank(offset, x.ndim)


class ConvNorm(nn.Module):
    """Conv (no bias), batch norm, activation; parameters under `conv` and `bn`.

    With `folded` the norm is part of the convolution, which then has a bias, see `inference/optimize.py`.
    """

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    padding: tuple[int, int] | None = None
    activation: Activation = None
    frozen_norm: bool = False
    kernel_init: Callable[[int, int], Initializer] = lambda fan_in, fan_out: kaiming_normal(fan_in)
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B _ _ O"]:
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.depthwise,
            self.padding,
            use_bias=self.folded,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        if not self.folded:
            x = BatchNorm(self.frozen_norm, dtype=self.dtype, name="bn")(x, train=train)
        return x if self.activation is None else self.activation(x)
