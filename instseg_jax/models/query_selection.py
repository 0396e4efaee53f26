"""Which encoder tokens become decoder queries, and where these start to look."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from instseg_jax import boxes as box_ops

ANCHOR_SIZE = 0.05  # of the image side, on the finest level; doubled on each further level
ANCHOR_MARGIN = 0.01  # anchors with a coordinate within this of 0 or 1 are not valid


def make_anchors(spatial_shapes: tuple[tuple[int, int], ...], rectangular: str) -> tuple[np.ndarray, np.ndarray]:
    """One box a token: (anchors_unact [T, 4] inverse sigmoid of cxcywh, +inf where not valid; valid [T] bool).

    `rectangular="official"` divides x by the height and y by the width of the map, as the reference does
    (the same for square maps); "corrected" divides x by the width.
    """
    levels = []
    for level, (height, width) in enumerate(spatial_shapes):
        rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        across, down = (height, width) if rectangular == "official" else (width, height)
        side = np.full(rows.shape, ANCHOR_SIZE * 2.0**level)
        levels.append(np.stack([(columns + 0.5) / across, (rows + 0.5) / down, side, side], axis=-1).reshape(-1, 4))
    anchors = np.concatenate(levels)
    valid = np.all((anchors > ANCHOR_MARGIN) & (anchors < 1 - ANCHOR_MARGIN), axis=-1)
    inside = np.where(valid[:, None], anchors, 0.5)
    return np.where(valid[:, None], np.log(inside / (1 - inside)), np.inf), valid


def take_rows(x: Float[Array, "B T C"], index: Integer[Array, "B Q"]) -> Float[Array, "B Q C"]:
    """x [B, T, C], index [B, Q] -> [B, Q, C]."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


def masks_to_boxes(mask_logits: Float[Array, "B Q h w"]) -> Float[Array, "B Q 4"]:
    """Tight boxes of the positive area: [B, Q, h, w] -> [B, Q, 4] normalised cxcywh, zeros for an empty mask.

    A box reaches to the far edge of its last pixel. No gradient flows through.
    """
    logits = jax.lax.stop_gradient(mask_logits)
    dtype = jnp.promote_types(mask_logits.dtype, jnp.float32)

    def extent(highest: Array) -> tuple[Array, Array]:
        occupied, size = highest > 0, highest.shape[-1]
        first = jnp.argmax(occupied, axis=-1)
        last = size - jnp.argmax(occupied[..., ::-1], axis=-1)
        return first.astype(dtype) / size, last.astype(dtype) / size

    # The highest logit of each column and row, then a comparison: less work than comparing all of the grid.
    columns, rows = logits.max(axis=-2), logits.max(axis=-1)
    (x1, x2), (y1, y2) = extent(columns), extent(rows)
    corners = jnp.stack([x1, y1, x2, y2], axis=-1)
    corners = jnp.where((columns > 0).any(axis=-1)[..., None], corners, 0)
    return box_ops.xyxy_to_cxcywh(corners)
