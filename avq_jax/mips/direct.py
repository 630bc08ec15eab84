"""The compiled tree search without JAX's dispatch, for few queries from the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from avq_jax.checks import as_queries, is_traced
from avq_jax.mips.index import Index, Tree
from xla_kernels import direct_tree_search

__all__ = ["DIRECT_QUERIES", "bind", "bound", "host_queries"]

# Batches up to this size go to the kernel directly; larger ones use XLA's threads.
DIRECT_QUERIES = 8

# What `bound` made, by the identity of the index; dropped when the index is.
_BOUND: dict[int, tuple[weakref.ref, dict[Any, Callable | None]]] = {}


def bound(index: Index, settings: Any, effort_of: Callable[[], Any]) -> Callable | None:
    """The function of :func:`bind`, made once for an index and its settings.

    Args:
      index: concrete or traced.
      settings: hashable arguments of the search.
      effort_of: makes the effort of a search from them, checked.

    Returns:
      The function, or ``None`` where the kernel cannot do this search.
    """
    key = id(index)
    held = _BOUND.get(key)
    if held is None or held[0]() is not index:
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(index.tree)):
            return None
        if is_traced(index):
            return None
        held = weakref.ref(index, lambda _: _BOUND.pop(key, None)), {}
        _BOUND[key] = held
    if settings not in held[1]:
        held[1][settings] = bind(index, effort_of())
    return held[1][settings]


def host_queries(queries: Any, dim: int) -> tuple[np.ndarray, bool]:
    """Queries as C-ordered ``float32[b, d]``, and whether one vector was given.

    Raises:
      TypeError: traced queries.
      ValueError: another width than ``dim``.

    >>> rows, single = host_queries([1.0, 2.0], 2)
    >>> rows.shape, single
    ((1, 2), True)
    """
    if type(queries) is np.ndarray and queries.dtype == np.float32 and queries.flags.c_contiguous:
        if queries.shape == (dim,):
            return queries.reshape(1, dim), True
        if queries.ndim == 2 and queries.shape[1] == dim:
            return queries, False
    if is_traced(queries):
        raise TypeError("a searcher takes concrete queries; inside jit call search instead")
    rows, single = as_queries(queries, width=dim)
    return np.ascontiguousarray(rows), single


def bind(index: Index, effort: Any) -> Callable | None:
    """The compiled kernel called without JAX between, where it does all that a search does."""
    if index.tree is None or effort.implementation not in (None, "cpu") or not index.num_rows:
        return None
    if index.metric == "l2" and not effort.rescore:
        return None
    run = direct_tree_search(
        index.tree.packed,
        k=effort.k,
        leaves_to_search=effort.leaves_to_search,
        rescore=effort.rescore,
        rows=index.store.rows if effort.rescore else None,
        row_scale=index.store.scale if effort.rescore else None,
        euclidean=index.metric == "l2",
        deviations=effort.adaptive,
        retrieve=effort.retrieve,
    )
    if run is None:
        return None
    if index.tree.width < index.dim or index.tree.projection is not None:
        run = _scanned(run, index.tree)
    if index.metric != "cosine":
        return run

    def cosine(queries: np.ndarray) -> Any:
        peak = np.abs(queries).max(axis=1, keepdims=True, initial=0)
        with np.errstate(invalid="ignore"):  # a query that is not finite finds nothing
            scaled = queries / np.where(peak > 0, peak, 1)
            norms = np.sqrt(np.einsum("bd,bd->b", scaled, scaled))
            return run(scaled / np.where(norms > 0, norms, 1)[:, None])

    return cosine


def _scanned(run: Callable, tree: Tree) -> Callable:
    """The kernel for queries of all dimensions, where the tree has fewer."""
    width = tree.width
    axes = None if tree.projection is None else np.asarray(tree.projection)

    def find(queries: np.ndarray) -> Any:
        # A query that is not finite finds nothing, and need not be told of twice.
        with np.errstate(invalid="ignore", over="ignore"):
            seen = queries[:, :width] if axes is None else queries @ axes
        return run(np.ascontiguousarray(seen, np.float32), queries)

    return find
