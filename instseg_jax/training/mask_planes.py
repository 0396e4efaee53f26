"""Ground-truth masks as bit planes: 32 objects in each uint32 word.

Reading a point costs one gather for 32 objects instead of one each, and a batch with few objects touches one
plane of the padded tensor. Nothing is lost: masks are 0 or 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from instseg_jax.models.sampling import bilinear_corners

BITS = 32


def pack_masks(masks: Array, num_slots: Array) -> Array:
    """Pack the first num_slots (a traced number) masks of each image: [B, N, H, W] -> [B, ceil(N / 32), H, W].

    Bit i of word v is slot 32 v + i; bits of later slots are 0. Planes that hold no used slot are not computed.
    """
    batch, slots, height, width = masks.shape
    window = min(BITS, slots)
    words = -(-slots // BITS)
    bit = jnp.arange(window, dtype=jnp.uint32)[None, :, None, None]

    def pack(word: Array, planes: Array) -> Array:
        start = jnp.minimum(word * BITS, slots - window)  # the last window is moved back to stay inside
        part = lax.dynamic_slice_in_dim(masks, start, window, axis=1) > 0
        part &= ((start + jnp.arange(window)) < num_slots)[None, :, None, None]
        plane = jnp.sum(part.astype(jnp.uint32) << bit, axis=1, dtype=jnp.uint32)
        plane >>= (word * BITS - start).astype(jnp.uint32)
        return lax.dynamic_update_index_in_dim(planes, plane, word, axis=1)

    planes = jnp.zeros((batch, words, height, width), jnp.uint32)
    return lax.fori_loop(0, count_blocks(num_slots, BITS), pack, planes)


def count_blocks(count: Array, size: int) -> Array:
    """How many blocks of `size` hold `count` things."""
    return (jnp.asarray(count, jnp.int32) + size - 1) // size


def read_bits(words: Array, slots: Array, axis: int) -> Array:
    """Bit of each slot: words [.., V at axis, ..] uint32, slots [R] -> [.., R, ..] 0 or 1."""
    shift = (slots % BITS).astype(jnp.uint32).reshape(-1, *[1] * (words.ndim - axis - 1))
    if words.shape[axis] > 1:
        words = jnp.take(words, slots // BITS, axis=axis, mode="clip")
    return (words >> shift) & 1


def gather_words(planes: Array, points: Array) -> tuple[Array, Array]:
    """Words around points: planes [B, V, H, W], points [B, R, P, 2] -> words [B, R, V, 4, P], shares [B, R, 4, P]."""
    batch, num_words, height, width = planes.shape
    index, share = bilinear_corners(points, height, width)
    index, share = jnp.swapaxes(index, -1, -2), jnp.swapaxes(share, -1, -2)
    flat = planes.reshape(batch, num_words, height * width)
    words = jax.vmap(lambda plane, at: jnp.take(plane, at, axis=1, mode="clip"))(flat, index)  # [B, V, R, 4, P]
    return jnp.swapaxes(words, 1, 2), share


def read_points(words: Array, share: Array, slots: Array) -> Array:
    """Bilinear values of the masks of `slots` [R] at gathered points -> [B, R, P], 0..1.

    words and shares come from `gather_words`; with 1 row of points all slots are read at the same points,
    with R rows each slot at its own.
    """
    if words.shape[1] == 1:
        bits = read_bits(words[:, 0], slots, axis=1)
    else:
        own = jnp.take_along_axis(words, (slots // BITS)[None, :, None, None, None], axis=2)[:, :, 0]
        bits = (own >> (slots % BITS).astype(jnp.uint32)[:, None, None]) & 1
    return jnp.sum(bits.astype(share.dtype) * share, axis=2)


def resize_planes(planes: Array, height: int, width: int, num_slots: Array) -> Array:
    """Resize masks bilinearly (half-pixel, no antialias), keep what is above one half, as planes again."""
    batch, num_words, in_height, in_width = planes.shape
    if (height, width) == (in_height, in_width):
        return planes
    top, bottom, down = _taps(in_height, height)
    left, right, across = _taps(in_width, width)
    down, across = down[:, None], across[None, :]
    shares = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across]

    def resize(word: Array, out: Array) -> Array:
        plane = lax.dynamic_index_in_dim(planes, word, axis=1, keepdims=False)
        upper, lower = plane[:, top], plane[:, bottom]
        corners = [upper[:, :, left], upper[:, :, right], lower[:, :, left], lower[:, :, right]]

        def add_bit(bit: Array, total: Array) -> Array:
            value = sum(((c >> bit) & 1).astype(jnp.float32) * s for c, s in zip(corners, shares, strict=True))
            return total | ((value > 0.5).astype(jnp.uint32) << bit)

        used = jnp.clip(num_slots - word * BITS, 0, BITS).astype(jnp.uint32)
        result = lax.fori_loop(jnp.uint32(0), used, add_bit, jnp.zeros((batch, height, width), jnp.uint32))
        return lax.dynamic_update_index_in_dim(out, result, word, axis=1)

    out = jnp.zeros((batch, num_words, height, width), jnp.uint32)
    return lax.fori_loop(0, count_blocks(num_slots, BITS), resize, out)


def _taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two source cells of each new cell, and the share of the second."""
    centre = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, None)
    low = np.floor(centre).astype(np.int32)
    return low, np.minimum(low + 1, size - 1), (centre - low).astype(np.float32)
