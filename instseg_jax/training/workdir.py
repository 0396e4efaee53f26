"""The folder of a run: whose it is, whether it can be written to, and what is written there at the end."""

import errno
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from instseg_jax.commands import changed
from instseg_jax.files import write_json, write_text
from instseg_jax.weights import checkpoint

CONFIG, LOG, METRICS, VALIDATION, RESULT = (
    *("config.json", "train.log", "metrics.jsonl"),
    *("validation.jsonl", "train_result.json"),
)
OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT)
# A run may be continued with other values of these: none of them changes what is computed.
FREE_TO_CHANGE = (
    *("device", "data.num_workers", "data.prefetch", "data.use_processes", "checkpoint", "log", "eval.batch_size"),
    *("eval.engine", "eval.boundary", "eval.gallery_size", "eval.tta_scales"),
)
# And a run may go on with other values of these, which say how long it trains and when it is scored.
FREE_TO_GO_ON = ("train.epochs", "train.early_stopping", "train.max_skipped_steps", "eval.every_epochs")
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
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise type(error)(f"can't write to the folder {workdir} ({error.strerror})") from error
    if (workdir / CONFIG).exists() and (steps := saved_steps(workdir)):
        check_can_go_on(workdir, config)
        saved = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
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
        write_json(workdir / CONFIG, json.loads(config.to_json_best_effort()), indent=2)
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
    saved = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
    mine = json.loads(config.to_json_best_effort())
    if mine["data"]["channel_ranges"] is None:  # not looked for yet
        saved["data"]["channel_ranges"] = None
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
            found[name] = f"{name} was {old!r}, is {new!r}"
    return found


def read_rows(path: pathlib.Path) -> list[dict]:
    """Rows of a file of JSON lines; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip().endswith("}")]


def keep_rows(path: pathlib.Path, is_kept: Callable[[dict], bool]) -> None:
    """Rewrite a file of JSON lines with some of its rows."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if is_kept(row)))


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
