"""The folder in which XLA keeps what it compiled, so that a second run, prediction or server starts at once.

One for all workdirs of a user, since most of them run the same programs. JAX finds a program by its text, its options
and the version of XLA; the folder's name adds what a program on a CPU also depends on: the processor and how many
cores the process may use. A program is machine code that is run: whoever can write in the folder can run code here.
"""

import contextlib
import hashlib
import os
import platform
import time
import warnings
from pathlib import Path

import jax

from instseg_jax.files import cache_folder

SWITCH = "INSTSEG_COMPILED"
MAX_BYTES = 4 << 30  # of all that is kept; a training in one size keeps 20 MB
_LEAST_SECONDS = 1.0  # what compiles quicker isn't kept
_CHECKED = "checked"


def keep_compiled_programs() -> None:
    """Have XLA keep in the user's cache what it compiles, and take from there what it has compiled before.

    INSTSEG_COMPILED names another folder, empty switches it off. A folder that the process gave to JAX itself
    (JAX_COMPILATION_CACHE_DIR) stays. Warns when the folder can't be written, and goes on without.
    """
    chosen = os.environ.get(SWITCH)
    if chosen == "" or (chosen is None and jax.config.values["jax_compilation_cache_dir"]):
        return
    try:
        folder = Path(chosen).absolute() if chosen else cache_folder() / "compiled" / _describe_processor()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _drop_damaged(folder)
        if not chosen:
            _drop_oldest(folder.parent, MAX_BYTES)
    except (OSError, RuntimeError) as error:  # the latter without a home
        warnings.warn(f"compiled programs can't be kept ({error}); {SWITCH}=FOLDER names a place", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def _describe_processor() -> str:
    """A short name for this kind of processor with as many cores as this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    # The first processor's: the others repeat it.
    described = [
        next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Features")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = "\n".join([platform.machine(), *(described if any(described) else lines), str(cores)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _drop_damaged(folder: Path) -> None:
    """Remove what a killed process left half written since the last look: JAX would warn of it and never replace it."""
    stamp = folder / _CHECKED
    last = stamp.stat().st_mtime if stamp.exists() else 0.0
    begun = time.time()
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process cleans up too
            if path.stat().st_mtime >= last and not _is_whole(path.read_bytes()):
                path.unlink()
    stamp.touch()
    os.utime(stamp, (begun, begun))


def _is_whole(data: bytes) -> bool:
    """Whether the compressed program is complete, as JAX compresses it: zlib, or Zstandard where that is installed."""
    from jax._src.compilation_cache import decompress_executable  # it has no public name

    try:
        decompress_executable(data)
    except Exception:
        return False
    return True


def _drop_oldest(folder: Path, limit: int) -> None:
    """Remove programs that nobody has read for longest until the rest has at most `limit` bytes."""
    kept = []
    for path in folder.glob("*/*-cache"):
        with contextlib.suppress(FileNotFoundError):
            kept.append((path.stat(), path))
    kept.sort(key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime))
    total = sum(stat.st_size for stat, _ in kept)
    for stat, path in kept:
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= stat.st_size
