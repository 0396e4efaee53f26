"""Mask losses at sampled points, over all prediction sets of a step, for a cost that a laptop bears.

Differences from the reference:
- All masks of an image and a prediction set share their candidate points (the reference draws new ones for every
  mask). Each mask still keeps its own most uncertain ones, so every expected loss and gradient is the same; one
  matrix product then reads all masks. Points of their own are accepted too: give them a row a mask.
- Rows are worked through in blocks, and blocks without a real row are skipped, so that 7 objects in 100 slots
  do not cost what 100 do.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from instseg_jax.models.sampling import sample_map
from instseg_jax.training.losses import mask_losses, mask_quality, uncertain_point_weights
from instseg_jax.training.mask_planes import count_blocks, gather_words, read_bits, read_points

ROW_BLOCK = 20  # masks of each image that are worked on at once


@functools.partial(jax.custom_vjp, nondiff_argnums=(10, 11, 12))
def point_losses(
    mask_queries: Array,
    mask_features: Array,
    mask_planes: Array,
    num_slots: Array,
    object_index: Array,
    row_valid: Array,
    num_rows: Array,
    scale: Array,
    candidates: Array,
    extra: Array,
    num_important: int,
    bce_weight: float,
    dice_weight: float,
) -> tuple[Array, Array, Array]:
    """Weighted mask losses of S prediction sets at their most uncertain points.

    Args:
      mask_queries: [S, B, R, P], one row for each pair of a query and an object.
      mask_features: [B, h, w, P]; mask logits are their product with the queries.
      mask_planes: target masks, packed by `mask_planes.pack_masks`.
      num_slots: [] target slots in use.
      object_index: [R] target slot of each row.
      row_valid: [S, B, R]; other rows do not count.
      num_rows: [] rows from here on are not valid in any image.
      scale: [] factor on everything, 1 / number of objects.
      candidates: [S, B, 1 or R, M, 2] points in 0..1, of which each mask keeps num_important.
      extra: [S, B, 1 or R, E, 2] points that are kept all.

    Returns: total [], bce [S], dice [S]. Only the total has a gradient, to mask_queries and mask_features;
      it is computed along with the value, so that nothing of a set outlives its turn.
    """
    return _forward(
        mask_queries, mask_features, mask_planes, num_slots, object_index, row_valid, num_rows, scale,
        candidates, extra, num_important, bce_weight, dice_weight, differentiate=False,
    )[0]  # fmt: skip


def _point_losses_forward(*args):
    values, gradients = _forward(*args, differentiate=True)
    return values, gradients


def _point_losses_backward(num_important, bce_weight, dice_weight, gradients, cotangents):
    d_total = cotangents[0]
    d_queries, d_features = jax.tree.map(lambda g: g * d_total, gradients)
    return d_queries, d_features, *[None] * 8


point_losses.defvjp(_point_losses_forward, _point_losses_backward)


def _forward(
    mask_queries, mask_features, mask_planes, num_slots, object_index, row_valid, num_rows, scale, candidates, extra,
    num_important, bce_weight, dice_weight, *, differentiate,
):  # fmt: skip
    rows = mask_queries.shape[2]
    block = min(ROW_BLOCK, rows)
    blocks = count_blocks(num_rows, block)
    sum_losses = functools.partial(
        _block_losses,
        num_candidates=candidates.shape[-2],
        num_important=num_important,
        weights=(bce_weight, dice_weight),
    )

    def one_set(d_features: Array, xs: tuple) -> tuple:
        queries, valid, points = xs[0], xs[1], jnp.concatenate(xs[2:], axis=2).astype(mask_queries.dtype)
        is_shared = points.shape[1] == 1
        at_points = points[:, 0] if is_shared else points
        features, features_vjp = jax.vjp(lambda m: sample_map(m, at_points), mask_features)
        words, share = gather_words(mask_planes, points, num_slots)

        def one_block(i: Array, state: tuple) -> tuple:
            sums, d_queries, d_sampled = state
            start, real = _window(i, block, rows, valid)
            take = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
            at, near, part = features, (words, share), take(queries, axis=1)
            if not is_shared:
                at, near = take(features, axis=1), (take(words, axis=2), take(share, axis=1))
            targets = read_points(*near, take(object_index, axis=0))
            if not differentiate:
                return sums + sum_losses(part, at, targets, real)[1], d_queries, d_sampled
            (d_part, d_at), terms = jax.grad(sum_losses, argnums=(0, 1), has_aux=True)(part, at, targets, real)
            # The last window is moved back to stay inside: its first rows were done, and add nothing.
            d_queries = lax.dynamic_update_slice_in_dim(d_queries, take(d_queries, axis=1) + d_part, start, axis=1)
            if not is_shared:
                d_at = lax.dynamic_update_slice_in_dim(d_sampled, take(d_sampled, axis=1) + d_at, start, axis=1)
                return sums + terms, d_queries, d_at
            return sums + terms, d_queries, d_sampled + d_at

        grown = (jnp.zeros_like(queries), jnp.zeros_like(features)) if differentiate else (0, 0)
        sums, d_queries, d_sampled = lax.fori_loop(0, blocks, one_block, (jnp.zeros(2, queries.dtype), *grown))
        if differentiate:
            d_features += features_vjp(d_sampled)[0]
        return d_features, (sums * scale, d_queries)

    start = jnp.zeros_like(mask_features) if differentiate else 0
    d_features, (terms, d_queries) = lax.scan(one_set, start, (mask_queries, row_valid, candidates, extra))
    bce, dice = bce_weight * terms[:, 0], dice_weight * terms[:, 1]
    gradients = (d_queries * scale, d_features * scale) if differentiate else None
    return (jnp.sum(bce) + jnp.sum(dice), bce, dice), gradients


def _window(i: Array, block: int, rows: int, valid: Array) -> tuple[Array, Array]:
    """Start of block i, moved back where it would reach beyond the rows, and which of its rows count [B, block]."""
    start = jnp.minimum(i * block, rows - block)
    real = lax.dynamic_slice_in_dim(valid, start, block, axis=1)
    return start, real & (start + jnp.arange(block) >= i * block)


def _block_losses(
    mask_queries: Array,
    features: Array,
    targets: Array,
    valid: Array,
    *,
    num_candidates: int,
    num_important: int,
    weights: tuple[float, float],
) -> tuple[Array, Array]:
    """Weighted sum of the losses of a block of rows, and the two sums [2] it is made of.

    mask_queries [B, R, P], features [B, points, P] or [B, R, points, P], targets [B, R, points], valid [B, R].
    """
    product = "brc,bmc->brm" if features.ndim == 3 else "brc,brmc->brm"
    logits = jnp.einsum(product, mask_queries, features, precision=lax.Precision.HIGHEST)
    point_weights = uncertain_point_weights(logits, num_candidates, num_important)
    bce, dice = mask_losses(logits, targets, point_weights)
    sums = jnp.stack([jnp.sum(jnp.where(valid, x, 0)) for x in (bce, dice)])
    return jnp.dot(sums, jnp.array(weights, sums.dtype)), sums


def mask_iou_targets(
    mask_queries: Array, mask_features: Array, planes: Array, object_index: Array, num_rows: Array
) -> Array:
    """IoU of one prediction set's masks with their objects at twice the features' resolution, [B, R].

    mask_queries [B, R, P]; planes [B, V, 2h, 2w] from `mask_planes.resize_planes`; object_index [R]. Rows from
    num_rows on are 0. No gradient flows through.
    """
    mask_queries, mask_features = lax.stop_gradient((mask_queries, mask_features))
    rows = mask_queries.shape[1]
    block = min(ROW_BLOCK, rows)

    def fill(i: Array, iou: Array) -> Array:
        start = jnp.minimum(i * block, rows - block)
        queries = lax.dynamic_slice_in_dim(mask_queries, start, block, axis=1)
        logits = jnp.einsum("brc,bhwc->brhw", queries, mask_features, precision=lax.Precision.HIGHEST)
        slots = lax.dynamic_slice_in_dim(object_index, start, block)
        phases = tuple(
            tuple(read_bits(planes[:, :, row::2, column::2], slots) for column in (0, 1)) for row in (0, 1)
        )
        return lax.dynamic_update_slice_in_dim(iou, mask_quality(logits, phases), start, axis=1)

    start = jnp.zeros(mask_queries.shape[:2], mask_queries.dtype)
    return lax.fori_loop(0, count_blocks(num_rows, block), fill, start)
