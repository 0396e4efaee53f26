"""Instance copy-paste (Ghiasi et al. 2021): objects of one picture are put into another, whatever is behind.

Done in source pixels before every other augmentation, so that pasted objects go through all of them.
"""

import dataclasses

import cv2
import numpy as np

from instseg_jax import masks
from instseg_jax.data.examples import Example
from instseg_jax.images import in_groups

MIN_VISIBLE = 0.2  # of an object's pixels; one of which less is left behind what was pasted goes
MAX_SIDE = 0.9  # of the picture's sides that a pasted object may have
MIN_SIDE_PX = 2  # of a pasted object


def paste_objects(
    example: Example,
    donor: Example,
    rng: np.random.Generator,
    *,
    max_objects: int,
    scale_range: tuple[float, float],
) -> Example:
    """Paste one to `max_objects` objects of `donor`, each scaled, half of them mirrored, at random places.

    Both examples must be as loaded, without augmentation. Objects that are then hidden, but for a fifth, go; the
    masks and boxes of those that are partly hidden follow what is left.
    """
    if not len(donor.labels):
        return example
    count = min(len(donor.labels), int(rng.integers(1, max_objects + 1)))
    image = example.image.copy()
    for position in np.sort(rng.permutation(len(donor.labels))[:count]):
        cut = _cut_out(donor, int(position), image.shape[:2], rng.uniform(*scale_range), is_mirrored=rng.random() < 0.5)
        if cut is None:
            continue
        pixels, mask = cut
        y = int(rng.integers(0, image.shape[0] - mask.shape[0] + 1))
        x = int(rng.integers(0, image.shape[1] - mask.shape[1] + 1))
        place = (slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1]))
        image[place][mask > 0] = pixels[mask > 0]
        example = _hide_behind(example, place, mask)
        whole = np.zeros(image.shape[:2], np.uint8)
        whole[place] = mask
        example = dataclasses.replace(
            example,
            boxes_xyxy_px=np.concatenate([example.boxes_xyxy_px, [_box_of(whole)]]).astype(np.float32),
            labels=np.append(example.labels, donor.labels[position]).astype(np.int32),
            segmentations=(*example.segmentations, masks.encode_mask(whole)),
        )
    return dataclasses.replace(example, image=image)


def _cut_out(
    donor: Example, position: int, size: tuple[int, int], scale: float, *, is_mirrored: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """Pixels [h, w, C] and mask [h, w] of an object, scaled, no larger than fits `size`; None if nothing is left."""
    mask = masks.segmentation_to_mask(donor.segmentations[position], *donor.image.shape[:2])
    extent = masks.mask_box_xyxy_px(mask)
    if extent is None:
        return None
    x1, y1, x2, y2 = extent
    pixels, mask = donor.image[y1:y2, x1:x2], mask[y1:y2, x1:x2]
    scale = min(scale, MAX_SIDE * size[0] / mask.shape[0], MAX_SIDE * size[1] / mask.shape[1])
    height, width = (round(side * scale) for side in mask.shape)
    if min(height, width) < MIN_SIDE_PX:
        return None
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    pixels = in_groups(lambda x: cv2.resize(x, (width, height), interpolation=interpolation), pixels)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    if not mask.any():
        return None
    return (pixels[:, ::-1], mask[:, ::-1]) if is_mirrored else (pixels, mask)


def _hide_behind(example: Example, place: tuple[slice, slice], mask: np.ndarray) -> Example:
    """Take the pixels under a pasted mask from the objects that were there."""
    (rows, columns), boxes = place, example.boxes_xyxy_px.copy()
    x1, y1, x2, y2 = boxes.T
    touched = (x1 < columns.stop) & (x2 > columns.start) & (y1 < rows.stop) & (y2 > rows.start)
    segmentations, kept = list(example.segmentations), np.ones(len(boxes), bool)
    for i in np.flatnonzero(touched):
        left = masks.segmentation_to_mask(segmentations[i], *example.image.shape[:2])
        before = int(left.sum())
        left[place][mask > 0] = 0
        after = int(left.sum())
        if after == before:
            continue
        kept[i] = after > MIN_VISIBLE * before
        if kept[i]:
            segmentations[i], boxes[i] = masks.encode_mask(left), _box_of(left)
    return dataclasses.replace(
        example,
        boxes_xyxy_px=boxes[kept],
        labels=example.labels[kept],
        segmentations=tuple(s for s, keep in zip(segmentations, kept, strict=True) if keep),
    )


def _box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    extent = masks.mask_box_xyxy_px(mask)
    assert extent is not None  # the mask has a pixel
    return extent
