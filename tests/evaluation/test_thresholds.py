"""Score thresholds that an evaluation finds and a checkpoint keeps."""

import json

import numpy as np
import pytest

from instseg_jax.files import check_seal
from instseg_jax.weights import checkpoint, read_weights

METADATA = {"config": {}, "class_names": ["cat", "dog"], "category_ids": [1, 2], "score": 0.5}


def save_model(path, value: float) -> None:
    variables = {"params": {"layer": {"kernel": np.full((2, 3), value, np.float32)}}, "batch_stats": {}}
    checkpoint.save_inference_checkpoint(path, variables, METADATA)


def test_thresholds_come_with_the_weights_that_they_were_found_for(tmp_path):
    best = tmp_path / checkpoint.BEST_MODEL
    save_model(best, 1.0)
    assert checkpoint.read_thresholds(tmp_path) is None
    assert read_weights(tmp_path).thresholds is None
    thresholds = {"overall": 0.4, "classes": {"cat": 0.25, "dog": 0.5}}
    file = checkpoint.save_thresholds(tmp_path, thresholds)
    assert file == best / "thresholds.json" and check_seal(json.loads(file.read_text()), file) == thresholds
    for path in (tmp_path, best):
        assert checkpoint.read_thresholds(path) == read_weights(path).thresholds == thresholds
    checkpoint.save_thresholds(best, {"overall": 0.1, "classes": {}})
    assert checkpoint.read_thresholds(tmp_path) == {"overall": 0.1, "classes": {}}
    assert not list(best.glob("*.tmp"))
    save_model(best, 2.0)
    assert checkpoint.read_thresholds(tmp_path) is None


@pytest.mark.parametrize("bad", [1.5, -0.1, "high", None])
def test_thresholds_are_scores(tmp_path, bad):
    save_model(tmp_path / checkpoint.BEST_MODEL, 1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        checkpoint.save_thresholds(tmp_path, {"overall": 0.5, "classes": {"cat": bad}})
    assert checkpoint.read_thresholds(tmp_path) is None


def test_official_files_take_no_thresholds(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.save_thresholds(tmp_path, {"overall": 0.5, "classes": {}})
