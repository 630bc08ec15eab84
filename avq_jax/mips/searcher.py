"""Search: leaves, codes, candidates, exact rescoring; inside ``jit`` or through a host handle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.checks import as_queries, is_traced
from avq_jax.mips.direct import DIRECT_QUERIES, bind, bound, host_queries
from avq_jax.mips.effort import Effort, effort_of
from avq_jax.mips.exact import SearchResult, power_of_two
from avq_jax.mips.filtering import filtered_search, restrict
from avq_jax.mips.index import Index
from avq_jax.mips.rescoring import Store, rough_scores
from avq_jax.quantization.rows import unit
from xla_kernels import (
    Implementation,
    PackedTree,
    best_rows,
    row_scores,
    tree_search,
)

__all__ = ["Probes", "probes_of", "result_of", "search", "searcher"]

# Queries that share one product with the centroids. Always this many, so that a query gets the
# same bits whatever the batch around it.
_TILE = 8

# Rows beyond k that exact search scores again, for what the product ranks a rounding error apart.
_SPARE = 64

# Queries of dot products with a largest value beyond this, or below its inverse, are rescaled.
_LARGE = 2.0**40
_MAX = float(jnp.finfo(jnp.float32).max)


def _as_mask(allowed: Any, b: Any, n: int) -> Any:
    if allowed is None:
        return None
    allowed = jnp.asarray(allowed)
    if allowed.dtype != jnp.bool_:
        raise TypeError(
            f"allowed must be a boolean mask over the rows, not a list of ids; got {allowed.dtype}"
        )
    shapes = [(n,)] if b is None else [(n,), (b, n)]
    if allowed.shape not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"allowed must have shape {wanted}; got {allowed.shape}")
    return allowed


def search(
    index: Index,
    queries: Any,
    *,
    k: int = 10,
    leaves_to_search: int | None = None,
    rescore: int | None = None,
    adaptive: float | None = None,
    overretrieve: float | None = None,
    recall_target: float = 1.0,
    allowed: Any = None,
    implementation: Implementation | None = None,
) -> SearchResult:
    """Find the k rows of largest score for each query.

    Ranks the leaves by ``<q, ranking[l]>``, scores the codes of the best of them
    (``<q, centroid> + sum_m table[m, code_m]``), and rescores the best candidates exactly. Works
    eagerly and inside ``jit``, ``vmap`` and ``grad``: the scores are differentiable in queries
    and index arrays, the ids carry no gradient.

    Args:
      index: from :func:`avq_jax.build`; a pytree, so pass it to a jitted function as an argument.
      queries: ``[b, d]``, or ``[d]`` for one query, whose result is then squeezed.
      k: results a query.
      leaves_to_search: leaves probed; more raises recall and time; ``None`` takes the default of
        the index. More than there are means all.
      rescore: candidates scored again from the stored rows; 0 turns it off, so that scores are
        estimates from the codes alone; ``None`` takes ``max(10 k, 100)``, or 0 without stored
        rows. An index without a tree always scores its stored rows.
      adaptive: adaptive effort. After its four best leaves a query passes over those whose
        estimates would have to lie more than so many standard deviations beyond their mean,
        ``<q, c_l> + adaptive ||q|| s_l``, to reach the last of the candidates it has by then; s_l
        is the deviation of a coordinate of the residuals of leaf l. With ``leaves_to_search`` far
        above what most queries need, 3 to 3.5 probes many leaves for hard queries and few for easy
        ones; ``None`` probes as many for all.
      overretrieve: candidates kept by estimate, as a multiple (>= 1) of ``rescore``; the best
        ``rescore`` distinct rows of them are rescored. For rows that lie in two leaves
        (``soar_lambda``), whose copies would take two places. ``None`` is 2 for such rows where
        ``rescore`` is below 3 k, else 1.
      recall_target: expected share of the candidates that the Pallas kernels find, in (0, 1]. Below
        1 they keep the best slot of each bin, which saves memory traffic and selection; other
        implementations pass over it. See :func:`xla_kernels.tree_search`.
      allowed: boolean mask ``[n]`` or ``[b, n]`` of rows that may be returned. Where it allows
        few rows (n / 64, or 4,096 if that is more) they are scored exactly; where it allows more,
        up to 16 times as many leaves are probed, so that recall does not fall.
      implementation: of the scan, ``"cpu"`` (compiled kernel), ``"pallas_tpu"`` or ``"pallas_gpu"``
        (never run on a device), ``"xla"``, or ``None`` for the best that can run.

    Returns:
      ``SearchResult(scores, ids)``, ``float32`` and ``int32`` of shape ``[b, k]``. Scores are
      inner products, cosines or negated squared distances, best first; ids are row numbers
      (:func:`avq_jax.user_ids` gives the user's). Equal scores: lowest row first. Where fewer
      than k rows are found, or the query is not finite: id -1 and score -inf.

    Raises:
      TypeError: k, leaves_to_search or rescore not integers; allowed not boolean.
      ValueError: another query width than the index, k below 1, 0 < rescore < k, adaptive or
        overretrieve out of range, a mask of the wrong length.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> found = avq_jax.search(index, x[:2], k=3, leaves_to_search=10)
    >>> found.ids.shape
    (2, 3)

    Reference:
      Guo et al., 2020, section 5.3.
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    plain = type(recall_target) is float and recall_target == 1.0
    plain = plain and allowed is None and type(queries) is np.ndarray
    if plain and implementation in (None, "cpu"):
        settings = (k, leaves_to_search, rescore, adaptive, overretrieve)
        found = _few_from_host(index, queries, settings)
        if found is not None:
            return found
    rows, single = as_queries(queries, width=index.dim)
    more = (adaptive, overretrieve, recall_target)
    effort = effort_of(index, k, leaves_to_search, rescore, implementation, *more)
    mask = _as_mask(allowed, rows.shape[0], index.num_rows)
    result = _search(index, rows, mask, effort)
    return SearchResult(result.scores[0], result.ids[0]) if single else result


# A third of the time of `jnp.asarray` on each.
_as_arrays = jax.jit(lambda result: result)


def _few_from_host(index: Index, queries: np.ndarray, settings: tuple) -> SearchResult | None:
    """Search eagerly without JAX's dispatch, which takes longer than a search."""
    k, leaves, rescore, *rest = settings
    # By type: 3.0 equals 3, and must not find what is kept for it.
    if not all(value is None or type(value) is int for value in (k, leaves, rescore)):
        return None
    if not all(value is None or type(value) in (int, float) for value in rest):
        return None
    find = bound(index, settings, lambda: effort_of(index, k, leaves, rescore, None, *rest))
    if find is None:
        return None
    rows, single = host_queries(queries, index.dim)
    found = find(rows) if len(rows) <= DIRECT_QUERIES else None
    if found is None:
        return None
    scores, ids = (a[0] for a in found) if single else found
    return _as_arrays(SearchResult(scores, ids))


@functools.partial(jax.jit, static_argnames="effort")
def _search(
    index: Index, queries: Float[Array, "b d"], allowed: Bool[Array, "*b n"] | None, effort: Effort
) -> SearchResult:
    b = queries.shape[0]
    if b == 0 or index.num_rows == 0:
        scores = jnp.full((b, effort.k), -jnp.inf, jnp.float32)
        return SearchResult(scores, jnp.full((b, effort.k), -1, jnp.int32))
    probes = probes_of(queries, index.metric)
    if index.tree is None:
        found = _search_rows(index.store, probes.q, allowed, probes.usable, effort.k, index.metric)
    else:
        found = _search_tree(index, probes.q, allowed, probes.usable, effort)
    return result_of(probes, *found)


class Probes(NamedTuple):
    """Queries made ready for a search.

    Attributes:
      q: ``[b, d]`` what is searched for.
      factor: ``[b]`` of its scores.
      usable: ``bool[b]``, false where a query is not finite.
    """

    q: Any
    factor: Any
    usable: Any


def probes_of(queries: Float[Array, "b d"], metric: str) -> Probes:
    """Queries of length 1 for cosines, of moderate size for products, and none that is not finite.

    >>> probes_of(jnp.array([[3.0, 4.0]]), "cosine").q.tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    usable = jnp.all(jnp.isfinite(queries), axis=1)
    q = jnp.where(usable[:, None], queries, 0)
    factor = jnp.ones(queries.shape[0], jnp.float32)
    if metric == "cosine":
        q = unit(q)
    elif metric == "dot":
        # Scores scale along with the query; a power of two keeps them inside float32.
        largest = jnp.max(jnp.abs(jax.lax.stop_gradient(q)), axis=1)
        extreme = (largest > _LARGE) | (largest < 1 / _LARGE)
        factor = jnp.where(extreme, power_of_two(largest), factor)
        q = q / factor[:, None]
    return Probes(q, factor, usable)


def result_of(
    probes: Probes, scores: Float[Array, "b k"], ids: Int32[Array, "b k"]
) -> SearchResult:
    """The result of a search for ``probes``."""
    found = (ids >= 0) & probes.usable[:, None]
    scores = jnp.clip(jnp.where(found, scores, 0) * probes.factor[:, None], -_MAX, _MAX)
    return SearchResult(jnp.where(found, scores, -jnp.inf), jnp.where(found, ids, -1))


def _search_tree(
    index: Index, q: Array, allowed: Any, usable: Array, effort: Effort
) -> tuple[Array, Array]:
    """Search leaves, codes and, for rescoring, rows."""
    if allowed is None:
        return _probe(index, index.tree.packed, q, effort)

    def one(q: Array, mask: Array, usable: Array) -> tuple[Array, Array]:
        return filtered_search(
            index,
            mask,
            leaves=effort.leaves_to_search,
            rescore=effort.rescore,
            probe=lambda tree, leaves: _probe(
                index, tree, q, effort._replace(leaves_to_search=leaves)
            ),
            score=lambda store, valid: _search_rows(
                store, q, valid, usable, effort.k, index.metric
            ),
        )

    if allowed.ndim == 1:
        return one(q, allowed, usable)
    found = jax.lax.map(lambda z: one(z[0][None], z[1], z[2][None]), (q, allowed, usable))
    return found[0][:, 0], found[1][:, 0]


def _probe(index: Index, tree: PackedTree, q: Array, effort: Effort) -> tuple[Array, Array]:
    store = index.store if effort.rescore else None
    seen = index.tree.scanned(q)
    scores, ids = tree_search(
        tree,
        seen,
        row_queries=None if seen is q else q,
        deviations=effort.adaptive,
        retrieve=effort.retrieve,
        recall_target=effort.recall_target,
        k=effort.k,
        leaves_to_search=effort.leaves_to_search,
        rescore=effort.rescore,
        rows=None if store is None else store.rows,
        row_scale=None if store is None else store.scale,
        euclidean=index.metric == "l2",
        implementation=effort.implementation,
    )
    if index.metric == "l2" and not effort.rescore:
        # <q, x> - ||x||^2 / 2 back to -||q - x||^2
        scores = 2 * scores - jnp.sum(seen * seen, axis=1, keepdims=True)
    return scores, ids


def _search_rows(
    store: Store, q: Array, allowed: Any, usable: Array, k: int, metric: str
) -> tuple[Array, Array]:
    """Score all rows by one product, and the best of them again one by one."""
    n = store.rows.shape[0]
    euclidean = metric == "l2"

    def one(args):
        q, rough, mask, ok = args
        mask = allowed if mask is None else mask
        ok = ok if store.held is None else ok & store.held
        rough = jnp.where(ok if mask is None else ok & mask, rough, -jnp.inf)
        # The selection has no gradient; the scores of what it selects are computed again.
        top, rows = jax.lax.top_k(rough, min(n, max(4 * k, k + _SPARE)))
        exact = row_scores(store.rows, store.scale, q, rows, euclidean=euclidean)
        exact = jnp.where(top > -jnp.inf, jnp.maximum(exact, -_MAX), -jnp.inf)
        return best_rows(exact, rows.astype(jnp.int32), k)

    def tile(args):
        q, mask, ok = args
        fixed, probe = jax.lax.stop_gradient((store, q))
        rough = rough_scores(fixed, probe, metric=metric)
        return jax.lax.map(one, (q, rough, mask, ok))

    b = q.shape[0]
    each = allowed if allowed is not None and allowed.ndim == 2 else None
    # Written so that a batch of symbolic size divides too (jax.export).
    tiles = (b + _TILE - 1) // _TILE

    def in_tiles(a: Array) -> Array:
        a = jnp.pad(a, ((0, tiles * _TILE - b),) + ((0, 0),) * (a.ndim - 1))
        return a.reshape(tiles, _TILE, *a.shape[1:])

    scores, ids = jax.lax.map(tile, jax.tree.map(in_tiles, (q, each, usable)))
    return scores.reshape(tiles * _TILE, k)[:b], ids.reshape(tiles * _TILE, k)[:b]


def searcher(
    index: Index,
    *,
    k: int = 10,
    leaves_to_search: int | None = None,
    rescore: int | None = None,
    adaptive: float | None = None,
    overretrieve: float | None = None,
    recall_target: float = 1.0,
    allowed: Any = None,
    implementation: Implementation | None = None,
) -> Callable[[Any], SearchResult]:
    """Make a handle for serving loops: NumPy in and out, compiled once for each batch size.

    Args:
      index: from :func:`avq_jax.build`.
      k: results a query.
      leaves_to_search: as in :func:`search`.
      rescore: as in :func:`search`.
      adaptive: as in :func:`search`.
      overretrieve: as in :func:`search`.
      recall_target: as in :func:`search`.
      allowed: boolean mask ``[n]`` of rows that may be returned, as in :func:`search`; what it
        takes to look at those alone is made once, so that a search costs no more for it.
      implementation: as in :func:`search`.

    Returns:
      A callable from queries, ``[b, d]`` or ``[d]``, to ``SearchResult`` of NumPy arrays. It may
      be called from many threads.

    Raises:
      TypeError, ValueError: as :func:`search`.

    >>> import avq_jax, jax, numpy as np
    >>> x = np.asarray(jax.random.normal(jax.random.key(0), (1000, 16)))
    >>> find = avq_jax.searcher(avq_jax.build(jax.random.key(1), x), k=3)
    >>> type(find(x[0]).ids), find(x[:5]).ids.shape
    (<class 'numpy.ndarray'>, (5, 3))
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    if is_traced(index):
        raise TypeError("searcher needs concrete arrays; inside jit call search instead")
    more = (adaptive, overretrieve, recall_target)
    effort = effort_of(index, k, leaves_to_search, rescore, implementation, *more)
    index = jax.tree.map(jnp.asarray, index)
    kept = None
    if allowed is not None:
        mask = np.asarray(_as_mask(allowed, None, index.num_rows))
        index, leaves, kept = restrict(
            index, mask, leaves=effort.leaves_to_search, rescore=effort.rescore
        )
        effort = effort._replace(leaves_to_search=leaves)

    direct = bind(index, effort)

    @functools.lru_cache(maxsize=64)
    def compiled(b: int) -> Callable:
        shape = jax.ShapeDtypeStruct((b, index.dim), jnp.float32)
        return _search.lower(index, shape, None, effort).compile()

    def find(queries: Any) -> SearchResult:
        rows, single = host_queries(queries, index.dim)
        found = direct(rows) if direct is not None and len(rows) <= DIRECT_QUERIES else None
        if found is None:
            found = compiled(len(rows))(index, rows, None)
        scores, ids = np.asarray(found[0]), np.asarray(found[1])
        if kept is not None and len(kept):
            ids = np.where(ids >= 0, kept[np.maximum(ids, 0)], -1)
        result: Any = SearchResult
        return result(scores[0], ids[0]) if single else result(scores, ids)

    return find
