"""Coordinate descent over subspaces, the point axis last: the definition and the plain XLA form."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..varying import match_varying, varying_axes

#: Points a chunk: its [m, k, chunk] arrays stay in a processor's cache.
CHUNK = 1024


def assign_codes(
    rows: jax.Array,
    codewords: jax.Array,
    directions: jax.Array,
    orthogonal: jax.Array,
    weight: jax.Array,
    *,
    max_sweeps: int,
) -> jax.Array:
    """Codes ``uint8[n, m]``; see `xla_kernels.assign_codes`."""
    n, m = rows.shape[0], codewords.shape[0]
    if n == 0 or m == 0:
        return jnp.zeros((n, m), jnp.uint8)
    chunk = min(CHUNK, n)
    chunks = -(-n // chunk)

    def in_chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, chunks * chunk - n)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, chunk, *x.shape[1:])

    def one_chunk(part: tuple[jax.Array, ...]) -> jax.Array:
        x, u, a, w = part
        return _assign_chunk(x, u, a, w, codewords, max_sweeps)

    parts = tuple(map(in_chunks, (rows, directions, orthogonal, weight)))
    codes = lax.map(one_chunk, parts)
    return codes.reshape(chunks * chunk, m)[:n].astype(jnp.uint8)


# Minima and picks as plain reductions over the leading axis, which vectorise over the points: an
# argmin or a gather is several times slower on a CPU.


def _lowest_argmin(values: jax.Array) -> jax.Array:
    places = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    least = values.min(axis=0, keepdims=True)
    return jnp.where(values == least, places, values.shape[0] - 1).min(axis=0)


def _pick(values: jax.Array, place: jax.Array) -> jax.Array:
    places = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where(places == place[None], values, 0.0).sum(axis=0)


def _assign_chunk(
    rows: jax.Array,
    directions: jax.Array,
    orthogonal: jax.Array,
    weight: jax.Array,
    codewords: jax.Array,
    max_sweeps: int,
) -> jax.Array:
    m, k, s = codewords.shape
    points = rows.shape[0]
    x = rows.T.reshape(m, 1, s, points)
    u = directions.T.reshape(m, 1, s, points)
    # In the order of the components, one at a time, as the compiled form sums them.
    norms = jnp.zeros((m, k, points), rows.dtype)
    dots = jnp.zeros((m, k, points), rows.dtype)
    for t in range(s):
        r = x[:, :, t] - codewords[:, :, t, None]
        norms = norms + r * r
        dots = dots + u[:, :, t] * r
    codes = jax.vmap(_lowest_argmin)(norms)  # [m, points]
    start = jax.vmap(_pick)(dots, codes)
    axes = varying_axes(norms, dots, orthogonal, weight)
    zero = match_varying(jnp.zeros(points, rows.dtype), axes)
    p, _ = lax.scan(lambda total, part: (total + part, None), zero, start)

    def visit(carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]):
        p, moved = carry
        norm, dot, code = inputs
        rest = p - _pick(dot, code)
        inner = rest[None] + dot
        loss = orthogonal[None] * norm + weight[None] * (inner * inner)
        best = _lowest_argmin(loss)
        changed = best != code
        return (jnp.where(changed, _pick(inner, best), p), moved | changed.any()), best

    def sweep(state: Any) -> Any:
        count, _, p, codes = state
        still = match_varying(jnp.zeros((), jnp.bool_), axes)
        (p, moved), codes = lax.scan(visit, (p, still), (norms, dots, codes))
        return count + 1, moved, p, codes

    def unsettled(state: Any) -> jax.Array:
        return (state[0] < max_sweeps) & state[1]

    count = match_varying(jnp.zeros((), jnp.int32), axes)
    moving = match_varying(jnp.ones((), jnp.bool_), axes)
    return lax.while_loop(unsettled, sweep, (count, moving, p, match_varying(codes, axes)))[3].T
