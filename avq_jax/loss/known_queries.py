"""A known distribution of queries: Definition 3.1 with the expectation over a sample of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avq_jax.checks import as_count, as_rows
from avq_jax.loss.anisotropy import Scaling
from avq_jax.loss.score_aware import QueryTerms
from avq_jax.loss.weights import Weight

__all__ = ["query_terms"]

# Scores held at a time.
_SCORES = 1 << 22


def query_terms(
    x: Any,
    queries: Any,
    weight: Weight,
    scaling: Scaling,
    *,
    num_terms: int = 8,
    strength: float | int = 4.0,
) -> QueryTerms:
    """Give the further terms of the loss of rows whose queries are known from a sample.

    The paper: "the expectation can be recomputed if Q is known or estimated empirically". Of the
    expectation ``E_q[w(<q, x>) <q, r>^2]`` over the sample only the queries that score the row
    highest are kept; they are those that w weighs most. Row i gets, for each such query of unit
    length, ``strength * orthogonal_i * w(<q, x_i>) <q, r>^2``, added to the loss for isotropic
    queries, which covers those that the sample lacks.

    Args:
      x: ``[n, d]`` rows.
      queries: ``[s, d]`` sample of queries, of any norm; never those that will be tested. Without
        a log, rows of the base from where queries are expected will do.
      weight: w of the loss, in the units of <q, x>.
      scaling: of the rows, as ``scaling(weight, norms, dim=d)`` gives it.
      num_terms: R, most queries kept for a row.
      strength: weight of a query with w = 1 relative to an error across the row.

    Returns:
      :class:`~avq_jax.QueryTerms` for ``extra`` of the learners and of ``encode``:
      ``[n, R, d]`` and ``[n, R]``, R at most s. They take R times the memory of the rows; encode
      large sets in parts.

    Raises:
      ValueError: sizes that do not fit, values that are not finite, a negative strength.

    >>> import avq_jax, jax.numpy as jnp
    >>> weight, norms = avq_jax.Threshold(0.5), jnp.ones(1)
    >>> scaling = avq_jax.scaling(weight, norms, dim=2)
    >>> terms = query_terms([[1.0, 0.0]], [[2.0, 0.1], [0.0, 1.0]], weight, scaling)
    >>> (terms.weights / scaling.orthogonal[0]).tolist()
    [[4.0, 0.0]]

    Reference: Guo et al. 2020, section 3.1.
    """
    x, queries = as_rows(x, name="x"), as_rows(queries, name="queries")
    if queries.shape[1] != x.shape[1]:
        raise ValueError(f"queries must be as wide as x, {x.shape[1]}; got {queries.shape[1]}")
    count = min(as_count(num_terms, name="num_terms"), queries.shape[0])
    if not strength >= 0:
        raise ValueError(f"strength must be >= 0; got {strength}")
    orthogonal = jnp.asarray(scaling.orthogonal, jnp.float32)
    if orthogonal.shape != (x.shape[0],):
        raise ValueError(f"scaling must have {x.shape[0]} rows, as x; got {orthogonal.shape}")
    return _query_terms(
        jnp.asarray(x), jnp.asarray(queries), weight, orthogonal, jnp.float32(strength), count
    )


def _nearest(x: Array, queries: Array, count: int) -> tuple[Float[Array, "n R"], Array]:
    n = x.shape[0]
    block = max(1, min(n, _SCORES // queries.shape[0]))
    blocks = jnp.pad(x, ((0, -n % block), (0, 0))).reshape(-1, block, x.shape[1])

    def best(part):
        return jax.lax.top_k(jnp.matmul(part, queries.T, precision="highest"), count)

    scores, ids = jax.lax.map(best, blocks)
    return scores.reshape(-1, count)[:n], ids.reshape(-1, count)[:n]


def _terms(x, queries, weight, orthogonal, strength, count):
    square = jnp.sum(queries * queries, axis=1, keepdims=True)
    queries = queries * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
    scores, ids = _nearest(x, queries, count)
    return QueryTerms(queries[ids], strength * orthogonal[:, None] * weight(scores))


_query_terms = jax.jit(_terms, static_argnums=5)
