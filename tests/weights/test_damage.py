"""Damaged files are errors that name them, never other numbers: checkpoints, thresholds, weight files, exports."""

import json
import shutil

import numpy as np
import pytest

from instseg_jax import files
from instseg_jax.runtimes import exported
from instseg_jax.weights import checkpoint, read_weights
from instseg_jax.weights.state_dicts import read_safetensors, read_safetensors_metadata, write_safetensors

TRANSFORMER = {"score_head": {"bias": np.linspace(-1, 1, 3, dtype=np.float32)}, "w": np.eye(64, dtype=np.float32)}
VARIABLES = {"params": {"transformer": TRANSFORMER}, "batch_stats": {"n": {"mean": np.arange(200, dtype=np.float32)}}}
METADATA = {"config": {"model": {"name": "mask_rtdetr_n"}}, "class_names": ["a", "b", "c"], "step": 7, "score": 0.25}


def state(step: int) -> dict:
    return {"params": {"w": np.full((16, 16), step, np.float32)}, "step": np.asarray(step)}


@pytest.fixture
def best(tmp_path):
    folder = tmp_path / "run" / checkpoint.BEST_MODEL
    checkpoint.save_inference_checkpoint(folder, VARIABLES, METADATA)
    return folder


@pytest.fixture
def steps(tmp_path):
    """A folder with the training states 1, 2 and 3."""
    folder = tmp_path / "checkpoints"
    with checkpoint.make_manager(folder, max_to_keep=3) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, step, state(step), METADATA | {"step": step}, wait=True)
    return folder


def flip(file, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position // 8 % len(data)] ^= 1 << position % 8
    file.write_bytes(data)


def test_no_flipped_bit_of_a_best_model_passes_for_content(best):
    rng = np.random.default_rng(0)
    sound = checkpoint.load_inference_checkpoint(best)
    parts = sorted(path for path in best.rglob("*") if path.is_file() and path.stat().st_size)
    noticed = 0
    for file in parts:
        before = file.read_bytes()
        for _ in range(4):
            flip(file, int(rng.integers(8 * len(before))))
            try:
                found = checkpoint.load_inference_checkpoint(best)
            except ValueError as error:
                assert str(best) in str(error) and "\n" not in str(error) and len(str(error)) < 600
                noticed += 1
            else:  # the bit meant nothing, such as a time stamp
                assert found[1] == sound[1]
                np.testing.assert_array_equal(found[0]["params"]["transformer"]["w"], np.eye(64))
                np.testing.assert_array_equal(found[0]["batch_stats"]["n"]["mean"], np.arange(200))
            file.write_bytes(before)
    assert noticed > len(parts)


@pytest.mark.parametrize("how", ["halved", "emptied", "removed", "flipped", "metadata", "no_content"])
def test_a_run_goes_on_from_the_newest_whole_state(steps, how):
    damaged = [path for path in sorted((steps / "3").rglob("*")) if path.is_file() and path.stat().st_size]
    arrays = max((path for path in damaged if "state" in path.parts), key=lambda path: path.stat().st_size)
    if how == "halved":
        arrays.write_bytes(arrays.read_bytes()[: arrays.stat().st_size // 2])
    elif how == "emptied":
        arrays.write_bytes(b"")
    elif how == "removed":
        shutil.rmtree(steps / "3" / "state")
    elif how == "flipped":
        content = (steps / "3" / "leaves" / "metadata").read_text()
        (steps / "3" / "leaves" / "metadata").write_text(content.replace("16", "17", 1))
    elif how == "metadata":
        file = steps / "3" / "metadata" / "metadata"
        file.write_text(file.read_text().replace("0.25", "0.75"))
    else:  # files of the right names without content, as a power cut leaves them
        for path in damaged:
            path.write_bytes(bytes(path.stat().st_size))
    with checkpoint.make_manager(steps, max_to_keep=3) as manager:
        found, metadata, said = checkpoint.restore_newest(manager, state(0))
        assert int(found["step"]) == metadata["step"] == 2 and len(said) == 1 and str(steps / "3") in said[0]
        checkpoint.save(manager, 3, state(30), METADATA, wait=True)  # its place is free again
    assert (steps / "damaged" / "3").is_dir() and sorted(checkpoint.read_checkpoints(steps)) == [1, 2, 3]


def test_without_a_whole_state_it_ends_with_what_to_do(steps):
    for step in (1, 2, 3):
        (steps / str(step) / "leaves" / "metadata").write_text("{")
    with checkpoint.make_manager(steps, max_to_keep=3) as manager:
        with pytest.raises(
            ValueError, match=r"none of the checkpoints in .* is whole; .* begins anew. The newest: .*/3 "
        ):
            checkpoint.restore_newest(manager, state(0))
        assert manager.latest_step() is None


def test_another_model_is_no_damage(steps):
    manager = checkpoint.make_manager(steps, max_to_keep=3)
    with manager, pytest.raises(ValueError, match="does not fit this model"):
        checkpoint.restore_newest(manager, state(0) | {"more": np.zeros(3)})
    assert not (steps / "damaged").exists()


def test_weights_that_are_not_finite_are_named(tmp_path, best):
    spoiled = {"params": {"w": np.array([1.0, np.nan], np.float32)}, "batch_stats": {}}
    checkpoint.save_inference_checkpoint(best, spoiled, METADATA)
    with pytest.raises(ValueError, match=r"best_model is damaged: the tensor params/w has values that are not finite"):
        read_weights(best)
    write_safetensors(tmp_path / "w.safetensors", {"backbone.w": np.array([np.inf], np.float32)})
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged: the tensor backbone\.w has values"):
        read_weights(tmp_path / "w.safetensors")


def test_no_flipped_bit_of_a_safetensors_file_passes(tmp_path):
    file = tmp_path / "w.safetensors"
    write_safetensors(file, {"a": np.arange(50, dtype=np.float32), "b": np.ones((3, 4), np.float16)}, METADATA)
    before, rng = file.read_bytes(), np.random.default_rng(0)
    assert read_safetensors(file)["a"][49] == 49 and read_safetensors_metadata(file) == METADATA
    for _ in range(150):
        flip(file, int(rng.integers(8 * len(before))))
        try:
            found, metadata = read_safetensors(file), read_safetensors_metadata(file)
        except ValueError as error:
            assert "w.safetensors" in str(error)
        else:
            np.testing.assert_array_equal(found["a"], np.arange(50))
            assert metadata == METADATA
        file.write_bytes(before)


def test_thresholds_are_sealed(best):
    file = checkpoint.save_thresholds(best, {"overall": 0.4, "classes": {"a": 0.3}})
    assert checkpoint.read_thresholds(best) == {"overall": 0.4, "classes": {"a": 0.3}}
    file.write_text(file.read_text().replace("0.4", "0.6"))
    with pytest.raises(ValueError, match=r"thresholds\.json is damaged"):
        checkpoint.read_thresholds(best)
    file.write_text('{"overall": 0.4, "classes": ')
    with pytest.raises(ValueError, match=r"thresholds\.json is damaged: .* in line 1, column"):
        checkpoint.read_thresholds(best)


def test_exports_are_checked_as_they_are_opened(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    config = {
        "format": "onnx",
        "preprocessing": {},
        "batch": 1,
        "dynamic_batch": False,
        "class_names": [],
        "config": {},
    }
    config |= {"compute_type": "f32", "files": {"model.onnx": files.digest(b"graph")}}
    files.write_json(tmp_path / "config.json", files.seal(config))
    exported.check_files(exported.read_export(tmp_path))
    (tmp_path / "model.onnx").write_bytes(b"grape")
    with pytest.raises(ValueError, match=r"model\.onnx is damaged"):
        exported.check_files(exported.read_export(tmp_path))
    changed = json.loads((tmp_path / "config.json").read_text()) | {"batch": 2}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"config\.json"):
        exported.read_export(tmp_path)


def test_what_was_written_before_there_were_digests_is_read(best):
    for name in ("leaves", "metadata"):
        file = best / name / "metadata"
        content = json.loads(file.read_text())
        del content["digest"]
        file.write_text(json.dumps({k: v[:2] if name == "leaves" else v for k, v in content.items()}))
    variables, metadata = checkpoint.load_inference_checkpoint(best)
    assert metadata == METADATA and variables["params"]["transformer"]["w"].sum() == 64
