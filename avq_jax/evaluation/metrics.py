"""Recall and relative error, the measures of Section 5."""

import math
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avq_jax.checks import as_count, is_traced

__all__ = ["query_recalls", "recall_1_at_n", "recall_interval", "recall_k_at_k", "relative_error"]

_TIE = 1e-6  # scores closer than this, relatively, are one score summed in two orders


def query_recalls(
    ids: Any, true_ids: Any, *, k: Any = None, scores: Any = None, true_scores: Any = None
) -> Float[Array | np.ndarray, "b"]:
    """Give each query's recall k@k: the fraction of its true best k among the first k returned.

    By ids alone, each true id that was returned counts once. With both ``scores`` and
    ``true_scores``, ties are forgiven: a returned row counts, once, if its exact score reaches
    the k-th true score to 1e-6 relative. An id of -1 never counts.

    Args:
        ids: [b, >= k] returned row numbers or user ids, best first.
        true_ids: [b, >= k] the exact answer, best first, -1 where fewer than k rows exist.
        k: how many of each to compare; None is the width of ``ids``.
        scores: [b, >= k] exact scores of the returned rows, larger is better.
        true_scores: [b, >= k] scores of the true rows.

    Returns:
        [b] in [0, 1]; NaN for a query that has no true row. NumPy float64, or a JAX array under
        a trace.

    Raises:
        ValueError: shapes that disagree, fewer than k columns, or one of the two scores alone.

    >>> query_recalls([[1, 2], [3, -1]], [[2, 5], [3, 4]]).tolist()
    [0.5, 0.5]
    """
    xp = jnp if is_traced(ids, true_ids, scores, true_scores) else np
    ids, true_ids = _matrix(xp, ids, "ids"), _matrix(xp, true_ids, "true_ids")
    k = ids.shape[1] if k is None else k
    k = as_count(k, name="k")
    ids, true_ids = _first(ids, k, "ids"), _first(true_ids, k, "true_ids")
    _same_rows(ids, true_ids, "true_ids")
    real = true_ids >= 0
    if scores is None and true_scores is None:
        hits = (real[:, :, None] & (true_ids[:, :, None] == ids[:, None, :])).any(axis=2)
    elif scores is None or true_scores is None:
        missing = "scores" if scores is None else "true_scores"
        raise ValueError(f"scores and true_scores must be given together, {missing} is None")
    else:
        scores = _first(_matrix(xp, scores, "scores"), k, "scores")
        true_scores = _first(_matrix(xp, true_scores, "true_scores"), k, "true_scores")
        _same_rows(ids, scores, "scores")
        _same_rows(ids, true_scores, "true_scores")
        worst = xp.where(real, true_scores, xp.inf).min(axis=1, keepdims=True)
        reached = scores >= worst - xp.abs(worst) * _TIE
        earlier = xp.tril(xp.ones((k, k), bool), -1)
        repeated = ((ids[:, :, None] == ids[:, None, :]) & earlier[None]).any(axis=2)
        hits = reached & ~repeated & (ids >= 0)
    total = real.sum(axis=1)
    found = xp.minimum(hits.sum(axis=1), total)
    return xp.where(total > 0, found / xp.maximum(total, 1), xp.nan)


def recall_k_at_k(
    ids: Any, true_ids: Any, *, k: Any = None, scores: Any = None, true_scores: Any = None
) -> Any:
    """Give recall k@k, the mean fraction of the true best k among the first k returned.

    The measure of Figure 4b (recall 10@10) and of ann-benchmarks. Arguments and the treatment
    of ties and of -1 as in ``query_recalls``; queries that have no true row are left out.

    Args:
        ids: [b, >= k] returned ids, best first.
        true_ids: [b, >= k] the exact answer.
        k: how many of each to compare; None is the width of ``ids``.
        scores: [b, >= k] exact scores of the returned rows, to forgive ties.
        true_scores: [b, >= k] scores of the true rows, to forgive ties.

    Returns:
        A float in [0, 1] (a JAX scalar under a trace); NaN without any query.

    Raises:
        ValueError: shapes that disagree, fewer than k columns, or one of the two scores alone.

    >>> recall_k_at_k([[1, 2], [3, -1]], [[2, 5], [3, 4]])
    0.5

    Reference: Section 5.3 of the paper.
    """
    return _mean(query_recalls(ids, true_ids, k=k, scores=scores, true_scores=true_scores))


def recall_1_at_n(ids: Any, true_ids: Any, *, n: Any = None) -> Any:
    """Give recall 1@n, the share of queries whose true best row is among the first n returned.

    Args:
        ids: [b, >= n] returned ids, best first.
        true_ids: [b] or [b, any], the exact answer, best first; only the first column counts.
        n: how many returned rows to look at; None is the width of ``ids``.

    Returns:
        A float in [0, 1] (a JAX scalar under a trace); NaN without any query. Queries whose true
        id is -1 are left out.

    Raises:
        ValueError: shapes that disagree, or fewer than n columns.

    >>> recall_1_at_n([[1, 2, 3], [4, 5, 6]], [2, 9], n=2)
    0.5

    Reference: Section 5.2 of the paper, Figure 4a.
    """
    xp = jnp if is_traced(ids, true_ids) else np
    true_ids = xp.asarray(true_ids)
    best = true_ids[:, None] if true_ids.ndim == 1 else _matrix(xp, true_ids, "true_ids")
    ids = _matrix(xp, ids, "ids")
    ids = _first(ids, as_count(ids.shape[1] if n is None else n, name="n"), "ids")
    best = _first(best, 1, "true_ids")
    _same_rows(ids, best, "true_ids")
    found = (ids == best).any(axis=1)
    return _mean(xp.where(best[:, 0] >= 0, xp.where(found, 1.0, 0.0), xp.nan))


def relative_error(estimate: Any, exact: Any) -> Any:
    r"""Give the mean relative error of estimated scores.

    .. math:: \text{mean} \left| \frac{\langle q, x \rangle - \langle q, \tilde x \rangle}
              {\langle q, x \rangle} \right|

    The paper takes for x the true best row of each query (Figure 3b).

    Args:
        estimate: scores from the codes, any shape.
        exact: exact scores of the same pairs, same shape. Pairs whose exact score is zero have
            no relative error and are left out.

    Returns:
        A float, at least 0 (a JAX scalar under a trace); NaN if no pair is left.

    Raises:
        ValueError: shapes that differ.

    >>> relative_error([0.75, 2.5], [1.0, 2.0])
    0.25

    Reference: Section 5.1 of the paper.
    """
    xp = jnp if is_traced(estimate, exact) else np
    estimate, exact = xp.asarray(estimate), xp.asarray(exact)
    if estimate.shape != exact.shape:
        raise ValueError(
            f"estimate and exact must have one shape, got {estimate.shape} and {exact.shape}"
        )
    if xp is np:
        estimate, exact = estimate.astype(np.float64), exact.astype(np.float64)
    usable = exact != 0
    safe = xp.where(usable, exact, xp.ones_like(exact))
    return _mean(xp.where(usable, xp.abs((exact - estimate) / safe), xp.nan))


def recall_interval(recalls: Any, *, confidence: Any = 0.95) -> tuple[float, float]:
    """Give a confidence interval of the mean recall (Wilson's score interval).

    A query is one trial. For fractions between 0 and 1 the variance is at most that of a coin
    of the same mean, so for recall k@k the interval errs on the wide side; it stays inside
    [0, 1] and is honest at a recall of 0 or 1.

    Args:
        recalls: [b] recall of each query, in [0, 1], as ``query_recalls`` gives; NaN is left out.
        confidence: in (0, 1).

    Returns:
        (low, high).

    Raises:
        ValueError: no query, a recall outside [0, 1], or a confidence outside (0, 1).

    >>> low, high = recall_interval([1.0] * 95 + [0.0] * 5)
    >>> round(low, 3), round(high, 3)
    (0.888, 0.978)

    Reference: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    values = np.asarray(recalls, np.float64).reshape(-1)
    values = values[~np.isnan(values)]
    if not values.size:
        raise ValueError("recalls must hold at least one query, got none")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"recalls must lie in [0, 1], got values from {values.min()} to {values.max()}"
        )
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    mean, count = float(values.mean()), values.size
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count)
    half *= math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def _mean(values: Any) -> Any:
    """Mean of what is not NaN; a Python float outside a trace."""
    if isinstance(values, np.ndarray | np.generic):
        values = np.asarray(values)[~np.isnan(values)]
        return float(values.mean()) if values.size else math.nan
    return jnp.nanmean(values)


def _matrix(xp: Any, values: Any, name: str) -> Any:
    values = xp.asarray(values)
    if values.ndim != 2:
        raise ValueError(f"{name} must have two axes (queries, results), got shape {values.shape}")
    return values


def _first(values: Any, count: int, name: str) -> Any:
    if values.shape[1] < count:
        raise ValueError(f"{name} must have at least {count} columns, got shape {values.shape}")
    return values[:, :count]


def _same_rows(ids: Any, other: Any, name: str) -> None:
    if ids.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have as many rows as ids, {ids.shape[0]}, got {other.shape[0]}"
        )
