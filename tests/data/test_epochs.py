"""Which images a step shows, and who works ahead of it."""

import itertools
import time
import types

import pytest

from instseg_jax.data import epochs, prefetch


def test_share_of_images_without_objects():
    """Of 6 images with objects and 9 without, a share of a quarter takes 2 of the 9, others in each epoch."""
    annotations = tuple(((), "an object")[(i % 5 < 2 and 1) or 0] for i in range(15))
    data = types.SimpleNamespace(annotations=annotations)
    pool = epochs.make_pool(data, 0.25)
    assert (len(pool.with_objects), len(pool.without), pool.num_without, pool.size) == (6, 9, 2, 8)
    drawn = [
        [
            index
            for step in (2 * epoch, 2 * epoch + 1)
            for index, _ in epochs.batch_entries(pool, 4, seed=1, step=step)[1]
        ]
        for epoch in range(30)
    ]
    for shown in drawn:
        assert len(set(shown)) == 8 and sum(not annotations[i] for i in shown) == 2
        assert {i for i in shown if annotations[i]} == {i for i in range(15) if annotations[i]}
    assert {i for shown in drawn for i in shown} == set(range(15))
    assert epochs.make_pool(data, None).size == 15 and epochs.make_pool(data, 0.0).size == 6
    assert epochs.make_pool(data, 0.9).num_without == 9  # there are no more
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"data\.empty_share"):
            epochs.make_pool(data, share)


def test_prefetch_is_ordered_and_bounded():
    started = []

    def work(item):
        started.append(item)
        time.sleep(0.02 * (3 - item % 3))
        return item * item

    results = prefetch.prefetch_map(work, itertools.count(), num_workers=3, prefetch=4, use_processes=False)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    time.sleep(0.2)
    assert len(started) <= 5 + 4
    results.close()
