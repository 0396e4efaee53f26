"""PP-HGNetV2, the backbone: four feature maps at strides 4, 8, 16 and 32.

Source: PaddleDetection at 666f597fd0, ppdet/modeling/backbones/hgnet_v2.py. Module names follow the
official state dict, so that weights map one to one.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from instseg_jax.models.convolution import ConvNorm
from instseg_jax.models.variants import Stage


@jax.jit
def max_pool_2x2_same(x: Array) -> Array:
    """2x2 maximum at stride 1, padded by one row below and one column right: four shifted slices."""
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-jnp.inf)
    rows = jnp.maximum(padded[:, :-1], padded[:, 1:])
    return jnp.maximum(rows[:, :, :-1], rows[:, :, 1:])


class Stem(nn.Module):
    """[B, H, W, C] images -> [B, H/4, W/4, out]."""

    mid_channels: int
    out_channels: int
    frozen_norm: bool
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        def conv(name: str, features: int, kernel_size: int, x: Array, stride: int = 1) -> Array:
            layer = ConvNorm(
                features,
                kernel_size,
                stride,
                activation=nn.relu,
                frozen_norm=self.frozen_norm,
                folded=self.folded,
                dtype=self.dtype,
                name=name,
            )
            return layer(x, train=train)

        mid = self.mid_channels
        x = conv("stem1", mid, 3, images, stride=2)
        branch = conv("stem2b", mid, 2, conv("stem2a", mid // 2, 2, x))
        x = jnp.concatenate([max_pool_2x2_same(x), branch], axis=-1)
        return conv("stem4", self.out_channels, 1, conv("stem3", mid, 3, x, stride=2))


class LightConv(nn.Module):
    """1x1 convolution without activation, then a depthwise one with ReLU."""

    features: int
    kernel_size: int
    frozen_norm: bool
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        shared: dict[str, Any] = {"frozen_norm": self.frozen_norm, "folded": self.folded, "dtype": self.dtype}
        x = ConvNorm(self.features, 1, **shared, name="conv1")(x, train=train)
        depthwise = ConvNorm(
            self.features, self.kernel_size, depthwise=True, activation=nn.relu, **shared, name="conv2"
        )
        return depthwise(x, train=train)


class HGBlock(nn.Module):
    """Chained layers whose outputs are concatenated with the input and aggregated by two 1x1 convolutions."""

    stage: Stage
    residual: bool
    frozen_norm: bool
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        stage = self.stage
        shared: dict[str, Any] = {"frozen_norm": self.frozen_norm, "folded": self.folded, "dtype": self.dtype}
        features = [x]
        for i in range(stage.num_layers):
            layer: LightConv | ConvNorm
            if stage.light:
                layer = LightConv(stage.mid_channels, stage.kernel_size, **shared, name=f"layers_{i}")
            else:
                layer = ConvNorm(
                    stage.mid_channels, stage.kernel_size, activation=nn.relu, **shared, name=f"layers_{i}"
                )
            features.append(layer(features[-1], train=train))
        y = jnp.concatenate(features, axis=-1)
        for name, channels in (("squeeze", stage.out_channels // 2), ("excitation", stage.out_channels)):
            y = ConvNorm(channels, 1, activation=nn.relu, **shared, name=f"aggregation_{name}_conv")(y, train=train)
        return x + y if self.residual else y


class HGStage(nn.Module):
    """An optional stride-2 depthwise convolution, then blocks; all but the first are residual."""

    stage: Stage
    frozen_norm: bool
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.stage.downsample:
            downsample = ConvNorm(
                x.shape[-1],
                3,
                stride=2,
                depthwise=True,
                frozen_norm=self.frozen_norm,
                folded=self.folded,
                dtype=self.dtype,
                name="downsample",
            )
            x = downsample(x, train=train)
        for i in range(self.stage.num_blocks):
            block = HGBlock(self.stage, i > 0, self.frozen_norm, self.folded, dtype=self.dtype, name=f"blocks_{i}")
            x = block(x, train=train)
        return x


class HGNetV2(nn.Module):
    """Images [B, H, W, C] -> maps at strides 4, 8, 16, 32.

    Attributes:
      frozen_norm: normalise with the running statistics even in training and leave them as they are (the
        official recipe, which starts from a pretrained backbone).
    """

    stem_channels: tuple[int, ...]  # (mid, out)
    stages: tuple[Stage, ...]
    frozen_norm: bool
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> tuple[Array, ...]:
        mid, out = self.stem_channels
        x = Stem(mid, out, self.frozen_norm, self.folded, dtype=self.dtype, name="stem")(images, train=train)
        maps = []
        for i, stage in enumerate(self.stages):
            x = HGStage(stage, self.frozen_norm, self.folded, dtype=self.dtype, name=f"stages_{i}")(x, train=train)
            maps.append(x)
        return tuple(maps)
