"""The codebook update step: Theorem 4.2 and the joint system of section 7.5.

For fixed codes the loss is a convex quadratic of all codewords c together,

  ``sum_i (x_i - B_i c)^T (a_i I + sum_j w_ij u_ij u_ij^T) (x_i - B_i c)``,

where the 0/1 matrix B_i selects the codewords of row i. Its minimum solves

  ``(sum_i B_i^T M_i B_i) delta = sum_i B_i^T M_i (x_i - B_i c)``,  ``c + delta`` the new codewords,

(the paper prints ``B_i x_i`` on the right, which must be ``B_i^T x_i``). Solving for the change
delta instead of c keeps float32 errors, and any regularisation, from raising the loss. The system
is scaled by the mean diagonal of M, ``D = sum_i (a_i + sum_j w_ij ||u_ij||^2 / d)`` of each
codeword; as ``0 <= <u, B c>^2 <= ||B c||^2`` its condition number is then at most the largest eta
(for one direction), so conjugate gradients need about a dozen products whatever the size.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.quantization.rows import (
    QuadraticForm,
    Rows,
    quadratic_form,
    reconstruct,
    row_losses,
)

__all__ = [
    "Solver",
    "Update",
    "choose_solver",
    "over_devices",
    "reconstruct",
    "row_losses",
    "solve",
    "worst_rows",
]

# "mean" solves the reconstruction loss, and that alone.
Solver = Literal["auto", "dense", "cg", "mean"]

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


def _scatter(
    codes: Int32[Array, "m B"], values: Float[Array, "m s B"], k: int
) -> Float[Array, "m k s"]:
    """``sum_i B_i^T v_i`` of a block."""

    def one(z):
        return jax.ops.segment_sum(z[1].T, z[0], num_segments=k)

    return jax.lax.map(one, (codes, values))


class Update(NamedTuple):
    """Answer of :func:`solve`.

    Attributes:
      codewords: ``[m, k, s]`` after the update.
      used: ``[m, k]``, whether rows with a weight use the codeword.
      before: ``[nb, B]`` loss of each row under the codewords before the update.
    """

    codewords: Float[Array, "m k s"]
    used: Bool[Array, "m k"]
    before: Float[Array, "nb B"]


def solve(
    codewords: Float[Array, "m k s"],
    codes: Int32[Array, "nb m B"],
    blocks: Rows,
    *,
    solver: Solver,
    axis: str | None = None,
) -> Update:
    """Codewords that minimise the loss for fixed codes (Theorem 4.2 for m = 1, section 7.5).

    Args:
      codewords: ``[m, k, s]`` before the update; those without rows stay as they are.
      codes: of the rows, in blocks.
      blocks: the rows, in blocks, as :func:`~avq_jax.quantization.rows.in_blocks` cuts them.
      solver: ``"dense"``, ``"cg"``, or ``"mean"`` where all scalings are isotropic.
      axis: a mesh axis of ``shard_map`` over whose devices the rows are shared out; their sums
        are added up.

    Returns:
      :class:`Update`; ``before`` of this device's rows.
    """
    m, k, _ = codewords.shape

    def gradient(total, block):
        codes, rows = block
        form = quadratic_form(rows, m)
        residual = form.x - reconstruct(codewords, codes)
        # Beside the gradient, what each codeword's rows weigh: a_i, and the diagonal of M_i.
        weights = jnp.stack([form.isotropic, _mean_diagonal(form, rows.x.shape[1])])
        weights = jnp.broadcast_to(weights, (m, *weights.shape))
        values = jnp.concatenate([_metric(form, residual), weights], axis=1)
        return total + _scatter(codes, values, k), row_losses(form, residual)

    zero = jnp.zeros((m, k, codewords.shape[2] + 2), jnp.float32)
    sums, before = jax.lax.scan(gradient, zero, (codes, blocks))
    sums = over_devices(sums, axis)
    right, isotropic, diagonal = sums[..., :-2], sums[..., -2:-1], sums[..., -1:]
    used = diagonal > 0
    diagonal = jnp.where(used, diagonal, 1)
    scale = jax.lax.rsqrt(diagonal)
    isotropic = jnp.where(used, isotropic / diagonal, 1) + _RIDGE
    right = jnp.where(used, right * scale, 0)
    if solver == "mean":
        delta = right
    elif solver == "cg":
        delta = _conjugate_gradients(right, scale, isotropic, codes, blocks, axis)
    elif m == 1:
        delta = _dense_one(right, scale, isotropic, codes, blocks, axis)
    else:
        delta = _dense_joint(right, scale, isotropic, codes, blocks, axis)
    # A failed factorisation of a degenerate system is NaN: keep the codewords then.
    failed = jnp.all(jnp.isfinite(right)) & ~jnp.all(jnp.isfinite(delta))
    delta = jnp.where(failed, 0, delta)
    return Update(codewords + delta * scale, used[..., 0], before)


def over_devices(total: Float[Array, ...], axis: str | None) -> Float[Array, ...]:
    """Sum over the devices of a mesh axis; the value itself without one."""
    return total if axis is None else jax.lax.psum(total, axis)


def worst_rows(
    x: Float[Array, "n d"], loss: Float[Array, " n"], count: int, axis: str | None
) -> Float[Array, "r d"]:
    """The ``count`` rows of largest loss (all, if there are fewer), over all devices."""
    if axis is None:
        return x[jax.lax.top_k(loss, min(count, x.shape[0]))[1]]
    top, rows = jax.lax.top_k(loss, min(count, x.shape[0]))
    top, rows = (jax.lax.all_gather(a, axis, tiled=True) for a in (top, x[rows]))
    return rows[jax.lax.top_k(top, min(count, len(top)))[1]]


def _mean_diagonal(form: QuadraticForm, dim: int) -> Float[Array, " B"]:
    """``tr(M_i) / d`` of each row, with terms of negative weight (eta < 1) left out."""
    squares = jnp.sum(form.directions**2, axis=(1, 2))
    return form.isotropic + jnp.sum(jnp.maximum(form.weights, 0) * squares, axis=0) / dim


def _metric(form: QuadraticForm, r: Float[Array, "m s B"]) -> Float[Array, "m s B"]:
    """Apply ``a I + sum_j w_j u_j u_j^T`` to r, each row of a block."""
    return form.isotropic[None, None, :] * r + _anisotropic(form, r)


def _anisotropic(form: QuadraticForm, r: Float[Array, "m s B"]) -> Float[Array, "m s B"]:
    projection = jnp.einsum("rmsb,msb->rb", form.directions, r, precision="highest")
    return jnp.einsum("rb,rmsb->msb", form.weights * projection, form.directions)


def _conjugate_gradients(right, scale, isotropic, codes, blocks, axis):
    m, k, _ = right.shape

    def product(v):
        def add(total, block):
            codes, rows = block
            form = quadratic_form(rows, m)
            y = _anisotropic(form, reconstruct(v * scale, codes))
            return total + _scatter(codes, y, k), None

        total, _ = jax.lax.scan(add, jnp.zeros_like(v), (codes, blocks))
        return over_devices(total, axis) * scale + isotropic * v

    return jax.scipy.sparse.linalg.cg(product, right, tol=_CG_TOLERANCE, maxiter=_CG_ITERATIONS)[0]


def _dense_one(right, scale, isotropic, codes, blocks, axis):
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
    gram = over_devices(gram, axis) * scale[0, :, :, None] ** 2
    matrix = gram + isotropic[0, :, :, None] * jnp.eye(s, dtype=jnp.float32)[None]
    one = functools.partial(jax.scipy.linalg.solve, assume_a="pos")
    return jax.vmap(one)(matrix, right[0])[None]


def _dense_joint(right, scale, isotropic, codes, blocks, axis):
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
    pairs = (
        over_devices(pairs, axis)
        .reshape(-1, k, k, s, s)
        .transpose(0, 1, 3, 2, 4)
        .reshape(-1, k * s, k * s)
    )
    gram = jnp.zeros((m, m, k * s, k * s), jnp.float32)
    gram = gram.at[second, first].set(pairs.transpose(0, 2, 1)).at[first, second].set(pairs)
    gram = gram.transpose(0, 2, 1, 3).reshape(m * k * s, m * k * s)
    flat = jnp.broadcast_to(scale, right.shape).reshape(-1)
    matrix = gram * flat[:, None] * flat[None, :]
    matrix = matrix + jnp.diag(jnp.broadcast_to(isotropic, right.shape).reshape(-1))
    return jax.scipy.linalg.solve(matrix, right.reshape(-1), assume_a="pos").reshape(right.shape)
