"""A search for good values instead of a grid: Optuna proposes what each run tries (extra `search`).

A config file says what may vary in `search(space)`: `space.float("optimizer.learning_rate", 1e-4, 1e-2, log=True)`,
`space.int(field, low, high)`, `space.choice(field, values)`. A trial is a run in a folder of its own, as in a grid. The
study is a journal in the workdir: any number of processes share it, and what was killed goes on.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instseg_jax.config import load_config, load_function
from instseg_jax.files import alone
from instseg_jax.messages import quote
from instseg_jax.sweeps.plan import Run, Variant, get_field
from instseg_jax.sweeps.state import State, is_locked, read_state
from instseg_jax.training.workdir import VALIDATION, read_rows

JOURNAL, PROPOSING = "study.log", "study.lock"
STUDY = "search"


@dataclasses.dataclass
class Space:
    """What may vary: a distribution of Optuna for each field."""

    distributions: dict[str, Any] = dataclasses.field(default_factory=dict)

    def float(self, field: str, low: float, high: float, *, log: bool = False) -> None:
        """A number between two others; `log`: as likely in each decade."""
        from optuna.distributions import FloatDistribution

        self._add(field, FloatDistribution(low, high, log=log))

    def int(self, field: str, low: int, high: int, *, log: bool = False, step: int = 1) -> None:
        """A whole number from `low` to `high`, both included."""
        from optuna.distributions import IntDistribution

        self._add(field, IntDistribution(low, high, log=log, step=step))

    def choice(self, field: str, values: Sequence[Any]) -> None:
        """One of some values: numbers, texts, booleans, None."""
        from optuna.distributions import CategoricalDistribution

        self._add(field, CategoricalDistribution(list(values)))

    def _add(self, field: str, distribution: Any) -> None:
        if field in self.distributions:
            raise ValueError(f"search(space) names {quote(field)} twice")
        self.distributions[field] = distribution


@dataclasses.dataclass
class Search:
    """A study with what its runs have in common."""

    spec: str
    overrides: dict[str, str]
    workdir: Path
    space: Space
    study: Any
    metric: str  # of validation.jsonl; the more, the better
    num_trials: int
    is_pruning: bool
    seed: int
    _trials: dict[str, Any] = dataclasses.field(default_factory=dict)  # those of this process, by name of the run
    _reported: dict[str, int] = dataclasses.field(default_factory=dict)
    _pruned: set[str] = dataclasses.field(default_factory=set)

    def begin(self) -> Run | None:
        """The run that comes next: one that a process left when it was killed, else a new one; None: there are enough.

        What a process has finished and not told is told. One process at a time proposes, so that there are no more
        trials than asked for, and each is drawn with a seed of its own: two with one seed propose the same.
        """
        with alone(self.workdir / PROPOSING):
            return self._propose()

    def _propose(self) -> Run | None:
        from optuna.samplers import TPESampler
        from optuna.trial import Trial, TrialState

        for left in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if left.params.keys() != self.space.distributions.keys():  # killed while it was proposed
                self.study.tell(left.number, state=TrialState.FAIL)
                continue
            run = self.run_of(left)
            if run.name in self._trials or is_locked(self.workdir / run.name):
                continue
            self._trials[run.name] = Trial(self.study, left._trial_id)  # there is no public way to go on with one
            state = read_state(self.workdir / run.name)
            if state.status not in ("finished", "failed"):
                return run
            self.end(run, state)
        trials = self.study.get_trials(deepcopy=False)
        number = sum(trial.params.keys() == self.space.distributions.keys() for trial in trials)  # proposed as a whole
        if number >= self.num_trials:
            return None
        self.study.sampler = TPESampler(seed=self.seed + number)
        trial = self.study.ask(fixed_distributions=self.space.distributions)
        run = self.run_of(trial)
        self._trials[run.name] = trial
        return run

    def run_of(self, trial: Any) -> Run:
        """The run of a trial."""
        texts = {field: _to_text(value) for field, value in trial.params.items()}
        overrides = self.overrides | texts
        config = load_config(self.spec, overrides)
        name = f"trial={trial.number:04d}"
        return Run(name, Variant(name, overrides, config), config.seed, overrides, config)

    def is_hopeless(self, run: Run) -> bool:
        """Whether the pruner gives a run up, after the evaluations there are so far."""
        trial = self._trials.get(run.name)
        if trial is None or not self.is_pruning or run.name in self._pruned:
            return run.name in self._pruned
        rows = read_rows(self.workdir / run.name / VALIDATION)
        for number, row in list(enumerate(rows, start=1))[self._reported.get(run.name, 0) :]:
            self._reported[run.name] = number
            if row.get(self.metric) is not None:
                trial.report(row[self.metric], number)
                if number < num_evaluations(run) and trial.should_prune():
                    self._pruned.add(run.name)
        return run.name in self._pruned

    def end(self, run: Run, state: State) -> None:
        """Tell the study how a run ended; one that was stopped goes on the next time."""
        from optuna.trial import TrialState

        trial = self._trials.get(run.name)
        score = state.scores.get(self.metric)
        if trial is None:
            return
        if state.status == "finished" and score is not None:
            self.study.tell(trial.number, score, skip_if_finished=True)
        elif state.status in ("failed", "finished"):
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        elif run.name in self._pruned:
            self.study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)

    def runs(self) -> Iterator[Run]:
        """Runs, as long as there are some to begin."""
        while (run := self.begin()) is not None:
            yield run


def open_search(spec: str, overrides: Mapping[str, str], workdir: Path, *, num_trials: int, is_pruning: bool) -> Search:
    """Open the study of a workdir, or begin it. Raises ValueError for a config without `search(space)`, for a field
    that can't have a value of its range, and where another space was searched in this folder.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ValueError('--search=optuna needs pip install "instseg_jax[search]"') from error
    if num_trials < 1:
        raise ValueError(f"--trials is {num_trials}, it must be at least 1")
    define: Callable[[Space], None] | None = load_function(spec, "search")
    if define is None:
        raise ValueError(f"there is nothing to search: {spec} defines no search(space)")
    space = Space()
    define(space)
    if not space.distributions:
        raise ValueError(f"search(space) of {spec} names no field")
    base = load_config(spec, dict(overrides))
    _check_ends(spec, dict(overrides), space)
    optuna.logging.set_verbosity(logging.WARNING)
    workdir.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(workdir / JOURNAL))
    storage = optuna.storages.JournalStorage(backend)
    with alone(workdir / PROPOSING):
        study = optuna.create_study(
            storage=storage,
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.HyperbandPruner() if is_pruning else optuna.pruners.NopPruner(),
        )
        for trial in study.get_trials(deepcopy=False):
            if any(space.distributions.get(field) != known for field, known in trial.distributions.items()):
                raise ValueError(f"{workdir} holds a search of another space; name another --workdir")
    return Search(
        spec, dict(overrides), workdir, space, study, base.eval.best_metric, num_trials, is_pruning, base.seed
    )


def num_evaluations(run: Run) -> int:
    """How often a whole run is evaluated."""
    return max(1, round(run.config.train.epochs / run.config.eval.every_epochs))


def _to_text(value: Any) -> str:
    """A value as the command line has it."""
    return value if isinstance(value, str) else repr(value)


def _check_ends(spec: str, overrides: dict[str, str], space: Space) -> None:
    """Raise ValueError where a field can't have the first or last value of its range."""
    for field, distribution in space.distributions.items():
        ends = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
        for value in ends:
            try:
                kept = get_field(load_config(spec, overrides | {field: _to_text(value)}), field)
            except (ValueError, AttributeError, KeyError) as error:
                raise ValueError(f"search(space) of {spec}: {error}") from error
            if kept != value:
                raise ValueError(
                    f"search(space) of {spec}: config.{field} can't be {quote(value)}, it becomes {quote(kept)}"
                )
