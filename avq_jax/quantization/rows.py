"""Rows and their quadratic loss (Definition 4.1) in blocks, points on the last axis."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from avq_jax.loss import QueryTerms, Scaling

__all__ = [
    "QuadraticForm",
    "Rows",
    "in_blocks",
    "quadratic_form",
    "reconstruct",
    "row_losses",
    "split",
    "unit",
]


class Rows(NamedTuple):
    """What the loss of a set of rows depends on; every leaf has the point axis first.

    Attributes:
      x: ``[n, d]`` the encoded rows.
      scaling: their :class:`~avq_jax.Scaling`.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms`, or ``None``.
    """

    x: Float[Array, "*n d"]
    scaling: Scaling
    direction: Float[Array, "*n d"] | None = None
    extra: QueryTerms | None = None


class QuadraticForm(NamedTuple):
    """Loss of a block of B rows: ``isotropic ||r||^2 + sum_j weights_j <directions_j, r>^2``.

    Attributes:
      x: ``[m, s, B]`` rows split into subspaces.
      isotropic: ``[B]``.
      directions: ``[R, m, s, B]``; the first is the parallel direction of Theorem 3.2.
      weights: ``[R, B]``; the first is ``parallel - orthogonal``.
    """

    x: Float[Array, "m s B"]
    isotropic: Float[Array, " B"]
    directions: Float[Array, "R m s B"]
    weights: Float[Array, "R B"]


def unit(v: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Rows of unit length; zero rows stay zero. No squared norm overflows or underflows."""
    peak = jnp.max(jnp.abs(v), axis=-1, keepdims=True)
    v = v / jnp.where(peak > 0, peak, 1)
    square = jnp.sum(v * v, axis=-1, keepdims=True)
    return v * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def split(x: Float[Array, "n d"], num_subspaces: int) -> Float[Array, "m s n"]:
    """Columns cut into subspaces of width ceil(d / m), zero-padded, points on the last axis."""
    n, d = x.shape
    width = -(-d // num_subspaces)
    x = jnp.pad(x, ((0, 0), (0, num_subspaces * width - d)))
    return x.T.reshape(num_subspaces, width, n)


def quadratic_form(rows: Rows, num_subspaces: int) -> QuadraticForm:
    """Give the terms of Theorem 3.2, and any further query terms, of one block of rows."""
    u = unit(rows.x if rows.direction is None else rows.direction)
    directions, weights = u[:, None, :], (rows.scaling.parallel - rows.scaling.orthogonal)[:, None]
    if rows.extra is not None:
        directions = jnp.concatenate([directions, rows.extra.directions], axis=1)
        weights = jnp.concatenate([weights, rows.extra.weights], axis=1)
    return QuadraticForm(
        x=split(rows.x, num_subspaces),
        isotropic=rows.scaling.orthogonal,
        directions=jax.vmap(split, in_axes=(1, None))(directions, num_subspaces),
        weights=weights.T,
    )


def in_blocks(rows: Rows, block: int) -> Rows:
    """Leaves ``[n, ...]`` as ``[ceil(n / block), block, ...]``; padding rows have zero scaling."""

    def cut(leaf: Array) -> Array:
        n = leaf.shape[0]
        count = -(-n // block)
        leaf = jnp.pad(leaf, ((0, count * block - n),) + ((0, 0),) * (leaf.ndim - 1))
        return leaf.reshape(count, block, *leaf.shape[1:])

    return jax.tree.map(cut, rows)


def reconstruct(
    codewords: Float[Array, "m k s"], codes: Int32[Array, "m B"]
) -> Float[Array, "m s B"]:
    """``B_i c`` of a block: the selected codewords, points on the last axis."""
    return jax.lax.map(lambda z: z[0][z[1]].T, (codewords, codes))


def row_losses(form: QuadraticForm, residual: Float[Array, "m s B"]) -> Float[Array, " B"]:
    """Loss of each row of a block, ``a ||r||^2 + sum_j w_j <u_j, r>^2``, never below zero."""
    square = jnp.sum(residual * residual, axis=(0, 1))
    projection = jnp.einsum("rmsb,msb->rb", form.directions, residual, precision="highest")
    loss = form.isotropic * square + jnp.sum(form.weights * projection**2, axis=0)
    return jnp.maximum(loss, 0)
