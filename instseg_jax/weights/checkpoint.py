"""Save and restore checkpoints (Orbax; no other file imports it).

A run leaves two kinds in its WORKDIR:

    checkpoints/STEP/   the whole training state, the last few steps, for resuming
    best_model/         the variables for inference alone, small

Both carry a JSON `metadata` (config, class names, category ids, versions, scores, loader position, ...), so that a
checkpoint says itself what it is. A save becomes visible by one rename: whatever kills the process, the last complete
checkpoint and the best model stay readable. Every array and the JSON beside them carry a digest that reading checks: a
flipped bit is an error, never other numbers. Official files are read and written in `paddle` and `state_dicts`.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from instseg_jax.files import check_seal, digest, read_json, seal, sync, sync_tree, write_json
from instseg_jax.messages import shorten
from instseg_jax.packing import cut
from instseg_jax.weights.names import unflatten_tree

CHECKPOINTS = "checkpoints"
BEST_MODEL = "best_model"
THRESHOLDS = "thresholds.json"  # beside the arrays of the checkpoint that they were found for

_DAMAGED = "damaged"  # where checkpoints go that can't be read
_REMOVED = ".removed"  # steps on their way out: a rename is whole, a removal may be cut off and leave half a step
_STATE, _VARIABLES, _METADATA = "state", "variables", "metadata"
_BRANCHES, _AVERAGE = ("params", "batch_stats"), "average"  # of a state; the average of both, joined to vectors
_LEAVES = (
    "leaves"  # {name: [type, shape, digest]} of the arrays; Orbax takes seconds to tell for a whole training state
)
_VERSIONED = ("instseg_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class _OrbaxErrorsOnly(logging.Filter):
    """Drop what Orbax says at every save through absl's logger, which others use as well."""

    def filter(self, record: logging.LogRecord) -> bool:
        # absl names its own file as the caller, so the caller is looked up: the first outside the logging modules.
        frame = sys._getframe(1)
        while frame.f_back and Path(frame.f_code.co_filename).parent.name == "logging":
            frame = frame.f_back
        return record.levelno >= logging.ERROR or "orbax" not in frame.f_code.co_filename


logging.getLogger("absl").addFilter(_OrbaxErrorsOnly())


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a checkpoint depends on."""
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = importlib_metadata.version(name)
        except importlib_metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


# --- training state -------------------------------------------------------------------------------


def make_manager(directory: str | os.PathLike[str], *, max_to_keep: int) -> ocp.CheckpointManager:
    """Return the manager of a checkpoints folder, which is created.

    Leftovers of a killed save are removed by a thread beside what follows, before the next save at the latest.
    Use it in a `with` block, or close it: a save that is still being written when Python ends is lost. With several
    processes every one of them makes, saves and restores. Raises OSError when the folder can't be made.
    """
    directory = Path(directory).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"can't create the checkpoints folder {directory} ({error.strerror})") from error
    _empty_removed(directory)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep, cleanup_tmp_directories=True, todelete_subdir=_REMOVED
    )
    return ocp.CheckpointManager(directory, options=options, item_names=(_STATE, _LEAVES, _METADATA))


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, metadata: Mapping[str, Any], *, wait: bool = False
) -> None:
    """Save a training state (any pytree of arrays) with its metadata as checkpoint `step`.

    Returns when the state has been copied; writing goes on beside the next steps unless `wait`. An error of the
    writing appears at the next save, or in `manager.wait_until_finished()`. Raises ValueError for metadata that JSON
    can't hold, and for a step that is already there.
    """
    _check_json(metadata)
    if step in manager.all_steps():
        raise ValueError(f"step {step} is already saved in {manager.directory}")
    content = ocp.args.Composite(
        **{
            _STATE: ocp.args.PyTreeSave(state),
            _LEAVES: ocp.args.JsonSave(seal(_describe(state, with_digests=True))),
            _METADATA: ocp.args.JsonSave(seal(metadata)),
        }
    )
    manager.wait_until_finished()  # it may be moving a step to where the next line empties
    _sync_steps(Path(manager.directory))
    _empty_removed(Path(manager.directory))
    manager.save(step, args=content, force=True)
    if wait:
        manager.wait_until_finished()
        _sync_steps(Path(manager.directory))
        _empty_removed(Path(manager.directory))


def restore_newest(manager: ocp.CheckpointManager, abstract_state: Any) -> tuple[Any, dict[str, Any], list[str]]:
    """Return (state, metadata, damaged) of the newest checkpoint that is whole; see `restore`.

    Checkpoints that are damaged are set aside, into `damaged/` beside the others; `damaged` says of each what is wrong.

    Raises FileNotFoundError without any checkpoint, ValueError when none is whole or they are of another model.
    """
    damaged: list[str] = []
    while steps := sorted(manager.all_steps()):
        try:
            return *restore(manager, abstract_state, steps[-1]), damaged
        except DamagedError as error:
            damaged.append(str(error))
            _set_aside(Path(manager.directory), steps[-1])
            manager.reload()
    if not damaged:
        raise FileNotFoundError(f"no checkpoint in {manager.directory}")
    raise ValueError(
        f"none of the checkpoints in {manager.directory} is whole; they lie in its folder {_DAMAGED} now, and the same "
        f"command begins anew. The newest: {damaged[0]}"
    )


def _set_aside(directory: Path, step: int) -> None:
    """Move a damaged checkpoint out of the way of those that are whole, once, by the first process."""
    if jax.process_index() == 0:
        target = directory / _DAMAGED / f"{step}"
        target.parent.mkdir(exist_ok=True)
        _remove(target)
        (directory / str(step)).rename(target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"damaged_{step}")


def _sync_steps(directory: Path) -> None:
    """Have the newest finished step written to the disk, so that it outlasts a power cut."""
    steps = _step_folders(directory)
    if steps and jax.process_index() == 0:
        sync_tree(steps[max(steps)])
        sync(directory)


def restore(manager: ocp.CheckpointManager, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Return (state, metadata) of checkpoint `step`, by default the last complete one.

    `abstract_state` gives structure, shapes, types and shardings: jax.ShapeDtypeStruct (without a sharding: the first
    device) or arrays. Leaves that are numpy arrays there come back as numpy arrays, all others as jax arrays.

    Raises FileNotFoundError when there is no such checkpoint, ValueError that names the leaves that differ, and
    DamagedError when it can't be read or holds other numbers than were written.
    """
    steps = sorted(manager.all_steps())
    step = step if step is not None else (steps[-1] if steps else None)
    if step not in steps:
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise FileNotFoundError(f"{wanted} in {manager.directory} (steps there: {steps or 'none'})")
    folder = Path(manager.directory) / str(step)
    with _naming(folder):
        leaves = _read_leaves(folder)
    _check_leaves(folder, leaves, abstract_state)
    content = ocp.args.Composite(
        **{
            _STATE: ocp.args.PyTreeRestore(
                item=abstract_state, restore_args=jax.tree.map(_restore_arguments, abstract_state)
            ),
            _METADATA: ocp.args.JsonRestore(),
        }
    )
    with _naming(folder):
        restored = manager.restore(step, args=content)
        _check_digests(leaves, restored[_STATE])
        return restored[_STATE], check_seal(restored[_METADATA], "its metadata", is_sealed=_have_digests(leaves))


class DamagedError(ValueError):
    """A checkpoint can't be read, or holds something else than was written."""


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong with reading a checkpoint into one sentence that names it."""
    try:
        yield
    except Exception as error:  # TensorStore and Orbax raise what they like, over many lines
        reason = shorten((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise DamagedError(f"checkpoint {folder} is damaged ({reason})") from error


def _empty_removed(directory: Path) -> None:
    if jax.process_index() == 0:
        shutil.rmtree(directory / _REMOVED, ignore_errors=True)


def _restore_arguments(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, np.ndarray | np.generic):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _check_leaves(folder: Path, leaves: Mapping[str, list], abstract_state: Any) -> None:
    """Raise ValueError unless the saved leaves are those of `abstract_state`, in names, shapes and types."""
    saved, wanted = {name: leaf[:2] for name, leaf in leaves.items()}, _describe(abstract_state)
    differing = [name for name in saved | wanted if saved.get(name) != wanted.get(name)]
    if differing:
        shown = [
            f"{shorten(n)} (saved {_shown(saved.get(n))}, expected {_shown(wanted.get(n))})" for n in differing[:5]
        ]
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"checkpoint {folder} does not fit this model and optimizer: {', '.join(shown)}{more}")


def _check_digests(leaves: Mapping[str, list], tree: Any) -> None:
    """Raise ValueError that names the first array of `tree` which is not what was written."""
    arrays = _named(tree)
    known = {name: leaf[2] for name, leaf in leaves.items() if name in arrays and len(leaf) > 2}  # older ones have none
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # zlib lets go of Python's lock
        for (name, wanted), found in zip(known.items(), pool.map(_digest, map(arrays.get, known)), strict=True):
            if found != wanted:
                raise ValueError(f"the array {name} holds other numbers than were written")


def _read_leaves(folder: Path) -> dict[str, list]:
    leaves = _read_json(folder / _LEAVES)
    return check_seal(leaves, "the list of its arrays", is_sealed=_have_digests(leaves))


def _have_digests(leaves: Mapping[str, Any]) -> bool:
    """Whether arrays were saved with digests, and so with seals on what lies beside them."""
    return any(isinstance(leaf, list) and len(leaf) > 2 for leaf in leaves.values())


def _digest(array: Any) -> str:
    return digest(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _named(tree: Any) -> dict[str, Any]:
    """Return {"params/neck/...": array} of a tree."""
    return {"/".join(map(_key_name, keys)): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(tree: Any, *, with_digests: bool = False) -> dict[str, list]:
    """Return {"params/neck/...": [type, shape]} of a tree of arrays, and the digest of each."""
    arrays = _named(tree)
    described = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in arrays.items()}
    if with_digests:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for leaf, found in zip(described.values(), pool.map(_digest, arrays.values()), strict=True):
                leaf.append(found)
    return described


def _key_name(key: Any) -> str:
    return str(next(getattr(key, kind) for kind in ("key", "name", "idx") if hasattr(key, kind)))


def _shown(leaf: list | None) -> str:
    return f"{leaf[0]}{leaf[1]}" if leaf else "nothing"


# --- variables for inference ----------------------------------------------------------------------


def save_inference_checkpoint(
    path: str | os.PathLike[str], variables: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Save {"params": ..., "batch_stats": ...} with its metadata to the folder `path`, replacing what is there.

    The old folder is set aside under another name until the new one is in place, and whichever is complete is what
    `load_inference_checkpoint` reads, so a kill at any moment loses neither. With several processes all may call
    this; the first one writes. Raises ValueError for metadata that JSON can't hold.
    """
    _check_json(metadata)
    if jax.process_index() != 0:
        return
    path = Path(path).absolute()
    incoming, previous = _standins(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # an earlier replacement was cut off between its two renames: finish it first
        for complete in filter(_is_inference_checkpoint, (incoming, previous)):
            complete.rename(path)
            break
    for leftover in path.parent.glob(f"{incoming.name}*"):
        _remove(leftover)
    arrays = jax.tree.map(np.asarray, {name: variables[name] for name in ("params", "batch_stats")})
    with _checkpointer(ocp.PyTreeCheckpointHandler) as checkpointer:
        checkpointer.save(incoming / _VARIABLES, args=ocp.args.PyTreeSave(arrays))
    with _checkpointer(ocp.JsonCheckpointHandler) as checkpointer:
        checkpointer.save(incoming / _LEAVES, args=ocp.args.JsonSave(seal(_describe(arrays, with_digests=True))))
        checkpointer.save(incoming / _METADATA, args=ocp.args.JsonSave(seal(metadata)))
    sync_tree(incoming)
    _remove(previous)
    if path.exists():
        path.rename(previous)
    incoming.rename(path)
    sync(path.parent)
    _remove(previous)


def load_inference_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ({"params": ..., "batch_stats": ...} in numpy, metadata) of a checkpoint, for inference.

    `path` is a WORKDIR (its best model, else its last checkpoint), a best_model folder, a checkpoints folder or one
    checkpoint in it. A training state gives its averaged (EMA) variables where it has them.

    Raises FileNotFoundError when there is no checkpoint at `path`, ValueError when one can't be read.
    """
    folder = _find_checkpoint(Path(path))
    try:
        leaves = _read_leaves(folder)
        metadata = check_seal(_read_json(folder / _METADATA), "its metadata", is_sealed=_have_digests(leaves))
        item = _VARIABLES if _is_inference_checkpoint(folder) else _STATE
        is_averaged = f"{_AVERAGE}/params" in leaves
        # Until the averages were joined, they were trees of their own.
        old = tuple(f"ema_{name}" for name in _BRANCHES)
        trees = old if any(name.startswith(f"{old[0]}/") for name in leaves) else _BRANCHES
        arrays = _read_arrays(folder / item, leaves, (_AVERAGE,) if is_averaged else trees)
        if not any(name.startswith("params/") for name in leaves):
            raise ValueError("it holds no params")
        _check_digests(leaves, arrays)
        if is_averaged:
            arrays = {name: cut(arrays[_AVERAGE][name], _abstract(leaves, (name,))[name]) for name in _BRANCHES}
        else:
            arrays = {name: arrays[tree] for name, tree in zip(_BRANCHES, trees, strict=True)}
        return arrays, metadata
    except Exception as error:  # TensorStore and Orbax raise what they like, over many lines
        reason = shorten((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise DamagedError(f"checkpoint {folder} can't be read ({reason})") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of the checkpoint that `load_inference_checkpoint` would read, without its arrays."""
    folder = _find_checkpoint(Path(path))
    with _naming(folder):
        return check_seal(_read_json(folder / _METADATA), "its metadata")


def save_thresholds(path: str | os.PathLike[str], thresholds: Mapping[str, Any]) -> Path:
    """Store score thresholds in the checkpoint that `load_inference_checkpoint` would read; return their file.

    `thresholds` is {"overall": score, "classes": {class name: score}}. They go when the checkpoint is replaced,
    as other weights want others. Raises FileNotFoundError without a checkpoint, ValueError for scores beyond 0..1.
    """
    scores = [thresholds["overall"], *thresholds["classes"].values()]
    if not all(isinstance(score, int | float) and 0 <= score <= 1 for score in scores):
        raise ValueError(f"score thresholds must be between 0 and 1, got {dict(thresholds)}")
    return write_json(_find_checkpoint(Path(path)) / THRESHOLDS, seal(thresholds), indent=2, durable=True)


def read_thresholds(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the score thresholds that are stored in a checkpoint, None when there are none."""
    file = _find_checkpoint(Path(path)) / THRESHOLDS
    return check_seal(read_json(file), file) if file.is_file() else None


def read_checkpoints(directory: str | os.PathLike[str]) -> dict[int, dict[str, Any]]:
    """Return {step: metadata} of the checkpoints in a checkpoints folder that can be read, by rising step."""
    found = {}
    for step, folder in _step_folders(Path(directory)).items():
        with contextlib.suppress(DamagedError), _naming(folder):
            found[step] = check_seal(_read_json(folder / _METADATA), "its metadata")
    return found


def checkpoint_folder(path: str | os.PathLike[str]) -> tuple[Path, bool]:
    """The folder of the checkpoint at `path`, and whether what is added to it goes when the checkpoint is replaced.

    Of a file: the file itself and False.
    """
    path = Path(path).absolute()
    if path.is_file():
        return path, False
    folder = _find_checkpoint(path)
    return folder, _is_inference_checkpoint(folder)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Say whether `load_inference_checkpoint` would find a checkpoint at `path`."""
    try:
        return bool(_find_checkpoint(Path(path)))
    except FileNotFoundError:
        return False


def _find_checkpoint(path: Path) -> Path:
    path = path.absolute()
    best = path / BEST_MODEL
    for folder in (path, *_standins(path), best, *_standins(best)):
        if _is_inference_checkpoint(folder):
            return folder
    if (path / _STATE).is_dir():
        return path
    for folder in (path / CHECKPOINTS, path):
        if steps := _step_folders(folder):
            return steps[max(steps)]
    raise FileNotFoundError(
        f"no checkpoint at {path}: it is neither a run's folder (with {BEST_MODEL} or {CHECKPOINTS}) nor a checkpoint"
    )


def _standins(path: Path) -> tuple[Path, Path]:
    """Return where a replacement of `path` waits and where the replaced one is set aside, the newer first."""
    return path.with_name(f"{path.name}.incoming"), path.with_name(f"{path.name}.previous")


def _is_inference_checkpoint(path: Path) -> bool:
    return (path / _VARIABLES).is_dir() and (path / _METADATA).is_dir()


def _step_folders(directory: Path) -> dict[int, Path]:
    """Return the folders of complete steps: Orbax gives them their bare number last."""
    found = directory.iterdir() if directory.is_dir() else ()
    steps = {int(folder.name): folder for folder in found if folder.name.isdecimal() and (folder / _STATE).is_dir()}
    return dict(sorted(steps.items()))


def _read_arrays(path: Path, leaves: Mapping[str, list], branches: Collection[str]) -> dict[str, Any]:
    """Return the branches of the tree at `path` in numpy, bit for bit."""
    abstract = _abstract(leaves, branches)
    arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), abstract)
    content = ocp.args.PyTreeRestore(item=abstract, restore_args=arguments, partial_restore=True)
    with _checkpointer(ocp.PyTreeCheckpointHandler) as checkpointer:
        arrays = checkpointer.restore(path, args=content) if abstract else {}
    return {branch: arrays.get(branch, {}) for branch in branches}


def _abstract(leaves: Mapping[str, list], branches: Collection[str]) -> dict[str, Any]:
    """Return the shapes and types of some branches of a saved tree."""
    wanted = {name: leaf for name, leaf in leaves.items() if name.split("/")[0] in branches}
    return unflatten_tree({n: jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for n, (kind, shape, *_) in wanted.items()})


def _read_json(path: Path) -> dict[str, Any]:
    with _checkpointer(ocp.JsonCheckpointHandler) as checkpointer:
        return checkpointer.restore(path)


def _checkpointer(handler: type) -> ocp.Checkpointer:
    """Return a checkpointer of this process alone, which waits for no other."""
    alone = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=alone, active_processes={alone}, barrier_sync_key_prefix=f"process{alone}"
    )
    return ocp.Checkpointer(handler(multiprocessing_options=options), multiprocessing_options=options)


def _check_json(metadata: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint metadata must be plain JSON values ({error})") from error


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
