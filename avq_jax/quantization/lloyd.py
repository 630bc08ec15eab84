"""Lloyd-style learning of product codebooks under the score-aware loss (sections 4 and 7.5)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.progress import steps
from avq_jax.quantization.assignment import block_size
from avq_jax.quantization.codebook import Codebook, as_learning_rows, encode_rows
from avq_jax.quantization.rows import Rows, in_blocks, quadratic_form, split
from avq_jax.quantization.update import (
    Solver,
    choose_solver,
    over_devices,
    reconstruct,
    row_losses,
    solve,
    worst_rows,
)

__all__ = ["History", "Init", "LloydState", "fit", "lloyd_init", "lloyd_update"]

Init = Literal["reconstruction", "k-means++", "random"]

# Iterations under the reconstruction loss before the score-aware ones (section 4.1).
_WARM_ITERATIONS = 8


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


class _Options(NamedTuple):
    """Static options of one iteration."""

    solver: Solver
    num_sweeps: int
    axis: str | None = None  # of shard_map, over which the rows are shared out


def _initial_codewords(key: Array, rows: Rows, m: int, k: int, method: Init) -> Array:
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


def _start(key: Array, rows: Rows, m: int, k: int, method: Init) -> LloydState:
    """Codewords drawn from the rows, not fitted yet."""
    n, d = rows.x.shape
    key_start, _ = jax.random.split(key)
    return LloydState(
        Codebook(_initial_codewords(key_start, rows, m, k, method), dim=d),
        jnp.zeros((n, m), jnp.uint8),
        jnp.array(jnp.inf, jnp.float32),
        jnp.array(0, jnp.int32),
    )


def _warm(state: LloydState, rows: Rows, axis: str | None = None) -> LloydState:
    """One iteration under the reconstruction loss."""
    a = rows.scaling.orthogonal
    a = jnp.where(over_devices(jnp.max(a), axis) > 0, a, 1)
    return _update(state, Rows(rows.x, Scaling(a, a)), _Options("mean", 0, axis), first=True)


def _finish(state: LloydState, rows: Rows, options: _Options) -> LloydState:
    """Codes and loss of the initial codewords."""
    codes = encode_rows(state.codebook.codewords, rows, num_sweeps=options.num_sweeps)
    return state._replace(
        codes=codes.T.astype(jnp.uint8),
        loss=_mean_loss(state.codebook.codewords, codes, rows, options.axis)[0],
        step=jnp.array(0, jnp.int32),
    )


def _mean_loss(
    codewords: Array, codes: Int32[Array, "m n"], rows: Rows, axis: str | None = None
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
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


def _update(state: LloydState, rows: Rows, options: _Options, *, first: bool = False) -> LloydState:
    """One iteration. ``first`` starts the descent at the nearest codewords, not at the codes."""
    codewords = state.codebook.codewords
    m, k, s = codewords.shape
    n, axis = rows.x.shape[0], options.axis
    block = block_size(m, k, s)

    before = None if first else state.codes.T.astype(jnp.int32)
    sweeps = 0 if first else options.num_sweeps
    codes = encode_rows(codewords, rows, before, num_sweeps=sweeps)
    blocked = _codes_in_blocks(codes, block)
    update = solve(codewords, blocked, in_blocks(rows, block), solver=options.solver, axis=axis)
    loss, each = _mean_loss(update.codewords, codes, rows, axis)
    # Rounding in an ill-conditioned system can lose more than the last step has to gain.
    before = update.before.reshape(-1)[:n]
    was = _mean(before, axis)
    worse = loss > was
    loss, each = jnp.where(worse, was, loss), jnp.where(worse, before, each)
    codewords = jnp.where(worse, codewords, update.codewords)
    # Dead codewords restart at the rows that are served worst; no row with a weight uses them
    # yet, so the loss of the present codes does not change.
    dead = ~update.used

    def reseed(codewords):
        fresh = split(worst_rows(rows.x, each, k, axis), m).transpose(0, 2, 1)
        fresh = jnp.pad(fresh, ((0, 0), (0, k - fresh.shape[1]), (0, 0)), mode="edge")
        return jnp.where(dead[..., None], fresh, codewords)

    codewords = jax.lax.cond(jnp.any(dead), reseed, lambda c: c, codewords)
    return LloydState(
        Codebook(codewords, dim=state.codebook.dim), codes.T.astype(jnp.uint8), loss, state.step + 1
    )


def _usage(state: LloydState) -> Float[Array, ""]:
    m, k, _ = state.codebook.codewords.shape
    used = jnp.zeros((m, k), jnp.float32).at[jnp.arange(m)[None, :], state.codes].set(1.0)
    return jnp.mean(used)


_jit_start = jax.jit(_start, static_argnums=(2, 3, 4))
_jit_warm = jax.jit(_warm, static_argnames="axis")
_jit_finish = jax.jit(_finish, static_argnames="options")
_jit_update = jax.jit(_update, static_argnames="options")


@functools.partial(jax.jit, static_argnames="options")
def _jit_step(state: LloydState, rows: Rows, options: _Options) -> tuple[LloydState, Array]:
    """Iterate for `fit`: its rows stay the same, so that rounding cannot raise the loss either."""
    new = _update(state, rows, options)
    kept = state._replace(step=new.step)
    new = jax.tree.map(lambda a, b: jnp.where(new.loss > state.loss, a, b), kept, new)
    return new, _usage(new)


def _wait(state: Any) -> Any:
    """Wait for a dispatched step in Python, where Ctrl-C is heard at once."""
    pause = 1e-5
    loss: Any = state.loss
    while not loss.is_ready():
        time.sleep(pause)
        pause = min(2 * pause, 2e-3)
    return state


def _check_sizes(x: Any, num_subspaces: int, num_codewords: int) -> tuple[int, int]:
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


def lloyd_init(
    key: Array,
    x: Any,
    scaling: Scaling | None,
    *,
    num_subspaces: int,
    num_codewords: int,
    method: Init = "reconstruction",
    direction: Any = None,
    extra: QueryTerms | None = None,
    num_sweeps: int = 3,
) -> LloydState:
    """Initialize (section 4): codewords, and the first codes of the rows.

    Args:
      key: a typed key, ``jax.random.key(seed)``.
      x: ``[n, d]`` rows, n >= num_codewords.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      num_subspaces: m, 1 to d. One is vector quantization.
      num_codewords: k of each subspace, 2 to 256.
      method: ``"random"`` rows; ``"k-means++"``; or ``"reconstruction"``, k-means++ and then a few
        iterations under the reconstruction loss, which the paper recommends.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      num_sweeps: sweeps of coordinate descent in the assignment.

    Returns:
      :class:`LloydState` at step 0.

    Raises:
      ValueError: sizes out of range, too few rows, rows that are not finite.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (100, 4))
    >>> state = lloyd_init(jax.random.key(1), x, None, num_subspaces=2, num_codewords=4)
    >>> state.codebook.codewords.shape, int(state.step)
    ((2, 4, 2), 0)
    """
    rows = as_learning_rows(x, scaling, direction, extra)
    m, k = _check_sizes(rows.x, num_subspaces, num_codewords)
    if method not in ("reconstruction", "k-means++", "random"):
        raise ValueError(
            f"method must be 'reconstruction', 'k-means++' or 'random'; got {method!r}"
        )
    options = _Options("auto", as_count(num_sweeps, name="num_sweeps"))
    rows = jax.tree.map(jnp.asarray, rows)
    traced = is_traced(key, rows)
    state = _jit_start(key, rows, m, k, method)
    if method == "reconstruction" and traced:
        state, _ = jax.lax.scan(
            lambda state, _: (_jit_warm(state, rows), None), state, None, length=_WARM_ITERATIONS
        )
    elif method == "reconstruction":
        for _ in range(_WARM_ITERATIONS):
            state = _wait(_jit_warm(state, rows))
    state = _jit_finish(state, rows, options)
    return state if traced else _wait(state)


def lloyd_update(
    state: LloydState,
    x: Any,
    scaling: Scaling | None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    solver: Solver = "auto",
    num_sweeps: int = 3,
) -> LloydState:
    """One iteration of section 4: the assignment step, then the codebook step.

    The assignment (enumeration for m = 1, coordinate descent with the coupling of the whole row
    for m > 1) starts at the present codes and the codebook step minimises a convex quadratic
    (Theorem 4.2, section 7.5), so the loss never rises. Codewords without rows are re-seeded.

    Args:
      state: from :func:`lloyd_init` or an earlier update, for the same rows.
      x: ``[n, d]`` rows.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      solver: ``"dense"``, ``"cg"`` (matrix-free conjugate gradients), or ``"auto"`` by size.
      num_sweeps: sweeps of coordinate descent.

    Returns:
      The next :class:`LloydState`.

    Raises:
      ValueError: rows that do not match the state, or are not finite.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (100, 4))
    >>> state = lloyd_init(jax.random.key(1), x, None, num_subspaces=2, num_codewords=4)
    >>> bool(lloyd_update(state, x, None).loss <= state.loss)
    True
    """
    rows = as_learning_rows(x, scaling, direction, extra, dim=state.codebook.dim)
    if rows.x.shape[0] != state.codes.shape[0]:
        raise ValueError(
            f"x must have the rows of the state, {state.codes.shape[0]}; got {rows.x.shape[0]}"
        )
    m, k, s = state.codebook.codewords.shape
    options = _Options(choose_solver(solver, m, k, s), as_count(num_sweeps, name="num_sweeps"))
    return _jit_update(state, jax.tree.map(jnp.asarray, rows), options)


def fit(
    key: Array,
    x: Any,
    scaling: Scaling | None = None,
    *,
    num_subspaces: int,
    num_codewords: int = 16,
    num_iterations: int = 25,
    init: Init = "reconstruction",
    direction: Any = None,
    extra: QueryTerms | None = None,
    tolerance: float | int = 1e-4,
    num_sweeps: int = 3,
    solver: Solver = "auto",
    callback: Callable[[LloydState], Any] | None = None,
    progress: bool | None = None,
) -> tuple[LloydState, History]:
    """Learn product codebooks under the score-aware loss by Lloyd's algorithm (section 4).

    Minimises ``mean_i h_i,parallel ||r_i,parallel||^2 + h_i,orthogonal ||r_i,orthogonal||^2`` of
    Definitions 4.1 (m = 1) and 4.3. Called inside ``jit`` or ``vmap`` it runs the same steps in a
    scan of ``num_iterations``, without early stop, callback or progress.

    Args:
      key: a typed key, ``jax.random.key(seed)``; the same key gives the same codebook.
      x: ``[n, d]`` rows, n >= num_codewords.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      num_subspaces: m, 1 to d. One is vector quantization.
      num_codewords: k of each subspace, 2 to 256.
      num_iterations: most iterations.
      init: method of :func:`lloyd_init`.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      tolerance: stop when an iteration lowers the loss by at most this fraction (two iterations
        in a row while some codewords are unused, as these have just been re-seeded).
      num_sweeps: sweeps of coordinate descent in an assignment step.
      solver: ``"dense"``, ``"cg"``, or ``"auto"`` by size.
      callback: called with the state after each iteration; a true result stops the learning.
      progress: show a progress bar; ``None`` shows it in a terminal or notebook.

    Returns:
      The last :class:`LloydState`, and the :class:`History` of loss and codeword usage.

    Raises:
      ValueError: sizes out of range, too few rows, rows that are not finite.
      FloatingPointError: a loss that is not finite, with the iteration; its ``state`` attribute
        is the last good state.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 8))
    >>> norms = jax.numpy.linalg.norm(x, axis=1)
    >>> scaling = avq_jax.scaling(avq_jax.Threshold(1.0), norms, dim=8)
    >>> state, history = fit(jax.random.key(1), x, scaling, num_subspaces=4)
    >>> bool(history.loss[-1] <= history.loss[0])
    True

    Reference:
      Guo et al., Accelerating Large-Scale Inference with Anisotropic Vector Quantization, 2020.
    """
    rows = as_learning_rows(x, scaling, direction, extra)
    m, k = _check_sizes(rows.x, num_subspaces, num_codewords)
    as_count(num_iterations, name="num_iterations", minimum=0)
    as_count(num_sweeps, name="num_sweeps")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0; got {tolerance}")
    options = _Options(choose_solver(solver, m, k, -(-rows.x.shape[1] // m)), num_sweeps)
    rows = jax.tree.map(jnp.asarray, rows)
    state = lloyd_init(
        key,
        rows.x,
        rows.scaling,
        num_subspaces=m,
        num_codewords=k,
        method=init,
        direction=rows.direction,
        extra=rows.extra,
        num_sweeps=num_sweeps,
    )
    if is_traced(key, rows):

        def body(state, _):
            state, usage = _jit_step(state, rows, options)
            return state, History(state.loss, usage)

        return jax.lax.scan(body, state, None, length=num_iterations)

    losses, usages = [], []
    previous, stalled = float(state.loss), False
    for i in steps(num_iterations, "learning codebooks", progress):
        new, usage = _jit_step(state, rows, options)
        loss = float(_wait(new).loss)
        if not math.isfinite(loss):
            error = FloatingPointError(
                f"the loss became {loss} at iteration {i}; the last good state is in this "
                "error's `state` attribute"
            )
            error.state = state  # type: ignore[attr-defined]
            raise error
        state = new
        losses.append(loss)
        usages.append(float(usage))
        if callback is not None and callback(state):
            break
        # Codewords re-seeded in this iteration lower the loss in the next one, if at all.
        small = previous - loss <= tolerance * previous
        if small and (stalled or usages[-1] == 1 or loss == 0):
            break
        previous, stalled = loss, small
    return state, History(np.array(losses, np.float32), np.array(usages, np.float32))
