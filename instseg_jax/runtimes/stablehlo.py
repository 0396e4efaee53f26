"""StableHLO by `jax.export`: runs with jax alone, on the CPU and with CUDA."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from instseg_jax.devices import select_devices
from instseg_jax.files import write_bytes
from instseg_jax.messages import quote
from instseg_jax.runtimes.shape import INPUT, OUTPUTS, Shape, describe

PLATFORMS = ("cpu", "cuda")  # that a file runs on


def write_stablehlo(
    path: Path, make_detect: Any, shape: Shape, precision: str, calibration: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Write the file; `precision` "half": weights and network in bfloat16."""
    detect = make_detect(jnp.dtype(jnp.bfloat16) if precision == "half" else None)
    batch = jax.export.symbolic_shape("b")[0] if shape.dynamic_batch else shape.batch
    images = jax.ShapeDtypeStruct((batch, *shape.images[1:]), jnp.float32)
    exported = jax.export.export(jax.jit(detect), platforms=PLATFORMS)(images)
    write_bytes(path, bytes(exported.serialize()))
    outputs = [(name, aval.shape, aval.dtype) for name, aval in zip(OUTPUTS, exported.out_avals, strict=True)]
    return {
        "inputs": [describe(INPUT, images.shape, images.dtype)],
        "outputs": [describe(*output) for output in outputs],
        "platforms": list(PLATFORMS),
        "calling_convention": exported.calling_convention_version,
    }


def open_stablehlo(path: Path, settings: Mapping[str, Any], device: str, num_threads: int | None) -> Any:
    """A function that runs the file. Raises ValueError for a device that it was not exported for."""
    chosen = select_devices(device)[0]
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    platform = "cuda" if chosen.platform == "gpu" else chosen.platform
    if platform not in exported.platforms:
        raise ValueError(f"device is {quote(device)}, but {path} was exported for {' and '.join(exported.platforms)}")
    call = jax.jit(exported.call)
    return lambda images: tuple(jax.device_get(call(jax.device_put(images, chosen))))
