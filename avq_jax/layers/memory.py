"""Attention to the best few of many keys: key-value memory with sparse writes, long key caches."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from avq_jax.checks import as_queries
from avq_jax.layers.sparse import gather_rows
from avq_jax.mips import Index, search

__all__ = ["memory_read", "top_k_attention"]


def memory_read(
    queries: Float[Array, "b d"],
    keys: Float[Array, "b k d"],
    values: Float[Array, "b k v"],
    ids: Int32[Array, "b k"],
    *,
    scale: Any = 1.0,
) -> Float[Array, "b v"]:
    r"""Attend to the slots that a search has found for each query.

    ``sum_i p_i values_i`` with :math:`p = \mathrm{softmax}(\text{scale} \langle q, key_i \rangle)`
    over the found slots. Differentiate it in the gathered ``keys`` and ``values``, flatten ids and
    gradients to :class:`SparseRows`, :func:`coalesce` them (queries share slots) and write them
    by :func:`sparse_update`: slots that were not read cost nothing. :func:`refresh` then brings
    the index up to date.

    Args:
      queries: ``[b, d]``.
      keys: ``[b, k, d]`` rows of the keys at ``ids``.
      values: ``[b, k, v]`` rows of the values at ``ids``.
      ids: ``int32[b, k]`` slots, as :func:`avq_jax.search` gives them; -1 is none.
      scale: factor of the inner products.

    Returns:
      ``[b, v]``; zero for a query without slots.

    >>> import jax.numpy as jnp
    >>> keys, values = jnp.zeros((1, 3, 2)), jnp.array([[[1.0], [3.0], [9.0]]])
    >>> memory_read(jnp.ones((1, 2)), keys, values, jnp.array([[4, 0, -1]])).tolist()
    [[2.0]]
    """
    found = ids >= 0
    logits = jnp.einsum("bd,bkd->bk", queries, keys) * scale
    logits = jnp.where(found, logits, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    shifted = jnp.where(found, logits - jnp.where(jnp.isfinite(largest), largest, 0), 0)
    weight = jnp.where(found, jnp.exp(shifted), 0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1)
    return jnp.einsum("bk,bkv->bv", weight, jnp.where(found[..., None], values, 0))


def top_k_attention(
    index: Index,
    queries: Any,
    values: Float[Array, "n v"],
    *,
    k: int,
    keys: Float[Array, "n d"] | None = None,
    scale: Any = None,
    leaves_to_search: int | None = None,
    rescore: int | None = None,
    allowed: Any = None,
) -> Float[Array, "*b v"]:
    r"""Softmax attention over the k keys of largest inner product, found by search.

    If the keys left out hold the share delta of the exact attention, the output differs from the
    exact one by at most delta times the distance of the two partial means, so by at most
    2 delta max ||value||. Attention weighs a score t by exp(scale t): the weight of the loss that
    matches is ``Exponential(scale * norm of a typical query)``, if queries point everywhere alike.
    A language model's do not, and on its keys codes under this loss choose about as well as those
    of the reconstruction loss (README). Keys less their mean have the same softmax, and are coded
    better where the mean is long, as it is there; its first keys should always be read.

    Args:
      index: of the keys, metric ``"dot"``.
      queries: ``[b, d]``, or ``[d]`` for one, whose output is then squeezed.
      values: ``[n, v]`` one row a key.
      k: keys a query attends to.
      keys: ``[n, d]`` present keys; ``None`` for the rows stored in the index.
      scale: factor of the inner products; ``None`` is 1 / sqrt(d).
      leaves_to_search: as in :func:`avq_jax.search`.
      rescore: as in :func:`avq_jax.search`; 0 takes the k best by their codes. The weights are
        computed from the keys either way.
      allowed: as in :func:`avq_jax.search`, for example a causal mask ``[b, n]``.

    Returns:
      ``[b, v]``, differentiable in queries, keys and values.

    Raises:
      TypeError: not an index, k not an integer.
      ValueError: another metric, a number of values that is not that of the keys, no float keys.

    >>> import avq_jax, jax, jax.numpy as jnp
    >>> keys = jax.random.normal(jax.random.key(0), (500, 16))
    >>> index = avq_jax.build(jax.random.key(1), keys)
    >>> few = top_k_attention(index, 4 * keys[:2], keys, k=50)
    >>> exact = jax.nn.softmax(keys[:2] @ keys.T) @ keys
    >>> bool(jnp.abs(few - exact).max() < 0.03)
    True
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    if index.metric != "dot":
        raise ValueError(f"index must have the metric 'dot'; got {index}")
    if keys is None:
        if index.store is None or index.store.rows.dtype == jnp.int8:
            raise ValueError("keys must be given where the index stores no float rows")
        keys = index.store.rows
    for name, rows in (("values", values), ("keys", keys)):
        if rows.shape[0] != index.num_rows:
            raise ValueError(
                f"{name} must have one row a key, {index.num_rows}; got {rows.shape[0]}"
            )
    rows, single = as_queries(queries, width=index.dim)
    rows = jnp.asarray(rows)
    fixed = jax.lax.stop_gradient((index, rows))
    ids = search(
        *fixed, k=k, leaves_to_search=leaves_to_search, rescore=rescore, allowed=allowed
    ).ids
    scale = 1 / math.sqrt(index.dim) if scale is None else scale
    flat = ids.reshape(-1)

    def at(table: Array) -> Array:
        return gather_rows(table, flat).astype(jnp.float32).reshape(*ids.shape, -1)

    # Queries that are not finite have no slots, and pass nothing on.
    safe = jnp.where(jnp.all(jnp.isfinite(rows), axis=1, keepdims=True), rows, 0)
    out = memory_read(safe, at(keys), at(values), ids, scale=scale)
    return out[0] if single else out
