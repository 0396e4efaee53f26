"""The network as an ONNX graph, detection selection inside: images in, `Detections` out.

The graph has one input and the fields of `types.Detections` as outputs:

    images      [B, H, W, C] float32, 0..1; C = 3: RGB
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
from instseg_jax.models.mask_rtdetr import MaskRTDETR

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

    Raises: ImportError that names the extra where onnx is missing.
    """
    try:
        from instseg_jax.deploy.onnx_translate import translate
    except ImportError as error:
        raise ImportError('ONNX files are made with onnx: pip install "instseg_jax[export]".') from error
    if isinstance(model, MaskRTDETR):
        model = model.clone(dtype=None)  # half precision is for the runtime to choose
    model, variables = optimize_for_inference(model, variables)
    variables = jax.tree.map(jnp.asarray, variables)

    def detect(images: jax.Array) -> tuple[jax.Array, ...]:
        found = select_detections(model.apply(variables, images), num_detections=num_detections)
        return tuple(getattr(found, name) for name in OUTPUTS)

    channels = variables["params"]["backbone"]["stem"]["stem1"]["conv"]["kernel"].shape[2]
    shape = (None if dynamic_batch else batch, *size, channels)
    return translate(detect, shape, input_name=INPUT, output_names=OUTPUTS, opset=OPSET)
