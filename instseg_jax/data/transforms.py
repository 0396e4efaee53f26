"""Augmentation: pure functions from an `Example` and a random generator to an `Example`.

Colour distortion, expansion, cropping and mirroring follow PaddleDetection's Mask-RT-DETR recipe rule
by rule, with our own random stream; vertical mirroring, quarter turns and scale jitter are additions.
Geometry is only noted in the example's `View` (see `data/rasterize.py`); decoding comes before and
resizing after, both in `data/examples.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageStat

from instseg_jax.data import rasterize
from instseg_jax.data.examples import Example
from instseg_jax.messages import quote

ENHANCE_RANGE = (0.5, 1.5)  # factor of brightness, contrast and saturation
HUE_RANGE = (-18.0, 18.0)  # shift of the 8-bit hue
COLOR_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
CROP_IOU_THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)  # None: leave the picture as it is
CROP_TRIALS = 50  # for each threshold
CROP_SCALE = (0.3, 1.0)  # square root of the part of the area
CROP_ASPECT = (0.5, 2.0)
IOU_EPS = 1e-10


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What `augment` does, each field named as in the config's section data.augment."""

    photometric_probability: float
    expand_probability: float
    expand_max_ratio: float  # side of the canvas over side of the picture
    crop_probability: float
    flip_probability: float
    vertical_flip_probability: float
    quarter_turns: bool
    scale_jitter: tuple[float, float] | None  # zoom factors from and to; below 1 zooms out
    copy_paste_probability: float  # of a picture to get objects of another one, see copy_paste.py
    copy_paste_max_objects: int
    copy_paste_scale: tuple[float, float]  # of a pasted object, from and to

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"data.augment.{name} must be between 0 and 1, got {quote(value)}.")
        if self.expand_max_ratio < 1:
            raise ValueError(f"data.augment.expand_max_ratio must be at least 1, got {quote(self.expand_max_ratio)}.")
        jitter = self.scale_jitter
        if jitter is not None and not (len(jitter) == 2 and 0 < jitter[0] <= jitter[1]):
            raise ValueError(f"data.augment.scale_jitter must be None or (low, high) above 0, got {quote(jitter)}.")
        scale = self.copy_paste_scale
        if not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
            raise ValueError(f"data.augment.copy_paste_scale must be (low, high) above 0, got {quote(scale)}.")
        if self.copy_paste_max_objects < 1:
            raise ValueError(
                f"data.augment.copy_paste_max_objects must be at least 1, got {quote(self.copy_paste_max_objects)}."
            )


Transform = Callable[[Example, np.random.Generator], Example]  # of one's own


def augment(example: Example, rng: np.random.Generator, augmentation: Augmentation) -> Example:
    """Apply the augmentations of the reference, the additional ones after them.

    The reference begins with the colours. Here they come last, where only what is still seen has to be worked on;
    the result is the same, since neither looks at what the other does.
    """
    a = augmentation
    example = expand_canvas(example, rng, probability=a.expand_probability, max_ratio=a.expand_max_ratio)
    example = crop_around_objects(example, rng, probability=a.crop_probability)
    example = flip_randomly(example, rng, probability=a.flip_probability, horizontal=True)
    example = flip_randomly(example, rng, probability=a.vertical_flip_probability, horizontal=False)
    if a.quarter_turns:
        for _ in range(rng.integers(4)):
            example = turn(example)
    if a.scale_jitter is not None:
        example = jitter_scale(example, rng, scale_range=a.scale_jitter)
    return distort_colors(example, rng, probability=a.photometric_probability)


def distort_colors(example: Example, rng: np.random.Generator, *, probability: float) -> Example:
    """Change brightness, contrast, saturation and hue, each with probability 1/2, in random order.

    Contrast is that of the whole picture; pixels that the view does not see stay as they are. Pictures of other than
    three channels have no saturation and hue: only the first two are changed.
    """
    if rng.random() >= probability:
        return example
    operations = []
    for operation in (COLOR_OPERATIONS[i] for i in rng.permutation(4)):
        if rng.uniform(0.0, 1.0) >= 0.5:
            operations.append((operation, rng.uniform(*(HUE_RANGE if operation == "hue" else ENHANCE_RANGE))))
    part = rasterize.seen_source(example.view)
    image = example.image.copy()
    distort = _distort if image.shape[2] == 3 else _distort_channels
    image[part] = distort(example.image, operations, part)
    return dataclasses.replace(example, image=image, is_float=True)


def expand_canvas(example: Example, rng: np.random.Generator, *, probability: float, max_ratio: float) -> Example:
    """Put the view somewhere on a canvas of the mean colour that is up to `max_ratio` times as long."""
    if rng.random() >= probability:
        return example
    ratio = rng.uniform(1.0, max_ratio)
    height, width = example.view.size
    canvas_height, canvas_width = int(height * ratio), int(width * ratio)
    if canvas_height <= height or canvas_width <= width:
        return example
    y = int(rng.integers(0, canvas_height - height))
    x = int(rng.integers(0, canvas_width - width))
    return dataclasses.replace(
        example,
        view=rasterize.move_view(example.view, -y, -x, canvas_height, canvas_width),
        is_float=True,
        boxes_xyxy_px=example.boxes_xyxy_px + np.array([x, y, x, y], np.float32),
    )


def crop_around_objects(example: Example, rng: np.random.Generator, *, probability: float) -> Example:
    """Crop so that at least one object stays, with an IoU of crop and box above a random threshold.

    Objects stay when the centre of their box is inside; their boxes are clipped.
    """
    if rng.random() >= probability or not len(example.labels):
        return example
    height, width = example.view.size
    areas = (example.boxes_xyxy_px[:, 2:] - example.boxes_xyxy_px[:, :2]).prod(axis=1)
    for position in rng.permutation(len(CROP_IOU_THRESHOLDS)):
        threshold = CROP_IOU_THRESHOLDS[position]
        if threshold is None:
            return example
        for _ in range(CROP_TRIALS):
            scale = rng.uniform(*CROP_SCALE)
            aspect = rng.uniform(max(CROP_ASPECT[0], scale**2), min(CROP_ASPECT[1], scale**-2))
            # A picture of a few pixels could lose a whole side, one crop in 2^53 would not move at all.
            crop_height = min(max(int(height * scale / np.sqrt(aspect)), 1), height)
            crop_width = min(max(int(width * scale * np.sqrt(aspect)), 1), width)
            y = int(rng.integers(0, max(height - crop_height, 1)))
            x = int(rng.integers(0, max(width - crop_width, 1)))
            window = np.array([x, y, x + crop_width, y + crop_height], np.float32)
            if _window_iou(example.boxes_xyxy_px, areas, window).max() < threshold:
                continue
            cropped = crop(example, y, x, crop_height, crop_width)
            if len(cropped.labels):
                return cropped
    return example


def crop(example: Example, y: int, x: int, height: int, width: int) -> Example:
    """See only a rectangle of the view; it may reach beyond it. Boxes are clipped to the rectangle and objects
    go whose box has its centre outside or nothing inside.
    """
    window = np.array([x, y, x + width, y + height], np.float32)
    boxes = example.boxes_xyxy_px
    clipped = np.concatenate([np.maximum(boxes[:, :2], window[:2]), np.minimum(boxes[:, 2:], window[2:])], axis=1)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    keep = ((window[:2] <= centers) & (centers < window[2:]) & (clipped[:, :2] < clipped[:, 2:])).all(axis=1)
    clipped -= np.concatenate([window[:2], window[:2]])
    moved = dataclasses.replace(
        example, view=rasterize.move_view(example.view, y, x, height, width), boxes_xyxy_px=clipped
    )
    return take_objects(moved, np.flatnonzero(keep))


def flip_randomly(example: Example, rng: np.random.Generator, *, probability: float, horizontal: bool) -> Example:
    """Mirror with the given probability: left to right, or top to bottom."""
    return flip(example, horizontal=horizontal) if rng.random() < probability else example


def flip(example: Example, *, horizontal: bool) -> Example:
    """Mirror view and boxes left to right, or top to bottom."""
    height, width = example.view.size
    x1, y1, x2, y2 = example.boxes_xyxy_px.T
    if horizontal:
        x1, x2 = width - x2, width - x1
    else:
        y1, y2 = height - y2, height - y1
    return dataclasses.replace(
        example,
        view=rasterize.flip_view(example.view, horizontal=horizontal),
        boxes_xyxy_px=np.stack([x1, y1, x2, y2], axis=1),
    )


def turn(example: Example) -> Example:
    """Turn view and boxes by 90 degrees counter-clockwise."""
    width = example.view.size[1]
    x1, y1, x2, y2 = example.boxes_xyxy_px.T
    return dataclasses.replace(
        example,
        view=rasterize.turn_view(example.view),
        boxes_xyxy_px=np.stack([y1, width - x2, y2, width - x1], axis=1),
    )


def jitter_scale(example: Example, rng: np.random.Generator, *, scale_range: tuple[float, float]) -> Example:
    """Zoom by a factor drawn from `scale_range`, keeping the shape: in by a crop, out by a border.

    A crop that would leave no object is not made.
    """
    scale = rng.uniform(*scale_range)
    height, width = example.view.size
    new_height, new_width = max(int(height / scale + 0.5), 1), max(int(width / scale + 0.5), 1)
    y = _random_offset(height - new_height, rng)
    x = _random_offset(width - new_width, rng)
    zoomed = crop(example, y, x, new_height, new_width)
    if len(example.labels) and not len(zoomed.labels):
        return example
    return dataclasses.replace(zoomed, is_float=example.is_float or scale < 1)


def limit_objects(example: Example, rng: np.random.Generator, *, max_instances: int) -> tuple[Example, int]:
    """Keep a random choice of at most `max_instances` objects in their order; also says how many went."""
    num_dropped = len(example.labels) - max_instances
    if num_dropped <= 0:
        return example, 0
    keep = np.sort(rng.permutation(len(example.labels))[:max_instances])
    return take_objects(example, keep), num_dropped


def take_objects(example: Example, positions: np.ndarray) -> Example:
    """Keep the objects at the given positions."""
    return dataclasses.replace(
        example,
        boxes_xyxy_px=example.boxes_xyxy_px[positions],
        labels=example.labels[positions],
        segmentations=tuple(example.segmentations[i] for i in positions),
    )


def _distort(image: np.ndarray, operations: Sequence[tuple[str, float]], part: tuple[slice, slice]) -> np.ndarray:
    """The part of a picture [h, w, 3] after the operations, as if the whole of it had gone through them."""
    names = [name for name, _ in operations]
    needs_whole = names.index("contrast") if "contrast" in names else 0  # operations before it work on everything
    whole = Image.fromarray(image)
    for name, amount in operations[:needs_whole]:
        whole = _change_color(whole, name, amount, whole)
    seen = Image.fromarray(np.asarray(whole)[part])
    for name, amount in operations[needs_whole:]:
        seen = _change_color(seen, name, amount, whole)
    return np.asarray(seen)


def _distort_channels(
    image: np.ndarray, operations: Sequence[tuple[str, float]], part: tuple[slice, slice]
) -> np.ndarray:
    """Brightness and contrast of a part of a picture [h, w, C], about the mean of each channel of the whole of it."""
    pixels, mean = image[part].astype(np.float32), image.mean(axis=(0, 1), dtype=np.float32)
    for name, amount in operations:
        if name == "brightness":
            pixels, mean = pixels * amount, mean * amount
        elif name == "contrast":
            pixels = mean + (pixels - mean) * amount
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _change_color(image: Image.Image, name: str, amount: float, whole: Image.Image) -> Image.Image:
    if name == "hue":
        return _shift_hue(image, amount)
    if name == "contrast":  # as ImageEnhance does it, about the mean grey of the whole picture
        mean = int(ImageStat.Stat(whole.convert("L")).mean[0] + 0.5)
        return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, amount)
    return {"brightness": ImageEnhance.Brightness, "saturation": ImageEnhance.Color}[name](image).enhance(amount)


def _shift_hue(image: Image.Image, shift: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    # The sum is cut towards zero and wraps around, as the 8-bit hue circle does.
    shifted = (np.asarray(hue) + np.float64(shift)).astype(np.int32).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def _window_iou(boxes: np.ndarray, areas: np.ndarray, window: np.ndarray) -> np.ndarray:
    """IoU [n] of xyxy boxes [n, 4] of the given areas [n] with one window [4]."""
    sides = np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2])
    np.maximum(sides, 0, out=sides)
    intersection = sides[:, 0] * sides[:, 1]
    window_area = (window[2] - window[0]) * (window[3] - window[1])
    return intersection / (areas + window_area - intersection + IOU_EPS)


def _random_offset(room: int, rng: np.random.Generator) -> int:
    """A place within `room` spare pixels, in 0..room, or room..0 where room is negative."""
    return int(rng.integers(min(room, 0), max(room, 0) + 1))
