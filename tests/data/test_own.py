"""Data from Python: sequences, streams and transforms of one's own, against pixels worked out by hand."""

import numpy as np
import pytest
from PIL import Image

import instseg_jax
from instseg_jax.data import examples, loader
from instseg_jax.data.coco import to_coco

CLASSES = ("round", "square")
SMALL = {
    "data.image_size": 64,
    "data.train_sizes": (64,),
    "data.max_instances": 4,
    "data.num_workers": 0,
    "train.batch_size": 2,
    "data.augment.photometric_probability": 0.0,
    "data.augment.flip_probability": 0.0,
    "data.augment.expand_probability": 0.0,
    "data.augment.crop_probability": 0.0,
    "data.augment.scale_jitter": None,
}


def make_item(number: int, size: tuple[int, int] = (64, 64)) -> dict:
    """A grey picture with a square that has a hole, and a bar."""
    masks = np.zeros((2, *size), bool)
    masks[0, 8:24, 8:24], masks[0, 12:16, 12:16] = True, False
    masks[1, 40:48, 0:64] = True
    return {"image": np.full((*size, 3), 10 * number, np.uint8), "labels": [1, 0], "masks": masks}


def small_config():
    return instseg_jax.load_config("configs/mask_rtdetr.py:n", SMALL)


def mirror(example, rng):
    """A transform that works on pixels, as those of albumentations do."""
    masks = instseg_jax.dense_masks(example)
    return instseg_jax.make_example(example.image[:, ::-1], example.labels, masks[:, :, ::-1])


def test_a_sequence_becomes_a_data_set_with_holes_and_boxes():
    items = [make_item(3), {"image": Image.new("RGB", (50, 40)), "labels": [], "masks": []}]
    dataset = instseg_jax.own_data(items, CLASSES)
    assert [(r.height, r.width) for r in dataset.images] == [(64, 64), (40, 50)]
    assert [a.area for a in dataset.annotations[0]] == [16 * 16 - 4 * 4, 8 * 64]
    assert dataset.annotations[0][0].box_xywh_px == (8, 8, 16, 16)
    assert [c["name"] for c in to_coco(dataset)["categories"]] == list(CLASSES)
    example = examples.load_example(dataset, 0)
    assert (example.image == 30).all() and list(example.labels) == [1, 0]
    np.testing.assert_array_equal(instseg_jax.dense_masks(example), items[0]["masks"])


def test_segmentations_say_the_same_as_masks():
    square = [[8, 8, 24, 8, 24, 24, 8, 24]]
    item = {"image": np.zeros((64, 64, 3), np.uint8), "labels": [0], "segmentations": [square]}
    (annotation,) = instseg_jax.own_data([item], CLASSES).annotations[0]
    assert (annotation.area, annotation.box_xywh_px) == (256, (8, 8, 16, 16))


def test_the_loader_batches_a_sequence_through_own_transforms():
    dataset = instseg_jax.own_data([make_item(n) for n in range(4)], CLASSES)
    plain, mirrored = (
        next(loader.build_train_loader(small_config(), dataset, own_transforms=own).batches())
        for own in ((), (mirror,))
    )
    masks = plain.targets.masks[:, :2]
    assert masks.any() and (masks != masks[..., ::-1]).any()
    np.testing.assert_array_equal(mirrored.targets.masks[:, :2], masks[..., ::-1])
    np.testing.assert_array_equal(mirrored.image_index, plain.image_index)
    np.testing.assert_allclose(mirrored.targets.boxes[:, 0, 0], 1 - plain.targets.boxes[:, 0, 0])


def test_a_stream_is_batched_in_its_order():
    stream = instseg_jax.batches((make_item(n) for n in range(5)), small_config(), num_classes=2)
    first, second = stream  # the fifth fills no batch
    assert np.allclose(first.images[:, 0, 0, 0] * 255, [0, 10]) and np.allclose(
        second.images[:, 0, 0, 0] * 255, [20, 30]
    )
    assert first.targets.valid.tolist() == [[True, True, False, False]] * 2
    stride = 64 // first.targets.masks.shape[-1]
    middles = make_item(0)["masks"][:, stride // 2 :: stride, stride // 2 :: stride]
    np.testing.assert_array_equal(second.targets.masks[0, :2], middles)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": [0, 2]}, "Item 0 of own data: a label is 2, it must be from 0 to 1"),
        ({"labels": [0]}, r"its masks have the shape \[2, 64, 64\], not \[1, 64, 64\]"),
        ({"segmentations": []}, "either masks or segmentations"),
        ({"image": np.zeros(3)}, "Item 0 of own data"),
    ],
)
def test_wrong_items_are_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        instseg_jax.own_data([make_item(0) | change], CLASSES)


def test_a_transform_that_returns_nothing_is_named():
    dataset = instseg_jax.own_data([make_item(n) for n in range(2)], CLASSES)
    with pytest.raises(RuntimeError, match="returned NoneType, not an Example"):
        next(loader.build_train_loader(small_config(), dataset, own_transforms=[lambda e, rng: None]).batches())


def test_objects_that_a_transform_has_moved_out_are_gone():
    example = examples.load_example(instseg_jax.own_data([make_item(0)], CLASSES), 0)
    masks = instseg_jax.dense_masks(example)
    masks[0] = 0
    left = instseg_jax.make_example(example.image, example.labels, masks)
    assert list(left.labels) == [0] and left.boxes_xyxy_px.tolist() == [[0, 40, 64, 48]]


def test_only_data_sets_are_trained_on(tmp_path):
    with pytest.raises(ValueError, match=r"dataset is a list; make it one with own_data"):
        instseg_jax.train(small_config(), tmp_path, dataset=[make_item(0)])
    with pytest.raises(ValueError, match="val_dataset is given without dataset"):
        instseg_jax.train(small_config(), tmp_path, val_dataset=instseg_jax.own_data([make_item(0)], CLASSES))
