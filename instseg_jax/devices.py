"""Which devices a text names, and the processes of several hosts. How batches lie on them: `sharding.py`."""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from instseg_jax.messages import quote
from instseg_jax.types import DATA_AXIS


def select_devices(device: str) -> list[jax.Device]:
    """The devices that a text names: auto (all of the default backend), cpu, gpu, gpu:0,1, tpu.

    Raises: ValueError that lists what there is when the text is of another form or names an absent device.
    """
    match = re.fullmatch(r"(auto|cpu|gpu|tpu)(?::(\d+(?:,\d+)*))?", device)
    present = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
    if not match:
        raise ValueError(f"device is {quote(device)}; allowed are auto, cpu, gpu, tpu, gpu:0,1; present are {present}")
    platform, indices = match.groups()
    try:
        devices = jax.devices() if platform == "auto" else jax.devices(platform)
    except RuntimeError as error:
        raise ValueError(
            f"device is {quote(device)}, but there is no {platform} here; present are {present}"
        ) from error
    if indices is None:
        return list(devices)
    wanted = [int(index) for index in indices.split(",")]
    by_id = {d.id: d for d in devices}
    absent = [index for index in wanted if index not in by_id]
    if absent or len(set(wanted)) != len(wanted):
        names = ", ".join(f"{platform}:{index}" for index in by_id)
        raise ValueError(f"device is {quote(device)}; each index once, out of {names}")
    return [by_id[index] for index in wanted]


def join_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, timeout: int = 300
) -> None:
    """Make this process one of several that work as one; call it before anything else asks for a device.

    Give all three on hosts that know nothing of each other, none of them under SLURM, Open MPI, Kubernetes or on
    Cloud TPUs, where JAX finds them out. The others may take `timeout` seconds to come.

    Raises: ValueError when only some are given, or the processes can't be found or reached.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{' and '.join(missing)} must be given too: all three, or --distributed alone")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id is {process_id}; it must be between 0 and {num_processes - 1}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the other processes were not found ({' '.join(str(error).split())})") from error


def coordination_client() -> Any:
    """The client of JAX's coordination service, None for a process that is alone."""
    from jax._src import distributed  # it has no public name

    return distributed.global_state.client


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """A mesh with the one axis "data". Auto axes: explicit ones refuse indexing of sharded arrays."""
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of what every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_batch(mesh: Mesh) -> NamedSharding:
    """The layout of arrays [B, ...] of which each device holds B / devices rows."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(batch_size: int, mesh: Mesh, what: str, micro_batches: int = 1) -> None:
    """Raise ValueError unless every device gets the same number of images, in every micro-batch."""
    if micro_batches < 1:
        raise ValueError(f"train.micro_batches is {micro_batches}; it must be at least 1")
    if batch_size < 1 or batch_size % (mesh.size * micro_batches):
        parts = f" times the number of micro-batches, {micro_batches}" if micro_batches > 1 else ""
        raise ValueError(f"{what} is {batch_size}; it must be a multiple of the number of devices, {mesh.size}{parts}")


def put_batch(batch, mesh: Mesh):
    """Place this process's part of the global batch (numpy leaves [B_local, ...]) on its devices."""
    sharding = split_over_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def put_micro_batches(batch, mesh: Mesh, micro_batches: int) -> list:
    """Cut this process's part of the global batch into equal parts and place each as `put_batch` does."""
    parts = [jax.tree.map(lambda x, i=i: np.asarray(x)[i::micro_batches], batch) for i in range(micro_batches)]
    return [put_batch(part, mesh) for part in parts]


def put_replicated(tree, mesh: Mesh):
    """Copy host arrays to every device of the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
