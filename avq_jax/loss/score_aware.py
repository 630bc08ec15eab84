r"""The score-aware loss of a quantized row (Definition 3.1, through Theorem 3.2)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from avq_jax.loss.anisotropy import Scaling


class QueryTerms(NamedTuple):
    """Further terms weights_j <directions_j, r>^2 of the loss: a known query distribution.

    `directions[n, R, d]` are used as they are, not normalised; `weights[n, R]`, at least 0.
    The paper: "the expectation can be recomputed if Q is known or estimated empirically".

    >>> import jax.numpy as jnp
    >>> QueryTerms(directions=jnp.ones((5, 2, 3)), weights=jnp.ones((5, 2))).weights.shape
    (5, 2)
    """

    directions: Float[Array, "*n_R_d"]
    weights: Float[Array, "*n_R"]


def _as_float(a: ArrayLike) -> Array:
    a = jnp.asarray(a)
    return a if a.dtype == jnp.float64 else a.astype(jnp.float32)


def _largest(x: Array) -> Array:
    """Return max |x| of each row, 1 for a zero row: a scale without a gradient, [n, 1]."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0))
    return jnp.where(largest > 0, largest, 1)


def row_norms(x: Real[ArrayLike, "n d"]) -> Float[Array, " n"]:
    r"""Return ||x_i|| without overflow or underflow of the square, with finite gradients.

    Half precision is computed in float32; rows of norm 1e-30 or 1e30 are exact. The gradient at
    a zero row is 0.

    Args:
        x: [n, d] rows, any real dtype.

    Returns:
        [n] norms, float32 (float64 for float64 rows).

    >>> import jax.numpy as jnp
    >>> print(row_norms(jnp.array([[3e30, 4e30], [0.0, 0.0]])))
    [5.e+30 0.e+00]
    """
    x = _as_float(x)
    scale = _largest(x)
    square = jnp.sum((x / scale) ** 2, axis=-1)
    zero = square == 0
    root = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
    return scale[:, 0] * root


def _unit(direction: Array) -> Array:
    """Return u = direction/||direction||, 0 for a zero row, [n, d]."""
    scaled = direction / _largest(direction)
    square = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 0, scaled * lax.rsqrt(jnp.where(zero, 1, square)))


def residuals(
    x: Real[ArrayLike, "n d"],
    x_tilde: Real[ArrayLike, "n d"],
    *,
    direction: Real[ArrayLike, "n d"] | None = None,
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    r"""Split the residual r = x - x~ along and across a direction (Section 3.1).

    r_parallel = <r, u> u, r_orthogonal = r - r_parallel, u = direction/||direction||.

    Args:
        x: [n, d] encoded rows.
        x_tilde: [n, d] their quantized values.
        direction: [n, d], None for x itself. Behind a partition x is a residual and the
            direction is the original row. Only its direction counts. A zero row has no parallel
            part.

    Returns:
        (r_parallel, r_orthogonal), [n, d] each, float32 (float64 for float64 rows). Gradients are
        finite, at zero rows too.

    >>> import jax.numpy as jnp
    >>> parallel, orthogonal = residuals(jnp.array([[2.0, 0.0]]), jnp.array([[1.5, 0.25]]))
    >>> print(parallel, orthogonal)
    [[0.5 0. ]] [[ 0.   -0.25]]

    Reference: Guo et al. 2020, Section 3.1.
    """
    x = _as_float(x)
    r = x - _as_float(x_tilde).astype(x.dtype)
    u = _unit(x if direction is None else _as_float(direction).astype(x.dtype))
    parallel = jnp.sum(u * r, axis=-1, keepdims=True) * u
    return parallel, r - parallel


def score_aware_loss(
    x: Real[ArrayLike, "n d"],
    x_tilde: Real[ArrayLike, "n d"],
    scaling: Scaling,
    *,
    direction: Real[ArrayLike, "n d"] | None = None,
    extra: QueryTerms | None = None,
) -> Float[Array, " n"]:
    r"""Return the score-aware loss of every row (Theorem 3.2).

    l_i = orthogonal_i ||r_i||^2 + (parallel_i - orthogonal_i) <u_i, r_i>^2
          + sum_j weight_ij <direction_ij, r_i>^2,

    with r = x - x~ and u = direction/||direction||; evaluated as
    parallel <u, r>^2 + orthogonal ||r - <u, r> u||^2, which does not cancel and is never negative.
    It is Definition 3.1 up to the factor that all rows of `scaling` share.

    Args:
        x: [n, d] encoded rows.
        x_tilde: [n, d] their quantized values.
        scaling: weights of the rows, from `scaling(weight, norms, dim=d)`.
        direction: [n, d], None for x itself; see `residuals`.
        extra: further terms of a known query distribution, `QueryTerms`.

    Returns:
        [n], at least 0, float32 (float64 for float64 rows). A zero direction leaves
        orthogonal ||r||^2. Residuals above 1e19 overflow to inf in float32.

    >>> import jax.numpy as jnp
    >>> weights = Scaling(parallel=jnp.array([4.0]), orthogonal=jnp.array([1.0]))
    >>> score_aware_loss(jnp.array([[2.0, 0.0]]), jnp.array([[1.5, 0.5]]), weights)
    Array([1.25], dtype=float32)

    Reference: Guo et al. 2020, Definition 3.1, Theorem 3.2.
    """
    x = _as_float(x)
    r = x - _as_float(x_tilde).astype(x.dtype)
    u = _unit(x if direction is None else _as_float(direction).astype(x.dtype))
    along = jnp.sum(u * r, axis=-1)
    across = r - along[:, None] * u
    parallel = jnp.asarray(scaling.parallel).astype(x.dtype)
    orthogonal = jnp.asarray(scaling.orthogonal).astype(x.dtype)
    loss = parallel * along**2 + orthogonal * jnp.sum(across * across, axis=-1)
    if extra is None:
        return loss
    directions = jnp.asarray(extra.directions).astype(x.dtype)
    products = jnp.einsum("nrd,nd->nr", directions, r, precision=lax.Precision.HIGHEST)
    return loss + jnp.sum(jnp.asarray(extra.weights).astype(x.dtype) * products**2, axis=-1)
