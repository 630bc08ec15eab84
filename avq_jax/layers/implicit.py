"""The codebook as a function of the weight of the loss, by implicit differentiation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from avq_jax.layers.quantize import learning_rows
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.quantization import Codebook
from avq_jax.quantization.rows import Rows, quadratic_form

__all__ = ["solve_codebook"]

_ITERATIONS = 64
_TOLERANCE = 1e-5
_RIDGE = 1e-6


def solve_codebook(
    codebook: Codebook,
    x: Any,
    codes: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
) -> Codebook:
    r"""Solve the joint system of Theorem 4.2 and section 7.5, differentiable in its data.

    For fixed codes the loss is a quadratic in the codewords; its minimiser C solves
    :math:`\sum_i B_i^T M_i B_i C = \sum_i B_i^T M_i x_i`, M_i the metric of row i and B_i the
    selection of its codewords. The system is solved matrix-free by conjugate gradients in
    ``lax.custom_linear_solve``: a derivative, forward or reverse, is one more solve with the same
    operator and stores no iterations.

    Args:
      codebook: where the iteration starts. No gradient passes; codewords that no row uses stay.
      x: ``[n, d]`` rows.
      codes: ``uint8[n, m]`` their codes.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      direction: ``[n, d]`` direction of the parallel error; ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.

    Returns:
      :class:`~avq_jax.Codebook`, with derivatives in rows, scaling (so in T, p or b), direction
      and query terms.

    Raises:
      TypeError: not a Codebook, a scaling that is not a Scaling.
      ValueError: codes or rows that do not fit the codebook, concrete rows that are not finite.

    >>> import jax, jax.numpy as jnp
    >>> book = Codebook(jnp.zeros((1, 1, 2)), dim=2)
    >>> x, codes = jnp.array([[1., 0.], [0., 2.]]), jnp.zeros((2, 1), jnp.uint8)
    >>> def first(h):
    ...     scaling = Scaling(jnp.full(2, h), jnp.ones(2))
    ...     return solve_codebook(book, x, codes, scaling).codewords[0, 0, 0]
    >>> round(float(first(1.0)), 4), round(float(first(3.0)), 4)  # h / (h + 1)
    (0.5, 0.75)
    >>> round(float(jax.grad(first)(3.0)), 4)  # 1 / (h + 1)^2
    0.0625
    """
    rows = learning_rows(codebook, x, scaling, direction, extra)
    codes = jnp.asarray(codes)
    n, m = rows.x.shape[0], codebook.num_subspaces
    if codes.shape != (n, m) or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers [{n}, {m}]; got {codes.dtype} {codes.shape}")
    return Codebook(_solve(codebook.codewords, rows, codes), dim=codebook.dim)


@jax.jit
def _solve(
    start: Float[Array, "m k s"], rows: Rows, codes: Integer[Array, "n m"]
) -> Float[Array, "m k s"]:
    m, k, _ = start.shape
    start = jax.lax.stop_gradient(start)
    picks = codes.T.astype(jnp.int32)
    form = quadratic_form(rows, m)

    def metric(r: Array) -> Array:
        along = jnp.einsum("rmsn,msn->rn", form.directions, r, precision="highest")
        return form.isotropic[None, None, :] * r + jnp.einsum(
            "rn,rmsn->msn", form.weights * along, form.directions
        )

    def select(words: Array) -> Array:
        return jax.vmap(lambda c, i: c[i].T)(words, picks)

    def collect(r: Array) -> Array:
        return jax.vmap(lambda v, i: jax.ops.segment_sum(v.T, i, num_segments=k))(r, picks)

    # Scaled by what the rows of a codeword weigh, so that the condition number is about eta; a
    # constant of the solution, so no gradient.
    weight = jnp.broadcast_to(jax.lax.stop_gradient(form.isotropic), (m, 1, codes.shape[0]))
    diagonal = collect(weight)
    scale = jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)

    def product(v: Array) -> Array:
        # The ridge also holds codewords without rows, whose scale is 0, at rest.
        return scale * collect(metric(select(scale * v))) + _RIDGE * v

    def solve(product: Any, right: Array) -> Array:
        return jax.scipy.sparse.linalg.cg(product, right, tol=_TOLERANCE, maxiter=_ITERATIONS)[0]

    # The step from the start, so that what the ridge biases is the step alone.
    right = scale * collect(metric(form.x - select(start)))
    step = jax.lax.custom_linear_solve(product, right, solve, symmetric=True)
    return start + scale * step
