"""Loaders built from a config: what its fields do, and which values are refused before any work."""

import dataclasses

import ml_collections
import numpy as np
import pytest
from example_data import RECIPE as AUGMENTATION
from loader_data import assert_equal, take, write_loader_set

from instseg_jax.data import coco, loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_loader_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def dataset(folder):
    return coco.read_split(folder, "train")


def config(folder):
    augment = ml_collections.ConfigDict(dataclasses.asdict(AUGMENTATION))
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "data": {
                "dir": str(folder),
                "image_size": 64,
                "train_sizes": (32, 48),
                "interpolations": ("linear",),
                "eval_interpolation": "cubic",
                "max_instances": 4,
                "mask_stride": 4,
                "mask_rasterization": "polygon",
                "refit_boxes": False,
                "drop_empty_masks": None,
                "resize": "stretch",
                "keep_empty": False,
                "empty_share": None,
                "channels": 3,
                "scaling": "none",
                "num_workers": 1,
                "prefetch": 2,
                "use_processes": False,
                "augment": augment,
            },
            "train": {"batch_size": 2},
            "eval": {"batch_size": 4},
        }
    )


def test_build_train_loader(folder, dataset):
    built = loader.build_train_loader(config(folder), dataset)
    assert (built.num_batches, len(built.dataset)) == (2, 5)
    first = take(built.batches(), 3)
    assert first[0].targets.masks.shape[1:] == (4, first[0].images.shape[1] // 4, first[0].images.shape[2] // 4)
    assert_equal(next(built.batches(start_step=2)), first[2])
    assert built.counters["images"] == 8
    with_empty = config(folder)
    with_empty.data.keep_empty = True
    assert len(loader.build_train_loader(with_empty, dataset).dataset) == 7
    with_empty.data.update(keep_empty=False, empty_share=0.1)
    built = loader.build_train_loader(with_empty, dataset)
    assert (len(built.dataset), built.num_batches) == (7, 3)  # five with objects and one without


def test_build_eval_loader(folder, dataset):
    plain = loader.build_eval_loader(config(folder), dataset)
    assert (plain.num_batches, len(plain.dataset)) == (2, 7)
    batches = list(plain.batches())
    assert batches[0].images.shape == (4, 64, 64, 3)
    assert batches[0].targets.masks.shape == (4, 0, 16, 16)
    assert plain.counters == {"images": 7, "objects": 0, "dropped_objects": 0}
    with_targets = loader.build_eval_loader(config(folder), dataset, use_targets=True)
    batches = list(with_targets.batches())
    assert [batch.targets.valid.sum() for batch in batches] == [0 + 1 + 2 + 3, 4 + 4 + 0]
    assert with_targets.counters["dropped_objects"] == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.train_sizes", (30,), "image size must be a multiple of data.mask_stride = 4, got 30"),
        ("data.interpolations", ("bicubic",), "one of nearest, linear, area, cubic, lanczos, got 'bicubic'"),
        ("data.num_workers", -1, "data.num_workers must be >= 0"),
        ("data.prefetch", 0, "data.prefetch >= 1"),
        ("data.resize", "pad", "data.resize must be one of"),
        ("data.augment.crop_probability", 2.0, "data.augment.crop_probability"),
        ("train.batch_size", 0, "batch size"),
        ("seed", -1, "must not be negative"),
    ],
)
def test_build_refuses_before_any_work(folder, dataset, path, value, message):
    broken = config(folder)
    broken.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=message):
        loader.build_train_loader(broken, dataset)


def test_no_trainable_image_is_an_error(folder, dataset):
    bare = dataclasses.replace(dataset, annotations=((),) * len(dataset))
    with pytest.raises(ValueError, match=r"instance_train\.json has no image to load: none of its 7 images"):
        loader.build_train_loader(config(folder), bare)
    with pytest.raises(ValueError, match="multiple of the 3 hosts, got 2"):
        loader.build_train_loader(config(folder), dataset, process_index=0, process_count=3)


def test_embedded_data_set_trains_and_evaluates():
    built = config("embedded")
    built.data.num_workers = 2
    train_loader = loader.build_train_loader(built, coco.read_split(built.data.dir, "train"))
    for batch in take(train_loader.batches(), 4):
        assert batch.targets.valid.any(axis=1).all()
        assert np.isfinite(batch.images).all()
        filled = batch.targets.masks.any(axis=(2, 3))
        assert not filled[~batch.targets.valid].any()
        corners = batch.targets.boxes[..., :2] - batch.targets.boxes[..., 2:] / 2
        assert corners.min() >= -1e-6
    val = loader.build_eval_loader(built, coco.read_split(built.data.dir, "val"))
    assert sum(int(batch.image_valid.sum()) for batch in val.batches()) == 35
