"""training.png: what a run's files say about losses, learning rate and scores, drawn."""

import io
import pathlib

import numpy as np

from instseg_jax.files import write_bytes
from instseg_jax.training.workdir import METRICS, VALIDATION, read_rows

LOSSES = ("loss", "loss/class", "loss/box_l1", "loss/box_giou", "loss/mask_bce", "loss/mask_dice")
SCORES = ("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50")
MOST_POINTS = 1000  # of a line; of longer runs means are drawn


def draw_training(workdir: pathlib.Path) -> pathlib.Path | None:
    """Draw metrics.jsonl and validation.jsonl of a run into training.png; None when there is nothing yet."""
    from matplotlib.figure import Figure  # importing it takes a second, which no other verb should wait for

    rows, evaluations = read_rows(workdir / METRICS), read_rows(workdir / VALIDATION)
    if not rows:
        return None
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    total, terms, rate, scores = axes.flat
    _draw_lines(total, rows, LOSSES[:1], "loss")
    _draw_lines(terms, rows, LOSSES[1:], "terms of the last layer")
    _draw_lines(rate, rows, ("learning_rate",), "learning rate")
    for name in SCORES:
        points = [(row["step"], row[name]) for row in evaluations if row.get(name) is not None]
        if points:
            scores.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    scores.set(title="validation", ylim=(0, 1))
    if evaluations:
        scores.legend(fontsize="small")
    for one in axes.flat:
        one.set_xlabel("step")
        one.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    return write_bytes(workdir / "training.png", picture.getvalue())


def _draw_lines(axis, rows: list[dict], names: tuple[str, ...], title: str) -> None:
    for name in names:
        points = np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None], float)
        if len(points) > MOST_POINTS:
            points = np.array([part.mean(axis=0) for part in np.array_split(points, MOST_POINTS)])
        if len(points):
            axis.plot(*points.T, label=name.removeprefix("loss/"), linewidth=1)
    axis.set_title(title)
    if len(names) > 1:
        axis.legend(fontsize="small")
