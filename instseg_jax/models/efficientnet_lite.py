"""EfficientNet-Lite, a backbone for small sizes: four feature maps at strides 4, 8, 16 and 32.

Source: tensorflow/tpu, models/official/efficientnet/lite. Inverted residual blocks with ReLU6, without squeeze and
excitation; no activation behind a block's last convolution.

Differences: epsilon of the batch norms is 1e-5, as everywhere here, and not 1e-3: weights of the origin have the
difference added to their variances. The head (1280 channels, classifier) is left out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from instseg_jax.models.convolution import ConvNorm
from instseg_jax.models.variants import LiteStage

PIXEL_MEAN, PIXEL_SCALE = 127 / 255, 128 / 255  # of a value in 0..1: the origin takes (pixel - 127) / 128


@jax.custom_vjp
def relu6(x: Array) -> Array:
    """x within 0..6. The gradient, 0 at the ends too, needs the result alone, which the next layer keeps anyway."""
    return jnp.clip(x, 0, 6)


def _relu6_forward(x: Array) -> tuple[Array, Array]:
    y = relu6(x)
    return y, y


def _relu6_backward(y: Array, gradient: Array) -> tuple[Array]:
    return (jnp.where((y > 0) & (y < 6), gradient, 0),)


relu6.defvjp(_relu6_forward, _relu6_backward)


def same_padding(kernel_size: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME for even sides, (before, after): at stride 2 one less before than a symmetric padding."""
    total = kernel_size - stride
    return total // 2, total - total // 2


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels (not where that is 1), depthwise, 1x1; plus the input if shapes agree."""

    features: int
    kernel_size: int
    stride: int
    expansion: int
    frozen_norm: bool
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        shared: dict[str, Any] = {"frozen_norm": self.frozen_norm, "folded": self.folded, "dtype": self.dtype}
        channels, y = x.shape[-1], x
        if self.expansion > 1:
            y = ConvNorm(self.expansion * channels, 1, activation=relu6, **shared, name="expand")(y, train=train)
        depthwise = ConvNorm(
            y.shape[-1],
            self.kernel_size,
            self.stride,
            depthwise=True,
            padding=same_padding(self.kernel_size, self.stride),
            activation=relu6,
            **shared,
            name="depthwise",
        )
        y = ConvNorm(self.features, 1, **shared, name="project")(depthwise(y, train=train), train=train)
        return x + y if self.stride == 1 and channels == self.features else y


class EfficientNetLite(nn.Module):
    """Images [B, H, W, C] in 0..1 -> maps at strides 4, 8, 16, 32: what lies before each stride-2 block, and the last.

    Blocks are numbered through all stages: `blocks_0`, `blocks_1`, ...

    Attributes:
      frozen_norm: normalise with the running statistics even in training and leave them as they are.
    """

    stem_channels: tuple[int, ...]  # (out,)
    stages: tuple[LiteStage, ...]
    frozen_norm: bool
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> tuple[Array, ...]:
        shared: dict[str, Any] = {"frozen_norm": self.frozen_norm, "folded": self.folded, "dtype": self.dtype}
        # Before the first layer, so that what it pads with is the grey that the origin padded with.
        x = (images - PIXEL_MEAN) / PIXEL_SCALE
        (width,) = self.stem_channels
        stem = ConvNorm(width, 3, 2, padding=same_padding(3, 2), activation=relu6, **shared, name="stem")
        x = stem(x, train=train)
        maps, number = [], 0
        for stage in self.stages:
            for i in range(stage.repeats):
                stride = stage.stride if i == 0 else 1
                if stride == 2 and number > 1:
                    maps.append(x)
                block = InvertedResidual(
                    stage.channels, stage.kernel_size, stride, stage.expansion, **shared, name=f"blocks_{number}"
                )
                x = block(x, train=train)
                number += 1
        return (*maps, x)
