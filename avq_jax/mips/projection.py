"""Fewer dimensions to scan: a tree quantizes a projection of rows that rescoring has whole."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avq_jax.loss import Scaling

__all__ = ["METHODS", "Scanned", "learn_projection", "lift", "project", "scanned_rows"]

Method = Literal["pca", "prefix"]
METHODS = ("pca", "prefix")


class Scanned(NamedTuple):
    """What a tree quantizes, and the scaling under which it does."""

    rows: Any
    scaling: Scaling | None


def learn_projection(
    x: Float[Any, "n d"], width: int, *, method: Method, centered: bool
) -> Float[Array, "d p"] | None:
    """Give the principal axes to scan along, as columns; ``None`` for the first coordinates.

    Args:
      x: ``[n, d]`` sample rows.
      width: p, at most d.
      method: ``"pca"`` or ``"prefix"``.
      centered: axes of the covariance, which distances do not tell from those of the second
        moment; else those of the second moment, which keep most of ``<q, x>^2`` for queries of
        random direction.

    Returns:
      ``float32[d, p]`` orthonormal columns, or ``None``.

    >>> learn_projection(np.array([[3.0, 0.0], [1.0, 0.1]]), 1, method="pca", centered=False).shape
    (2, 1)
    """
    if method == "prefix":
        return None
    x = np.asarray(x, np.float64)
    x = x - x.mean(axis=0) if centered else x
    _, axes = np.linalg.eigh(x.T @ x)
    axes = axes[:, ::-1][:, :width]
    # The sign that makes the largest entry positive, so that equal data give equal axes.
    largest = np.abs(axes).argmax(axis=0)
    return jnp.asarray(axes * np.sign(axes[largest, np.arange(width)]), jnp.float32)


def project(matrix: Any, width: int, x: Any) -> Any:
    """Rows or queries ``[..., d]`` as the tree sees them, ``[..., p]``."""
    if matrix is None:
        return x if x.shape[-1] == width else x[..., :width]
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


def lift(matrix: Any, dim: int, x: Any) -> Any:
    """Rows of the tree ``[..., p]`` among the whole ones ``[..., d]``."""
    if matrix is None:
        pad = ((0, 0),) * (x.ndim - 1) + ((0, dim - x.shape[-1]),)
        return x if x.shape[-1] == dim else jnp.pad(x, pad)
    return jnp.matmul(x, matrix.T, precision=jax.lax.Precision.HIGHEST)


def scanned_rows(matrix: Any, width: int, x: Float[Any, "n d"], scaling: Scaling | None) -> Scanned:
    r"""Rows for the tree to quantize, such that their score-aware loss is that of the whole rows.

    With :math:`p = P^T x` and codes that stand for :math:`\tilde p`, the residual
    :math:`x - P \tilde p` has :math:`P (p - \tilde p)` inside the projected space and a part
    outside that no code changes. It adds a constant to :math:`\|r\|^2`, but to
    :math:`\langle r, x \rangle` it adds :math:`\|x\|^2 - \|p\|^2`: queries that x answers are
    always scored too low. Both terms of Theorem 3.2 as a quadratic form in :math:`\tilde p` have
    their minimum along p, at

    .. math:: y = \frac{h_\perp + w \|x\|^2 / \|p\|^2}{h_\perp + w} \, p, \qquad
       w = (h_\parallel - h_\perp) \|p\|^2 / \|x\|^2,

    and differ from the loss of y under :math:`(h_\perp + w, h_\perp)` by a constant.

    Args:
      matrix: of :func:`learn_projection`.
      width: p.
      x: ``[n, d]``.
      scaling: of the rows; ``None``, for distances, keeps p itself.

    Returns:
      :class:`Scanned`.

    >>> from avq_jax import Scaling
    >>> x = jnp.array([[3.0, 4.0]])
    >>> scanned_rows(None, 1, x, Scaling(jnp.ones(1), jnp.ones(1))).rows.tolist()
    [[3.0]]
    >>> y = scanned_rows(None, 1, x, Scaling(2 * jnp.ones(1), jnp.ones(1))).rows  # 2 / 1.36 * 3
    >>> round(float(y[0, 0]), 3)
    4.412
    """
    p = project(matrix, width, x)
    if scaling is None or width == x.shape[-1]:
        return Scanned(p, scaling)
    whole, part = jnp.sum(x * x, axis=-1), jnp.sum(p * p, axis=-1)
    seen = (whole > 0) & (part > 0)
    share = jnp.where(seen, part / jnp.where(seen, whole, 1), 1)
    more = (scaling.parallel - scaling.orthogonal) * share
    longer = (scaling.orthogonal + more / share) / (scaling.orthogonal + more)
    return Scanned(p * longer[..., None], Scaling(scaling.orthogonal + more, scaling.orthogonal))
