"""Evaluation by several processes, each with its part of every batch: the same results and metrics in all of them."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def local_rows(tree: Any) -> Any:
    """The rows [B_local, ...] of arrays split over their first axis that lie on this process's devices, in numpy."""

    def rows(array: jax.Array) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return np.asarray(array)
        # Copies of a row on several devices count once.
        shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(rows, tree)


def gather_results(results: Sequence[dict]) -> list[dict]:
    """The result entries of all processes, by image; every process must call this and gets the same list.

    The order within an image, which decides between equal scores, stays.
    """
    if jax.process_count() == 1:
        return list(results)
    text = np.frombuffer(json.dumps(list(results)).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)], np.int64)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    parts = [json.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths.tolist(), strict=True)]
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry["image_id"])
