"""The ranking loss of a codec: how far ADC scores change the order of the best rows of a query."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avq_jax.checks import as_rows
from avq_jax.quantization.codec import decode
from avq_jax.quantization.rows import unit

__all__ = ["divergence", "error_spread", "mean_divergence", "nearest_rows", "ranking_loss"]

# Scores held at a time.
_SCORES = 1 << 22


def divergence(exact: Array, approximate: Array, valid: Any, temperature: Array) -> Array:
    """``KL(p || p~)`` of each query over the last axis."""
    logs = [
        jax.nn.log_softmax(jnp.where(valid, scores / temperature, -jnp.inf), axis=-1)
        for scores in (exact, approximate)
    ]
    gap = jnp.where(valid, logs[0] - jnp.where(valid, logs[1], 0), 0)
    return jnp.sum(jnp.exp(jnp.where(valid, logs[0], -jnp.inf)) * gap, axis=-1)


@jax.jit
def mean_divergence(queries: Array, x: Array, decoded: Array, temperature: Array) -> Array:
    """Mean of ``KL(p || p~)`` over all rows, for queries of unit length."""
    block = max(1, min(queries.shape[0], _SCORES // x.shape[0]))
    count = queries.shape[0]
    blocks = jnp.pad(queries, ((0, -count % block), (0, 0))).reshape(-1, block, queries.shape[1])

    def one(part):
        exact, approximate = (jnp.matmul(part, v.T, precision="highest") for v in (x, decoded))
        return divergence(exact, approximate, True, temperature)

    return jnp.mean(jax.lax.map(one, blocks).reshape(-1)[:count])


def ranking_loss(
    codec: Any, codes: Any, x: Any, queries: Any, *, temperature: Any
) -> Float[Array, ""]:
    """Give the mean over queries of ``KL(p || p~)``, of exact and of ADC scores over all rows.

    ``p_i ~ exp(<q, x_i> / temperature)``, and p~ the same of the decoded rows; q has unit length.

    Args:
      codec: a learned codec.
      codes: :class:`~avq_jax.Codes` of the rows, or plain ``uint8[n, m]``.
      x: ``[n, d]`` rows.
      queries: ``[b, d]`` of any norm.
      temperature: tau > 0, in the units of <q, x> for q of unit length.

    Returns:
      ``float32``, at least 0 up to rounding.

    Raises:
      ValueError: sizes that do not fit, values that are not finite.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[0.], [1.]], [[0.], [1.]]]), dim=2)
    >>> x = jnp.array([[1., 0.], [0., 1.]])
    >>> codes = avq_jax.encode(book, x)
    >>> float(ranking_loss(book, codes, x, x, temperature=0.5))
    0.0

    Reference:
      Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, 2007.
    """
    x, queries = as_rows(x, name="x"), as_rows(queries, name="queries")
    if queries.shape[1] != x.shape[1]:
        raise ValueError(f"queries must be as wide as x, {x.shape[1]}; got {queries.shape[1]}")
    decoded = decode(codec, codes)
    if decoded.shape != x.shape:
        raise ValueError(f"codes must be those of x, {x.shape}; they decode to {decoded.shape}")
    tau = jnp.asarray(temperature, jnp.float32)
    return mean_divergence(unit(jnp.asarray(queries)), jnp.asarray(x), decoded, tau)


@functools.partial(jax.jit, static_argnames="count")
def nearest_rows(queries: Array, x: Array, count: int) -> tuple[Array, Array]:
    """Exact scores and row numbers of the ``count`` best rows of each query, ``[b, count]``."""
    block = max(1, min(queries.shape[0], _SCORES // x.shape[0]))
    n = queries.shape[0]
    blocks = jnp.pad(queries, ((0, -n % block), (0, 0))).reshape(-1, block, queries.shape[1])

    def one(part):
        return jax.lax.top_k(jnp.matmul(part, x.T, precision="highest"), count)

    scores, ids = jax.lax.map(one, blocks)
    return scores.reshape(-1, count)[:n], ids.reshape(-1, count)[:n]


@jax.jit
def error_spread(queries: Array, x: Array, decoded: Array, ids: Array) -> Array:
    """Standard deviation of ``<q, x - x~>`` over rows ``ids[b, c]``; 1 where there is no error."""

    def one(z):
        q, ids = z
        return jnp.matmul(x[ids] - decoded[ids], q, precision="highest")

    spread = jnp.std(jax.lax.map(one, (queries, ids)))
    return jnp.where(spread > 0, spread, 1)
