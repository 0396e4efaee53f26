"""Small examples with known objects, and what is seen of them."""

import dataclasses

import numpy as np

from instseg_jax.data import examples, rasterize, transforms

RECIPE = transforms.Augmentation(
    photometric_probability=0.8,
    expand_probability=0.5,
    expand_max_ratio=4.0,
    crop_probability=0.8,
    flip_probability=0.5,
    vertical_flip_probability=0.0,
    quarter_turns=False,
    scale_jitter=None,
    copy_paste_probability=0.0,
    copy_paste_max_objects=5,
    copy_paste_scale=(0.5, 1.5),
)
NOTHING = dataclasses.replace(
    RECIPE, photometric_probability=0.0, expand_probability=0.0, crop_probability=0.0, flip_probability=0.0
)


def layout(**changes):
    return dataclasses.replace(
        examples.Layout("stretch", mask_stride=1, mask_rasterization="exact", refit_boxes=False, max_instances=9),
        **changes,
    )


def rectangle(x1, y1, x2, y2):
    return (np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64),)


def make_example(height=40, width=60, boxes=((5, 4, 25, 20), (30, 10, 50, 38)), seed=0):
    """A noise picture with one rectangular object for each box."""
    return examples.Example(
        image=np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8),
        view=rasterize.whole_view(height, width),
        is_float=False,
        boxes_xyxy_px=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.arange(len(boxes), dtype=np.int32),
        segmentations=tuple(rectangle(*box) for box in boxes),
    )


def seen_pixels(example):
    dtype = np.float32 if example.is_float else np.uint8
    return rasterize.view_pixels(example.image, example.view, examples.FILL_COLOR, dtype)


def seen_masks(example, rasterization="exact"):
    return rasterize.render_masks(
        example.segmentations,
        example.image.shape[:2],
        example.view,
        example.view.size,
        example.view.size,
        mask_stride=1,
        rasterization=rasterization,
    )


def assert_same(a, b):
    np.testing.assert_array_equal(seen_pixels(a), seen_pixels(b))
    np.testing.assert_array_equal(seen_masks(a), seen_masks(b))
    np.testing.assert_allclose(a.boxes_xyxy_px, b.boxes_xyxy_px)
    np.testing.assert_array_equal(a.labels, b.labels)
