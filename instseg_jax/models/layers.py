"""Building blocks: convolution, dense layer, norms, attention, MLP, resizing, and how parameters get values.

Convolutions choose the form that XLA runs fastest: 1x1 as a matrix product, depthwise as shifted
multiply-adds (XLA's own depthwise convolution takes 30 times as long on a CPU), the rest as a convolution.

Nothing here fixes a floating type. `dtype=None` computes in the type of inputs and parameters, so the same
module runs in float32 and float64; `dtype=jnp.bfloat16` computes in bfloat16 with parameters as they are.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NORM_EPS = 1e-5  # batch norm and layer norm of the reference
MANY_TOKENS = 1024  # from which attention takes its heads one after the other
BATCH_NORM_MOMENTUM = 0.9  # part of the old running value that is kept

Activation = Callable[[Array], Array] | None


# --- initial values -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A distribution of initial values, drawable by Flax (jax key) and quickly on the host (numpy).

    `scale` is the standard deviation of "normal", the half width of "uniform", the value of "constant";
    `values`, when set, gives the numbers themselves.
    """

    kind: str
    scale: float = 0.0
    values: Callable[[], np.ndarray] | None = None

    def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        if self.kind == "normal":
            return self.scale * jax.random.normal(key, shape, dtype)
        if self.kind == "uniform":
            return jax.random.uniform(key, shape, dtype, -self.scale, self.scale)
        return jnp.asarray(self._fixed(shape), dtype)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if self.kind == "normal":
            return (self.scale * rng.standard_normal(shape)).astype(np.float32)
        if self.kind == "uniform":
            return rng.uniform(-self.scale, self.scale, shape).astype(np.float32)
        return self._fixed(shape)

    def _fixed(self, shape: tuple[int, ...]) -> np.ndarray:
        """Values that no chance has a part in."""
        if self.values is not None:
            return np.asarray(self.values(), np.float32).reshape(shape)
        return np.full(shape, self.scale, np.float32)


def normal(std: float) -> Initializer:
    """Normal around 0 with the given standard deviation."""
    return Initializer("normal", std)


def uniform(limit: float) -> Initializer:
    """Uniform within +-limit."""
    return Initializer("uniform", limit)


def constant(value: float) -> Initializer:
    """The same value everywhere."""
    return Initializer("constant", value)


def kaiming_normal(fan_in: int) -> Initializer:
    """Standard deviation sqrt(2 / fan_in)."""
    return normal(math.sqrt(2.0 / fan_in))


def fan_in_uniform(fan_in: int) -> Initializer:
    """Uniform within +-1 / sqrt(fan_in)."""
    return uniform(1.0 / math.sqrt(fan_in))


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Uniform within +-sqrt(6 / (fan_in + fan_out))."""
    return uniform(math.sqrt(6.0 / (fan_in + fan_out)))


_recorded: contextvars.ContextVar[dict | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def recorded_initializers():
    """Collect {path: (Initializer, shape)} of every parameter that is declared inside."""
    token = _recorded.set({})
    try:
        yield _recorded.get()
    finally:
        _recorded.reset(token)


def declare(module: nn.Module, name: str, initializer: Initializer, shape: tuple[int, ...]) -> Array:
    """Create or fetch a parameter of `module`; the only place where this package does."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded[(*module.path, name)] = (initializer, shape)
    return module.param(name, initializer, shape)


# --- linear maps ----------------------------------------------------------------------------------


class Dense(nn.Module):
    """y = x @ kernel + bias over the last axis: [..., I] -> [..., features]."""

    features: int
    kernel_init: Callable[[int, int], Initializer] = xavier_uniform
    bias_init: Callable[[int], Initializer] = fan_in_uniform
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        kernel = declare(self, "kernel", self.kernel_init(fan_in, self.features), (fan_in, self.features))
        bias = declare(self, "bias", self.bias_init(fan_in), (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + bias


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
    def __call__(self, x: Array) -> Array:
        last = len(self.features) - 1
        for i, features in enumerate(self.features):
            is_last = i == last
            kernel_init = self.last_kernel_init if is_last and self.last_kernel_init else self.kernel_init
            bias_init = self.last_bias_init if is_last else fan_in_uniform
            x = Dense(features, kernel_init, bias_init, dtype=self.dtype, name=f"layers_{i}")(x)
            if not is_last:
                x = nn.relu(x)
        return x


# --- convolution ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(2, 3))
def depthwise_conv(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """Depthwise convolution as a sum of shifted products: x [B, H, W, C], kernel [k, k, 1, C]."""
    return _depthwise(x, kernel, stride, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
    """For the backward pass only x and the kernel are kept.

    Automatic differentiation keeps a shifted copy of x for each of the k x k products, a quarter of all that a
    training step of size L remembers.
    """
    windows = _shifted_windows(x, kernel.shape[0], stride, padding)
    return functools.reduce(jnp.add, (window * tap for window, tap in zip(windows, _taps(kernel), strict=True)))


def _taps(kernel: Array) -> list[Array]:
    """[k, k, 1, C] -> k * k of [C]."""
    return [kernel[dy, dx, 0] for dy in range(kernel.shape[0]) for dx in range(kernel.shape[0])]


def _shifted_windows(x: Array, size: int, stride: int, padding: tuple[int, int]) -> list[Array]:
    """What each tap of a size x size kernel sees, [B, H', W', C] each."""
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    height, width = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    shifts = [(dy, dx) for dy in range(size) for dx in range(size)]
    return [x[:, dy : dy + height : stride, dx : dx + width : stride] for dy, dx in shifts]


def _depthwise_forward(x: Array, kernel: Array, stride: int, padding: tuple[int, int]):
    return _depthwise(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride: int, padding: tuple[int, int], kept: tuple[Array, Array], gradient: Array):
    x, kernel = kept
    size = kernel.shape[0]
    windows = _shifted_windows(x, size, stride, padding)
    to_kernel = jnp.stack([jnp.sum(window * gradient, axis=(0, 1, 2)) for window in windows])
    # To x: a convolution of the gradient, spread out by the stride, with the kernel turned round.
    unseen = [(n + sum(padding) - size) % stride for n in x.shape[1:3]]
    edges = [(size - 1 - padding[0], size - 1 - padding[1] + rest, stride - 1) for rest in unseen]
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    return _depthwise(spread, kernel[::-1, ::-1], 1, (0, 0)), to_kernel.reshape(kernel.shape)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def convolve(x: Array, kernel: Array, stride: int, padding: tuple[int, int]) -> Array:
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
    """Convolution with symmetric padding (k - 1) // 2, or one row more below and right when k is even."""

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    use_bias: bool = False
    kernel_init: Callable[[int, int], Initializer] = lambda fan_in, fan_out: kaiming_normal(fan_in)
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k = self.kernel_size
        in_channels = 1 if self.depthwise else x.shape[-1]
        fan_in = k * k * in_channels
        init = self.kernel_init(fan_in, k * k * self.features)
        kernel = declare(self, "kernel", init, (k, k, in_channels, self.features))
        bias = declare(self, "bias", constant(0.0), (self.features,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        before = (k - 1) // 2
        y = convolve(x, kernel, self.stride, (before, k - 1 - before))
        return y if bias is None else y + bias


class BatchNorm(nn.Module):
    """Batch norm over [B, H, W]; with `frozen` it always uses (and keeps) the running statistics.

    Under `jit` over a sharded batch the statistics are those of the global batch. The running variance is
    the biased one, as PaddlePaddle's on a CPU.
    """

    frozen: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = (x.shape[-1],)
        scale = declare(self, "scale", constant(1.0), channels)
        bias = declare(self, "bias", constant(0.0), channels)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        var = self.variable("batch_stats", "var", jnp.ones, channels)
        if train and not self.frozen:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # statistics in at least float32
            batch_mean = wide.mean(axis=(0, 1, 2))
            batch_var = jnp.square(wide - batch_mean).mean(axis=(0, 1, 2))
            if not self.is_initializing():
                keep = BATCH_NORM_MOMENTUM
                mean.value = keep * mean.value + (1 - keep) * batch_mean.astype(mean.value.dtype)
                var.value = keep * var.value + (1 - keep) * batch_var.astype(var.value.dtype)
        else:
            batch_mean, batch_var = mean.value, var.value
        factor = scale * jax.lax.rsqrt(batch_var + NORM_EPS)
        offset = bias - batch_mean * factor
        x, factor, offset = nn.dtypes.promote_dtype(x, factor, offset, dtype=self.dtype)
        return x * factor + offset


class ConvNorm(nn.Module):
    """Conv (no bias), batch norm, activation; parameters under `conv` and `bn`.

    With `folded` the norm is part of the convolution, which then has a bias, see `inference/optimize.py`.
    """

    features: int
    kernel_size: int
    stride: int = 1
    depthwise: bool = False
    activation: Activation = None
    frozen_norm: bool = False
    kernel_init: Callable[[int, int], Initializer] = lambda fan_in, fan_out: kaiming_normal(fan_in)
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.depthwise,
            use_bias=self.folded,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        if not self.folded:
            x = BatchNorm(self.frozen_norm, dtype=self.dtype, name="bn")(x, train=train)
        return x if self.activation is None else self.activation(x)


# --- transformer pieces ---------------------------------------------------------------------------


# Under `jax.jit` these keep their names in the traced program, where `deploy/onnx_translate.py` looks for them.


@jax.jit
def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    """Over the last axis, statistics in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + NORM_EPS)
    return (centred * inverse).astype(x.dtype) * scale + bias


@jax.jit
def softmax(x: Array) -> Array:
    """Over the last axis."""
    return jax.nn.softmax(x, axis=-1)


@jax.jit
def gelu(x: Array) -> Array:
    """x times the normal distribution function of x, exact."""
    return jax.nn.gelu(x, approximate=False)


@jax.jit
def attend(q: Array, k: Array, v: Array) -> Array:
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
    def __call__(self, x: Array) -> Array:
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
    def __call__(self, query: Array, key: Array, value: Array, attention_mask: Array | None = None) -> Array:
        channels = query.shape[-1]
        kernel = declare(self, "in_proj_weight", xavier_uniform(channels, 3 * channels), (channels, 3 * channels))
        bias = declare(self, "in_proj_bias", constant(0.0), (3 * channels,))
        query, key, value, kernel, bias = nn.dtypes.promote_dtype(query, key, value, kernel, bias, dtype=self.dtype)
        kernels, biases = jnp.split(kernel, 3, axis=1), jnp.split(bias, 3)
        q, k, v = (
            (x @ w + b).reshape(*x.shape[:-1], self.num_heads, channels // self.num_heads)
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


# --- resizing -------------------------------------------------------------------------------------


@jax.jit
def upsample_nearest_2x(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], every value repeated."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def _double_axis(x: Array, axis: int) -> Array:
    first = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    last = jax.lax.slice_in_dim(x, x.shape[axis] - 1, x.shape[axis], axis=axis)
    before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)], axis=axis)
    after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, x.shape[axis], axis=axis), last], axis=axis)
    doubled = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis=axis + 1)
    return doubled.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])


@jax.jit
def upsample_bilinear_2x(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], bilinear with half-pixel centres, by slices: the weights are 1/4, 3/4."""
    return _double_axis(_double_axis(x, 1), 2)
