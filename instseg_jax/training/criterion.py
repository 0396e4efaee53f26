"""The training loss: every prediction set is matched with the objects and scored, terms are named and added up.

Formulas are in `losses.py` and `point_losses.py`, the assignment in `matching.py`.
Source: PaddleDetection at 666f597fd0, ppdet/modeling/losses/detr_loss.py (DETRLoss, DINOLoss, MaskDINOLoss).

Differences from the reference: an image without objects beside images with some adds only its background class
loss (the reference stops with an error there); points are shared, see `point_losses.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from instseg_jax.models.denoising import count_slots
from instseg_jax.training.losses import box_losses, box_quality, varifocal_loss
from instseg_jax.training.mask_planes import pack_masks, resize_planes
from instseg_jax.training.matching import TermWeights, match
from instseg_jax.training.point_losses import mask_iou_targets, point_losses
from instseg_jax.training.sharding import DATA_AXIS
from instseg_jax.types import DenoisingQueries, Predictions, Targets, TrainingOutputs

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
    """Uniform points (x, y) in 0..1 of one step: all the randomness of the loss.

    The third dimension of candidates and extra is 1 (all masks of an image share the points of a set) or the
    number of target slots, respectively denoising slots (each has its own). M matcher points, C candidates, E extra.
    """

    matcher: Array  # [S, B, M, 2]
    candidates: Array  # [S, B, 1 or N, C, 2]
    extra: Array  # [S, B, 1 or N, E, 2]
    denoising_candidates: Array | None  # [S - 1, B, 1 or D, C, 2]
    denoising_extra: Array | None  # [S - 1, B, 1 or D, E, 2]


def build_loss_settings(config) -> LossSettings:
    """Read the section `loss` of a config.

    Raises: ValueError for a choice, a ratio or a number of points that is not allowed.
    """
    for name in ("iou_target", "aux_iou_target"):
        if config[name] not in IOU_TARGETS:
            raise ValueError(f"loss.{name} is {config[name]!r}, it must be one of {', '.join(IOU_TARGETS)}")
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


def draw_points(rng: Array, settings: LossSettings, outputs: TrainingOutputs) -> PointDraws:
    """Draw the points of a step, shared by the masks of an image. The same key gives the same points on any mesh."""
    sets, batch = outputs.matching.boxes.shape[:2]
    denoising_sets = 0 if outputs.denoising is None else outputs.denoising.boxes.shape[0]
    num_extra = settings.num_points - settings.num_important
    shapes = [(sets, batch, settings.num_points)]
    for n in (sets, denoising_sets):
        shapes += [(n, batch, 1, settings.num_candidates), (n, batch, 1, num_extra)]
    # One call for all bits: every call adds a second of compilation on a CPU.
    shapes = [(*shape[:-1], shape[-1] + 1) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    bits = jnp.split(jax.random.bits(rng, (sum(sizes),), jnp.uint32), np.cumsum(sizes)[:-1])
    draws = [_sorted_points(part.reshape(shape)) for part, shape in zip(bits, shapes, strict=True)]
    return PointDraws(*draws[:3], *(draws[3:] if denoising_sets else (None, None)))


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


def compute_losses(
    outputs: TrainingOutputs,
    targets: Targets,
    denoising: DenoisingQueries | None,
    draws: PointDraws,
    settings: LossSettings,
    *,
    mesh: Mesh | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Loss of a step.

    Args:
      outputs: predictions of any float type; the loss is computed in float32 or wider.
      targets: objects of the (global) batch.
      denoising: what was fed beside the queries; None exactly when outputs.denoising is None.
      draws: from `draw_points`.
      settings: weights and choices.
      mesh: devices over whose axis "data" the batch is split; each then matches and scores its own images.

    Returns: the sum of all terms, and the terms by name: `loss/class`, `loss/box_l1`, `loss/box_giou`,
      `loss/mask_bce`, `loss/mask_dice` of the last layer; the same with `/encoder`, `/initial`, `/layer0` .. for
      the other sets and `/denoising`, `/denoising/initial`, `/denoising/layer0` .. for the denoising slots. Terms
      are weighted already. Differentiate the sum: of the mask terms alone no gradient comes.
      The sum is not finite exactly when a term is not.

    Raises: ValueError when predictions and denoising queries don't fit together.
    """
    if (denoising is None) != (outputs.denoising is None):
        raise ValueError("denoising queries and their predictions must both be given, or neither")
    outputs = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), outputs)
    targets = jax.tree.map(jnp.asarray, targets)
    num_objects = jnp.sum(targets.valid)
    # The same for every device: how many objects there are in the whole batch, and its denoising groups.
    batch_facts = {"num_objects": num_objects, "num_groups": 1 if denoising is None else denoising.num_groups}

    def score(*args):
        sums = _score_images(*args, settings)
        return jax.tree.map(lambda x: x[None], sums)  # one row a device

    if mesh is not None:
        split, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
        by_set = PartitionSpec(None, DATA_AXIS)
        dn_spec = None if denoising is None else DenoisingQueries(split, split, whole, split, whole, whole)
        outputs_spec = TrainingOutputs(by_set, None if denoising is None else by_set, split)
        score = jax.shard_map(
            score,
            mesh=mesh,
            in_specs=(outputs_spec, split, dn_spec, by_set, whole),
            out_specs=split,
            check_vma=False,
        )
    parts = score(outputs, targets, denoising, draws, batch_facts)
    total, matching, denoised = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)

    names = set_names(matching["class"].shape[0], denoising is not None)
    terms = {f"loss/{term}{name}": matching[term][i] for i, name in enumerate(names) for term in TERMS}
    if denoising is not None:
        names = [f"/denoising{name}" for name in names[1:]]  # nothing is denoised before the decoder
        terms |= {f"loss/{term}{name}": denoised[term][i] for i, name in enumerate(names) for term in TERMS}
    return total, terms


def set_names(num_sets: int, use_denoising: bool) -> list[str]:
    """Suffixes of the matching sets' terms, in their order; that of the last layer is empty."""
    first = ["/encoder", "/initial"] if use_denoising else ["/encoder"]
    return first + [f"/layer{i}" for i in range(num_sets - len(first) - 1)] + [""]


def _score_images(
    outputs: TrainingOutputs,
    targets: Targets,
    denoising: DenoisingQueries | None,
    draws: PointDraws,
    batch_facts: dict[str, Array],
    settings: LossSettings,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Total, matching terms [S] and denoising terms [S - 1] of the images of one device."""
    slots = targets.valid.shape[1]
    num_slots = count_slots(targets.valid)
    planes = pack_masks(targets.masks, num_slots)
    height, width = outputs.mask_features.shape[1:3]
    doubled = resize_planes(planes, 2 * height, 2 * width, num_slots)
    dtype = outputs.matching.boxes.dtype
    num_objects = batch_facts["num_objects"]
    scale = 1 / jnp.maximum(num_objects, 1).astype(dtype)

    query_index = match(
        outputs.matching, outputs.mask_features, targets, planes, num_slots, draws.matcher, settings.match_weights
    )
    masks = outputs.mask_features, planes, doubled, num_slots
    set_weights = jnp.ones(len(query_index), dtype)
    if denoising is not None:  # the reference has no `initial` set in a batch without objects
        set_weights = set_weights.at[1].set((num_objects > 0).astype(dtype))
    total, matching = _score_sets(
        outputs.matching,
        masks,
        targets,
        query_index=query_index,
        object_index=jnp.arange(slots, dtype=jnp.int32),
        num_rows=num_slots,
        candidates=draws.candidates,
        extra=draws.extra,
        scale=scale,
        set_weights=set_weights,
        query_used=None,
        settings=settings,
    )
    if denoising is None:
        return total, matching, {}

    queries = jnp.arange(len(denoising.object_index), dtype=jnp.int32)
    query_used = jnp.diagonal(denoising.attention_mask)[: len(queries)]  # slots in use, and only they, see themselves
    # A slot past the last object of this device's images may be in use for other devices' images.
    num_rows = count_slots(denoising.valid)
    denoising_index = jnp.where(denoising.valid, queries, -1)
    denoising_total, denoised = _score_sets(
        outputs.denoising,
        masks,
        targets,
        query_index=jnp.broadcast_to(denoising_index, (len(outputs.denoising.boxes), *denoising_index.shape)),
        object_index=denoising.object_index,
        num_rows=num_rows,
        candidates=draws.denoising_candidates,
        extra=draws.denoising_extra,
        scale=scale / batch_facts["num_groups"],
        set_weights=jnp.ones(len(outputs.denoising.boxes), dtype),
        query_used=query_used,
        settings=settings,
    )
    return total + denoising_total, matching, denoised


def _score_sets(
    predictions: Predictions,
    masks: tuple[Array, Array, Array, Array],
    targets: Targets,
    *,
    query_index: Array,
    object_index: Array,
    num_rows: Array,
    candidates: Array,
    extra: Array,
    scale: Array,
    set_weights: Array,
    query_used: Array | None,
    settings: LossSettings,
) -> tuple[Array, dict[str, Array]]:
    """Score S prediction sets whose query query_index [S, B, R] (-1 for none) answers for object_index [R].

    Args:
      masks: mask features; target masks as bit planes; these at twice the features' resolution; slots in use.
      num_rows: [] rows from here on hold nothing.
      scale: [] factor on all terms.
      set_weights: [S] factor on the class terms.
      query_used: [Q] queries that count at all; None for all.

    Returns: the sum of all terms and the terms [S].
    """
    mask_features, planes, doubled, num_slots = masks
    row_valid = query_index >= 0
    queries = jnp.maximum(query_index, 0)
    boxes = _take_queries(predictions.boxes, queries)
    mask_queries = _take_queries(predictions.mask_queries, queries)
    target_boxes = targets.boxes[:, object_index].astype(boxes.dtype)
    target_labels = targets.labels[:, object_index]
    weights = settings.weights

    def quality(kind: str, i: slice) -> Array:
        if kind == "box":
            return box_quality(boxes[i], target_boxes)
        if kind == "none":
            return jnp.ones_like(boxes[i, ..., 0])
        return lax.map(
            lambda rows: mask_iou_targets(rows, mask_features, doubled, object_index, num_rows), mask_queries[i]
        )

    row_quality = jnp.concatenate(
        [quality(settings.aux_iou_target, slice(0, -1)), quality(settings.iou_target, slice(-1, None))]
    )
    num_queries, num_classes = predictions.class_logits.shape[-2:]
    labels, query_quality = _scatter_rows(
        query_index, jnp.broadcast_to(target_labels, row_valid.shape), row_quality, num_queries, num_classes
    )
    by_query = varifocal_loss(
        predictions.class_logits, labels, query_quality, alpha=settings.alpha, gamma=settings.gamma
    )
    if query_used is not None:
        by_query = jnp.where(query_used, by_query, 0)
    l1, giou = box_losses(boxes, target_boxes)

    def add_up(x: Array) -> Array:
        return jnp.sum(x, axis=(1, 2)) * scale

    terms = {
        "class": weights.class_ * set_weights * add_up(by_query),
        "box_l1": weights.box_l1 * add_up(jnp.where(row_valid, l1, 0)),
        "box_giou": weights.box_giou * add_up(jnp.where(row_valid, giou, 0)),
    }
    mask_total, terms["mask_bce"], terms["mask_dice"] = point_losses(
        mask_queries, mask_features, planes, num_slots, object_index, row_valid, num_rows, scale,
        candidates, extra, settings.num_important, weights.mask_bce, weights.mask_dice,
    )  # fmt: skip
    return mask_total + sum(jnp.sum(terms[name]) for name in ("class", "box_l1", "box_giou")), terms


def _take_queries(x: Array, query_index: Array) -> Array:
    """x [S, B, Q, C], query_index [S, B, R] -> [S, B, R, C]."""
    return jnp.take_along_axis(x, query_index[..., None], axis=2)


def _scatter_rows(
    query_index: Array, row_labels: Array, row_quality: Array, num_queries: int, num_classes: int
) -> tuple[Array, Array]:
    """Hand each query the label and the quality of its row: [S, B, R] each -> [S, B, Q]; K and 0 for the others."""
    sets, batch, _ = query_index.shape
    place = (jnp.arange(sets)[:, None, None], jnp.arange(batch)[None, :, None])
    place += (jnp.where(query_index >= 0, query_index, num_queries),)  # past the end: dropped
    labels = jnp.full((sets, batch, num_queries), num_classes, row_labels.dtype).at[place].set(row_labels, mode="drop")
    quality = jnp.zeros((sets, batch, num_queries), row_quality.dtype).at[place].set(row_quality, mode="drop")
    return labels, quality


def sum_terms(terms: dict[str, Array]) -> dict[str, Array]:
    """Add up sets as the reference logs them: `class`, `class_aux`, `class_dn`, `class_aux_dn`, and so on."""
    sums = {f"{term}{aux}{dn}": jnp.zeros(()) for dn in ("", "_dn") for aux in ("", "_aux") for term in TERMS}
    for name, value in terms.items():
        _, term, *rest = name.split("/")
        is_denoising = rest[:1] == ["denoising"]
        is_aux = len(rest) > is_denoising
        key = f"{term}{'_aux' if is_aux else ''}{'_dn' if is_denoising else ''}"
        sums[key] = sums[key] + value
    return sums
