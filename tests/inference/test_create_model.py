"""A run or checkpoint describes its own network: what `create_model` and `create_pipeline` make of it."""

import numpy as np
import pytest
from random_model import random_variables

from instseg_jax import cli, create_model, create_pipeline
from instseg_jax.config import load_config
from instseg_jax.inference.predictor import LoadedModel, describe, load_model, make_predict
from instseg_jax.models.mask_rtdetr import build_model
from instseg_jax.weights import checkpoint

FIELDS = {
    "model.num_queries": "7",
    "model.num_decoder_layers": "2",
    "model.num_prototypes": "16",
    "model.mask_enhanced": "False",
    "model.dtype": "bfloat16",
    "data.image_size": "64",
    "data.train_sizes": "(64,)",
    "eval.num_detections": "5",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose network differs from the size's own in every way that it may."""
    config = load_config("configs/mask_rtdetr.py:n", FIELDS)
    model = build_model(config.model, 3)
    made = LoadedModel(model, random_variables(model), config, ("a", "b", "c"), (1, 2, 3), {}, "")
    folder = tmp_path_factory.mktemp("run")
    metadata = {"step": 0, "score": None} | describe(made)
    checkpoint.save_inference_checkpoint(folder / checkpoint.BEST_MODEL, made.variables, metadata)
    return folder


@pytest.mark.slow
def test_the_network_is_the_one_that_was_trained(run):
    model, variables = create_model(weights=run)
    loaded = load_model(run)
    assert model == loaded.network and model.num_queries == 7 and not model.mask_enhanced
    images = np.random.default_rng(0).random((1, 64, 64, 3), np.float32)
    found = make_predict(model, num_detections=5)(variables, images)
    expected = make_predict(loaded.network, num_detections=5)(loaded.variables, images)
    for name in ("scores", "labels", "boxes_xyxy", "mask_logits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert np.ptp(found.mask_logits) > 0
    same, _ = create_model("Mask-RT-DETR-N", num_classes=3, num_queries=7, weights=run)
    assert same == model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "mask_rtdetr_s"}, "name is mask_rtdetr_s, but the weights .* were made with mask_rtdetr_n"),
        ({"num_classes": 80}, "num_classes is 80, but the weights .* were made with 3"),
        ({"num_queries": 300}, "num_queries is 300, but the weights .* were made with 7"),
    ],
)
def test_what_is_given_and_differs_is_an_error(run, given, message):
    with pytest.raises(ValueError, match=message):
        create_model(weights=run, **given)


def test_a_name_is_needed_without_weights_that_say_it():
    with pytest.raises(ValueError, match="name is None"):
        create_model(num_classes=3)


@pytest.mark.parametrize(
    ("option", "python", "message"),
    [
        ("--batch_size=0", {"batch_size": 0}, "batch_size is 0, it must be a whole number of at least 1"),
        ("--batch_size=-2", {"batch_size": -2}, "batch_size is -2, it must be a whole number of at least 1"),
        ("--threshold=1.5", {"threshold": 1.5}, "threshold is 1.5, it must be between 0 and 1"),
        ("--device=npu", {"device": "npu"}, "device is 'npu'; allowed are auto, cpu, gpu, tpu"),
        ("--weights=nowhere", {"weights": "nowhere"}, "nowhere"),
        ("--pipeline=ocr", {"pipeline": "ocr"}, "pipeline is 'ocr'"),
    ],
)
def test_shell_and_python_give_the_same_error(run, tmp_path, option, python, message, capsys, monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises((ValueError, OSError)) as raised:
        create_pipeline(**{"weights": run} | python)
    assert message in str(raised.value)
    arguments = ["predict", f"--input={tmp_path / 'a.npy'}", f"--weights={run}", option, f"--workdir={tmp_path}"]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.strip() == f"error: {' '.join(str(raised.value).split())}"
