r"""Softmax over many classes from few of them: the best by search, the rest by a sample.

With U the classes found for a batch (the best k of each query and the labels) and S one class
drawn uniformly from each of l equal ranges of class numbers,

.. math:: \hat Z = \sum_{i \in U} e^{y_i} + \sum_{j \in S \setminus U} s_j e^{y_j},

s_j the size of the range. It is an unbiased estimate of Z = sum_i exp(y_i) whatever U is, so a
search that misses classes, or an index older than its rows, costs variance and not bias. The
batch shares U and S: logits are one matrix product, and a class has one gradient row.

Reference: Mussmann, Levy and Ermon, "Fast Amortized Inference and Learning in Log-linear Models
with Randomly Perturbed Nearest Neighbor Search", 2017 (their sample is uniform over all classes).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from avq_jax.checks import as_count, as_queries, is_traced
from avq_jax.layers.sparse import gather_rows
from avq_jax.mips import Index, search

__all__ = [
    "LogSumExp",
    "SoftmaxClasses",
    "log_sum_exp",
    "softmax_classes",
    "softmax_cross_entropy",
]


class SoftmaxClasses(NamedTuple):
    """Classes that stand for all in a softmax over a batch; a pytree.

    Attributes:
      ids: ``int32[c]`` distinct class numbers; -1 is padding.
      log_weight: ``[c]`` logarithm of how many classes each stands for: 0 for those found, the
        size of the range for those sampled, -inf for padding.
      labels: ``int32[b]`` place of each query's label in ``ids``, or ``None``.
      kth: ``[b]`` estimated logit of the last of each query's k best.
    """

    ids: Int32[Array, " c"]
    log_weight: Float[Array, " c"]
    labels: Int32[Array, " b"] | None
    kth: Float[Array, " b"]


class LogSumExp(NamedTuple):
    """Estimate of log Z with bounds that hold with probability 1 - delta each query.

    Attributes:
      value: ``[b]``, differentiable.
      lower: ``[b]``.
      upper: ``[b]``.
    """

    value: Float[Array, " b"]
    lower: Float[Array, " b"]
    upper: Float[Array, " b"]


def _check_index(index: Any) -> None:
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    if index.metric != "dot":
        raise ValueError(f"index must have the metric 'dot', whose scores are logits; got {index}")


def softmax_classes(
    key: Array,
    index: Index,
    hidden: Any,
    labels: Any = None,
    *,
    k: int,
    num_samples: int,
    leaves_to_search: int | None = None,
    rescore: int | None = 0,
) -> SoftmaxClasses:
    """Choose the classes from which a batch estimates its softmax.

    Args:
      key: a typed key, fresh at every step.
      index: of the class rows, metric ``"dot"``. Rows that have changed since it was built are
        found less well and counted right all the same.
      hidden: ``[b, d]`` queries; a class's logit is their inner product with its row.
      labels: ``int32[b]`` classes that must be among the chosen, or ``None``.
      k: best classes of each query to look for.
      num_samples: l, classes sampled from all; at most n.
      leaves_to_search: as in :func:`avq_jax.search`.
      rescore: as in :func:`avq_jax.search`; 0 trusts the codes.

    Returns:
      :class:`SoftmaxClasses` of b k + l places (and b more with labels); no gradient.

    Raises:
      TypeError: not an index, counts that are not integers.
      ValueError: another metric than ``"dot"``, counts out of range, labels of another shape.

    >>> import avq_jax, jax
    >>> rows = jax.random.normal(jax.random.key(0), (1000, 8))
    >>> index = avq_jax.build(jax.random.key(1), rows)
    >>> classes = softmax_classes(jax.random.key(2), index, rows[:4], k=20, num_samples=50)
    >>> classes.ids.shape
    (130,)
    """
    _check_index(index)
    rows, _ = as_queries(hidden, width=index.dim, name="hidden")
    k = as_count(k, name="k")
    num_samples = as_count(num_samples, name="num_samples")
    if num_samples > index.num_rows:
        raise ValueError(
            f"num_samples must be at most the number of classes, {index.num_rows}; "
            f"got {num_samples}"
        )
    if labels is not None:
        labels = jnp.asarray(labels)
        if labels.shape != rows.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"labels must be integers [{rows.shape[0]}], one a row of hidden; "
                f"got {labels.dtype} {labels.shape}"
            )
        labels = labels.astype(jnp.int32)
    found = search(
        jax.lax.stop_gradient(index),
        jax.lax.stop_gradient(jnp.asarray(rows)),
        k=k,
        leaves_to_search=leaves_to_search,
        rescore=None if index.tree is None else rescore,
    )
    return _classes(key, found.ids, found.scores[:, -1], labels, num_samples, index.num_rows)


@functools.partial(jax.jit, static_argnames=("num_samples", "n"))
def _classes(
    key: Array,
    found: Int32[Array, "b k"],
    kth: Float[Array, " b"],
    labels: Int32[Array, " b"] | None,
    num_samples: int,
    n: int,
) -> SoftmaxClasses:
    union = found.reshape(-1)
    if labels is not None:
        union = jnp.concatenate([union, labels])
    union = jnp.sort(jnp.where(union < 0, n, union))  # padding last
    again = jnp.concatenate([jnp.zeros(1, bool), union[1:] == union[:-1]])
    usable = (union < n) & ~again
    # Ranges [starts_j, starts_j+1) whose sizes differ by one at most.
    starts = (np.arange(num_samples + 1, dtype=np.int64) * n // num_samples).astype(np.int32)
    sizes = np.diff(starts)
    drawn = jnp.minimum(
        (jax.random.uniform(key, (num_samples,)) * sizes.astype(np.float32)).astype(jnp.int32),
        sizes - 1,
    )
    drawn = drawn + starts[:-1]
    at = jnp.searchsorted(union, drawn)
    fresh = union[jnp.minimum(at, len(union) - 1)] != drawn
    return SoftmaxClasses(
        ids=jnp.concatenate([jnp.where(usable, union, -1), jnp.where(fresh, drawn, -1)]),
        log_weight=jnp.concatenate(
            [
                jnp.where(usable, jnp.float32(0), -jnp.inf),
                jnp.where(fresh, np.log(sizes).astype(np.float32), -jnp.inf),
            ]
        ),
        labels=None if labels is None else jnp.searchsorted(union, labels).astype(jnp.int32),
        kth=jax.lax.stop_gradient(kth),
    )


def softmax_cross_entropy(
    hidden: Float[Array, "b d"], rows: Float[Array, "c d"], classes: SoftmaxClasses
) -> Float[Array, " b"]:
    r"""Estimate the cross-entropy ``log Z - y_label`` of a softmax over all classes.

    Differentiate it in ``hidden`` and in the gathered ``rows``: the gradient of the class table is
    :class:`SparseRows` ``(classes.ids, gradient of rows)``, ready for :func:`sparse_update`, and
    no array of the size of the table is made.

    Args:
      hidden: ``[b, d]`` queries.
      rows: ``[c, d]`` present rows of the classes, ``gather_rows(table, classes.ids)``.
      classes: from :func:`softmax_classes`, with labels.

    Returns:
      ``[b]`` losses. The estimate of Z is unbiased, that of log Z low by half its relative
      variance.

    Raises:
      ValueError: classes without labels.

    >>> import avq_jax, jax
    >>> table = jax.random.normal(jax.random.key(0), (1000, 8))
    >>> index, labels = avq_jax.build(jax.random.key(1), table), jax.numpy.arange(4)
    >>> hidden = 2 * table[:4]
    >>> classes = softmax_classes(jax.random.key(2), index, hidden, labels, k=50, num_samples=200)
    >>> loss, gradient = jax.value_and_grad(
    ...     lambda rows: softmax_cross_entropy(hidden, rows, classes).mean()
    ... )(gather_rows(table, classes.ids))
    >>> gradient.shape  # of 404 class rows, not of 1000
    (404, 8)
    >>> exact = jax.nn.logsumexp(hidden @ table.T, axis=1) - (hidden * table[:4]).sum(axis=1)
    >>> bool(abs(loss - exact.mean()) < 0.02)
    True
    """
    if classes.labels is None:
        raise ValueError("classes must have labels: pass labels to softmax_classes")
    logits = hidden @ rows.T
    total = jax.nn.logsumexp(logits + classes.log_weight[None, :], axis=1)
    return total - jnp.take_along_axis(logits, classes.labels[:, None], axis=1)[:, 0]


def log_sum_exp(
    key: Array,
    index: Index,
    hidden: Any,
    *,
    k: int,
    num_samples: int,
    table: Float[Array, "n d"] | None = None,
    delta: float = 0.05,
    slack: Any = 0.0,
    leaves_to_search: int | None = None,
    rescore: int | None = None,
) -> LogSumExp:
    r"""Estimate ``log sum_i exp(<hidden, row_i>)`` over all classes, with bounds on its error.

    No class outside U has a larger logit than the k-th best found, y_k, if the search is exact
    (by more than ``slack`` otherwise). With s the size of a range, every sampled term lies in
    [0, A], :math:`A = s e^{y_k + slack}`, and has a variance of at most A times its mean, so by
    Bernstein's inequality the sampled part T of Z has, with probability 1 - delta,

    .. math:: |\hat T - T| \le \sqrt{2 A T L} + A L / 3, \quad L = \log(2 / \delta).

    The bounds solve this for T. As A <= n Z / (k l) before any search, the relative error of Z is
    at most :math:`\epsilon + \epsilon^2 / 6`, :math:`\epsilon = \sqrt{2 n L / (k l)}`:
    k = l = 16 sqrt(n L) gives about 9 per cent, for every distribution; peaked ones do far better.

    Args:
      key: a typed key.
      index: of the class rows, metric ``"dot"``.
      hidden: ``[b, d]`` queries.
      k: best classes of each query to look for.
      num_samples: l, classes sampled from all.
      table: ``[n, d]`` present class rows; ``None`` for those stored in the index. A gradient in
        the table is dense; see :func:`softmax_cross_entropy` for a sparse one.
      delta: probability that the bounds of a query fail, between 0 and 1.
      slack: most by which the search may miss: a class not found has a logit of at most
        ``y_k + slack``. 0 is an exact search.
      leaves_to_search: as in :func:`avq_jax.search`.
      rescore: as in :func:`avq_jax.search`; ``None`` is its default.

    Returns:
      :class:`LogSumExp`.

    Raises:
      TypeError: not an index, counts that are not integers.
      ValueError: another metric than ``"dot"``, counts or delta out of range, an index without
        stored float rows and no table.

    >>> import avq_jax, jax
    >>> rows = jax.random.normal(jax.random.key(0), (2000, 8))
    >>> index = avq_jax.build(jax.random.key(1), rows)
    >>> got = log_sum_exp(jax.random.key(2), index, rows[:3], k=100, num_samples=200)
    >>> exact = jax.nn.logsumexp(rows[:3] @ rows.T, axis=1)
    >>> bool(((got.lower <= exact) & (exact <= got.upper)).all())
    True
    """
    _check_index(index)
    if not is_traced(delta) and not 0 < float(delta) < 1:
        raise ValueError(f"delta must be between 0 and 1; got {delta}")
    if table is None:
        if index.store is None or index.store.rows.dtype == jnp.int8:
            raise ValueError("table must be given where the index stores no float rows")
        table = index.store.rows
    queries, _ = as_queries(hidden, width=index.dim, name="hidden")
    queries = jnp.asarray(queries)
    classes = softmax_classes(
        key,
        index,
        queries,
        k=k,
        num_samples=num_samples,
        leaves_to_search=leaves_to_search,
        rescore=rescore if rescore is not None or index.store is None else max(10 * k, 100),
    )
    logits = queries @ gather_rows(table, classes.ids).astype(jnp.float32).T
    value = jax.nn.logsumexp(logits + classes.log_weight[None, :], axis=1)
    fixed = jax.lax.stop_gradient(logits)
    sampled = jnp.arange(fixed.shape[1]) >= fixed.shape[1] - num_samples

    def part(which: Array) -> Array:
        weight = jnp.where(which, classes.log_weight, -jnp.inf)
        return jax.nn.logsumexp(fixed + weight[None, :], axis=1)

    best = jnp.max(fixed + classes.log_weight[None, :], axis=1)
    found, tail = jnp.exp(part(~sampled) - best), jnp.exp(part(sampled) - best)
    size = -(-index.num_rows // num_samples)
    gap = jnp.asarray(slack, jnp.float32)
    a = size * jnp.exp(classes.kth + gap - best) * jnp.log(2 / jnp.asarray(delta, jnp.float32))
    # sqrt(T) <= sqrt(a / 2) + sqrt(a / 2 + a / 3 + T^)
    most = (jnp.sqrt(a / 2) + jnp.sqrt(a * (5 / 6) + tail)) ** 2
    least = jnp.maximum(jnp.sqrt(jnp.maximum(tail + a / 6, 0)) - jnp.sqrt(a / 2), 0) ** 2
    return LogSumExp(value, jnp.log(found + least) + best, jnp.log(found + most) + best)
