"""Hundreds of small tensors as a few long vectors.

The optimizer and the moving average do the same to every parameter. Done tensor by tensor it is thousands of tiny
kernels, which on a CPU took XLA longer to compile than the network itself; done on vectors it is a handful.
"""

from collections.abc import Hashable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from instseg_jax.types import Array, HostOrDeviceArray

Vectors = dict[Hashable, Array]
_ALL = "all"


def join(tree: dict) -> Array:
    """All leaves, which are of one type, as one vector in the order of the tree."""
    return pack(tree, jax.tree.map(lambda _: _ALL, tree))[_ALL]


def cut(vector: HostOrDeviceArray, like: dict) -> dict:
    """The tree whose leaves `join` has joined; numpy stays numpy. `like` gives the shapes."""
    return unpack({_ALL: vector}, jax.tree.map(lambda _: _ALL, like), like)


def pack(tree: dict, groups: dict) -> Vectors:
    """Join the leaves of each group into one vector, in the order of the tree.

    `groups` has the structure of `tree` with a group's key for each leaf, or "" for a leaf to leave out.
    """
    members: dict[Hashable, list[Array]] = {}
    for leaf, group in zip(jax.tree.leaves(tree), jax.tree.leaves(groups), strict=True):
        if group != "":
            members.setdefault(group, []).append(jnp.ravel(leaf))
    return {group: jnp.concatenate(leaves) for group, leaves in members.items()}


def unpack(vectors: Mapping[Hashable, HostOrDeviceArray], groups: dict, like: dict) -> dict:
    """The tree whose leaves `pack` has joined; zeros for the leaves that it left out. `like` gives the shapes."""
    start = dict.fromkeys(vectors, 0)

    def take(group: Hashable, leaf: Array) -> HostOrDeviceArray:
        if group == "":
            return jnp.zeros_like(leaf)
        size, first = int(np.prod(leaf.shape)), start[group]
        start[group] += size
        return vectors[group][first : first + size].reshape(leaf.shape)

    leaves, structure = jax.tree.flatten(like)
    taken = [take(group, leaf) for group, leaf in zip(jax.tree.leaves(groups), leaves, strict=True)]
    return jax.tree.unflatten(structure, taken)
