"""Inner products with stored rows: a flat int8 scan, and exact scores of chosen rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import implementations
from . import cpu, reference
from .layout import PackedRows, pack_rows, unpack_rows


def dot_top_k(
    queries: Any,
    rows: Any,
    k: Any,
    *,
    scale: Any = None,
    valid: Any = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Find each query's k largest inner products with int8 rows, scanning all of them.

    Queries are rounded to int8 too, by their largest component, so a score is a float32 multiple of
    an exact integer: all implementations agree bit for bit. Meant as the flat mode of an index and
    followed by `rescore_top_k`; it has no gradient.

    Args:
      queries: ``float[b, d]``.
      rows: ``int8[n, d]`` or, better, `PackedRows`; d at most 32768.
      k: results a query, at least 1; may exceed n.
      scale: ``float[n]`` or None, the factor of each row.
      valid: ``bool[n]`` or ``bool[b, n]`` or None: rows that may be returned.
      implementation: None (the fastest here), ``"xla"``, ``"cpu"`` or ``"reference"``.

    Returns:
      ``(scores, ids)``, ``float32[b, k]`` descending and ``int32[b, k]``; equal scores lowest row
      first; missing results -inf and -1, all of them for a query with NaN or an infinity.

    Raises:
      ValueError: shapes, dtypes or k that do not fit, or an implementation that cannot run.

    Example:
      >>> import numpy as np
      >>> rows = np.array([[1, 0], [0, 2], [3, 3]], np.int8)
      >>> scores, ids = dot_top_k(np.array([[127.0, 0.0]], np.float32), rows, 2)
      >>> scores.tolist(), ids.tolist()
      ([[381.0, 127.0]], [[2, 0]])
    """
    _check_k(k)
    queries = _queries(queries)
    if not isinstance(rows, PackedRows):
        rows = pack_rows(rows)
    n, d = rows.shape
    if queries.shape[1] != d:
        raise ValueError(f"queries have width {queries.shape[1]}, rows have width {d}")
    scale = _scale(scale, n)
    if valid is not None:
        valid = jnp.asarray(valid)
        shapes = ((n,), (queries.shape[0], n))
        if valid.dtype != jnp.bool_ or valid.shape not in shapes:
            raise ValueError(
                f"valid must be bool[n] or bool[b, n] with (b, n) = {shapes[1]}, "
                f"got {valid.dtype}{list(valid.shape)}"
            )
        valid = valid.reshape(-1, n) if n else None
    chosen = implementations.resolve(implementation)
    return _dot_top_k(chosen, k, queries, rows, scale, valid)


def rescore_top_k(
    queries: Any,
    rows: Any,
    candidates: Any,
    k: Any,
    *,
    scale: Any = None,
    euclidean: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Score candidate rows exactly, in float32, and keep the k best; each row at most once.

    Differentiable in ``queries``, float ``rows`` and ``scale`` through the returned scores.

    Args:
      queries: ``float[b, d]``.
      rows: ``float32[n, d]``, ``bfloat16[n, d]`` or ``int8[n, d]``.
      candidates: ``int32[b, r]`` row numbers; -1 and others out of range are skipped, repeated ones
        count once.
      k: results a query, at least 1; may exceed r.
      scale: ``float[n]`` or None, the factor of each row (of int8 rows, usually).
      euclidean: scores are ``-||q - x||^2`` instead of ``<q, x>``; the compiled kernel has those of
        float32 rows without scale.
      implementation: None (the fastest here), ``"xla"``, ``"cpu"`` or ``"reference"``.

    Returns:
      ``(scores, ids)``, ``float32[b, k]`` descending and ``int32[b, k]``; equal scores lowest row
      first; missing results -inf and -1. Implementations add in different orders: scores agree to
      float32 rounding.

    Raises:
      ValueError: shapes, dtypes or k that do not fit, or an implementation that cannot run.

    Example:
      >>> import numpy as np
      >>> rows = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], np.float32)
      >>> candidates = np.array([[0, 1, 1, -1]], np.int32)
      >>> scores, ids = rescore_top_k(np.ones((1, 2), np.float32), rows, candidates, 3)
      >>> scores.tolist(), ids.tolist()
      ([[2.0, 1.0, -inf]], [[1, 0, -1]])
    """
    _check_k(k)
    queries = _queries(queries)
    rows, candidates = jnp.asarray(rows), jnp.asarray(candidates)
    if rows.ndim != 2 or rows.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
        raise ValueError(
            f"rows must be float32, bfloat16 or int8 [n, d], got {rows.dtype}{list(rows.shape)}"
        )
    if queries.shape[1] != rows.shape[1]:
        raise ValueError(f"queries have width {queries.shape[1]}, rows have width {rows.shape[1]}")
    if (
        candidates.ndim != 2
        or candidates.dtype != jnp.int32
        or candidates.shape[0] != queries.shape[0]
    ):
        raise ValueError(
            f"candidates must be int32[b, r] with b={queries.shape[0]}, "
            f"got {candidates.dtype}{list(candidates.shape)}"
        )
    scale = _scale(scale, rows.shape[0])
    chosen = implementations.resolve(implementation)
    if euclidean and (rows.dtype != jnp.float32 or scale is not None):
        if chosen == "cpu":
            raise ValueError(
                "implementation='cpu' cannot run: Euclidean scores need float32 rows without scale"
            )
        chosen = "xla"
    return _rescore_top_k(chosen, k, bool(euclidean), queries, rows, scale, candidates)


def _check_k(k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")


def _queries(queries: Any) -> jax.Array:
    queries = jnp.asarray(queries)
    if queries.ndim != 2 or not jnp.issubdtype(queries.dtype, jnp.floating):
        raise ValueError(f"queries must be float[b, d], got {queries.dtype}{list(queries.shape)}")
    return queries.astype(jnp.float32)


def _scale(scale: Any, n: int) -> jax.Array | None:
    if scale is None:
        return None
    scale = jnp.asarray(scale)
    if scale.shape != (n,) or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"scale must be float[n] with n={n}, got {scale.dtype}{list(scale.shape)}")
    return scale.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dot_top_k(
    implementation: str,
    k: int,
    queries: jax.Array,
    rows: PackedRows,
    scale: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    queries, scale = jax.tree.map(lax.stop_gradient, (queries, scale))
    finite = jnp.isfinite(queries).all(axis=1, keepdims=True)
    queries = jnp.where(finite, queries, 0.0)
    unit = jnp.abs(queries).max(axis=1, keepdims=True, initial=0.0) / 127
    unit = jnp.where(unit > 0, unit, 1.0)
    rounded = jnp.round(queries / unit).astype(jnp.int8)

    def compiled(*args: Any) -> tuple[jax.Array, jax.Array]:
        return cpu.dot_top_k(*args, k=k)

    def plain(queries: Any, rows: Any, *rest: Any) -> tuple[jax.Array, jax.Array]:
        return reference.dot_top_k(queries, unpack_rows(rows), *rest, k=k)

    args = (rounded, rows, scale, valid)
    scores, ids = implementations.choose(implementation, compiled, plain, *args)
    found = finite & (ids >= 0)
    return jnp.where(found, scores * unit, -jnp.inf), jnp.where(found, ids, -1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rescore_top_k(
    implementation: str,
    k: int,
    euclidean: bool,
    queries: jax.Array,
    rows: jax.Array,
    scale: jax.Array | None,
    candidates: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    args = (queries, rows, scale)
    stopped = jax.tree.map(lax.stop_gradient, args)
    scores, ids = implementations.choose(
        implementation,
        functools.partial(cpu.rescore_top_k, k=k, euclidean=euclidean),
        functools.partial(reference.rescore_top_k, k=k, euclidean=euclidean),
        *stopped,
        candidates,
    )
    if euclidean:
        return _with_derivative(reference.negated_distances, scores, ids, *args), ids
    return _with_derivative(reference.products, scores, ids, *args), ids


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_derivative(
    score: Any,
    scores: jax.Array,
    ids: jax.Array,
    queries: jax.Array,
    rows: jax.Array,
    scale: jax.Array | None,
) -> jax.Array:
    """Scores of rows ``ids``, as a function of the queries, the rows and their scale."""
    del score, ids, queries, rows, scale
    return scores


@_with_derivative.defjvp
def _with_derivative_jvp(score: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    scores, ids, queries, rows, scale = primals
    _, _, queries_dot, rows_dot, scale_dot = tangents
    if rows.shape[0] == 0:
        return scores, jnp.zeros_like(scores)
    at = jnp.maximum(ids, 0)
    if score is reference.negated_distances:

        def distances(queries: Any, rows: Any, scale: Any) -> jax.Array:
            return reference.negated_distances(queries, rows, scale, at)

        _, scores_dot = jax.jvp(distances, primals[2:], tangents[2:])
        return scores, jnp.where(ids >= 0, scores_dot, 0.0)
    scores_dot = reference.products(queries_dot, rows, scale, at)
    if jnp.issubdtype(rows.dtype, jnp.floating):
        scores_dot = scores_dot + reference.products(queries, rows_dot, scale, at)
    if scale is not None:
        scores_dot = scores_dot + reference.products(queries, rows, scale_dot, at)
    return scores, jnp.where(ids >= 0, scores_dot, 0.0)
