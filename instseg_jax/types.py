"""What the rooms hand to each other: batches, targets, predictions, detections.

Dimension letters used in every shape of this package:

    B images in a batch      Q queries               K classes
    N target slots           D denoising slots       P prototypes (mask channels)
    H, W network input       h, w = H/4, W/4         S prediction sets (encoder, initial, decoder layers)

Boxes are normalised (cx, cy, w, h) in 0..1 of the network input unless the name says otherwise
(`boxes_xyxy`, `boxes_xywh_px`). `*_valid` is True where an entry is real. Sizes are (height, width),
coordinates are (x, y).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
HostOrDeviceArray = np.ndarray | jax.Array  # as the loader yields it, and as it lies on the devices
DATA_AXIS = "data"  # of the mesh of devices: images of a batch are split over it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """Ground truth of a batch in static shapes; slots beyond an image's objects are not valid."""

    labels: HostOrDeviceArray  # [B, N] int32, class index 0..K-1
    boxes: HostOrDeviceArray  # [B, N, 4] float32, normalised cxcywh
    masks: HostOrDeviceArray  # [B, N, Hm, Wm] uint8 0/1, the network input's frame (Hm = H / mask_stride)
    valid: HostOrDeviceArray  # [B, N] bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Images with their targets, as the loader yields them (numpy) and the step takes them (jax)."""

    images: HostOrDeviceArray  # [B, H, W, 3] float32 RGB, 0..1
    targets: Targets
    image_valid: HostOrDeviceArray  # [B] bool, False for the padding of a last partial batch
    image_index: HostOrDeviceArray  # [B] int32, position in the data set (-1 for padding)
    original_sizes: HostOrDeviceArray  # [B, 2] int32 (height, width) in pixels of the file
    content_sizes: HostOrDeviceArray  # [B, 2] int32 (height, width) of the network input that the image fills,
    #                       from the top left corner: all of it when stretched, less when letterboxed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the network says about images at inference: the last decoder layer."""

    class_logits: Array  # [B, Q, K]
    boxes: Array  # [B, Q, 4] normalised cxcywh
    mask_logits: Array  # [B, Q, h, w]

    def masks_of(self, query: Array) -> jax.Array:
        """Mask logits [B, T, h, w] of chosen queries [B, T]."""
        return jnp.take_along_axis(jnp.asarray(self.mask_logits), jnp.asarray(query)[..., None, None], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredOutputs:
    """`Outputs` whose masks are products still to be made: of the queries that are kept, not of all."""

    class_logits: Array  # [B, Q, K]
    boxes: Array  # [B, Q, 4] normalised cxcywh
    mask_queries: Array  # [B, Q, P]
    mask_features: Array  # [B, h, w, P]

    @property
    def mask_logits(self) -> jax.Array:
        """[B, Q, h, w]"""
        return jnp.einsum("bqp,bhwp->bqhw", self.mask_queries, self.mask_features)

    def masks_of(self, query: Array) -> jax.Array:
        """Mask logits [B, T, h, w] of chosen queries [B, T]."""
        chosen = jnp.take_along_axis(jnp.asarray(self.mask_queries), jnp.asarray(query)[..., None], axis=1)
        return jnp.einsum("bqp,bhwp->bqhw", chosen, self.mask_features)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """S prediction sets stacked, the last one being the main one.

    Masks stay factored: `mask_logits = mask_queries . mask_features`. Sampling points of the features
    and multiplying afterwards gives the same logits without a [S, B, Q, h, w] tensor.
    """

    class_logits: Array  # [S, B, Q, K]
    boxes: Array  # [S, B, Q, 4] normalised cxcywh
    mask_queries: Array  # [S, B, Q, P]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingOutputs:
    """Everything the criterion needs.

    `matching` holds [encoder, initial, layer 0 .. last] (no `initial` when there are no denoising
    slots), `denoising` [initial, layer 0 .. last] for the D denoising slots, or None.
    """

    matching: Predictions
    denoising: Predictions | None
    mask_features: Array  # [B, h, w, P]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenoisingQueries:
    """Noised ground truth that is fed beside the queries: G groups of n slots, then unused slots.

    n is the largest number of objects of an image in the (global) batch, G = max(1, num_denoising // n);
    slot d < n * G belongs to group d // n and to object d % n. Shapes are static, n and G are not.
    """

    labels: Array  # [B, D] int32; K where the slot holds no object
    boxes_unact: Array  # [B, D, 4] inverse sigmoid of the noised cxcywh box
    object_index: Array  # [D] int32, target slot of each denoising slot
    valid: Array  # [B, D] bool, True where the slot holds a real object of that image
    attention_mask: Array  # [D + Q, D + Q] bool, True = row may attend to column; denoising slots first
    num_groups: Array  # [] int32, G


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detections:
    """The T best (query, class) pairs of each image, by falling score."""

    scores: HostOrDeviceArray  # [B, T] float32, 0..1
    labels: HostOrDeviceArray  # [B, T] int32
    boxes_xyxy: HostOrDeviceArray  # [B, T, 4] normalised corners, not clipped
    mask_logits: HostOrDeviceArray  # [B, T, h, w]


@dataclasses.dataclass(frozen=True)
class Instances:
    """The instances of one image, in pixels of the original image, by falling score."""

    scores: np.ndarray  # [n] float32, 0..1
    labels: np.ndarray  # [n] int32, class index
    boxes_xyxy_px: np.ndarray  # [n, 4] float32, not clipped to the image
    masks: list[dict]  # n COCO RLEs {"size": [height, width], "counts": str} of the whole image

    def __len__(self) -> int:
        return len(self.scores)
