"""The verb `compare`: several runs, or results files, on the same images."""

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from instseg_jax.commands import print_next
from instseg_jax.data import coco
from instseg_jax.evaluation.coco import detection_limit
from instseg_jax.evaluation.compare import Comparison, compare_matches, shared_metrics, write_comparison
from instseg_jax.evaluation.matching import match_detections
from instseg_jax.evaluation.read import read_results, read_truth
from instseg_jax.evaluation.report import percent
from instseg_jax.files import read_json, write_json
from instseg_jax.messages import quote
from instseg_jax.progress import track
from instseg_jax.scoring.outcome import score_results

SHOWN = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
ENGINE = "pycocotools"


@dataclasses.dataclass(frozen=True)
class _Compared:
    name: str
    results: list[dict]
    kinds: tuple[str, ...]
    annotations: Path


def compare(options: argparse.Namespace) -> int:
    """Print and plot metrics of several runs side by side, with paired bootstrap intervals over images."""
    if len(options.runs) < 2:
        raise ValueError("compare needs at least two runs: folders of runs, or COCO results files")
    if options.resamples < 1:
        raise ValueError(f"--resamples is {options.resamples}, it must be at least 1")
    runs = [_read_run(path, options.annotations) for path in options.runs]
    names = _distinct_names([run.name for run in runs])
    truth = _read_same_truth(names, runs)
    kinds = [kind for kind in ("segm", "bbox") if all(kind in run.kinds for run in runs)]
    if not kinds:
        raise ValueError("there is no kind of result, masks or boxes, that all runs have")
    limit = detection_limit(truth)
    metrics = {
        name: score_results(truth, run.results, tuple(kinds), engine=ENGINE)
        for name, run in zip(names, runs, strict=True)
    }
    matches = {
        kind: {
            name: match_detections(truth, run.results, iou_type=kind, max_detections=limit)
            for name, run in zip(names, runs, strict=True)
        }
        for kind in kinds
    }
    found = {
        kind: compare_matches(
            of_kind,
            num_resamples=options.resamples,
            seed=options.seed,
            progress=lambda draws, number: track(draws, "resampling", number),
        )
        for kind, of_kind in matches.items()
    }
    comparisons = {kind: comparison for kind, comparison in found.items() if comparison is not None}
    workdir = Path(options.workdir)
    page = write_comparison(
        workdir / "compare.html",
        metrics=metrics,
        matches=matches,
        comparisons=comparisons,
        num_resamples=options.resamples,
    )
    content = {
        "runs": dict(zip(names, map(str, options.runs), strict=True)),
        "metrics": metrics,
        "bootstrap": {kind: comparison.summary() for kind, comparison in comparisons.items()},
        "resamples": options.resamples,
        "seed": options.seed,
    }
    path = write_json(workdir / "compare.json", content, indent=2)
    _print(metrics, comparisons)
    print(f"all numbers: {path}")
    print(f"plots:       {page}")
    key = f"{kinds[0]}/AP"
    best = max(range(len(names)), key=lambda i: metrics[names[i]][key] or 0.0)
    print_next("predict", f"--weights={options.runs[best]}", "--input=YOUR_PICTURES", comment=f"the highest {key}")
    return 0


def _read_run(path: str, annotations: str | None) -> _Compared:
    """A run's folder, as `evaluate` or `train` left it, or a results file."""
    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"there is no run {quote(path)}")
    file = source / "predictions.json" if source.is_dir() else source
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no predictions.json; `evaluate --workdir={path}` writes it")
    results, kinds = read_results(file)
    truth = Path(annotations) if annotations else _annotations_of(source)
    return _Compared(source.resolve().stem if source.is_file() else source.resolve().name, results, kinds, truth)


def _annotations_of(source: Path) -> Path:
    """The truth that a run was scored on, as it says itself."""
    folder = source if source.is_dir() else source.parent
    result, config = folder / "evaluate_result.json", folder / "config.json"
    if result.is_file():
        said = read_json(result).get("evaluated", {}).get("annotations")
        if said:
            return Path(said)
    if config.is_file():
        data = read_json(config)["data"]
        return coco.find_split(data["dir"], "val", data["val_annotations"], data["val_images"])[0]
    raise ValueError(f"{source} does not say what it was scored on; name the ground truth with --annotations=FILE")


def _read_same_truth(names: list[str], runs: list[_Compared]) -> dict:
    truths = {run.annotations.resolve(): None for run in runs}
    read = {path: _read_truth(path) for path in truths}
    first = read[runs[0].annotations.resolve()]
    for name, run in zip(names, runs, strict=True):
        other = read[run.annotations.resolve()]
        if other != first:
            raise ValueError(
                f"{name} was scored on {run.annotations}, {names[0]} on {runs[0].annotations}, which differ; "
                "evaluate both on the same images"
            )
    return first


def _read_truth(path: Path) -> dict:
    try:
        return coco.to_coco(coco.read_coco(path, path.parent))
    except ValueError:  # boxes alone, perhaps; what is wrong for scoring is said there
        return read_truth(path)


def _distinct_names(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _print(metrics: dict[str, dict[str, float | None]], comparisons: dict[str, Comparison]) -> None:
    names = list(metrics)
    shown = Table("points", *names)
    for metric in shared_metrics(metrics):
        if metric.split("/")[1] in SHOWN:
            shown.add_row(metric, *(percent(metrics[name][metric]) for name in names))
    console = Console()
    console.print(shown)
    intervals = Table("95 % intervals", *names)
    for kind, comparison in comparisons.items():
        for key, values in comparison.values.items():
            cells = [f"{percent(v.value)} ({percent(v.low)} to {percent(v.high)})" for v in values]
            intervals.add_row(f"{kind}/{key}", *cells)
            gains = [
                f"{100 * d.value:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f}), better in {100 * share:.0f} %"
                for d, share in zip(comparison.differences[key], comparison.better[key], strict=True)
            ]
            intervals.add_row("  difference to the first", "", *gains)
    console.print(intervals)
