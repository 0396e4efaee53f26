"""The verb `sweep`: variants of a config trained side by side, and what came out in tables."""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from instseg_jax.cluster import join_ray, run_commands
from instseg_jax.commands import print_next, shown, without
from instseg_jax.config import check_sizes
from instseg_jax.data import coco
from instseg_jax.data.split import fold_split
from instseg_jax.models.mask_rtdetr import build_model
from instseg_jax.progress import say_duration
from instseg_jax.sweeps import tables
from instseg_jax.sweeps.launch import CONSOLE, assign_devices, command_of, launch
from instseg_jax.sweeps.plan import Plan, Run, build_plan
from instseg_jax.sweeps.state import State, read_state
from instseg_jax.training.workdir import FREE_TO_CHANGE, check_same_config
from instseg_jax.verbs.search import run_search
from instseg_jax.weights import checkpoint

PLAIN_SECONDS = 60.0  # between lines that say how far the runs are, where there is no terminal


def sweep(options: argparse.Namespace) -> int:
    """Train every variant of a config, or go on with it; print and write the tables.

    Returns: 0 when all runs (or the one that was asked for) are finished, 1 when some broke or were not run,
      130 after an interruption.
    """
    if options.address and not options.engine:
        raise ValueError(f"--address is {options.address}, it goes with --engine=ray")
    if options.search:
        if options.engine:
            raise ValueError("--engine=ray is not there with --search: start the same command on each node")
        return run_search(options)
    if options.prune or options.trials is not None:
        raise ValueError("--trials and --prune are for --search=optuna")
    axes, seeds, workdir = options.axis, options.seeds, Path(options.workdir)
    plan = build_plan(
        options.config,
        options.overrides,
        axes,
        mode=options.mode,
        num_seeds=seeds,
        folds=_folds(options.folds),
        fixed_fields=FREE_TO_CHANGE,
    )
    if options.sweep_list:
        _print_list(plan, workdir)
        print_next("sweep", "...", "--sweep_index=I", comment="trains one of them; without it all are trained")
        return 0
    _check_folders(plan, workdir)
    if options.sweep_table:
        return _finish(plan, workdir)
    _check_variants(plan)
    selected = list(plan.runs)
    if options.sweep_index is not None:
        if not 0 <= options.sweep_index < len(plan.runs):
            raise ValueError(f"--sweep_index is {options.sweep_index}, it must be from 0 to {len(plan.runs) - 1}")
        selected = [plan.runs[options.sweep_index]]
    finished = [run for run in selected if read_state(workdir / run.name).status == "finished"]
    open_runs = [run for run in selected if run not in finished]
    jobs = 1 if options.jobs is None else options.jobs
    devices = [None] if options.engine and jobs > 0 else assign_devices(plan.base.config.device, jobs)
    if options.sweep_index is not None:
        print(f"run {options.sweep_index} of {len(plan.runs)}: {selected[0].name}")
    else:
        done = f"{len(finished)} are finished already"
        print(f"{len(plan.runs)} runs of {len(plan.variants)} variants in {workdir}; {done}")
    is_whole = True
    if open_runs:
        with _Bar(plan, workdir, len(finished), len(selected)) as progress:
            if options.engine:
                _run_on_ray(options, plan, open_runs, progress)
            else:
                is_whole = launch(
                    open_runs,
                    workdir,
                    spec=options.config,
                    devices=devices,
                    tell=progress.tell,
                    wait=progress.wait,
                )
    code = _finish(plan, workdir, selected)
    return code if is_whole else 130


def _run_on_ray(options: argparse.Namespace, plan: Plan, runs: list[Run], progress: "_Bar") -> None:
    """Train runs on a Ray cluster, each by the command that an array job has."""
    cluster = join_ray(options.address)
    arguments = without(options.arguments, ("--engine", "--address", "--jobs", "--sweep_index"))
    workdir, left = Path(options.workdir), list(runs)

    def wait() -> None:
        progress.wait([run for run in left if read_state(workdir / run.name).status == "running"])

    commands = [[*arguments, f"--sweep_index={plan.runs.index(run)}"] for run in runs]
    for ended in run_commands(cluster, commands, at_once=options.jobs, wait=wait):
        run = runs[ended.number]
        left.remove(run)
        state = read_state(workdir / run.name)
        is_silent = ended.code and state.status != "failed"  # its node was lost, or it broke before it had a folder
        progress.tell("end", run, State("failed", ended.error) if is_silent else state)


def _folds(count: int | None) -> list[dict[str, str]]:
    """Fields that name the splits of each fold, as `split --by=blocks --folds` writes them."""
    if count is not None and count < 2:
        raise ValueError(f"--folds is {count}, it must be at least 2")
    return [
        {
            f"data.{part}_annotations": f"annotations/instance_{fold_split(number, part)}.json"
            for part in ("train", "val")
        }
        for number in range(1, (count or 0) + 1)
    ]


def _print_list(plan: Plan, workdir: Path) -> None:
    for i, run in enumerate(plan.runs):
        print(f"{i:3d}  {read_state(workdir / run.name).status:8s}  {run.name}")
        print(f"     {shown(*command_of(plan.spec, run.overrides, workdir / run.name))}")


def _check_variants(plan: Plan) -> None:
    """Raise ValueError or OSError for what would break runs and can be known in moments."""
    for variant in plan.variants:
        check_sizes(variant.config.data)
        build_model(variant.config.model, variant.config.model.num_classes or 1)
    for run in plan.runs:
        data = run.config.data
        if not data.dir:
            raise ValueError("data.dir is empty; name the data set's folder with --config.data.dir=DIR")
        if data.source == "folder":
            for split in ("train", "val"):
                coco.find_split(data.dir, split, data[f"{split}_annotations"], data[f"{split}_images"])


def _check_folders(plan: Plan, workdir: Path) -> None:
    """Raise ValueError where a run's folder holds a run with another config."""
    for run in plan.runs:
        folder = workdir / run.name
        if (folder / checkpoint.CHECKPOINTS).is_dir() or read_state(folder).status == "finished":
            check_same_config(folder, run.config)


def _finish(plan: Plan, workdir: Path, selected: list[Run] | None = None) -> int:
    """Write the tables and show them; the exit code."""
    states = {run.name: read_state(workdir / run.name) for run in plan.runs}
    paths = tables.write_tables(plan, states, workdir)
    text = paths[0].read_text(encoding="utf-8")
    if Console().is_terminal:
        Console().print(Markdown(text))
    else:
        print(text)
    print("files: " + ", ".join(map(str, paths)))
    if best := tables.find_winner(plan, states):
        folder = workdir / best.run.name
        print_next("evaluate", f"--weights={folder}", f"--workdir={folder}", comment="the best run")
    else:
        print_next("sweep", "...", comment="the same command goes on and tries again what broke")
    return 0 if all(states[run.name].status == "finished" for run in selected or plan.runs) else 1


class _Bar:
    """Says which run starts, how far it is and how it ends: a bar in a terminal, else lines; keeps the tables fresh."""

    def __init__(self, plan: Plan, workdir: Path, num_finished: int, num_runs: int):
        self._plan, self._workdir = plan, workdir
        self._total, self._done, self._num_ended = num_runs, num_finished, 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if Console().is_terminal:
            columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"))
            self._task = self._bar.add_task("runs", total=num_runs, completed=num_finished, text="")

    def __enter__(self) -> "_Bar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def tell(self, event: str, run: Run, state: State) -> None:
        if event == "start":
            self._print(f"{run.name}: started, its output is in {self._workdir / run.name / CONSOLE}")
            return
        self._done += 1
        self._num_ended += 1
        if state.status == "finished":
            scores = ", ".join(f"{title} {_number(state.scores.get(name))}" for name, title in tables.TITLES.items())
            minutes = "" if state.seconds is None else f" in {state.seconds / 60:.1f} minutes"
            said = f"finished{minutes}: {scores}"
        else:
            said = {"running": "another process trains in this folder, it is left alone"}.get(
                state.status, state.status
            )
            said += f": {state.reason}" if state.reason else ""
        self._print(f"[{self._done}/{self._total}] {run.name}: {said}{self._left()}")
        states = {run.name: read_state(self._workdir / run.name) for run in self._plan.runs}
        tables.write_tables(self._plan, states, self._workdir)
        if self._bar:
            self._bar.update(self._task, completed=self._done)

    def _left(self) -> str:
        remaining = self._total - self._done
        if not remaining:
            return ""
        seconds = (time.monotonic() - self._started) / self._num_ended * remaining
        return f"; about {say_duration(seconds)} left"

    def wait(self, running: list[Run]) -> None:
        now = time.monotonic()
        if not self._bar and now - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = now
        texts = []
        for run in running:
            state = read_state(self._workdir / run.name)
            texts.append(f"{run.name}: epoch {state.epoch:.1f} of {run.config.train.epochs}")
        if self._bar:
            self._bar.update(self._task, text="; ".join(texts))
        elif texts:
            self._print("; ".join(texts))

    def _print(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            print(text)
            sys.stdout.flush()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
