"""Product codebooks of rotated rows: the rotation fixed, learned with the codewords, or chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.progress import steps
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.codec import decode, encode
from avq_jax.quantization.lloyd import fit, lloyd_init
from avq_jax.quantization.lloyd_steps import History, Options, check_sizes, step
from avq_jax.quantization.procrustes import RotatedState, turn_step
from avq_jax.quantization.ranking import error_spread, mean_divergence, nearest_rows
from avq_jax.quantization.rotation import Method, Rotated, rotation, turn_rows
from avq_jax.quantization.rows import Rows, unit
from avq_jax.quantization.update import choose_solver

__all__ = ["choose_rotation", "fit_rotated"]

Choice = Literal["auto", "none", "pca", "random", "learned"]

# Least fraction of the loss that a rotation has to save for the product it costs a query.
_WORTH = 0.02
# Best rows of a query whose errors set the temperature of a choice.
_NEIGHBORS = 32
# Rows of which something can be learned, and something asked about the others.
_LEAST_ROWS = 8


def _iterate(state: RotatedState, rows: Rows, options: Options) -> tuple[RotatedState, Array]:
    lloyd, usage = step(state.lloyd, state.turned, options)
    return turn_step(state._replace(lloyd=lloyd), rows), usage


_jit_iterate = jax.jit(_iterate, static_argnames="options")
_jit_turn_rows = jax.jit(turn_rows)


def fit_rotated(
    key: Array,
    x: Any,
    scaling: Scaling | None = None,
    *,
    num_subspaces: int,
    num_codewords: int = 16,
    num_iterations: int = 25,
    method: Choice = "auto",
    start: Method = "pca",
    direction: Any = None,
    extra: QueryTerms | None = None,
    tolerance: float | int = 1e-4,
    num_sweeps: int = 3,
    callback: Callable[[Rotated], Any] | None = None,
    progress: bool | None = None,
) -> tuple[Rotated, History]:
    """Learn product codebooks of rotated rows under the score-aware loss.

    Minimises the mean over the rows of ``h_orthogonal ||r||^2 + (h_parallel - h_orthogonal)
    <u, r>^2``, ``r = x - R^T y``, over codes, codewords of y and, for ``"learned"``, orthogonal R:
    an iteration of :func:`~avq_jax.fit` in the rotated space, then a step of R by majorisation (see
    :mod:`avq_jax.quantization.procrustes`). Inside ``jit`` or ``vmap`` the methods ``"none"``,
    ``"random"`` and ``"learned"`` with ``start="random"`` run in a scan of ``num_iterations``.

    Args:
      key: a typed key, ``jax.random.key(seed)``; the same key gives the same codec.
      x: ``[n, d]`` rows, n >= num_codewords.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      num_subspaces: m, 1 to d.
      num_codewords: k of each subspace, 2 to 256.
      num_iterations: most iterations.
      method: ``"learned"``; ``"pca"`` or ``"random"``, the fixed matrix of
        :func:`~avq_jax.rotation`; ``"none"``, the identity; or ``"auto"``, the choice of
        :func:`~avq_jax.choose_rotation` on a sample of the rows.
      start: where a learned rotation starts, ``"pca"`` or ``"random"``.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      tolerance: stop when an iteration lowers the loss by at most this fraction.
      num_sweeps: sweeps of coordinate descent in an assignment step.
      callback: called with the codec after each iteration; a true result stops the learning.
      progress: show a progress bar; ``None`` shows it in a terminal or notebook.

    Returns:
      :class:`~avq_jax.Rotated` of a :class:`~avq_jax.Codebook`, and the :class:`~avq_jax.History`
      of loss (never rising) and codeword usage.

    Raises:
      ValueError: an unknown method, sizes out of range, too few rows, rows that are not finite.
      TypeError: a method that decides on the host, called inside ``jit``.
      FloatingPointError: a loss that is not finite, with the iteration; its ``state`` attribute
        is the last good codec, or for a fixed rotation the last good state of its codebook.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 8)) @ jax.random.normal(
    ...     jax.random.key(1), (8, 8))
    >>> codec, history = fit_rotated(jax.random.key(2), x, num_subspaces=4, method="learned")
    >>> fixed, _ = fit_rotated(jax.random.key(2), x, num_subspaces=4, method="pca")
    >>> error = lambda c: float(((x - avq_jax.decode(c, avq_jax.encode(c, x))) ** 2).sum())
    >>> bool(history.loss[-1] < history.loss[0]), error(codec) < error(fixed)
    (True, True)

    Reference:
      Ge et al., Optimized Product Quantization, 2013, section 3.1; Kiers, Majorization as a tool
      for optimizing a class of matrix functions, 1990; the loss is that of Guo et al., 2020.
    """
    rows = as_learning_rows(x, scaling, direction, extra)
    m, k = check_sizes(rows.x, num_subspaces, num_codewords)
    num_iterations = as_count(num_iterations, name="num_iterations", minimum=0)
    as_count(num_sweeps, name="num_sweeps")
    _check_method(method, get_args(Choice))
    if start not in get_args(Method):
        raise ValueError(f"start must be 'pca' or 'random'; got {start!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0; got {tolerance}")
    key_choice, key_rotation, key_fit = jax.random.split(key, 3)
    rows = jax.tree.map(jnp.asarray, rows)
    if method == "auto":
        method, _ = choose_rotation(
            key_choice,
            rows.x,
            rows.scaling,
            num_subspaces=m,
            num_codewords=k,
            direction=rows.direction,
            extra=rows.extra,
        )
    d = rows.x.shape[1]
    if method == "none":
        matrix = jnp.eye(d, dtype=jnp.float32)
    else:
        first: Method = start if method == "learned" else "random" if method == "random" else "pca"
        matrix = rotation(key_rotation, rows.x, num_subspaces=m, method=first)
    turned = rows if method == "none" else _jit_turn_rows(matrix, rows)
    terms = {"direction": turned.direction, "extra": turned.extra, "num_sweeps": num_sweeps}
    if method != "learned":
        state, history = fit(
            key_fit,
            turned.x,
            turned.scaling,
            num_subspaces=m,
            num_codewords=k,
            num_iterations=num_iterations,
            tolerance=tolerance,
            callback=None if callback is None else lambda s: callback(Rotated(s.codebook, matrix)),
            progress=progress,
            **terms,
        )
        return Rotated(state.codebook, matrix), history

    options = Options(choose_solver("auto", m, k, -(-d // m)), num_sweeps)
    lloyd = lloyd_init(key_fit, turned.x, turned.scaling, num_subspaces=m, num_codewords=k, **terms)
    found = RotatedState(lloyd, matrix, turned)
    if is_traced(key, rows):

        def body(state, _):
            state, usage = _iterate(state, rows, options)
            return state, History(state.lloyd.loss, usage)

        found, history = jax.lax.scan(body, found, None, length=num_iterations)
        return _codec(found), history
    losses: list[float] = []
    usages: list[float] = []
    previous = float(lloyd.loss)
    for i in steps(num_iterations, "learning a rotation", progress):
        new, usage = _jit_iterate(found, rows, options)
        loss = float(new.lloyd.loss)
        if not math.isfinite(loss):
            error = FloatingPointError(
                f"the loss became {loss} at iteration {i}; the last good codec is in this error's "
                "`state` attribute"
            )
            error.state = _codec(found)  # type: ignore[attr-defined]
            raise error
        found = new
        losses.append(loss)
        usages.append(float(usage))
        if callback is not None and callback(_codec(found)):
            break
        if previous - loss <= tolerance * previous and (usages[-1] == 1 or loss == 0):
            break
        previous = loss
    return _codec(found), History(np.array(losses, np.float32), np.array(usages, np.float32))


def _codec(state: RotatedState) -> Rotated:
    return Rotated(state.lloyd.codebook, state.matrix)


def _check_method(method: str, known: tuple[str, ...]) -> None:
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(map(repr, known))}; got {method!r}")


def choose_rotation(
    key: Array,
    x: Any,
    scaling: Scaling | None = None,
    *,
    num_subspaces: int,
    num_codewords: int = 16,
    methods: Sequence[str] = ("none", "pca", "learned"),
    num_iterations: int = 10,
    sample: int = 20_000,
    direction: Any = None,
    extra: QueryTerms | None = None,
) -> tuple[Any, dict[str, float]]:
    """Choose a method of :func:`~avq_jax.fit_rotated` by how it orders rows for unseen queries.

    A sample is cut in three: each method learns from the first half, and its judge is
    :func:`~avq_jax.ranking_loss` over rows of the second half, of which a quarter are the queries.
    The score-aware loss would not do: rotations lower it where the order of the best rows gains
    nothing (GloVe by principal axes). A method later in ``methods`` replaces the choice so far only
    where it loses less by more than two percent, for a rotation costs every query a d x d product.

    Args:
      key: a typed key, which draws the sample.
      x: ``[n, d]`` rows; half of the sample must be at least num_codewords.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      num_subspaces: m, 1 to d.
      num_codewords: k of each subspace, 2 to 256.
      methods: ``"none"``, ``"pca"``, ``"random"`` or ``"learned"``, the simplest first.
      num_iterations: of each learner.
      sample: most rows that are looked at, at least 8.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves. Where
        it is given it is taken for the original rows, of which x is the residual behind a tree.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.

    Returns:
      The chosen method, and the ranking loss of each, at the temperature of the first one's errors.

    Raises:
      ValueError: no or unknown methods, sizes out of range, rows that are not finite.
      TypeError: called inside ``jit``.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (2000, 8)) * 2.0 ** jax.numpy.arange(8.0)[None]
    >>> method, losses = choose_rotation(
    ...     jax.random.key(1), x, num_subspaces=4, num_codewords=4, methods=("none", "pca"))
    >>> method, losses["pca"] < losses["none"]
    ('pca', True)
    """
    rows = as_learning_rows(x, scaling, direction, extra)
    if is_traced(key, rows):
        raise TypeError("choose_rotation compares losses on the host; call it outside jit")
    if not methods:
        raise ValueError("methods must name at least one method; got none")
    for method in methods:
        _check_method(method, get_args(Choice)[1:])
    n = rows.x.shape[0]
    if n < _LEAST_ROWS:
        raise ValueError(f"x must have at least {_LEAST_ROWS} rows to choose by; got {n}")
    size = min(n, as_count(sample, name="sample", minimum=_LEAST_ROWS))
    key_sample, key_fit = jax.random.split(key)
    picks = np.asarray(jax.random.choice(key_sample, n, (size,), replace=False))
    learned, judged, asked = (
        jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), rows)
        for i in np.split(picks, [size // 2, size - size // 8])
    )
    whole, queries = (
        part.x if part.direction is None else part.direction for part in (judged, asked)
    )
    queries = unit(queries)
    losses: dict[str, float] = {}
    tau = None
    for method in methods:
        codec, _ = fit_rotated(
            key_fit,
            learned.x,
            learned.scaling,
            num_subspaces=num_subspaces,
            num_codewords=num_codewords,
            num_iterations=num_iterations,
            method=cast(Choice, method),
            direction=learned.direction,
            extra=learned.extra,
            progress=False,
        )
        terms = {"direction": judged.direction, "extra": judged.extra}
        decoded = decode(codec, encode(codec, judged.x, judged.scaling, **terms))
        decoded = whole - (judged.x - decoded)
        if tau is None:
            _, ids = nearest_rows(queries, whole, min(_NEIGHBORS, whole.shape[0]))
            tau = error_spread(queries, whole, decoded, ids)
        losses[method] = float(mean_divergence(queries, whole, decoded, tau))
    best = methods[0]
    for method in methods[1:]:
        if losses[method] < (1 - _WORTH) * losses[best]:
            best = method
    return best, losses
