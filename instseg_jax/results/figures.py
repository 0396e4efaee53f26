"""Figures for looking into data and network: grids of pictures, and what is seen drawn on them.

Functions that draw take an RGB picture [H, W, 3] (uint8, or float in 0..1 as the network gets it) of any size and
coordinates in 0..1 of it, and return a new uint8 picture. Instances with labels and scores are drawn in `visualize.py`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from instseg_jax.geo.georeference import ground_features
from instseg_jax.results.visualize import draw_instances, instance_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from instseg_jax.results.result import Result

Color = tuple[int, int, int]

PIXELS_PER_INCH = 100
TITLE_INCHES = 0.23
SIGNED_COLORS = np.array([(33, 102, 172), (247, 247, 247), (178, 24, 43)], np.float64)  # of -1, 0 and 1
SUBPIXEL_BITS = 4  # OpenCV draws to a sixteenth of a pixel
NEGLIGIBLE = 1e-12  # a spread below this is none


def show_pictures(
    pictures: Sequence[np.ndarray], titles: Sequence[str] | None = None, *, columns: int, width: float = 10.0
) -> "Figure":
    """Lay pictures (RGB, or a single channel in grey) out in a grid, `width` inches wide, each with its title above.

    A notebook shows the figure; `figure.savefig(path)` writes it. All cells have the shape of the first picture.
    """
    from matplotlib.figure import Figure  # importing it takes a second
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not len(pictures):
        raise ValueError("There is no picture to show.")
    if titles is not None and len(titles) != len(pictures):
        raise ValueError(f"There are {len(pictures)} pictures, but {len(titles)} titles.")
    rows = -(-len(pictures) // columns)
    side = width / columns
    height = side * pictures[0].shape[0] / pictures[0].shape[1] + (0 if titles is None else TITLE_INCHES)
    layout = ConstrainedLayoutEngine(compress=True, w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    figure = Figure(figsize=(width, rows * height), dpi=PIXELS_PER_INCH, layout=layout)
    for i, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.axis("off")
        if i < len(pictures):
            axis.imshow(pictures[i], cmap="gray")
            axis.set_title("" if titles is None else titles[i], fontsize=9, pad=3)
    return figure


def features_to_rgb(features: np.ndarray) -> np.ndarray:
    """Show a map of many channels [h, w, C] as colours [h, w, 3] uint8: its three principal components.

    Places with similar features get similar colours; which colour means nothing. The sign of a component is chosen
    so that the picture does not depend on the solver's.
    """
    flat = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    flat = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    directions = directions[:3]
    directions = (
        directions * np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])[:, None]
    )
    parts = flat @ directions.T
    parts = np.pad(parts, ((0, 0), (0, 3 - parts.shape[1])))
    low, high = np.percentile(parts, (2, 98), axis=0)
    scaled = np.where(high - low > NEGLIGIBLE, (parts - low) / np.maximum(high - low, NEGLIGIBLE), 0.5)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8).reshape(*features.shape[:2], 3)


def signed_to_rgb(values: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Show numbers [h, w] as colours [h, w, 3] uint8: red above zero, blue below, white at zero.

    `limit` is the magnitude of full colour; None: the largest there is.
    """
    if limit is None:
        limit = float(np.abs(values).max())
    position = 1 + np.clip(np.asarray(values, np.float64) / max(limit, NEGLIGIBLE), -1, 1)
    channels = [np.interp(position, (0, 1, 2), SIGNED_COLORS[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def draw_heat(image: np.ndarray, heat: np.ndarray, *, limit: float | None = None, opacity: float = 0.6) -> np.ndarray:
    """Lay a map [h, w] of values from 0 on (dark) to `limit` (bright; None: the largest) over a picture."""
    from matplotlib import colormaps

    canvas = _as_uint8(image)
    limit = float(heat.max()) if limit is None else limit
    scaled = np.clip(np.asarray(heat, np.float32) / max(limit, NEGLIGIBLE), 0, 1)
    scaled = cv2.resize(scaled, canvas.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colors = colormaps["inferno"](scaled)[..., :3] * 255
    return np.rint(canvas * (1 - opacity) + colors * opacity).astype(np.uint8)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, colors: Sequence[Color], *, line: int = 2) -> np.ndarray:
    """Draw the outlines of boxes [n, 4] (cxcywh in 0..1 of the picture), one colour each."""
    canvas = _as_uint8(image)
    size = np.array(canvas.shape[1::-1])
    for (cx, cy, w, h), color in zip(np.asarray(boxes, np.float64).reshape(-1, 4), colors, strict=True):
        first = _subpixel(np.array((cx - w / 2, cy - h / 2)) * size)
        last = _subpixel(np.array((cx + w / 2, cy + h / 2)) * size)
        cv2.rectangle(canvas, first, last, color, line, cv2.LINE_AA, shift=SUBPIXEL_BITS)
    return canvas


def draw_points(
    image: np.ndarray, points: np.ndarray, colors: Sequence[Color], *, radii: Sequence[float] | float = 3.0
) -> np.ndarray:
    """Draw discs at points [n, 2] (x, y in 0..1 of the picture), one colour each, with radii in pixels.

    Each has a thin dark rim, so that it is seen on any ground. Points outside are not seen.
    """
    canvas = _as_uint8(image)
    size = np.array(canvas.shape[1::-1])
    points = np.asarray(points, np.float64).reshape(-1, 2)
    for point, color, radius in zip(points, colors, np.broadcast_to(radii, len(points)).tolist(), strict=True):
        if not (np.abs(point) < 100).all():  # far out: beyond what OpenCV's coordinates hold
            continue
        center = _subpixel(point * size)
        for extra, filling in ((1.0, (20, 20, 20)), (0.0, color)):
            scaled = round((radius + extra) * (1 << SUBPIXEL_BITS))
            cv2.circle(canvas, center, scaled, filling, cv2.FILLED, cv2.LINE_AA, shift=SUBPIXEL_BITS)
    return canvas


def draw_targets(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], masks: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Draw what the network is taught about a picture: boxes [n, 4] cxcywh in 0..1, class indices, masks [n, h, w].

    Masks may be coarser than the picture, as the loader makes them; `names` are those of the classes.
    """
    canvas = _as_uint8(image)
    height, width = canvas.shape[:2]
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    grown = [cv2.resize(np.asarray(mask, np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) for mask in masks]
    return draw_instances(
        canvas,
        boxes_xyxy_px=corners * (width, height, width, height),
        labels=labels,
        names=[names[label] for label in labels],
        scores=None,
        masks=grown,
    )


def draw_map(result: "Result", *, width: float = 10.0) -> "Figure":
    """Draw a georeferenced result as a map: its picture, and its outlines on top, in the coordinates of the ground.

    The georeference must have no rotation. Raises ValueError for a result without picture or georeference.
    """
    from matplotlib.figure import Figure

    place = result.georeference
    if place is None or result.image is None:
        raise ValueError(f"The result of {result.input_path} has no {'picture' if place else 'georeference'} to map.")
    a, b, c, d, e, f = place.transform
    if b or d:
        raise ValueError(f"A map is drawn of images without rotation, the transform is {place.transform}.")
    (rows, columns), features = result.size, list(ground_features(result))
    figure = Figure(figsize=(width, width * rows / columns + 0.5), dpi=PIXELS_PER_INCH, layout="constrained")
    axis = figure.subplots()
    axis.imshow(result.image, extent=(c, c + a * columns, f + e * rows, f))
    colors = instance_colors([properties["cls_id"] for _, properties in features])
    for (parts, _), color in zip(features, colors, strict=True):
        tone = np.array(color) / 255
        for rings in parts:
            axis.fill(*rings[0].T, facecolor=(*tone, 0.4), edgecolor=tone, linewidth=1.5)
            for hole in rings[1:]:
                axis.plot(*np.concatenate([hole, hole[:1]]).T, color=tone, linewidth=1)
    axis.ticklabel_format(useOffset=False, style="plain")
    axis.tick_params(labelsize=8)
    return figure


def _as_uint8(image: np.ndarray) -> np.ndarray:
    """A new uint8 picture to draw on."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"A picture to draw on must be RGB [height, width, 3], got {list(image.shape)}.")
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image).copy()
    if image.dtype.kind != "f":
        raise ValueError(f"A picture to draw on must be uint8 or float in 0..1, got {image.dtype}.")
    return np.ascontiguousarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))


def _subpixel(point: np.ndarray) -> tuple[int, int]:
    """A point in pixels (0 the edge of the first pixel) as OpenCV wants it: 0 its middle, in sixteenths."""
    x, y = np.rint((point - 0.5) * (1 << SUBPIXEL_BITS)).astype(int).tolist()
    return x, y
