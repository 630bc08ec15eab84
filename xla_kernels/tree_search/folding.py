"""A search of many queries under ``vmap``: the mapped axis joins the queries, one call for all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def folded(search: Callable[..., Any], *, k: int, slots: int) -> Callable[..., Any]:
    """Make ``search(queries, row_queries, usable, rest)`` take more queries instead of a batch.

    Args:
      search: gives scores and ids ``[b, k]`` for queries ``[b, d]``, row queries ``[b, e]`` and
        usable ``[1 or b, S]``. Where ``rest`` is mapped too it is called once for each.
      k: results a query.
      slots: S.

    Returns:
      The same function with a rule for ``vmap``.
    """

    @custom_vmap
    def call(queries: Any, row_queries: Any, usable: Any, rest: Any) -> Any:
        return search(queries, row_queries, usable, rest)

    @call.def_vmap
    def _fold(
        size: int, batched: Any, queries: Any, row_queries: Any, usable: Any, rest: Any
    ) -> Any:
        if any(jax.tree.leaves(batched[3])):
            args = (queries, row_queries, usable, rest)

            def step(i: Any) -> Any:
                return call(*jax.tree.map(lambda x, b: x[i] if b else x, args, tuple(batched)))

            return jax.lax.map(step, jnp.arange(size)), (True, True)
        if not batched[0]:
            queries = jnp.broadcast_to(queries[None], (size, *queries.shape))
        if not batched[1]:
            row_queries = jnp.broadcast_to(row_queries[None], (size, *row_queries.shape))
        b = queries.shape[1]
        if batched[2] or usable.shape[-2] > 1:
            usable = usable if batched[2] else usable[None]
            usable = jnp.broadcast_to(usable, (size, b, slots)).reshape(size * b, slots)
        queries, row_queries = (q.reshape(size * b, q.shape[2]) for q in (queries, row_queries))
        scores, ids = call(queries, row_queries, usable, rest)
        return (scores.reshape(size, b, k), ids.reshape(size, b, k)), (True, True)

    return call
