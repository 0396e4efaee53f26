"""The training loss: every prediction set is scored on its matches with the objects, terms are named and added up.

Formulas are in `losses.py` and `point_losses.py`. Matching is on the host (`matching.py`): `compute_match_costs`
is what comes before it, `compute_losses` what comes after.
Source: PaddleDetection at 666f597fd0, ppdet/modeling/losses/detr_loss.py (DETRLoss, DINOLoss, MaskDINOLoss).

Differences from the reference: an image without objects beside images with some adds only its background class
loss (the reference stops with an error there); points are shared, see `point_losses.py`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int32, Integer
from ml_collections import ConfigDict

from instseg_jax.messages import quote
from instseg_jax.models.denoising import count_slots
from instseg_jax.training.losses import box_losses, box_quality, varifocal_loss
from instseg_jax.training.mask_planes import pack_masks, resize_planes
from instseg_jax.training.matching import TermWeights, match_cost
from instseg_jax.training.point_losses import PairedSets, PointTerms, mask_iou_targets, point_losses
from instseg_jax.types import DATA_AXIS, DenoisingQueries, HostOrDeviceArray, Predictions, Targets, TrainingOutputs

TERMS = ("class", "box_l1", "box_giou", "mask_bce", "mask_dice")
IOU_TARGETS = ("mask", "box", "none")


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What the loss is made of; `build_loss_settings` reads it from a config."""

    weights: TermWeights
    match_weights: TermWeights
    iou_target: str  # what the class scores of the main set learn: "mask" or "box" IoU, or 1 for "none"
    aux_iou_target: str  # the same for all other sets
    alpha: float  # of the varifocal loss
    gamma: float
    num_points: int  # where a mask is compared
    num_candidates: int  # points of which the most uncertain ones are kept
    num_important: int  # how many are kept; the rest of num_points is drawn without looking


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PointDraws:
    """Uniform points (x, y) in 0..1 where the masks of one step are scored.

    T = the S matching sets, then the denoising sets. The third dimension is 1 (all masks of an image share the
    points of a set) or the larger number of target and denoising slots (each row has its own).
    """

    candidates: HostOrDeviceArray  # [T, B, 1 or R, num_candidates, 2]
    extra: HostOrDeviceArray  # [T, B, 1 or R, num_points - num_important, 2]


def build_loss_settings(config: ConfigDict) -> LossSettings:
    """Read the section `loss` of a config.

    Raises: ValueError for a choice, a ratio or a number of points that is not allowed.
    """
    for name in ("iou_target", "aux_iou_target"):
        if config[name] not in IOU_TARGETS:
            raise ValueError(f"loss.{name} is {quote(config[name])}, it must be one of {', '.join(IOU_TARGETS)}")
    if config.num_points < 1:
        raise ValueError(f"loss.num_points is {config.num_points}, it must be at least 1")
    if config.oversample_ratio < 1:
        raise ValueError(f"loss.oversample_ratio is {config.oversample_ratio}, it must be at least 1")
    if not 0 < config.important_ratio <= 1:
        raise ValueError(f"loss.important_ratio is {config.important_ratio}, it must be above 0 and at most 1")
    fields = ("class_weight", "box_l1_weight", "box_giou_weight", "mask_bce_weight", "mask_dice_weight")
    return LossSettings(
        weights=TermWeights(*(float(config[name]) for name in fields)),
        match_weights=TermWeights(*(float(config[f"match_{name}"]) for name in fields)),
        iou_target=config.iou_target,
        aux_iou_target=config.aux_iou_target,
        alpha=float(config.alpha),
        gamma=float(config.gamma),
        num_points=config.num_points,
        num_candidates=int(config.num_points * config.oversample_ratio),
        num_important=max(1, int(config.num_points * config.important_ratio)),
    )


def draw_match_points(rng: Array, settings: LossSettings, outputs: TrainingOutputs) -> Float[Array, "S B M 2"]:
    """Draw the points [S, B, num_points, 2] in 0..1 at which queries and objects are compared for matching."""
    sets, batch = outputs.matching.boxes.shape[:2]
    return _sorted_points(jax.random.bits(rng, (sets, batch, settings.num_points + 1), jnp.uint32))


def draw_points(rng: Array, settings: LossSettings, outputs: TrainingOutputs) -> PointDraws:
    """Draw the points of a step, shared by the masks of an image. The same key gives the same points on any mesh."""
    sets, batch = outputs.matching.boxes.shape[:2]
    all_sets = sets + (0 if outputs.denoising is None else outputs.denoising.boxes.shape[0])
    num_extra = settings.num_points - settings.num_important
    # One call for all bits: every call adds a second of compilation on a CPU.
    shapes = [(all_sets, batch, 1, n + 1) for n in (settings.num_candidates, num_extra)]
    sizes = [math.prod(shape) for shape in shapes]
    bits = jnp.split(jax.random.bits(rng, (sum(sizes),), jnp.uint32), np.cumsum(sizes)[:-1])
    return PointDraws(*(_sorted_points(part.reshape(shape)) for part, shape in zip(bits, shapes, strict=True)))


def _sorted_points(bits: Array) -> Array:
    """Turn 32 random bits a point into independent uniform points in rising order of y: [.., n + 1] -> [.., n, 2].

    Nothing depends on the order of points, and neighbours in memory are read much faster. n sorted uniform
    numbers are distributed as the running sums of n + 1 exponential ones over their total. 16 bits place x within
    a hundredth of a pixel of any input up to 640 pixels wide.
    """
    x = ((bits & 0xFFFF).astype(jnp.float32) + 0.5) / 2**16
    spacing = -jnp.log(((bits >> 16).astype(jnp.float32) + 0.5) / 2**16)
    sums = jnp.cumsum(spacing, axis=-1)
    return jnp.stack([x[..., :-1], sums[..., :-1] / sums[..., -1:]], axis=-1)


def compute_match_costs(
    outputs: TrainingOutputs,
    targets: Targets,
    points: Float[Array, "S B M 2"],
    settings: LossSettings,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "S B Q N"]:
    """Cost of every pair of a query and a target slot in every matching set, [S, B, Q, N], for `matching.assign`.

    points come from `draw_match_points`; over a mesh each device computes its own images. No gradient flows through.
    """
    matching, features = lax.stop_gradient(
        (_at_least_float32(outputs.matching), _at_least_float32(outputs.mask_features))
    )

    def cost(predictions: Predictions, features: Array, targets: Targets, points: Array) -> Array:
        num_slots = count_slots(jnp.asarray(targets.valid))
        planes = pack_masks(jnp.asarray(targets.masks), num_slots)
        return match_cost(predictions, features, targets, planes, num_slots, points, settings.match_weights)

    if mesh is not None:
        split, by_set = PartitionSpec(DATA_AXIS), PartitionSpec(None, DATA_AXIS)
        specs = (by_set, split, split, by_set)
        cost = jax.shard_map(cost, mesh=mesh, in_specs=specs, out_specs=by_set, check_vma=False)
    return cost(matching, features, jax.tree.map(jnp.asarray, targets), points)


def compute_losses(
    outputs: TrainingOutputs,
    targets: Targets,
    denoising: DenoisingQueries | None,
    query_index: Int32[Array, "S B N"],
    draws: PointDraws,
    settings: LossSettings,
    *,
    num_objects: Integer[Array, ""] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of a step.

    Args:
      outputs: predictions of any float type; the loss is computed in float32 or wider.
      targets: objects of the (global) batch.
      denoising: what was fed beside the queries; None exactly when outputs.denoising is None.
      query_index: [S, B, N] the query matched with each target slot, -1 for none, from `matching.assign`.
      draws: from `draw_points`.
      settings: weights and choices.
      num_objects: [] by which terms are divided; None: the objects in targets. A part of a batch gives the whole's.
      mesh: devices over whose axis "data" the batch is split; each then scores its own images.

    Returns: the sum of all terms, and the terms by name: `loss/class`, `loss/box_l1`, `loss/box_giou`,
      `loss/mask_bce`, `loss/mask_dice` of the last layer; the same with `/encoder`, `/initial`, `/layer0` .. for
      the other sets and `/denoising`, `/denoising/initial`, `/denoising/layer0` .. for the denoising slots. Terms
      are weighted already. Differentiate the sum: of the mask terms alone no gradient comes.
      The sum is not finite exactly when a term is not.

    Raises: ValueError when predictions and denoising queries don't fit together.
    """
    if (denoising is None) != (outputs.denoising is None):
        raise ValueError("denoising queries and their predictions must both be given, or neither")
    outputs = _at_least_float32(outputs)
    targets = jax.tree.map(jnp.asarray, targets)
    # The same for every device: how many objects there are in the whole batch, and its denoising groups.
    batch_facts = {
        "num_objects": jnp.sum(targets.valid) if num_objects is None else num_objects,
        "num_groups": jnp.ones((), jnp.int32) if denoising is None else denoising.num_groups,
    }

    def score(
        outputs: TrainingOutputs,
        targets: Targets,
        denoising: DenoisingQueries | None,
        query_index: Array,
        draws: PointDraws,
        batch_facts: dict[str, Array],
    ):
        sums = _score_images(outputs, targets, denoising, query_index, draws, batch_facts, settings)
        return jax.tree.map(lambda x: x[None], sums)  # one row a device

    if mesh is not None:
        # Any: a tree of specs has the classes of the tree of arrays that it is for.
        split: Any = PartitionSpec(DATA_AXIS)
        whole: Any = PartitionSpec()
        by_set: Any = PartitionSpec(None, DATA_AXIS)
        denoising_spec = None if denoising is None else DenoisingQueries(split, split, whole, split, whole, whole)
        score = jax.shard_map(
            score,
            mesh=mesh,
            in_specs=(TrainingOutputs(by_set, by_set, split), split, denoising_spec, by_set, by_set, whole),
            out_specs=split,
            check_vma=False,
        )
    parts = score(outputs, targets, denoising, query_index, draws, batch_facts)
    total, by_term = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
    names = set_names(len(outputs.matching.boxes), denoising is not None)
    return total, {f"loss/{term}{name}": by_term[term][i] for i, name in enumerate(names) for term in TERMS}


def _at_least_float32(tree):
    """Low-precision predictions are matched and scored in float32, wider ones as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def set_names(num_sets: int, use_denoising: bool) -> list[str]:
    """Suffixes of the terms' names in the order of sets: matching, then denoising. That of the last layer is empty."""
    first = ["/encoder", "/initial"] if use_denoising else ["/encoder"]
    names = first + [f"/layer{i}" for i in range(num_sets - len(first) - 1)] + [""]
    # Nothing is denoised before the decoder: the denoising sets start with `initial`.
    return names + ([f"/denoising{name}" for name in names[1:]] if use_denoising else [])


@dataclasses.dataclass(frozen=True)
class _Group:
    """Prediction sets of one kind, and the pairs of a query and an object they are scored on.

    Rows r of query_index [S, B, R] (-1 for no pair) and object_index [R] are a pair; rows from num_rows on are none.
    """

    predictions: Predictions
    query_index: Array
    object_index: Array
    num_rows: Array
    scale: Array  # [] factor on all terms
    set_weights: Array  # [S] factor on the class terms
    query_used: Array  # [Q] queries that count at all


def _score_images(
    outputs: TrainingOutputs,
    targets: Targets,
    denoising: DenoisingQueries | None,
    query_index: Array,
    draws: PointDraws,
    batch_facts: dict[str, Array],
    settings: LossSettings,
) -> tuple[Array, dict[str, Array]]:
    """Sum of all terms, and the terms [T] of matching and denoising sets, over the images of one device."""
    num_slots = count_slots(jnp.asarray(targets.valid))
    planes = pack_masks(jnp.asarray(targets.masks), num_slots)
    sets, _, slots = query_index.shape
    dtype = outputs.matching.boxes.dtype
    num_objects = batch_facts["num_objects"]
    scale = 1 / jnp.maximum(num_objects, 1).astype(dtype)
    set_weights = jnp.ones(sets, dtype)
    if denoising is not None:  # the reference has no `initial` set in a batch without objects
        set_weights = set_weights.at[1].set((num_objects > 0).astype(dtype))
    query_used = jnp.ones(outputs.matching.boxes.shape[2], bool)
    object_index = jnp.arange(slots, dtype=jnp.int32)
    groups = [
        _Group(outputs.matching, query_index, object_index, num_slots, scale, set_weights, query_used),
    ]
    if denoising is not None and outputs.denoising is not None:  # both or neither
        groups.append(_denoising_group(outputs.denoising, denoising, scale / batch_facts["num_groups"]))
    return _score_groups(groups, outputs.mask_features, planes, num_slots, targets, draws, settings)


def _denoising_group(predictions: Predictions, denoising: DenoisingQueries, scale: Array) -> _Group:
    """Every denoising slot is paired with the object it was made from."""
    sets, batch, slots = predictions.boxes.shape[:3]
    queries = jnp.arange(slots, dtype=jnp.int32)
    return _Group(
        predictions=predictions,
        query_index=jnp.broadcast_to(jnp.where(denoising.valid, queries, -1), (sets, batch, slots)),
        object_index=denoising.object_index,
        num_rows=count_slots(denoising.valid),
        scale=scale,
        set_weights=jnp.ones(sets, predictions.boxes.dtype),
        # Slots that are there for static shapes only don't see themselves; all others do.
        query_used=jnp.diagonal(denoising.attention_mask)[:slots],
    )


def _score_groups(
    groups: list[_Group],
    mask_features: Array,
    planes: Array,
    num_slots: Array,
    targets: Targets,
    draws: PointDraws,
    settings: LossSettings,
) -> tuple[Array, dict[str, Array]]:
    """Score the pairs of all groups at once, R rows in each of T sets."""
    weights = settings.weights
    counts = [len(g.query_index) for g in groups]
    query_index = _join([g.query_index for g in groups], fill=-1)
    row_valid = query_index >= 0
    picked = [jnp.maximum(g.query_index, 0)[..., None] for g in groups]
    boxes, mask_queries = (
        _join(
            [jnp.take_along_axis(getattr(g.predictions, name), q, axis=2) for g, q in zip(groups, picked, strict=True)]
        )
        for name in ("boxes", "mask_queries")
    )
    object_index = _join([jnp.tile(g.object_index, (n, 1, 1)) for g, n in zip(groups, counts, strict=True)])[:, 0]
    num_rows, scale = (
        jnp.repeat(jnp.stack([getattr(g, name) for g in groups]), np.array(counts), total_repeat_length=sum(counts))
        for name in ("num_rows", "scale")
    )
    target_labels = jnp.moveaxis(targets.labels[:, object_index], 0, 1)
    target_boxes = jnp.moveaxis(targets.boxes[:, object_index], 0, 1).astype(boxes.dtype)

    is_main = np.cumsum(counts) - 1  # the last layer of each group
    kinds = [settings.iou_target if i in is_main else settings.aux_iou_target for i in range(sum(counts))]
    quality = _row_quality(
        kinds, boxes, target_boxes, mask_queries, mask_features, planes, object_index, num_rows, num_slots
    )
    class_sums, first = [], 0
    for g, n in zip(groups, counts, strict=True):
        rows = slice(first, first + n), slice(None), slice(g.query_index.shape[2])
        labels, query_quality = _scatter_rows(g, target_labels[rows], quality[rows])
        by_query = varifocal_loss(
            g.predictions.class_logits, labels, query_quality, alpha=settings.alpha, gamma=settings.gamma
        )
        class_sums.append(g.set_weights * jnp.sum(jnp.where(g.query_used, by_query, 0), axis=(1, 2)))
        first += n
    l1, giou = (jnp.sum(jnp.where(row_valid, x, 0), axis=(1, 2)) for x in box_losses(boxes, target_boxes))
    terms = {
        "class": weights.class_ * scale * jnp.concatenate(class_sums),
        "box_l1": weights.box_l1 * scale * l1,
        "box_giou": weights.box_giou * scale * giou,
    }
    mask_total, terms["mask_bce"], terms["mask_dice"] = point_losses(
        mask_queries,
        mask_features,
        planes,
        num_slots,
        PairedSets(object_index, row_valid, num_rows, scale, *map(jnp.asarray, (draws.candidates, draws.extra))),
        PointTerms(settings.num_important, weights.mask_bce, weights.mask_dice),
    )
    return mask_total + sum(jnp.sum(terms[name]) for name in ("class", "box_l1", "box_giou")), terms


def _join(arrays: list[Array], fill: float = 0) -> Array:
    """Stack sets of several groups, [S, B, R, ..] each, with rows padded to the largest R."""
    rows = max(x.shape[2] for x in arrays)
    padding = [[(0, 0), (0, 0), (0, rows - x.shape[2])] + [(0, 0)] * (x.ndim - 3) for x in arrays]
    return jnp.concatenate([jnp.pad(x, p, constant_values=fill) for x, p in zip(arrays, padding, strict=True)])


def _row_quality(
    kinds: list[str],
    boxes: Array,
    target_boxes: Array,
    mask_queries: Array,
    mask_features: Array,
    planes: Array,
    object_index: Array,
    num_rows: Array,
    num_slots: Array,
) -> Array:
    """What the class score of each row's query should become, [T, B, R], 0..1; one kind of IoU a set."""
    quality = box_quality(boxes, target_boxes)
    by_kind = {kind: np.array([i for i, k in enumerate(kinds) if k == kind], int) for kind in IOU_TARGETS}
    quality = quality.at[by_kind["none"]].set(1)
    index = by_kind["mask"]
    if len(index) == 0:
        return quality
    height, width = mask_features.shape[1:3]
    doubled = resize_planes(planes, 2 * height, 2 * width, num_slots)
    mask_iou = lax.map(
        lambda one_set: mask_iou_targets(one_set[0], mask_features, doubled, *one_set[1:]),
        (mask_queries[index], object_index[index], num_rows[index]),
    )
    return quality.at[index].set(mask_iou)


def _scatter_rows(group: _Group, row_labels: Array, row_quality: Array) -> tuple[Array, Array]:
    """Hand each query the label and the quality of its row: [S, B, R] each -> [S, B, Q]; K and 0 for the others."""
    sets, batch, queries, num_classes = group.predictions.class_logits.shape
    query = jnp.where(group.query_index >= 0, group.query_index, queries)  # past the end: dropped
    place = jnp.arange(sets)[:, None, None], jnp.arange(batch)[None, :, None], query
    labels = jnp.full((sets, batch, queries), num_classes, row_labels.dtype).at[place].set(row_labels, mode="drop")
    quality = jnp.zeros((sets, batch, queries), row_quality.dtype).at[place].set(row_quality, mode="drop")
    return labels, quality
