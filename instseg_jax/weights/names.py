"""Names of tensors: the official state dict on one side, Flax variable trees on the other.

The mapping is mechanical and needs no table. A dotted official name becomes a tree path by merging each
numeric component into the one before it, and the last component, together with the rank, says which leaf it is:

    official                                        Flax
    backbone.stages.0.blocks.1.X.conv.weight        params/backbone/stages_0/blocks_1/X/conv/kernel
        [out, in, kh, kw]                               [kh, kw, in, out]   (depthwise: [C, 1, k, k] <-> [k, k, 1, C])
    transformer.score_head.weight [in, out]         params/transformer/score_head/kernel [in, out]
    transformer.denoising_class_embed.weight        params/transformer/denoising_class_embed/embedding
    neck.input_proj.0.1.weight [C]                  params/neck/input_proj_0_1/scale
    neck.input_proj.0.1._mean, ._variance           batch_stats/neck/input_proj_0_1/mean, /var
    X.bias, X.in_proj_weight, X.in_proj_bias        the same names under params

Files are read and written elsewhere (`paddle`, `export`), and merged into a model in `merge`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from instseg_jax.messages import quote

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 classes of the official COCO weights, in the order of their logits."""

_KEPT_LEAVES = ("bias", "in_proj_weight", "in_proj_bias")
_STATISTICS = {"_mean": "mean", "_variance": "var"}
_OFFICIAL_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "_mean", "var": "_variance"}
_OFFICIAL_LEAVES |= {name: name for name in _KEPT_LEAVES}
_NUMBERED = re.compile(r"(.+?)((?:_\d+)+)")


def official_to_path(name: str, rank: int) -> str:
    """Return the tree path, "params/..." or "batch_stats/...", of the official tensor `name` of that rank.

    Raises ValueError for a name that no layer of this network has.
    """
    *modules, leaf = name.split(".")
    path: list[str] = []
    for module in modules:
        if module.isdecimal() and path:
            path[-1] += f"_{module}"
        else:
            path.append(module)
    if modules and leaf in _STATISTICS:
        return "/".join(("batch_stats", *path, _STATISTICS[leaf]))
    if modules and leaf in _KEPT_LEAVES:
        return "/".join(("params", *path, leaf))
    if modules and leaf == "weight" and rank in (1, 2, 4):
        is_embedding = rank == 2 and "embed" in modules[-1]
        return "/".join(("params", *path, "scale" if rank == 1 else "embedding" if is_embedding else "kernel"))
    raise ValueError(f"tensor {quote(name)} of rank {rank} has no place in this network")


def path_to_official(path: str) -> str:
    """Return the official name of the leaf at tree path `path` ("params/..." or "batch_stats/...").

    Raises: ValueError for a leaf that no layer of this network has.
    """
    collection, *modules, leaf = path.split("/")
    if collection not in ("params", "batch_stats") or leaf not in _OFFICIAL_LEAVES:
        raise ValueError(f"leaf {quote(path)} has no official name (known leaves: {', '.join(_OFFICIAL_LEAVES)})")
    names = []
    for module in modules:
        numbered = _NUMBERED.fullmatch(module)
        names.append(numbered[1] + numbered[2].replace("_", ".") if numbered else module)
    return ".".join((*names, _OFFICIAL_LEAVES[leaf]))


def official_to_flax(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Turn an official state dict into {"params": ..., "batch_stats": ...}; values keep every bit."""
    flat = {}
    for name, tensor in state.items():
        path = official_to_path(name, np.ndim(tensor))
        flat[path] = np.ascontiguousarray(tensor.transpose(2, 3, 1, 0)) if np.ndim(tensor) == 4 else tensor
    return {"params": {}, "batch_stats": {}} | unflatten_tree(flat)


def flax_to_official(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turn {"params": ..., "batch_stats": ...} into an official state dict; values keep every bit."""
    state = {}
    for path, value in flatten_tree(variables).items():
        tensor = np.asarray(value)
        if tensor.ndim == 4:
            tensor = np.ascontiguousarray(tensor.transpose(3, 2, 0, 1))
        state[path_to_official(path)] = tensor
    return state


def flatten_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to {"a/b/c": leaf}, in the order of the tree."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_tree(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten_tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest {"a/b/c": leaf} again: the inverse of `flatten_tree`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
