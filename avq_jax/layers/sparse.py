"""Gradients of a few rows of a large table, and optimizer steps that touch those rows alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

__all__ = ["SparseRows", "coalesce", "gather_rows", "sparse_update"]


class SparseRows(NamedTuple):
    """Some rows of a table, such as the part of its gradient that is not zero; a pytree.

    Attributes:
      ids: ``int32[c]`` row numbers; -1 is padding.
      rows: ``[c, d]`` their values; those of padding are not used.
    """

    ids: Int32[Array, " c"]
    rows: Float[Array, "c d"]


def _places(ids: Any, n: int) -> Array:
    """Row numbers with padding beyond the table, where JAX drops it (-1 would be the last row)."""
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers [c]; got {ids.dtype} {ids.shape}")
    return jnp.where(ids < 0, n, ids).astype(jnp.int32)


def gather_rows(table: Float[Array, n * rest], ids: Any) -> Float[Array, c * rest]:
    """Rows of a table; zero for padding (id -1) and for ids beyond it.

    Differentiate a loss in the gathered rows, not in the table: the gradient is then ``[c, d]``
    and no array of the table's size is made.

    Args:
      table: ``[n, ...]``.
      ids: ``int32[c]``.

    Returns:
      ``[c, ...]``.

    Raises:
      ValueError: ids that are not integers of one axis.

    >>> import jax.numpy as jnp
    >>> gather_rows(jnp.array([[1.0], [2.0]]), jnp.array([1, -1])).tolist()
    [[2.0], [0.0]]
    """
    return table.at[_places(ids, table.shape[0])].get(mode="fill", fill_value=0)


def coalesce(sparse: SparseRows) -> SparseRows:
    """Sum rows of equal ids, so that each id comes once.

    Args:
      sparse: ids in any order, with repeats.

    Returns:
      :class:`SparseRows` of the same size: each id once, and padding -1 with zero rows.

    Raises:
      ValueError: ids that are not integers of one axis.

    >>> import jax.numpy as jnp
    >>> both = coalesce(SparseRows(jnp.array([4, 1, 4]), jnp.array([[1.0], [2.0], [5.0]])))
    >>> both.ids.tolist(), both.rows.ravel().tolist()
    ([1, 4, -1], [2.0, 6.0, 0.0])
    """
    far = jnp.iinfo(jnp.int32).max
    ids = _places(sparse.ids, far)
    order = jnp.argsort(ids)
    ids, rows = ids[order], jnp.where((ids < far)[:, None], sparse.rows, 0)[order]
    new = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])[: len(ids)]
    group = jnp.cumsum(new) - 1
    summed = jax.ops.segment_sum(rows, group, num_segments=len(ids), indices_are_sorted=True)
    first = jnp.full(len(ids), far, jnp.int32).at[group].min(ids)
    return SparseRows(jnp.where(first == far, -1, first), summed)


def sparse_update(
    optimizer: Any, gradient: SparseRows, state: Any, table: Float[Array, "n d"]
) -> tuple[Float[Array, "n d"], Any]:
    """Make a step of an optax optimizer on some rows of a table.

    The rows are gathered from the table and from every array of the state whose first axis is that
    of the table, updated, and put back; all else of the state (step counts) passes through the
    optimizer. Moments of untouched rows neither decay nor move: "lazy" Adam. Exact for optimizers
    that treat each row by itself; those that look at the whole gradient (clipping by a global
    norm) see the touched rows only. Donate table and state to ``jit`` and they are updated in
    place.

    Args:
      optimizer: ``optax.GradientTransformation``.
      gradient: of distinct rows (:func:`coalesce` makes them so).
      state: ``optimizer.init(table)``, or of an earlier step.
      table: ``[n, d]``.

    Returns:
      ``(table, state)``.

    Raises:
      ValueError: rows of another width than the table.

    >>> import jax.numpy as jnp, optax
    >>> table, optimizer = jnp.zeros((3, 1)), optax.sgd(0.5)
    >>> gradient = SparseRows(jnp.array([2, -1]), jnp.array([[1.0], [9.0]]))
    >>> table, _ = sparse_update(optimizer, gradient, optimizer.init(table), table)
    >>> table.ravel().tolist()
    [0.0, 0.0, -0.5]
    """
    n = table.shape[0]
    if gradient.rows.shape[1:] != table.shape[1:]:
        raise ValueError(
            f"gradient.rows must be as wide as the table, {table.shape[1:]}; "
            f"got {gradient.rows.shape[1:]}"
        )
    places = _places(gradient.ids, n)

    def by_row(leaf: Any) -> bool:
        return jnp.shape(leaf)[:1] == (n,)

    part = jax.tree.map(lambda a: gather_rows(a, gradient.ids) if by_row(a) else a, state)
    kept = gather_rows(table, gradient.ids)
    updates, part = optimizer.update(gradient.rows, part, kept)
    state = jax.tree.map(
        lambda old, new: old.at[places].set(new, mode="drop") if by_row(old) else new, state, part
    )
    return table.at[places].add(updates.astype(table.dtype), mode="drop"), state
