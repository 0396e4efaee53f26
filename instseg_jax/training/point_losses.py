"""Mask losses at sampled points, over all prediction sets of a step, at a cost that a laptop bears.

Differences from the reference:
- All masks of an image and a prediction set share their candidate points (the reference draws new ones for every
  mask). Each mask still keeps its own most uncertain ones, so every expected loss and gradient is the same; one
  matrix product then reads all masks. Points of their own are accepted too, a row a mask, for comparisons: they take
  as many times the memory as there are rows.
- Rows are worked through in blocks, and blocks without a real row are skipped, so that 7 objects in 100 slots
  do not cost what 100 do.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from instseg_jax.models.sampling import sample_map
from instseg_jax.training.losses import mask_losses, mask_quality, uncertain_point_weights
from instseg_jax.training.mask_planes import count_blocks, gather_words, read_bits, read_points

# Rows of each image that are worked on at once: few enough for a CPU's cache, or enough to fill a GPU.
ROW_BLOCK_CPU = 10
ROW_BLOCK = 50


def _block_size(rows: int) -> int:
    return min(ROW_BLOCK_CPU if jax.default_backend() == "cpu" else ROW_BLOCK, rows)


class PairedSets(NamedTuple):
    """Prediction sets whose rows are pairs of a query and an object."""

    object_index: Array  # [S, R] target slot of each row
    row_valid: Array  # [S, B, R]; other rows do not count
    num_rows: Array  # [S] rows from here on are not valid in any image
    scale: Array  # [S] factor on everything, such as 1 / number of objects
    candidates: Array  # [S, B, 1 or R, M, 2] points in 0..1, of which each mask keeps the most uncertain ones
    extra: Array  # [S, B, 1 or R, E, 2] points that are kept all


class PointTerms(NamedTuple):
    """How points are chosen and their losses weighed."""

    num_important: int  # of the candidates that each mask keeps
    bce_weight: float
    dice_weight: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def point_losses(
    mask_queries: Array,
    mask_features: Array,
    mask_planes: Array,
    num_slots: Array,
    sets: PairedSets,
    terms: PointTerms,
) -> tuple[Array, Array, Array]:
    """Weighted mask losses of S prediction sets at their most uncertain points.

    Args:
      mask_queries: [S, B, R, P], one row for each pair of a query and an object.
      mask_features: [B, h, w, P]; mask logits are their product with the queries.
      mask_planes: target masks, packed by `mask_planes.pack_masks`.
      num_slots: [] target slots in use.
      sets: which object each row is paired with, and the points to look at.
      terms: how many points count, and the weights of the two losses.

    Returns: total [], bce [S], dice [S]. Only the total has a gradient, to mask_queries and mask_features;
      it is computed along with the value, so that nothing of a set outlives its turn.
    """
    return _score_sets(mask_queries, mask_features, mask_planes, num_slots, sets, terms, differentiate=False)[0]


def _point_losses_forward(mask_queries, mask_features, mask_planes, num_slots, sets, terms):
    return _score_sets(mask_queries, mask_features, mask_planes, num_slots, sets, terms, differentiate=True)


def _point_losses_backward(terms, gradients, cotangents):
    d_total = cotangents[0]
    return *jax.tree.map(lambda g: g * d_total, gradients), None, None, None


point_losses.defvjp(_point_losses_forward, _point_losses_backward)


def _score_sets(
    mask_queries: Array,
    mask_features: Array,
    mask_planes: Array,
    num_slots: Array,
    sets: PairedSets,
    terms: PointTerms,
    *,
    differentiate: bool,
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array] | None]:
    """What `point_losses` returns, and the gradients of the total to mask_queries and mask_features if asked for."""

    def score_next(d_features: Array | None, xs: tuple) -> tuple:
        queries, objects, valid, rows, factor, candidates, extra = xs
        score = functools.partial(
            _score_set,
            mask_planes=mask_planes,
            num_slots=num_slots,
            object_index=objects,
            row_weight=jnp.where(valid, factor, 0),
            num_rows=rows,
            points=jnp.concatenate([candidates, extra], axis=2).astype(queries.dtype),
            num_candidates=candidates.shape[2],
            num_important=terms.num_important,
            term_weights=jnp.array([terms.bce_weight, terms.dice_weight], queries.dtype),
            differentiate=differentiate,
        )
        sums, gradients = score(queries, mask_features)
        if gradients is None or d_features is None:
            return None, (sums, None)
        return d_features + gradients[1], (sums, gradients[0])

    start = jnp.zeros_like(mask_features) if differentiate else None
    sums: Array
    d_queries: Array | None
    d_features, (sums, d_queries) = lax.scan(score_next, start, (mask_queries, *sets))
    bce, dice = sums[:, 0], sums[:, 1]
    gradients = None if d_queries is None or d_features is None else (d_queries, d_features)
    return (jnp.sum(sums), bce, dice), gradients


def _score_set(
    mask_queries: Array,
    mask_features: Array,
    *,
    mask_planes: Array,
    num_slots: Array,
    object_index: Array,
    row_weight: Array,
    num_rows: Array,
    points: Array,
    num_candidates: int,
    num_important: int,
    term_weights: Array,
    differentiate: bool,
) -> tuple[Array, tuple[Array, Array] | None]:
    """Weighted sums [2] of one set, and the gradients of their sum to mask_queries [B, R, P] and mask_features.

    points [B, 1 or R, M + E, 2]: features are read there once and serve all rows, or each row's logits are read.
    """
    batch, rows, _ = mask_queries.shape
    block = _block_size(rows)
    is_shared = points.shape[1] == 1
    features, features_vjp = mask_features, None
    if is_shared:
        features, features_vjp = jax.vjp(lambda m: sample_map(m, points[:, 0]), mask_features)
    words, share = gather_words(mask_planes, points, num_slots)

    def score(queries: Array, features: Array, start: Array, weight: Array) -> tuple[Array, Array]:
        take = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        own = (lambda x, axis: x) if is_shared else (lambda x, axis: take(x, axis=axis))
        targets = read_points(own(words, 2), own(share, 1), take(object_index))
        product = "brc,bmc->brm" if is_shared else "brc,bhwc->brhw"
        logits = jnp.einsum(product, take(queries, axis=1), features, precision=lax.Precision.HIGHEST)
        if not is_shared:
            maps = logits.reshape(batch * block, *logits.shape[2:], 1)
            at = take(points, axis=1).reshape(batch * block, -1, 2)
            logits = sample_map(maps, at).reshape(batch, block, -1)
        point_weights = uncertain_point_weights(logits, num_candidates, num_important)
        losses = mask_losses(logits, targets, point_weights)
        sums = term_weights * jnp.stack([jnp.sum(jnp.where(weight > 0, weight * x, 0)) for x in losses])
        return jnp.sum(sums), sums

    def score_block(i: Array, state: tuple) -> tuple:
        start = jnp.minimum(i * block, rows - block)  # the last block is moved back to stay inside,
        weight = lax.dynamic_slice_in_dim(row_weight, start, block, axis=1)
        weight = jnp.where(start + jnp.arange(block) >= i * block, weight, 0)  # and does not count rows twice
        if not differentiate:
            return (state[0] + score(mask_queries, features, start, weight)[1],)
        gradients, sums = jax.grad(score, argnums=(0, 1), has_aux=True)(mask_queries, features, start, weight)
        return jax.tree.map(jnp.add, state, (sums, *gradients))

    zeros = jnp.zeros(2, mask_queries.dtype)
    start = (zeros, jnp.zeros_like(mask_queries), jnp.zeros_like(features)) if differentiate else (zeros,)
    sums, *gradients = lax.fori_loop(0, count_blocks(num_rows, block), score_block, start)
    if not differentiate:
        return sums, None
    d_queries, d_features = gradients
    return sums, (d_queries, d_features if features_vjp is None else features_vjp(d_features)[0])


def mask_iou_targets(
    mask_queries: Array, mask_features: Array, planes: Array, object_index: Array, num_rows: Array
) -> Array:
    """IoU of one prediction set's masks with their objects at twice the features' resolution, [B, R].

    mask_queries [B, R, P]; planes [B, V, 2h, 2w] from `mask_planes.resize_planes`; object_index [R]. Rows from
    num_rows on are 0. No gradient flows through.
    """
    mask_queries, mask_features = lax.stop_gradient((mask_queries, mask_features))
    rows = mask_queries.shape[1]
    block = _block_size(rows)

    def fill(i: Array, iou: Array) -> Array:
        start = jnp.minimum(i * block, rows - block)
        queries = lax.dynamic_slice_in_dim(mask_queries, start, block, axis=1)
        logits = jnp.einsum("brc,bhwc->brhw", queries, mask_features, precision=lax.Precision.HIGHEST)
        slots = lax.dynamic_slice_in_dim(object_index, start, block)
        even, odd = (
            (read_bits(planes[:, :, row::2, 0::2], slots), read_bits(planes[:, :, row::2, 1::2], slots))
            for row in (0, 1)
        )
        return lax.dynamic_update_slice_in_dim(iou, mask_quality(logits, (even, odd)), start, axis=1)

    start = jnp.zeros(mask_queries.shape[:2], mask_queries.dtype)
    return lax.fori_loop(0, count_blocks(num_rows, block), fill, start)
