"""What came out of a sweep: Markdown, CSV, a picture, and the best config as a file."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from instseg_jax.commands import shown
from instseg_jax.config import CHECKOUT, PACKAGED, find_config
from instseg_jax.files import write_bytes, write_text
from instseg_jax.sweeps.launch import command_of
from instseg_jax.sweeps.plan import Plan, Row, Run, Table, Variant
from instseg_jax.sweeps.state import SCORES, State

TITLES = {"segm/AP50": "mAP@0.5", "segm/AP": "mAP"}  # of masks; the two columns of the tables
MOST_TICK_LETTERS = 12  # under a plot; longer labels are turned


@dataclasses.dataclass(frozen=True)
class Summary:
    """One score over some runs; 0..1."""

    mean: float | None  # None without a run
    spread: float | None  # sample standard deviation; None below two runs
    values: tuple[float, ...]

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return f"{self.mean:.3f}" + (f" ± {self.spread:.3f}" if self.spread is not None else "")


@dataclasses.dataclass(frozen=True)
class Winner:
    """The best variant, and the run of it whose weights to take."""

    variant: Variant
    run: Run  # the best of its runs
    score: Summary
    metric: str


def summarise(values: Iterable[float | None]) -> Summary:
    """Mean and spread of the values that are there; None counts as not there."""
    known = tuple(value for value in values if value is not None)
    return Summary(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
        known,
    )


def summarise_runs(runs: Iterable[Run], states: Mapping[str, State], metric: str) -> Summary:
    """A score over the finished ones of some runs."""
    finished = [states[run.name] for run in runs if states[run.name].status == "finished"]
    return summarise(state.scores.get(metric) for state in finished)


def find_winner(plan: Plan, states: Mapping[str, State]) -> Winner | None:
    """The variant with the highest mean of `eval.best_metric`; None while no run has a score.

    Only variants with as many finished runs as any has take part; of equal ones the first wins.
    """
    metric = plan.base.config.eval.best_metric
    runs = {variant.name: [run for run in plan.runs if run.variant is variant] for variant in plan.variants}
    scores = {name: summarise_runs(of, states, metric) for name, of in runs.items()}
    most = max(len(score.values) for score in scores.values())
    if most == 0:
        return None
    candidates = [variant for variant in plan.variants if len(scores[variant.name].values) == most]
    best = max(candidates, key=lambda variant: _or_lowest(scores[variant.name].mean))
    scored = [run for run in runs[best.name] if states[run.name].status == "finished"]
    run = max(scored, key=lambda run: _or_lowest(states[run.name].scores.get(metric)))
    return Winner(best, run, scores[best.name], metric)


def _or_lowest(value: float | None) -> float:
    return -1.0 if value is None else value


def write_tables(plan: Plan, states: Mapping[str, State], workdir: Path) -> list[Path]:
    """Write NAME.md, NAME.csv, NAME_runs.csv, NAME.png and, once there is a winner, NAME_best.py."""
    winner = find_winner(plan, states)
    paths = [
        write_text(workdir / f"{plan.name}.md", to_markdown(plan, states, winner, workdir)),
        write_text(workdir / f"{plan.name}.csv", to_csv(plan, states)),
        write_text(workdir / f"{plan.name}_runs.csv", runs_to_csv(plan, states)),
        draw_tables(plan, states, workdir / f"{plan.name}.png"),
    ]
    if winner is not None:
        paths.append(write_text(workdir / f"{plan.name}_best.py", best_config(plan, winner, workdir)))
    return paths


def to_markdown(plan: Plan, states: Mapping[str, State], winner: Winner | None, workdir: Path) -> str:
    """All tables, the winner, and what broke."""
    lines = [f"# Sweep of {plan.spec}", "", f"{count_states(plan, states)}. {_explain(plan)}"]
    best = set() if winner is None else {winner.variant}
    for table in plan.tables:
        lines += ["", f"## {table.title}", "", *table_to_markdown(plan, table, states, best)]
    if winner is not None:
        command = command_of(plan.spec, winner.variant.overrides, Path("WORKDIR"))
        said = f"{winner.variant.name}: {winner.metric} {winner.score} ({_num_runs(len(winner.score.values))})."
        files = f"`{workdir / f'{plan.name}_best.py'}`, its best weights are in `{workdir / winner.run.name}`"
        lines += ["", "## The best", "", f"{said} Its config is {files}. To repeat it:"]
        lines += ["", "```bash", shown(*command), "```"]
    broken = [(run, states[run.name]) for run in plan.runs if states[run.name].status == "failed"]
    if broken:
        lines += ["", "## Broken runs", "", *(f"- {run.name}: {state.reason}" for run, state in broken)]
    return "\n".join(lines) + "\n"


def table_to_markdown(plan: Plan, table: Table, states: Mapping[str, State], best: set[Variant]) -> list[str]:
    """One table; the row of the best variant in bold."""
    lines = [f"| {table.title} | {' | '.join(TITLES.values())} | finished runs |", "|---|---|---|---|"]
    for row in table.rows:
        runs = plan.runs_of(row)
        cells = [row.label, *(str(summarise_runs(runs, states, metric)) for metric in TITLES)]
        if len(row.variants) == 1 and row.variants[0] in best:
            cells = [f"**{cell}**" for cell in cells]
        cells.append(f"{_num_finished(runs, states)} of {len(runs)}")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def _explain(plan: Plan) -> str:
    seeds = len({run.seed for run in plan.runs})
    repeats = [f"{plan.num_folds} folds"] * (plan.num_folds > 0) + [f"{seeds} seeds"] * (seeds > 1)
    spread = "mean ± sample standard deviation" if repeats or plan.mode == "grid" else "one seed"
    over = f" over {' and '.join(repeats)}" if repeats else ""
    if plan.mode == "grid":
        over = f"{over} and the values of the other axes" if repeats else " over the values of the other axes"
    text = f"Scores of masks at each run's best evaluation, 0..1, {spread}{over}."
    if plan.mode == "one_at_a_time" and len(plan.tables) > 1:
        text += " One axis is varied at a time; the other fields are as the config has them."
    return text


def count_states(plan: Plan, states: Mapping[str, State]) -> str:
    """How many runs are finished, and what the others are."""
    statuses = [states[run.name].status for run in plan.runs]
    others = [f"{statuses.count(s)} {s}" for s in ("failed", "running", "stopped", "waiting") if s in statuses]
    return ", ".join([f"{statuses.count('finished')} of {_num_runs(len(statuses))} finished", *others])


def _num_runs(number: int) -> str:
    return f"{number} run" + ("s" if number != 1 else "")


def _num_finished(runs: Iterable[Run], states: Mapping[str, State]) -> int:
    return sum(states[run.name].status == "finished" for run in runs)


def to_csv(plan: Plan, states: Mapping[str, State]) -> str:
    """The tables' rows, with mean, spread, least and most of every score; empty where there is none."""
    header = ["table", "value", "runs", "finished"]
    header += [f"{metric} {what}" for metric in SCORES for what in ("mean", "std", "min", "max")]
    rows = []
    for table in plan.tables:
        for row in table.rows:
            runs = plan.runs_of(row)
            cells: list = [table.title, row.label, len(runs), _num_finished(runs, states)]
            for metric in SCORES:
                summary = summarise_runs(runs, states, metric)
                ends = (min(summary.values), max(summary.values)) if summary.values else (None, None)
                cells += [summary.mean, summary.spread, *ends]
            rows.append(cells)
    return _csv(header, rows)


def runs_to_csv(plan: Plan, states: Mapping[str, State]) -> str:
    """A row a run: folder, seed, status, steps, seconds, scores, what broke."""
    header = ["run", "variant", "seed", "status", "steps", "seconds", *SCORES, "error"]
    rows = []
    for run in plan.runs:
        state = states[run.name]
        scores = [state.scores.get(metric) for metric in SCORES]
        rows.append(
            [run.name, run.variant.name, run.seed, state.status, state.steps, state.seconds, *scores, state.reason]
        )
    return _csv(header, rows)


def _csv(header: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()


def draw_tables(plan: Plan, states: Mapping[str, State], path: Path) -> Path:
    """A panel a table: means with their spread, and a dot for each run."""
    from matplotlib.figure import Figure  # importing it takes a second, which no other verb should wait for

    widths = [max(4.0, 0.9 * len(table.rows) + 1.5) for table in plan.tables]
    figure = Figure(figsize=(sum(widths), 4.5), layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False, sharey=True, width_ratios=widths)[0]
    for panel, table in zip(panels, plan.tables, strict=True):
        for shift, (metric, title) in zip((-0.08, 0.08), TITLES.items(), strict=True):
            _draw_score(panel, plan, table.rows, states, metric, title, shift)
        labels = [row.label for row in table.rows]
        is_long = max(map(len, labels)) > MOST_TICK_LETTERS
        panel.set_xticks(range(len(labels)), labels, rotation=30 if is_long else 0, ha="right" if is_long else "center")
        panel.set(title=table.title, xlim=(-0.5, len(labels) - 0.5), ylabel="of masks, 0..1")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", alpha=0.3)
        panel.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    return write_bytes(path, picture.getvalue())


def _draw_score(panel, plan: Plan, rows: tuple[Row, ...], states, metric: str, title: str, shift: float) -> None:
    summaries = [summarise_runs(plan.runs_of(row), states, metric) for row in rows]
    known = [(i + shift, summary) for i, summary in enumerate(summaries) if summary.mean is not None]
    bars = panel.errorbar(
        [x for x, _ in known],
        [summary.mean for _, summary in known],
        yerr=[summary.spread or 0.0 for _, summary in known],
        marker="o",
        capsize=4,
        label=title,
    )
    for x, summary in known:
        panel.plot([x] * len(summary.values), summary.values, ".", color=bars[0].get_color(), alpha=0.4)


def best_config(plan: Plan, winner: Winner, workdir: Path) -> str:
    """A config file: the sweep's config with the winner's fields set."""
    spec, _, argument = plan.spec.partition(":")
    path = find_config(spec)
    for root in (CHECKOUT, PACKAGED):
        if path.is_relative_to(root.resolve()):
            path = Path("configs") / path.relative_to(root.resolve())  # found wherever the project is installed
            break
    source = f"{path.as_posix()}:{argument}" if argument else path.as_posix()
    fields = "".join(f"    {field!r}: {text!r},\n" for field, text in winner.variant.overrides.items())
    command = ["train", f"--config={workdir / f'{plan.name}_best.py'}", "--workdir=WORKDIR"]
    score = f"{winner.metric} {winner.score} ({_num_runs(len(winner.score.values))})"
    return (
        f'"""The best of the sweep of {source}: {winner.variant.name}.\n\n'
        f"Command:   {shown(*command)}\n"
        f'Measured:  {score}\n"""\n\n'
        "from instseg_jax.config import load_config\n\n"
        f"FIELDS = {{\n{fields}}}\n\n\n"
        "def get_config():\n"
        f"    return load_config({source!r}, FIELDS)\n"
    )
