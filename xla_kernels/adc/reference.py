"""The definition: sums of table entries, in the order of the subspaces, then a stable selection."""

import jax
import jax.numpy as jnp
from jax import lax

from ..varying import match_varying, varying_axes


def adc_scores(
    tables: jax.Array,
    columns: jax.Array,
    gain: jax.Array | None,
    offset: jax.Array | None,
) -> jax.Array:
    """Scores ``float32[b, n]`` of ``columns: uint8[m, n]``, summed from subspace 0 upward."""
    b, n = tables.shape[0], columns.shape[1]

    def add(total: jax.Array, subspace: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        entries, column = subspace
        return total + entries[:, column], None

    start = match_varying(jnp.zeros((b, n), jnp.float32), varying_axes(tables, columns))
    total, _ = lax.scan(add, start, (jnp.moveaxis(tables, 1, 0), columns))
    return affine(total, gain, offset)


def affine(total: jax.Array, gain: jax.Array | None, offset: jax.Array | None) -> jax.Array:
    """Give ``gain * total + offset`` with one gain and offset a point, the last axis of total."""
    if gain is not None:
        total = total * gain[None, :]
    if offset is not None:
        total = total + offset[None, :]
    return total


def select(scores: jax.Array, usable: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Take the k largest usable scores of each row of ``[b, n]``, lowest column first among equals.

    A score of NaN or -inf is never selected. Missing results are score -inf, id -1.
    """
    n = scores.shape[1]
    scores = jnp.where(usable & ~jnp.isnan(scores), scores, -jnp.inf)
    # top_k orders -0. below 0., which are equal scores.
    best, ids = lax.top_k(jnp.where(scores == 0, 0.0, scores), min(k, n))
    ids = jnp.where(best == -jnp.inf, -1, ids.astype(jnp.int32))
    missing = ((0, 0), (0, k - min(k, n)))
    return (
        jnp.pad(best, missing, constant_values=-jnp.inf),
        jnp.pad(ids, missing, constant_values=-1),
    )


def finite_tables(tables: jax.Array) -> jax.Array:
    """Which queries (``bool[b]``) have tables without NaN and infinities."""
    return jnp.isfinite(tables).all(axis=(1, 2))


def adc_top_k(
    tables: jax.Array,
    columns: jax.Array,
    gain: jax.Array | None,
    offset: jax.Array | None,
    valid: jax.Array | None,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """Select from all scores; the definition that every implementation agrees with."""
    scores = adc_scores(tables, columns, gain, offset)
    usable = jnp.broadcast_to(finite_tables(tables)[:, None], scores.shape)
    if valid is not None:
        usable = usable & jnp.broadcast_to(valid, scores.shape)
    return select(scores, usable, k)
