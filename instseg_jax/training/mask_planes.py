"""Ground-truth masks as bit planes: 16 objects in each uint16 word.

Reading a point costs one gather for 16 objects instead of one each, and a batch with few objects touches one
plane of the padded tensor. Nothing is lost: masks are 0 or 1.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from instseg_jax.models.sampling import bilinear_corners

BITS = 16  # a power of two: slots are taken apart by shifts, which stay cheap inside fused loops
SHIFT = 4


def pack_masks(masks: Array, num_slots: Array) -> Array:
    """Pack the first num_slots (a traced number) masks of each image: [B, N, H, W] -> [B, ceil(N / 16), H, W].

    Bit i of plane v is slot 16 v + i. Planes that hold no used slot are not computed: all their bits are 0.
    """
    batch, slots, height, width = masks.shape
    window = min(BITS, slots)

    def pack(word: Array, planes: Array) -> Array:
        start = jnp.minimum(word * BITS, slots - window)  # the last window is moved back to stay inside
        part = lax.dynamic_slice_in_dim(masks, start, window, axis=1)
        plane = sum((part[:, i] > 0).astype(jnp.uint16) << i for i in range(window))
        plane >>= (word * BITS - start).astype(jnp.uint16)
        return lax.dynamic_update_index_in_dim(planes, plane, word, axis=1)

    planes = jnp.zeros((batch, -(-slots // BITS), height, width), jnp.uint16)
    return lax.fori_loop(0, count_blocks(num_slots, BITS), pack, planes)


def count_blocks(count: Array, size: int) -> Array:
    """How many blocks of `size` hold `count` things."""
    return (jnp.asarray(count, jnp.int32) + size - 1) // size


def read_bits(planes: Array, slots: Array) -> Array:
    """Whole masks of some slots: planes [B, V, H, W], slots [R] -> [B, R, H, W] of 0 and 1."""
    shift = (slots & (BITS - 1)).astype(planes.dtype)[None, :, None, None]
    return (jnp.take(planes, slots >> SHIFT, axis=1, mode="clip") >> shift) & 1


def gather_words(planes: Array, points: Array, num_slots: Array) -> tuple[Array, Array]:
    """Read all planes around points, for `read_points`.

    planes [B, V, H, W], points [B, R, P, 2] -> words [B, V, R, 4, P], shares of the four pixels [B, R, 4, P].
    """
    batch, num_planes, height, width = planes.shape
    index, share = bilinear_corners(points, height, width)
    index, share = jnp.moveaxis(index, -1, -2), jnp.moveaxis(share, -1, -2)
    first = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None] * num_planes

    def gather(plane: Array, words: Array) -> Array:
        at = (first + plane) * (height * width) + index
        return lax.dynamic_update_index_in_dim(words, jnp.take(planes.reshape(-1), at, mode="clip"), plane, axis=1)

    words = jnp.zeros((batch, num_planes, *index.shape[1:]), planes.dtype)
    return lax.fori_loop(0, count_blocks(num_slots, BITS), gather, words), share


def read_points(words: Array, share: Array, slots: Array) -> Array:
    """Bilinear values of the masks of `slots` [R] at gathered points -> [B, R, P], 0..1.

    words and shares come from `gather_words`; with 1 row of points all slots are read at the same points,
    with R rows each slot at its own.
    """
    bit = (jnp.uint16(1) << (slots & (BITS - 1)).astype(jnp.uint16))[None, :, None]
    plane = slots >> SHIFT
    if words.shape[2] == 1:  # choosing among planes is vectorised where fetching a plane by its index is not
        chosen = jnp.zeros((), words.dtype)
        for v in range(words.shape[1]):
            chosen = jnp.where((plane == v)[:, None, None], words[:, v], chosen)
    else:
        chosen = words[:, plane, jnp.arange(len(slots))]
    values = (jnp.where((chosen[:, :, k] & bit) != 0, share[:, :, k], 0) for k in range(share.shape[2]))
    return functools.reduce(jnp.add, values)


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
            value = sum(((c >> bit) & 1).astype(jnp.float32) * s[None] for c, s in zip(corners, shares, strict=True))
            return total | ((value > 0.5).astype(planes.dtype) << bit)

        used = jnp.clip(num_slots - word * BITS, 0, BITS).astype(planes.dtype)
        result = lax.fori_loop(planes.dtype.type(0), used, add_bit, jnp.zeros((batch, height, width), planes.dtype))
        return lax.dynamic_update_index_in_dim(out, result, word, axis=1)

    out = jnp.zeros((batch, num_words, height, width), planes.dtype)
    return lax.fori_loop(0, count_blocks(num_slots, BITS), resize, out)


def _taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two source cells of each new cell, and the share of the second."""
    centre = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, None)
    low = np.floor(centre).astype(np.int32)
    return low, np.minimum(low + 1, size - 1), (centre - low).astype(np.float32)
