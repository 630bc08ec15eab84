"""Lloyd-style learning of product codebooks under the score-aware loss (sections 4 and 7.5)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.progress import steps
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.lloyd_steps import (
    WARM_ITERATIONS,
    History,
    Init,
    LloydState,
    Options,
    check_sizes,
    finish,
    start,
    step,
    update,
    warm,
)
from avq_jax.quantization.update import Solver, choose_solver

__all__ = ["History", "Init", "LloydState", "fit", "lloyd_init", "lloyd_update"]

_jit_start = jax.jit(start, static_argnums=(2, 3, 4))
_jit_warm = jax.jit(warm)
_jit_finish = jax.jit(finish, static_argnames="options")
_jit_update = jax.jit(update, static_argnames="options")
_jit_step = jax.jit(step, static_argnames="options")


def _wait(state: Any) -> Any:
    """Wait for a dispatched step in Python, where Ctrl-C is heard at once."""
    pause = 1e-5
    loss: Any = state.loss
    while not loss.is_ready():
        time.sleep(pause)
        pause = min(2 * pause, 2e-3)
    return state


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
    m, k = check_sizes(rows.x, num_subspaces, num_codewords)
    if method not in ("reconstruction", "k-means++", "random"):
        raise ValueError(
            f"method must be 'reconstruction', 'k-means++' or 'random'; got {method!r}"
        )
    options = Options("auto", as_count(num_sweeps, name="num_sweeps"))
    rows = jax.tree.map(jnp.asarray, rows)
    traced = is_traced(key, rows)
    state = _jit_start(key, rows, m, k, method)
    if method == "reconstruction" and traced:
        state, _ = jax.lax.scan(
            lambda state, _: (_jit_warm(state, rows), None), state, None, length=WARM_ITERATIONS
        )
    elif method == "reconstruction":
        for _ in range(WARM_ITERATIONS):
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
    options = Options(choose_solver(solver, m, k, s), as_count(num_sweeps, name="num_sweeps"))
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
    m, k = check_sizes(rows.x, num_subspaces, num_codewords)
    as_count(num_iterations, name="num_iterations", minimum=0)
    as_count(num_sweeps, name="num_sweeps")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0; got {tolerance}")
    options = Options(choose_solver(solver, m, k, -(-rows.x.shape[1] // m)), num_sweeps)
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
