"""What happens inside the network on the way from images to masks, by name.

The modules note their intermediate values (`sow`); here they are gathered, named and brought into one form, for looking
at and for research. Prediction and training do not come past here. Drawing is in `results/figures.py`.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from instseg_jax.messages import quote
from instseg_jax.models.mask_rtdetr import MaskRTDETR
from instseg_jax.types import Array, Outputs


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The intermediate values of one call of the network, in numpy, in the order in which they come about.

    Levels are the maps at strides 8, 16, 32. Query q is the same object from its selection to its mask, L is the number
    of decoder layers. Boxes are normalised cxcywh, points (x, y) in 0..1 of the network input.
    """

    backbone_maps: tuple[np.ndarray, ...]  # [B, h, w, C] at strides 4, 8, 16, 32
    encoder_attention: np.ndarray  # [B, heads, T, T] of the neck's first attention layer: row attends to column
    encoder_attention_size: tuple[int, int]  # (height, width) of the map whose T tokens, rows first, these are
    maps: tuple[np.ndarray, ...]  # [B, h, w, C] of the neck, one a level
    prototypes: np.ndarray  # [B, H/4, W/4, P], which mask queries mix to masks
    token_scores: tuple[np.ndarray, ...]  # [B, h, w] in 0..1, one a level: best class score of each token
    selected_level: np.ndarray  # [B, Q] level of the token that became query q
    selected_points: np.ndarray  # [B, Q, 2] middle of that token
    selected_scores: np.ndarray  # [B, Q] its score in 0..1, falling
    selected_boxes: np.ndarray  # [B, Q, 4] what the encoder's head says of it
    reference_boxes: np.ndarray  # [L + 1, B, Q, 4]: where the first layer starts, then what each layer makes of it
    sampling_points: np.ndarray  # [L, B, Q, heads, levels, points, 2] where each layer reads the maps
    sampling_weights: np.ndarray  # [L, B, Q, heads, levels, points], of one query and head they add up to 1
    mask_queries: np.ndarray  # [B, Q, P] of the last layer: mask_logits = mask_queries . prototypes
    outputs: Outputs  # what the network says in the end, in numpy


def look_inside(model: MaskRTDETR, variables: dict, images: np.ndarray) -> Anatomy:
    """Run the network and keep what comes about inside; it is compiled once for each call.

    Args:
      model: from `create_model` or `load`.
      variables: of the model.
      images: [B, H, W, 3] RGB 0..1, sides multiples of 32; one or two, since everything is kept.

    Returns: an `Anatomy`: backbone_maps, encoder_attention, maps, prototypes, token_scores, reference_boxes,
      sampling_points, sampling_weights, mask_queries, outputs and so on, in numpy.
    """
    run = jax.jit(lambda variables, images: model.apply(variables, images, mutable=["intermediates"]))
    outputs, state = jax.device_get(run(variables, jnp.asarray(images)))
    found = state["intermediates"]
    inner = found["transformer"]
    layers = [inner["decoder"][f"layers_{i}"]["cross_attn"] for i in range(model.variant.num_decoder_layers)]
    maps = tuple(found["maps"][0])
    shapes = [x.shape[1:3] for x in maps]
    ends = np.cumsum([height * width for height, width in shapes])
    scores = _sigmoid(inner["enc_score_max"][0])
    index = inner["selected_index"][0]
    level = np.searchsorted(ends, index, side="right")
    attended = maps[model.variant.attention_level]
    return Anatomy(
        backbone_maps=tuple(found["backbone_maps"][0]),
        encoder_attention=found["neck"]["encoder_0"]["layers_0"]["self_attn"]["attention_weights"][0],
        encoder_attention_size=attended.shape[1:3],
        maps=maps,
        prototypes=found["mask_features"][0],
        token_scores=tuple(
            part.reshape(-1, *shape) for part, shape in zip(np.split(scores, ends[:-1], axis=1), shapes, strict=True)
        ),
        selected_level=level,
        selected_points=_token_middles(shapes)[index],
        selected_scores=np.take_along_axis(scores, index, axis=1),
        selected_boxes=inner["encoder_set"][0][2],
        reference_boxes=np.stack(
            [inner["init_ref_boxes"][0], *(inner[f"ref_in_layer{i + 1}"][0] for i in range(len(layers)))]
        ),
        sampling_points=np.stack([layer["sampling_locations"][0] for layer in layers]),
        sampling_weights=np.stack([layer["sampling_weights"][0] for layer in layers]),
        mask_queries=inner["mask_queries"][0],
        outputs=outputs,
    )


def features(model: MaskRTDETR, variables: dict, images: Array, patterns: Sequence[str]) -> dict[str, Array]:
    """What the modules return in whose path a pattern is found; a pure function, which may be compiled and mapped.

    Args:
      model: from `create_model` or `load`.
      variables: of the model.
      images: [B, H, W, 3] RGB 0..1, sides multiples of 32.
      patterns: regular expressions, found anywhere in a path; "" finds every module.

    Returns: values by path, {"backbone/stem": [B, h, w, C], ...}; of several values of a module, each has a number:
      "neck/0", "neck/1".

    Raises: ValueError for a pattern that is found in no module's path.
    """

    def is_wanted(module, method: str) -> bool:
        return method == "__call__" and any(re.search(pattern, "/".join(module.path)) for pattern in patterns)

    _, state = model.apply(variables, images, capture_intermediates=is_wanted, mutable=["intermediates"])
    found, paths = {}, set()
    for key_path, value in jax.tree_util.tree_leaves_with_path(state.get("intermediates", {})):
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in key_path]
        if "__call__" in keys:  # what modules note of themselves has other names
            at = keys.index("__call__")
            found["/".join([*keys[:at], *keys[at + 2 :]])] = value
            paths.add("/".join(keys[:at]))
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"no module's path contains {quote(pattern)}")
    return found


def explain_mask(anatomy: Anatomy, image: int, query: int) -> tuple[np.ndarray, np.ndarray]:
    """What each prototype adds to the mask of one query of one image.

    Returns: (order [P], parts [P, h, w]): the prototypes from the one whose part varies most over the image to the
      one whose part varies least, and mask_query[p] * prototype[p] in that order. All parts add up to the mask logits.
    """
    parts = np.moveaxis(anatomy.prototypes[image] * anatomy.mask_queries[image, query], -1, 0)
    order = np.argsort(-parts.std(axis=(1, 2)), kind="stable")
    return order, parts[order]


def _token_middles(shapes: list[tuple[int, int]]) -> np.ndarray:
    """(x, y) in 0..1 of the middle of every token of all levels, rows first: [T, 2]."""
    middles = []
    for height, width in shapes:
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        middles.append(np.stack([(columns + 0.5) / width, (rows + 0.5) / height], axis=-1).reshape(-1, 2))
    return np.concatenate(middles)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
