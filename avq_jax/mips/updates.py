"""Rows that come and go: pure functions from an index to the next, in shapes that stay the same.

The index given is left as it is, so its readers go on undisturbed. Each call copies the arrays it
changes, whatever the number of rows: change many rows at a time.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from avq_jax.checks import as_rows, is_traced
from avq_jax.loss import row_norms, scaling
from avq_jax.mips.capacity import held_rows
from avq_jax.mips.index import Index, pack_ids, user_ids
from avq_jax.mips.placing import clear, coded, place, put_rows, put_slots, scanned
from avq_jax.quantization.codebook import check_magnitude

__all__ = ["Added", "add", "remove", "replace", "row_numbers"]

_LEAST_BATCH = 16


class Added(NamedTuple):
    """An index with more rows, and the row numbers ``int32[b]`` that they got."""

    index: Index  # type: ignore[assignment]  # hides a method of tuples
    rows: Int32[Array | np.ndarray, " b"]


def add(index: Index, x: Any, *, ids: Any = None, soar_lambda: float | None = None) -> Added:
    """Add rows to an index that has room, from :func:`avq_jax.reserve`.

    Each row goes to its nearest leaf, to the next of the eight nearest while leaves are full, and
    is encoded as ``build`` encodes. Row numbers are the lowest free ones. Nothing is compiled
    again for another batch of the same size, rounded up to a power of two. Under ``jit`` values
    are not checked, and rows without room get the number -1.

    Args:
      index: with room.
      x: ``[b, d]`` rows.
      ids: ``int64[b]`` ids of the rows, where the index has user ids (under ``jit``, their high and
        low words ``uint32[b, 2]``).
      soar_lambda: as given to ``build``: add a second copy of each row.

    Returns:
      ``Added(index, rows)``.

    Raises:
      TypeError: ids that are not integers.
      ValueError: no room, rows that are not finite or of another width, ids missing, repeated, or
        present already.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> index = avq_jax.reserve(index, capacity=1200)
    >>> index, rows = avq_jax.add(index, 2 * x[:3])
    >>> rows.tolist(), avq_jax.search(index, x[1], k=1).ids.tolist()
    ([1000, 1001, 1002], [1001])
    """
    if is_traced(index, x, ids):
        x = as_rows(x, name="x", min_rows=0)
        words = None if index.ids is None else jnp.asarray(ids)
        return Added(*_add(index, x, jnp.ones(x.shape[0], bool), words, soar_lambda))
    x, active = _padded_rows(index, x)
    b = int(active.sum())
    new_words: Any = _words(index, ids, b, len(x))
    new, rows = _add(index, x, active, new_words, soar_lambda)
    rows = np.asarray(rows)[:b]
    _check_placed(index, rows, b)
    return Added(new, rows)


def remove(index: Index, rows: Any) -> Index:
    """Remove rows: no search finds them any more, and their numbers and slots are free.

    Args:
      index: any index.
      rows: ``[b]`` row numbers (:func:`avq_jax.row_numbers` finds those of user ids). Under
        ``jit`` numbers below zero are skipped.

    Returns:
      The index without them, of the same shapes.

    Raises:
      TypeError: row numbers that are not integers.
      ValueError: a number that no row holds.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> avq_jax.search(avq_jax.remove(index, [7]), x[7], k=1).ids.tolist() == [7]
    False
    """
    if not is_traced(index, rows):
        rows = _row_array(index, rows)
        rows = np.pad(rows, (0, _padded(len(rows)) - len(rows)), constant_values=-1)
    return _remove(index, jnp.asarray(rows, jnp.int32))


def replace(index: Index, rows: Any, x: Any, *, soar_lambda: float | None = None) -> Index:
    """Put other rows in the place of some, under the same row numbers and user ids.

    Args:
      index: any index; its leaves need free slots where the new rows lie.
      rows: ``[b]`` distinct row numbers.
      x: ``[b, d]`` the new rows.
      soar_lambda: as of :func:`add`.

    Returns:
      The changed index. Under ``jit`` a row without room is missing from it.

    Raises:
      TypeError: row numbers that are not integers.
      ValueError: as of :func:`add`, a number that no row holds, a repeated one.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> index = avq_jax.replace(avq_jax.reserve(index, capacity=1200), [7], 9 * x[8:9])
    >>> avq_jax.search(index, x[8], k=1).ids.tolist()
    [7]
    """
    if is_traced(index, rows, x):
        return _replace(index, jnp.asarray(rows, jnp.int32), as_rows(x, name="x"), soar_lambda)[0]
    rows = _row_array(index, rows)
    x, active = _padded_rows(index, x)
    if len(rows) != int(active.sum()):
        raise ValueError(
            f"x must have as many rows as row numbers, {len(rows)}; got {active.sum()}"
        )
    values, count = np.unique(rows, return_counts=True)
    if (count > 1).any():
        raise ValueError(f"rows must be distinct; {values[np.argmax(count > 1)]} is repeated")
    padded = np.pad(rows, (0, len(x) - len(rows)), constant_values=-1)
    new, placed = _replace(index, jnp.asarray(padded), x, soar_lambda)
    _check_placed(index, np.asarray(placed)[: len(rows)], len(rows))
    return new


def row_numbers(index: Index, ids: Any) -> Int32[np.ndarray, "*shape"]:
    """Row numbers of user ids; the inverse of :func:`avq_jax.user_ids`.

    Args:
      index: any index.
      ids: int64 ids of any shape; row numbers, where the index has no user ids.

    Returns:
      ``int32`` array of the same shape, -1 for ids that no row has.

    Raises:
      TypeError: ids that are not integers.

    >>> import avq_jax, jax, numpy as np
    >>> index = avq_jax.build(jax.random.key(0), np.eye(40), ids=2**40 + np.arange(40))
    >>> row_numbers(index, [2**40 + 7, 3]).tolist()
    [7, -1]
    """
    wanted = np.asarray(ids)
    if wanted.size and wanted.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers; got dtype {wanted.dtype}")
    rows = np.flatnonzero(np.asarray(held_rows(index)))
    have = user_ids(index, rows)
    order = np.argsort(have)
    if not len(rows):
        return np.full(wanted.shape, -1, np.int32)
    at = np.minimum(np.searchsorted(have, wanted, sorter=order), len(rows) - 1)
    found = have[order[at]] == wanted
    return np.where(found, rows[order[at]], -1).astype(np.int32)


def _padded(b: int) -> int:
    return max(_LEAST_BATCH, 1 << (b - 1).bit_length()) if b else _LEAST_BATCH


def _padded_rows(index: Index, x: Any) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(as_rows(x, name="x", min_rows=0))
    if x.shape[1] != index.dim:
        raise ValueError(f"x must have the width of the index, {index.dim}; got {x.shape[1]}")
    check_magnitude(x)
    more = _padded(len(x)) - len(x)
    return np.pad(x, ((0, more), (0, 0))), np.arange(len(x) + more) < len(x)


def _words(index: Index, ids: Any, b: int, size: int) -> np.ndarray | None:
    if index.ids is None:
        if ids is not None:
            raise ValueError("ids must be None for an index without user ids; rows have numbers")
        return None
    if ids is None:
        raise ValueError("ids must be given for an index with user ids, one for each row")
    words = pack_ids(ids, b)
    present = row_numbers(index, np.asarray(ids))
    if (present >= 0).any():
        i = int(np.argmax(present >= 0))
        raise ValueError(f"ids must be new; row {present[i]} has the id {np.asarray(ids)[i]}")
    return np.pad(words, ((0, size - b), (0, 0)))


def _row_array(index: Index, rows: Any) -> np.ndarray:
    rows = np.asarray(rows)
    rows = rows.astype(np.int32) if rows.size == 0 else rows
    if rows.ndim != 1:
        raise ValueError(f"rows must have one axis; got shape {rows.shape}")
    if rows.dtype.kind not in "iu":
        raise TypeError(f"rows must be integers, row numbers; got dtype {rows.dtype}")
    inside = (rows >= 0) & (rows < index.num_rows)
    held = inside & np.asarray(held_rows(index))[np.where(inside, rows, 0)]
    if not held.all():
        raise ValueError(f"rows must be numbers that rows hold; none holds {rows[~held][0]}")
    return rows.astype(np.int32)


def _check_placed(index: Index, rows: np.ndarray, b: int) -> None:
    refused = int((rows < 0).sum())
    if refused:
        held = int(np.asarray(held_rows(index)).sum())
        raise ValueError(
            f"x must fit the room of the index: {refused} of {b} rows found no free row number, or "
            f"no free slot in the leaves near them ({held} of {index.num_rows} row numbers are "
            "held); call avq_jax.reserve for a larger capacity, or avq_jax.rebalance"
        )


@jax.jit
def _remove(index: Index, rows: Int32[Array, " b"]) -> Index:
    n = index.num_rows
    if index.tree is not None:
        return dataclasses.replace(index, tree=clear(index.tree, rows, n))
    at = jnp.where(rows >= 0, rows, n)
    held = held_rows(index).at[at].set(False, mode="drop")
    return dataclasses.replace(index, store=index.store._replace(held=held))


@jax.jit
def _add(index: Index, x: Array, active: Array, words: Any, soar_lambda: Any) -> Any:
    b, n = x.shape[0], index.num_rows
    (free,) = jnp.nonzero(~held_rows(index), size=b, fill_value=-1)
    order = jnp.cumsum(active.astype(jnp.int32)) - 1
    rows = jnp.where(active, free[jnp.maximum(order, 0)], -1).astype(jnp.int32)
    index, rows = _put(index, rows, x, soar_lambda)
    if words is not None:
        at = jnp.where(rows >= 0, rows, n)
        ids = jnp.asarray(index.ids).at[at].set(jnp.asarray(words), mode="drop")
        index = dataclasses.replace(index, ids=ids)
    return index, rows


@jax.jit
def _replace(index: Index, rows: Array, x: Array, soar_lambda: Any) -> Any:
    return _put(_remove(index, rows), rows, x, soar_lambda)


def _put(index: Index, rows: Array, x: Array, soar_lambda: Any) -> Any:
    """Write rows under free numbers; where there is no slot the number becomes -1."""
    if index.metric == "cosine":
        norms = row_norms(x)
        x = x / jnp.where(norms > 0, norms, 1)[:, None]
    tree = index.tree
    if tree is not None:
        slot_rows = tree.packed.slot_rows
        seen = scanned(tree, x, index.weight, index.metric)
        first = place(tree, slot_rows, seen.rows, rows >= 0)
        places = [first]
        if soar_lambda is not None and index.num_leaves > 1:
            at = jnp.where(first.slots >= 0, first.slots, slot_rows.shape[0])
            taken = slot_rows.at[at].set(0, mode="drop")
            factor = jnp.asarray(soar_lambda, jnp.float32)
            places.append(place(tree, taken, seen.rows, first.slots >= 0, first.leaves, factor))
        rows = jnp.where(places[-1].slots >= 0, rows, -1)
        for leaves, slots in places:
            found = coded(tree, leaves, seen, index.weight)
            tree = put_slots(tree, jnp.where(rows >= 0, slots, -1), rows, found)
    store = index.store
    if store is not None:
        weights = None
        if index.metric != "l2" and store.scale is not None:
            weights = scaling(index.weight, row_norms(x), dim=index.dim)
        store = put_rows(store, rows, x, weights)
    return dataclasses.replace(index, tree=tree, store=store), rows
