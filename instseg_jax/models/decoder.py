"""MaskRTDETR: selects queries among the encoder's tokens and refines them into classes, boxes and masks.

Source: PaddleDetection at 666f597fd0, ppdet/modeling/transformers/mask_rtdetr_transformer.py. Module names
follow the official state dict. One class head, one box head and one mask head serve the encoder's selection
and every decoder layer.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Integer

from instseg_jax import boxes as box_ops
from instseg_jax.models.attention import LayerNorm, MultiHeadAttention
from instseg_jax.models.convolution import BatchNorm, Conv
from instseg_jax.models.deformable_attention import DeformableAttention
from instseg_jax.models.initial_values import Initializer, constant, declare, normal, xavier_uniform
from instseg_jax.models.linear import MLP, Dense, linear_default, zero_bias, zero_kernel
from instseg_jax.models.query_selection import make_anchors, masks_to_boxes, take_rows
from instseg_jax.types import DenoisingQueries, FactoredOutputs, Outputs, Predictions, TrainingOutputs

PRIOR_BIAS = -math.log(99)  # a score of 0.01 before training


def _prior_bias(fan_in: int) -> Initializer:
    del fan_in
    return constant(PRIOR_BIAS)


def _wide(x: Array) -> Array:
    """Boxes, scores and masks are computed in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class DecoderLayer(nn.Module):
    """Self-attention, deformable attention to the maps, feed-forward; norms after each."""

    num_heads: int
    num_points: int
    ffn_dim: int
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "B Q C"],
        position: Float[Array, "B Q C"],
        reference_boxes: Float[Array, "B Q 4"],
        memory: Float[Array, "B tokens C"],
        spatial_shapes: tuple[tuple[int, int], ...],
        attention_mask: Bool[Array, "Q Q"] | None,
    ) -> Float[Array, "B Q C"]:
        x = queries
        q = x + position
        attention = MultiHeadAttention(self.num_heads, self.folded, dtype=self.dtype, name="self_attn")
        y = attention(q, q, x, attention_mask)
        x = LayerNorm(dtype=self.dtype, name="norm1")(x + y)
        attend = DeformableAttention(self.num_heads, self.num_points, self.folded, dtype=self.dtype, name="cross_attn")
        y = attend(x + position, reference_boxes, memory, spatial_shapes)
        x = LayerNorm(dtype=self.dtype, name="norm2")(x + y)
        y = nn.relu(Dense(self.ffn_dim, dtype=self.dtype, name="linear1")(x))
        y = Dense(x.shape[-1], dtype=self.dtype, name="linear2")(y)
        return LayerNorm(dtype=self.dtype, name="norm3")(x + y)


class Decoder(nn.Module):
    """The stack of layers; calls yield each layer's output so that the heads can follow it."""

    num_layers: int
    num_heads: int
    num_points: int
    ffn_dim: int
    remat: bool = False
    folded: bool = False
    dtype: jnp.dtype | None = None

    def setup(self):
        layer = nn.remat(DecoderLayer, static_argnums=(5,)) if self.remat else DecoderLayer
        self.layers = [
            layer(self.num_heads, self.num_points, self.ffn_dim, self.folded, dtype=self.dtype)
            for _ in range(self.num_layers)
        ]

    def __call__(self, index: int, *args) -> Array:
        return self.layers[index](*args)


class MaskRTDETRTransformer(nn.Module):
    """Maps at strides 8, 16, 32 and mask features -> classes, boxes and masks of the queries.

    Attributes:
      mask_enhanced: reference boxes start as the tight boxes of the selected tokens' masks (the reference
        implementation); otherwise as their predicted boxes.
    """

    num_classes: int
    num_queries: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_points: int
    ffn_dim: int
    num_prototypes: int
    mask_enhanced: bool
    rectangular: str
    remat: bool = False
    folded: bool = False
    dtype: jnp.dtype | None = None

    def setup(self):
        dim = self.hidden_dim
        self.enc_output_0 = Dense(dim, dtype=self.dtype)
        self.enc_output_1 = LayerNorm(dtype=self.dtype)
        self.dec_norm = LayerNorm(dtype=self.dtype)
        self.score_head = Dense(self.num_classes, linear_default, _prior_bias, dtype=self.dtype)
        self.bbox_head = MLP((dim, dim, 4), last_kernel_init=zero_kernel, last_bias_init=zero_bias, dtype=self.dtype)
        self.mask_query_head = MLP((dim, dim, self.num_prototypes), dtype=self.dtype)
        self.query_pos_head = MLP((2 * dim, dim), kernel_init=xavier_uniform, dtype=self.dtype)
        self.denoising_class_embed = ClassEmbedding(self.num_classes, dim, dtype=self.dtype)
        self.decoder = Decoder(
            self.num_layers, self.num_heads, self.num_points, self.ffn_dim, self.remat, self.folded, dtype=self.dtype
        )
        self.input_proj = [LevelProjection(dim, self.folded, dtype=self.dtype) for _ in range(3)]

    def __call__(
        self,
        maps: list[Array],
        mask_features: Float[Array, "B h w P"],
        *,
        train: bool,
        denoising: DenoisingQueries | None,
        selected_index: Integer[Array, "B Q"] | None,
        reference_boxes: Float[Array, "B Q 4"] | None,
    ) -> Outputs | FactoredOutputs | TrainingOutputs:
        mask_features = _wide(mask_features)
        memory, spatial_shapes = self._memory(maps, train)
        target, encoder_boxes = self._select(memory, spatial_shapes, selected_index)
        encoder_set = (*self._class_and_mask(target), encoder_boxes)
        self.sow("intermediates", "encoder_set", encoder_set)
        if reference_boxes is None:
            reference_boxes = self._initial_boxes(encoder_set, mask_features)
        self.sow("intermediates", "init_ref_boxes", reference_boxes)
        queries, reference_boxes = jax.lax.stop_gradient((target, reference_boxes))
        # The reference clips to 1e-5 on both sides, so the boxes that enter are not quite those that went in.
        reference_boxes = jax.nn.sigmoid(box_ops.inverse_sigmoid(reference_boxes))
        attention_mask = None
        if denoising is not None:
            noised_boxes = jax.nn.sigmoid(_wide(jnp.asarray(denoising.boxes_unact))).astype(reference_boxes.dtype)
            content = self.denoising_class_embed(denoising.labels).astype(queries.dtype)
            queries = jnp.concatenate([content, queries], axis=1)
            reference_boxes = jnp.concatenate([noised_boxes, reference_boxes], axis=1)
            attention_mask = denoising.attention_mask
        elif self.is_initializing():
            self.denoising_class_embed(jnp.zeros((1, 1), jnp.int32))

        initial_set = (*self._class_and_mask(queries), reference_boxes) if denoising is not None else None
        layer_sets = self._decode(queries, reference_boxes, memory, spatial_shapes, attention_mask, train)
        if not train:
            class_logits, mask_queries, boxes = layer_sets[-1]
            self.sow("intermediates", "mask_queries", mask_queries)
            outputs = FactoredOutputs(class_logits, boxes, mask_queries, mask_features)
            return outputs if self.folded else Outputs(class_logits, boxes, outputs.mask_logits)
        return _training_outputs(encoder_set, initial_set, layer_sets, denoising, mask_features)

    @nn.nowrap
    def _memory(self, maps: list[Array], train: bool) -> tuple[Array, tuple[tuple[int, int], ...]]:
        """Project the maps to the decoder's width and join their tokens: [B, tokens, C]."""
        maps = [project(x, train=train) for project, x in zip(self.input_proj, maps, strict=True)]
        spatial_shapes = tuple((x.shape[1], x.shape[2]) for x in maps)
        memory = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)
        self.sow("intermediates", "memory", memory)
        return memory, spatial_shapes

    @nn.nowrap
    def _select(
        self, memory: Array, spatial_shapes: tuple[tuple[int, int], ...], selected_index: Array | None
    ) -> tuple[Array, Array]:
        """The best-scoring tokens: (content [B, Q, C], boxes [B, Q, 4])."""
        anchors, valid = make_anchors(spatial_shapes, self.rectangular)
        tokens = self.enc_output_1(self.enc_output_0(jnp.where(valid[:, None], memory, 0)))
        scores = _wide(self.score_head(tokens)).max(axis=-1)
        if selected_index is None:
            count = min(self.num_queries, scores.shape[1])
            _, selected_index = jax.lax.top_k(scores, count)
        target = take_rows(tokens, selected_index)
        anchors_unact = jnp.asarray(anchors, jnp.promote_types(target.dtype, jnp.float32))
        boxes = jax.nn.sigmoid(_wide(self.bbox_head(target)) + anchors_unact[selected_index])
        for name, value in (("enc_output", tokens), ("enc_score_max", scores), ("selected_index", selected_index)):
            self.sow("intermediates", name, value)
        return target, boxes

    @nn.nowrap
    def _class_and_mask(self, queries: Array) -> tuple[Array, Array]:
        """(class logits [B, Q, K], mask queries [B, Q, P]) of decoder states."""
        normed = self.dec_norm(queries)
        return _wide(self.score_head(normed)), _wide(self.mask_query_head(normed))

    @nn.nowrap
    def _initial_boxes(self, encoder_set: tuple[Array, Array, Array], mask_features: Array) -> Array:
        _, mask_queries, boxes = encoder_set
        if not self.mask_enhanced:
            return boxes
        queries, features = jax.lax.stop_gradient((mask_queries, mask_features))
        return masks_to_boxes(jnp.einsum("bqp,bhwp->bqhw", queries, features))

    @nn.nowrap
    def _decode(
        self,
        queries: Array,
        reference_boxes: Array,
        memory: Array,
        spatial_shapes: tuple[tuple[int, int], ...],
        attention_mask: Array | None,
        train: bool,
    ) -> list[tuple[Array, Array, Array]]:
        """Prediction sets (class logits, mask queries, boxes) of each layer; of the last alone at inference.

        In training a layer's box also carries the gradient of the refinement before it, and of that one alone
        ("look forward twice"), while the references themselves are constants.
        """
        sets, previous = [], reference_boxes
        for i in range(self.num_layers):
            position = self.query_pos_head(reference_boxes)
            queries = self.decoder(i, queries, position, reference_boxes, memory, spatial_shapes, attention_mask)
            self.sow("intermediates", f"dec_layer{i}", queries)
            delta = _wide(self.bbox_head(queries))
            refined = jax.nn.sigmoid(delta + box_ops.inverse_sigmoid(reference_boxes))
            boxes = jax.nn.sigmoid(delta + box_ops.inverse_sigmoid(previous)) if train else refined
            if train or i == self.num_layers - 1:
                sets.append((*self._class_and_mask(queries), boxes))
            previous, reference_boxes = refined, jax.lax.stop_gradient(refined)
            self.sow("intermediates", f"ref_in_layer{i + 1}", reference_boxes)
        return sets


class ClassEmbedding(nn.Module):
    """One vector a class, and zeros for the label num_classes (an empty denoising slot)."""

    num_classes: int
    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, labels: Integer[Array, "B D"]) -> Float[Array, "B D C"]:
        embedding = declare(self, "embedding", normal(1.0), (self.num_classes, self.features))
        (embedding,) = nn.dtypes.promote_dtype(embedding, dtype=self.dtype)
        return jnp.concatenate([embedding, jnp.zeros_like(embedding[:1])])[labels]


class LevelProjection(nn.Module):
    """1x1 convolution and batch norm from a neck map to the decoder's width."""

    features: int
    folded: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W _"], *, train: bool) -> Float[Array, "B H W C"]:
        conv = Conv(self.features, 1, use_bias=self.folded, kernel_init=xavier_uniform, dtype=self.dtype, name="conv")
        x = conv(x)
        if self.folded:
            return x
        return BatchNorm(dtype=self.dtype, name="norm")(x, train=train)


def _training_outputs(
    encoder_set: tuple[Array, Array, Array],
    initial_set: tuple[Array, Array, Array] | None,
    layer_sets: list[tuple[Array, Array, Array]],
    denoising: DenoisingQueries | None,
    mask_features: Array,
) -> TrainingOutputs:
    """Stack the prediction sets and part the denoising slots, which come first, from the queries."""

    def stack(sets: list[tuple[Array, Array, Array]]) -> Predictions:
        class_logits, mask_queries, boxes = (jnp.stack(part) for part in zip(*sets, strict=True))
        return Predictions(class_logits, boxes, mask_queries)

    def part(one_set: tuple[Array, Array, Array], own: slice) -> tuple[Array, Array, Array]:
        class_logits, mask_queries, boxes = one_set
        return class_logits[:, own], mask_queries[:, own], boxes[:, own]

    if denoising is None or initial_set is None:  # both or neither
        return TrainingOutputs(stack([encoder_set, *layer_sets]), None, mask_features)
    slots = denoising.labels.shape[1]
    later = [initial_set, *layer_sets]
    matching = stack([encoder_set, *(part(one, slice(slots, None)) for one in later)])
    return TrainingOutputs(matching, stack([part(one, slice(slots)) for one in later]), mask_features)
