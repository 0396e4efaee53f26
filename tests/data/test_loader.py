"""Batches: static shapes, order, resume, hosts, threads, and what happens at the edges."""

import collections
import dataclasses
import itertools
import multiprocessing
import threading

import cv2
import numpy as np
import pytest
from example_data import NOTHING as NO_AUGMENTATION
from example_data import RECIPE as AUGMENTATION
from loader_data import arrays, assert_equal, take, write_loader_set

from instseg_jax.data import batches, coco, epochs, examples, loader, transforms

LAYOUT = examples.Layout("stretch", mask_stride=2, mask_rasterization="exact", refit_boxes=False, max_instances=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_loader_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def dataset(folder):
    return coco.read_split(folder, "train")


@pytest.fixture(scope="module")
def trainable(dataset):
    return coco.select_trainable(dataset, keep_empty=False)


def train(dataset, **changes):
    """Training batches as `changes` ask, by the names of fields, wherever these belong."""
    recipe = {"seed": 3, "batch_size": 2, "sizes": [(32, 32), (48, 48)], "interpolations": ("linear", "cubic")}
    recipe |= {"augmentation": AUGMENTATION, "layout": LAYOUT}
    arguments = {"start_step": 0, "pool": epochs.make_pool(dataset, None)} | common(changes)
    recipe |= {name: changes.pop(name) for name in recipe if name in changes}
    recipe = batches.Recipe(**recipe | {"sizes": tuple(recipe["sizes"])})
    return loader.train_batches(dataset, recipe, **(arguments | changes))


def common(changes):
    """What training and evaluation share; takes its part out of `changes`."""
    workers = {"num_workers": 0, "prefetch": 2, "use_processes": False}
    share = {"process_index": 0, "process_count": 1}
    workers |= {name: changes.pop(name) for name in workers if name in changes}
    share |= {name: changes.pop(name) for name in share if name in changes}
    return {
        "workers": loader.Workers(**workers),
        "share": loader.Share(*share.values()),
        "counters": collections.Counter(),
    }


def evaluate(dataset, **changes):
    arguments = {"batch_size": 3, "size": (32, 48), "interpolation": "cubic", "layout": LAYOUT} | common(changes)
    return loader.eval_batches(dataset, **(arguments | changes))


def test_train_batch_holds_images_and_targets(trainable):
    batch = next(train(trainable, augmentation=NO_AUGMENTATION, sizes=[(32, 64)], batch_size=5))
    assert sorted(batch.image_index.tolist()) == [0, 1, 2, 3, 4]
    assert batch.images.shape == (5, 32, 64, 3)
    assert batch.images.dtype == np.float32
    assert batch.targets.masks.shape == (5, 3, 16, 32)
    assert batch.targets.masks.dtype == np.uint8
    assert batch.image_valid.all()
    for i, index in enumerate(batch.image_index):
        number = index + 1  # the picture without objects is left out
        width = 50 + number
        np.testing.assert_allclose(batch.images[i], 20 * number / 255, rtol=1e-6)
        assert batch.original_sizes[i].tolist() == [40, width]
        assert batch.content_sizes[i].tolist() == [32, 64]
        count = min(number, 3)
        assert batch.targets.valid[i].tolist() == [True] * count + [False] * (3 - count)
        assert not batch.targets.masks[i, count:].any()
        assert not batch.targets.boxes[i, count:].any()
        boxes = batch.targets.boxes[i, :count]
        np.testing.assert_allclose(boxes[:, 1:], [[0.5, 8 / width, 0.5]] * count, rtol=1e-5)
        if number <= 3:
            np.testing.assert_allclose(boxes[:, 0], [(8 * k + 4) / width for k in range(count)], rtol=1e-5)
            assert batch.targets.labels[i, :count].tolist() == [0, 1, 0][:count]
        # 20 of 40 rows, 8 of `width` columns
        areas = batch.targets.masks[i, :count].sum(axis=(1, 2))
        np.testing.assert_allclose(areas, 16 * 32 / 2 * 8 / width, atol=8 * 1.01)


def test_objects_beyond_the_slots_are_counted(trainable):
    counters = collections.Counter()
    batches = train(trainable, augmentation=NO_AUGMENTATION, batch_size=5, counters=counters)
    batch = next(batches)
    assert counters == {"images": 5, "objects": 1 + 2 + 3 + 3 + 3, "dropped_objects": 1 + 2}
    most = int(np.flatnonzero(batch.image_index == 4)[0])
    choices = {tuple(batch.targets.boxes[most, :, 0])}
    for batch in itertools.islice(batches, 5):
        most = int(np.flatnonzero(batch.image_index == 4)[0])
        choices.add(tuple(batch.targets.boxes[most, :, 0]))
    assert len(choices) > 1  # a random choice, another in each epoch
    assert counters["dropped_objects"] == 6 * 3


def test_no_object_goes_when_there_are_slots_enough(trainable):
    counters = collections.Counter()
    layout = dataclasses.replace(LAYOUT, max_instances=5)
    batch = next(train(trainable, augmentation=NO_AUGMENTATION, batch_size=5, layout=layout, counters=counters))
    assert counters["dropped_objects"] == 0
    assert batch.targets.valid.sum() == counters["objects"] == 15


def test_each_epoch_is_another_permutation_without_the_rest(trainable):
    batches = take(train(trainable), 12)
    epochs = [[int(i) for batch in batches[start : start + 2] for i in batch.image_index] for start in range(0, 12, 2)]
    for epoch in epochs:
        assert len(set(epoch)) == 4  # 5 images, batches of 2: one is left out
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set(itertools.chain(*epochs)) == set(range(5))


def test_resume_equals_going_on(trainable):
    whole = take(train(trainable), 9)
    for start in (1, 4, 7):
        for a, b in zip(take(train(trainable, start_step=start), 2), whole[start:], strict=False):
            assert_equal(a, b)
    assert (whole[0].images.shape != whole[1].images.shape) or (whole[0].images != whole[1].images).any()


@pytest.mark.parametrize(("num_workers", "use_processes"), [(1, False), (3, False), (2, True)])
def test_workers_change_nothing(trainable, num_workers, use_processes):
    inline = take(train(trainable), 6)
    counters = collections.Counter()
    ahead = train(trainable, num_workers=num_workers, prefetch=4, use_processes=use_processes, counters=counters)
    for a, b in zip(take(ahead, 6), inline, strict=True):
        assert_equal(a, b)
    assert counters["images"] == 12 and counters["objects"] > 0
    assert not multiprocessing.active_children()


def test_errors_of_processes_name_the_file(trainable, tmp_path):
    broken = dataclasses.replace(trainable, image_folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"[1-5]\.png"):
        next(train(broken, num_workers=1, use_processes=True))
    assert not multiprocessing.active_children()


def test_seed_changes_the_batches(trainable):
    a, b = (np.concatenate([x.image_index for x in take(train(trainable, seed=s), 6)]) for s in (3, 4))
    assert a.tolist() != b.tolist()


def test_sizes_are_drawn_once_a_batch_with_their_weight(trainable):
    sizes = [(16, 16), (32, 32), (32, 32)]
    drawn = [batch.images.shape[1] for batch in take(train(trainable, sizes=sizes, augmentation=NO_AUGMENTATION), 120)]
    assert set(drawn) == {16, 32}
    assert 60 < drawn.count(32) < 100  # two in three


def test_hosts_build_slices_of_the_same_batch(trainable):
    whole = take(train(trainable, batch_size=4), 3)
    parts = [take(train(trainable, batch_size=4, process_index=i, process_count=2), 3) for i in range(2)]
    for step, batch in enumerate(whole):
        for x, a, b in zip(arrays(batch), arrays(parts[0][step]), arrays(parts[1][step]), strict=True):
            np.testing.assert_array_equal(x, np.concatenate([a, b]))


def test_copy_paste_takes_objects_from_other_images(trainable):
    augmentation = dataclasses.replace(NO_AUGMENTATION, copy_paste_probability=1.0, copy_paste_max_objects=4)
    layout = dataclasses.replace(LAYOUT, max_instances=12)
    plain, pasted = (take(train(trainable, augmentation=a, layout=layout), 6) for a in (NO_AUGMENTATION, augmentation))
    for a, b in zip(plain, pasted, strict=True):
        np.testing.assert_array_equal(a.image_index, b.image_index)
    assert sum(b.targets.valid.sum() for b in pasted) > 1.3 * sum(b.targets.valid.sum() for b in plain)
    for a, b in zip(
        take(train(trainable, augmentation=augmentation, layout=layout, start_step=4), 2), pasted[4:], strict=True
    ):
        assert_equal(a, b)


def test_data_set_smaller_than_the_batch_repeats_with_other_augmentation(trainable):
    batch = next(train(trainable, batch_size=12, sizes=[(32, 32)]))
    counts = collections.Counter(batch.image_index.tolist())
    assert set(counts) == set(range(5))
    assert set(counts.values()) <= {2, 3}
    first, second = (np.flatnonzero(batch.image_index == 2)[k] for k in range(2))
    assert (batch.images[first] != batch.images[second]).any()
    assert epochs.steps_per_epoch(5, 12) == 1
    assert epochs.steps_per_epoch(5, 2) == 2


def test_eval_shows_each_image_once_and_fills_the_last_batch(dataset):
    shown = coco.select_trainable(dataset, keep_empty=True)
    batches = list(evaluate(shown))
    assert [batch.image_index.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert [batch.image_valid.tolist() for batch in batches][2] == [True, False, False]
    last = batches[2]
    assert last.images.shape == (3, 32, 48, 3)
    assert not last.images[1:].any()
    assert not last.targets.valid.any()  # neither the picture without objects nor the padding
    np.testing.assert_allclose(last.images[0], 120 / 255, rtol=1e-6)
    assert batches[0].targets.valid.sum(axis=1).tolist() == [0, 1, 2]


def test_eval_of_hosts_has_equally_many_batches(dataset):
    whole = list(evaluate(dataset, batch_size=4))
    parts = [list(evaluate(dataset, batch_size=4, process_index=i, process_count=2)) for i in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    assert parts[1][1].image_index.tolist() == [6, -1]
    for step, batch in enumerate(whole):
        joined = np.concatenate([parts[0][step].image_index, parts[1][step].image_index])
        np.testing.assert_array_equal(batch.image_index, joined)


def test_letterboxed_batch_says_what_the_content_fills(dataset):
    layout = dataclasses.replace(LAYOUT, resize="letterbox")
    batch = next(evaluate(dataset, size=(60, 60), layout=layout))
    assert batch.content_sizes.tolist() == [[48, 60], [47, 60], [46, 60]]
    assert batch.images[2, :46].min() > 0.1
    assert not batch.images[2, 46:].any()


def test_errors_of_workers_reach_the_consumer_with_the_file_name(trainable, tmp_path):
    broken = dataclasses.replace(trainable, image_folder=tmp_path)
    before = threading.active_count()
    for num_workers in (0, 2):
        with pytest.raises(FileNotFoundError, match=r"[1-5]\.png"):
            next(train(broken, num_workers=num_workers))
    assert threading.active_count() == before


def test_unexpected_errors_name_the_file_too(trainable, monkeypatch):
    def fail(*_):
        raise cv2.error("out of luck")

    monkeypatch.setattr(transforms, "augment", fail)
    with pytest.raises(RuntimeError, match=r"[1-5]\.png' can't be made a sample: .*out of luck"):
        next(train(trainable, num_workers=2))


def test_closing_ends_the_threads(trainable):
    before = threading.active_count()
    batches = train(trainable, num_workers=2)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
