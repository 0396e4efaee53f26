"""What a search has found: a table of its trials, the best one as a command, and which fields mattered."""

import csv
import io
from pathlib import Path

from instseg_jax.commands import shown
from instseg_jax.files import write_text, written_aside
from instseg_jax.sweeps.launch import command_of
from instseg_jax.sweeps.search import Search

SHOWN = 20  # trials in the table, the best first


def write_search(search: Search) -> list[Path]:
    """Write search.md, search.csv and, from the third finished trial on, search.png; return them."""
    paths = [write_text(search.workdir / "search.md", _to_markdown(search))]
    paths.append(write_text(search.workdir / "search.csv", _to_csv(search)))
    if (importance := _importance(search)) is not None:
        paths.append(_draw(search, importance, search.workdir / "search.png"))
    return paths


def _sorted_trials(search: Search) -> list:
    trials = search.study.get_trials(deepcopy=False)
    return sorted(trials, key=lambda t: (t.value is None, -(t.value or 0.0), t.number))


def _to_markdown(search: Search) -> str:
    trials, fields = _sorted_trials(search), list(search.space.distributions)
    states = [trial.state.name.lower() for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [f"# Search of {search.spec}", "", f"{len(trials)} of {search.num_trials} trials: {counts}.", ""]
    if trials and trials[0].value is not None:
        run = search.run_of(trials[0])
        command = shown(*command_of(search.spec, run.overrides, search.workdir / "best"))
        lines += [f"Best: {run.name}, {search.metric} {trials[0].value:.3f}. Again:", "", f"    {command}", ""]
    lines += [f"| trial | {search.metric} | state | {' | '.join(fields)} |", "|---" * (3 + len(fields)) + "|"]
    for trial in trials[:SHOWN]:
        score = "" if trial.value is None else f"{trial.value:.4f}"
        cells = [_say(trial.params.get(field)) for field in fields]
        lines.append(f"| {trial.number} | {score} | {trial.state.name.lower()} | {' | '.join(cells)} |")
    importance = _importance(search)
    if importance is not None:
        said = ", ".join(f"{field} {share:.2f}" for field, share in importance.items())
        lines += ["", f"Share of each field in what sets the best tenth apart (PED-ANOVA): {said}."]
    return "\n".join(lines) + "\n"


def _to_csv(search: Search) -> str:
    text = io.StringIO()
    fields = list(search.space.distributions)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", search.metric, "evaluations", *fields])
    for trial in search.study.get_trials(deepcopy=False):
        values = [trial.params.get(field) for field in fields]
        writer.writerow([trial.number, trial.state.name, trial.value, len(trial.intermediate_values), *values])
    return text.getvalue()


def _importance(search: Search) -> dict[str, float] | None:
    """The share of each field; None while too few trials are finished, or all are equally good."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    finished = search.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(finished) < 3 or len({trial.value for trial in finished}) < 2:
        return None
    return get_param_importances(search.study, evaluator=PedAnovaImportanceEvaluator())


def _draw(search: Search, importance: dict[str, float], path: Path) -> Path:
    """The score of each trial in its turn, and the shares of the fields."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    trials = [trial for trial in search.study.get_trials(deepcopy=False) if trial.value is not None]
    best = [max(t.value for t in trials[: k + 1]) for k in range(len(trials))]
    left.plot([t.number for t in trials], [t.value for t in trials], "o", label="trial")
    left.plot([t.number for t in trials], best, label="best so far")
    left.set(xlabel="trial", ylabel=search.metric)
    left.legend()
    names = list(importance)[::-1]
    right.barh(names, [importance[name] for name in names])
    right.set(xlabel="importance", xlim=(0, 1))
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=110)
    return path


def _say(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
