"""The folder of a run: whose it is, whether it can be written to, and what is written there at the end."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from instseg_jax.commands import changed
from instseg_jax.data import coco
from instseg_jax.data.source import FILLED_IN
from instseg_jax.files import digest, digest_file, make_folder, read_json, write_bytes, write_json
from instseg_jax.messages import first_few, quote, shorten
from instseg_jax.weights import checkpoint

CONFIG, LOG, METRICS, VALIDATION, RESULT = (
    *("config.json", "train.log", "metrics.jsonl"),
    *("validation.jsonl", "train_result.json"),
)
LOCK = ".lock"  # held while a training runs
OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT)
# A run may be continued with other values of these: none of them changes what is computed.
FREE_TO_CHANGE = (
    *("device", "data.num_workers", "data.prefetch", "data.use_processes", "checkpoint", "log", "eval.batch_size"),
    "data.allow_outside",
    *("eval.engine", "eval.boundary", "eval.gallery_size", "eval.tta_scales"),
)
# And a run may go on with other values of these, which say how long it trains and when it is scored.
FREE_TO_GO_ON = (
    "data.allow_change",
    "train.epochs",
    "train.early_stopping",
    "train.max_skipped_steps",
    "eval.every_epochs",
)
# With other values of these the weights have other shapes.
SHAPES = ("model.name", "model.num_decoder_layers", "model.num_prototypes", "data.channels")


def open_workdir(workdir: pathlib.Path, config: ConfigDict, state_bytes: int, total_steps: int) -> int:
    """Create the folder and note the config in it, or make sure that it belongs to the same config.

    `state_bytes` is the size of a checkpoint. With several processes every one calls this; they share the folder.

    Returns: the `train.epochs` that the run had so far.

    Raises: ValueError when the folder holds a run with another config or more than `total_steps` steps, OSError when it
      can't be written to or has no room for the checkpoints.
    """
    epochs_before = config.train.epochs
    make_folder(workdir)
    if (workdir / CONFIG).exists() and (steps := saved_steps(workdir)):
        check_can_go_on(workdir, config)
        saved = read_json(workdir / CONFIG)
        epochs_before = saved["train"]["epochs"]
        if max(steps) > total_steps:
            raise ValueError(
                f"{workdir} has trained {max(steps)} steps, more than the {total_steps} of "
                f"train.epochs={config.train.epochs}; give more, or another --workdir"
            )
    _check_room(workdir, state_bytes, config.checkpoint.keep)
    if jax.process_count() > 1:  # nobody writes before everybody has looked
        multihost_utils.sync_global_devices("open_workdir")
    if jax.process_index() == 0:
        write_json(workdir / CONFIG, json.loads(config.to_json_best_effort()), indent=2, durable=True)
    return epochs_before


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of which a run has checkpoints."""
    folder = workdir / checkpoint.CHECKPOINTS
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit()) if folder.is_dir() else []


def check_can_go_on(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raise ValueError, naming the fields that differ and the way to a new run, where this one can't go on so."""
    differing = _differing(workdir, config, (*FREE_TO_CHANGE, *FREE_TO_GO_ON))
    if not differing:
        return
    options = {"--workdir": str(_free_name(workdir))}
    if not any(name in SHAPES for name in differing):
        options = {"--config.model.weights": str(workdir), **options}
    start = "a new run from its weights" if len(options) > 1 else "a new run"
    raise ValueError(
        f"{workdir} holds a run with another config ({'; '.join(differing.values())}); "
        f"give the same values to resume it, or start {start}: {changed('train', options)}"
    )


def _free_name(workdir: pathlib.Path) -> pathlib.Path:
    names = (workdir.with_name(f"{workdir.name}_{number}") for number in itertools.count(2))
    return next(name for name in names if not name.exists())


def check_same_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raise ValueError, naming the fields that differ, where the folder holds a run with another config."""
    if differing := _differing(workdir, config, FREE_TO_CHANGE):
        raise ValueError(
            f"{workdir} holds a run with another config ({'; '.join(differing.values())}); "
            "give the same values to resume it, or another --workdir"
        )


def _differing(workdir: pathlib.Path, config: ConfigDict, free: Sequence[str]) -> dict[str, str]:
    """What is said of each field that has another value than in the folder's run."""
    saved = read_json(workdir / CONFIG)
    mine = json.loads(config.to_json_best_effort())
    for field in FILLED_IN:
        if mine["data"].get(field) is None:  # not looked for yet
            saved["data"][field] = mine["data"].get(field)
    return _differences(saved, mine, free)


def _check_room(workdir: pathlib.Path, state_bytes: int, keep: int) -> None:
    """Raise OSError unless there is room for the checkpoints to come: one is written before the oldest goes."""
    needed = max(1, keep + 1 - len(saved_steps(workdir))) * state_bytes
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise OSError(
            f"{workdir} has room for {free / 1e6:.0f} MB, the checkpoints to come need {needed / 1e6:.0f} MB "
            f"({state_bytes / 1e6:.0f} MB each); free some, or keep fewer with --config.checkpoint.keep"
        )


def _differences(saved: dict, mine: dict, free: Sequence[str], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key in sorted({*saved, *mine}):
        name = f"{prefix}{key}"
        if name in free:
            continue
        old, new = saved.get(key), mine.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= _differences(old, new, free, f"{name}.")
        elif old != new:
            found[name] = f"{name} was {quote(old)}, is {quote(new)}"
    return found


def read_rows(path: pathlib.Path) -> list[dict]:
    """Rows of a file of JSON lines; lines that are damaged or cut off are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def find_gaps(path: pathlib.Path, every: int) -> list[tuple[int, int]]:
    """Where rows of a file of JSON lines are missing that were `every` steps apart: (last step before, first after)."""
    steps = [row["step"] for row in read_rows(path)]
    return [(a, b) for a, b in itertools.pairwise(steps) if b - a > every]


class BusyError(ValueError):
    """Another process is training in the folder, which stays as it is."""


@contextlib.contextmanager
def lock_workdir(workdir: pathlib.Path) -> Iterator[None]:
    """Keep other trainings out of a folder while inside; of several processes the first one does.

    The system gives the lock back when a process ends, however it ends, so that none is ever left behind.

    Raises: BusyError that names the process which is training there.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    is_new = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise type(error)(f"can't write to the folder {workdir} ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise BusyError(f"{who} is training in {workdir}; wait for it, or name another --workdir") from None
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        except BaseException:
            if is_new and [child.name for child in workdir.iterdir()] == [LOCK]:  # nothing was begun
                (workdir / LOCK).unlink()
                workdir.rmdir()
            raise


def describe_data(datasets: Mapping[str, coco.CocoDataset]) -> dict[str, dict]:
    """What data a run is trained on, in the metadata of its checkpoints: counts, class names, and digests."""
    described = {}
    for split, dataset in datasets.items():
        pictures = [[image.id, image.file_name, image.height, image.width] for image in dataset.images]
        described[split] = {
            "pictures": len(pictures),
            "objects": sum(map(len, dataset.annotations)),
            "classes": list(dataset.categories),
            "picture_list": digest(json.dumps(pictures).encode()),
            "annotations": digest_file(file) if (file := dataset.annotation_file).is_file() else None,
        }
    return described


def check_same_data(saved: Mapping[str, dict] | None, mine: Mapping[str, dict]) -> None:
    """Raise ValueError that says what changed where a run would go on with other data than it began with.

    Runs of before this was noted pass.
    """
    said = []
    for split in sorted({*(saved or mine), *mine}):
        old, new = (saved or mine).get(split), mine.get(split)
        if old is None or new is None:
            said.append(f"there {'was no' if old is None else 'is no'} {split} part")
            continue
        for what in ("pictures", "objects", "classes"):
            if old[what] != new[what]:
                said.append(f"{split}: {what} were {_listed(old[what])}, are {_listed(new[what])}")
        if not said and old["picture_list"] != new["picture_list"]:
            said.append(f"{split}: other pictures, as many as before")
        elif not said and old["annotations"] != new["annotations"]:
            said.append(f"{split}: another annotation file, with as many objects as before")
    if said:
        raise ValueError(
            f"the data are not those that the run began with ({'; '.join(said)}); restore them, start a new run, or go "
            "on all the same with --config.data.allow_change=True"
        )


def _listed(value: Any) -> str:
    return first_few(value) if isinstance(value, list) else shorten(value)


def keep_rows(path: pathlib.Path, is_kept: Callable[[dict], bool]) -> None:
    """Rewrite a file of JSON lines with some of its rows."""
    text = "".join(json.dumps(row) + "\n" for row in read_rows(path) if is_kept(row))
    write_bytes(path, text.encode(), durable=True)


def describe_models(workdir: pathlib.Path, metric: str) -> dict:
    """What train_result.json says of the checkpoints: `last_1` (the newest) and on, and `best`, with their `metric`."""
    saved = checkpoint.read_checkpoints(workdir / checkpoint.CHECKPOINTS)
    scores = {row["step"]: row.get(metric) for row in read_rows(workdir / VALIDATION)}
    models = {
        f"last_{i}": {"step": step, "score": scores.get(step), "path": f"{checkpoint.CHECKPOINTS}/{step}"}
        for i, step in enumerate(sorted(saved, reverse=True), start=1)
    }
    if checkpoint.is_checkpoint(workdir / checkpoint.BEST_MODEL):
        metadata = checkpoint.read_metadata(workdir / checkpoint.BEST_MODEL)
        models["best"] = {"step": metadata["step"], "score": metadata["score"], "path": checkpoint.BEST_MODEL}
    return models


def is_out_of_room(error: BaseException | None) -> bool:
    """Whether a full disk is what `error` comes from; Orbax tells it as text alone."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in OUT_OF_ROOM) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def tell_no_room(workdir: pathlib.Path) -> OSError:
    """What to say of a disk that filled up while training: what is kept, and what to do."""
    saved = checkpoint.read_checkpoints(workdir / checkpoint.CHECKPOINTS)
    kept = f"step {max(saved)} is saved" if saved else "nothing is saved yet"
    return OSError(
        f"the disk of {workdir} has no room left, {kept}; free some and give the same command again, "
        "or keep fewer checkpoints with --config.checkpoint.keep"
    )
