"""Denoising queries: noised ground truth that the decoder learns to restore (DN-DETR, Li et al. 2022).

Positive queries only, as the reference has them. What the decoder makes of them is scored in
`training/criterion.py`.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32, Integer

from instseg_jax.boxes import inverse_sigmoid
from instseg_jax.types import DenoisingQueries, Targets


def make_denoising_queries(
    targets: Targets,
    *,
    num_denoising: int,
    num_classes: int,
    num_queries: int,
    label_noise_ratio: float,
    box_noise_scale: float,
    rng: Array,
) -> DenoisingQueries | None:
    """Draw noise and build the denoising queries of a batch; None when num_denoising is 0.

    Args:
      num_denoising: slots to fill with groups; an image with more objects than that still gets one group.
      num_classes, num_queries: K and Q of the network.
      label_noise_ratio: half of this share of the labels is replaced by a random one.
      box_noise_scale: centres move by up to this times half the box, sides change by up to this times themselves.
      rng: key.

    Returns: D = max(num_denoising, N) slots.
    """
    if num_denoising == 0:
        return None
    batch, max_objects = targets.valid.shape
    slots = max(num_denoising, max_objects)
    flip_key, label_key, box_key = jax.random.split(rng, 3)
    dtype = jnp.asarray(targets.boxes).dtype
    return noise_targets(
        targets,
        u_flip=jax.random.uniform(flip_key, (batch, slots), dtype),
        random_labels=jax.random.randint(label_key, (batch, slots), 0, num_classes),
        u_box=jax.random.uniform(box_key, (batch, slots, 4), dtype),
        num_denoising=num_denoising,
        num_classes=num_classes,
        num_queries=num_queries,
        label_noise_ratio=label_noise_ratio,
        box_noise_scale=box_noise_scale,
    )


def noise_targets(
    targets: Targets,
    *,
    u_flip: Float[Array, "B D"],
    random_labels: Integer[Array, "B D"],
    u_box: Float[Array, "B D 4"],
    num_denoising: int,
    num_classes: int,
    num_queries: int,
    label_noise_ratio: float,
    box_noise_scale: float,
) -> DenoisingQueries:
    """Build denoising queries from given draws.

    Args:
      u_flip: [B, D] in 0..1; a label is replaced where it is below label_noise_ratio / 2.
      random_labels: [B, D] int, the replacements.
      u_box: [B, D, 4] in 0..1.
    """
    slots = u_flip.shape[1]
    valid = jnp.asarray(targets.valid)
    objects = count_slots(valid)
    num_groups = jnp.maximum(1, num_denoising // jnp.maximum(objects, 1))
    slot = jnp.arange(slots, dtype=jnp.int32)
    used = slot < objects * num_groups
    object_index = jnp.where(used, slot % jnp.maximum(objects, 1), 0)
    group = slot // jnp.maximum(objects, 1)

    real = used[None] & valid[:, object_index]
    labels = jnp.asarray(targets.labels)[:, object_index]
    labels = jnp.where(u_flip < label_noise_ratio * 0.5, random_labels, labels)
    boxes = jnp.where(real[..., None], jnp.asarray(targets.boxes)[:, object_index], 0)
    reach = jnp.concatenate([boxes[..., 2:] / 2, boxes[..., 2:]], axis=-1)
    boxes = boxes + (2 * u_box - 1) * reach * box_noise_scale

    return DenoisingQueries(
        labels=jnp.where(real, labels, num_classes).astype(jnp.int32),
        boxes_unact=inverse_sigmoid(boxes),
        object_index=object_index,
        valid=real,
        attention_mask=_attention_mask(used, group, num_queries),
        num_groups=num_groups.astype(jnp.int32),
    )


def count_slots(valid: Bool[Array, "B N"]) -> Int32[Array, ""]:
    """Slots that a batch occupies: one more than the last valid one of any image. [B, N] -> [] int32."""
    ends = jnp.where(valid, jnp.arange(1, valid.shape[1] + 1, dtype=jnp.int32), 0)
    return jnp.max(ends, initial=0)


def _attention_mask(used: Array, group: Array, num_queries: int) -> Array:
    """Who may attend to whom, [D + Q, D + Q].

    Queries see queries only: a denoising slot knows the answer. A slot sees its own group and the queries; one
    that exists because shapes are static sees the queries (a row must see something) and is seen by nobody,
    while the reference lets padding inside a group take part.
    """
    slots = used.shape[0]
    same_group = (group[:, None] == group[None, :]) & used[:, None] & used[None, :]
    return jnp.block(
        [
            [same_group, jnp.ones((slots, num_queries), bool)],
            [jnp.zeros((num_queries, slots), bool), jnp.ones((num_queries, num_queries), bool)],
        ]
    )
