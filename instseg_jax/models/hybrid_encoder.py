"""MaskHybridEncoder, the neck: attention on one level, FPN and PAN over three, mask features at stride 4.

Source: PaddleDetection at 666f597fd0, ppdet/modeling/transformers/mask_rtdetr_transformer.py and
hybrid_encoder.py. Module names follow the official state dict.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from instseg_jax.models.attention import LayerNorm, MultiHeadAttention, gelu
from instseg_jax.models.convolution import BatchNorm, Conv, ConvNorm
from instseg_jax.models.initial_values import fan_in_uniform
from instseg_jax.models.linear import Dense, linear_default
from instseg_jax.models.sampling import upsample_bilinear_2x, upsample_nearest_2x


def _fan_in_kernel(fan_in: int, fan_out: int):
    del fan_out
    return fan_in_uniform(fan_in)


def _base_conv(module: nn.Module, features: int, kernel_size: int, name: str, stride: int = 1) -> ConvNorm:
    """Conv, batch norm, SiLU, a part of `module`: the neck's usual layer."""
    return ConvNorm(
        features,
        kernel_size,
        stride,
        activation=nn.silu,
        kernel_init=_fan_in_kernel,
        folded=module.folded,
        dtype=module.dtype,
        name=name,
    )


def sine_position_embedding(height: int, width: int, channels: int, rectangular: str) -> np.ndarray:
    """2-D sine embedding of the tokens of a map, row-major: [height * width, channels] float64.

    The first half encodes one coordinate, the second half the other, each as sines then cosines.

    `rectangular="official"` numbers token t as (t // height, t % height), as the reference does: for square
    maps these are (row, column), for others they are neither. "corrected" uses (row, column) always.
    """
    token = np.arange(height * width)
    rows = height if rectangular == "official" else width
    omega = 10000.0 ** -(np.arange(channels // 4) / (channels // 4))
    first, second = (axis[:, None] * omega for axis in (token // rows, token % rows))
    return np.concatenate([np.sin(first), np.cos(first), np.sin(second), np.cos(second)], axis=1)


class EncoderLayer(nn.Module):
    """Post-norm transformer layer; the position embedding is added to queries and keys."""

    num_heads: int
    ffn_dim: int
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], position: Float[Array, "T C"]) -> Float[Array, "B T C"]:
        q = x + position[None]
        attention = MultiHeadAttention(self.num_heads, self.folded, dtype=self.dtype, name="self_attn")
        x = LayerNorm(dtype=self.dtype, name="norm1")(x + attention(q, q, x))
        y = Dense(self.ffn_dim, linear_default, dtype=self.dtype, name="linear1")(x)
        y = gelu(y)
        y = Dense(x.shape[-1], linear_default, dtype=self.dtype, name="linear2")(y)
        return LayerNorm(dtype=self.dtype, name="norm2")(x + y)


class AttentionEncoder(nn.Module):
    """Transformer layers over the tokens of one map [B, H, W, C]."""

    num_layers: int
    num_heads: int
    ffn_dim: int
    rectangular: str
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        tokens = x.reshape(batch, height * width, channels)
        position = jnp.asarray(sine_position_embedding(height, width, channels, self.rectangular), tokens.dtype)
        for i in range(self.num_layers):
            layer = EncoderLayer(self.num_heads, self.ffn_dim, self.folded, dtype=self.dtype, name=f"layers_{i}")
            tokens = layer(tokens, position)
        return tokens.reshape(x.shape)


class RepVGGBlock(nn.Module):
    """silu(3x3 + 1x1), each with its own batch norm; with `folded` one 3x3 with a bias, under `conv`."""

    features: int
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.folded:
            return nn.silu(Conv(self.features, 3, use_bias=True, dtype=self.dtype, name="conv")(x))
        wide = ConvNorm(self.features, 3, dtype=self.dtype, name="conv1")(x, train=train)
        point = ConvNorm(self.features, 1, dtype=self.dtype, name="conv2")(x, train=train)
        return nn.silu(wide + point)


class CSPRepLayer(nn.Module):
    """Two 1x1 branches, one of them through RepVGG blocks, summed."""

    features: int
    expansion: float
    num_blocks: int
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        hidden = int(self.features * self.expansion)
        main = _base_conv(self, hidden, 1, "conv1")(x, train=train)
        side = _base_conv(self, hidden, 1, "conv2")(x, train=train)
        for i in range(self.num_blocks):
            main = RepVGGBlock(hidden, self.folded, dtype=self.dtype, name=f"bottlenecks_{i}")(main, train=train)
        x = main + side
        if hidden != self.features:
            x = _base_conv(self, self.features, 1, "conv3")(x, train=train)
        return x


class MaskFeatureFPN(nn.Module):
    """Three maps at strides 8, 16, 32 -> one map at stride 8."""

    mid_channels: int
    out_channels: int
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, maps: list[Array], *, train: bool) -> Array:
        heads = []
        for level, x in enumerate(maps):
            for i in range(max(1, level)):
                conv = _base_conv(self, self.mid_channels, 3, f"scale_heads_{level}_{2 * i}_0")
                x = conv(x, train=train)
                if level > 0:
                    x = upsample_bilinear_2x(x)
            heads.append(x)
        return _base_conv(self, self.out_channels, 3, "output_conv")(functools.reduce(jnp.add, heads), train=train)


class MaskHybridEncoder(nn.Module):
    """Backbone maps at strides 4, 8, 16, 32 -> (maps at 8, 16, 32 of `features` channels, mask features).

    Mask features: [B, H/4, W/4, num_prototypes].
    """

    features: int
    attention_level: int
    num_attention_layers: int
    attention_ffn_dim: int
    num_heads: int
    csp_expansion: float
    num_csp_blocks: int
    mask_channels: tuple[int, int]
    num_prototypes: int
    rectangular: str
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, backbone_maps: tuple[Array, ...], *, train: bool) -> tuple[list[Array], Array]:
        stride4, *maps = backbone_maps
        inner = []
        for i, x in enumerate(maps):
            x = Conv(self.features, 1, use_bias=self.folded, dtype=self.dtype, name=f"input_proj_{i}_0")(x)
            if not self.folded:
                x = BatchNorm(dtype=self.dtype, name=f"input_proj_{i}_1")(x, train=train)
            inner.append(x)
        level = self.attention_level
        encoder = AttentionEncoder(
            self.num_attention_layers,
            self.num_heads,
            self.attention_ffn_dim,
            self.rectangular,
            self.folded,
            dtype=self.dtype,
            name="encoder_0",
        )
        inner[level] = encoder(inner[level])
        outs = self._pan(self._fpn(inner, train), train)
        return outs, self._mask_features(stride4, outs, train)

    @nn.nowrap
    def _csp(self, name: str) -> CSPRepLayer:
        return CSPRepLayer(
            self.features, self.csp_expansion, self.num_csp_blocks, self.folded, dtype=self.dtype, name=name
        )

    @nn.nowrap
    def _fpn(self, maps: list[Array], train: bool) -> list[Array]:
        """Top down. The lateral convolution's output replaces the upper level for the way back up."""
        maps = list(maps)
        for position, i in enumerate((2, 1)):
            maps[i] = _base_conv(self, self.features, 1, f"lateral_convs_{position}")(maps[i], train=train)
            joined = jnp.concatenate([upsample_nearest_2x(maps[i]), maps[i - 1]], axis=-1)
            maps[i - 1] = self._csp(f"fpn_blocks_{position}")(joined, train=train)
        return maps

    @nn.nowrap
    def _pan(self, maps: list[Array], train: bool) -> list[Array]:
        """Bottom up."""
        outs = [maps[0]]
        for i in range(2):
            down = _base_conv(self, self.features, 3, f"downsample_convs_{i}", stride=2)(outs[-1], train=train)
            joined = jnp.concatenate([down, maps[i + 1]], axis=-1)
            outs.append(self._csp(f"pan_blocks_{i}")(joined, train=train))
        return outs

    @nn.nowrap
    def _mask_features(self, stride4: Array, maps: list[Array], train: bool) -> Array:
        channels = self.mask_channels[1]
        fpn = MaskFeatureFPN(*self.mask_channels, self.folded, dtype=self.dtype, name="mask_feat_head")
        x = upsample_bilinear_2x(fpn(maps, train=train))
        x = x + _base_conv(self, channels, 3, "enc_mask_lateral")(stride4, train=train)
        x = _base_conv(self, channels, 3, "enc_mask_output_0")(x, train=train)
        return Conv(self.num_prototypes, 1, use_bias=True, dtype=self.dtype, name="enc_mask_output_1")(x)
