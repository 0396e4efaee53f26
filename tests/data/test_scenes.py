"""Made-up scenes: what is scattered is where masks and boxes say, and what is written is read back."""

import numpy as np
import pytest

from instseg_jax import masks
from instseg_jax.data import coco, scenes


@pytest.fixture(scope="module")
def facades():
    return coco.read_split("embedded", "train")


def scatter(facades, seed: int, count: int = 6):
    return scenes.scatter_objects(facades, (160, 240), np.random.default_rng(seed), count=count, scale_range=(0.2, 0.4))


def test_objects_lie_where_their_masks_say(facades):
    scene = scatter(facades, 1)
    ground = scenes.make_ground((160, 240), np.random.default_rng(1))  # the first thing that is drawn
    covered = np.zeros((160, 240), bool)
    assert 3 <= len(scene.labels) <= 6
    for box, segmentation in zip(scene.boxes_xyxy_px, scene.segmentations, strict=True):
        mask = masks.segmentation_to_mask(segmentation, 160, 240) > 0
        rows, columns = np.nonzero(mask)
        assert tuple(box) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert not (covered & mask).any()  # later objects hide earlier ones
        covered |= mask
    changed = (scene.image != ground).any(axis=-1)
    assert changed[covered].mean() > 0.95  # a pixel may have the ground's colour by chance
    assert changed.sum() == pytest.approx(covered.sum(), rel=0.2)  # hidden objects that went may leave some


def test_scenes_depend_on_the_generator_alone(facades):
    one, same, other = scatter(facades, 2), scatter(facades, 2), scatter(facades, 3)
    np.testing.assert_array_equal(one.image, same.image)
    assert (one.image != other.image).any()
    assert one.image.std() > 5


def test_a_data_set_without_objects_is_named(facades):
    empty = coco.take_images(facades, [])
    with pytest.raises(ValueError, match="instance_train has no object"):
        scatter(empty, 0)
