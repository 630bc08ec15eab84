"""Tuning: the cheapest search settings that reach a recall."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from avq_jax.checks import as_count, as_queries
from avq_jax.mips.exact import brute_force
from avq_jax.mips.index import Index
from avq_jax.mips.searcher import searcher
from avq_jax.progress import steps
from xla_kernels.tree_search.effort import SURE_LEAVES

__all__ = ["Trial", "Tuned", "tune"]

_RESCORES = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 100)
# Larger leaf counts that are tried beyond the smallest that reaches the target.
_LARGER = 5
# From one number of leaves that is tried to the next.
_GROWTH = 1.2
_ROUNDS = 5
# Adaptive effort is tried for so many of the fewest leaves that suffice, on so many times as many
# leaves. 3.5 to 4 deviations suit word vectors; residuals of sentence vectors have fewer directions
# and need more.
_ADAPTED = 2
_ADAPTIVE_LEAVES = 1.6
_DEVIATIONS = (2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)
_TIMED_QUERIES = 200
_CHUNK = 64


class Trial(NamedTuple):
    """One setting tried: its recall on the choosing half and, if timed, seconds a query."""

    leaves_to_search: int
    rescore: int
    recall: float
    seconds: float | None = None
    adaptive: float | None = None


class Tuned(NamedTuple):
    """What :func:`tune` chose.

    Attributes:
      leaves_to_search: argument of :func:`avq_jax.search`.
      rescore: likewise.
      recall: recall k@k on the queries it was not chosen on.
      interval: confidence interval of that recall, 95 %.
      seconds: time of one query through :func:`avq_jax.searcher`.
      trials: every setting that was tried.
      adaptive: argument of :func:`avq_jax.search`; mostly ``None`` for low targets.
    """

    leaves_to_search: int
    rescore: int
    recall: float
    interval: tuple[float, float]
    seconds: float
    trials: list[Trial]
    adaptive: float | None = None


def tune(
    index: Index,
    queries: Any,
    *,
    k: int = 10,
    target_recall: float = 0.95,
    true_ids: Any = None,
    progress: bool | None = None,
) -> Tuned:
    """Find the cheapest search settings that reach a recall k@k.

    Queries of even number choose: for a growing number of leaves the smallest rescoring that
    reaches the target is found, and for more leaves the least adaptive effort that does; what
    reaches it is timed, query by query, in interleaved rounds. Queries of odd number, unseen so
    far, give the recall reported.

    Args:
      index: from :func:`avq_jax.build`.
      queries: ``[b, d]`` like those to come, at least 2; some hundreds make the interval narrow.
      k: results a query.
      target_recall: in (0, 1].
      true_ids: ``[b, >= k]`` exact row numbers, best first; ``None`` finds them by scoring all
        stored rows exactly.
      progress: show progress; ``None`` does in a terminal or notebook.

    Returns:
      :class:`Tuned`.

    Raises:
      ValueError: fewer than 2 queries, a target outside (0, 1], no true ids for an index without
        stored rows, or a target that no setting reaches (names the best recall).

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (400, 8))
    >>> index = avq_jax.build(jax.random.key(1), x)
    >>> tune(index, x[:20], k=3).recall
    1.0
    """
    from avq_jax.evaluation.metrics import query_recalls, recall_interval

    queries = np.asarray(as_queries(queries, width=index.dim)[0])
    k = min(as_count(k, name="k"), index.num_rows)
    if not 0 < target_recall <= 1:
        raise ValueError(f"target_recall must be above 0 and at most 1; got {target_recall}")
    if len(queries) < 2:
        raise ValueError(f"queries must be at least 2, one to choose on, one to report; "
                         f"got {len(queries)}")  # fmt: skip
    truth = _truth(index, queries, k, true_ids)
    chosen_on, reported_on = (slice(0, None, 2), slice(1, None, 2))

    def timed(trials: list[Trial]) -> list[Trial]:
        some = queries[chosen_on][:_TIMED_QUERIES]
        handles = [
            searcher(
                index, k=k, leaves_to_search=t.leaves_to_search, rescore=t.rescore,
                adaptive=t.adaptive,
            )
            for t in trials
        ]  # fmt: skip
        best = [np.inf] * len(trials)
        for handle in handles:
            handle(some[0])
        for _ in steps(_ROUNDS, "timing", progress):
            for i, handle in enumerate(handles):
                start = time.perf_counter()
                for q in some:
                    handle(q)
                best[i] = min(best[i], (time.perf_counter() - start) / len(some))
        return [t._replace(seconds=s) for t, s in zip(trials, best, strict=True)]

    if index.tree is None:
        trials = tried = [Trial(1, 0 if index.store is None else k, 1.0)]
    else:
        tried = _reaching(index, queries[chosen_on], truth[chosen_on], k, target_recall, progress)
        tried += _adaptive(index, queries[chosen_on], truth[chosen_on], k, target_recall, tried)
        trials = [t for t in tried if t.recall >= target_recall]
        if not trials:
            best = max(tried, key=lambda t: t.recall)
            raise ValueError(
                f"target_recall must be reachable by this index; got {target_recall}, and the "
                f"best found is {best.recall:.4f} with {best.leaves_to_search} leaves and "
                f"rescore {best.rescore}: build with more bytes a code or stored rows"
            )
    trials = timed(trials)
    best = min(trials, key=lambda t: t.seconds or 0.0)
    find = searcher(
        index, k=k, leaves_to_search=best.leaves_to_search, rescore=best.rescore,
        adaptive=best.adaptive,
    )  # fmt: skip
    recalls = query_recalls(find(queries[reported_on])[1], truth[reported_on], k=k)
    done = {(*t[:2], t.adaptive) for t in trials}
    left = [t for t in tried if (*t[:2], t.adaptive) not in done]
    return Tuned(
        best.leaves_to_search,
        best.rescore,
        float(np.mean(recalls)),
        recall_interval(recalls),
        best.seconds or 0.0,
        sorted(trials + left, key=lambda t: (*t[:2], t.adaptive is not None, t.adaptive or 0.0)),
        best.adaptive,
    )


def _truth(index: Index, queries: np.ndarray, k: int, true_ids: Any) -> np.ndarray:
    if true_ids is not None:
        truth = np.asarray(true_ids)
        if truth.ndim != 2 or truth.shape[0] != len(queries) or truth.shape[1] < k:
            raise ValueError(
                f"true_ids must have {len(queries)} rows of at least {k}; got {truth.shape}"
            )
        return truth[:, :k]
    if index.store is None:
        raise ValueError("true_ids must be given for an index that stores no rows; got None")
    return np.asarray(brute_force(queries, _rows(index), k=k, metric=index.metric).ids)


def _rows(index: Index) -> np.ndarray:
    rows = np.asarray(index.store.rows).astype(np.float32, copy=False)
    return rows if index.store.scale is None else rows * np.asarray(index.store.scale)[:, None]


def _reaching(
    index: Index,
    queries: np.ndarray,
    truth: np.ndarray,
    k: int,
    target: float,
    progress: bool | None,
) -> list[Trial]:
    """Settings on the border of the target: for each number of leaves the least rescoring."""
    leaves: list[int] = []
    count = 1.0
    while count < index.num_leaves:
        if not leaves or round(count) > leaves[-1]:
            leaves.append(round(count))
        count *= _GROWTH
    leaves.append(index.num_leaves)
    rescores = [0]
    if index.store is not None:
        rescores += sorted({min(index.num_rows, round(k * factor)) for factor in _RESCORES})
    tried: dict[int, list[Trial]] = {}

    def reaches(i: int) -> bool:
        if i not in tried:
            tried[i] = _recalls(index, queries, truth, k, leaves[i], rescores)
        return any(t.recall >= target for t in tried[i])

    low, high = 0, len(leaves) - 1
    for _ in steps(len(leaves).bit_length(), "tuning", progress):
        if low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle + 1, high)
    for i in range(low, min(low + 1 + _LARGER, len(leaves))):
        reaches(i)
    border = []
    for trials in tried.values():
        enough = [t for t in trials if t.recall >= target]
        border.append(enough[0] if enough else max(trials, key=lambda t: t.recall))
        if len(enough) > 1 and enough[0].rescore == 0:
            border.append(enough[1])
    return border


def _adaptive(
    index: Index,
    queries: np.ndarray,
    truth: np.ndarray,
    k: int,
    target: float,
    tried: list[Trial],
) -> list[Trial]:
    """For more leaves than suffice without, the least adaptive effort that reaches the target."""
    enough = [t for t in tried if t.recall >= target and t.rescore]
    found: list[Trial] = []
    for base in sorted(enough, key=lambda t: t.leaves_to_search)[:_ADAPTED]:
        leaves = min(index.num_leaves, round(_ADAPTIVE_LEAVES * base.leaves_to_search))
        if base.leaves_to_search <= SURE_LEAVES or leaves == base.leaves_to_search:
            continue
        low, high = 0, len(_DEVIATIONS)
        while low < high:
            middle = (low + high) // 2
            deviations = _DEVIATIONS[middle]
            find = searcher(
                index, k=k, leaves_to_search=leaves, rescore=base.rescore, adaptive=deviations
            )
            recall = _share(np.asarray(find(queries)[1]), truth)
            found.append(Trial(leaves, base.rescore, recall, None, deviations))
            low, high = (low, middle) if recall >= target else (middle + 1, high)
    return found


def _recalls(
    index: Index,
    queries: np.ndarray,
    truth: np.ndarray,
    k: int,
    leaves: int,
    rescores: list[int],
) -> list[Trial]:
    """Recall at every rescoring from one search: the best of a longer list hold a shorter one."""
    find = searcher(index, k=max(k, rescores[-1]), leaves_to_search=leaves, rescore=0)
    ids = np.asarray(find(queries)[1])
    recalls = [_share(ids[:, :k], truth)]
    if index.store is not None:
        exact = np.concatenate(
            [
                _exact(index, queries[a : a + _CHUNK], ids[a : a + _CHUNK])
                for a in range(0, len(ids), _CHUNK)
            ]
        )
        for rescore in rescores[1:]:
            order = np.argsort(-exact[:, :rescore], axis=1, kind="stable")[:, :k]
            recalls.append(_share(np.take_along_axis(ids, order, axis=1), truth))
    return [Trial(leaves, r, recall) for r, recall in zip(rescores, recalls, strict=True)]


def _share(ids: np.ndarray, truth: np.ndarray) -> float:
    from avq_jax.evaluation.metrics import query_recalls

    return float(np.mean(query_recalls(ids, truth)))


def _exact(index: Index, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    at = np.maximum(ids, 0)
    x = np.asarray(index.store.rows)[at].astype(np.float32)
    if index.store.scale is not None:
        x = x * np.asarray(index.store.scale)[at][..., None]
    if index.metric == "l2":
        scores = -np.sum((queries[:, None, :] - x) ** 2, axis=2)
    else:  # a cosine orders alike whatever the length of the query
        scores = np.einsum("bd,brd->br", queries, x)
    return np.where(ids >= 0, scores, -np.inf)
