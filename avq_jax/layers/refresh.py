"""An index that follows rows which a model changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avq_jax.checks import as_rows, is_traced
from avq_jax.loss import row_norms, scaling
from avq_jax.mips import Index
from avq_jax.mips.placing import coded, put_slots, scanned
from avq_jax.mips.rescoring import store_rows

__all__ = ["refresh"]


def refresh(index: Index, ids: Any, rows: Any) -> Index:
    """Give an index the present values of some of its rows.

    The rows are encoded anew by the codebook of the index, under its weight, and replaced in the
    store. They stay in their leaves and the codebook stays as it is, so shapes do not change and
    nothing is traced anew; when most rows have moved far, build again. A host function.

    Args:
      index: metric ``"dot"``, from :func:`avq_jax.build`.
      ids: ``int[c]`` row numbers; -1 is ignored. Of repeated ids the last counts.
      rows: ``[c, d]`` their values.

    Returns:
      :class:`avq_jax.Index`; the one given is unchanged.

    Raises:
      TypeError: traced arguments.
      ValueError: another metric, ids beyond the index, rows that are not finite or do not fit.

    >>> import avq_jax, jax, numpy as np
    >>> x = jax.random.normal(jax.random.key(0), (100, 4))
    >>> index = refresh(avq_jax.build(jax.random.key(1), x), [7], 9 * np.ones((1, 4)))
    >>> avq_jax.search(index, np.ones(4), k=1).ids.tolist()
    [7]
    """
    if is_traced(index, ids, rows):
        raise TypeError("refresh is a host function; call it outside jit, between steps")
    if index.metric != "dot":
        raise ValueError(f"index must have the metric 'dot'; got {index}")
    rows, ids = np.asarray(as_rows(rows, name="rows", min_rows=0)), np.asarray(ids)
    if ids.shape != rows.shape[:1] or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"ids must be integers [{len(rows)}]; got {ids.dtype} {ids.shape}")
    if rows.shape[1] != index.dim:
        raise ValueError(f"rows must have the width of the index, {index.dim}; got {rows.shape}")
    if ids.size and (ids.min() < -1 or ids.max() >= index.num_rows):
        wrong = ids.min() if ids.min() < -1 else ids.max()
        raise ValueError(f"ids must be -1 or from 0 to {index.num_rows - 1}; got {wrong}")
    # np.unique keeps the first of equal ids; reversed, the last.
    ids, last = np.unique(ids[::-1], return_index=True)
    rows = rows[::-1][last]
    rows, ids = rows[ids >= 0], ids[ids >= 0]
    if not len(ids):
        return index
    tree = index.tree if index.tree is None else _encoded(index, ids, rows)
    return dataclasses.replace(index, tree=tree, store=_stored(index, ids, rows))


def _encoded(index: Index, ids: np.ndarray, rows: np.ndarray) -> Any:
    """The tree with new codes in every slot of the rows (two with spilling)."""
    packed = index.tree.packed
    place = np.full(index.num_rows + 1, -1)  # the last stands for empty slots
    place[ids] = np.arange(len(ids))
    which = place[np.asarray(packed.slot_rows)]
    slots = np.flatnonzero(which >= 0)
    which = which[slots]
    leaves = np.searchsorted(np.asarray(packed.starts), slots // packed.block, side="right") - 1
    seen = scanned(index.tree, jnp.asarray(rows), index.weight, index.metric)
    # Encoded at a size that is a power of two: few shapes, few compilations.
    pad = (1 << max(len(slots) - 1, 255).bit_length()) - len(slots)
    which, leaves = (np.pad(a, (0, pad)) for a in (which, leaves))
    slots = np.pad(slots, (0, pad), constant_values=-1).astype(np.int32)
    each = jax.tree.map(lambda a: a[which], seen)
    found = coded(index.tree, jnp.asarray(leaves, jnp.int32), each, index.weight)
    numbers = jnp.asarray(ids[which], jnp.int32)
    return put_slots(index.tree, jnp.asarray(slots), numbers, found)


def _stored(index: Index, ids: np.ndarray, rows: np.ndarray) -> Any:
    store: Any = index.store
    if store is None:
        return None
    kind: Any = store.rows.dtype.name
    weights = None
    if index.metric != "l2":
        weights = scaling(index.weight, row_norms(rows), dim=index.dim)
    fresh = store_rows(rows, kind, weights)
    scale = store.scale
    if scale is not None:
        scale = scale.at[ids].set(fresh.scale)
    return store._replace(rows=store.rows.at[ids].set(fresh.rows), scale=scale)
