"""The network as an ONNX graph, detection selection inside: images in, `Detections` out.

The graph has one input and the fields of `types.Detections` as outputs:

    images      [B, H, W, 3] float32 RGB, 0..1
    scores      [B, T] float32, falling
    labels      [B, T] int32, class index
    boxes_xyxy  [B, T, 4] float32, normalised corners, not clipped
    mask_logits [B, T, H/4, W/4] float32
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from instseg_jax.inference.optimize import optimize_for_inference
from instseg_jax.inference.postprocess import select_detections

if TYPE_CHECKING:
    import onnx

OPSET = 21
INPUT = "images"
OUTPUTS = ("scores", "labels", "boxes_xyxy", "mask_logits")


def build_onnx(
    model: Any,
    variables: dict,
    *,
    batch: int,
    size: tuple[int, int],
    num_detections: int,
    dynamic_batch: bool = False,
) -> "onnx.ModelProto":
    """Export a network (as trained, or optimised already) with `select_detections` behind it.

    `size` is (height, width) of the images, multiples of 32. With `dynamic_batch` the graph takes any number of
    images, and `batch` is ignored. Weights are inside the graph.

    Raises: ImportError that names the extra where jax2onnx is missing.
    """
    try:
        import jax2onnx
    except ImportError as error:
        raise ImportError('ONNX files are made by jax2onnx: pip install "instseg_jax[export]".') from error
    model, variables = optimize_for_inference(model, variables)
    variables = jax.tree.map(jnp.asarray, variables)

    def detect(images: jax.Array) -> tuple[jax.Array, ...]:
        found = select_detections(model.apply(variables, images), num_detections=num_detections)
        return tuple(getattr(found, name) for name in OUTPUTS)

    return jax2onnx.to_onnx(
        detect,
        inputs=[("B" if dynamic_batch else batch, *size, 3)],
        model_name="mask_rtdetr",
        opset=OPSET,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
    )
