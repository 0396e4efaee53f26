"""Writing a network as a file of each format: network and weights in, one model file out.

Every file takes images [B, H, W, C] float32 in 0..1 and gives the best detections: scores [B, T], labels [B, T],
boxes_xyxy [B, T, 4] (normalised corners) and mask_logits [B, T, H/4, W/4]. Weights are inside the file: there is
nothing that could get lost or mixed up, and compilers fold what follows from them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from instseg_jax.files import write_bytes
from instseg_jax.inference.postprocess import select_detections
from instseg_jax.models.mask_rtdetr import MaskRTDETR
from instseg_jax.types import Outputs

PLATFORMS = ("cpu", "cuda")  # that a StableHLO file runs on
OUTPUTS = ("scores", "labels", "boxes_xyxy", "mask_logits")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of what a file takes and how much it gives."""

    batch: int
    size: int  # of the square input, in pixels
    channels: int
    num_detections: int
    dynamic_batch: bool


def write(
    path: Path,
    model: MaskRTDETR,
    variables: dict,
    shape: Shape,
    *,
    format: str,
    precision: str,
    calibration: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Write the file of a format; returns what config.json is to say of it: inputs, outputs, opset and the like.

    `precision` is "", half or int8; `calibration` images are for int8 alone.
    """
    if format == "stablehlo":
        return write_stablehlo(path, model, variables, shape, half=precision == "half")
    raise ValueError(f"format is {format!r}")


def write_stablehlo(path: Path, model: MaskRTDETR, variables: dict, shape: Shape, *, half: bool) -> dict[str, Any]:
    """Write StableHLO by `jax.export`; runs with jax alone on the CPU and with CUDA. `half`: in bfloat16."""
    if half:
        model = model.clone(dtype=jnp.bfloat16)
        variables = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), variables)

    def detect(images: jax.Array) -> tuple[jax.Array, ...]:
        restored = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), variables) if half else variables
        outputs = cast(Outputs, model.apply(restored, images))
        found = select_detections(outputs, num_detections=shape.num_detections)
        return tuple(getattr(found, name).astype(_TYPES[name]) for name in OUTPUTS)

    batch = jax.export.symbolic_shape("b")[0] if shape.dynamic_batch else shape.batch
    images = jax.ShapeDtypeStruct((batch, shape.size, shape.size, shape.channels), jnp.float32)
    exported = jax.export.export(jax.jit(detect), platforms=PLATFORMS)(images)
    write_bytes(path, bytes(exported.serialize()))
    outputs = [(name, aval.shape, aval.dtype) for name, aval in zip(OUTPUTS, exported.out_avals, strict=True)]
    return {
        "inputs": [_describe("images", images.shape, images.dtype)],
        "outputs": [_describe(*output) for output in outputs],
        "platforms": list(PLATFORMS),
        "calling_convention": exported.calling_convention_version,
    }


_TYPES = {"scores": jnp.float32, "labels": jnp.int32, "boxes_xyxy": jnp.float32, "mask_logits": jnp.float32}


def _describe(name: str, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
    """An input or output as config.json says it; a length that is not fixed is "batch"."""
    lengths = [side if isinstance(side, int) and side > 0 else "batch" for side in shape]
    return {"name": name, "shape": lengths, "dtype": str(np.dtype(dtype))}
