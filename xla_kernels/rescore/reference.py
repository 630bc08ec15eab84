"""Inner products and selections in plain jnp: the definition and the XLA form."""

import jax
import jax.numpy as jnp

from ..adc.reference import select


def dot_top_k(
    queries: jax.Array,
    rows: jax.Array,
    scale: jax.Array | None,
    valid: jax.Array | None,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """Select among ``scale[i] * <query, row i>`` of int8 queries and rows, exact integers."""
    # Products of bytes are exact in float32, and so are their sums below 2^24 (d <= 1040); wider
    # rows are added up in pieces as integers.
    total = jnp.zeros((queries.shape[0], rows.shape[0]), jnp.int32)
    for start in range(0, queries.shape[1], 1024):
        part = slice(start, start + 1024)
        product = queries[:, part].astype(jnp.float32) @ rows[:, part].astype(jnp.float32).T
        total = total + product.astype(jnp.int32)
    scores = total.astype(jnp.float32)
    if scale is not None:
        scores = scores * scale[None]
    usable = jnp.ones(scores.shape, jnp.bool_)
    if valid is not None:
        usable = usable & jnp.broadcast_to(valid, scores.shape)
    return select(scores, usable, k)


def rescore_top_k(
    queries: jax.Array,
    rows: jax.Array,
    scale: jax.Array | None,
    candidates: jax.Array,
    *,
    k: int,
    euclidean: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Select among the exact products with ``candidates: int32[b, r]``, each row once."""
    n = rows.shape[0]
    usable = (candidates >= 0) & (candidates < n)
    ids = jnp.sort(jnp.where(usable, candidates, n), axis=1)  # ascending: ties lowest row first
    repeated = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0))) if ids.shape[1] else ids == n
    if n == 0:
        scores = jnp.zeros(ids.shape, jnp.float32)
    else:
        score = negated_distances if euclidean else products
        scores = score(queries, rows, scale, jnp.minimum(ids, n - 1))
    best, places = select(scores, (ids < n) & ~repeated, k)
    if ids.shape[1] == 0:
        return best, places
    picked = jnp.take_along_axis(ids, jnp.maximum(places, 0), axis=1)
    return best, jnp.where(places < 0, -1, picked)


def products(
    queries: jax.Array, rows: jax.Array, scale: jax.Array | None, ids: jax.Array
) -> jax.Array:
    """Give ``scale[i] * <query, row i>`` for ``ids: int32[b, r]``, all in range."""
    picked = rows[ids].astype(jnp.float32)
    scores = jnp.einsum("bd,brd->br", queries, picked, precision="highest")
    return scores if scale is None else scores * scale[ids]


def negated_distances(
    queries: jax.Array, rows: jax.Array, scale: jax.Array | None, ids: jax.Array
) -> jax.Array:
    """Give ``-||query - scale[i] row i||^2`` for ``ids: int32[b, r]``, all in range."""
    picked = rows[ids].astype(jnp.float32)
    picked = picked if scale is None else picked * scale[ids][:, :, None]
    return -jnp.sum((queries[:, None, :] - picked) ** 2, axis=2)
