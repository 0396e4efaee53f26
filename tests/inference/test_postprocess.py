"""Post-processing against numbers worked out by hand, jax.image.resize, OpenCV and pycocotools."""

import tracemalloc

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as mask_api
from scipy.ndimage import gaussian_filter

from instseg_jax.inference import postprocess
from instseg_jax.inference.postprocess import (
    detections_to_instances,
    encode_masks,
    select_detections,
    upsample_masks,
)
from instseg_jax.types import Detections, Outputs


def smooth_logits(count: int, height: int, width: int, *, sigma: float = 2.0, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((count, height, width))
    return np.stack([gaussian_filter(field, sigma) for field in noise]).astype(np.float32) * 20


def stretched(size: tuple[int, int], original_size: tuple[int, int]) -> dict:
    return {"input_size": size, "content_size": size, "original_size": original_size}


def reference_rles(masks: np.ndarray) -> list[str]:
    return [mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode() for mask in masks]


# --- selection -----------------------------------------------------------------------------------------------------


def two_image_outputs() -> Outputs:
    logit = {0.9: 2.1972246, 0.8: 1.3862944, 0.6: 0.4054651, 0.5: 0.0, 0.3: -0.8472979, 0.1: -2.1972246}
    table = [[[0.1, 0.9, 0.6], [0.8, 0.3, 0.5]], [[0.3, 0.1, 0.5], [0.6, 0.9, 0.8]]]
    return Outputs(
        class_logits=np.array([[[logit[v] for v in row] for row in image] for image in table], np.float32),
        boxes=np.array([[[0.5, 0.5, 0.4, 0.2], [0.9, 0.1, 0.6, 0.4]]] * 2, np.float32),
        mask_logits=np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2),
    )


def test_selection_by_hand():
    select = jax.jit(select_detections, static_argnames="num_detections")
    detections = select(two_image_outputs(), num_detections=4)
    np.testing.assert_allclose(detections.scores, [[0.9, 0.8, 0.6, 0.5], [0.9, 0.8, 0.6, 0.5]], atol=1e-6)
    # One query comes back with several of its classes.
    np.testing.assert_array_equal(detections.labels, [[1, 0, 2, 2], [1, 2, 0, 2]])
    # Corners are not clipped: the second query reaches over the right and the upper side.
    first, second = [0.3, 0.4, 0.7, 0.6], [0.6, -0.1, 1.2, 0.3]
    expected = [[first, second, first, second], [second, second, second, first]]
    np.testing.assert_allclose(detections.boxes_xyxy, expected, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(detections.mask_logits)[:, :, 0, 0], [[0, 4, 0, 4], [12, 12, 12, 8]])
    assert detections.scores.dtype == jnp.float32 and detections.labels.dtype == jnp.int32


def test_selection_keeps_all_pairs_when_asked_for_more():
    detections = select_detections(two_image_outputs(), num_detections=100)
    assert detections.scores.shape == (2, 6) and detections.mask_logits.shape == (2, 6, 2, 2)
    assert np.all(np.diff(detections.scores, axis=1) < 0)
    pairs = {
        (int(label), float(mask[0, 0]))
        for label, mask in zip(detections.labels[0], detections.mask_logits[0], strict=True)
    }
    assert pairs == {(label, corner) for label in range(3) for corner in (0.0, 4.0)}


def test_selection_agrees_with_a_sort_of_everything():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((3, 40, 7)).astype(np.float32)
    outputs = Outputs(logits, rng.uniform(size=(3, 40, 4)), rng.standard_normal((3, 40, 5, 6)))
    detections = select_detections(outputs, num_detections=25)
    for image in range(3):
        pairs = [(-logits[image, q, k], q, k) for q in range(40) for k in range(7)]
        best = sorted(pairs)[:25]
        np.testing.assert_array_equal(detections.labels[image], [k for _, _, k in best])
        np.testing.assert_allclose(
            detections.mask_logits[image], outputs.mask_logits[image][[q for _, q, _ in best]], rtol=1e-6
        )


def test_selection_with_one_class():
    outputs = Outputs(np.array([[[-1.0], [3.0], [0.0]]]), np.zeros((1, 3, 4)), np.arange(3.0).reshape(1, 3, 1, 1))
    detections = select_detections(outputs, num_detections=2)
    np.testing.assert_array_equal(detections.labels, [[0, 0]])
    np.testing.assert_array_equal(np.ravel(detections.mask_logits), [1.0, 2.0])


def test_selection_scores_half_precision_in_float32():
    # In bfloat16 both sigmoids round to the same number, and the order would be that of the queries.
    logits = jnp.array([[[5.0], [5.03125]]], jnp.bfloat16)
    assert jax.nn.sigmoid(logits)[0, 0, 0] == jax.nn.sigmoid(logits)[0, 1, 0]
    outputs = Outputs(logits, jnp.zeros((1, 2, 4), jnp.bfloat16), jnp.arange(2.0).reshape(1, 2, 1, 1))
    detections = select_detections(outputs, num_detections=2)
    np.testing.assert_array_equal(np.ravel(detections.mask_logits), [1.0, 0.0])
    assert detections.scores.dtype == jnp.float32 and detections.boxes_xyxy.dtype == jnp.float32


def test_selection_rejects_no_detections():
    with pytest.raises(ValueError, match="num_detections must be at least 1, got 0"):
        select_detections(two_image_outputs(), num_detections=0)


# --- upsampling ----------------------------------------------------------------------------------------------------


def test_upsampling_by_hand():
    # Centres of 4 pixels on 2 cells: -0.25 (held at 0), 0.25, 0.75, 1.25 (held at 1): logits -1, -0.5, 0.5, 1.
    grid = np.array([[[-1.0, 1.0]]])
    for encode in (
        upsample_masks,
        lambda *args, **kw: np.stack([mask_api.decode(r) for r in encode_masks(*args, **kw)]),
    ):
        mask = encode(grid, **stretched((4, 8), (1, 4)))
        np.testing.assert_array_equal(mask, [[[0, 0, 1, 1]]])
        # A probability of 0.7 is a logit of 0.85, one of 0.3 is -0.85.
        np.testing.assert_array_equal(encode(grid, **stretched((4, 8), (1, 4)), threshold=0.7), [[[0, 0, 0, 1]]])
        np.testing.assert_array_equal(encode(grid, **stretched((4, 8), (1, 4)), threshold=0.3), [[[0, 1, 1, 1]]])


def test_a_logit_of_zero_is_outside():
    assert not upsample_masks(np.zeros((1, 2, 2)), **stretched((8, 8), (5, 5))).any()


def test_downsampling_is_bilinear_without_antialiasing():
    # The centre of the only pixel lies between the two inner cells; averaging all four would give +4.
    grid = np.array([[[9.0, -1.0, -1.0, 9.0]]])
    assert not upsample_masks(grid, **stretched((4, 16), (1, 1))).any()
    assert upsample_masks(-grid, **stretched((4, 16), (1, 1))).all()


@pytest.mark.parametrize("original_size", [(480, 640), (37, 51), (40, 40), (17, 300), (1, 1), (7, 5), (41, 13)])
def test_upsampling_agrees_with_other_resizers(original_size):
    logits = smooth_logits(3, 40, 32)
    masks = upsample_masks(logits, **stretched((160, 128), original_size))
    resized = np.asarray(jax.image.resize(logits, (3, *original_size), "bilinear", antialias=False))
    in_opencv = np.stack([cv2.resize(field, original_size[::-1], interpolation=cv2.INTER_LINEAR) for field in logits])
    assert masks.dtype == bool and masks.shape == resized.shape
    for other in (resized, in_opencv):
        clear = np.abs(other) > 1e-4
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(masks[clear], other[clear] > 0)


SIZES = [
    ((640, 640), (640, 640), (480, 640)),
    ((640, 640), (640, 640), (101, 97)),
    ((640, 640), (640, 480), (853, 640)),
    ((640, 640), (419, 640), (333, 509)),
    ((160, 224), (97, 224), (60, 31)),
]


@pytest.mark.parametrize(("input_size", "content_size", "original_size"), SIZES)
@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.9])
def test_encoding_where_needed_equals_upsampling_everything(
    monkeypatch, input_size, content_size, original_size, threshold
):
    h, w = input_size[0] // 4, input_size[1] // 4
    logits = smooth_logits(8, h, w)
    rows, columns = np.mgrid[:h, :w]
    logits[1] = 8 * (1 - ((rows - h / 3) / 9) ** 2 - ((columns - w / 2) / 5) ** 2)  # a compact object
    logits[2] = -5
    logits[2, h // 2 :, w // 3] = 3  # one column of cells
    logits[3] = 5  # everything
    logits[4] = -5  # nothing
    logits[5] = -1e-7
    logits[5, 5, 7] = 1e-7  # rounding must not create pixels beside it
    logits[6] = -np.float32(1e30)
    logits[6, 0, 0] = logits[6, -1, -1] = 1
    sizes = {"input_size": input_size, "content_size": content_size, "original_size": original_size}
    masks = upsample_masks(logits, **sizes, threshold=threshold)
    assert masks.any() and not masks.all()
    for block_pixels in (postprocess.BLOCK_PIXELS, 1000, 1):
        monkeypatch.setattr(postprocess, "BLOCK_PIXELS", block_pixels)
        rles = encode_masks(logits, **sizes, threshold=threshold)
        np.testing.assert_array_equal([mask_api.decode(rle) for rle in rles], masks)
        # Runs are joined across columns and blocks: the code is the one that pycocotools writes.
        assert [rle["counts"] for rle in rles] == reference_rles(masks)
        assert all(rle["size"] == list(original_size) for rle in rles)


def test_encoding_of_corners_and_borders():
    for cells in [(0, 0), (0, 4), (4, 0), (4, 4), (slice(None), 0), (0, slice(None)), (slice(None), 4)]:
        logits = np.full((1, 5, 5), -1.0)
        logits[(0, *np.atleast_1d(cells))] = 1.0
        masks = upsample_masks(logits, **stretched((20, 20), (20, 20)))
        rles = encode_masks(logits, **stretched((20, 20), (20, 20)))
        assert 0 < masks.sum() < 400
        assert [rle["counts"] for rle in rles] == reference_rles(masks)


def test_a_single_pixel():
    logits = np.full((1, 3, 3), -1.0)
    logits[0, 1, 2] = 1.0
    (rle,) = encode_masks(logits, **stretched((12, 12), (3, 3)))
    np.testing.assert_array_equal(mask_api.decode(rle), [[0, 0, 0], [0, 0, 1], [0, 0, 0]])


def test_no_masks():
    sizes = stretched((640, 640), (48, 64))
    assert encode_masks(np.zeros((0, 160, 160)), **sizes) == []
    assert upsample_masks(np.zeros((0, 160, 160)), **sizes).shape == (0, 48, 64)


def test_input_is_left_alone():
    logits = smooth_logits(2, 16, 16)
    before = logits.copy()
    encode_masks(logits, **stretched((64, 64), (50, 70)), threshold=0.3)
    upsample_masks(logits, **stretched((64, 64), (50, 70)), threshold=0.3)
    np.testing.assert_array_equal(logits, before)


# --- letterbox -----------------------------------------------------------------------------------------------------


def test_letterbox_on_whole_cells_is_the_plain_resize_of_its_cells():
    logits = smooth_logits(4, 40, 40)
    boxed = upsample_masks(logits, input_size=(160, 160), content_size=(160, 96), original_size=(301, 173))
    plain = upsample_masks(logits[:, :, :24], **stretched((160, 96), (301, 173)))
    np.testing.assert_array_equal(boxed, plain)
    assert not np.array_equal(boxed, upsample_masks(logits, **stretched((160, 160), (301, 173))))


def test_letterbox_that_ends_within_a_cell_by_hand():
    # Content 10 of 16 on 4 cells, the original 10 wide: pixel p lies at (p + 0.5) / 4 - 0.5 cells.
    # The ramp is 0, 1, 2, 3 less 1.6: positive from 1.6 cells on, where p > 7.9.
    ramp = np.arange(4.0)[None, None] - 1.6
    sizes = {"input_size": (4, 16), "content_size": (4, 10), "original_size": (1, 10)}
    np.testing.assert_array_equal(np.flatnonzero(upsample_masks(ramp, **sizes)), [8, 9])
    # At twice the width pixel p lies at (p + 0.5) / 8 - 0.5: p > 16.3.
    sizes["original_size"] = (1, 20)
    np.testing.assert_array_equal(np.flatnonzero(upsample_masks(ramp, **sizes)), [17, 18, 19])


def test_letterbox_at_its_own_scale_is_a_crop_of_the_input():
    logits = smooth_logits(3, 40, 40)
    content = (150, 91)
    at_input = np.asarray(jax.image.resize(logits, (3, 160, 160), "bilinear", antialias=False))[:, :150, :91]
    masks = upsample_masks(logits, input_size=(160, 160), content_size=content, original_size=content)
    clear = np.abs(at_input) > 1e-4
    clear[:, :, 90:] = False  # beyond the centre of the last cell that the image touches, there is only padding
    np.testing.assert_array_equal(masks[clear], at_input[clear] > 0)


def test_padding_never_leaks_into_the_image():
    logits = np.full((1, 4, 4), 100.0)
    logits[:, :2, :2] = -1
    sizes = {"input_size": (16, 16), "content_size": (8, 8), "original_size": (33, 33)}
    assert not upsample_masks(logits, **sizes).any()
    assert mask_api.area(encode_masks(logits, **sizes)[0]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content_size": (17, 16)}, "content height must be 1..16"),
        ({"content_size": (16, 0)}, "content width must be 1..16"),
        ({"original_size": (0, 5)}, "original height must be at least 1"),
        ({"threshold": 1.0}, "between 0 and 1, got 1.0"),
        ({"threshold": 0.0}, "between 0 and 1, got 0.0"),
    ],
)
def test_bad_sizes_and_thresholds(changes, message):
    arguments = {"input_size": (16, 16), "content_size": (16, 16), "original_size": (5, 5)} | changes
    for function in (upsample_masks, encode_masks):
        with pytest.raises(ValueError, match=message):
            function(np.zeros((1, 4, 4)), **arguments)


# --- instances -----------------------------------------------------------------------------------------------------


def small_detections() -> Detections:
    logits = np.full((2, 3, 4, 4), -1.0, np.float32)
    logits[0, 0, :2, :2] = 1
    logits[1, :, 3, 3] = 1
    return Detections(
        scores=np.array([[0.9, 0.5, 0.2], [0.8, 0.7, 0.1]], np.float32),
        labels=np.array([[2, 0, 1], [1, 1, 1]]),
        boxes_xyxy=np.array([[[0, 0, 0.5, 0.5], [0.25, 0.5, 1.25, 1.0], [-3, -3, -2, -2]]] * 2, np.float32),
        mask_logits=logits,
    )


def test_instances_of_images_of_different_sizes():
    detections = small_detections()
    first = detections_to_instances(detections, 0, **stretched((16, 16), (30, 20)))
    np.testing.assert_allclose(first.scores, [0.9, 0.5, 0.2])
    np.testing.assert_array_equal(first.labels, [2, 0, 1])
    # x by 20, y by 30; a box that leaves the image, and one beside it, stay as they are.
    expected = [[0, 0, 10, 15], [5, 15, 25, 30], [-60, -90, -40, -60]]
    np.testing.assert_allclose(first.boxes_xyxy_px, expected, rtol=1e-6)
    assert [int(mask_api.area(rle)) for rle in first.masks][1:] == [0, 0]
    np.testing.assert_array_equal(mask_api.toBbox(first.masks[0]), [0, 0, 10, 15])
    second = detections_to_instances(detections, 1, **stretched((16, 16), (8, 8)))
    np.testing.assert_allclose(second.boxes_xyxy_px[0], [0, 0, 4, 4])
    np.testing.assert_array_equal(mask_api.toBbox(second.masks[2]), [6, 6, 2, 2])


def test_instances_of_a_letterboxed_image():
    # The image fills the left half of the input: x is normalised by twice its width.
    sizes = {"input_size": (16, 16), "content_size": (16, 8), "original_size": (32, 16)}
    instances = detections_to_instances(small_detections(), 0, **sizes)
    np.testing.assert_allclose(instances.boxes_xyxy_px[:2], [[0, 0, 16, 16], [8, 16, 40, 32]])
    np.testing.assert_array_equal(mask_api.toBbox(instances.masks[0]), [0, 0, 16, 16])


def test_score_threshold_leaves_out_instances():
    sizes = stretched((16, 16), (30, 20))
    kept = detections_to_instances(small_detections(), 0, **sizes, score_threshold=0.5)
    assert len(kept) == 2 and len(kept.masks) == 2
    np.testing.assert_array_equal(kept.labels, [2, 0])
    nothing = detections_to_instances(small_detections(), 0, **sizes, score_threshold=0.95)
    assert len(nothing) == 0 and nothing.masks == [] and nothing.boxes_xyxy_px.shape == (0, 4)


def test_from_logits_to_instances():
    outputs = two_image_outputs()
    detections = select_detections(outputs, num_detections=3)
    instances = detections_to_instances(detections, 1, **stretched((8, 8), (4, 6)))
    np.testing.assert_array_equal(instances.labels, [1, 2, 0])
    np.testing.assert_allclose(instances.boxes_xyxy_px[0], [3.6, -0.4, 7.2, 1.2], rtol=1e-5)
    assert all(mask_api.area(rle) == 24 for rle in instances.masks)  # all logits of that image are positive


def test_many_instances_of_a_large_image_take_little_memory():
    rows, columns = np.mgrid[:160, :160].astype(np.float32)
    rng = np.random.default_rng(0)
    logits = np.stack(
        [8 * (1 - ((rows - y) / b) ** 2 - ((columns - x) / a) ** 2)
         for y, x, a, b in rng.uniform([0, 0, 3, 3], [160, 160, 40, 40], (300, 4))]
    )  # fmt: skip
    logits[:4] = smooth_logits(4, 160, 160, sigma=4)  # positive all over the image
    tracemalloc.start()
    rles = encode_masks(logits, **stretched((640, 640), (3000, 4000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert min(mask_api.area(rle) for rle in rles) > 0
    assert mask_api.area(rles[0]) > 3_000_000
    # As floats they would be 14 GB, as bits 450 MB.
    assert peak < 60e6
