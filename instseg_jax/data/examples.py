"""One picture with its objects: decoded from the data set, and finished as network input.

`load_example` gives an `Example` in source pixels, `data/transforms.py` augments it, `finish` makes
the `Sample` that `data/loader.py` batches. For evaluation `finish` follows `load_example` directly.
"""

import dataclasses

import numpy as np

from instseg_jax import images, masks
from instseg_jax.data import coco, rasterize
from instseg_jax.messages import quote

FILL_COLOR = (123.675, 116.28, 103.53)  # RGB 0..255 beyond the picture when a view is wider, of the reference


@dataclasses.dataclass(frozen=True)
class Layout:
    """How samples are laid out: the resize of the picture and the form of its targets."""

    resize: str  # "stretch" or "letterbox" (content in the top left corner, black beyond it)
    mask_stride: int  # network pixels per mask pixel
    mask_rasterization: str  # "exact" or "polygon", see rasterize.render_masks
    refit_boxes: bool  # boxes from what is left of the masks; the reference keeps clipped boxes
    max_instances: int  # target slots per picture
    drop_empty_masks: bool = False  # leave out objects whose mask has no pixel left; the reference keeps them

    def __post_init__(self):
        for name, choice, allowed in (
            ("resize", self.resize, ("stretch", "letterbox")),
            ("mask_rasterization", self.mask_rasterization, ("exact", "polygon")),
        ):
            if choice not in allowed:
                raise ValueError(f"data.{name} must be one of {', '.join(allowed)}, got {quote(choice)}.")
        for name, value, least in (("mask_stride", self.mask_stride, 1), ("max_instances", self.max_instances, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"data.{name} must be a whole number of at least {least}, got {quote(value)}.")


@dataclasses.dataclass(frozen=True)
class Example:
    """A decoded picture with its objects, and the view of it that augmentation has chosen so far."""

    image: np.ndarray  # [h, w, 3] uint8 RGB, the whole source picture
    view: rasterize.View
    is_float: bool  # resize as float32: so does the reference once colours or canvas were changed
    boxes_xyxy_px: np.ndarray  # [n, 4] float32, pixels of the view's frame
    labels: np.ndarray  # [n] int32
    segmentations: tuple[masks.Segmentation, ...]  # of the source picture


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture at network resolution with its n objects."""

    image: np.ndarray  # [H, W, 3] float32 RGB, 0..1
    boxes: np.ndarray  # [n, 4] float32 normalised cxcywh
    labels: np.ndarray  # [n] int32
    masks: np.ndarray  # [n, H / mask_stride, W / mask_stride] uint8
    original_size: tuple[int, int]  # (height, width) of the file
    content_size: tuple[int, int]  # (height, width) of the network input that the picture fills
    num_dropped: int = 0  # objects beyond max_instances


def load_example(dataset: coco.CocoDataset, index: int) -> Example:
    """Decode the picture at a position of the data set and gather its objects.

    Raises ValueError, naming the file, when the decoded size is not the one of the annotation file.
    """
    record, image = dataset.images[index], dataset.read_image(index)
    height, width = image.shape[:2]
    if (height, width) != (record.height, record.width):
        hint = " (turned as its EXIF orientation says)" if (width, height) == (record.height, record.width) else ""
        raise ValueError(
            f"{str(dataset.image_path(index))!r} is {width}x{height} pixels{hint}, "
            f"but {dataset.name} says {record.width}x{record.height}."
        )
    boxes, labels, segmentations = dataset.training_targets(index)
    return Example(
        image=image,
        view=rasterize.whole_view(height, width),
        is_float=False,
        boxes_xyxy_px=boxes,
        labels=labels,
        segmentations=segmentations,
    )


def finish(
    example: Example, size: tuple[int, int], interpolation: str, layout: Layout, out: np.ndarray | None = None
) -> Sample:
    """Carry out the view: resize the picture to `size` (height, width), draw the masks, normalise the boxes.

    The picture is written to `out` [H, W, 3] float32 where that is given.

    For evaluation that is all there is to do: stretched with "cubic" it is the reference's preprocessing.

    Raises: ValueError when `size` is no multiple of the mask stride.
    """
    if size[0] % layout.mask_stride or size[1] % layout.mask_stride:
        raise ValueError(f"The size {size[0]}x{size[1]} is not a multiple of data.mask_stride {layout.mask_stride}.")
    dtype = np.dtype(np.float32 if example.is_float else np.uint8)
    pixels = rasterize.view_pixels(example.image, example.view, FILL_COLOR, dtype)
    content = images.content_size(example.view.size, size, layout.resize)
    height, width = example.view.size
    scale = np.array([content[1] / width, content[0] / height] * 2)
    limit = np.array([content[1], content[0]] * 2, np.float32)
    boxes = np.clip((example.boxes_xyxy_px * scale).astype(np.float32), 0, limit)
    labels = example.labels
    rendered = rasterize.render_masks(
        example.segmentations,
        example.image.shape[:2],
        example.view,
        content,
        size,
        mask_stride=1 if layout.refit_boxes else layout.mask_stride,
        rasterization=layout.mask_rasterization,
    )
    if layout.refit_boxes:
        boxes, visible = _refit_boxes(rendered)
        middles = slice(layout.mask_stride // 2, None, layout.mask_stride)
        labels, rendered = labels[visible], rendered[visible][:, middles, middles]
    if layout.drop_empty_masks:
        kept = rendered.any(axis=(1, 2))
        boxes, labels, rendered = boxes[kept], labels[kept], rendered[kept]
    return Sample(
        image=images.resize_pixels(pixels, content, size, interpolation, out),
        boxes=_normalise_boxes(boxes, size),
        labels=labels,
        masks=rendered,
        original_size=example.image.shape[:2],
        content_size=content,
    )


def _refit_boxes(rendered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel boxes [v, 4] around the masks [n, H, W], and the positions [v] of those that have a pixel."""
    extents = [masks.mask_box_xyxy_px(mask) for mask in rendered]
    visible = np.flatnonzero([extent is not None for extent in extents])
    return np.array([extents[i] for i in visible], np.float32).reshape(-1, 4), visible


def _normalise_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    corners = boxes / np.array([size[1], size[0]] * 2, np.float32)
    sides = corners[:, 2:] - corners[:, :2]
    return np.concatenate([corners[:, :2] + sides / 2, sides], axis=1)
