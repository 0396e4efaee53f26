"""The verb `evaluate` with a model: a made-up one, on the embedded pictures."""

import json

import numpy as np
import pytest
from evaluate_on_devices import Network

from instseg_jax.cli import main
from instseg_jax.config import load_config
from instseg_jax.inference import predictor
from instseg_jax.inference.predictor import LoadedModel
from instseg_jax.verbs import evaluate as evaluate_room
from instseg_jax.weights import checkpoint, read_weights

WEIGHTS = np.array(
    [[1.0, -0.8, 0.5, 0.0, 2.0, -0.3], [1.0, -0.7, -1.0, 1.0, 0.1, 0.7], [1.0, -0.9, 0.5, -1.0, 1.0, 0.2]], np.float32
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run whose weights are those of the made-up network."""
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")
    variables = {"params": {"w": WEIGHTS}, "batch_stats": {}}
    metadata = {"config": {}, "class_names": ["building"], "category_ids": [1]}
    checkpoint.save_inference_checkpoint(tmp_path / "run" / checkpoint.BEST_MODEL, variables, metadata)
    overrides = {"data.image_size": "64", "eval.batch_size": "4", "eval.num_detections": "6", "eval.gallery_size": "3"}
    config = load_config("configs/quickstart.py", overrides)

    def load_model(source, given=None, overrides=None):
        found = read_weights(source)
        return LoadedModel(
            Network(), found.variables, config, ("building",), (1,), found.metadata, "", found.thresholds
        )

    monkeypatch.setattr(predictor, "load_model", load_model)
    return tmp_path / "run"


def test_numbers_results_report_and_thresholds(run, capsys):
    assert main(["evaluate", f"--weights={run}", f"--workdir={run}", "--save_thresholds"]) == 0
    said = json.loads((run / "evaluate_result.json").read_text(encoding="utf-8"))
    metrics = said["metrics"]
    assert said["done_flag"] is True and metrics["AP"] == metrics["segm/AP"]
    assert 0 < metrics["segm/AR_100"] < 1 and metrics["segm/AP_small"] is None
    assert said["evaluated"]["annotations"].endswith("instance_val.json")
    assert said["run"]["batch size"] == "4" and "MB" in said["run"]["highest memory of the process"]
    results = json.loads((run / "predictions.json").read_text(encoding="utf-8"))
    assert len(results) == 35 * 6
    report = (run / "report.html").read_text(encoding="utf-8")
    assert report.count("<img") >= 7 and "Speed and memory" in report
    # What was stored is what maximises F1, and what a prediction will find.
    thresholds = read_weights(run).thresholds
    assert thresholds == said["analysis"]["segm"]["thresholds"]
    assert 0 < thresholds["overall"] < 1 and set(thresholds["classes"]) == {"building"}
    assert "thresholds:" in capsys.readouterr().out


def test_thresholds_are_not_kept_with_weights_that_they_were_not_found_for(run, monkeypatch, capsys):
    write_outcome = evaluate_room.write_outcome

    def replaced(*arguments):
        metadata = checkpoint.read_metadata(run) | {"step": 7}
        checkpoint.save_inference_checkpoint(run / checkpoint.BEST_MODEL, read_weights(run).variables, metadata)
        return write_outcome(*arguments)

    monkeypatch.setattr(evaluate_room, "write_outcome", replaced)  # a training goes on meanwhile
    assert main(["evaluate", f"--weights={run}", f"--workdir={run}", "--save_thresholds"]) == 1
    assert "was replaced while it was evaluated" in capsys.readouterr().err
    assert read_weights(run).thresholds is None


def test_no_thresholds_without_being_asked(run):
    assert main(["evaluate", f"--weights={run}", f"--workdir={run / 'elsewhere'}"]) == 0
    assert read_weights(run).thresholds is None
    assert (run / "elsewhere" / "report.html").is_file() and not (run / "report.html").exists()


def test_mirrored_pictures(run, tmp_path):
    assert main(["evaluate", f"--weights={run}", f"--workdir={tmp_path / 'plain'}"]) == 0
    assert main(["evaluate", f"--weights={run}", f"--workdir={tmp_path / 'flip'}", "--tta=flip"]) == 0
    plain, flip = (
        json.loads((tmp_path / name / "predictions.json").read_text(encoding="utf-8")) for name in ("plain", "flip")
    )
    assert len(plain) == len(flip)
    assert [r["score"] for r in plain] != [r["score"] for r in flip]


def test_two_runs_are_compared_without_naming_the_truth(run, tmp_path):
    for name, views in (("plain", ""), ("flip", "flip")):
        assert main(["evaluate", f"--weights={run}", f"--workdir={tmp_path / name}", f"--tta={views}"]) == 0
    folders = [str(tmp_path / name) for name in ("plain", "flip")]
    assert main(["compare", *folders, "--resamples=20", f"--workdir={tmp_path / 'out'}"]) == 0
    said = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    evaluated = json.loads((tmp_path / "plain" / "evaluate_result.json").read_text(encoding="utf-8"))
    for name in ("segm/AP", "bbox/AP50", "segm/AR_100"):
        assert said["metrics"]["plain"][name] == pytest.approx(evaluated["metrics"][name], abs=1e-12)
