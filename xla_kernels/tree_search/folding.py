"""A search of many queries under ``vmap``: the mapped axis joins the queries, one call for all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def folded(search: Callable[..., Any], *, k: int, slots: int) -> Callable[..., Any]:
    """Make ``search(queries, own, usable, rest)`` take more queries instead of a batch.

    Args:
      search: gives scores and ids ``[b, k]`` for queries ``[b, d]``, arrays ``own`` of as many rows
        and usable ``[1 or b, S]``. Where ``rest`` is mapped too it is called once for each.
      k: results a query.
      slots: S.

    Returns:
      The same function with a rule for ``vmap``.
    """

    @custom_vmap
    def call(queries: Any, own: Any, usable: Any, rest: Any) -> Any:
        return search(queries, own, usable, rest)

    @call.def_vmap
    def _fold(size: int, batched: Any, queries: Any, own: Any, usable: Any, rest: Any) -> Any:
        if any(jax.tree.leaves(batched[3])):
            args = (queries, own, usable, rest)

            def step(i: Any) -> Any:
                return call(*jax.tree.map(lambda x, b: x[i] if b else x, args, tuple(batched)))

            return jax.lax.map(step, jnp.arange(size)), (True, True)

        def joined(a: Any, mapped: bool) -> Any:
            a = a if mapped else jnp.broadcast_to(a[None], (size, *a.shape))
            return a.reshape(size * a.shape[1], *a.shape[2:])

        b = queries.shape[1 if batched[0] else 0]
        if batched[2] or usable.shape[-2] > 1:
            usable = usable if batched[2] else usable[None]
            usable = jnp.broadcast_to(usable, (size, b, slots)).reshape(size * b, slots)
        queries, own = jax.tree.map(joined, (queries, own), tuple(batched[:2]))
        scores, ids = call(queries, own, usable, rest)
        return (scores.reshape(size, b, k), ids.reshape(size, b, k)), (True, True)

    return call
