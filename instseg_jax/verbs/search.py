"""`sweep --search=optuna`: runs whose values a search proposes, and what came out."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from instseg_jax.commands import print_next
from instseg_jax.sweeps.launch import CONSOLE, assign_devices, launch
from instseg_jax.sweeps.plan import Run
from instseg_jax.sweeps.search import Search, open_search
from instseg_jax.sweeps.search_tables import write_search
from instseg_jax.sweeps.state import State


def run_search(options: argparse.Namespace) -> int:
    """Train until the study has its trials; print and write the table.

    Returns: 0 when there are as many trials as asked for, 1 when all of them failed, 130 after an interruption.
    """
    if options.axis or options.folds or options.seeds != 1 or options.sweep_list or options.sweep_index is not None:
        raise ValueError("--search proposes the values itself: leave --axis, --folds, --seeds and --sweep_* away")
    if options.trials is None:
        raise ValueError("--trials is missing: how many runs the search may take")
    workdir = Path(options.workdir)
    search = open_search(
        options.config, options.overrides, workdir, num_trials=options.trials, is_pruning=options.prune
    )
    devices = assign_devices(options.overrides.get("device", "auto"), 1 if options.jobs is None else options.jobs)
    print(f"search of {', '.join(search.space.distributions)} in {workdir}, {options.trials} trials in all")

    def tell(event: str, run: Run, state: State) -> None:
        if event == "start":
            chosen = ", ".join(f"{name}={run.overrides[name]}" for name in search.space.distributions)
            print(f"{run.name}: {chosen}; its output is in {workdir / run.name / CONSOLE}", flush=True)
            return
        search.end(run, state)
        print(f"{run.name}: {_say(search, run, state)}", flush=True)
        write_search(search)

    is_whole = launch(
        search.runs(),
        workdir,
        spec=options.config,
        devices=devices,
        tell=tell,
        wait=lambda runs: None,
        give_up=search.is_hopeless,
    )
    paths = write_search(search)
    text = paths[0].read_text(encoding="utf-8")
    if Console().is_terminal:
        Console().print(Markdown(text))
    else:
        print(text)
    print_next("sweep", "...", comment="the same command goes on; with more --trials it searches further")
    if not is_whole:
        return 130
    return 0 if any(trial.value is not None for trial in search.study.get_trials(deepcopy=False)) else 1


def _say(search: Search, run: Run, state: State) -> str:
    if state.status == "finished":
        score = state.scores.get(search.metric)
        return f"{search.metric} {'-' if score is None else f'{score:.3f}'}"
    if state.status == "stopped" and search.is_hopeless(run):
        return f"given up after {state.steps} steps"
    return {"running": "another process trains it"}.get(state.status, f"{state.status} {state.reason}".strip())
