"""Codebooks learned by exponential moving averages beside a model, and dead codewords revived."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from avq_jax.checks import is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.quantization import Codebook
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.rows import Rows, quadratic_form, split

__all__ = ["EmaState", "ema_init", "ema_update", "revive"]


class EmaState(NamedTuple):
    """State of moving-average learning; a pytree.

    Attributes:
      codebook: the codewords.
      weight: ``[m, k]`` moving average of what the rows of a codeword weigh.
      usage: ``[m, k]`` moving average of the fraction of rows that a codeword serves.
    """

    codebook: Codebook
    weight: Float[Array, "m k"]
    usage: Float[Array, "m k"]


def ema_init(codebook: Codebook) -> EmaState:
    """Start moving averages at a codebook.

    Args:
      codebook: initial codewords, for example of :func:`avq_jax.lloyd_init`.

    Returns:
      :class:`EmaState`: no weight yet, every codeword used equally.

    Raises:
      TypeError: not a Codebook.

    >>> import jax.numpy as jnp
    >>> ema_init(Codebook(jnp.zeros((2, 4, 3)), dim=6)).usage[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    if not isinstance(codebook, Codebook):
        raise TypeError(f"codebook must be an avq_jax.Codebook; got {type(codebook).__name__}")
    m, k, _ = codebook.codewords.shape
    return EmaState(codebook, jnp.zeros((m, k)), jnp.full((m, k), 1 / k))


def ema_update(
    state: EmaState,
    x: Any,
    codes: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    decay: Any = 0.99,
) -> EmaState:
    r"""Move the codewords towards the rows that chose them.

    With :math:`M_i = a_i I + \sum_j w_{ij} u_{ij} u_{ij}^T` the metric of row i (Definition 4.1),
    r_i its residual, and sums over the rows of a codeword,

    .. math:: N \leftarrow \gamma N + (1 - \gamma) \sum_i \mathrm{tr}(M_i) / d, \quad
              c \leftarrow c + (1 - \gamma) \sum_i (M_i r_i)_m / N.

    Under the reconstruction loss that is the moving average of van den Oord et al. (2017,
    appendix A.1), c = the decayed sum of rows over the decayed number of rows. Under the
    score-aware loss it rests where :math:`\sum_i M_i r_i = 0`: at the joint solution of
    Theorem 4.2 and section 7.5 for these codes, without its linear system. N is at least
    :math:`(1 - \gamma)` times the sum of the largest eigenvalues, so that a step never overshoots
    while N is young.

    Args:
      state: from :func:`ema_init` or an earlier update.
      x: ``[n, d]`` rows of this step. No gradient passes.
      codes: ``uint8[n, m]`` their codes under ``state.codebook``, as :func:`quantize` gives them.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      direction: ``[n, d]`` direction of the parallel error; ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      decay: gamma, from 0 (only this step counts) to below 1.

    Returns:
      The next :class:`EmaState`. Codewords without rows stay where they are.

    Raises:
      ValueError: a decay out of range, codes or rows that do not fit the codebook.

    >>> import jax.numpy as jnp
    >>> state = ema_init(Codebook(jnp.array([[[0.], [9.]]]), dim=1))
    >>> codes = jnp.zeros((2, 1), jnp.uint8)
    >>> state = ema_update(state, jnp.array([[1.], [3.]]), codes, decay=0.9)
    >>> state.codebook.codewords.ravel().tolist()  # the mean, and a codeword without rows
    [2.0, 9.0]
    """
    if not is_traced(decay) and not 0 <= float(decay) < 1:
        raise ValueError(f"decay must be from 0 to below 1; got {decay}")
    book = state.codebook
    m = book.num_subspaces
    rows = as_learning_rows(x, scaling, direction, extra, dim=book.dim)
    rows = jax.lax.stop_gradient(jax.tree.map(jnp.asarray, rows))
    n = rows.x.shape[0]
    codes = jnp.asarray(codes)
    if codes.shape != (n, m) or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers [{n}, {m}]; got {codes.dtype} {codes.shape}")
    return _ema_update(state, rows, codes, jnp.asarray(decay, jnp.float32))


@jax.jit
def _ema_update(
    state: EmaState, rows: Rows, codes: Integer[Array, "n m"], keep: Float[Array, ""]
) -> EmaState:
    book = state.codebook
    m, k, _ = book.codewords.shape
    n = rows.x.shape[0]
    picks = codes.T.astype(jnp.int32)
    form = quadratic_form(rows, m)
    chosen = jax.vmap(lambda c, i: c[i].T)(book.codewords, picks)
    residual = form.x - chosen
    along = jnp.einsum("rmsn,msn->rn", form.directions, residual, precision="highest")
    pull = form.isotropic[None, None, :] * residual + jnp.einsum(
        "rn,rmsn->msn", form.weights * along, form.directions
    )  # M r
    extra_trace = jnp.sum(
        jnp.maximum(form.weights, 0) * jnp.sum(form.directions**2, axis=(1, 2)), axis=0
    )
    mean = form.isotropic + extra_trace / book.dim  # tr(M) / d
    most = form.isotropic + extra_trace  # at least the largest eigenvalue

    def total(values: Array) -> Array:
        """Sum ``[m, n, ...]`` over the rows of each codeword."""
        return jax.vmap(lambda v, i: jax.ops.segment_sum(v, i, num_segments=k))(values, picks)

    def each(values: Array) -> Array:
        return total(jnp.broadcast_to(values, (m, n)))

    weight = jnp.maximum(keep * state.weight + (1 - keep) * each(mean), (1 - keep) * each(most))
    step = total(jnp.swapaxes(pull, 1, 2)) / jnp.where(weight > 0, weight, 1)[..., None]
    usage = keep * state.usage + (1 - keep) * each(jnp.full(n, 1 / max(n, 1)))
    words = book.codewords + (1 - keep) * step
    return EmaState(Codebook(words, dim=book.dim), weight, usage)


def revive(key: Array, state: EmaState, x: Any, *, threshold: Any = 0.1) -> EmaState:
    """Put codewords that hardly any row uses onto random rows.

    Args:
      key: a typed key.
      state: of :func:`ema_update`.
      x: ``[n, d]`` rows to restart from, of this step.
      threshold: a codeword is dead when its usage is below ``threshold / k``.

    Returns:
      :class:`EmaState` with the dead codewords replaced, their weight 0 and their usage 1 / k;
      the others are untouched. Pure, of fixed shape, so it may run at every step.

    Raises:
      ValueError: a negative threshold, rows of another width than the codebook.

    >>> import jax, jax.numpy as jnp
    >>> state = ema_init(Codebook(jnp.array([[[0.], [9.]]]), dim=1))
    >>> state = state._replace(usage=jnp.array([[1.0, 0.0]]))
    >>> revive(jax.random.key(0), state, jnp.array([[5.]])).codebook.codewords.ravel().tolist()
    [0.0, 5.0]
    """
    if not is_traced(threshold) and not float(threshold) >= 0:
        raise ValueError(f"threshold must be at least 0; got {threshold}")
    x = as_learning_rows(x, None, dim=state.codebook.dim).x
    rows = jax.lax.stop_gradient(jnp.asarray(x))
    return _revive(key, state, rows, jnp.asarray(threshold, jnp.float32))


@jax.jit
def _revive(
    key: Array, state: EmaState, rows: Float[Array, "n d"], threshold: Float[Array, ""]
) -> EmaState:
    book = state.codebook
    m, k, _ = book.codewords.shape
    picks = jax.random.randint(key, (m, k), 0, rows.shape[0])
    fresh = jax.vmap(lambda v, i: v[:, i].T)(split(rows, m), picks)
    dead = state.usage < threshold / k
    words = jnp.where(dead[..., None], fresh, book.codewords)
    return EmaState(
        Codebook(words, dim=book.dim),
        jnp.where(dead, 0, state.weight),
        jnp.where(dead, 1 / k, state.usage),
    )
