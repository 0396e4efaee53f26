"""Bilinear reading of maps at points, with zeros outside (`grid_sample` with align_corners=False).

Deformable attention has its own, multi-level form in `deformable_attention`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32

from instseg_jax.models.linear import with_rank

CORNERS = np.array([(0, 0), (1, 0), (0, 1), (1, 1)])  # (x, y) steps to the four pixels around a point


def bilinear_corners(
    points: Float[Array, "*n 2"], height: int, width: int
) -> tuple[Int32[Array, "*n 4"], Float[Array, "*n 4"]]:
    """The four pixels around each point and their shares.

    points [..., 2] are (x, y), 0..1 across the map, pixel centres at (column + 0.5) / width.
    Returns: flat index row * width + column [..., 4] int32, always inside the map; share [..., 4], 0 for a
    pixel outside it.
    """
    pixel = points * with_rank(jnp.array([width, height], points.dtype), points.ndim) - 0.5
    low = jnp.floor(pixel)
    fraction = (pixel - low)[..., None, :]
    corner = low[..., None, :] + with_rank(jnp.asarray(CORNERS, points.dtype), points.ndim + 1)
    share = jnp.where(CORNERS == 1, fraction, 1 - fraction).prod(axis=-1)
    limit = with_rank(jnp.array([width - 1, height - 1], points.dtype), corner.ndim)
    inside = ((corner >= 0) & (corner <= limit)).all(axis=-1)
    corner = jnp.clip(corner, 0, limit).astype(jnp.int32)  # before the cast: tames points far outside
    return corner[..., 1] * width + corner[..., 0], jnp.where(inside, share, 0)


@jax.custom_vjp
def sample_map(feature_map: Float[Array, "B h w C"], points: Float[Array, "B *n 2"]) -> Float[Array, "B *n C"]:
    """Read a map at points: [B, h, w, C], [B, ..., 2] (x, y) in 0..1 -> [B, ..., C]. No gradient to the points.

    The corners are added one by one: XLA fuses this into one loop that keeps no [..., 4, C] tensor.
    """
    index, share = _flat_corners(feature_map, points)
    rows = feature_map.reshape(-1, feature_map.shape[-1])
    parts = (jnp.take(rows, index[..., k], axis=0, mode="clip") * share[..., k, None] for k in range(len(CORNERS)))
    return functools.reduce(jnp.add, parts)


def _flat_corners(feature_map: Array, points: Array) -> tuple[Array, Array]:
    """`bilinear_corners` with an index into the flat rows of all images."""
    batch, height, width, _ = feature_map.shape
    index, share = bilinear_corners(points, height, width)
    first = jnp.arange(batch, dtype=jnp.int32) * (height * width)
    return index + first.reshape(-1, *[1] * (index.ndim - 1)), share.astype(feature_map.dtype)


def _sample_map_forward(feature_map: Array, points: Array) -> tuple[Array, tuple[Array, Array]]:
    return sample_map(feature_map, points), (feature_map, points)


def _sample_map_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    """One buffer takes the additions of all corners; that of automatic differentiation makes four."""
    feature_map, points = residuals
    index, share = _flat_corners(feature_map, points)
    rows = jnp.zeros_like(feature_map).reshape(-1, feature_map.shape[-1])
    for k in range(len(CORNERS)):
        rows = rows.at[index[..., k]].add(gradient * share[..., k, None], mode="promise_in_bounds")
    return rows.reshape(feature_map.shape), None


sample_map.defvjp(_sample_map_forward, _sample_map_backward)


@jax.jit
def upsample_nearest_2x(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
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
def upsample_bilinear_2x(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """[B, H, W, C] -> [B, 2H, 2W, C], bilinear with half-pixel centres, by slices: the weights are 1/4, 3/4."""
    return _double_axis(_double_axis(x, 1), 2)
