"""A training loop around a step that takes no time."""

import collections
import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from instseg_jax.config import load_config
from instseg_jax.devices import make_mesh
from instseg_jax.training import loop, metrics, setup
from instseg_jax.training.state import TrainState

METRICS = dict.fromkeys(("segm/AP", "segm/AP50", "bbox/AP", "bbox/AP50", "AP", "AP50"), 0.25)


@dataclasses.dataclass(frozen=True)
class FakeBatch:
    images: np.ndarray
    image_index: np.ndarray


jax.tree_util.register_dataclass(FakeBatch, ["images", "image_index"], [])


class Trial:
    """A run of two steps an epoch whose step counts, and whose evaluation does what it is told."""

    def __init__(self, workdir, monkeypatch, sizes=(64,), **fields):
        self.workdir, self.sizes = workdir, sizes
        self.config = load_config("quickstart", {"train.epochs": 3, "eval.every_epochs": 1, **fields})
        self.steps, self.scored = [], []
        self.draw = None
        self.on_step = self.on_score = lambda number: None
        monkeypatch.setattr(loop, "set_up", self.set_up)
        monkeypatch.setattr(loop, "draw_training", lambda workdir: None)

    def set_up(self, config, workdir, own):
        workdir.mkdir(exist_ok=True)
        dataset = SimpleNamespace(categories=("building",), category_ids=(1,))

        def batches(start_step=0):
            for step in itertools.count(start_step):
                side = self.sizes[step % len(self.sizes)]
                yield FakeBatch(np.zeros((4, side, side, 3), np.float32), np.arange(4))

        train_loader = SimpleNamespace(dataset=dataset, num_batches=2, counters=collections.Counter(), batches=batches)
        run = setup.Training(
            config, workdir, make_mesh(jax.devices()[:1]), None, train_loader, self.score, 2 * config.train.epochs,
            metrics.open_log(workdir / "train.log"), {}, self.draw,
        )  # fmt: skip
        zeros = {"a": jnp.zeros(2)}
        average = {"params": jnp.zeros(2), "batch_stats": jnp.zeros(2)}
        state = TrainState(jnp.int32(0), jnp.int32(0), zeros, zeros, average, ())
        return run, state, self.step

    def step(self, state, parts):
        self.steps.append(int(state.step))
        self.on_step(int(state.step))
        return dataclasses.replace(state, step=state.step + 1), {"loss": jnp.float32(1), "skipped": False}

    def score(self, variables):
        number = len(self.steps)
        self.on_score(number)
        self.scored.append(number)
        return METRICS, []

    def train(self, **own):
        return loop.train(self.config, self.workdir, setup.Own(**own))

    @property
    def saved(self):
        return sorted(int(path.name) for path in (self.workdir / "checkpoints").iterdir() if path.name.isdigit())
