"""Which devices a text names, and the processes of several hosts. How batches lie on them: `sharding.py`."""

import os
import re
from pathlib import Path

import jax

COMPILED_SWITCH = "INSTSEG_COMPILED"


def select_devices(device: str) -> list[jax.Device]:
    """The devices that a text names: auto (all of the default backend), cpu, gpu, gpu:0,1, tpu.

    Raises: ValueError that lists what there is when the text is of another form or names an absent device.
    """
    match = re.fullmatch(r"(auto|cpu|gpu|tpu)(?::(\d+(?:,\d+)*))?", device)
    present = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
    if not match:
        raise ValueError(f"device is {device!r}; allowed are auto, cpu, gpu, tpu, gpu:0,1; present are {present}")
    platform, indices = match.groups()
    try:
        devices = jax.devices() if platform == "auto" else jax.devices(platform)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, but there is no {platform} here; present are {present}") from error
    if indices is None:
        return list(devices)
    wanted = [int(index) for index in indices.split(",")]
    by_id = {d.id: d for d in devices}
    absent = [index for index in wanted if index not in by_id]
    if absent or len(set(wanted)) != len(wanted):
        names = ", ".join(f"{platform}:{index}" for index in by_id)
        raise ValueError(f"device is {device!r}; each index once, out of {names}")
    return [by_id[index] for index in wanted]


def join_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Make this process one of several that work as one; call it before anything else asks for a device.

    Give all three on hosts that know nothing of each other, none of them under SLURM, Open MPI, Kubernetes or on
    Cloud TPUs, where JAX finds them out.

    Raises: ValueError when only some are given, or the processes can't be found or reached.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{' and '.join(missing)} must be given too: all three, or --distributed alone")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id is {process_id}; it must be between 0 and {num_processes - 1}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the other processes were not found ({' '.join(str(error).split())})") from error


def keep_compiled_programs(folder: str | os.PathLike[str]) -> None:
    """Have XLA keep in `folder` what it compiles, so that a resumed run or a second prediction starts at once.

    INSTSEG_COMPILED names another folder, to share between workdirs; empty switches it off.
    """
    chosen = os.environ.get(COMPILED_SWITCH, os.fspath(folder))
    if chosen:
        jax.config.update("jax_compilation_cache_dir", str(Path(chosen).resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)
