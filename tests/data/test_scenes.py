"""Made-up scenes: what is scattered is where masks and boxes say, and what is written is read back."""

import json

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


def test_a_written_split_is_read_back(facades, tmp_path):
    made = [scatter(facades, 4), scatter(facades, 5, count=0)]
    file = scenes.write_examples(tmp_path, "train", made, ["house"])
    assert "info" in json.loads(file.read_text(encoding="utf-8"))  # pycocotools 2.0.9 and 2.0.10 ask for it
    read = coco.read_split(tmp_path, "train")
    assert (read.annotation_file, read.categories) == (file, ("house",))
    assert [len(of_image) for of_image in read.annotations] == [len(made[0].labels), 0]
    np.testing.assert_array_equal(read.read_image(0), made[0].image)
    for annotation, segmentation, box in zip(
        read.annotations[0], made[0].segmentations, made[0].boxes_xyxy_px, strict=True
    ):
        mask = masks.segmentation_to_mask(segmentation, 160, 240)
        np.testing.assert_array_equal(masks.segmentation_to_mask(annotation.segmentation, 160, 240), mask)
        assert annotation.area == mask.sum() > 0
        x, y, w, h = annotation.box_xywh_px
        assert (x, y, x + w, y + h) == tuple(box)


def test_a_data_set_without_objects_is_named(facades):
    empty = coco.take_images(facades, [])
    with pytest.raises(ValueError, match="instance_train has no object"):
        scatter(empty, 0)
