"""Which query answers for which object: cost matrix and optimal assignment, one for each prediction set.

Source: PaddleDetection at 666f597fd0, ppdet/modeling/transformers/matchers.py (HungarianMatcher with masks).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int32, Shaped, UInt16
from scipy.optimize import linear_sum_assignment

from instseg_jax.boxes import cxcywh_to_xyxy, generalized_box_iou
from instseg_jax.models.sampling import sample_map
from instseg_jax.training.losses import DICE_SMOOTHING, sigmoid_cross_entropy
from instseg_jax.training.mask_planes import count_blocks, gather_words, read_points
from instseg_jax.types import HostOrDeviceArray, Predictions, Targets

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2
FOCAL_EPS = 1e-8
LARGEST_COST = 1e6  # stands for NaN and infinities, which SciPy refuses
SLOT_BLOCK = 16  # target slots whose mask costs are computed at once


@dataclasses.dataclass(frozen=True)
class TermWeights:
    """How much each kind of term counts, in the loss or in the cost of a match."""

    class_: float
    box_l1: float
    box_giou: float
    mask_bce: float
    mask_dice: float


def match_cost(
    predictions: Predictions,
    mask_features: Float[Array, "B h w P"],
    targets: Targets,
    mask_planes: UInt16[Array, "B V Hm Wm"],
    num_slots: Int32[Array, ""],
    points: Float[Array, "S B M 2"],
    weights: TermWeights,
) -> Float[Array, "S B Q N"]:
    """Cost of every pair of a query and a target slot in every prediction set, [S, B, Q, N].

    Args:
      predictions: S sets of Q queries.
      mask_features: [B, h, w, P].
      targets: objects in N slots.
      mask_planes: their masks, packed by `mask_planes.pack_masks`.
      num_slots: [] slots in use; the mask cost of later ones is not computed.
      points: [S, B, M, 2] in 0..1, where masks are compared: the same for all queries and objects of an image.
      weights: of the five costs.
    """
    boxes, target_boxes = predictions.boxes[..., :, None, :], jnp.asarray(targets.boxes)[None, :, None, :, :]
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    cost = (
        weights.class_ * class_cost(predictions.class_logits, jnp.asarray(targets.labels))
        + weights.box_l1 * jnp.sum(jnp.abs(boxes - target_boxes), axis=-1)
        - weights.box_giou * giou
    )

    def mask_cost(one_set: tuple[Array, Array]) -> Array:
        mask_queries, at = one_set
        bce, dice = mask_costs(mask_queries, mask_features, mask_planes, num_slots, at, cost.shape[-1])
        return weights.mask_bce * bce + weights.mask_dice * dice

    return cost + lax.map(mask_cost, (predictions.mask_queries, points))


def class_cost(class_logits: Float[Array, "*s B Q K"], labels: Int32[Array, "B N"]) -> Float[Array, "*s B Q N"]:
    """Focal cost of predicting the class of each slot: [..., B, Q, K], [B, N] -> [..., B, Q, N]."""
    p = jax.nn.sigmoid(class_logits)
    hit = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -jnp.log(p + FOCAL_EPS)
    miss = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -jnp.log(1 - p + FOCAL_EPS)
    index = jnp.broadcast_to(labels[:, None, :], (*p.shape[:-1], labels.shape[-1]))
    return jnp.take_along_axis(hit - miss, index, axis=-1)


def mask_costs(
    mask_queries: Float[Array, "B Q P"],
    mask_features: Float[Array, "B h w P"],
    mask_planes: UInt16[Array, "B V Hm Wm"],
    num_slots: Int32[Array, ""],
    points: Float[Array, "B M 2"],
    slots: int,
) -> tuple[Float[Array, "B Q {slots}"], Float[Array, "B Q {slots}"]]:
    """Mean cross-entropy and dice cost of one prediction set at points [B, M, 2]: two of [B, Q, N].

    Features are read at the points before the queries are multiplied in, so no query's whole mask is ever made.
    """
    batch, queries, _ = mask_queries.shape
    dtype, num_points = mask_queries.dtype, points.shape[1]
    exact = lax.Precision.HIGHEST
    features = sample_map(mask_features, points)
    logits = jnp.einsum("bqc,bmc->bqm", mask_queries, features, precision=exact)
    probability = jax.nn.sigmoid(logits)
    # The cross-entropies against 1 and 0 differ by the logit: sum BCE(x, t) = sum BCE(x, 0) - x . t
    against_zero = jnp.sum(sigmoid_cross_entropy(logits, jnp.zeros((), dtype)), axis=-1)[..., None]
    area = jnp.einsum("bqm,m->bq", probability, jnp.ones(num_points, dtype), precision=exact)[..., None]
    words, share = gather_words(mask_planes, points[:, None].astype(dtype), num_slots)

    block = min(SLOT_BLOCK, slots)

    def fill(i: Array, costs: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * block, slots - block)
        masks = read_points(words, share, start + jnp.arange(block))
        hit = jnp.einsum("bmc,bnm->bnc", features, masks, precision=exact)
        hit = jnp.einsum("bqc,bnc->bqn", mask_queries, hit, precision=exact)
        overlap = jnp.einsum("bqm,bnm->bqn", probability, masks, precision=exact)
        size = jnp.sum(masks, axis=-1)[:, None, :]
        bce = (against_zero - hit) / num_points
        dice = 1 - (2 * overlap + DICE_SMOOTHING) / (area + size + DICE_SMOOTHING)
        return (
            lax.dynamic_update_slice_in_dim(costs[0], bce, start, 2),
            lax.dynamic_update_slice_in_dim(costs[1], dice, start, 2),
        )

    zeros = jnp.zeros((batch, queries, slots), dtype)
    return lax.fori_loop(0, count_blocks(num_slots, block), fill, (zeros, zeros))


def assign(cost: Float[HostOrDeviceArray, "S B Q N"], valid: Shaped[HostOrDeviceArray, "B N"]) -> Int32[Array, "S B N"]:
    """Give a query to every object of every image in every prediction set, at the least total cost, on the host.

    Args:
      cost: [S, B, Q, N], computed or still being computed; may be split over devices and processes along B.
      valid: [B, N], which slots hold an object.

    Returns: query_index [S, B, N] int32 where cost is, -1 where a slot has no query: it is not valid, or there are
      more objects than queries. Every device's images are solved from its own part: nothing is gathered.
    """
    cost, valid = jnp.asarray(cost), jnp.asarray(valid)
    rows = {shard.device: shard.data for shard in valid.addressable_shards}
    for array in (cost, valid):
        array.copy_to_host_async()
    solved = [
        jax.device_put(_assign_on_host(shard.data, rows[shard.device]), shard.device)
        for shard in cost.addressable_shards
    ]
    shape = (*cost.shape[:2], cost.shape[3])
    sharding = cost.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:2]))
    return jax.make_array_from_single_device_arrays(shape, sharding, solved)


def assign_by_callback(cost: Array, valid: HostOrDeviceArray) -> Array:
    """What `assign` does, called by a compiled program, which waits for the host: [S, B, Q, N], [B, N] -> [S, B, N]."""
    shape = jax.ShapeDtypeStruct((*cost.shape[:2], cost.shape[3]), jnp.int32)
    return jax.pure_callback(_assign_on_host, shape, cost, valid, vmap_method="sequential")


def _assign_on_host(cost: HostOrDeviceArray, valid: HostOrDeviceArray) -> np.ndarray:
    cost, valid = np.asarray(cost), np.asarray(valid)
    cost = np.nan_to_num(cost, nan=LARGEST_COST, posinf=LARGEST_COST, neginf=-LARGEST_COST)
    columns = [np.flatnonzero(row) for row in valid]
    query_index = np.full((*cost.shape[:2], cost.shape[3]), -1, np.int32)
    for one_set, index in zip(cost, query_index, strict=True):
        for image, real, found in zip(one_set, columns, index, strict=True):
            queries, objects = linear_sum_assignment(image[:, real])
            found[real[objects]] = queries
    return query_index
