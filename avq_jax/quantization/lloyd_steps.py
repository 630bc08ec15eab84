"""The steps of Lloyd's algorithm, on one device or with the rows shared out over several."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from avq_jax.checks import as_count
from avq_jax.loss import Scaling
from avq_jax.quantization.assignment import block_size
from avq_jax.quantization.codebook import Codebook, encode_rows
from avq_jax.quantization.rows import Rows, in_blocks, quadratic_form, split
from avq_jax.quantization.update import (
    Solver,
    over_devices,
    reconstruct,
    row_losses,
    solve,
    worst_rows,
)

__all__ = [
    "WARM_ITERATIONS",
    "History",
    "Init",
    "LloydState",
    "Options",
    "check_sizes",
    "finish",
    "initial_codewords",
    "mean_loss",
    "start",
    "step",
    "update",
    "warm",
]

Init = Literal["reconstruction", "k-means++", "random"]

# Iterations under the reconstruction loss before the score-aware ones (section 4.1).
WARM_ITERATIONS = 8


class LloydState(NamedTuple):
    """State of Lloyd's algorithm; a pytree.

    Attributes:
      codebook: the codewords.
      codes: ``uint8[n, m]`` codes of the training rows, which the codewords were fitted to.
      loss: mean loss of a row under these codewords and codes (Definition 4.1 over n).
      step: ``int32``, iterations done.
    """

    codebook: Codebook
    codes: UInt8[Array, "n m"]
    loss: Float[Array, ""]
    step: Int32[Array, ""]


class History(NamedTuple):
    """What happened in each iteration of a learner; every leaf is ``[iterations]``.

    Attributes:
      loss: mean loss of a row after the iteration; never rises.
      usage: fraction of the codewords that some row uses.
    """

    loss: Float[Array | np.ndarray, " t"]
    usage: Float[Array | np.ndarray, " t"]


class Options(NamedTuple):
    """Static options of one iteration."""

    solver: Solver
    num_sweeps: int
    axis: str | None = None  # of shard_map, over which the rows are shared out


def initial_codewords(key: Array, rows: Rows, m: int, k: int, method: Init) -> Array:
    """Codewords ``[m, k, s]`` drawn from the rows, each subspace by its own key."""
    n = rows.x.shape[0]
    keys = jax.random.split(key, m + 1)
    if method == "random":
        sample = split(rows.x, m)
        picks = jax.vmap(lambda r: jax.random.choice(r, n, (k,), replace=False))(keys[1:])
        return jax.vmap(lambda v, i: v[:, i].T)(sample, picks)
    size = min(n, max(2048, 32 * k))
    chosen = jax.random.choice(keys[0], n, (size,), replace=False)
    sample, weight = split(rows.x[chosen], m), rows.scaling.orthogonal[chosen]
    weight = jnp.where(jnp.any(weight > 0), weight, 1)
    return jax.vmap(lambda r, v: _k_means_plus_plus(r, v, weight, k))(keys[1:], sample)


def _k_means_plus_plus(key: Array, x: Float[Array, "s n"], weight: Array, k: int) -> Array:
    """Seeding by squared distance (Arthur and Vassilvitskii, 2007)."""
    first, *_ = keys = jax.random.split(key, k)
    start = jax.random.categorical(first, jnp.log(weight))

    def draw(carry, key):
        last, distance = carry
        gap = x - x[:, last][:, None]
        distance = jnp.minimum(distance, jnp.sum(gap * gap, axis=0))
        # Where nothing is left to cover (fewer distinct rows than codewords) any row will do.
        odds = jnp.where(jnp.any(distance * weight > 0), distance * weight, weight)
        pick = jax.random.categorical(key, jnp.log(odds))
        return (pick, distance), pick

    _, picks = jax.lax.scan(draw, (start, jnp.full(x.shape[1], jnp.inf)), keys[1:])
    return x[:, jnp.concatenate([start[None], picks])].T


def start(key: Array, rows: Rows, m: int, k: int, method: Init) -> LloydState:
    """Codewords drawn from the rows, not fitted yet."""
    n, d = rows.x.shape
    key_start, _ = jax.random.split(key)
    return LloydState(
        Codebook(initial_codewords(key_start, rows, m, k, method), dim=d),
        jnp.zeros((n, m), jnp.uint8),
        jnp.array(jnp.inf, jnp.float32),
        jnp.array(0, jnp.int32),
    )


def warm(state: LloydState, rows: Rows, axis: str | None = None) -> LloydState:
    """One iteration under the reconstruction loss."""
    a = rows.scaling.orthogonal
    a = jnp.where(over_devices(jnp.max(a), axis) > 0, a, 1)
    return update(state, Rows(rows.x, Scaling(a, a)), Options("mean", 0, axis), first=True)


def finish(state: LloydState, rows: Rows, options: Options) -> LloydState:
    """Codes and loss of the initial codewords."""
    codes = encode_rows(state.codebook.codewords, rows, num_sweeps=options.num_sweeps)
    return state._replace(
        codes=codes.T.astype(jnp.uint8),
        loss=mean_loss(state.codebook.codewords, codes, rows, options.axis)[0],
        step=jnp.array(0, jnp.int32),
    )


def mean_loss(
    codewords: Array, codes: Int32[Array, "m n"], rows: Rows, axis: str | None = None
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """Mean loss of a row (Definition 4.1 over n), and the loss of each."""
    m, k, s = codewords.shape
    n = rows.x.shape[0]
    block = block_size(m, k, s)

    def losses(z):
        form = quadratic_form(z[1], m)
        return row_losses(form, form.x - reconstruct(codewords, z[0]))

    each = jax.lax.map(losses, (_codes_in_blocks(codes, block), in_blocks(rows, block)))
    each = each.reshape(-1)[:n]
    return _mean(each, axis), each


def _mean(each: Float[Array, " n"], axis: str | None = None) -> Float[Array, ""]:
    mean = jnp.sum(each / each.shape[0])  # divided first: the sum of large losses overflows
    return mean if axis is None else jax.lax.pmean(mean, axis)


def _codes_in_blocks(codes: Int32[Array, "m n"], block: int) -> Int32[Array, "nb m B"]:
    m, n = codes.shape
    codes = jnp.pad(codes, ((0, 0), (0, -n % block)))
    return codes.reshape(m, -1, block).transpose(1, 0, 2)


def update(state: LloydState, rows: Rows, options: Options, *, first: bool = False) -> LloydState:
    """One iteration. ``first`` starts the descent at the nearest codewords, not at the codes."""
    codewords = state.codebook.codewords
    m, k, s = codewords.shape
    n, axis = rows.x.shape[0], options.axis
    block = block_size(m, k, s)

    before = None if first else state.codes.T.astype(jnp.int32)
    sweeps = 0 if first else options.num_sweeps
    codes = encode_rows(codewords, rows, before, num_sweeps=sweeps)
    blocked = _codes_in_blocks(codes, block)
    solved = solve(codewords, blocked, in_blocks(rows, block), solver=options.solver, axis=axis)
    loss, each = mean_loss(solved.codewords, codes, rows, axis)
    # Rounding in an ill-conditioned system can lose more than the last step has to gain.
    before = solved.before.reshape(-1)[:n]
    was = _mean(before, axis)
    worse = loss > was
    loss, each = jnp.where(worse, was, loss), jnp.where(worse, before, each)
    codewords = jnp.where(worse, codewords, solved.codewords)
    # Dead codewords restart at the rows that are served worst; no row with a weight uses them
    # yet, so the loss of the present codes does not change.
    dead = ~solved.used

    def reseed(codewords):
        fresh = split(worst_rows(rows.x, each, k, axis), m).transpose(0, 2, 1)
        fresh = jnp.pad(fresh, ((0, 0), (0, k - fresh.shape[1]), (0, 0)), mode="edge")
        return jnp.where(dead[..., None], fresh, codewords)

    codewords = jax.lax.cond(jnp.any(dead), reseed, lambda c: c, codewords)
    return LloydState(
        Codebook(codewords, dim=state.codebook.dim), codes.T.astype(jnp.uint8), loss, state.step + 1
    )


def _usage(state: LloydState, axis: str | None) -> Float[Array, ""]:
    m, k, _ = state.codebook.codewords.shape
    used = jnp.zeros((m, k), jnp.float32).at[jnp.arange(m)[None, :], state.codes].set(1.0)
    return jnp.mean((over_devices(used, axis) > 0).astype(jnp.float32))


def step(state: LloydState, rows: Rows, options: Options) -> tuple[LloydState, Array]:
    """Iterate for `fit`: its rows stay the same, so that rounding cannot raise the loss either.

    Returns:
      The next state, and the fraction of codewords in use.
    """
    new = update(state, rows, options)
    kept = state._replace(step=new.step)
    new = jax.tree.map(lambda a, b: jnp.where(new.loss > state.loss, a, b), kept, new)
    return new, _usage(new, options.axis)


def check_sizes(x: Any, num_subspaces: int, num_codewords: int) -> tuple[int, int]:
    """The numbers of subspaces and codewords, checked.

    Raises:
      ValueError: sizes out of range, or too few rows.
    """
    n, d = x.shape
    m = as_count(num_subspaces, name="num_subspaces")
    k = as_count(num_codewords, name="num_codewords", minimum=2)
    if m > d:
        raise ValueError(f"num_subspaces must be at most the width of x, {d}; got {m}")
    if k > 256:
        raise ValueError(f"num_codewords must be at most 256, so that codes are bytes; got {k}")
    if n < k:
        raise ValueError(
            f"x must have at least num_codewords rows to learn from, {k}; got {n} "
            "(give more rows or fewer codewords)"
        )
    return m, k
