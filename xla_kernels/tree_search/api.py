"""Search of quantized rows in the leaves of a k-means tree, whichever implementation runs it."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from .. import implementations, library
from ..layout import POINTS_LAST
from ..varying import match_varying, varying_axes
from . import cpu, pallas, xla
from .effort import effort_of
from .packed import PackedTree

Implementation = Literal["xla", "cpu", "pallas_tpu", "pallas_gpu"]


def tree_search(
    tree: PackedTree,
    queries: Any,
    *,
    k: int,
    leaves_to_search: int,
    rescore: int = 0,
    rows: Any = None,
    row_scale: Any = None,
    row_queries: Any = None,
    usable: Any = None,
    leaves: Any = None,
    euclidean: bool = False,
    deviations: float | None = None,
    retrieve: int | None = None,
    recall_target: float = 1.0,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Rank leaves, scan the codes of the best, score the best candidates exactly.

    The estimate of a slot of leaf l is ``<q, centroids[l]> + gain sum_m table[m, codes[m]]`` (plus
    the slot's offset), with ``table`` the products of the query with the codewords. Scores are
    differentiable, forward and backward, in queries, tree and rows; ids have no gradient.

    Args:
      tree: from `pack_tree`.
      queries: ``float32[b, d]``.
      k: results a query, at least 1.
      leaves_to_search: leaves probed, at least 1; more than there are means all.
      rescore: candidates whose score is computed from ``rows``, at least k; 0 returns estimates.
        The compiled kernel chooses candidates by tables rounded to 8 bits.
      rows: ``float32``, ``bfloat16`` or ``int8[n, e]`` for the rescoring.
      row_scale: ``float32[n]`` factor of each int8 row.
      row_queries: ``float32[b, e]`` the queries for the rescoring, where rows are wider than what
        the tree quantizes; None takes ``queries``, and e = d.
      usable: ``bool[1 or b, S]`` slots that may be returned; None takes those of the tree. A slot
        without a row must not be usable.
      leaves: ``int32[b, P]`` leaves to scan instead of those that rank best, best first and -1 for
        none, as of `tree_leaves`; without ``rescore`` and ``deviations``.
      euclidean: exact scores are ``-||q - x||^2`` instead of ``<q, x>``.
      deviations: after its four best leaves a query passes over those whose estimates would have
        to lie more than so many deviations beyond their mean to reach the candidates held by then:
        ``<q, centroid> + deviations ||q|| spread``, as if residuals had random directions. 3 to 4
        save work where ``leaves_to_search`` is large; None passes over none.
      retrieve: slots kept by estimate, whose best ``rescore`` distinct rows are rescored; None
        takes ``rescore``, or twice that where rows lie in two leaves and few are rescored.
      recall_target: below 1, the Pallas kernels keep the best slot of each bin, of as many bins as
        give that expected share of the slots kept by estimate if these lie with equal chance
        anywhere in a quarter of the probed leaves; 1.0 gives each slot a bin of its own.
      implementation: ``"cpu"``, ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``, or None for the best
        that can run. The Pallas kernels choose candidates by scores of bfloat16's digits; they have
        never run on a device.
      interpret: run a Pallas kernel as plain JAX, slowly, where its device is missing.

    Returns:
      Scores ``float32[b, k]``, best first, and rows ``int32[b, k]``, each row once; -inf and -1
      where fewer are found, and for queries that are not finite.

    Raises:
      ValueError: arguments out of range, or an implementation that cannot run.

    Example:
      >>> import numpy as np
      >>> from xla_kernels import pack_tree, slots_per_block, tree_search
      >>> size = slots_per_block(2)
      >>> slots = np.full(2 * size, -1, np.int32)
      >>> slots[0], slots[size] = 7, 8
      >>> tree = pack_tree(
      ...     np.array([[1.0], [-1.0]]), [0, 1, 2], slots, np.zeros((1, 2, 1)),
      ...     np.zeros((2 * size, 1), np.uint8))
      >>> scores, ids = tree_search(tree, np.array([[3.0]], np.float32), k=2, leaves_to_search=2)
      >>> ids.tolist(), scores.tolist()
      ([[7, 8]], [[3.0, -3.0]])
    """
    effort = effort_of(
        tree,
        rows,
        k=k,
        leaves_to_search=leaves_to_search,
        rescore=rescore,
        deviations=deviations,
        retrieve=retrieve,
    )
    queries = jnp.asarray(queries, jnp.float32)
    if leaves is not None:
        leaves = as_leaves(leaves, queries)
        if rescore or deviations is not None:
            raise ValueError("rescore must be 0 and deviations None where leaves are given")
    rows, row_scale, row_queries, usable = (
        None if a is None else jnp.asarray(a) for a in (rows, row_scale, row_queries, usable)
    )
    options = kernel_options(recall_target, interpret)
    fits = not (euclidean and rows is not None and rows.dtype != jnp.float32)
    run = choose(_SEARCH, tree, queries, implementation, options, fits=fits)
    operands = (tree, queries, rows, row_scale, row_queries)

    @jax.custom_jvp
    def found(operands: Any, usable: Any, leaves: Any) -> Any:
        return run(*operands, usable, leaves, effort=effort, euclidean=euclidean)

    @found.defjvp
    def _rule(primals: Any, tangents: Any) -> Any:
        scores, ids = found(*primals)

        def scores_of(operands: Any) -> Any:
            return _scores_of(operands, ids, rescore=rescore, euclidean=euclidean)

        _, change = jax.jvp(scores_of, primals[:1], tangents[:1])

        nothing = np.zeros(ids.shape, jax.dtypes.float0)
        return (scores, ids), (jnp.where(ids >= 0, change, 0), nothing)

    return found(operands, usable, leaves)


def _scores_of(operands: Any, ids: jax.Array, *, rescore: int, euclidean: bool) -> jax.Array:
    """Scores of found rows as a differentiable function of the operands."""
    tree, queries, rows, row_scale, row_queries = operands
    # Queries without results: NaN times a zero cotangent would still be NaN.
    if rescore and row_queries is not None:
        queries = row_queries
    queries = jnp.where(jnp.isfinite(queries).all(axis=1, keepdims=True), queries, 0)
    if rescore:

        def exact(q: jax.Array, numbers: jax.Array) -> jax.Array:
            return xla.row_scores(rows, row_scale, q, numbers, euclidean=euclidean)

        return jax.vmap(exact)(queries, ids)
    # Where a row has several slots its score is that of the best.
    order = jnp.argsort(tree.slot_rows)
    numbers = tree.slot_rows[order]

    def estimate(q: jax.Array, rows: jax.Array) -> jax.Array:
        first = jnp.searchsorted(numbers, rows)
        places = jnp.minimum(first[:, None] + jnp.arange(2)[None, :], len(order) - 1)
        slots = order[places]
        scores = xla.slot_scores(tree, q, slots.reshape(-1)).reshape(slots.shape)
        same = tree.slot_rows[slots] == rows[:, None]
        return jnp.max(jnp.where(same, scores, -jnp.inf), axis=1)

    return jax.lax.map(lambda z: estimate(*z), (queries, ids))


_NAMES = (None, *get_args(Implementation))


class Backends(NamedTuple):
    """One function of a tree and queries by each implementation.

    Attributes:
      xla: of plain XLA.
      cpu: of the compiled kernel.
      pallas: of the Pallas kernels, which takes a `pallas.Kernel` as ``kernel``.
    """

    xla: Callable[..., Any]
    cpu: Callable[..., Any]
    pallas: Callable[..., Any]


_SEARCH = Backends(xla.tree_search, cpu.tree_search, pallas.tree_search)


def kernel_options(recall_target: float, interpret: Any) -> dict[str, Any]:
    """Check and gather the options of the Pallas kernels.

    Raises:
      ValueError: ``recall_target`` out of range.
    """
    if not 0.0 < recall_target <= 1.0:
        raise ValueError(f"recall_target must be in (0, 1], got {recall_target!r}")
    return {"recall_target": float(recall_target), "interpret": interpret}


def as_leaves(leaves: Any, queries: jax.Array) -> jax.Array:
    """Chosen leaves of queries, checked.

    Raises:
      ValueError: another shape or type than ``int32[b, P]``.
    """
    leaves = jnp.asarray(leaves)
    if leaves.dtype != jnp.int32 or leaves.ndim != 2 or len(leaves) != len(queries):
        raise ValueError(
            f"leaves must be int32[b, P] with b = {len(queries)}; "
            f"got {leaves.dtype}{list(leaves.shape)}"
        )
    return leaves


def choose(
    backends: Backends,
    tree: PackedTree,
    queries: Any,
    implementation: str | None,
    options: dict[str, Any],
    *,
    fits: bool = True,
) -> Any:
    """The function of an implementation, or one that takes that of the platform it is lowered for.

    Raises:
      ValueError: an implementation that is unknown or cannot run.
    """
    if implementation not in _NAMES:
        raise ValueError(f"implementation must be one of {_NAMES}; got {implementation!r}")
    if implementation == "xla":
        return backends.xla
    if implementation in implementations.PALLAS:
        reason = pallas.unsupported(tree, queries, implementation)
        if reason:
            raise ValueError(f"implementation {implementation!r} cannot run: {reason}")
        implementations.require_pallas(implementation, options["interpret"], (tree, queries))
        return functools.partial(backends.pallas, kernel=_pallas(implementation, options))
    fits = fits and tree.codes.layout not in POINTS_LAST
    if implementation == "cpu":
        if not library.available():
            raise ValueError(f"implementation 'cpu' cannot run: {library.load().reason}")
        if not fits:
            raise ValueError(
                "implementation 'cpu' needs packed codes, and float32 rows for Euclidean scores"
            )
        return backends.cpu
    branches = {"cpu": backends.cpu} if library.available() and fits else {}
    # Where the program is for another platform than this one's, plain XLA is what runs everywhere.
    name = {platform: name for name, platform in implementations.PALLAS.items()}.get(
        jax.default_backend()
    )
    if name is not None:
        reason = pallas.unsupported(tree, queries, name)
        if reason is None:
            kernel = _pallas(name, options)
            device = "cuda" if name == "pallas_gpu" else "tpu"
            branches[device] = functools.partial(backends.pallas, kernel=kernel)
        else:
            warnings.warn(f"tree_search runs plain XLA, not {name}: {reason}", stacklevel=3)
    if not branches:
        return backends.xla

    def by_platform(*args: Any, **options: Any) -> Any:
        axes = varying_axes(*jax.tree.leaves(args))

        def run(search: Any) -> Any:
            # All branches must vary alike over the devices of shard_map.
            return lambda *a: jax.tree.map(lambda x: match_varying(x, axes), search(*a, **options))

        chosen = {platform: run(search) for platform, search in branches.items()}
        return jax.lax.platform_dependent(*args, **chosen, default=run(backends.xla))

    return by_platform


def _pallas(name: str, options: dict[str, Any]) -> pallas.Kernel:
    return pallas.Kernel(name, options["recall_target"], None, options["interpret"])
