"""The form of the network that answers quickest: the same function with fewer operations.

`optimize_for_inference` turns a network and its variables into the folded form that `models/` describes beside the
trained one. Every change is exact: outputs differ by rounding alone.

Not here: what the form looks like (the attribute `folded` of the modules), and what is special to ONNX
(`export/onnx_writer_tmp.py`).
"""

from typing import Any

import numpy as np

from instseg_jax.models.linear import NORM_EPS
from instseg_jax.models.mask_rtdetr import MaskRTDETR


def optimize_for_inference(model: Any, variables: dict) -> tuple[Any, dict]:
    """Fold batch norms and parallel branches into convolutions, and leave out what inference does not need.

    Returns (model, variables) for `model.apply(variables, images)`, which then gives `FactoredOutputs`; the variables
    are numpy arrays of the same types as before. A network that is folded already, or of another kind, comes back as
    it is.
    """
    if not isinstance(model, MaskRTDETR) or model.folded:
        return model, variables
    params = _fold(variables["params"], variables["batch_stats"])
    del params["transformer"]["denoising_class_embed"]  # training alone looks at it
    return model.clone(folded=True), {"params": params}


def _fold(params: dict, stats: dict) -> dict:
    """The tree with every convolution and the batch norm behind it made one."""
    if set(params) == {"conv1", "conv2"} and params["conv1"]["conv"]["kernel"].shape[0] == 3:  # a RepVGGBlock
        return {"conv": _join_branches(*(_fold(params[name], stats[name])["conv"] for name in ("conv1", "conv2")))}
    folded: dict = {}
    for name, node in params.items():
        norm = _norm_behind(name, stats)
        if norm is not None:
            folded[name] = _fold_norm(node["kernel"], params[norm], stats[norm])
        elif name not in stats or "mean" not in stats[name]:
            folded[name] = _fold(node, stats.get(name, {})) if isinstance(node, dict) else np.asarray(node)
    return folded


def _norm_behind(name: str, stats: dict) -> str | None:
    """The name of the batch norm that follows the layer of this name, if one does."""
    names = ("bn", "norm") if name == "conv" else (name.removesuffix("_0") + "_1",)  # input_proj_0_0, input_proj_0_1
    return next((norm for norm in names if "mean" in stats.get(norm, {})), None)


def _fold_norm(kernel: Any, norm: dict, stats: dict) -> dict:
    """A convolution with bias that does what convolution and batch norm do: kernel [k, k, I, O], norm of O."""
    scale, bias, mean, var = (
        np.asarray(x, np.float64) for x in (norm["scale"], norm["bias"], stats["mean"], stats["var"])
    )
    factor = scale / np.sqrt(var + NORM_EPS)
    dtype = np.asarray(kernel).dtype
    return {
        "kernel": (np.asarray(kernel, np.float64) * factor).astype(dtype),
        "bias": (bias - mean * factor).astype(dtype),
    }


def _join_branches(wide: dict, point: dict) -> dict:
    """One 3x3 convolution for the sum of a 3x3 and a 1x1: the latter adds to the middle."""
    kernel = wide["kernel"].copy()
    kernel[1, 1] += point["kernel"][0, 0]
    return {"kernel": kernel, "bias": wide["bias"] + point["bias"]}
