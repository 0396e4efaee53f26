"""Mask-RT-DETR whole: backbone, neck, transformer; and its initial values."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from instseg_jax.config import SIZE_MULTIPLE
from instseg_jax.messages import quote
from instseg_jax.models.decoder import MaskRTDETRTransformer
from instseg_jax.models.efficientnet_lite import EfficientNetLite
from instseg_jax.models.hgnetv2 import HGNetV2
from instseg_jax.models.hybrid_encoder import MaskHybridEncoder
from instseg_jax.models.initial_values import recorded_initializers
from instseg_jax.models.variants import VARIANTS, Variant, canonical_name
from instseg_jax.types import DenoisingQueries, FactoredOutputs, Outputs, TrainingOutputs


class MaskRTDETR(nn.Module):
    """Real-time instance segmentation transformer.

    Attributes:
      variant: the sizes of the network.
      num_classes: K.
      num_queries: Q; no parameter depends on it.
      rectangular: "corrected" or "official": how positions of non-square inputs are computed. The reference
        swaps height and width in two places; for square inputs both are the same.
      mask_enhanced: whether reference boxes start from the encoder's masks, or from its boxes.
      frozen_backbone_norm: backbone batch norms keep their running statistics in training.
      remat: recompute decoder layers in the backward pass instead of keeping their activations.
      dtype: type to compute in; None for that of images and parameters.
      folded: the form for inference, with variables that `inference/optimize.py` makes: no batch norms, and
        `FactoredOutputs`.
    """

    variant: Variant
    num_classes: int
    num_queries: int
    rectangular: str
    mask_enhanced: bool
    frozen_backbone_norm: bool
    remat: bool
    dtype: jnp.dtype | None
    folded: bool = False

    @nn.compact
    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        denoising: DenoisingQueries | None = None,
        selected_index: Array | None = None,
        reference_boxes: Array | None = None,
    ) -> Outputs | FactoredOutputs | TrainingOutputs:
        """Segment images.

        Args:
          images: [B, H, W, 3] RGB in 0..1, H and W multiples of 32.
          train: batch statistics, and every prediction set (`TrainingOutputs`) instead of the last one.
          denoising: noised ground truth to feed beside the queries in training.
          selected_index: [B, Q] tokens to use as queries instead of the best-scoring ones.
          reference_boxes: [B, Q, 4] initial reference boxes (normalised cxcywh) to use instead of the model's.

        Returns: `Outputs` with class_logits [B, Q, K], boxes [B, Q, 4] normalised cxcywh and
          mask_logits [B, Q, H/4, W/4]; `FactoredOutputs` with the same when `folded`; `TrainingOutputs` when `train`.

        Raises: ValueError when the images' shape is not as above.
        """
        _check_images(images)
        v, dtype = self.variant, self.dtype
        shared: dict[str, Any] = {"folded": self.folded, "dtype": dtype, "name": "backbone"}
        backbone: EfficientNetLite | HGNetV2
        if v.lite_stages:
            backbone = EfficientNetLite(v.stem_channels, v.lite_stages, self.frozen_backbone_norm, **shared)
        else:
            backbone = HGNetV2(v.stem_channels, v.stages, self.frozen_backbone_norm, **shared)
        neck = MaskHybridEncoder(
            features=v.neck_dim,
            attention_level=v.attention_level,
            num_attention_layers=v.num_attention_layers,
            attention_ffn_dim=v.attention_ffn_dim,
            num_heads=v.num_heads,
            csp_expansion=v.csp_expansion,
            num_csp_blocks=v.num_csp_blocks,
            mask_channels=v.mask_channels,
            num_prototypes=v.num_prototypes,
            rectangular=self.rectangular,
            folded=self.folded,
            dtype=dtype,
            name="neck",
        )
        transformer = MaskRTDETRTransformer(
            num_classes=self.num_classes,
            num_queries=self.num_queries,
            hidden_dim=v.hidden_dim,
            num_layers=v.num_decoder_layers,
            num_heads=v.num_heads,
            num_points=v.num_points,
            ffn_dim=v.ffn_dim,
            num_prototypes=v.num_prototypes,
            mask_enhanced=self.mask_enhanced,
            rectangular=self.rectangular,
            remat=self.remat,
            folded=self.folded,
            dtype=dtype,
            name="transformer",
        )
        backbone_maps = backbone(images, train=train)
        maps, mask_features = neck(backbone_maps, train=train)
        for name, value in (("backbone_maps", backbone_maps), ("maps", maps), ("mask_features", mask_features)):
            self.sow("intermediates", name, value)
        return transformer(
            maps,
            mask_features,
            train=train,
            denoising=denoising,
            selected_index=selected_index,
            reference_boxes=reference_boxes,
        )


def count_queries(num_queries: int, height: int, width: int) -> int:
    """The queries of a picture of that size in pixels: `num_queries`, or its number of places where that is less."""
    return min(num_queries, sum((height // stride) * (width // stride) for stride in (8, 16, 32)))


def _check_images(images: Array) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be [batch, height, width, channels], they have shape {images.shape}")
    height, width = images.shape[1:3]
    if min(height, width) < SIZE_MULTIPLE or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise ValueError(
            f"images are {height} x {width} pixels (height x width); both must be multiples of {SIZE_MULTIPLE}"
        )


def make_model(
    name: str,
    *,
    num_classes: int,
    num_queries: int,
    num_decoder_layers: int | None = None,
    num_prototypes: int | None = None,
    rectangular: str = "corrected",
    mask_enhanced: bool = True,
    frozen_backbone_norm: bool = True,
    remat: bool = False,
    dtype: str = "float32",
) -> MaskRTDETR:
    """Describe a network by the name of its size; None leaves a number as the size has it.

    Raises: ValueError for an unknown name, a count below one, or an unknown choice.
    """
    variant = VARIANTS[canonical_name(name)]
    counts = {"num_classes": num_classes, "num_queries": num_queries}
    given = {"num_decoder_layers": num_decoder_layers, "num_prototypes": num_prototypes}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key, value in (counts | changes).items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{key} is {quote(value)}, it must be a whole number of at least 1")
    for key, choice, allowed in (
        ("rectangular", rectangular, ("corrected", "official")),
        ("dtype", dtype, ("float32", "bfloat16")),
    ):
        if choice not in allowed:
            raise ValueError(f"{key} is {quote(choice)}, it must be one of {', '.join(allowed)}")
    return MaskRTDETR(
        variant=dataclasses.replace(variant, **changes),
        num_classes=int(num_classes),
        num_queries=int(num_queries),
        rectangular=rectangular,
        mask_enhanced=mask_enhanced,
        frozen_backbone_norm=frozen_backbone_norm,
        remat=remat,
        dtype=None if dtype == "float32" else jnp.dtype(dtype),
    )


def build_model(config, num_classes: int) -> MaskRTDETR:
    """The network that the section `model` of a config describes, for a data set's number of classes.

    Raises: ValueError when the config names another number of classes, or holds a value that is not allowed.
    """
    if config.num_classes is not None and config.num_classes != num_classes:
        raise ValueError(
            f"model.num_classes is {config.num_classes}, but the data or the weights have {num_classes} classes; "
            "leave it None to follow them"
        )
    return make_model(
        config.name,
        num_classes=num_classes,
        num_queries=config.num_queries,
        num_decoder_layers=config.num_decoder_layers,
        num_prototypes=config.num_prototypes,
        rectangular=config.rectangular,
        mask_enhanced=config.mask_enhanced,
        frozen_backbone_norm=config.frozen_backbone_norm,
        remat=config.remat,
        dtype=config.dtype,
    )


def abstract_variables(model: MaskRTDETR, channels: int = 3) -> dict:
    """Shapes and types of the variables, without computing anything."""
    images = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def initial_variables(model: MaskRTDETR, *, seed: int, channels: int = 3) -> dict:
    """Draw {"params", "batch_stats"} as the reference initialises them, in numpy.

    Compiling `model.init` takes half a minute for the small sizes; this takes a second. Every tensor is drawn
    from its own generator, (seed, position in the sorted tree). Layers that the reference makes by copying one
    layer (decoder, attention encoder) start out identical.
    """
    with recorded_initializers() as recorded:
        shapes = abstract_variables(model, channels)
    params: dict = {}
    for position, path in enumerate(sorted(recorded)):
        initializer, shape = recorded[path]
        rng = np.random.default_rng([seed, position])
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = initializer.sample(rng, shape)
    for stack in (params["transformer"]["decoder"], params["neck"]["encoder_0"]):
        for name in stack:
            stack[name] = jax.tree.map(np.copy, stack["layers_0"])
    batch_stats = jax.tree_util.tree_map_with_path(
        lambda path, x: (np.ones if path[-1].key == "var" else np.zeros)(x.shape, np.float32), shapes["batch_stats"]
    )
    return {"params": params, "batch_stats": batch_stats}


def count_parameters(params: dict) -> int:
    """Number of values in a tree of parameters, frozen ones too."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
