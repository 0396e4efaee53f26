"""Initial values of parameters: which draw a parameter gets, recorded as the network is traced."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_recorded: contextvars.ContextVar[dict | None] = contextvars.ContextVar("recorded", default=None)


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
