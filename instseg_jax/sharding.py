"""The mesh over devices, and how batches and states are laid out on it.

One axis, "data": batches are split over it, everything else is copied to every device. One device is a mesh
of one. Several processes form one mesh; each puts its own part of the global batch on its own devices.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from instseg_jax.types import DATA_AXIS


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
