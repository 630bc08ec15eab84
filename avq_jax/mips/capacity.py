"""Room for rows to come: an index laid out with spare slots and row numbers, and made tight again.

The shapes of an index with room do not change while rows come and go, so nothing is compiled
again. A slot or a row number is free where no row holds it; searches see only held ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import xla_kernels
from avq_jax.checks import as_count, is_traced
from avq_jax.mips.index import Index, Tree
from avq_jax.mips.partition import check_slots, lay_out
from avq_jax.mips.rescoring import Store
from xla_kernels import unpack_codes

__all__ = ["Held", "compact", "held_rows", "held_slots", "lay_out_again", "reserve", "with_room"]


class Held(NamedTuple):
    """The slots of a tree that hold a row, leaf by leaf: leaf, row number, codes, offset, gain."""

    leaves: np.ndarray
    rows: np.ndarray
    codes: np.ndarray
    offset: np.ndarray | None
    gains: np.ndarray | None

    def part(self, which: np.ndarray) -> Held:
        """Some of them, by a mask or numbers."""
        return jax.tree.map(lambda a: a[which], self)


def held_slots(tree: Tree) -> Held:
    """Take the held slots out of a tree, by row inside a leaf, which is how `lay_out` has them."""
    packed = tree.packed
    rows = np.asarray(packed.slot_rows)
    at = np.flatnonzero(rows >= 0)
    sizes = np.diff(np.asarray(packed.starts)) * packed.block
    leaves = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    at = at[np.lexsort((rows[at], leaves[at]))]
    offset = None if tree.offset is None else np.asarray(tree.offset)[at]
    gains = None if packed.gains is None else np.asarray(packed.gains.level)[at]
    return Held(leaves[at], rows[at], np.asarray(unpack_codes(packed.codes))[at], offset, gains)


def held_rows(index: Index) -> Any:
    """Which row numbers are held by a row.

    Args:
      index: any index, also a traced one.

    Returns:
      ``bool[index.num_rows]``.

    >>> import avq_jax, jax, numpy as np
    >>> index = avq_jax.build(jax.random.key(0), np.eye(40))
    >>> int(avq_jax.held_rows(avq_jax.reserve(index, capacity=50)).sum())
    40
    """
    n = index.num_rows
    if index.tree is not None:
        rows = jnp.asarray(index.tree.packed.slot_rows)
        # Beyond the end is dropped; -1 would count from there.
        return jnp.zeros(n, bool).at[jnp.where(rows >= 0, rows, n)].set(True, mode="drop")
    if index.store.held is None:
        return jnp.ones(n, bool)
    return jnp.asarray(index.store.held)


def lay_out_again(tree: Tree, held: Held, rows: np.ndarray, room: np.ndarray | None = None) -> Tree:
    """Some held slots under new row numbers, each leaf in at least ``room`` blocks."""
    packed = tree.packed
    layout = lay_out(held.leaves, num_leaves=len(packed.starts) - 1, block=packed.block, room=room)
    entries = np.asarray(layout.slots)
    full = np.flatnonzero(entries >= 0)

    def each_slot(a: np.ndarray, free: int = 0) -> np.ndarray:
        out = np.full((len(entries), *a.shape[1:]), free, a.dtype)
        out[full] = a[entries[full]]
        return out

    groups, gains = packed.groups, None
    if held.gains is not None:
        gains = (each_slot(held.gains), packed.gains.levels)
    return tree._replace(
        packed=xla_kernels.pack_tree(
            packed.centroids,
            layout.starts,
            each_slot(rows, -1),
            np.asarray(packed.codewords).transpose(0, 2, 1),
            each_slot(held.codes),
            ranking=packed.ranking,
            leaf_offset=tree.leaf_offset,
            slot_offset=None if held.offset is None else each_slot(held.offset),
            groups=None if groups is None else (groups.vectors, groups.starts),
            gains=gains,
        )
    )


def with_room(tree: Tree, numbers: np.ndarray, capacity: int) -> Tree:
    """The rows of a tree under new numbers, with free slots in proportion in every leaf.

    Args:
      tree: of an index.
      numbers: ``[n]`` the new number of each row, rising.
      capacity: of the index, at least n.

    Raises:
      ValueError: more slots than int32 can number.
    """
    held = held_slots(tree)
    sizes = np.bincount(held.leaves, minlength=tree.centroids.shape[0])
    factor = capacity / max(1, len(np.unique(held.rows)))
    block = tree.packed.block
    room = np.maximum(1, -(-np.ceil(sizes * factor) // block)).astype(np.int64)
    check_slots(int(room.sum()) * block)
    return lay_out_again(tree, held, numbers.astype(np.int32)[held.rows], room)


def reserve(index: Index, *, capacity: int) -> Index:
    """Give an index row numbers, and room in its leaves, for ``capacity`` rows in all.

    Rows and their numbers stay as they are; scores and ids of a search too. Each leaf gets free
    slots in proportion to its rows, and at least one block. A search reads the codes of free slots
    of the leaves it probes, so room costs time as well as memory.

    Args:
      index: from :func:`avq_jax.build`, or one reserved before.
      capacity: row numbers, at least those that ``index`` has. More rows than that cannot be held.

    Returns:
      The index with ``num_rows == capacity``, for :func:`avq_jax.add`.

    Raises:
      TypeError: a traced index, a capacity that is not an integer.
      ValueError: a capacity below the present one, or more than 2^31 slots.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> avq_jax.reserve(index, capacity=1200).num_rows
    1200
    """
    if is_traced(index):
        raise TypeError("reserve changes shapes; call it outside jit")
    n = index.num_rows
    if as_count(capacity, name="capacity") < n:
        raise ValueError(f"capacity must be at least the rows of the index, {n}; got {capacity}")
    more = capacity - n
    held = np.asarray(held_rows(index))
    tree = None if index.tree is None else with_room(index.tree, np.arange(n), capacity)
    store = index.store
    if store is not None:
        rows = jnp.pad(store.rows, ((0, more), (0, 0)))
        scale = None if store.scale is None else jnp.pad(store.scale, (0, more))
        # Only where no tree says which rows there are.
        mask = jnp.pad(jnp.asarray(held), (0, more)) if tree is None else None
        store = Store(rows, scale, mask)
    ids = None if index.ids is None else jnp.pad(jnp.asarray(index.ids), ((0, more), (0, 0)))
    return dataclasses.replace(index, tree=tree, store=store, ids=ids, num_rows=capacity)


def compact(index: Index) -> Index:
    """Number the rows anew without gaps, in their order, and give all room back.

    The form in which an index is saved. User ids stay with their rows; row numbers of an index
    with gaps change.

    Args:
      index: from :func:`avq_jax.reserve` and the functions that change it.

    Returns:
      An index whose ``num_rows`` is the number of its rows.

    Raises:
      TypeError: a traced index.
      ValueError: an index emptied of all rows.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> avq_jax.compact(avq_jax.remove(index, [3, 4, 5])).num_rows
    997
    """
    if is_traced(index):
        raise TypeError("compact changes shapes; call it outside jit")
    held = np.asarray(held_rows(index))
    kept = np.flatnonzero(held)
    if not len(kept):
        raise ValueError("index must hold at least one row to be made compact; it holds none")
    tree = index.tree
    if tree is not None:
        slots = held_slots(tree)
        number = np.cumsum(held, dtype=np.int32) - 1
        tree = lay_out_again(tree, slots, number[slots.rows])
    store = index.store
    if store is not None:
        scale = None if store.scale is None else jnp.asarray(store.scale)[kept]
        store = Store(jnp.asarray(store.rows)[kept], scale)
    ids = None if index.ids is None else jnp.asarray(index.ids)[kept]
    return jax.tree.map(
        jnp.asarray,
        dataclasses.replace(index, tree=tree, store=store, ids=ids, num_rows=len(kept)),
    )
