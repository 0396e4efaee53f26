"""Several results for the same images side by side, with paired bootstrap intervals over images.

A resample draws the images anew, with replacement, the same for every run: what the choice of images does to all of
them alike drops out of the differences.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from instseg_jax.evaluation import charts
from instseg_jax.evaluation.curves import precision_recall
from instseg_jax.evaluation.matching import Matches, average_precision
from instseg_jax.evaluation.report import KIND_NAMES, percent
from instseg_jax.files import write_text

LEVEL = 0.95  # of the intervals


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number with the interval of the resamples (percentiles)."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """AP and AP50 of R runs by masks or boxes; differences are to the first run."""

    names: tuple[str, ...]
    values: dict[str, tuple[Interval, ...]]  # AP and AP50: one of each run
    differences: dict[str, tuple[Interval, ...]]  # R - 1 of each
    better: dict[str, tuple[float, ...]]  # R - 1 of each: share of the resamples in which the run beats the first

    def summary(self) -> dict:
        """The numbers as plain JSON values."""
        return {
            key: {
                name: dataclasses.asdict(self.values[key][i])
                | (
                    {"difference": dataclasses.asdict(self.differences[key][i - 1]), "better": self.better[key][i - 1]}
                    if i
                    else {}
                )
                for i, name in enumerate(self.names)
            }
            for key in self.values
        }


def compare_matches(
    runs: Mapping[str, Matches],
    *,
    num_resamples: int,
    seed: int,
    progress: Callable[[Iterable[int], int], Iterable[int]] | None = None,
) -> Comparison | None:
    """Bootstrap AP and AP50 of runs on the same images; None when there is nothing to find in them.

    `progress` is called with the resamples and their number; it yields them on and may show how far they are.
    Raises ValueError when there are not two runs, or when their images or classes differ.
    """
    names, matches = tuple(runs), list(runs.values())
    if len(names) < 2:
        raise ValueError("A comparison needs at least two runs.")
    for name, other in runs.items():
        if not np.array_equal(other.image_ids, matches[0].image_ids) or other.class_names != matches[0].class_names:
            raise ValueError(f"{name} was scored on other images or classes than {names[0]}.")
    if not matches[0].num_objects.any():
        return None
    rng = np.random.default_rng(seed)
    num_images = len(matches[0].image_ids)
    found = np.array([_ap_and_ap50(m, None) for m in matches])  # [R, 2]
    drawn = np.full((num_resamples, len(matches), 2), np.nan)
    resamples: Iterable[int] = range(num_resamples)
    for i in resamples if progress is None else progress(resamples, num_resamples):
        weights = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        drawn[i] = [_ap_and_ap50(m, weights) for m in matches]
    drawn = drawn[~np.isnan(drawn).any(axis=(1, 2))]  # without those that drew no object at all
    values, differences, better = {}, {}, {}
    for k, key in enumerate(("AP", "AP50")):
        values[key] = tuple(_interval(found[r, k], drawn[:, r, k]) for r in range(len(names)))
        gains = [(found[r, k] - found[0, k], drawn[:, r, k] - drawn[:, 0, k]) for r in range(1, len(names))]
        differences[key] = tuple(_interval(*gain) for gain in gains)
        # A draw, as when nothing has changed in the images drawn, counts half.
        better[key] = tuple(float(np.mean((gain > 0) + 0.5 * (gain == 0))) for _, gain in gains)
    return Comparison(names, values, differences, better)


def write_comparison(
    path: str | Path,
    *,
    metrics: Mapping[str, Mapping[str, float | None]],
    matches: Mapping[str, Mapping[str, Matches]],
    comparisons: Mapping[str, Comparison],
    num_resamples: int,
) -> Path:
    """Write the comparison as one page of HTML: `metrics` by run, `matches` by kind and run."""
    sections = ["<h1>Comparison</h1>", "<h2>Metrics</h2>", _metrics_table(metrics)]
    for kind, comparison in comparisons.items():
        for key in comparison.values:
            sections.append(f"<h2>{KIND_NAMES[kind]} {key} with 95 % intervals</h2>")
            rows = list(zip(comparison.names, comparison.values[key], strict=True))
            gains = list(zip(comparison.names[1:], comparison.differences[key], strict=True))
            sections.append(
                '<div class="row">'
                + charts.interval_chart([(n, v.value, v.low, v.high) for n, v in rows], title=f"{key}, points")
                + charts.interval_chart(
                    [(n, v.value, v.low, v.high) for n, v in gains],
                    title=f"Difference to {comparison.names[0]}, points; {num_resamples} paired resamples",
                    first_color=1,  # as beside it, where the first run is shown too
                )
                + "</div>"
            )
        recalls = np.linspace(0, 1, 101)
        lines = [
            charts.Line(name, recalls, np.nanmean(precision_recall(found, 0)[found.num_objects > 0], axis=0), i)
            for i, (name, found) in enumerate(matches[kind].items())
        ]
        chart = charts.line_chart(
            lines, x_label="recall", y_label="precision", title="Mean over the classes at IoU 0.5"
        )
        sections.append(f'<h2>Precision and recall, {KIND_NAMES[kind]}</h2><div class="row">{chart}</div>')
        sections.append(f"<h2>{KIND_NAMES[kind]} AP by class</h2>{_class_table(metrics, kind)}")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{charts.STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    return write_text(path, page)


def shared_metrics(metrics: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Names of the metrics that all runs have, without those of single classes."""
    runs = list(metrics.values())
    return [name for name in runs[0] if name.count("/") == 1 and all(name in run for run in runs)]


def _metrics_table(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    rows = [(name, *(percent(run[name]) for run in metrics.values())) for name in shared_metrics(metrics)]
    return charts.table(("", *metrics), rows)


def _class_table(metrics: Mapping[str, Mapping[str, float | None]], kind: str) -> str:
    prefix = f"{kind}/AP/"
    names = [name for name in next(iter(metrics.values())) if name.startswith(prefix)]
    rows = [
        (name.removeprefix(prefix), values, [percent(v) for v in values])
        for name in names
        for values in [[run.get(name) for run in metrics.values()]]
    ]
    return charts.legend(list(metrics)) + charts.bar_table(("class", "", *metrics), rows)


def _ap_and_ap50(matches: Matches, weights: np.ndarray | None) -> tuple[float, float]:
    ap = average_precision(matches, weights)
    ap = ap[:, ~np.isnan(ap[0])]
    return (float(ap.mean()), float(ap[0].mean())) if ap.size else (np.nan, np.nan)


def _interval(value: float, drawn: Sequence[float] | np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (value, value)
    return Interval(float(value), float(low), float(high))
