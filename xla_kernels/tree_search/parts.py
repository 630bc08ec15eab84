"""The parts of a search, for trees whose leaves are shared out: ranking, candidates, choice."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import implementations
from ..varying import ffi_call
from . import cpu, pallas, xla
from .api import Backends, Implementation, as_leaves, choose, kernel_options
from .effort import Effort, leaves_ranked
from .packed import PackedTree

# Places for candidates that equal the last, as the compiled kernel keeps them.
_EQUALS = 16


def _leaves_by_xla(*args: Any, kernel: Any, **options: Any) -> jax.Array:
    del kernel
    return xla.rank_leaves(*args, **options)


def _no_floor(tree: Any, queries: Any, leaves: Any, **options: Any) -> jax.Array:
    del tree, leaves, options
    return jnp.zeros_like(queries[:, 0]) - jnp.inf


_FLOOR = Backends(_no_floor, cpu.last_estimate, _no_floor)
_LEAVES = Backends(xla.rank_leaves, cpu.rank_leaves, _leaves_by_xla)
_CANDIDATES = Backends(xla.candidates, cpu.candidates, pallas.candidates)


def tree_leaves(
    tree: PackedTree,
    queries: Any,
    *,
    leaves_to_search: int,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Rank the leaves of a tree: those that `tree_search` would scan.

    Args:
      tree: from `pack_tree`.
      queries: ``float32[b, d]``.
      leaves_to_search: P, at least 1; more than there are means all.
      implementation: as of `tree_search`.
      interpret: as of `tree_search`.

    Returns:
      ``int32[b, P]``, best first, -1 where fewer are ranked and for queries that are not finite.

    Raises:
      ValueError: ``leaves_to_search`` below 1, or an implementation that cannot run.
    """
    if leaves_to_search < 1:
        raise ValueError(f"leaves_to_search must be at least 1; got {leaves_to_search}")
    queries = jax.lax.stop_gradient(jnp.asarray(queries, jnp.float32))
    run = choose(_LEAVES, tree, queries, implementation, kernel_options(1.0, interpret))
    probed = min(leaves_to_search, tree.centroids.shape[0])
    ranked = leaves_ranked(tree, probed)
    return run(tree, queries, leaves_to_search=probed, leaves_ranked=ranked)


def tree_floor(
    tree: PackedTree,
    queries: Any,
    leaves: Any,
    *,
    retrieve: int,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Scan a few leaves for an estimate below which no slot can be among the best of more leaves.

    Args:
      tree: from `pack_tree`.
      queries: ``float32[b, d]``.
      leaves: ``int32[b, P]``, -1 for none.
      retrieve: slots that a search keeps.
      implementation: as of `tree_search`.
      interpret: as of `tree_search`.

    Returns:
      ``float32[b]`` the estimate of the last of the ``retrieve`` best slots of these leaves, of
      large ones of their first ``16 retrieve``, by the compiled kernel; -inf by others, which gain
      nothing from it, and where there are fewer slots.

    Raises:
      ValueError: ``retrieve`` below 1, or an implementation that cannot run.
    """
    if retrieve < 1:
        raise ValueError(f"retrieve must be at least 1; got {retrieve}")
    queries = jax.lax.stop_gradient(jnp.asarray(queries, jnp.float32))
    leaves = as_leaves(leaves, queries)
    run = choose(_FLOOR, tree, queries, implementation, kernel_options(1.0, interpret))
    return run(tree, queries, leaves, retrieve=retrieve)


def tree_candidates(
    tree: PackedTree,
    queries: Any,
    leaves: Any,
    *,
    retrieve: int,
    k: int = 1,
    floor: Any = None,
    recall_target: float = 1.0,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Scan chosen leaves for the candidates that `tree_search` would rescore.

    Estimates of a query may be compared between trees that share codewords, such as parts of one
    tree: the compiled kernel's are of tables rounded to 8 bits, the same in all of them.

    Args:
      tree: from `pack_tree`.
      queries: ``float32[b, d]``.
      leaves: ``int32[b, P]`` leaves, best first and -1 for none; those without slots cost nothing.
      retrieve: slots to find.
      k: results wanted from them; other implementations than the compiled kernel find 2 k at least.
      floor: ``float32[b]`` estimates below which slots need not be found; see `tree_floor`.
      recall_target: as of `tree_search`.
      implementation: as of `tree_search`.
      interpret: as of `tree_search`.

    Returns:
      Estimates ``float32[b, c]`` and rows ``int32[b, c]`` in any order, a row once for each slot;
      -inf and -1 where there are fewer. c is a little more than ``retrieve``: slots whose estimates
      equal the last may be there too.

    Raises:
      ValueError: arguments out of range, or an implementation that cannot run.
    """
    if retrieve < 1 or k < 1:
        raise ValueError(f"retrieve and k must be at least 1; got {retrieve} and {k}")
    queries = jax.lax.stop_gradient(jnp.asarray(queries, jnp.float32))
    leaves = as_leaves(leaves, queries)
    options = kernel_options(recall_target, interpret)
    run = choose(_CANDIDATES, tree, queries, implementation, options)
    probed = max(1, leaves.shape[1])
    # Rescoring, as far as the number of slots that are kept is concerned.
    effort = Effort(k, probed, leaves_ranked(tree, probed), math.inf, retrieve, retrieve)
    width = min(max(retrieve, 2 * k) + _EQUALS, max(tree.slot_rows.shape[0], 1))
    if floor is None:
        floor = jnp.full(queries.shape[0], -jnp.inf, jnp.float32)
    return run(tree, queries, leaves, floor, effort=effort, width=width)


def best_candidates(
    scores: Any,
    rows: Any,
    *,
    retrieve: int,
    keep: int,
    k: int = 1,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Choose among candidates of several parts of a tree, as a search of the whole would.

    Args:
      scores: ``float32[p, b, c]``, lists of p parts.
      rows: ``int32[p, b, c]``, -1 for none.
      retrieve: of so many of the best,
      keep: the best distinct rows, best first; where ``keep >= retrieve`` all, copies of rows too
        and in any order, and those that equal the last where the compiled kernel chooses.
      k: as of `tree_candidates`.
      implementation: ``"cpu"``; None for that where it runs; any other means plain XLA.

    Returns:
      Scores ``float32[b, w]`` and rows ``int32[b, w]``, -inf and -1 where there are fewer; w is
      ``keep`` where ``keep < retrieve``.

    Raises:
      ValueError: ``retrieve`` or ``keep`` below 1, lists of another shape.

    Gradients are those of the scores kept, with respect to ``scores``.

    Example:
      >>> import numpy as np
      >>> scores = np.array([[[1.0, 3.0]], [[2.0, 3.0]]], np.float32)
      >>> rows = np.array([[[4, 5]], [[6, 5]]], np.int32)
      >>> best_candidates(scores, rows, retrieve=4, keep=2)[1].tolist()
      [[5, 6]]
    """
    if retrieve < 1 or keep < 1:
        raise ValueError(f"retrieve and keep must be at least 1; got {retrieve} and {keep}")
    scores, rows = jnp.asarray(scores), jnp.asarray(rows)
    if scores.ndim != 3 or scores.shape != rows.shape:
        raise ValueError(f"scores and rows must be [p, b, c]; got {scores.shape} and {rows.shape}")
    parts, b, size = scores.shape
    most = max(retrieve, 2 * k) if keep >= retrieve else retrieve
    width = keep if keep < retrieve else min(most + _EQUALS, parts * size)

    def compiled(scores: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = (
            jax.ShapeDtypeStruct((b, width), jnp.float32),
            jax.ShapeDtypeStruct((b, width), jnp.int32),
        )
        return tuple(
            ffi_call(
                "xla_kernels_best_candidates",
                out,
                *(scores, rows),
                vmap_method="sequential",
                retrieve=np.int64(retrieve),
                keep=np.int64(keep),
            )
        )

    def plain(scores: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        more = keep if keep < retrieve else most
        lists = (a.swapaxes(0, 1).reshape(b, parts * size) for a in (scores, rows))
        return _best_by_xla(*lists, retrieve=most, keep=more, width=width)

    name = implementations.resolve(implementation if implementation in (None, "cpu") else "xla")

    @jax.custom_jvp
    def best(scores: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return implementations.choose(name, compiled, plain, scores, rows)

    @best.defjvp
    def best_jvp(primals: Any, tangents: Any) -> Any:
        out = best(*primals)
        none = np.zeros(out[1].shape, jax.dtypes.float0)
        if parts * size == 0:
            return out, (jnp.zeros_like(out[0]), none)
        flat, flat_rows, change = (
            a.swapaxes(0, 1).reshape(b, parts * size) for a in (*primals, tangents[0])
        )
        # A score kept is the best of its row, and that of the first such place.
        same = (out[1][:, :, None] == flat_rows[:, None]) & (out[0][:, :, None] == flat[:, None])
        change = jnp.take_along_axis(change, jnp.argmax(same, axis=2), axis=1)
        return out, (jnp.where(out[1] >= 0, change, 0), none)

    return best(scores, rows)


def _best_by_xla(
    scores: jax.Array, rows: jax.Array, *, retrieve: int, keep: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """`best_candidates` without those that equal the last."""
    less, rows = jax.lax.sort((jnp.where(rows >= 0, -scores, jnp.inf), rows), num_keys=2)
    less, rows = (a[:, : min(retrieve, a.shape[1])] for a in (less, rows))
    kept = less < jnp.inf
    if keep < retrieve:
        kept = kept & jax.vmap(lambda r: xla.first_distinct(r, keep))(rows)
    _, less, rows = jax.lax.sort((~kept, less, rows), num_keys=1, is_stable=True)
    place = jax.lax.broadcasted_iota(jnp.int32, kept.shape, 1)
    kept = place < jnp.sum(kept, axis=1, keepdims=True)
    pad = ((0, 0), (0, max(0, width - rows.shape[1])))
    scores = jnp.pad(jnp.where(kept, -less, -jnp.inf), pad, constant_values=-jnp.inf)
    return scores[:, :width], jnp.pad(jnp.where(kept, rows, -1), pad, constant_values=-1)[:, :width]
