"""Stochastic gradient descent on product codebooks under the score-aware loss (section 4)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.progress import steps
from avq_jax.quantization.codebook import Codebook, as_learning_rows, encode_rows
from avq_jax.quantization.lloyd_steps import (
    History,
    Init,
    LloydState,
    check_sizes,
    initial_codewords,
    mean_loss,
)
from avq_jax.quantization.rows import Rows, quadratic_form, split
from avq_jax.quantization.update import reconstruct, row_losses

__all__ = [
    "default_sgd_optimizer",
    "fit_sgd",
    "init_optimizer",
    "interval_counts",
    "learning_failure",
    "optimizer_step",
]

_LEARNING_RATE = 0.05
# A codeword that none of this many rows per codeword chose is dead.
_WINDOW = 256


class _Options(NamedTuple):
    """Static options of a step."""

    batch_size: int
    log_every: int
    num_sweeps: int


class _Progress(NamedTuple):
    """What a step carries.

    ``good`` are the last codewords whose minibatch loss was finite; once ``failed`` is set they
    no longer change.
    """

    codewords: Float[Array, "m k s"]
    optimizer_state: Any
    used: Bool[Array, "m k"]
    good: Float[Array, "m k s"]
    failed: Bool[Array, ""]
    step: Int32[Array, ""]


@functools.cache
def default_sgd_optimizer(num_steps: int) -> Any:
    """Adam whose step is a fraction of the codewords' root mean square, cosine-decayed to zero.

    The fraction makes the same learning rate fit rows of every scale.

    Args:
      num_steps: steps of the whole descent.

    Returns:
      An ``optax.GradientTransformation``; the same object for the same ``num_steps``, so that
      compiled steps are reused.

    >>> default_sgd_optimizer(10) is default_sgd_optimizer(10)
    True
    """
    import optax  # type: ignore[import-untyped]  # deferred: it is slow to import

    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-20),
        optax.scale_by_param_block_rms(min_scale=1e-20),
        optax.scale_by_learning_rate(
            optax.cosine_decay_schedule(_LEARNING_RATE, max(num_steps, 1))
        ),
    )


def init_optimizer(optimizer: Any, weights: Any) -> Any:
    """Give the optimizer's first state.

    Raises:
      TypeError: not an optimizer.
    """
    if not (callable(getattr(optimizer, "init", None)) and hasattr(optimizer, "update")):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation or None; got {optimizer!r}"
        )
    return optimizer.init(weights)


def optimizer_step(optimizer: Any, gradient: Any, state: Any, weights: Any) -> tuple[Any, Any]:
    """Give the next weights and optimizer state."""
    # optax mixes dtypes, which must not fail where a caller has made promotion strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = optimizer.update(gradient, state, weights)
    return jax.tree.map(lambda w, u: w + u.astype(w.dtype), weights, updates), state


def _batch_loss(
    codewords: Float[Array, "m k s"], codes: Int32[Array, "m B"], batch: Rows
) -> tuple[Float[Array, ""], Float[Array, " B"]]:
    """Mean of Definition 4.1 over the minibatch for fixed codes."""
    form = quadratic_form(batch, codewords.shape[0])
    each = row_losses(form, form.x - reconstruct(codewords, codes))
    return jnp.mean(each), each


def _reseed(codewords: Array, dead: Array, batch: Rows, each: Array) -> Array:
    """Dead codewords restart at the rows of the minibatch that are served worst."""
    m, k, _ = codewords.shape
    worst = jax.lax.top_k(each, min(k, each.shape[0]))[1]
    fresh = split(batch.x[worst], m).transpose(0, 2, 1)
    fresh = jnp.pad(fresh, ((0, 0), (0, k - fresh.shape[1]), (0, 0)), mode="edge")
    return jnp.where(dead[..., None], fresh, codewords)


def _step(
    key: Array, state: _Progress, rows: Rows, optimizer: Any, options: _Options
) -> tuple[_Progress, Float[Array, ""], Bool[Array, "m k"]]:
    k = state.codewords.shape[1]
    n = rows.x.shape[0]
    picks = jax.random.randint(jax.random.fold_in(key, state.step), (options.batch_size,), 0, n)
    batch = jax.tree.map(lambda leaf: leaf[picks], rows)
    codes = encode_rows(state.codewords, batch, num_sweeps=options.num_sweeps)
    (loss, each), gradient = jax.value_and_grad(_batch_loss, has_aux=True)(
        state.codewords, codes, batch
    )
    codewords, optimizer_state = optimizer_step(
        optimizer, gradient, state.optimizer_state, state.codewords
    )
    failed = state.failed | ~jnp.isfinite(loss)
    good = jnp.where(failed, state.good, state.codewords)

    chosen = jnp.any(codes[:, None, :] == jnp.arange(k)[None, :, None], axis=-1)
    used = state.used | chosen
    due = (state.step + 1) % max(1, -(-_WINDOW * k // options.batch_size)) == 0
    codewords = jax.lax.cond(
        due & ~jnp.all(used), lambda c: _reseed(c, ~used, batch, each), lambda c: c, codewords
    )
    state = _Progress(codewords, optimizer_state, used & ~due, good, failed, state.step + 1)
    return state, loss, chosen


@functools.partial(jax.jit, static_argnames=("optimizer", "options"))
def _interval(key, state: _Progress, rows: Rows, count: Array, optimizer: Any, options: _Options):
    """``count`` steps, at most ``log_every``, in one dispatch; losses beyond ``count`` are 0."""
    m, k, _ = state.codewords.shape

    def body(i, loop):
        state, losses, chosen = loop
        state, loss, new = _step(key, state, rows, optimizer, options)
        return state, losses.at[i].set(loss), chosen | new

    start = (state, jnp.zeros(options.log_every, jnp.float32), jnp.zeros((m, k), bool))
    state, losses, chosen = jax.lax.fori_loop(0, count, body, start)
    mean = jnp.sum(losses) / jnp.float32(count)
    return state, losses, History(mean, jnp.mean(chosen, dtype=jnp.float32))


@functools.partial(jax.jit, static_argnames=("dim", "num_sweeps"))
def _finish(codewords: Array, step: Array, rows: Rows, dim: int, num_sweeps: int) -> LloydState:
    """Give the codes and the loss of all rows."""
    codes = encode_rows(codewords, rows, num_sweeps=num_sweeps)
    loss, _ = mean_loss(codewords, codes, rows)
    return LloydState(Codebook(codewords, dim=dim), codes.T.astype(jnp.uint8), loss, step)


_jit_initial = jax.jit(initial_codewords, static_argnums=(2, 3, 4))


def _start(key: Array, rows: Rows, m: int, k: int, init: Init | Codebook) -> Array:
    d = rows.x.shape[1]
    if isinstance(init, Codebook):
        shape = (m, k, -(-d // m))
        if init.codewords.shape != shape or init.dim != d:
            raise ValueError(
                f"init must have codewords {list(shape)} for rows of width {d}; got "
                f"{list(init.codewords.shape)} for width {init.dim}"
            )
        return jnp.asarray(init.codewords, jnp.float32)
    if init not in ("k-means++", "random"):
        raise ValueError(f"init must be 'k-means++', 'random' or a Codebook; got {init!r}")
    return _jit_initial(key, rows, m, k, init)


def fit_sgd(
    key: Array,
    x: Any,
    scaling: Scaling | None = None,
    *,
    optimizer: Any = None,
    batch_size: int = 1024,
    num_steps: int = 2000,
    num_subspaces: int,
    num_codewords: int = 16,
    init: Init | Codebook = "k-means++",
    direction: Any = None,
    extra: QueryTerms | None = None,
    num_sweeps: int = 3,
    log_every: int = 50,
    callback: Callable[[LloydState], Any] | None = None,
    progress: bool | None = None,
) -> tuple[LloydState, History]:
    """Learn product codebooks under the score-aware loss by minibatch gradient descent.

    A step draws a minibatch, assigns its codes by coordinate descent under the present codewords
    c, and hands the gradient of the mean loss (Definitions 4.1 and 4.3) for those codes,

      ``-2 / |batch| * sum_i B_i^T (a_i I + sum_j w_ij u_ij u_ij^T) (x_i - B_i c)``,

    to the optimizer. Next to :func:`~avq_jax.fit` it needs no pass over all rows but the last,
    and it can go on from a codebook when rows change. Codewords that no recent row chose restart
    at the rows that are served worst. Called inside ``jit`` or ``vmap`` it runs the same steps in
    a scan, without callback or progress.

    Args:
      key: a typed key, ``jax.random.key(seed)``; the same key gives the same codebook, whatever
        ``log_every`` is.
      x: ``[n, d]`` rows, n >= num_codewords.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      optimizer: an ``optax.GradientTransformation`` over ``codewords[m, k, s]``; ``None`` is
        :func:`default_sgd_optimizer`. A new object compiles the step anew: keep and reuse it.
      batch_size: rows of a step, drawn with replacement.
      num_steps: gradient steps, 0 or more.
      num_subspaces: m, 1 to d. One is vector quantization.
      num_codewords: k of each subspace, 2 to 256.
      init: ``"k-means++"`` or ``"random"`` rows, or a :class:`~avq_jax.Codebook` to go on from.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      num_sweeps: most sweeps of coordinate descent in an assignment.
      log_every: steps of one compiled call and one entry of the history.
      callback: called with the state after each such interval; a true result stops the learning.
        Each call assigns all rows first.
      progress: show a progress bar; ``None`` shows it in a terminal or notebook.

    Returns:
      :class:`~avq_jax.LloydState` with the codes and the mean loss of all rows, and the
      :class:`~avq_jax.History`: in each interval the mean loss of its minibatches (which may
      rise), and the fraction of codewords they used.

    Raises:
      ValueError: sizes out of range, too few rows, rows that are not finite.
      FloatingPointError: a loss that is not finite, with the step; its ``state`` attribute is the
        last good state.

    >>> import avq_jax, jax, optax
    >>> x = jax.random.normal(jax.random.key(0), (500, 8))
    >>> scaling = avq_jax.scaling(avq_jax.Threshold(1.0), jax.numpy.linalg.norm(x, axis=1), dim=8)
    >>> state, history = fit_sgd(
    ...     jax.random.key(1), x, scaling, num_subspaces=4, num_steps=100, batch_size=64,
    ...     optimizer=optax.adam(0.05))
    >>> bool(state.loss < history.loss[0])
    True

    Reference:
      Guo et al., Accelerating Large-Scale Inference with Anisotropic Vector Quantization, 2020.
    """
    rows = as_learning_rows(x, scaling, direction, extra)
    m, k = check_sizes(rows.x, num_subspaces, num_codewords)
    num_steps = as_count(num_steps, name="num_steps", minimum=0)
    options = _Options(
        as_count(batch_size, name="batch_size"),
        as_count(log_every, name="log_every"),
        as_count(num_sweeps, name="num_sweeps"),
    )
    optimizer = default_sgd_optimizer(num_steps) if optimizer is None else optimizer
    rows = jax.tree.map(jnp.asarray, rows)
    key_start, key_batch = jax.random.split(key)
    codewords = _start(key_start, rows, m, k, init)
    state = _Progress(
        codewords,
        init_optimizer(optimizer, codewords),
        jnp.zeros((m, k), bool),
        codewords,
        jnp.array(False),
        jnp.array(0, jnp.int32),
    )
    counts = interval_counts(num_steps, options.log_every)

    def finish(codewords: Array, step: Array) -> LloydState:
        return _finish(codewords, step, rows, rows.x.shape[1], num_sweeps)

    if is_traced(key, rows, codewords):

        def body(state, count):
            state, _, entry = _interval(key_batch, state, rows, count, optimizer, options)
            return state, entry

        state, history = jax.lax.scan(body, state, jnp.asarray(counts))
        return finish(state.codewords, state.step), history

    entries = []
    for i in steps(len(counts), "learning codebooks", progress):
        new, losses, entry = _interval(key_batch, state, rows, counts[i], optimizer, options)
        if bool(new.failed):
            losses = np.asarray(losses)[: counts[i]]
            first = int(np.argmax(~np.isfinite(losses)))
            step = int(state.step) + first
            raise learning_failure(
                losses[first], step, finish(new.good, jnp.array(step, jnp.int32))
            )
        state = new
        entries.append([float(entry.loss), float(entry.usage)])
        if callback is not None and callback(finish(state.codewords, state.step)):
            break
    final = finish(state.codewords, state.step)
    if not math.isfinite(float(final.loss)):
        step = int(state.step)
        raise learning_failure(
            float(final.loss), step, finish(state.good, jnp.array(step, jnp.int32))
        )
    loss, usage = np.array(entries, np.float32).reshape(-1, 2).T
    return final, History(loss, usage)


def interval_counts(num_steps: int, log_every: int) -> Int32[np.ndarray, " t"]:
    """Give the steps of each interval; the last may be shorter.

    >>> interval_counts(7, 3).tolist()
    [3, 3, 1]
    """
    full, rest = divmod(num_steps, log_every)
    return np.array([log_every] * full + [rest] * (rest > 0), np.int32)


def learning_failure(loss: Any, step: int, state: Any) -> FloatingPointError:
    """Make the error of a loss that is not finite; ``state`` is the last good one."""
    error = FloatingPointError(
        f"the loss became {loss} at step {step}; the last good state is in this error's `state` "
        "attribute (a smaller learning rate may help)"
    )
    error.state = state  # type: ignore[attr-defined]
    return error
