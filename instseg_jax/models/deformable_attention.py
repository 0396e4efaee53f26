"""Multi-scale deformable attention with a box reference (Zhu et al. 2021, as in RT-DETR)."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, Integer

from instseg_jax.models.attention import softmax
from instseg_jax.models.initial_values import Initializer
from instseg_jax.models.linear import Dense, zero_bias, zero_kernel
from instseg_jax.types import DATA_AXIS


def sample_levels(
    value: Float[Array, "B tokens heads C"],
    spatial_shapes: tuple[tuple[int, int], ...],
    sampling_locations: Float[Array, "B Q heads levels points 2"],
    weights: Float[Array, "B Q heads levels points"],
    *,
    fused: bool = False,
) -> Float[Array, "B Q heads C"]:
    """Weighted sum of bilinear samples from several maps, zero outside them.

    Args:
      value: [B, sum h_l * w_l, heads, C] tokens of all levels, rows first.
      spatial_shapes: (height, width) of each level.
      sampling_locations: [B, Q, heads, levels, points, 2] (x, y), 0..1 across each map.
      weights: [B, Q, heads, levels, points].
      fused: add row by row, which is quickest where no gradient is asked for.

    Returns: [B, Q, heads, C].

    Otherwise all corners are fetched by one gather of flat rows and summed by one einsum: on a CPU the quickest form
    for forward and backward together.
    """
    batch, num_tokens, heads, channels = value.shape
    token, share = (_corners_by_axis if fused else _corners)(spatial_shapes, sampling_locations)
    head = jnp.arange(heads).reshape(1, 1, -1, *[1] * (token.ndim - 3))
    image = jnp.arange(batch).reshape(-1, *[1] * (token.ndim - 1))
    index = ((image * num_tokens + token) * heads + head).reshape(*sampling_locations.shape[:3], -1)
    share = (share * weights.reshape(*weights.shape, *[1] * (share.ndim - weights.ndim))).reshape(index.shape)
    rows = value.reshape(-1, channels)
    if fused:
        return weighted_rows(rows, *jax.lax.optimization_barrier((index, share)))  # else each channel computes them
    samples = jnp.take(rows, index, axis=0, mode="clip")
    return jnp.einsum("bqhp,bqhpc->bqhc", share.astype(value.dtype), samples)


def _corners(spatial_shapes: tuple[tuple[int, int], ...], locations: Array) -> tuple[Array, Array]:
    """The four pixels around locations [..., levels, points, 2]: (token, share) [..., levels, points, 4].

    Tokens count through the maps, rows first, and always lie on them; a pixel beside its map has share 0.
    """
    size = np.array([(w, h) for h, w in spatial_shapes])  # (x, y) order
    start = np.concatenate([[0], np.cumsum(size.prod(axis=1))[:-1]])
    start = start.reshape(*[1] * (locations.ndim - 3), -1, 1, 1)
    size = size.reshape(*[1] * (locations.ndim - 3), -1, 1, 1, 2)  # [..., levels, 1 point, 1 corner, 2]
    pixel = locations * size[..., 0, :].astype(locations.dtype) - 0.5
    low = jnp.floor(pixel)
    fraction = pixel - low
    step = np.array([(0, 0), (1, 0), (0, 1), (1, 1)]).reshape(*[1] * (low.ndim - 1), 4, 2)
    corner = low[..., None, :] + step.astype(low.dtype)
    share = jnp.where(step == 1, fraction[..., None, :], 1 - fraction[..., None, :]).prod(axis=-1)
    inside = ((corner >= 0) & (corner < size)).all(axis=-1)
    corner = jnp.clip(corner, 0, size - 1).astype(jnp.int32)  # also tames infinities before the cast
    token = corner[..., 1] * size[..., 0] + corner[..., 0] + start
    return token, jnp.where(inside, share, 0)


def _corners_by_axis(spatial_shapes: tuple[tuple[int, int], ...], locations: Array) -> tuple[Array, Array]:
    """The same as [..., levels, points, 2 rows, 2 columns], each axis by itself: less work.

    Not for training: steps compiled for eight CPU devices crashed with it (JAX 0.10.2).
    """
    ones = [1] * (locations.ndim - 3)
    heights, widths = (  # [..., levels, 1 point]
        np.array(sides).reshape(*ones, -1, 1) for sides in zip(*spatial_shapes, strict=True)
    )
    start = np.concatenate([[0], np.cumsum(heights * widths)[:-1]]).reshape(*ones, -1, 1, 1, 1)
    column, across = _two_pixels(locations[..., 0], widths)
    row, down = _two_pixels(locations[..., 1], heights)
    token = row[..., :, None] * widths[..., None, None] + column[..., None, :] + start
    return token, down[..., :, None] * across[..., None, :]


@jax.jit
def weighted_rows(
    rows: Float[Array, "N C"], index: Integer[Array, "*n P"], share: Float[Array, "*n P"]
) -> Float[Array, "*n C"]:
    """Sum of rows [N, C] with shares: index, share [..., P] -> [..., C].

    XLA makes one loop of it that holds no [..., P, C] array: for 300 queries 0.6 ms of CPU time, where a gather and a
    product take 4 to 8. The name is known to `runtimes/onnx_operators.py`.
    """
    parts = [
        share[..., p, None] * jnp.take(rows, index[..., p], axis=0, mode="clip").astype(share.dtype)
        for p in range(index.shape[-1])
    ]
    return functools.reduce(jnp.add, parts).astype(rows.dtype)


def _two_pixels(locations: Array, length: np.ndarray) -> tuple[Array, Array]:
    """Along one axis, the pixels before and after locations [..., levels, points], 0..1 across maps of `length`.

    Returns: index [..., 2] int32, always on the map; share [..., 2], 0 for a pixel beside it.
    """
    position = locations * length.astype(locations.dtype) - 0.5
    low = jnp.floor(position)
    fraction = position - low
    pixel, length = jnp.stack([low, low + 1], axis=-1), length[..., None]
    share = jnp.where((pixel >= 0) & (pixel < length), jnp.stack([1 - fraction, fraction], axis=-1), 0)
    return jnp.clip(pixel, 0, length - 1).astype(jnp.int32), share  # clipping also tames infinities before the cast


def _on_each_device(function: Callable) -> Callable:
    """Under `jax.set_mesh`, let every device sample its own images.

    To the compiler the flat rows of all images are one table, which it would gather on every device.
    """
    if jax.sharding.get_abstract_mesh().shape.get(DATA_AXIS, 1) == 1:
        return function
    split = PartitionSpec(DATA_AXIS)
    return jax.shard_map(function, in_specs=split, out_specs=split, check_vma=False)


def _directions(num_heads: int, num_levels: int, num_points: int) -> np.ndarray:
    """Initial offsets: head k looks in direction 2 pi k / heads, point i goes i + 1 steps."""
    angle = np.arange(num_heads) * (2 * math.pi / num_heads)
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    steps = np.arange(1, num_points + 1)
    offsets = direction[:, None, None, :] * steps[None, None, :, None]
    return np.broadcast_to(offsets, (num_heads, num_levels, num_points, 2))


class DeformableAttention(nn.Module):
    """Each query looks at a few learnt points around its reference box on every level.

    query [B, Q, C], reference_boxes [B, Q, 4] normalised cxcywh, memory [B, tokens, C] -> [B, Q, C].
    Locations and weights are computed in at least float32.
    """

    num_heads: int
    num_points: int
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "B Q C"],
        reference_boxes: Float[Array, "B Q 4"],
        memory: Float[Array, "B tokens C"],
        spatial_shapes: tuple[tuple[int, int], ...],
    ) -> Float[Array, "B Q C"]:
        channels, levels = query.shape[-1], len(spatial_shapes)
        heads, points = self.num_heads, self.num_points

        def directions(fan_in: int) -> Initializer:
            del fan_in
            return Initializer("constant", values=lambda: _directions(heads, levels, points))

        def dense(name: str, features: int, x: Array, **inits) -> Array:
            return Dense(features, dtype=self.dtype, name=name, **({"bias_init": zero_bias} | inits))(x)

        value = dense("value_proj", channels, memory)
        offsets = dense(
            "sampling_offsets", heads * levels * points * 2, query, kernel_init=zero_kernel, bias_init=directions
        )
        scores = dense("attention_weights", heads * levels * points, query, kernel_init=zero_kernel)

        batch, queries = query.shape[:2]
        wide = jnp.promote_types(query.dtype, jnp.float32)
        offsets = offsets.astype(wide).reshape(batch, queries, heads, levels, points, 2)
        weights = softmax(scores.astype(wide).reshape(batch, queries, heads, levels * points))
        reference = reference_boxes.astype(wide)[:, :, None, None, None, :]
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
        weights = weights.reshape(batch, queries, heads, levels, points)
        self.sow("intermediates", "sampling_locations", locations)
        self.sow("intermediates", "sampling_weights", weights)
        sampled = _on_each_device(lambda v, at, w: sample_levels(v, spatial_shapes, at, w, fused=self.folded))(
            value.reshape(*value.shape[:2], heads, channels // heads),
            locations,
            weights,
        )
        return dense("output_proj", channels, sampled.reshape(query.shape))
