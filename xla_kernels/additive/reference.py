"""Iterated local search over blocks of rows in step: the definition and the plain XLA form."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..varying import match_varying, varying_axes

#: Rows a block.
BLOCK = 256


class _State(NamedTuple):
    costs: jax.Array  # [B, m, k]: ||c||^2 - 2 <c, x> + 2 <c, other words>
    totals: jax.Array  # [B, r]: <u, x - x~>
    codes: jax.Array  # int32[B, m]; -1 is no word


class _Block(NamedTuple):
    base: jax.Array  # [B, m, k]: ||c||^2 - 2 <c, x>
    projections: jax.Array  # [B, r, m, k]: <u, c>
    orthogonal: jax.Array  # [B]
    weights: jax.Array  # [B, r]


def assign_additive_codes(
    rows: jax.Array,
    directions: jax.Array,
    orthogonal: jax.Array,
    weights: jax.Array,
    codes: jax.Array,
    words: jax.Array,
    norms: jax.Array,
    pairs: jax.Array,
    kicks: jax.Array,
    *,
    max_sweeps: int,
) -> jax.Array:
    """Codes ``uint8[n, m]``; see `xla_kernels.assign_additive_codes`."""
    n, m = rows.shape[0], words.shape[0]
    k = pairs.shape[1]
    words, norms, pairs = words[:, :k], norms[:, :k], pairs[..., :k]
    block = min(BLOCK, n)
    if codes.shape[0] == 0:
        start = jnp.full((n, m), -1, jnp.int32)
    else:
        start = jnp.minimum(codes.astype(jnp.int32), k - 1)

    def in_blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -n % block)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-(-n // block), block, *x.shape[1:])

    def one(part: tuple[jax.Array, ...]) -> jax.Array:
        x, u, a, w, first = part
        return _search(x, u, a, w, first, words, norms, pairs, kicks, max_sweeps)

    parts = (rows, directions, orthogonal, weights, start)
    found = lax.map(one, tuple(in_blocks(x) for x in parts))
    return found.reshape(-1, m)[:n].astype(jnp.uint8)


def _search(x, u, orthogonal, weights, start, words, norms, pairs, kicks, max_sweeps):
    m = words.shape[0]
    product = functools.partial(jnp.einsum, precision="highest")
    base = norms[None] - 2 * product("mkd,bd->bmk", words, x)
    block = _Block(base, product("mkd,brd->brmk", words, u), orthogonal, weights)
    state = _State(base, product("brd,bd->br", u, x), jnp.full(start.shape, -1, jnp.int32))
    axes = varying_axes(x, u, orthogonal, weights, start, words, kicks)
    state = _State(*(match_varying(leaf, axes) for leaf in state))

    def begin(j, state):
        old = state.codes[:, j]
        code = jnp.where(start[:, j] < 0, old, start[:, j])
        moved = _change(block, pairs, state, j, jnp.maximum(code, 0))
        return jax.tree.map(lambda a, b: _where(start[:, j] < 0, a, b), state, moved)

    state = lax.fori_loop(0, m, begin, state)
    state = _descend(block, pairs, state, 0, max_sweeps, axes)

    def round_(best, kick):
        def move(i, carry):
            state, first = carry
            j, code = kick[i, 0], kick[i, 1]
            valid = (j >= 0) & (j < m) & (code >= 0) & (code < pairs.shape[1])
            j, code = jnp.where(valid, j, 0), jnp.where(valid, code, 0)
            moved = _change(block, pairs, state, j, jnp.broadcast_to(code, state.codes.shape[:1]))
            state = jax.tree.map(lambda a, b: jnp.where(valid, a, b), moved, state)
            return state, jnp.where(valid, (j + 1) % m, first)

        first = match_varying(jnp.int32(0), axes)
        state, first = lax.fori_loop(0, kick.shape[0], move, (best[0], first))
        state = _descend(block, pairs, state, first, max_sweeps, axes)
        loss = _loss(block, state)
        better = loss < best[1]
        new = (state, loss)
        return jax.tree.map(lambda a, b: _where(better, a, b), new, best), None

    (state, _), _ = lax.scan(round_, (state, _loss(block, state)), kicks)
    return state.codes


def _where(condition: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _pick(values: jax.Array, code: jax.Array) -> jax.Array:
    """``values[..., code]`` of each row; 0 where there is no word."""
    index = jnp.maximum(code, 0).reshape(-1, *[1] * (values.ndim - 1))
    picked = jnp.take_along_axis(values, index, axis=-1)[..., 0]
    return _where(code < 0, jnp.zeros_like(picked), picked)


def _change(block: _Block, pairs: jax.Array, state: _State, j, code: jax.Array) -> _State:
    old = state.codes[:, j]
    removed = _where(old < 0, jnp.zeros_like(state.costs), pairs[j, jnp.maximum(old, 0)])
    costs = state.costs + (pairs[j, code] - removed)
    projection = block.projections[:, :, j]
    totals = state.totals + _pick(projection, old) - _pick(projection, code)
    same = code == old
    return _State(
        _where(same, state.costs, costs),
        _where(same, state.totals, totals),
        state.codes.at[:, j].set(code),
    )


def _descend(block: _Block, pairs: jax.Array, state: _State, first, max_sweeps: int, axes):
    m = pairs.shape[0]

    def visit(i, state):
        j = (first + i) % m
        projection = block.projections[:, :, j]
        rest = state.totals + _pick(projection, state.codes[:, j])
        inner = rest[:, :, None] - projection
        along = jnp.sum(block.weights[:, :, None] * inner * inner, axis=1)
        cost = block.orthogonal[:, None] * state.costs[:, j] + along
        return _change(block, pairs, state, j, jnp.argmin(cost, axis=1).astype(jnp.int32))

    def sweep(carry):
        count, _, state = carry
        new = lax.fori_loop(0, m, visit, state)
        return count + 1, jnp.any(new.codes != state.codes), new

    def unsettled(carry):
        return (carry[0] < max_sweeps) & carry[1]

    count, moving = (match_varying(x, axes) for x in (jnp.int32(0), jnp.array(True)))
    return lax.while_loop(unsettled, sweep, (count, moving, state))[2]


def _loss(block: _Block, state: _State) -> jax.Array:
    both = jnp.take_along_axis(state.costs + block.base, state.codes[:, :, None], axis=2)[..., 0]
    along = jnp.sum(block.weights * state.totals * state.totals, axis=1)
    return block.orthogonal * (0.5 * jnp.sum(both, axis=1)) + along
