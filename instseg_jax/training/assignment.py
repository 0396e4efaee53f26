"""The assignment as part of a program: shortest augmenting paths in JAX, for programs that shall not call the host.

The result is that of `matching.assign`, up to ties and rounding; costs are worked on in float32. On a CPU SciPy is
two to seven times quicker (`python -m pytest -s -m slow tests/training/test_assignment.py`, figures in training.md).
This is for programs without a callback, which are kept compiled and don't wait for the host.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from instseg_jax.training.matching import LARGEST_COST


def assign_in_program(cost: Array, valid: Array) -> Array:
    """Give a query to every object at the least total cost: [S, B, Q, N], [B, N] -> query_index [S, B, N] int32.

    -1 where a slot has no query: it is not valid, or there are more objects than queries.
    """
    cost = jnp.nan_to_num(cost, nan=LARGEST_COST, posinf=LARGEST_COST, neginf=-LARGEST_COST)
    over_images = jax.vmap(_assign_one)
    return jax.vmap(over_images, in_axes=(0, None))(jnp.swapaxes(cost, 2, 3), jnp.asarray(valid))


def _assign_one(cost: Array, valid: Array) -> Array:
    """The columns that rows [N, Q] get; -1 for rows that are not valid or go without."""
    rows, real = cost.shape
    if rows > real:  # columns beyond the real ones: so dear that no row takes one as long as there is another way
        top, bottom = jnp.max(cost), jnp.min(cost)
        dear = jnp.full((rows, rows), top + rows * (top - bottom) + 1)
        cost = jnp.concatenate([cost, dear], axis=1)
    columns = cost.shape[1]
    # The column `columns` is the root of a search, the row `rows` stands for none.
    cost = jnp.pad(cost, ((0, 1), (0, 1)))
    start = (jnp.zeros(rows + 1), jnp.zeros(columns + 1), jnp.full(columns + 1, rows, jnp.int32))

    def add_row(row: Array, state: tuple) -> tuple:
        return lax.cond(valid[row], functools.partial(_augment, cost, row), lambda given: given, state)

    *_, row_of = lax.fori_loop(0, rows, add_row, start)
    column_of = jnp.full(rows + 1, -1, jnp.int32).at[row_of[:columns]].set(jnp.arange(columns, dtype=jnp.int32))[:rows]
    return jnp.where(valid & (column_of < real), column_of, -1)


def _augment(cost: Array, row: Array, state: tuple) -> tuple:
    """Take one more row in: search the shortest path to a free column, move the rows along it."""
    row_price, column_price, row_of = state
    none, root = cost.shape[0] - 1, cost.shape[1] - 1
    row_of = row_of.at[root].set(row)
    is_column = jnp.arange(root + 1) < root

    def search(carry: tuple) -> tuple:
        column, row_price, column_price, nearest, before, seen = carry
        seen = seen.at[column].set(True)
        reduced = cost[row_of[column]] - row_price[row_of[column]] - column_price
        is_open = is_column & ~seen
        is_nearer = is_open & (reduced < nearest)
        nearest = jnp.where(is_nearer, reduced, nearest)
        before = jnp.where(is_nearer, column, before)
        best = jnp.argmin(jnp.where(is_open, nearest, jnp.inf)).astype(jnp.int32)
        delta = nearest[best]
        row_price = row_price.at[row_of].add(jnp.where(seen, delta, 0))
        column_price = jnp.where(seen, column_price - delta, column_price)
        nearest = jnp.where(seen, nearest, nearest - delta)
        return best, row_price, column_price, nearest, before, seen

    endless, unknown = jnp.full(root + 1, jnp.inf), jnp.full(root + 1, root, jnp.int32)
    first = (jnp.int32(root), row_price, column_price, endless, unknown, jnp.zeros(root + 1, bool))
    found = lax.while_loop(lambda carry: row_of[carry[0]] != none, search, first)
    column, row_price, column_price, _, before, _ = found

    def move(carry: tuple) -> tuple:
        column, row_of = carry
        return before[column], row_of.at[column].set(row_of[before[column]])

    _, row_of = lax.while_loop(lambda carry: carry[0] != root, move, (column, row_of))
    return row_price, column_price, row_of.at[root].set(none)
