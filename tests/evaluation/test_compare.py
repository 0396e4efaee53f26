"""Comparing runs: intervals by hand and by their properties, and the verb from the command line."""

import json

import numpy as np
import pytest
from evaluation_cases import EXAMPLE, annotation, data_set, example_results, example_truth, read_json, result

from instseg_jax.cli import main
from instseg_jax.evaluation.compare import compare_matches
from instseg_jax.evaluation.matching import match_detections

TRUTH = EXAMPLE / "instances_val2014_100.json"


@pytest.fixture(autouse=True)
def _no_relaunch(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


def match(truth, results):
    return match_detections(truth, results, iou_type="segm", max_detections=100)


def compare(truth, *results, **options):
    runs = {f"run {i}": match(truth, each) for i, each in enumerate(results)}
    return compare_matches(runs, **{"num_resamples": 60, "seed": 0} | options)


def test_two_images_by_hand():
    """One object an image; the second run finds one of two. Resamples: both the found one 1/4, mixed 1/2, 1/4."""
    truth = data_set(annotation(1, 1, 0, 0), annotation(2, 2, 0, 0))
    both = [result(1, 0, 0, 0.9), result(2, 0, 0, 0.8)]
    comparison = compare(truth, both, both[:1], num_resamples=1000)
    full, half = comparison.values["AP50"]
    assert (full.value, full.low, full.high) == pytest.approx((1, 1, 1))
    assert (half.value, half.low, half.high) == pytest.approx((51 / 101, 0, 1))
    (difference,) = comparison.differences["AP50"]
    assert (difference.value, difference.low, difference.high) == pytest.approx((51 / 101 - 1, -1, 0))
    # Never better; equal, which counts half, in a quarter of the resamples.
    assert comparison.better["AP50"][0] == pytest.approx(0.125, abs=0.02)


def test_pairing_makes_differences_surer_than_the_runs():
    truth, results = example_truth(), example_results("segm")
    rng = np.random.default_rng(0)
    worse = [r for r in results if rng.random() > 0.05]
    comparison = compare(truth, results, worse, results)
    ap, ap_worse, ap_same = comparison.values["AP"]
    loss, nothing = comparison.differences["AP"]
    assert ap.low < ap.value < ap.high and ap_worse.value < ap.value
    assert ap_same == ap and (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    assert loss.value == pytest.approx(ap_worse.value - ap.value)
    assert loss.high - loss.low < 0.7 * (ap.high - ap.low)
    assert comparison.better["AP"][1] == 0.5 > comparison.better["AP"][0]
    assert compare(truth, results, worse, results) == comparison  # the seed decides
    assert compare(truth, results, worse, results, seed=1) != comparison


def test_runs_that_cannot_be_compared():
    truth, other = data_set(annotation(1, 1, 0, 0)), data_set(annotation(1, 1, 0, 0), image_ids=(1, 3))
    runs = {"a": match(truth, []), "b": match(other, [])}
    with pytest.raises(ValueError, match="b was scored on other images or classes than a"):
        compare_matches(runs, num_resamples=3, seed=0)
    with pytest.raises(ValueError, match="at least two runs"):
        compare_matches({"a": match(truth, [])}, num_resamples=3, seed=0)
    assert compare(data_set(), [], []) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two evaluated runs' folders: the published example, and half of it."""
    root = tmp_path_factory.mktemp("runs")
    for name, step in (("whole", 1), ("half", 2)):
        folder = root / name
        folder.mkdir()
        (folder / "predictions.json").write_text(json.dumps(example_results("segm")[::step]))
        said = {"done_flag": True, "metrics": {}, "evaluated": {"annotations": str(TRUTH)}}
        (folder / "evaluate_result.json").write_text(json.dumps(said))
    return root


def test_the_verb(runs, tmp_path, capsys):
    arguments = [str(runs / "whole"), str(runs / "half"), "--resamples=50", f"--workdir={tmp_path}"]
    assert main(["compare", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "32.0" in shown and "better in 0 %" in shown
    written = read_json(tmp_path / "compare.json")
    published = read_json(EXAMPLE / "expected_pycocotools_stats.json")["segm"]
    assert written["metrics"]["whole"]["segm/AP"] == pytest.approx(published[0], abs=1e-12)
    ap = written["bootstrap"]["segm"]["AP"]
    assert ap["whole"]["value"] == pytest.approx(published[0], abs=1e-12)
    assert ap["half"]["difference"]["high"] < 0 and ap["half"]["better"] == 0
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "whole" in page and "half" in page and page.count("<svg") == 5


def test_results_files_and_names_that_are_the_same(runs, tmp_path):
    file = runs / "whole" / "predictions.json"
    arguments = [str(file), str(file), f"--annotations={TRUTH}", "--resamples=3", f"--workdir={tmp_path}"]
    assert main(["compare", *arguments]) == 0
    assert list(read_json(tmp_path / "compare.json")["metrics"]) == ["predictions (1)", "predictions (2)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{whole}"], "at least two runs"),
        (["{whole}", "/no/run"], "there is no run '/no/run'"),
        (["{whole}", "{empty}"], "has no predictions.json"),
        (["{whole}", "{silent}"], "does not say what it was scored on"),
        (["{whole}", "{other}"], "which differ"),
        (["{whole}", "{half}", "--resamples=0"], "--resamples is 0"),
    ],
)
def test_bad_input_is_one_sentence(runs, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    for name in ("silent", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "predictions.json").write_text("[]")
    (tmp_path / "truth.json").write_text(json.dumps(data_set(annotation(1, 1, 0, 0))))
    said = {"evaluated": {"annotations": str(tmp_path / "truth.json")}}
    (tmp_path / "other" / "evaluate_result.json").write_text(json.dumps(said))
    places = {name: tmp_path / name for name in ("empty", "silent", "other")}
    places |= {name: runs / name for name in ("whole", "half")}
    code = main(["compare", *(a.format(**places) for a in arguments), f"--workdir={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    assert code == 1 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
