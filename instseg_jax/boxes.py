"""Box geometry: pure functions over [..., 4] arrays of any float type."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from instseg_jax.types import HostOrDeviceArray

# Epsilons of the reference: GIoU adds the first to union and enclosing area, the IoU that weighs the
# class loss adds the second to the union, the inverse sigmoid clips with the third.
GIOU_EPS = 1e-10
IOU_EPS = 1e-9
LOGIT_EPS = 1e-5


def cxcywh_to_xyxy(boxes: Float[HostOrDeviceArray, "*n 4"]) -> Float[Array, "*n 4"]:
    """(cx, cy, w, h) to (x1, y1, x2, y2), same frame."""
    cx, cy, w, h = jnp.split(boxes, 4, axis=-1)
    return jnp.concatenate([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], axis=-1)


def xyxy_to_cxcywh(boxes_xyxy: Float[HostOrDeviceArray, "*n 4"]) -> Float[Array, "*n 4"]:
    """(x1, y1, x2, y2) to (cx, cy, w, h), same frame."""
    x1, y1, x2, y2 = jnp.split(boxes_xyxy, 4, axis=-1)
    return jnp.concatenate([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=-1)


def _overlap(a: HostOrDeviceArray, b: HostOrDeviceArray) -> tuple[Array, Array]:
    """Intersection and union areas of xyxy boxes that broadcast against each other."""
    top_left = jnp.maximum(a[..., :2], b[..., :2])
    bottom_right = jnp.minimum(a[..., 2:], b[..., 2:])
    intersection = jnp.prod(jnp.maximum(bottom_right - top_left, 0), axis=-1)
    area_a = jnp.prod(a[..., 2:] - a[..., :2], axis=-1)
    area_b = jnp.prod(b[..., 2:] - b[..., :2], axis=-1)
    return intersection, area_a + area_b - intersection


def box_iou(a: Float[HostOrDeviceArray, "*#n 4"], b: Float[HostOrDeviceArray, "*#n 4"]) -> Float[Array, "..."]:
    """IoU of xyxy boxes that broadcast: [..., 4], [..., 4] -> [...], 0..1.

    For all pairs of [Q, 4] and [N, 4] pass `a[:, None], b[None]`.
    """
    intersection, union = _overlap(a, b)
    return intersection / (union + IOU_EPS)


def generalized_box_iou(
    a: Float[HostOrDeviceArray, "*#n 4"], b: Float[HostOrDeviceArray, "*#n 4"]
) -> Float[Array, "..."]:
    """GIoU (Rezatofighi et al. 2019) of xyxy boxes that broadcast: -1..1, 1 for equal boxes."""
    intersection, union = _overlap(a, b)
    union = union + GIOU_EPS
    top_left = jnp.minimum(a[..., :2], b[..., :2])
    bottom_right = jnp.maximum(a[..., 2:], b[..., 2:])
    enclosing = jnp.prod(bottom_right - top_left, axis=-1) + GIOU_EPS
    return intersection / union - (enclosing - union) / enclosing


def inverse_sigmoid(x: Float[HostOrDeviceArray, "*n"]) -> Float[Array, "*n"]:
    """log(x / (1 - x)) with x clipped to 0..1 and both sides kept above 1e-5: finite everywhere."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, LOGIT_EPS) / jnp.maximum(1 - x, LOGIT_EPS))
