r"""How much more an error along x costs than one across it (Theorems 3.2 to 3.4).

For a query uniform on the sphere the score-aware loss of a row is

    h_parallel ||r_parallel||^2 + h_orthogonal ||r_orthogonal||^2,
    h_parallel   = (d - 1) int_0^pi w(||x|| cos theta)(sin^{d-2} theta - sin^d theta) dtheta,
    h_orthogonal =         int_0^pi w(||x|| cos theta) sin^d theta dtheta.

Section 7.1 of the paper has both without the factor d - 1 of Theorem 3.2; the loss is the same up
to this constant, and only ratios are used here. Integration by parts gives, for every weight,

    eta = h_parallel / h_orthogonal = 1 + d log h_orthogonal / d log ||x||,

so growing weights cost parallel errors more. d = 1 is the limit d -> 1 of these formulas:
h_parallel = w(||x||) + w(-||x||) and h_orthogonal = int_{-1}^{1} w(||x|| u) du; there is no
orthogonal direction then, and only h_parallel matters.
"""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from avq_jax.loss.bessel import exponential_moments
from avq_jax.loss.quadrature import quadrature_moments
from avq_jax.loss.spherical_cap import GAP, cap_moments
from avq_jax.loss.weights import Exponential, Power, Threshold, Uniform, Weight

FLOOR = 1e-20
"""Smallest orthogonal weight that `scaling` returns, relative to the largest of the data."""


class Scaling(NamedTuple):
    """Weights of the two squared residuals of each row: `parallel[n]`, `orthogonal[n]`.

    The seam between Sections 3 and 4: learners see these two arrays, never w or T.
    `Scaling(ones, ones)` is the reconstruction loss.

    >>> import jax.numpy as jnp
    >>> Scaling(parallel=jnp.array([4.0]), orthogonal=jnp.array([1.0])).parallel
    Array([4.], dtype=float32)
    """

    parallel: Float[Array, " n"]
    orthogonal: Float[Array, " n"]


def _check_dim(dim: Any) -> int:
    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)):
        raise TypeError(f"dim must be an integer, the width d of the rows, got {dim!r}")
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    return operator.index(dim)


def _check_norms(values: ArrayLike, name: str) -> Array:
    """Convert to float32 (float64 is kept) and reject what no row can have, when concrete."""
    array = jnp.asarray(values)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}")
    if array.dtype != jnp.float64:
        array = array.astype(jnp.float32)
    if not isinstance(array, jax.core.Tracer):
        bad = ~(np.isfinite(array) & (np.asarray(array) >= 0))
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            place = f" at {where[0] if len(where) == 1 else where}" if where else ""
            raise ValueError(
                f"{name} must be finite and at least 0, got {np.asarray(array)[where]}{place}"
                f" ({int(bad.sum())} such of {bad.size})"
            )
    return array


def _like(
    parameter: Any, norm: Array, name: str, *, minimum: float = -math.inf
) -> tuple[Array, Array]:
    """Bring a weight's parameter, checked when concrete, and the norms to one dtype and shape."""
    kind = jnp.result_type(parameter) if not isinstance(parameter, (bool, str)) else None
    if kind is None or not (
        jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
    ):
        raise TypeError(f"{name} must be a real number, got {parameter!r}")
    if not isinstance(parameter, jax.core.Tracer):
        bad = ~(np.asarray(parameter, np.float64) >= minimum)
        if bad.any():
            value = np.asarray(parameter)[bad].ravel()[0]
            rule = "not be NaN" if np.isnan(value) else f"be at least {minimum:g}"
            raise ValueError(f"{name} must {rule}, got {value}")
    parameter = jnp.asarray(parameter).astype(norm.dtype)
    if parameter.ndim and norm.ndim and parameter.shape != norm.shape:
        raise ValueError(
            f"{name} must be a scalar or have the shape of the norms, {norm.shape}, "
            f"got shape {parameter.shape}"
        )
    shape = np.broadcast_shapes(parameter.shape, norm.shape)
    return jnp.broadcast_to(parameter, shape), jnp.broadcast_to(norm, shape)


@functools.singledispatch
def moments(
    weight: Weight, norm: Float[Array, "..."], *, dim: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    r"""Return (log h_orthogonal, eta) elementwise, the first up to one additive constant.

    Dispatches on the type of the weight: closed forms for the four of this package, windowed
    Gauss-Legendre quadrature for any other callable (`quadrature_moments` states its error).
    `moments.register(MyWeight)` adds a closed form. The additive constant may depend on `dim`
    alone, for all norms alike and without a gradient.

    >>> import jax.numpy as jnp
    >>> log_orthogonal, eta = moments(Power(2.0), jnp.array([1.0, 2.0]), dim=8)
    >>> eta
    Array([3., 3.], dtype=float32)

    Reference: Guo et al. 2020, Theorem 3.2.
    """
    return quadrature_moments(weight, norm, dim=dim)


@moments.register
def _(weight: Threshold, norm: Any, *, dim: int) -> tuple[Array, Array]:
    T, norm = _like(weight.T, norm, "T")
    return cap_moments(T, norm, dim=dim)


@moments.register
def _(weight: Exponential, norm: Any, *, dim: int) -> tuple[Array, Array]:
    b, norm = _like(weight.b, norm, "b")
    return exponential_moments(b * norm, dim=dim)


@moments.register
def _(weight: Power, norm: Any, *, dim: int) -> tuple[Array, Array]:
    p, norm = _like(weight.p, norm, "p", minimum=0.0)
    zero = norm <= 0
    log_zero = jnp.where(p == 0, 0, -jnp.inf).astype(norm.dtype)
    # h_orthogonal = ||x||^p int_0^1 u^p (1 - u^2)^{(d-1)/2} du
    return jnp.where(zero, log_zero, p * jnp.log(jnp.where(zero, 1, norm))), p + 1


@moments.register
def _(weight: Uniform, norm: Any, *, dim: int) -> tuple[Array, Array]:
    return jnp.zeros_like(norm), jnp.ones_like(norm)


def eta(weight: Weight, norm: Real[ArrayLike, "..."], *, dim: int) -> Float[Array, "..."]:
    r"""Return eta = h_parallel / h_orthogonal, exact in the dimension, elementwise.

    With h as in Theorem 3.2; for `Threshold` it is the ratio of Theorem 3.4 before the limit:
    2.160 against 0.625 of Equation 3 at d = 16, T = 0.2, ||x|| = 1. Theorem 3.3: eta >= 1 for
    w nondecreasing and zero for t < 0, with equality for w constant on (0, ||x||] (the paper says
    [-||x||, ||x||], on which a constant that vanishes below 0 would be zero).

    `Power(p)` has p + 1, `Uniform()` 1, `Exponential(b)` 1 + kappa I_{d/2+1}(kappa)/I_{d/2}(kappa)
    with kappa = b ||x||. `Threshold(T)` has 1 for T <= -||x||, less than 1 for -||x|| < T < 0, and
    diverges for T -> ||x||, where T is clipped at (1 - 2^-20) ||x||. A zero row has 1 (its score
    is the same for every query), but p + 1 with `Power`.

    Args:
        weight: a weight function of this package, or any callable t -> w(t) >= 0.
        norm: ||x||, any shape, finite and >= 0 (checked when concrete; a NaN under `jit` gives
            NaN).
        dim: d, the width of the rows, a Python integer >= 1.

    Returns:
        Float32 (float64 for float64 norms), of the broadcast shape of the norms and the weight's
        parameters. For `Threshold` within 1e-5 relative for every d up to 10,000.

    Raises:
        ValueError: dim < 1; a norm is negative, NaN or infinite; a parameter of the weight is NaN,
            or p < 0.
        TypeError: dim not an integer, a parameter not a number.

    >>> print(f"{eta(Threshold(0.2), 1.0, dim=100):.3f}")
    5.953

    Reference: Guo et al. 2020, Theorems 3.2 to 3.4.
    """
    return moments(weight, _check_norms(norm, "norm"), dim=_check_dim(dim))[1]


def eta_limit(
    T: Real[ArrayLike, "..."], norm: Real[ArrayLike, "..."], *, dim: int
) -> Float[Array, "..."]:
    r"""Return the large-d value of eta for the weight I(t >= T), Equation 3.

    (d - 1) c^2 / (1 - c^2), c = T/||x||. It is what the original implementation uses; it falls
    below 1 for T < ||x||/sqrt(d), against Theorem 3.3: `eta` is exact.

    Args:
        T: threshold in the units of <q, x>, T >= 0 is meant (the formula is even in T).
        norm: ||x||, finite and >= 0.
        dim: d, a Python integer >= 1.

    Returns:
        Float32 (float64 for float64 norms), of the broadcast shape. ``|c|`` is clipped at 1 - 2^-20
        and a zero row has 1, with zero gradient; d = 1 gives 0.

    Raises:
        ValueError: dim < 1; a norm is negative, NaN or infinite; T is NaN.
        TypeError: dim not an integer.

    >>> print(f"{eta_limit(0.2, 1.0, dim=100):.3f}")
    4.125

    Reference: Guo et al. 2020, Theorem 3.4.
    """
    dim = _check_dim(dim)
    T, norm = _like(T, _check_norms(norm, "norm"), "T")
    zero = norm <= 0
    clipped = (jnp.abs(T) > (1 - GAP) * norm) | zero
    n = jnp.where(clipped, 1, norm)
    t = jnp.where(clipped, 1 - GAP, T)
    limit = (dim - 1) * (t / (n - t)) * (t / (n + t))  # Eq. 3
    return jnp.where(zero, 1, limit)


def scaling(weight: Weight, norms: Real[ArrayLike, " n"], *, dim: int) -> Scaling:
    r"""Return the exact weights h_parallel and h_orthogonal of every row (Theorem 3.2).

    They are relative: all rows share one factor, chosen so that the largest orthogonal weight of
    the data is 1. Rows of one norm therefore get (eta, 1), the simplified form of Section 3.2.
    Between rows of different norm the ratio is that of the integrals, taken in logarithms: with
    T = 0.5, d = 1000, rows of norm 1 and 2 differ by 10^49. A weight moves by (eta - 1) times the
    relative change of its row's norm, so float32 norms fix it to about eta * 1e-7 relative.

    Orthogonal weights are floored at 1e-20 of the largest, parallel weights are eta times the
    floored ones, so that rows which no query weighs (||x|| <= T, or a zero row) still get codes
    and a loss that is finite. If no row has a positive weight, all orthogonal weights are 1.

    Args:
        weight: a weight function of this package, or any pytree with `__call__(t)`.
        norms: [n], ||x_i||, finite and >= 0 (checked when concrete). Behind a partition these are
            the norms of the original rows, not of their residuals.
        dim: d, the width of the rows, a Python integer >= 1.

    Returns:
        `Scaling(parallel[n], orthogonal[n])`, float32 (float64 for float64 norms), all positive.
        Differentiable in the weight's parameters and the norms; floored and clipped rows have no
        gradient.

    Raises:
        ValueError: dim < 1; a norm is negative, NaN or infinite, with the first such row; a
            parameter of the weight is NaN, or p < 0.
        TypeError: dim not an integer, a parameter not a number.

    >>> import jax.numpy as jnp
    >>> weights = scaling(Power(2.0), jnp.array([1.0, 2.0]), dim=100)
    >>> print(weights.parallel, weights.orthogonal)
    [0.75 3.  ] [0.25 1.  ]

    Reference: Guo et al. 2020, Theorem 3.2 and Section 3.2.
    """
    norms = _check_norms(norms, "norms")
    log_orthogonal, ratio = moments(weight, norms, dim=_check_dim(dim))
    largest = jnp.max(log_orthogonal, initial=-jnp.inf)
    some = largest > -jnp.inf
    relative = jnp.where(
        log_orthogonal > -jnp.inf,
        jnp.where(log_orthogonal > -jnp.inf, log_orthogonal, 0) - jnp.where(some, largest, 0),
        jnp.where(some, math.log(FLOOR), 0).astype(log_orthogonal.dtype),
    )
    orthogonal = jnp.exp(jnp.maximum(relative, math.log(FLOOR)))
    return Scaling(parallel=ratio * orthogonal, orthogonal=orthogonal)
