"""ONNX for QGIS' plugin Deepness, laid out as it reads YOLO's instance segmentation: one picture, channels first.

    image       [1, 3, H, W] float32, 0..1, RGB
    detections  [1, 4 + classes + T, T]: box (cx, cy, w, h in pixels of the image), a score for each class, coefficients
    prototypes  [1, T, H/4, W/4]: here the mask logits of the T detections; the coefficients choose each its own

The plugin adds up coefficients times prototypes, which gives our masks, then cuts them at the boxes and suppresses
boxes that overlap, whatever their class.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.runtimes.onnx import describe_graph, open_session, write_onnx
from instseg_jax.runtimes.shape import INPUT, OUTPUTS, Shape

IMAGE, DETECTIONS, PROTOTYPES = "image", "detections", "prototypes"
OVERLAP_PERCENT = 25  # of neighbouring windows
MOST_OVERLAP = 0.7  # IoU of boxes: from here on the plugin keeps the surer one


def write_deepness(
    path: Path, make_detect: Any, shape: Shape, precision: str, calibration: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write the plain ONNX file, which `finish_deepness` then rearranges. Raises ValueError for several images."""
    if shape.batch != 1 or shape.channels != 3:
        raise ValueError(f"--format=deepness takes one RGB picture, not {shape.batch} of {shape.channels} channels")
    return write_onnx(path, make_detect, shape, precision, calibration)


def finish_deepness(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rearrange a plain ONNX file and say in it what the plugin asks for; returns its inputs and outputs.

    `settings` is what config.json says of the export.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path))
    graph, names = model.graph, settings["class_names"]
    height, width = settings["preprocessing"]["size"]
    logits = [side.dim_value for side in graph.output[OUTPUTS.index("mask_logits")].type.tensor_type.shape.dim]
    count = logits[1]
    constants: dict[str, np.ndarray] = {
        "deepness_corners": np.array(
            [
                [width / 2, 0, -width, 0],
                [0, height / 2, 0, -height],
                [width / 2, 0, width, 0],
                [0, height / 2, 0, height],
            ],
            np.float32,
        ),
        "deepness_classes": np.array(len(names), np.int32),
        "deepness_off_on": np.array([0, 1], np.float32),
        "deepness_last": np.array([2], np.int64),
        "deepness_coefficients": np.eye(count, dtype=np.float32)[None],
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [
        helper.make_node("Transpose", [IMAGE], [INPUT], perm=[0, 2, 3, 1]),
        *graph.node,
        helper.make_node("MatMul", ["boxes_xyxy", "deepness_corners"], ["deepness_boxes"]),
        helper.make_node("OneHot", ["labels", "deepness_classes", "deepness_off_on"], ["deepness_hot"], axis=2),
        helper.make_node("Unsqueeze", ["scores", "deepness_last"], ["deepness_scores"]),
        helper.make_node("Mul", ["deepness_hot", "deepness_scores"], ["deepness_probabilities"]),
        helper.make_node(
            "Concat", ["deepness_boxes", "deepness_probabilities", "deepness_coefficients"], ["deepness_rows"], axis=2
        ),
        helper.make_node("Transpose", ["deepness_rows"], [DETECTIONS], perm=[0, 2, 1]),
        helper.make_node("Identity", ["mask_logits"], [PROTOTYPES]),
    ]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(IMAGE, TensorProto.FLOAT, [1, 3, height, width]))
    rows = 4 + len(names) + count
    graph.output.append(helper.make_tensor_value_info(DETECTIONS, TensorProto.FLOAT, [1, rows, count]))
    graph.output.append(helper.make_tensor_value_info(PROTOTYPES, TensorProto.FLOAT, logits))
    said: dict[str, Any] = {
        "model_type": "Detector",
        "det_type": "YOLO_Ultralytics_segmentation",
        "class_names": {str(number): name for number, name in enumerate(names)},
        "tile_size": width,
        "tiles_overlap": OVERLAP_PERCENT,
        "det_conf": min(settings["thresholds"]),
        "det_iou_thresh": MOST_OVERLAP,
        "det_remove_overlap": True,
    }
    gsd = settings["config"]["data"]["map_gsd"]
    if gsd is not None:
        said["resolution"] = 100 * gsd  # centimetres
    for key, value in said.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return describe_graph(model)


def open_deepness(path: Path, settings: Mapping[str, Any], device: str, num_threads: int | None) -> Any:
    """A function that runs such a file and gives the arrays of `OUTPUTS`, as every export does."""
    session = open_session(path, device, num_threads)
    height, width = settings["preprocessing"]["size"]
    classes = len(settings["class_names"])

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        rows, prototypes = session.run(None, {IMAGE: np.ascontiguousarray(np.moveaxis(images, 3, 1))})
        rows = rows.transpose(0, 2, 1)
        middle, half = rows[..., :2], rows[..., 2:4] / 2
        boxes = np.concatenate([middle - half, middle + half], axis=2) / np.array([width, height] * 2, np.float32)
        scores = rows[..., 4 : 4 + classes]
        logits = np.einsum("btm,bmhw->bthw", rows[..., 4 + classes :], prototypes)
        return scores.max(axis=2), scores.argmax(axis=2).astype(np.int32), boxes.astype(np.float32), logits

    return run
