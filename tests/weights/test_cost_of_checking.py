"""What it costs to look whether weights are what was written, as a part of loading L: `pytest -s -m slow` says it."""

import functools
import time

import pytest

from instseg_jax import weights
from instseg_jax.config import load_config
from instseg_jax.inference.predictor import load_model
from instseg_jax.models.mask_rtdetr import build_model, initial_variables
from instseg_jax.weights import checkpoint, state_dicts

REPEATS = 3
MOST = 0.05  # of the time to load


@pytest.fixture(scope="module")
def size_l():
    config = load_config("configs/mask_rtdetr.py:l")
    metadata = {"config": config.to_dict(), "class_names": [f"class {i}" for i in range(80)], "category_ids": None}
    return initial_variables(build_model(config.model, 80), seed=0), metadata


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_checking_is_a_small_part_of_loading(size_l, tmp_path, monkeypatch, kind):
    variables, metadata = size_l
    if kind == "checkpoint":
        path = tmp_path / "l"
        checkpoint.save_inference_checkpoint(path, variables, metadata)
    else:
        path = state_dicts.export_weights(tmp_path / "l.safetensors", variables, metadata=metadata)
    spent = [0.0]

    def timed(function):
        @functools.wraps(function)
        def run(*arguments, **options):
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - started

        return run

    monkeypatch.setattr(checkpoint, "_check_digests", timed(checkpoint._check_digests))
    monkeypatch.setattr(state_dicts, "digest", timed(state_dicts.digest))
    monkeypatch.setattr(weights, "check_finite", timed(weights.check_finite))
    shares = []
    for _ in range(REPEATS):
        spent[0], started = 0.0, time.perf_counter()
        load_model(path)
        whole = time.perf_counter() - started
        shares.append(spent[0] / whole)
        print(f"\n{kind}: {whole:.2f} s to load L, {1000 * spent[0]:.0f} ms of them ({shares[-1]:.1%}) to check it")
    assert spent[0] > 0 and min(shares) < MOST
