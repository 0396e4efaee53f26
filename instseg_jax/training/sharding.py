"""Devices, the mesh over them, and how batches and states are laid out on it.

One axis, "data": batches are split over it, everything else is copied to every device. One device is a mesh
of one. Several processes form one mesh; each puts its own part of the global batch on its own devices.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


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


def make_mesh(devices: list[jax.Device]) -> Mesh:
    """A mesh with the one axis "data". Auto axes: explicit ones refuse indexing of sharded arrays."""
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_over_batch(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(batch_size: int, mesh: Mesh, what: str) -> None:
    """Raise ValueError unless every device gets the same number of images."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(f"{what} is {batch_size}; it must be a multiple of the number of devices, {mesh.size}")


def put_batch(batch, mesh: Mesh):
    """Place this process's part of the global batch (numpy leaves [B_local, ...]) on its devices."""
    sharding = split_over_batch(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def put_replicated(tree, mesh: Mesh):
    """Copy host arrays to every device of the mesh."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
