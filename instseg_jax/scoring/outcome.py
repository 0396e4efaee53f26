"""What a scored model leaves behind: analysis, report, numbers, results."""

import dataclasses
from pathlib import Path

import jax

from instseg_jax.evaluation.analysis import Analysis, analyse
from instseg_jax.evaluation.coco import coco_metrics, detection_limit, remove_result, write_evaluation
from instseg_jax.evaluation.gallery import choose_cases, draw_cases
from instseg_jax.evaluation.report import write_report
from instseg_jax.results.visualize import draw_instances

MANY = 10_000  # detections: to score more takes long enough to say so


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Results with their score, and what a report needs beside them."""

    metrics: dict[str, float | None]
    results: list[dict]
    ground_truth: dict
    kinds: tuple[str, ...]  # segm, bbox or both
    facts: dict[str, str]
    run: dict[str, str]  # times and memory
    images: dict  # functions that read a picture to look at, by image id; empty without images
    annotations: str  # where the truth came from
    gallery_size: int


def write_outcome(workdir: Path, evaluated: Evaluated) -> dict[str, Analysis]:
    """Analyse, and write report.html, predictions.json and, last, evaluate_result.json; returns the analyses.

    Of several processes all may call this; the first one writes.
    """
    limit = detection_limit(evaluated.ground_truth)
    analyses = {
        kind: analyse(
            evaluated.ground_truth,
            evaluated.results,
            iou_type=kind,
            max_detections=limit,
            with_edges="boundary/AP" in evaluated.metrics,
        )
        for kind in evaluated.kinds
    }
    if jax.process_index() == 0:
        _write(workdir, evaluated, analyses)
    return analyses


def _write(workdir: Path, evaluated: Evaluated, analyses: dict[str, Analysis]) -> None:
    main = next(iter(analyses.values()))
    galleries = {}
    if evaluated.images:
        galleries = {
            title: draw_cases(
                main,
                evaluated.results,
                cases,
                read_image=lambda image_id: evaluated.images[image_id](),
                draw=draw_instances,
            )
            for title, cases in choose_cases(main, evaluated.gallery_size).items()
        }
    remove_result(workdir)
    write_report(
        workdir / "report.html",
        title="Evaluation",
        metrics=evaluated.metrics,
        analyses=analyses,
        facts=evaluated.facts,
        galleries=galleries,
        run=evaluated.run,
    )
    write_evaluation(
        workdir,
        evaluated.metrics,
        evaluated.results,
        analysis={kind: analysis.summary() for kind, analysis in analyses.items()},
        evaluated=evaluated.facts | {"annotations": evaluated.annotations},
        run=evaluated.run,
    )


def score_results(
    truth: dict, results: list[dict], kinds: tuple[str, ...], *, engine: str, boundary: bool = False
) -> dict[str, float | None]:
    """COCO metrics of result entries, as training, `evaluate`, `compare` and exports give them: `coco_metrics`.

    `kinds` are segm, bbox or both; `boundary` adds Boundary AP to segm.
    """
    if len(results) > MANY and jax.process_index() == 0:
        print(f"scoring {len(results)} detections with {engine}", flush=True)
    scored = (*kinds, "boundary") if boundary and "segm" in kinds else kinds
    metrics = coco_metrics(truth, results, iou_types=scored, engine=engine)
    metrics.setdefault("AP", metrics.get("bbox/AP"))  # boxes alone
    return metrics
