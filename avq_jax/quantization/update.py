"""The codebook update step: Theorem 4.2 and the joint system of section 7.5.

For fixed codes the loss is a convex quadratic of all codewords c together,

  ``sum_i (x_i - B_i c)^T (a_i I + sum_j w_ij u_ij u_ij^T) (x_i - B_i c)``,

where the 0/1 matrix B_i selects the codewords of row i. Its minimum solves

  ``(sum_i B_i^T M_i B_i) delta = sum_i B_i^T M_i (x_i - B_i c)``,  ``c + delta`` the new codewords,

(the paper prints ``B_i x_i`` on the right, which must be ``B_i^T x_i``). Solving for the change
delta instead of c keeps float32 errors, and any regularisation, from raising the loss. The system
is scaled by its isotropic diagonal ``D = sum_i a_i`` of each codeword; as
``0 <= <u, B c>^2 <= ||B c||^2`` its condition number is then at most the largest eta (for one
direction), so conjugate gradients need about a dozen products whatever the size.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from avq_jax.quantization.rows import QuadraticForm, Rows, quadratic_form

__all__ = ["Solver", "choose_solver", "counts", "reconstruct", "row_losses", "solve"]

Solver = Literal["auto", "dense", "cg"]

_DENSE_UNKNOWNS = 2048
_DENSE_ENTRIES = 1 << 23
_CG_ITERATIONS = 32
_CG_TOLERANCE = 1e-4
# Relative to D: keeps codewords that no row pins down where they are.
_RIDGE = 1e-6


def choose_solver(solver: Solver, num_subspaces: int, num_codewords: int, width: int) -> Solver:
    """``"dense"`` for small systems (for m = 1 they are block diagonal), else ``"cg"``."""
    if solver not in ("auto", "dense", "cg"):
        raise ValueError(f"solver must be 'auto', 'dense' or 'cg'; got {solver!r}")
    if solver != "auto":
        return solver
    if num_subspaces == 1:
        small = num_codewords * width**2 <= _DENSE_ENTRIES and width <= 256
    else:
        small = num_subspaces * num_codewords * width <= _DENSE_UNKNOWNS
    return "dense" if small else "cg"


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


def _scatter(
    codes: Int32[Array, "m B"], values: Float[Array, "m s B"], k: int
) -> Float[Array, "m k s"]:
    """``sum_i B_i^T v_i`` of a block."""

    def one(z):
        return jax.ops.segment_sum(z[1].T, z[0], num_segments=k)

    return jax.lax.map(one, (codes, values))


def counts(
    codes: Int32[Array, "nb m B"], values: Float[Array, "nb B"], k: int
) -> Float[Array, "m k"]:
    """Sum of ``values`` over the rows of each codeword."""

    def add(total, block):
        codes, value = block
        ones = jnp.broadcast_to(value[None, None, :], (codes.shape[0], 1, codes.shape[1]))
        return total + _scatter(codes, ones, k)[..., 0], None

    start = jnp.zeros((codes.shape[1], k), jnp.float32)
    return jax.lax.scan(add, start, (codes, values))[0]


def solve(
    codewords: Float[Array, "m k s"],
    codes: Int32[Array, "nb m B"],
    blocks: Rows,
    *,
    solver: Solver,
) -> Float[Array, "m k s"]:
    """Codewords that minimise the loss for fixed codes (Theorem 4.2 for m = 1, section 7.5).

    Args:
      codewords: ``[m, k, s]`` before the update; those without rows stay as they are.
      codes: of the rows, in blocks.
      blocks: the rows, in blocks, as :func:`~avq_jax.quantization.rows.in_blocks` cuts them.
      solver: ``"dense"`` or ``"cg"``.

    Returns:
      The new codewords.
    """
    m, k, s = codewords.shape
    diagonal = counts(codes, blocks.scaling.orthogonal, k)[..., None]  # D
    scale = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))

    def gradient(total, block):
        codes, rows = block
        form = quadratic_form(rows, m)
        residual = form.x - reconstruct(codewords, codes)
        return total + _scatter(codes, _metric(form, residual), k), None

    zero = jnp.zeros_like(codewords)
    right, _ = jax.lax.scan(gradient, zero, (codes, blocks))
    right = jnp.where(diagonal > 0, right * scale, 0)
    if solver == "cg":
        delta = _conjugate_gradients(right, scale, codes, blocks)
    elif m == 1:
        delta = _dense_one(right, scale, codes, blocks)
    else:
        delta = _dense_joint(right, scale, codes, blocks)
    # A failed factorisation of a degenerate system is NaN: keep the codewords then.
    delta = jnp.where(jnp.all(jnp.isfinite(delta)), delta, 0)
    return codewords + delta * scale


def _metric(form: QuadraticForm, r: Float[Array, "m s B"]) -> Float[Array, "m s B"]:
    """``(a I + sum_j w_j u_j u_j^T) r`` of each row of a block."""
    return form.isotropic * r + _anisotropic(form, r)


def _anisotropic(form: QuadraticForm, r: Float[Array, "m s B"]) -> Float[Array, "m s B"]:
    projection = jnp.einsum("rmsb,msb->rb", form.directions, r, precision="highest")
    return jnp.einsum("rb,rmsb->msb", form.weights * projection, form.directions)


def _conjugate_gradients(right, scale, codes, blocks):
    m, k, _ = right.shape

    def product(v):
        def add(total, block):
            codes, rows = block
            form = quadratic_form(rows, m)
            y = _anisotropic(form, reconstruct(v * scale, codes))
            return total + _scatter(codes, y, k), None

        total, _ = jax.lax.scan(add, jnp.zeros_like(v), (codes, blocks))
        return total * scale + (1 + _RIDGE) * v

    return jax.scipy.sparse.linalg.cg(product, right, tol=_CG_TOLERANCE, maxiter=_CG_ITERATIONS)[0]


def _dense_one(right, scale, codes, blocks):
    """Theorem 4.2: one d x d system a codeword."""
    _, k, s = right.shape

    def add(total, block):
        codes, rows = block
        form = quadratic_form(rows, 1)
        outer = jnp.einsum(
            "rb,rsb,rtb->bst", form.weights, form.directions[:, 0], form.directions[:, 0]
        )
        return total + jax.ops.segment_sum(outer, codes[0], num_segments=k), None

    gram, _ = jax.lax.scan(add, jnp.zeros((k, s, s), jnp.float32), (codes, blocks))
    gram = gram * scale[0, :, :, None] ** 2
    matrix = gram + (1 + _RIDGE) * jnp.eye(s, dtype=jnp.float32)[None]
    return jax.scipy.linalg.solve(matrix, right[0][..., None], assume_a="pos")[None, ..., 0]


def _dense_joint(right, scale, codes, blocks):
    """Section 7.5: all codewords in one system, accumulated by pairs of codes.

    A row touches d x d entries of the Gram matrix. For each pair of subspaces the row adds an
    s x s product at its pair of codes, which costs a tenth of a dense product of one-hot rows.
    """
    m, k, s = right.shape
    first, second = (jnp.asarray(i) for i in np.triu_indices(m))

    def add(total, block):
        codes, rows = block
        form = quadratic_form(rows, m)
        u = form.directions

        def pair(z):
            old, i, j = z
            outer = jnp.einsum("rb,rsb,rtb->bst", form.weights, u[:, i], u[:, j])
            outer = outer.reshape(outer.shape[0], s * s)
            return old + jax.ops.segment_sum(outer, codes[i] * k + codes[j], num_segments=k * k)

        return jax.lax.map(pair, (total, first, second)), None

    start = jnp.zeros((first.shape[0], k * k, s * s), jnp.float32)
    pairs, _ = jax.lax.scan(add, start, (codes, blocks))
    pairs = pairs.reshape(-1, k, k, s, s).transpose(0, 1, 3, 2, 4).reshape(-1, k * s, k * s)
    gram = jnp.zeros((m, m, k * s, k * s), jnp.float32)
    gram = gram.at[second, first].set(pairs.transpose(0, 2, 1)).at[first, second].set(pairs)
    gram = gram.transpose(0, 2, 1, 3).reshape(m * k * s, m * k * s)
    flat = jnp.broadcast_to(scale, right.shape).reshape(-1)
    matrix = gram * flat[:, None] * flat[None, :]
    matrix = matrix + (1 + _RIDGE) * jnp.eye(m * k * s, dtype=jnp.float32)
    return jax.scipy.linalg.solve(matrix, right.reshape(-1), assume_a="pos").reshape(right.shape)
