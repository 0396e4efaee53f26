"""Where numbers, pictures and files of a run can go: TensorBoard, Trackio, Weights & Biases, MLflow.

All work without a network and without an account. Where they write to and whether they go online is said by their own
variables (TRACKIO_DIR, TRACKIO_SPACE_ID, WANDB_MODE, MLFLOW_TRACKING_URI and so on).
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from instseg_jax.messages import quote

PROJECT = "instseg_jax"
MODULES = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Where numbers, pictures and files go: four functions, each of which may raise without ending a run."""

    log: Callable[[int, dict[str, float]], None]  # step, numbers by name
    picture: Callable[[int, str, np.ndarray], None]  # step, name, RGB [h, w, 3] uint8
    artefact: Callable[[pathlib.Path], object]  # a file of the run
    close: Callable[[], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is none of MODULES, or whose library is not installed."""
    for name in names:
        if name not in MODULES:
            raise ValueError(f"log.trackers has {quote(name)}, it must be of {', '.join(MODULES)}")
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ValueError(f'log.trackers={name} needs {MODULES[name]}: pip install "instseg_jax[{name}]"')


def make_trackers(
    names: Sequence[str], workdir: pathlib.Path, settings: Mapping[str, Any]
) -> dict[str, Callable[[str], tuple[Tracker, str]]]:
    """For each name a function that opens its tracker: the name of its run, "" for a new one -> tracker, that name.

    `settings` is the config, dotted fields and plain values.
    """
    openers = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow}
    return {name: functools.partial(openers[name], workdir.resolve(), dict(settings)) for name in names}


def open_own(name: str, tracker: Tracker, run: str) -> tuple[Tracker, str]:
    """What `make_trackers` gives, of a tracker that is there already."""
    return tracker, name


def _tensorboard(workdir: pathlib.Path, settings: dict, run: str) -> tuple[Tracker, str]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(workdir / "tensorboard"))

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def artefact(path: pathlib.Path) -> None:
        if path.suffix == ".json":
            writer.add_text(path.name, f"```\n{path.read_text(encoding='utf-8')}\n```")

    def picture(step: int, name: str, image: np.ndarray) -> None:
        writer.add_image(name, image, step, dataformats="HWC")

    return Tracker(log, picture, artefact, writer.close), "tensorboard"


def _trackio(workdir: pathlib.Path, settings: dict, run: str) -> tuple[Tracker, str]:
    import trackio

    name = run or _new_name(workdir)
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    opened = trackio.init(project, name=name, resume="allow", config=settings, embed=False)
    return Tracker(
        lambda step, numbers: opened.log(numbers, step=step),
        lambda step, name, image: opened.log({name: trackio.Image(image)}, step=step),
        lambda path: opened.log_artifact(path, name=f"{name}-{path.name}", type="run"),
        opened.finish,
    ), name


def _wandb(workdir: pathlib.Path, settings: dict, run: str) -> tuple[Tracker, str]:
    import wandb

    id_ = run or secrets.token_hex(4)
    options: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", PROJECT),
        "name": workdir.name,
        "id": id_,
        "resume": "allow",
        "mode": os.environ.get("WANDB_MODE", "offline"),
        "dir": workdir,
        "config": settings,
        "settings": wandb.Settings(console="off", silent=True),
    }
    opened = wandb.init(**options)
    return Tracker(
        lambda step, numbers: opened.log(numbers, step=step),
        lambda step, name, image: opened.log({name: wandb.Image(image)}, step=step),
        lambda path: opened.save(str(path), base_path=str(workdir), policy="now"),
        opened.finish,
    ), id_


def _mlflow(workdir: pathlib.Path, settings: dict, run: str) -> tuple[Tracker, str]:
    # A server that does not answer is given up after seconds, not after minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    given = os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(given or f"sqlite:///{workdir / 'mlflow.db'}")
    if not run:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = client.get_experiment_by_name(experiment)
        folder = None if given else (workdir / "mlruns").as_uri()
        experiment_id = known.experiment_id if known else client.create_experiment(experiment, folder)
        run = client.create_run(experiment_id, run_name=workdir.name).info.run_id
        params = [Param(_plain(name), str(value)[:500]) for name, value in settings.items()]
        for first in range(0, len(params), 100):
            client.log_batch(run, params=params[first : first + 100])
    else:
        client.update_run(run, status="RUNNING")

    def log(step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(_plain(name), value, now, step) for name, value in numbers.items()]
        for first in range(0, len(metrics), 1000):
            client.log_batch(run, metrics=metrics[first : first + 1000])

    def picture(step: int, name: str, image: np.ndarray) -> None:
        client.log_image(run, image, key=_plain(name), step=step, synchronous=True)

    return Tracker(
        log, picture, lambda path: client.log_artifact(run, str(path)), lambda: client.set_terminated(run)
    ), run


def _new_name(workdir: pathlib.Path) -> str:
    return f"{workdir.name}-{secrets.token_hex(4)}"


def _plain(name: str) -> str:
    """The name with what MLflow takes: letters, digits and a few signs."""
    return re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", name)
