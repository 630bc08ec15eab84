"""Why a row was or was not returned: leaf rank, errors of its codes, and the stage that lost it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from avq_jax.checks import as_count, as_queries, as_rows
from avq_jax.loss import residuals
from avq_jax.mips.effort import Effort, effort_of
from avq_jax.mips.index import Index
from avq_jax.mips.projection import lift
from avq_jax.mips.searcher import search
from avq_jax.quantization import Codes, decode
from xla_kernels import code_rows
from xla_kernels.tree_search.effort import SURE_LEAVES
from xla_kernels.tree_search.xla import SPARE, highest_estimates

__all__ = ["Copy", "Explanation", "explain"]

_CHUNK = 1 << 16

_STAGES = {
    "returned": "returned",
    "pruning": "lost to pruning: none of its leaves was probed; raise leaves_to_search (or "
    "adaptive)",
    "quantization": "lost to quantization: its leaf was probed, but its codes scored it below the "
    "candidates that were rescored; raise rescore",
    "rescoring": "lost to rescoring: it was a candidate, but the stored row scores below the "
    "exact one; store rows in a wider type",
    "outranked": "not lost: k rows that score at least as much were returned",
}


class Copy(NamedTuple):
    """A place of the row in the tree.

    Attributes:
      leaf: its leaf.
      leaf_rank: place of that leaf among all, 1 for the first that the query probes.
      probed: whether the search probed it.
      approximate: score by the codes.
      parallel: error of the codes along the row, ``<x - x~, x> / ||x||``.
      orthogonal: norm of the error across it.
    """

    leaf: int
    leaf_rank: int
    probed: bool
    approximate: float
    parallel: float
    orthogonal: float


class Explanation(NamedTuple):
    """What :func:`explain` found; prints as a few lines.

    Attributes:
      id: user id of the row, or its number.
      row: number of the row.
      stage: ``"returned"``, ``"pruning"``, ``"quantization"``, ``"rescoring"`` or ``"outranked"``.
      place: place in the result, 1 for the best, or ``None``.
      exact: exact score, of the vector given, else of the stored row.
      stored: score of the stored row, or ``None`` without stored rows.
      exact_rank: place of that score among all stored rows, or ``None`` without.
      last: score of the last result, -inf where fewer than k were found.
      candidate_bar: estimate of the last candidate that was rescored, or of the last result
        without rescoring; ``None`` without a tree.
      copies: the places of the row in the tree, one or, with spilling, two.
      k: of the search, like the next two.
      leaves_to_search: leaves probed.
      rescore: candidates rescored.
    """

    id: int
    row: int
    stage: str
    place: int | None
    exact: float
    stored: float | None
    exact_rank: int | None
    last: float
    candidate_bar: float | None
    copies: tuple[Copy, ...]
    k: int
    leaves_to_search: int
    rescore: int

    def __repr__(self) -> str:
        where = f" at place {self.place} of {self.k}" if self.place else ""
        rank = "" if self.exact_rank is None else f", rank {self.exact_rank} of all rows"
        lines = [
            f"{self.id}: {_STAGES[self.stage]}{where}",
            f"  exact score {self.exact:.6g}{rank}; the last of the {self.k} results has "
            f"{self.last:.6g}",
        ]
        if self.stored is not None and self.stored != self.exact:
            lines.append(f"  the stored row scores {self.stored:.6g}")
        lines += [
            f"  leaf {copy.leaf}, rank {copy.leaf_rank} "
            f"({'probed' if copy.probed else 'not probed'}, {self.leaves_to_search} were): "
            f"codes score {copy.approximate:.6g}, error {copy.parallel:+.3g} along the row and "
            f"{copy.orthogonal:.3g} across it"
            for copy in self.copies
        ]
        if self.candidate_bar is not None:
            last = f"of {self.rescore} candidates" if self.rescore else "of the results"
            lines.append(f"  the last {last} has the estimate {self.candidate_bar:.6g}")
        return "\n".join(lines)


def explain(
    index: Index,
    query: Any,
    id: Any,
    *,
    vector: Any = None,
    k: int = 10,
    leaves_to_search: int | None = None,
    rescore: int | None = None,
    adaptive: float | None = None,
    overretrieve: float | None = None,
) -> Explanation:
    """Tell why a search does or does not return a row.

    Args:
      index: from :func:`avq_jax.build`.
      query: ``[d]``.
      id: user id of the row, or its number in an index without user ids.
      vector: ``[d]`` the row as it was before it was stored; ``None`` takes the stored row.
      k: of the search to be explained.
      leaves_to_search: likewise.
      rescore: likewise.
      adaptive: likewise.
      overretrieve: likewise.

    Returns:
      :class:`Explanation`. Leaves are ranked in float32 here, where the compiled kernel ranks in
      16-bit integers: at the border a leaf may be one place off.

    Raises:
      TypeError: an id that is not an integer, or arguments as in :func:`avq_jax.search`.
      ValueError: an unknown id, a query that is not one finite row of the right width, no vector
        for an index without stored rows.

    >>> import avq_jax, jax, numpy as np
    >>> x = np.array([[1, 0], [2, 0], [3, 0]] * 11)
    >>> index = avq_jax.build(jax.random.key(0), x)
    >>> explain(index, [1.0, 0.0], 2, k=4)
    2: returned at place 1 of 4
      exact score 3, rank 1 of all rows; the last of the 4 results has 3
    >>> explain(index, [1.0, 0.0], 1, k=4).stage
    'outranked'
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    effort = effort_of(index, k, leaves_to_search, rescore, None, adaptive, overretrieve)
    queries, single = as_queries(query, width=index.dim)
    if not single or not np.isfinite(queries).all():
        raise ValueError(f"query must be one finite row of width {index.dim}; got {query!r}")
    row = _row_of(index, id)
    if vector is None and index.store is None:
        raise ValueError("vector must be given for an index that stores no rows; got None")
    q = _unit(np.asarray(queries[0])) if index.metric == "cosine" else np.asarray(queries[0])
    stored = None if index.store is None else _stored(index, np.array([row]))[0]
    if vector is None:
        x: Any = stored
    else:
        x = np.asarray(as_rows(np.asarray(vector, np.float32)[None], name="vector"))[0]
        x = _unit(x) if index.metric == "cosine" else x

    options: Any = {"k": effort.k, "leaves_to_search": effort.leaves_to_search or None}
    found = search(
        index, queries[0], rescore=effort.rescore, adaptive=adaptive, overretrieve=overretrieve,
        **options,
    )  # fmt: skip
    ids, last = np.asarray(found.ids), float(np.asarray(found.scores)[-1])
    exact = float(_score(index.metric, q, x[None])[0])
    own = None if stored is None else float(_score(index.metric, q, stored[None])[0])
    copies: tuple[Copy, ...] = ()
    bar = None
    if index.tree is not None:
        wide = {**options, "k": max(effort.rescore, effort.k)}
        estimates = np.asarray(search(index, queries[0], rescore=0, **wide).scores)
        bar = float(estimates[-1])
        copies = _copies(index, q, x, row, effort)
    place = int(np.argmax(ids == row)) + 1 if (ids == row).any() else None
    rank = None if own is None else _rank(index, q, own)
    if place:
        stage = "returned"
    elif exact <= last if effort.rescore or not copies else (rank or 0) > effort.k:
        stage = "outranked"
    elif copies and not any(copy.probed for copy in copies):
        stage = "pruning"
    elif copies and (not effort.rescore or (own is not None and own > last)):
        stage = "quantization"
    else:
        stage = "rescoring"
    return Explanation(
        int(id), row, stage, place, exact, own, rank, last, bar, copies,
        effort.k, effort.leaves_to_search, effort.rescore,
    )  # fmt: skip


def _row_of(index: Index, id: Any) -> int:
    number = as_count(id, name="id", minimum=0)
    if index.ids is None:
        if number >= index.num_rows:
            raise ValueError(f"id must be below the number of rows, {index.num_rows}; got {id}")
        return number
    words = np.asarray(index.ids)
    same = (words[:, 0] == number >> 32) & (words[:, 1] == number & 0xFFFFFFFF)
    if not same.any():
        raise ValueError(f"id must be one of the index; got {id}")
    return int(np.argmax(same))


def _unit(x: np.ndarray) -> np.ndarray:
    norm = float(np.linalg.norm(x.astype(np.float64)))
    return (x / norm).astype(np.float32) if norm > 0 else x


def _stored(index: Index, rows: Any) -> np.ndarray:
    x = np.asarray(index.store.rows[rows]).astype(np.float32)
    if index.store.scale is not None:
        x = x * np.asarray(index.store.scale[rows])[:, None]
    return x


def _score(metric: str, q: np.ndarray, x: np.ndarray) -> np.ndarray:
    return -np.sum((q - x) ** 2, axis=1) if metric == "l2" else x @ q


def _rank(index: Index, q: np.ndarray, score: float) -> int:
    above = 0
    for start in range(0, index.num_rows, _CHUNK):
        scores = _score(index.metric, q, _stored(index, slice(start, start + _CHUNK)))
        # Beyond what another order of summation changes, so that the row itself does not count.
        above += int(np.sum(scores > score + 1e-6 * abs(score)))
    return above + 1


def _copies(
    index: Index, q: np.ndarray, x: np.ndarray, row: int, effort: Effort
) -> tuple[Copy, ...]:
    tree = index.tree
    slots = np.flatnonzero(np.asarray(tree.packed.slot_rows) == row)
    leaves = np.searchsorted(np.asarray(tree.packed.starts), slots // tree.packed.block, "right")
    leaves = leaves - 1
    codes = code_rows(tree.packed.codes, jnp.asarray(slots))
    centroids = np.asarray(tree.centroids)
    gains = tree.packed.gains
    scale = None if gains is None else gains.levels[gains.level[slots].astype(np.int32)]
    near = centroids[leaves] + np.asarray(decode(tree.codebook, Codes(codes, scale)))
    whole = lift(tree.projection, len(x), jnp.asarray(near))
    parallel, across = residuals(jnp.broadcast_to(x, whole.shape), whole)
    q = np.asarray(tree.scanned(q))
    estimates = near @ q
    ranking = np.asarray(tree.ranking) @ q
    if index.metric == "l2":
        ranking = ranking + np.asarray(tree.leaf_offset)
        estimates = 2 * (estimates + np.asarray(tree.offset)[slots]) - q @ q
    ranks = 1 + np.sum(ranking[None, :] > ranking[leaves][:, None], axis=1)
    norm = max(float(np.linalg.norm(x)), float(np.finfo(np.float32).tiny))
    along = np.asarray(parallel) @ x / norm
    across = np.linalg.norm(np.asarray(across), axis=1)
    probed = ranks <= effort.leaves_to_search
    if effort.adaptive is not None:
        probed &= (ranks <= SURE_LEAVES) | _reached(index, q, leaves, effort, effort.adaptive)
    columns = (leaves, ranks, probed, estimates, along, across)
    kinds = (int, int, bool, float, float, float)
    return tuple(
        Copy(*(kind(value) for kind, value in zip(kinds, values, strict=True)))
        for values in sorted(zip(*columns, strict=True), key=lambda c: c[1])
    )


def _reached(
    index: Index, seen: np.ndarray, leaves: np.ndarray, effort: Effort, deviations: float
) -> np.ndarray:
    """Whether adaptive effort probes leaves beyond the first, for a query as it is scanned."""
    packed = index.tree.packed
    flat = dataclasses.replace(
        index, tree=index.tree._replace(projection=None), store=None, dim=index.tree.width
    )
    kept = effort.retrieve or effort.rescore or 2 * effort.k + SPARE
    first = search(flat, seen, k=kept, leaves_to_search=SURE_LEAVES, rescore=0).scores
    bar = float(np.asarray(first)[-1])
    if index.metric == "l2":
        bar = (bar + float(seen @ seen)) / 2
    mean = packed.centroids[leaves] @ jnp.asarray(seen)
    numbers = jnp.asarray(leaves)
    return np.asarray(
        highest_estimates(packed, jnp.asarray(seen), numbers, mean, deviations) >= bar
    )
