"""Scoring a results file from the command line, and what the report shows."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from evaluation_cases import EXAMPLE, annotation, data_set, read_json, result
from PIL import Image

from instseg_jax.cli import main
from instseg_jax.evaluation.analysis import analyse
from instseg_jax.evaluation.gallery import choose_cases, draw_cases
from instseg_jax.evaluation.read import read_results, read_truth

CLASSES = ((1, "cat & <dog>"), (2, "cow"))
VOID = ("meta", "img", "line", "rect", "polyline", "br")


@pytest.fixture(autouse=True)
def _no_relaunch(monkeypatch):
    monkeypatch.setenv("INSTSEG_HUGE_PAGES", "0")


@pytest.fixture
def case(tmp_path):
    """Two images with a true, a false, a doubled and a missing detection; truth, results and pictures on disk."""
    truth = data_set(
        annotation(1, 1, 0, 0), annotation(2, 1, 30, 0), annotation(3, 2, 30, 20, category_id=2), categories=CLASSES
    )
    results = [
        result(1, 0, 0, 0.9), result(1, 1, 0, 0.8), result(2, 5, 5, 0.7), result(2, 30, 20, 0.6, category_id=2)
    ]  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def run(folder, *more: str) -> int:
    return main(["evaluate", f"--predictions={folder / 'results.json'}", f"--annotations={folder / 'truth.json'}",
                 f"--workdir={folder / 'out'}", *more])  # fmt: skip


class Page(html.parser.HTMLParser):
    """Checks that tags close, and collects headings and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.headings, self.images = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_a_results_file_without_a_model(case, capsys):
    assert run(case, f"--images={case / 'images'}") == 0
    written = read_json(case / "out" / "evaluate_result.json")
    metrics = written["metrics"]
    assert written["done_flag"] is True
    # cow: found, AP 1; cat: one of two found, before the false ones: 51 of 101 recalls.
    assert metrics["segm/AP/cow"] == pytest.approx(1) and metrics["segm/AP/cat & <dog>"] == pytest.approx(51 / 101)
    assert metrics["AP"] == metrics["segm/AP"] == metrics["bbox/AP"] == pytest.approx((1 + 51 / 101) / 2)
    assert 0 < metrics["boundary/AP"] <= metrics["AP"]
    edges = written["analysis"]["segm"]["edges"]
    assert edges["num_pairs"] == 2 and written["analysis"]["bbox"]["edges"] is None
    assert written["analysis"]["segm"]["error_counts"] == {
        "classification": 0, "localisation": 0, "both": 0, "duplicate": 1, "background": 1, "missed": 1
    }  # fmt: skip
    assert written["analysis"]["segm"]["thresholds"]["overall"] == pytest.approx(0.3)
    assert read_json(case / "out" / "predictions.json") == read_json(case / "results.json")
    assert "segm/AP       0.752" in capsys.readouterr().out

    text = (case / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    for heading in ("Metrics", "What the errors cost, mask", "Confusion, mask", "Calibration", "Worst misses"):
        assert heading in page.headings
    assert f"are off by {edges['median_px']:.1f} px" in text
    assert "75.2" in text and "cat &amp; &lt;dog&gt;" in text and "<dog>" not in text
    assert len(page.images) == 2 + 1 + 2  # false alarms, misses, best matches
    assert "http" not in re.sub(r"data:[^\"]*", "", text), "the page must not need anything beside it"
    for source in page.images:
        picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_the_published_example(tmp_path, kind):
    arguments = [
        f"--predictions={EXAMPLE / f'instances_val2014_fake{kind}100_results.json'}",
        f"--annotations={EXAMPLE / 'instances_val2014_100.json'}", f"--workdir={tmp_path}",
    ]  # fmt: skip
    assert main(["evaluate", *arguments]) == 0
    metrics = read_json(tmp_path / "evaluate_result.json")["metrics"]
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small",
             "AR_medium", "AR_large")  # fmt: skip
    published = read_json(EXAMPLE / "expected_pycocotools_stats.json")[kind]
    np.testing.assert_allclose([metrics[f"{kind}/{name}"] for name in names], published, atol=1e-12)
    assert metrics["AP"] == metrics[f"{kind}/AP"]
    # What a file does not hold is not scored; boxes alone have no masks.
    other = {"segm": "bbox", "bbox": "segm"}[kind]
    assert not any(name.startswith(f"{other}/") for name in metrics)
    assert ("boundary/AP" in metrics) == (kind == "segm")
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("results", [[], [result(1, 0, 0, 0.9)]])
@pytest.mark.parametrize("annotations", [[], [annotation(1, 2, 0, 0)]])
def test_nothing_there_or_nothing_found(tmp_path, annotations, results):
    (tmp_path / "truth.json").write_text(json.dumps(data_set(*annotations)))
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert run(tmp_path) == 0
    metrics = read_json(tmp_path / "out" / "evaluate_result.json")["metrics"]
    assert metrics["AP"] == (0 if annotations else None)
    Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def test_many_classes(tmp_path):
    classes = [(i, f"class {i}") for i in range(1, 61)]
    annotations = [annotation(i, 1 + i % 2, (7 * i) % 50, (5 * i) % 30, category_id=i) for i, _ in classes]
    results = [result(a["image_id"], *a["bbox"][:2], 0.5, category_id=1 + (a["id"] + 1) % 60) for a in annotations]
    (tmp_path / "truth.json").write_text(json.dumps(data_set(*annotations, categories=classes)))
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert run(tmp_path) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    Page(text)
    assert "24 classes with the most errors" in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", {"a": 1}, "must hold a list of COCO result entries"),
        ("results.json", [{"image_id": 1}], "Result 1 of"),
        ("results.json", [result(1, 0, 0, 0.5) | {"category_id": 7}], "category_id 7"),
        ("results.json", [result(1, 0, 0, 0.5) | {"bbox": [1, 2]}], "which must be [x, y, width, height]"),
        ("results.json", [{"image_id": 1, "category_id": 1, "score": 0.5}], "Neither all results"),
        (
            "results.json",
            [result(1, 0, 0, 0.5) | {"segmentation": {"size": [40, 60], "counts": "04"}}],
            "counts must add up to its 2400 pixels",
        ),
        ("truth.json", [], "is no COCO ground truth"),
        ("truth.json", {"images": [], "annotations": []}, "lacks the list 'categories'"),
    ],
)
def test_files_that_are_broken(case, capsys, file, content, message):
    (case / file).write_text(json.dumps(content))
    (case / "out").mkdir()
    assert run(case) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    failure = read_json(case / "out" / "evaluate_result.json")
    assert failure["done_flag"] is False and failure["err_type"] == "ValueError" and message in failure["err_msg"]
    assert [p.name for p in (case / "out").iterdir()] == ["evaluate_result.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--predictions=x.json"], "--predictions needs --annotations"),
        (["--predictions=x.json", "--annotations=y.json", "--save_thresholds"], "--save_thresholds is about a model"),
        (["--predictions=/no/x.json", "--annotations={truth}"], "There is no file '/no/x.json'"),
        (["--annotations={truth}"], "--annotations goes with --predictions"),
        (["--predictions={results}", "--annotations={truth}", "--images=/no"], "2 of 2 images are missing"),
        (["--weights=/no/such", "--tta=turn"], "--tta is 'turn'; it may name flip and scales"),
        (["--weights=/no/such", "--tta=flip,scales"], "/no/such"),
        (["--predictions={results}", "--annotations={truth}", "--config.eval.engine=abacus"], "got 'abacus'"),
    ],
)
def test_options_that_do_not_fit(case, capsys, options, message):
    places = {"truth": case / "truth.json", "results": case / "results.json"}
    assert main(["evaluate", *(o.format(**places) for o in options), f"--workdir={case / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (case / "out").exists()


def test_cases_of_the_galleries(case):
    truth, results = read_truth(case / "truth.json"), read_results(case / "results.json")[0]
    analysis = analyse(truth, results, iou_type="segm", max_detections=100)
    cases = choose_cases(analysis, 5)
    assert [c.caption for c in cases["Worst false alarms"]] == [
        "cat & <dog> 0.80: duplicate", "cat & <dog> 0.70: background"
    ]  # fmt: skip
    (miss,) = cases["Worst misses"]
    assert (miss.image, miss.detection, miss.obj) == (0, None, 1)
    assert [c.obj for c in cases["Best matches"]] == [0, 2]
    assert [len(chosen) for chosen in choose_cases(analysis, 1).values()] == [1, 1, 1]
    drawn = []

    def draw(image, **instances):
        drawn.append((image.shape, instances))
        return image

    pictures = draw_cases(
        analysis, results, cases["Best matches"][:1],
        read_image=lambda image_id: np.full((40, 60, 3), 90 * image_id, np.uint8), draw=draw,
    )  # fmt: skip
    assert len(pictures) == 1 and len(drawn) == 2
    (shape, truth_side), (_, found_side) = drawn
    assert truth_side["scores"] is None and found_side["scores"] == [0.9]
    assert found_side["names"] == ["cat & <dog>"]
    # The 10 x 10 square at the corner of the picture, enlarged.
    scale = shape[0] / min(40, round(5 + 270 / 4 / 2 * 0.85))
    np.testing.assert_allclose(found_side["boxes_xyxy_px"][0], np.array([0, 0, 10, 10]) * scale, rtol=0.05)
    assert found_side["masks"][0].sum() == pytest.approx(100 * scale**2, rel=0.1)
