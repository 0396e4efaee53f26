"""Write variables as the official tools read them, and read safetensors files.

Names, layouts and bits are those of the official state dict (`names`), so a model trained here runs there. Pickles are
written in `paddle`; exporting a program (StableHLO, ONNX) is not done here.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instseg_jax.files import check_seal, digest, seal, sync
from instseg_jax.messages import quote, shorten
from instseg_jax.weights.names import flax_to_official
from instseg_jax.weights.paddle import write_pdparams

FORMATS = ("pdparams", "safetensors")

_DIGESTS = "instseg_jax_digests"  # key in a safetensors header: {tensor: digest}, sealed
_METADATA = "instseg_jax"  # key in a safetensors header; its values are strings, ours is JSON


def export_weights(
    path: str | os.PathLike[str],
    variables: Mapping[str, Any],
    *,
    format: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    half: bool = False,
) -> Path:
    """Write {"params": ..., "batch_stats": ...} to `path` under the official names and return the path.

    `format` is "pdparams" or "safetensors", by default what the path ends with. `metadata` (config, class names, ...,
    as in a checkpoint) goes into the header of a safetensors file, which then says itself what it is. `half` stores
    float16, half the size; readers widen it again. An existing file is replaced only once the new one is complete.
    Raises ValueError for another format, and for half precision in a .pdparams file, which no official tool takes.
    """
    path = Path(path)
    format = format or path.suffix.removeprefix(".")
    if format not in FORMATS:
        raise ValueError(f"weights format {quote(format)} of {path} is not one of {', '.join(FORMATS)}")
    if half and format != "safetensors":
        raise ValueError(f"half precision is for safetensors, not for {format}: the official tools take float32 alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = flax_to_official(variables)
    if half:
        state = {name: np.asarray(tensor, np.float16) for name, tensor in state.items()}
    if format == "pdparams":
        write_pdparams(path, state)
    else:
        write_safetensors(path, state, metadata)
    return path


def write_safetensors(
    path: str | os.PathLike[str], state: Mapping[str, np.ndarray], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors by name, and JSON metadata, to a safetensors file; an existing file is replaced."""
    from safetensors.numpy import save_file

    path = Path(path)
    partial = path.with_name(f"{path.name}.part-{os.getpid()}")
    # safetensors writes the memory as it lies, so it must lie in order
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in state.items()}
    digests = {name: digest(tensor.reshape(-1).view(np.uint8)) for name, tensor in tensors.items()}
    header = {"format": "np"}
    if metadata is not None:
        header[_METADATA] = json.dumps(dict(metadata))
        digests[_METADATA] = digest(header[_METADATA].encode())
    header[_DIGESTS] = json.dumps(seal(digests))
    try:
        save_file(tensors, partial, header)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file by name.

    Raises ValueError for a file that is none, is cut short, or holds other numbers than `write_safetensors` wrote; the
    files of other tools have no digests to check.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
        digests = _read_digests(header, path)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({shorten(error)})") from error
    digests.pop(_METADATA, None)
    for name, wanted in digests.items():
        if name not in tensors or digest(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8)) != wanted:
            raise ValueError(f"{path} is damaged: the tensor {shorten(name)} is not what was written")
    return tensors


def read_safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata that `export_weights` put into a safetensors file; empty for files of other tools.

    Raises ValueError for a file that is no complete safetensors file, or whose metadata is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
        text = header.get(_METADATA, "{}")
        found, wanted = digest(text.encode()), _read_digests(header, path).get(_METADATA)
        if wanted not in (None, found):
            raise ValueError(f"{path} is damaged: its metadata are not what was written")
        return check_seal(json.loads(text), str(path))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({shorten(error)})") from error


def _read_digests(header: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, str]:
    """Digests of the tensors and, under its key, of the metadata; empty for files of other tools."""
    return check_seal(json.loads(header.get(_DIGESTS, "{}")), str(path), is_sealed=_DIGESTS in header)
