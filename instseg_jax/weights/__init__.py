"""Weights: official files in and out, checkpoints, downloads.

`locate` says what lies at a path, `read_weights` reads it, and `merge_weights` puts what was read into an initialised
model, strictly.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instseg_jax.messages import quote, shorten
from instseg_jax.weights.locate import PACKAGED_WEIGHTS as PACKAGED_WEIGHTS
from instseg_jax.weights.locate import PRETRAINED as PRETRAINED
from instseg_jax.weights.locate import Located, locate
from instseg_jax.weights.merge import MergeSummary, is_backbone_state, load_backbone, merge_variables
from instseg_jax.weights.names import COCO_CLASSES, flatten_tree, official_to_flax
from instseg_jax.weights.paddle import read_pdparams
from instseg_jax.weights.state_dicts import read_safetensors, read_safetensors_metadata

_SCORE_BIAS = "transformer.score_head.bias"
_PARTS = ("stem.", "stages.", "blocks.", "neck.", "transformer.")  # how names of tensors begin, beside backbone.
_READERS = {".pdparams": read_pdparams, ".pdema": read_pdparams, ".safetensors": read_safetensors}


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a source of weights holds: `variables` of a whole model, or the official `backbone` state dict alone."""

    source: str
    variables: dict[str, Any] | None
    backbone: dict[str, np.ndarray] | None
    class_names: tuple[str, ...] | None  # None where the file doesn't say
    metadata: dict[str, Any]  # of a checkpoint; empty for official files
    thresholds: dict[str, Any] | None = None  # score thresholds stored in a checkpoint: "overall" and "classes"

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the score head; None for a backbone."""
        if self.variables is None:
            return None
        return int(self.variables["params"]["transformer"]["score_head"]["bias"].shape[0])


def read_weights(source: str | os.PathLike[str] | Located, *, class_names: Sequence[str] | None = None) -> Weights:
    """Return the weights at `source`: an official `.pdparams` or `.safetensors` file, a checkpoint or the WORKDIR
    of a run, an http(s) address of such a file, or a known name (`PACKAGED_WEIGHTS`, `download.KNOWN_WEIGHTS`).

    `class_names` names the classes of a file that doesn't; official files with 80 classes have those of COCO. Half
    precision is widened to float32.
    Raises FileNotFoundError when there is nothing at `source`, ValueError when it holds no weights, as an export.
    """
    located = locate(source)
    path = located.path
    if located.kind == "export":
        raise ValueError(f"{path} is an exported model; name the checkpoint it was made from")
    if located.kind == "checkpoint":
        return _read_checkpoint(located, class_names)
    state = {name: _widened(tensor) for name, tensor in _READERS[path.suffix](path).items()}
    check_finite(str(path), state)
    _check_names(str(path), state)
    metadata = read_safetensors_metadata(path) if path.suffix == ".safetensors" else {}
    class_names = class_names or metadata.get("class_names")
    if is_backbone_state(state):
        return Weights(located.source, None, state, None, {})
    if class_names is None and _SCORE_BIAS in state and state[_SCORE_BIAS].shape == (len(COCO_CLASSES),):
        class_names = COCO_CLASSES
    names = tuple(class_names) if class_names else None
    return Weights(located.source, official_to_flax(state), None, names, metadata, metadata.get("thresholds"))


def check_finite(source: str, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
            raise ValueError(f"{source} is damaged: the tensor {shorten(name)} has values that are not finite")


def _check_names(source: str, state: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError for a file whose tensors are of another network, or of none."""
    foreign = [name for name in state if not name.removeprefix("backbone.").startswith(_PARTS)]
    if not state:
        raise ValueError(f"{source} holds no tensors")
    if len(foreign) >= len(state) / 2:  # a classifier's own layers are left out later
        raise ValueError(
            f"{source} holds no weights of Mask-RT-DETR: {len(foreign)} of {len(state)} tensors have foreign names, "
            f"as {quote(foreign[0])}; they must begin with backbone., neck. or transformer., as in the official files"
        )


def _widened(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor


def _read_checkpoint(located: Located, class_names: Sequence[str] | None) -> Weights:
    from instseg_jax.weights import checkpoint  # Orbax is slow to import

    variables, metadata = checkpoint.load_inference_checkpoint(located.path)
    check_finite(str(located.path), flatten_tree(variables))
    names = class_names or metadata.get("class_names")
    thresholds = checkpoint.read_thresholds(located.path)
    return Weights(located.source, variables, None, tuple(names) if names else None, metadata, thresholds)


def merge_weights(
    init: Mapping[str, Any],
    weights: Weights,
    *,
    class_names: Sequence[str] | None = None,
    skip: Sequence[str] = (),
) -> tuple[dict[str, Any], MergeSummary]:
    """Return `init` with the values of `weights` (numpy), and a summary to print.

    `class_names` are those of the model: where they differ from the file's, class rows are copied by name. `skip`
    names by shell patterns the tensors to leave at their initial value. Raises ValueError that lists what does not
    fit. See `merge.merge_variables` and `merge.load_backbone`.
    """
    if weights.variables is None:
        if skip:
            raise ValueError(f"skip={list(skip)} is not for {weights.source}, which holds a backbone alone")
        return load_backbone(init, weights.backbone or {})
    return merge_variables(
        init, weights.variables, skip=skip, class_names=class_names, loaded_class_names=weights.class_names
    )
