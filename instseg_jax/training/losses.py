"""Loss formulas: pure functions over predictions and the objects they are matched with.

Nothing here knows about prediction sets, batches over devices or weights; that is `criterion.py`. All is computed
in the type of the inputs, float32 or wider.
Source: PaddleDetection at 666f597fd0, ppdet/modeling/losses/detr_loss.py (MaskDINOLoss).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from instseg_jax.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from instseg_jax.models.linear import with_rank

DICE_SMOOTHING = 1.0
MASK_IOU_SMOOTHING = 0.01


def varifocal_loss(
    class_logits: Float[Array, "*n Q K"],
    labels: Int[Array, "*n Q"],
    quality: Float[Array, "*n Q"],
    *,
    alpha: float,
    gamma: float,
) -> Float[Array, "*n Q"]:
    """Varifocal loss (Zhang et al. 2021) summed over classes: [..., Q, K] -> [..., Q].

    Args:
      class_logits: [..., Q, K].
      labels: [..., Q] class of the object that the query is matched with; K for none.
      quality: [..., Q] what the score of that class should become, 0..1.

    Scores of all other classes are pushed to 0 with the weight alpha * score^gamma, whose gradient counts.
    """
    classes = with_rank(jnp.arange(class_logits.shape[-1]), class_logits.ndim)
    is_label = labels[..., None] == classes
    target = jnp.where(is_label, quality[..., None], 0)
    weight = jnp.where(is_label, target, alpha * jax.nn.sigmoid(class_logits) ** gamma)
    return jnp.sum(weight * sigmoid_cross_entropy(class_logits, target), axis=-1)


def box_losses(
    boxes: Float[Array, "*n 4"], target_boxes: Float[Array, "*n 4"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """L1 distance and 1 - GIoU of paired normalised cxcywh boxes: [..., 4], [..., 4] -> [...], [...]."""
    l1 = jnp.sum(jnp.abs(boxes - target_boxes), axis=-1)
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
    return l1, 1 - giou


def box_quality(boxes: Float[Array, "*n 4"], target_boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """IoU of paired normalised cxcywh boxes, without gradient: [..., 4], [..., 4] -> [...]."""
    boxes = lax.stop_gradient(boxes)
    return box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))


@jax.custom_jvp
def sigmoid_cross_entropy(logits: Float[Array, "*n"], targets: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    """Binary cross-entropy with logits, element by element; its derivative is sigmoid(logits) - targets.

    log(1 + exp(-|x|)) is taken from the sigmoid, which is needed anyway: half the cost, and still exact to the
    last bit of the sigmoid (6e-8 in float32). The choice comes last because XLA on a CPU fuses sums with what
    precedes them, logarithms included, into slow code, but not across a choice.
    """
    probability = jax.nn.sigmoid(logits)
    log_certainty = jnp.log(jnp.maximum(probability, 1 - probability))
    product = logits * targets
    return jnp.where(logits > 0, logits - product - log_certainty, -product - log_certainty)


@sigmoid_cross_entropy.defjvp
def _sigmoid_cross_entropy_jvp(primals, tangents):
    (logits, targets), (d_logits, d_targets) = primals, tangents
    slope = jax.nn.sigmoid(logits) - targets
    return sigmoid_cross_entropy(logits, targets), slope * d_logits - logits * d_targets


def mask_losses(
    logits: Float[Array, "*n P"], targets: Float[Array, "*n P"], weights: Float[Array, "*n P"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Cross-entropy and dice loss of masks read at points: three times [..., P] -> [...], [...].

    weights count how often a point is taken; the cross-entropy is their weighted mean.
    """
    probability = jax.nn.sigmoid(logits)

    def total(x: Array) -> Array:
        return jnp.sum(weights * x, axis=-1)

    cross_entropy = total(sigmoid_cross_entropy(logits, targets)) / jnp.sum(weights, axis=-1)
    overlap, area = total(targets * probability), total(targets) + total(probability)
    return cross_entropy, 1 - (2 * overlap + DICE_SMOOTHING) / (area + DICE_SMOOTHING)


def uncertain_point_weights(
    logits: Float[Array, "*n P"], num_candidates: int, num_important: int
) -> Float[Array, "*n P"]:
    """How often to take each point: [..., P] -> [..., P], without gradient.

    Of the first num_candidates points the num_important ones with the logits nearest to zero are taken, and
    all points after them (PointRend, Kirillov et al. 2020). Points that tie for the last places share them, so
    the weights always add up to num_important + P - num_candidates; all others are 0 or 1.
    """
    uncertainty = lax.stop_gradient(jnp.abs(logits))
    limit, tied_share = smallest_limit(uncertainty[..., :num_candidates], num_important)
    limit, tied_share = limit[..., None], tied_share[..., None]
    is_extra = with_rank(jnp.arange(logits.shape[-1]), logits.ndim) >= num_candidates
    tied = jnp.where(uncertainty == limit, tied_share, 0)
    return jnp.where(is_extra | (uncertainty < limit), 1, tied).astype(logits.dtype)


def smallest_limit(values: Float[Array, "*n M"], count: int) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """A limit that divides the `count` smallest of non-negative values from the rest.

    [..., M] -> limit [...], tied_share [...]: take all values below the limit, and tied_share of each value equal
    to it. Bisects the bit patterns, which order as the values do, until one limit fits: about 20 passes over the
    data where sorting costs ten times as much. NaN counts as the largest value.
    """
    integer = {4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize]

    def count_up_to(key: Array) -> Array:
        limit = lax.bitcast_convert_type(key, values.dtype)
        # Added up in floating point, exact up to 2^24: quicker than integers on a CPU.
        return jnp.sum((values <= limit[..., None]).astype(jnp.float32), axis=-1)

    # Always: fewer than `count` values are <= low; `found` of them, at least `count`, are <= high.
    def is_open(state: tuple) -> Array:
        low, high, found = state
        return (found != count) & (high - low > 1)

    def halve(state: tuple) -> tuple:
        low, high, found = state
        middle = low + (high - low) // 2
        number = count_up_to(middle)
        up, down = is_open(state) & (number < count), is_open(state) & (number >= count)
        return jnp.where(up, middle, low), jnp.where(down, middle, high), jnp.where(down, number, found)

    high = lax.bitcast_convert_type(jnp.max(values, axis=-1), integer)
    start = jnp.full_like(high, -1), high, jnp.full(high.shape, values.shape[-1], jnp.float32)
    _, high, found = lax.while_loop(lambda state: jnp.any(is_open(state)), halve, start)
    below = count_up_to(high - 1)
    tied_share = (count - below) / jnp.maximum(found - below, 1)
    return lax.bitcast_convert_type(high, values.dtype), tied_share.astype(values.dtype)


def mask_quality(
    mask_logits: Float[Array, "*n h w"], target_masks: tuple[tuple[Array, Array], tuple[Array, Array]]
) -> Float[Array, "*n"]:
    """IoU of masks at twice the resolution of their logits, without gradient: [..., h, w] -> [...].

    The logits are doubled bilinearly (half-pixel) and cut at 0. `target_masks[i][j]` [..., h, w] of 0 and 1 are
    the target's pixels at rows i, i + 2, .. and columns j, j + 2, ..: the four phases are compared one by one,
    so that the doubled map is never put together.
    """
    overlap = union = jnp.zeros((), jnp.int32)
    for rows, target_rows in zip(double_axis(lax.stop_gradient(mask_logits), -2), target_masks, strict=True):
        for pixels, target in zip(double_axis(rows, -1), target_rows, strict=True):
            predicted, real = pixels > 0, target > 0
            overlap += jnp.sum(predicted & real, axis=(-2, -1), dtype=jnp.int32)
            union += jnp.sum(predicted | real, axis=(-2, -1), dtype=jnp.int32)
    smooth = jnp.asarray(MASK_IOU_SMOOTHING, mask_logits.dtype)
    return (overlap + smooth) / (union + smooth)


def double_axis(x: Float[Array, "*n"], axis: int) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Even and odd positions of x after doubling one axis bilinearly (half-pixel, edges repeated)."""
    size = x.shape[axis]
    first, last = lax.slice_in_dim(x, 0, 1, axis=axis), lax.slice_in_dim(x, size - 1, size, axis=axis)
    before = jnp.concatenate([first, lax.slice_in_dim(x, 0, size - 1, axis=axis)], axis=axis)
    after = jnp.concatenate([lax.slice_in_dim(x, 1, size, axis=axis), last], axis=axis)
    return 0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after
