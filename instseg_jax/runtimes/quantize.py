"""Which layers of an ONNX graph an 8-bit export keeps in float32: a search over layers, on calibration pictures.

1. Layers go by groups of `GROUP` in the order of computing; a group's sensitivity is how far the detections move when
   it alone is in 8 bits, while the network goes on with the queries that it chose in float32. Single layers mislead: of
   N's stem of three, the middle one alone in float32 moved detections twice as far as none.
2. As few groups as possible stay float32, those first that are the most sensitive for the work that they save, so that
   detections agree with the float32 network's by `BUDGET`, as parity.json compares them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from instseg_jax.progress import track
from instseg_jax.runtimes.agreement import LEAST_COMPARED, SCORE_FLOOR, Found, box_iou, compare, mask_iou
from instseg_jax.runtimes.qdq import Calibration, calibrate, find_layers, open_graph, quantize_layers
from instseg_jax.runtimes.shape import OUTPUTS

GROUP = 3
MOST_FLOAT = 0.5  # of the work: a network that 8 bits do not suit is told by its parity, not left in float32
# Pictures for ranges, for the agreement and for sensitivities; of large ones fewer for these, but two.
CALIBRATED, AGREEING, MEASURED = 32, 16, 4
MEASURED_PIXELS = 4 * 320**2
# Least share of detections found again and least mean mask IoU, on the calibration pictures.
BUDGET = {"matched_share": 0.97, "mask_iou_mean": 0.95}

Detect = Callable[[onnx.ModelProto], list[Found]]


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that are in 8 bits together or not at all."""

    layers: tuple[onnx.NodeProto, ...]
    share: float  # of the work of all layers
    sensitivity: float


def quantize(graph: onnx.ModelProto, images: Sequence[np.ndarray]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph with 8-bit layers, calibrated on images [H, W, C], and what config.json says of the search."""
    size = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    height, width = images[0].shape[:2]
    measured = min(MEASURED, max(2, MEASURED_PIXELS // (height * width)))
    batches = make_batches(_some(images, CALIBRATED), size)
    layers = find_layers(graph)
    calibration = calibrate(graph, layers, track(batches, "calibrating", len(batches)))
    shares = {name: cost / sum(calibration.costs.values()) for name, cost in calibration.costs.items()}
    groups = measure_groups(graph, layers, shares, calibration, make_batches(_some(images, measured), size))
    compared = make_batches(_some(images, AGREEING), size)
    wanted = detect(graph, compared)

    def agreement(chosen: Sequence[Group]) -> dict[str, Any]:
        names = {layer.name for group in chosen for layer in group.layers}
        return compare(wanted, detect(quantize_layers(graph, names, calibration), compared))

    kept, agreed = choose(groups, agreement)
    in_float = [group for group in groups if group not in kept]
    chosen = {layer.name for group in kept for layer in group.layers}
    report = {
        "layers": len(layers),
        "in_8_bits": len(chosen),
        "work_in_8_bits": round(sum(group.share for group in kept), 4),
        "budget": BUDGET,
        "agreement": {name: agreed[name] for name in BUDGET},
        "in_float32": [_describe(group) for group in in_float],
        "sensitivities": [_describe(group) for group in kept],
    }
    return quantize_layers(graph, chosen, calibration), report


def choose(
    groups: Sequence[Group], agreement: Callable[[Sequence[Group]], dict[str, Any]]
) -> tuple[list[Group], dict[str, Any]]:
    """The groups to have in 8 bits, in their order, and how far they agree.

    As few as can be stay float32 by bisection over the groups by falling sensitivity for their work; where even
    `MOST_FLOAT` of the work does not keep to `BUDGET`, that much.
    """
    order = sorted(range(len(groups)), key=lambda i: -groups[i].sensitivity / groups[i].share)
    work = np.cumsum([0, *(groups[i].share for i in order)])
    tried: dict[int, dict[str, Any]] = {}

    def without(count: int) -> list[Group]:
        gone = set(order[:count])
        return [group for i, group in enumerate(groups) if i not in gone]

    def is_enough(count: int) -> bool:
        if count not in tried:
            tried[count] = agreement(without(count))
        return all((tried[count][name] or 0) >= least for name, least in BUDGET.items())

    most = int(np.searchsorted(work, MOST_FLOAT * work[-1], side="right")) - 1
    few, many = 0, most  # the answer is among few..many
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if is_enough(middle) else (middle + 1, many)
    is_enough(few)
    return without(few), tried[few]


def measure_groups(
    graph: onnx.ModelProto,
    layers: Sequence[onnx.NodeProto],
    shares: dict[str, float],
    calibration: Calibration,
    batches: Sequence[np.ndarray],
) -> list[Group]:
    """The groups of the layers, in their order, with the share of the work and the sensitivity of each."""
    held, selections = hold_selection(graph)
    chosen = [
        dict(zip(selections, found, strict=True))
        for found in _run(_with_outputs(graph, selections), batches, selections)
    ]
    names = [name for name in OUTPUTS if name != "labels"]
    wanted = list(_run(held, batches, names, chosen))
    groups = []
    parts = [tuple(layers[i : i + GROUP]) for i in range(0, len(layers), GROUP)]
    for part in track(parts, "layers in 8 bits, one by one", len(parts)):
        changed = quantize_layers(held, {layer.name for layer in part}, calibration)
        moved = [distance(*pair) for pair in zip(wanted, _run(changed, batches, names, chosen), strict=True)]
        groups.append(Group(part, sum(shares[layer.name] for layer in part), float(np.mean(moved))))
    return groups


def hold_selection(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The graph with what its TopK nodes choose as inputs, and their names: nearly equal scores change places."""
    held = onnx.ModelProto()
    held.CopyFrom(graph)
    selections = []
    for node in held.graph.node:
        if node.op_type == "TopK":
            values, selection = node.output
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
            node.CopyFrom(
                helper.make_node("GatherElements", [node.input[0], selection], [values], node.name, axis=axis)
            )
            selections.append(selection)
    held.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in selections)
    return held, selections


def distance(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """How far detections in the same order are from each other: 1 - IoU of masks and of boxes, and scores, added up.

    Each is (scores [B, T], boxes_xyxy [B, T, 4], mask_logits [B, T, h, w]); a detection weighs as much as its score.
    """
    (scores, boxes, logits), (other_scores, other_boxes, other_logits) = wanted, found
    is_compared = (scores >= SCORE_FLOOR) | (np.arange(scores.shape[1]) < LEAST_COMPARED)
    weight = scores[is_compared]
    masks = 1 - mask_iou(logits[is_compared] > 0, other_logits[is_compared] > 0)
    apart = masks + 1 - box_iou(boxes[is_compared], other_boxes[is_compared])
    apart = apart + np.abs(weight - other_scores[is_compared])
    return float(np.average(apart, weights=weight + np.finfo(np.float32).tiny))


def detect(graph: onnx.ModelProto, batches: Sequence[np.ndarray]) -> list[Found]:
    """What a graph detects, image by image."""
    return [Found(*arrays) for found in _run(graph, batches, OUTPUTS) for arrays in zip(*found, strict=True)]


def make_batches(images: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Images in batches [size, H, W, C], the last one filled up with the first images."""
    count = -(-len(images) // size)
    return [np.stack([images[i % len(images)] for i in range(k * size, (k + 1) * size)]) for k in range(count)]


def _run(
    graph: onnx.ModelProto,
    batches: Sequence[np.ndarray],
    names: Sequence[str],
    others: Sequence[dict[str, np.ndarray]] | None = None,
) -> Iterable[list[np.ndarray]]:
    run = open_graph(graph)
    return (run(batch, names, others[i] if others else None) for i, batch in enumerate(batches))


def _with_outputs(graph: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    seen = onnx.ModelProto()
    seen.CopyFrom(graph)
    seen.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in names)
    return seen


def _some(images: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """At most `count` of the images, evenly over all."""
    return [images[i] for i in np.unique(np.linspace(0, len(images) - 1, count).round().astype(int))]


def _describe(group: Group) -> dict[str, Any]:
    return {
        "layers": [layer.doc_string or layer.name for layer in group.layers],
        "sensitivity": round(group.sensitivity, 5),
        "work": round(group.share, 5),
    }
