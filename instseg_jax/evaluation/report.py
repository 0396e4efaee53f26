"""The evaluation as one page of HTML that needs nothing beside it: numbers, charts and pictures.

What is shown is computed in `analysis`, `coco` and `gallery`; the shapes of the charts are in `charts`.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from instseg_jax.evaluation import charts
from instseg_jax.evaluation.analysis import Analysis
from instseg_jax.evaluation.errors import DESCRIPTIONS, KINDS
from instseg_jax.files import write_text

KIND_NAMES = {"segm": "mask", "bbox": "box", "boundary": "boundary"}
MAX_LINES = 12  # classes that get a colour and a place in a legend; more are faint lines
MAX_MATRIX = 24  # classes in the confusion matrix


def write_report(
    path: str | Path,
    *,
    title: str,
    metrics: Mapping[str, float | None],
    analyses: Mapping[str, Analysis],
    facts: Mapping[str, str],
    galleries: Mapping[str, Sequence[tuple[str, str]]],
    run: Mapping[str, str],
) -> Path:
    """Write the report of an evaluation.

    Args:
      metrics: of `coco_metrics`.
      analyses: by kind, segm or bbox; the first is shown in full.
      facts: what was evaluated on what, name and text.
      galleries: title to (caption, data address) pictures; none where there are no images.
      run: times and memory, name and text.
    """
    main = next(iter(analyses.values()))
    kind = KIND_NAMES[main.matches.iou_type]
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="dim">{html.escape("; ".join(f"{name} {text}" for name, text in facts.items()))}</p>',
        _metrics_section(metrics, analyses),
        _curves_section(main, kind),
        _classes_section(metrics, main, [name for name in KIND_NAMES if f"{name}/AP" in metrics]),
        _errors_section(main, kind),
        _confusion_section(main, kind),
        _calibration_section(analyses),
        *(_gallery_section(name, pictures, kind) for name, pictures in galleries.items()),
    ]
    if not galleries:
        sections.append('<h2>Pictures</h2><p class="dim">Without the images there are none.</p>')
    if run:
        sections.append(f"<h2>Speed and memory</h2>{charts.table(('', ''), list(run.items()))}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{charts.STYLE}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )
    return write_text(path, page)


def percent(value: float | None) -> str:
    """A share as points with one decimal, a dash for none."""
    return "–" if value is None or np.isnan(value) else f"{100 * value:.1f}"


def _metrics_section(metrics: Mapping[str, float | None], analyses: Mapping[str, Analysis]) -> str:
    kinds = list(analyses)
    edges = " ".join(analysis.edges.say() for analysis in analyses.values() if analysis.edges is not None)
    shown = [*kinds, *(["boundary"] if "boundary/AP" in metrics else [])]
    names = [name.split("/")[1] for name in metrics if name.startswith(f"{kinds[0]}/") and name.count("/") == 1]
    rows = [(KIND_NAMES[kind], *(percent(metrics[f"{kind}/{name}"]) for name in names)) for kind in shown]
    return (
        f"<h2>Metrics</h2><p>In points of 100; AP is the mean over IoU 0.50 to 0.95, a dash means that there is "
        f"nothing to find.{_BOUNDARY_NOTE if 'boundary' in shown else ''} {edges}</p>{charts.table(('', *names), rows)}"
    )


_BOUNDARY_NOTE = " Boundary counts a mask by its edge where that overlaps less (2 % of the diagonal)."


def _curves_section(analysis: Analysis, kind: str) -> str:
    recalls = np.linspace(0, 1, 101)
    has_objects = analysis.matches.num_objects > 0
    means = [
        charts.Line(f"IoU {iou:g}: AP {percent(rows[has_objects].mean())}", recalls, rows[has_objects].mean(axis=0), i)
        for i, (iou, rows) in enumerate(analysis.precision_recall.items())
        if has_objects.any()
    ]
    at_half = next(iter(analysis.precision_recall.values()))
    names = analysis.matches.class_names
    colored = _largest(analysis.matches.num_objects)
    of_classes = [
        charts.Line(names[k], recalls, at_half[k], colored.index(k) if k in colored else None)
        for k in np.flatnonzero(has_objects).tolist()
    ]
    f1 = analysis.f1
    best = "" if f1.best_f1 is None else f": best {percent(f1.best_f1)} at score {f1.best_threshold:.3f}"
    f1_lines = [
        charts.Line("F1", f1.scores, f1.f1, 0),
        charts.Line("precision", f1.scores, f1.precision, 1, is_dashed=True),
        charts.Line("recall", f1.scores, f1.recall, 2, is_dashed=True),
    ]
    class_lines = [
        charts.Line(names[k], analysis.class_f1[k].scores, analysis.class_f1[k].f1, color)
        for color, k in [(colored.index(k) if k in colored else None, k) for k in np.flatnonzero(has_objects).tolist()]
    ]
    labels = {"x_label": "recall", "y_label": "precision"}
    f1_labels = {"x_label": "score threshold", "y_label": "F1"}
    return (
        f'<h2>Precision and recall, {kind}</h2><div class="row">'
        + charts.line_chart(means, title="Mean over the classes", **labels)
        + charts.line_chart(of_classes, title="Each class at IoU 0.5", **labels)
        + f'</div><h2>F1 by score threshold, {kind}</h2><div class="row">'
        + charts.line_chart(f1_lines, title=f"All detections at IoU 0.5{best}", **f1_labels | {"y_label": ""})
        + charts.line_chart(class_lines, title="Each class at IoU 0.5", **f1_labels)
        + "</div>"
    )


def _largest(num_objects: np.ndarray) -> list[int]:
    """The classes that get colours: those with the most objects, in the order of the classes."""
    return sorted(np.argsort(-num_objects, kind="stable")[:MAX_LINES].tolist())


def _classes_section(metrics: Mapping[str, float | None], analysis: Analysis, kinds: Sequence[str]) -> str:
    matches = analysis.matches
    rows = []
    for k, name in enumerate(matches.class_names):
        values = [metrics[f"{kind}/AP/{name}"] for kind in kinds]
        curve = analysis.class_f1[k]
        threshold = "–" if curve.best_threshold is None else f"{curve.best_threshold:.3f}"
        texts = [*(percent(v) for v in values), str(matches.num_objects[k]), percent(curve.best_f1), threshold]
        rows.append((name, values, texts))
    rows.sort(key=lambda row: -1 if row[1][0] is None else row[1][0], reverse=True)
    header = ("class", "", *(f"{KIND_NAMES[kind]} AP" for kind in kinds), "objects", "best F1", "at score")
    sizes = [
        (size, values, [percent(v) for v in values])
        for size in ("small", "medium", "large")
        for values in [[metrics[f"{kind}/AP_{size}"] for kind in kinds]]
    ]
    return (
        f"<h2>AP by class</h2>{charts.legend([KIND_NAMES[kind] for kind in kinds])}{charts.bar_table(header, rows)}"
        "<h2>AP by size</h2>"
        '<p class="dim">Small: below 32 x 32 pixels; large: from 96 x 96 on.</p>'
        + charts.bar_table(("size", "", *(f"{KIND_NAMES[kind]} AP" for kind in kinds)), sizes)
    )


def _errors_section(analysis: Analysis, kind: str) -> str:
    errors = analysis.errors
    rows = [
        (name, [errors.costs[name]], [percent(errors.costs[name]), str(errors.counts[name]), DESCRIPTIONS[name]])
        for name in KINDS
    ]
    both = ", ".join(
        f"{percent(errors.costs[key])} points for all {text}"
        for key, text in (("false_positives", "false alarms"), ("false_negatives", "objects not found"))
    )
    return (
        f"<h2>What the errors cost, {kind}</h2><p>Points of AP at IoU 0.5 (now {percent(errors.ap)}) that would be "
        f"gained if the errors of one kind alone were corrected (after TIDE). The gains do not add up. In another "
        f"view: {both}.</p>" + charts.bar_table(("error", "", "points", "count", ""), rows)
    )


def _confusion_section(analysis: Analysis, kind: str) -> str:
    counts, names = analysis.confusion, [*analysis.matches.class_names, "background"]
    note = ""
    if len(names) > MAX_MATRIX + 1:
        confused = counts.sum(axis=0) + counts.sum(axis=1) - 2 * np.diag(counts)
        chosen = np.sort(np.argsort(-confused[:-1], kind="stable")[:MAX_MATRIX])
        chosen = np.append(chosen, len(names) - 1)
        counts, names = counts[np.ix_(chosen, chosen)], [names[k] for k in chosen]
        note = f" Shown are the {MAX_MATRIX} classes with the most errors."
    threshold = analysis.thresholds["overall"] if analysis.thresholds else 0.0
    return (
        f"<h2>Confusion, {kind}</h2><p>Rows are what is there, columns what was detected, at scores from "
        f"{threshold:.3f} on (the best F1) and IoU 0.5. Last column: missed; last row: false alarms.{note}</p>"
        + charts.matrix(counts, names, corner="truth \\ prediction")
    )


def _calibration_section(analyses: Mapping[str, Analysis]) -> str:
    figures = []
    for kind, analysis in analyses.items():
        calibration = analysis.calibration
        error = "" if calibration.error is None else f": mean distance {percent(calibration.error)} points"
        figures.append(
            charts.reliability_chart(
                calibration.edges, calibration.precision, calibration.counts, title=f"{KIND_NAMES[kind]}{error}"
            )
        )
    return (
        "<h2>Calibration</h2><p>How many detections of a score are true at IoU 0.5. On the line, a score is the "
        f'chance of being right; bars below it are too certain.</p><div class="row">{"".join(figures)}</div>'
    )


def _gallery_section(title: str, pictures: Sequence[tuple[str, str]], kind: str) -> str:
    figures = "".join(
        f'<figure><img src="{address}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        for text, address in ((html.escape(caption), address) for caption, address in pictures)
    )
    body = f'<div class="gallery">{figures}</div>' if pictures else '<p class="dim">None.</p>'
    return f'<h2>{html.escape(title)}</h2><p class="dim">Left the truth, right the {kind}s predicted.</p>{body}'
