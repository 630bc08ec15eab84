"""How an index has changed since it was built, and learning its leaves and codes anew."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int64

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import row_norms
from avq_jax.mips.capacity import held_rows, with_room
from avq_jax.mips.index import Index
from avq_jax.mips.learning import build_tree, scanned_terms
from avq_jax.mips.options import TreeOptions
from avq_jax.mips.placing import scanned
from avq_jax.mips.rescoring import Store
from avq_jax.quantization import Codebook

__all__ = ["Statistics", "rebalance", "statistics"]

_SLOTS_PER_STEP = 8192


class Statistics(NamedTuple):
    """What :func:`statistics` tells.

    Attributes:
      rows: rows held.
      capacity: row numbers.
      leaf_sizes: ``int64[L]`` rows in each leaf, copies counted.
      leaf_slots: ``int64[L]`` slots of each leaf.
      drift: share of the mean squared residual that moving the centroids to the means of their
        leaves would remove, 0 to 1; NaN without stored rows or without a tree.
    """

    rows: int
    capacity: int
    leaf_sizes: Int64[np.ndarray, " L"]
    leaf_slots: Int64[np.ndarray, " L"]
    drift: float


def statistics(index: Index) -> Statistics:
    r"""Tell how full the leaves are and how far the rows have drifted from the centroids.

    By the parallel axis theorem the squared residuals of leaf l fall by
    :math:`n_l \|\bar x_l - c_l\|^2` where its centroid moves to the mean of its rows; drift is the
    sum of these over the sum of squared residuals. After k-means on all rows it is near 0, a few
    hundredths where the centroids were learned from a sample, and more with the lengthened
    centroids of ``soar_lambda``: compare it with its value after ``build``.

    Args:
      index: any index, of concrete arrays.

    Returns:
      :class:`Statistics`.

    Raises:
      TypeError: a traced index.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> told = statistics(index)
    >>> told.rows, int(told.leaf_sizes.sum()), told.drift < 0.05
    (1000, 1000, True)
    """
    if is_traced(index):
        raise TypeError("statistics reads values; call it outside jit")
    rows = int(np.asarray(held_rows(index)).sum())
    if index.tree is None:
        empty = np.zeros(0, np.int64)
        return Statistics(rows, index.num_rows, empty, empty, math.nan)
    packed = index.tree.packed
    bounds = np.asarray(packed.starts, np.int64) * packed.block
    used = np.concatenate([[0], np.cumsum(np.asarray(packed.slot_rows) >= 0)])
    drift = math.nan
    if index.store is not None and rows:
        drift = float(_drift(index))
    return Statistics(
        rows, index.num_rows, np.diff(used[bounds]).astype(np.int64), np.diff(bounds), drift
    )


def _stored(store: Store, rows: Any) -> Array:
    x = jnp.asarray(store.rows)[rows].astype(jnp.float32)
    return x if store.scale is None else x * store.scale[rows][:, None]


@jax.jit
def _drift(index: Index) -> Array:
    packed = index.tree.packed
    leaves, d = packed.centroids.shape
    slots = packed.slot_rows.shape[0]

    def step(carry: Any, begin: Array) -> Any:
        shift, square, count = carry
        slot = begin + jnp.arange(_SLOTS_PER_STEP, dtype=jnp.int32)
        inside = slot < slots
        slot = jnp.minimum(slot, slots - 1)
        row = packed.slot_rows[slot]
        held = (inside & (row >= 0)).astype(jnp.float32)
        leaf = jnp.searchsorted(packed.starts, slot // packed.block, side="right") - 1
        x = _stored(index.store, jnp.maximum(row, 0))
        x = scanned(index.tree, x, index.weight, index.metric).rows
        left = x - packed.centroids[leaf]
        left = left * held[:, None]
        return (
            shift + jax.ops.segment_sum(left, leaf, leaves),
            square + jnp.sum(left * left),
            count + jax.ops.segment_sum(held, leaf, leaves),
        ), None

    zero = jnp.zeros((leaves, d)), jnp.float32(0), jnp.zeros(leaves)
    begins = jnp.arange(0, slots, _SLOTS_PER_STEP, dtype=jnp.int32)
    (shift, square, count), _ = jax.lax.scan(step, zero, begins)
    gained = jnp.sum(jnp.sum(shift * shift, axis=1) / jnp.maximum(count, 1))
    return jnp.where(square > 0, gained / jnp.where(square > 0, square, 1), 0)


def rebalance(
    key: Array,
    index: Index,
    *,
    num_leaves: int | None = None,
    soar_lambda: float | None = None,
    num_iterations: int = 12,
    sample_size: int = 100_000,
    progress: bool | None = False,
) -> Index:
    """Learn leaves, codebooks and codes anew from the rows that an index holds now.

    Row numbers, user ids, capacity, metric and weight stay. Shapes may change, so the first search
    afterwards compiles again.

    Args:
      key: a typed key.
      index: with stored rows (int8 rows are taken as they are stored).
      num_leaves: L; ``None`` keeps it. Another number scales ``leaves_to_search`` along.
      soar_lambda: as of ``build``.
      num_iterations: as of ``build``.
      sample_size: as of ``build``.
      progress: show progress.

    Returns:
      The new index; one without a tree is returned as it is.

    Raises:
      TypeError: a traced index.
      ValueError: an index without stored rows, or with too few to learn from.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> avq_jax.rebalance(jax.random.key(2), index, num_leaves=12).num_leaves
    12
    """
    if is_traced(index):
        raise TypeError("rebalance is a host loop; call it outside jit")
    if index.tree is None:
        return index
    if index.store is None:
        raise ValueError(
            "index must have stored rows to be rebalanced; it was built with rescore_dtype=None"
        )
    leaves = index.num_leaves
    if num_leaves is not None:
        leaves = as_count(num_leaves, name="num_leaves")
    kept = np.flatnonzero(np.asarray(held_rows(index)))
    book = index.tree.codebook
    if len(kept) < max(book.num_codewords, leaves):
        raise ValueError(
            f"index must hold at least {max(book.num_codewords, leaves)} rows to learn from; it "
            f"holds {len(kept)}"
        )
    x = np.asarray(_stored(index.store, kept))
    norms = np.asarray(row_norms(x))
    if index.metric == "cosine":
        norms = (norms > 0).astype(np.float32)
    old, groups, gains = index.tree, index.tree.packed.groups, index.tree.packed.gains
    # The axes stay: they were chosen for the data, not for the rows of a moment.
    seen, terms = scanned_terms(
        old.projection, old.width, index.weight, norms, x, metric=index.metric
    )
    options = TreeOptions(
        leaves,
        book.num_subspaces,
        book.num_codewords,
        num_iterations,
        sample_size,
        soar_lambda,
        num_groups=None if groups is None else groups.vectors.shape[0],
        codec="product" if isinstance(book, Codebook) else "additive",
        scale=None if gains is None else gains.levels.shape[0].bit_length() - 1,
    )
    tree = build_tree(key, seen, terms, options, metric=index.metric, progress=progress)
    tree = tree._replace(projection=old.projection)
    searched = max(1, round(index.leaves_to_search * leaves / index.num_leaves))
    return dataclasses.replace(
        index, tree=with_room(tree, kept, index.num_rows), leaves_to_search=searched
    )
