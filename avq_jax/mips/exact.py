"""Exact search: the ground truth of every recall, and the answer for small tables."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.checks import (
    as_count,
    as_queries,
    as_recall_target,
    as_rows,
    check_finite,
    is_traced,
)

__all__ = ["METRICS", "SearchResult", "brute_force"]

METRICS = ("dot", "cosine", "l2")

_QUERY_BLOCK = 256
_BLOCK_ELEMENTS = 2**20  # scores held at a time: 4 MB
_MAXIMA_ELEMENTS = 2**24  # group maxima held at a time: 64 MB at most
_GATHER_ELEMENTS = 2**22  # floats gathered at a time by the rescoring: 16 MB
_ROW_BLOCK = 2**14
_GROUP = 16  # adjacent rows that share one maximum
_SPARE = 4  # groups beyond k, for rows that the selection ranks a rounding error apart
_SAMPLE = 256  # rows that set the origin and the unit of the l2 selection
_MAX = float(jnp.finfo(jnp.float32).max)


class SearchResult(NamedTuple):
    """The best rows of each query, best first.

    ``scores`` (float32, larger is better) and ``ids`` (int32 row numbers) have the shape [b, k],
    or [k] for a single query. Where fewer than k rows qualify the rest is id -1, score -inf.
    """

    scores: Float[Array, "*b k"]
    ids: Int32[Array, "*b k"]


def brute_force(
    queries: Any, x: Any, *, k: Any, metric: str = "dot", recall_target: Any = 1.0
) -> SearchResult:
    r"""Search all rows of ``x`` exactly.

    The score of row x for query q is :math:`\langle q, x \rangle` for ``"dot"``,
    :math:`\langle q, x \rangle / (\|q\| \|x\|)` for ``"cosine"`` (0 where either is zero) and
    :math:`-\|q - x\|^2` for ``"l2"``. Rows are scored block by block with a running top-k, so
    memory stays at a few megabytes beside the data. The winners are scored again one by one,
    l2 by differences: scores neither depend on the batch nor suffer from cancellation.

    Works eagerly and under ``jit`` (k, metric and recall_target static), ``vmap`` and ``grad``.
    Scores are differentiable in both arrays; ids have no gradient. Float16 and bfloat16 are
    computed in float32. A NumPy ``x`` is handed to the device on every call: for many calls pass
    ``jnp.asarray(x)``.

    Args:
        queries: [b, d] or [d].
        x: [n, d], finite. Under a trace, where values cannot be checked, a row with NaN or Inf
            is never returned.
        k: results a query, at least 1; it may exceed n.
        metric: ``"dot"``, ``"cosine"`` or ``"l2"``.
        recall_target: in (0, 1]; below 1 a TPU picks the rows to be scored exactly by
            ``jax.lax.approx_max_k``, which finds that share of them in the mean and is much
            faster than sorting. Elsewhere the search is exact all the same.

    Returns:
        ``SearchResult(scores, ids)``, [b, k] each or [k] for a single query, best first. Equal
        scores: the lowest row first. A query with NaN or Inf has ids -1 and scores -inf. Scores
        too large for float32 are the largest float32.

    Raises:
        TypeError: k is not an integer, or an array does not hold real numbers.
        ValueError: k < 1, an unknown metric, a recall_target outside (0, 1], another width, or a
            row of x with NaN or Inf.

    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    >>> scores, ids = brute_force([1.0, 0.0], x, k=2)
    >>> ids.tolist(), scores.tolist()
    ([2, 0], [3.0, 1.0])
    >>> brute_force([1.0, 0.0], x, k=2, metric="l2").ids.tolist()
    [0, 1]

    Reference: Section 2.1 of the paper, Equation (1).
    """
    k = as_count(k, name="k")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    target = as_recall_target(recall_target)
    rows = as_rows(x, name="x", min_rows=0, finite=False)
    batch, single = as_queries(queries, width=rows.shape[1])
    result, suspect = _brute_force(batch, rows, k=k, metric=metric, target=target)
    if not is_traced(suspect, rows) and bool(suspect):
        check_finite(rows, name="x")
    if single:
        return SearchResult(result.scores[0], result.ids[0])
    return result


@functools.partial(jax.jit, static_argnames=("k", "metric", "target"))
def _brute_force(
    queries: Float[Array, "b d"], x: Float[Array, "n d"], *, k: int, metric: str, target: float
) -> tuple[SearchResult, Bool[Array, ""]]:
    b, n = queries.shape[0], x.shape[0]
    kept = min(k, n)
    if b == 0 or kept == 0:
        scores = jnp.full((b, k), -jnp.inf, jnp.float32)
        ids = jnp.full((b, k), -1, jnp.int32)
        return SearchResult(scores, ids), ~jnp.all(jnp.isfinite(x))
    usable = jnp.isfinite(queries).all(axis=1)
    safe = jnp.where(usable[:, None], queries, jnp.float32(0))
    fixed = lax.stop_gradient((safe, x))
    groups, suspect = _best_groups(*fixed, count=kept + _SPARE, metric=metric, target=target)
    size = _group_size(n)

    def select(args):
        q, starts, floors, ok = args
        rows = (starts[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]).reshape(-1)
        alive = ok & (rows >= jnp.repeat(floors, size)) & (rows < n)
        scores, _ = _exact_scores(q, fixed[1][jnp.minimum(rows, n - 1)], metric=metric)
        # Without the second condition a NaN would rank first.
        scores = jnp.where(alive & jnp.isfinite(scores), scores, -jnp.inf)
        best, order = lax.top_k(scores, kept)
        return jnp.where(best > -jnp.inf, rows[order], -1)

    def rescore(args):
        q, rows = args
        scores, factor = _exact_scores(q, x[jnp.maximum(rows, 0)], metric=metric)
        best, order = lax.top_k(jnp.where(rows >= 0, scores, -jnp.inf), kept)
        found = best > -jnp.inf
        best = jnp.clip(jnp.where(found, best, jnp.float32(0)) * factor * factor, -_MAX, _MAX)
        return jnp.where(found, best, -jnp.inf), jnp.where(found, rows[order], -1)

    rows = _map(select, (fixed[0], *groups, usable), groups[0].shape[1] * size * x.shape[1])
    scores, ids = _map(rescore, (safe, rows), kept * x.shape[1])
    padding = ((0, 0), (0, k - kept))
    scores = jnp.pad(scores, padding, constant_values=-jnp.inf)
    ids = jnp.pad(ids, padding, constant_values=-1)
    return SearchResult(scores, ids), suspect


def _map(function, args, elements):
    """Map over queries, as many at a time as ``elements`` gathered for each allow."""
    at_a_time = max(1, _GATHER_ELEMENTS // elements)
    if args[0].shape[0] <= at_a_time:
        return jax.vmap(function)(args)
    return lax.map(function, args, batch_size=at_a_time)


def _exact_scores(
    q: Float[Array, "d"], x: Float[Array, "r d"], *, metric: str
) -> tuple[Float[Array, "r"], Float[Array, ""]]:
    """Scores over f^2 and f, a power of two that keeps them inside float32."""
    if metric == "l2":
        difference = q[None, :] - x
        factor = power_of_two(lax.stop_gradient(jnp.abs(difference).max()))
        return -jnp.square(difference / factor).sum(axis=1), factor
    if metric == "cosine":
        unit = _normalize(x)
        return (_normalize(q[None, :]) * unit).sum(axis=1), jnp.float32(1)
    largest = jnp.abs(lax.stop_gradient(q)).max()
    factor = jnp.where(largest > 2.0**20, jnp.float32(2.0**60), jnp.float32(1))
    return (q[None, :] / factor / factor * x).sum(axis=1), factor


def _group_size(n: int) -> int:
    return min(_GROUP, n)


def _best_groups(
    queries: Float[Array, "b d"],
    x: Float[Array, "n d"],
    *,
    count: int,
    metric: str,
    target: float,
) -> tuple[tuple[Int32[Array, "b g"], Int32[Array, "b g"]], Bool[Array, ""]]:
    """Find the groups of adjacent rows with the ``count`` best maxima; they hold the best rows.

    Gives the first row of each group, ascending, the first row that counts in it (a group of the
    last block may reach into the block before), and whether a row of x is not finite.
    """
    b, d = queries.shape
    n = x.shape[0]
    # The order of a query's scores does not change with its length; this length cannot overflow.
    largest = power_of_two(jnp.abs(queries).max(axis=1, keepdims=True))
    if metric == "l2":
        origin, unit = _origin_and_unit(x)
        shrink = jnp.maximum(largest / unit, jnp.float32(1))
        queries = (queries / unit - origin[None, :]) / shrink / jnp.float32(d)
    else:
        origin, unit, shrink = jnp.zeros(d, jnp.float32), jnp.float32(1), jnp.ones_like(largest)
        queries = queries / largest / jnp.float32(d)

    def one_block(args):
        q, shrink = args
        return _scan(q, shrink, x, origin, unit, count=count, metric=metric, target=target)

    size = max(1, min(_QUERY_BLOCK, _MAXIMA_ELEMENTS * _group_size(n) // n))
    if b <= size:
        return one_block((queries, shrink))
    whole = b - b % size
    split = jax.tree.map(lambda a: a[:whole].reshape(-1, size, a.shape[1]), (queries, shrink))
    groups, suspect = lax.map(one_block, split)
    groups = jax.tree.map(lambda a: a.reshape(whole, a.shape[2]), groups)
    if whole < b:
        last, _ = one_block((queries[whole:], shrink[whole:]))
        groups = jax.tree.map(lambda a, z: jnp.concatenate([a, z]), groups, last)
    return groups, suspect.any()


def _scan(queries, shrink, x, origin, unit, *, count, metric, target):
    (b, d), n = queries.shape, x.shape[0]
    group = _group_size(n)
    # A slice of x is copied, so few scores take x in one piece; l2 would copy that.
    if b * n <= _BLOCK_ELEMENTS and (metric != "l2" or n <= _ROW_BLOCK):
        size = n
    else:
        size = min(n, _ROW_BLOCK, max(_BLOCK_ELEMENTS // b, 1024)) // group * group
    blocks, per_block = -(-n // size), -(-size // group)

    def maxima(start):
        first = jnp.minimum(start, n - size)  # the last block overlaps the one before it
        rows = x if blocks == 1 else lax.dynamic_slice_in_dim(x, first, size)
        if metric == "l2":
            rows = rows / unit - origin[None, :]
        # By default accelerators round the factors to bfloat16 or TF32, which might lose the best
        # rows; and a TPU first makes an array of all of them rounded.
        dimensions, highest = (((1,), (1,)), ((), ())), lax.Precision.HIGHEST
        products = lax.dot_general(queries, rows, dimensions, precision=highest)
        # A NaN or Inf in a row leaves no product with it finite: 0 * Inf is NaN as well.
        suspect = ~jnp.isfinite(products[0]).all()
        numbers = first + jnp.arange(size, dtype=jnp.int32)
        valid = jnp.isfinite(products) & (numbers >= start)[None, :]
        if metric == "cosine":
            products = products * _inverse_norms(rows)[None, :]
        elif metric == "l2":
            halves = jnp.square(rows).sum(axis=1) * jnp.float32(0.5 / d)
            products = jnp.maximum(products - halves[None, :] / shrink, -_MAX)
        products = jnp.where(valid, products, -jnp.inf)
        products = jnp.pad(
            products, ((0, 0), (0, per_block * group - size)), constant_values=-jnp.inf
        )
        return products.reshape(b, per_block, group).max(axis=2), suspect

    starts = jnp.arange(blocks, dtype=jnp.int32) * jnp.int32(size)
    if blocks == 1:
        best, suspect = maxima(starts[0])
    else:
        best, suspect = lax.map(maxima, starts)
        best = jnp.moveaxis(best, 0, 1).reshape(b, blocks * per_block)
    chosen = _highest(best, min(count, best.shape[1]), target)
    block, place = jnp.divmod(jnp.sort(chosen, axis=1), jnp.int32(per_block))
    start = block * jnp.int32(size)
    first = jnp.minimum(start, n - size) + place * jnp.int32(group)
    return (first, jnp.maximum(first, start)), suspect.any()


def _highest(best: Float[Array, "b g"], count: int, target: float) -> Int32[Array, "b c"]:
    """Columns of the ``count`` highest values, or on a TPU of nearly all of them."""

    def exactly(best):
        return lax.top_k(best, count)[1]

    if target == 1:
        return exactly(best)

    def nearly(best):
        return lax.approx_max_k(best, count, recall_target=target)[1]

    return lax.platform_dependent(best, tpu=nearly, default=exactly)


def _origin_and_unit(x: Float[Array, "n d"]) -> tuple[Float[Array, "d"], Float[Array, ""]]:
    """Give a point amid the data (over the unit) and the size of the data, from a sample.

    Squared distances about this origin lose no digits to a common offset of the data.
    """
    sample = x[:: max(1, x.shape[0] // _SAMPLE)]
    sample = jnp.where(jnp.isfinite(sample), sample, jnp.float32(0))
    sizes = jnp.sort(jnp.abs(sample).max(axis=1))
    unit = power_of_two(sizes[sizes.shape[0] // 2])
    return jnp.clip(sample / unit, -4.0, 4.0).mean(axis=0), unit


def power_of_two(value: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Give the power of two next to ``value`` (1 at zero): division by it is exact."""
    _, exponent = jnp.frexp(jnp.where(value > 0, value, jnp.float32(1)))
    return jnp.ldexp(jnp.ones_like(value), jnp.clip(exponent, -120, 120))


def _inverse_norms(x: Float[Array, "r d"]) -> Float[Array, "r"]:
    """1 / ||x||, 0 for a zero row; neither overflows nor underflows."""
    scale = power_of_two(jnp.abs(x).max(axis=1))
    squares = jnp.square(x / scale[:, None]).sum(axis=1)
    zero = squares == 0
    return jnp.where(zero, 0.0, lax.rsqrt(jnp.where(zero, 1.0, squares)) / scale)


def _normalize(x: Float[Array, "r d"]) -> Float[Array, "r d"]:
    """Rows of length one; a zero row stays zero and has gradient zero."""
    scaled = x / power_of_two(lax.stop_gradient(jnp.abs(x).max(axis=1, keepdims=True)))
    squares = jnp.square(scaled).sum(axis=1, keepdims=True)
    zero = squares == 0
    return jnp.where(zero, 0.0, scaled / jnp.sqrt(jnp.where(zero, 1.0, squares)))
