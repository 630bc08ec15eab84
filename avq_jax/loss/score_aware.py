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

    directions: Float[Array, "n R d"]
    weights: Float[Array, "n R"]


def _check_shape(a: ArrayLike, name: str, shape: tuple[int, ...], rule: str) -> None:
    if jnp.shape(a) != shape:
        raise ValueError(f"{name} must have shape {rule} = {shape}, got {jnp.shape(a)}")


def _split(
    x: ArrayLike, x_tilde: ArrayLike, direction: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Return (r, <r, u>, u) in the precision of the computation."""
    if jnp.ndim(x) != 2:
        raise ValueError(f"x must have shape [n, d], got {jnp.shape(x)}")
    x = _as_float(x)
    _check_shape(x_tilde, "x_tilde", x.shape, "[n, d]")
    if direction is not None:
        _check_shape(direction, "direction", x.shape, "[n, d]")
    r = x - _as_float(x_tilde).astype(x.dtype)
    u = _unit(x if direction is None else _as_float(direction).astype(x.dtype))
    return r, jnp.sum(u * r, axis=-1), u


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

    Raises:
        ValueError: a shape is not [n, d], the same for all.

    >>> import jax.numpy as jnp
    >>> parallel, orthogonal = residuals(jnp.array([[2.0, 0.0]]), jnp.array([[1.5, 0.25]]))
    >>> print(parallel, orthogonal)
    [[0.5 0. ]] [[ 0.   -0.25]]

    Reference: Guo et al. 2020, Section 3.1.
    """
    r, along, u = _split(x, x_tilde, direction)
    parallel = along[:, None] * u
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

    Raises:
        ValueError: a shape does not agree with [n, d].

    >>> import jax.numpy as jnp
    >>> weights = Scaling(parallel=jnp.array([4.0]), orthogonal=jnp.array([1.0]))
    >>> score_aware_loss(jnp.array([[2.0, 0.0]]), jnp.array([[1.5, 0.5]]), weights)
    Array([1.25], dtype=float32)

    Reference: Guo et al. 2020, Definition 3.1, Theorem 3.2.
    """
    r, along, u = _split(x, x_tilde, direction)
    n, d = r.shape
    _check_shape(scaling.parallel, "scaling.parallel", (n,), "[n]")
    _check_shape(scaling.orthogonal, "scaling.orthogonal", (n,), "[n]")
    across = r - along[:, None] * u
    parallel = jnp.asarray(scaling.parallel).astype(r.dtype)
    orthogonal = jnp.asarray(scaling.orthogonal).astype(r.dtype)
    loss = parallel * along**2 + orthogonal * jnp.sum(across * across, axis=-1)  # Thm 3.2
    if extra is None:
        return loss
    directions, weights = jnp.asarray(extra.directions), jnp.asarray(extra.weights)
    R = directions.shape[1] if directions.ndim == 3 else -1
    _check_shape(directions, "extra.directions", (n, R, d), "[n, R, d]")
    _check_shape(weights, "extra.weights", (n, R), "[n, R]")
    products = jnp.einsum(
        "nrd,nd->nr", directions.astype(r.dtype), r, precision=lax.Precision.HIGHEST
    )
    return loss + jnp.sum(weights.astype(r.dtype) * products**2, axis=-1)
