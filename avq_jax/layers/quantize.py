"""Quantization as a layer of a model: hard codes with a gradient, and a soft assignment."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling, row_norms, score_aware_loss
from avq_jax.quantization import Codebook, decode
from avq_jax.quantization.codebook import as_learning_rows, encode_rows
from avq_jax.quantization.rows import Rows, quadratic_form, unit

__all__ = ["Quantized", "quantize", "soft_quantize"]

ESTIMATORS = ("straight-through", "rotation")


class Quantized(NamedTuple):
    """What a quantization layer gives for a batch of rows.

    Attributes:
      x_tilde: ``[n, d]`` the quantized rows, with the gradient of the estimator.
      codes: ``uint8[n, m]``, without a gradient.
      codebook_loss: ``[n]`` score-aware loss that moves the codewords towards the rows.
      commitment_loss: ``[n]`` the same value, moving the rows towards their codewords.
    """

    x_tilde: Float[Array, "n d"]
    codes: UInt8[Array, "n m"]
    codebook_loss: Float[Array, " n"]
    commitment_loss: Float[Array, " n"]


def _codes(codebook: Codebook, rows: Rows, num_sweeps: int) -> UInt8[Array, "n m"]:
    words, rows = jax.lax.stop_gradient((codebook.codewords, rows))
    return encode_rows(words, rows, num_sweeps=num_sweeps).T.astype(jnp.uint8)


def learning_rows(codebook: Codebook, x: Any, scaling: Any, direction: Any, extra: Any) -> Rows:
    """Check rows and what their loss depends on against a codebook."""
    if not isinstance(codebook, Codebook):
        raise TypeError(f"codebook must be an avq_jax.Codebook; got {type(codebook).__name__}")
    rows = as_learning_rows(x, scaling, direction, extra, dim=codebook.dim)
    return jax.tree.map(jnp.asarray, rows)


def quantize(
    codebook: Codebook,
    x: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    estimator: str = "straight-through",
    num_sweeps: int = 3,
) -> Quantized:
    r"""Quantize rows inside a model: hard codes forward, an estimated gradient backward.

    Codes minimise (locally) the score-aware loss of Definition 4.1. The gradient of
    ``x_tilde`` reaches the codewords as that of :func:`avq_jax.decode`, and the rows by

    - ``"straight-through"``: the identity (Bengio et al., 2013);
    - ``"rotation"``: the rotation and rescaling that carries x to x~, taken as constant
      (Fifty et al., 2024, Eq. 4): :math:`\lambda (I - 2 r r^T + 2 \hat q \hat e^T)` with
      :math:`\lambda = \|\tilde x\| / \|x\|`, :math:`\hat e = x / \|x\|`,
      :math:`\hat q = \tilde x / \|\tilde x\|`, r the unit vector along
      :math:`\hat e + \hat q`. Where x or x~ is zero it is the identity.

    The two losses are the usual pair of VQ-VAE (van den Oord et al., 2017) under the score-aware
    metric; neither has a gradient in the direction. Add
    ``codebook_loss.mean() + beta * commitment_loss.mean()`` to the loss of the model, or update
    the codewords by :func:`ema_update` and add the second alone. To keep the loss of the model
    from the codewords, pass ``jax.lax.stop_gradient(codebook)``; the codebook loss then has no
    gradient either.

    Args:
      codebook: m subspaces of k codewords; a pytree, so an optimizer can hold it.
      x: ``[n, d]`` rows.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      direction: ``[n, d]`` direction of the parallel error; ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      estimator: ``"straight-through"`` or ``"rotation"``.
      num_sweeps: sweeps of coordinate descent in the assignment; 0 is the nearest codeword of
        each subspace.

    Returns:
      :class:`Quantized`. Gradients are finite at zero rows and at ties. A row that is not finite
      has NaN in its losses, a codeword that is not finite in all rows and losses.

    Raises:
      TypeError: not a Codebook, a scaling that is not a Scaling.
      ValueError: an unknown estimator, shapes that do not fit, concrete rows that are not finite.

    >>> import jax, jax.numpy as jnp
    >>> book = Codebook(jnp.array([[[0., 0.], [2., 0.]]]), dim=2)
    >>> out = quantize(book, jnp.array([[1.5, 0.5]]))
    >>> out.x_tilde.tolist(), out.codes.tolist(), round(float(out.commitment_loss[0]), 3)
    ([[2.0, 0.0]], [[1]], 0.5)
    >>> jax.grad(lambda x: quantize(book, x).x_tilde[0, 0])(jnp.array([[1.5, 0.5]])).tolist()
    [[1.0, 0.0]]

    Reference:
      Fifty et al., "Restructuring Vector Quantization with the Rotation Trick", 2024.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}; got {estimator!r}")
    rows = learning_rows(codebook, x, scaling, direction, extra)
    num_sweeps = as_count(num_sweeps, name="num_sweeps", minimum=0)
    return _quantize(codebook, rows, estimator, num_sweeps)


@functools.partial(jax.jit, static_argnames=("estimator", "num_sweeps"))
def _quantize(codebook: Codebook, rows: Rows, estimator: str, num_sweeps: int) -> Quantized:
    codes = _codes(codebook, rows, num_sweeps)
    # A codeword that is not finite is chosen by no row, or ends the search: it must show.
    whole = jnp.all(jnp.isfinite(codebook.codewords))
    picked = decode(codebook, codes) + jnp.where(whole, jnp.float32(0), jnp.nan)
    still = jax.lax.stop_gradient((rows, picked))
    moved = rows.x if estimator == "straight-through" else _rotated(rows.x, still[1])
    along = still[0].x if rows.direction is None else still[0].direction
    metric: Any = {"direction": along, "extra": still[0].extra}
    weights = still[0].scaling
    return Quantized(
        # The difference is exactly zero: the value is that of the codewords.
        x_tilde=picked + (moved - jax.lax.stop_gradient(moved)),
        codes=codes,
        codebook_loss=score_aware_loss(still[0].x, picked, weights, **metric),
        commitment_loss=score_aware_loss(rows.x, still[1], weights, **metric),
    )


def _rotated(x: Float[Array, "n d"], x_tilde: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """``lambda R x`` with R and lambda constant: x carried to x~ (Fifty et al., Eq. 4)."""
    fixed = jax.lax.stop_gradient(x)
    e, q = unit(fixed), unit(x_tilde)
    r = unit(e + q)
    before, after = row_norms(fixed), row_norms(x_tilde)
    zero = (before == 0) | (after == 0)
    scale = jnp.where(zero, 1, after / jnp.where(zero, 1, before))
    rotated = x - 2 * _dot(r, x) * r + 2 * _dot(e, x) * q
    return jnp.where(zero[:, None], x, scale[:, None] * rotated)


def _dot(a: Float[Array, "n d"], b: Float[Array, "n d"]) -> Float[Array, "n 1"]:
    return jnp.sum(a * b, axis=1, keepdims=True)


def soft_quantize(
    codebook: Codebook,
    x: Any,
    scaling: Scaling | None = None,
    *,
    temperature: Any,
    direction: Any = None,
    extra: QueryTerms | None = None,
    num_sweeps: int = 10,
) -> Float[Array, "n d"]:
    r"""Quantize rows by a mixture of codewords, differentiable in everything.

    At the hard codes of a row, let cost_mj be its score-aware loss with codeword j in subspace m
    and all other subspaces left as they are, over its orthogonal weight (so in the units of a
    squared distance). Subspace m then holds :math:`\sum_j p_{mj} c_{mj}`,
    :math:`p_{mj} \propto \exp(-\text{cost}_{mj} / \text{temperature})`. For temperature -> 0 this
    is the hard quantization, where the coordinate descent has converged and no codewords tie
    (codewords that tie share); for a large temperature it is the mean of the codewords.

    Args:
      codebook: m subspaces of k codewords.
      x: ``[n, d]`` rows.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      temperature: above 0, in the units of ||x||^2; may be traced and differentiated.
      direction: ``[n, d]`` direction of the parallel error; ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      num_sweeps: sweeps of coordinate descent for the hard codes.

    Returns:
      ``float32[n, d]``. Derivatives in rows, codewords, scaling (so in T, p or b), direction and
      temperature; those of the hard codes are zero.

    Raises:
      TypeError: not a Codebook, a scaling that is not a Scaling.
      ValueError: a temperature that is not above 0, shapes that do not fit, concrete rows that
        are not finite.

    >>> import jax.numpy as jnp
    >>> book = Codebook(jnp.array([[[0.], [2.]]]), dim=1)
    >>> for t in (100.0, 1.0, 0.01):
    ...     print(round(float(soft_quantize(book, jnp.array([[1.5]]), temperature=t)[0, 0]), 3))
    1.01
    1.762
    2.0
    """
    if not is_traced(temperature) and not np.all(np.asarray(temperature) > 0):
        raise ValueError(f"temperature must be above 0; got {temperature}")
    rows = learning_rows(codebook, x, scaling, direction, extra)
    num_sweeps = as_count(num_sweeps, name="num_sweeps", minimum=0)
    return _soft_quantize(codebook, rows, jnp.asarray(temperature, jnp.float32), num_sweeps)


@functools.partial(jax.jit, static_argnames="num_sweeps")
def _soft_quantize(
    codebook: Codebook, rows: Rows, temperature: Float[Array, ""], num_sweeps: int
) -> Float[Array, "n d"]:
    codes = _codes(codebook, rows, num_sweeps)
    words = codebook.codewords
    m, _, s = words.shape
    form = quadratic_form(rows, m)
    chosen = jax.vmap(lambda c, i: c[i].T, in_axes=(0, 1))(words, codes)  # [m, s, n]
    parallel = jnp.einsum("rmsn,msn->rn", form.directions, form.x - chosen, precision="highest")

    def subspace(words: Array, x: Array, u: Array, chosen: Array) -> Array:
        distance = jnp.sum((x[None] - words[:, :, None]) ** 2, axis=1)  # [k, n]
        # <u, r> of the whole row, with codeword j put in the place of the chosen one.
        shift = jnp.einsum("rsn,ksn->krn", u, chosen[None] - words[:, :, None], precision="highest")
        across = jnp.where(form.isotropic > 0, form.isotropic, 1)
        square = jnp.sum(form.weights[None] * (parallel[None] + shift) ** 2, axis=1)
        cost = distance + square / across[None]
        share = jax.nn.softmax(-cost / temperature, axis=0)
        return jnp.einsum("ks,kn->sn", words, share, precision="highest")

    mixed = jax.vmap(subspace, in_axes=(0, 0, 1, 0))(words, form.x, form.directions, chosen)
    return mixed.reshape(m * s, -1).T[:, : codebook.dim]
