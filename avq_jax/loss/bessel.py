r"""The integrals of Theorem 3.2 for the exponential weight: modified Bessel functions.

With kappa = b ||x|| and nu = d/2,

    h_orthogonal = int_{-1}^{1} exp(kappa u)(1 - u^2)^{(d-1)/2} du  ~  kappa^{-nu} I_nu(kappa),
    eta = kappa I_{nu-1} / I_nu - (d - 1) = 1 + kappa I_{nu+1}(kappa) / I_nu(kappa),

the second form of eta without cancellation. The ratio r_nu = I_{nu+1}/I_nu follows the continued
fraction r_nu = kappa / (2(nu + 1) + kappa r_{nu+1}) backward, from a large-order value.

Reference: NIST DLMF 10.29.1, 10.33.1, 10.41.3; Mardia and Jupp, Directional Statistics, App. 1.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def _large_order_ratio(kappa: Array, order: float) -> Array:
    """Return I_{order+1}/I_order from the Riccati equation r' = 1 - r^2 - (2 order + 1) r/kappa."""
    a = order + 0.5
    S = jnp.hypot(jnp.full_like(kappa, a), kappa)
    alpha, rho = a / S, kappa / S
    first = -0.5 * alpha / S
    second = alpha * (alpha - 2 * rho * rho - 0.5 * alpha * (1 - alpha)) / (4 * S * S)
    return kappa / (S + a) * (1 + first + second)


def _debye(p: Array | float, order: float) -> Array | float:
    """Return the sum of DLMF 10.41.3 less its leading 1, through the third term."""
    p2 = p * p
    u1 = p * (3 - 5 * p2) / 24
    u2 = p2 * (81 + p2 * (-462 + 385 * p2)) / 1152
    u3 = p * p2 * (30375 + p2 * (-369603 + p2 * (765765 - 425425 * p2))) / 414720
    return (u1 + (u2 + u3 / order) / order) / order


def _large_order_log(kappa: Array, order: float) -> Array:
    """Return log 0F1(; order + 1; kappa^2/4) = log(Gamma(order+1) (2/kappa)^order I_order)."""
    S = jnp.hypot(jnp.full_like(kappa, order), kappa)
    excess = kappa * (kappa / (S + order))
    return (
        excess
        - order * jnp.log1p(excess / (2 * order))
        - 0.5 * jnp.log1p(excess / order)
        + jnp.log1p(jnp.asarray(_debye(order / S, order)))
        - math.log1p(float(_debye(1.0, order)))
    )


@functools.partial(jax.jit, static_argnames="dim")
def exponential_moments(
    kappa: Float[Array, "*shape"], *, dim: int
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""Return (log h_orthogonal, eta) of the weight exp(b t) at kappa = b ||x||, elementwise.

    The logarithm is relative to its value at kappa = 0. Both are even in kappa, finite for every
    finite kappa, and 0 and 1 at kappa = 0.

    >>> import jax.numpy as jnp
    >>> _, eta = exponential_moments(jnp.array([2.0]), dim=1)  # d = 1: kappa coth(kappa)
    >>> print(f"{eta[0]:.5f}")
    2.07463
    """
    steps = 64 if kappa.dtype == jnp.float64 else 24
    nu = dim / 2
    ratio = _large_order_ratio(kappa, nu + steps)
    log_value = _large_order_log(kappa, nu + steps)

    def step(state: tuple[Array, Array], twice_k: Array) -> tuple[tuple[Array, Array], None]:
        # I_{k-1} = (2k/kappa) I_k + I_{k+1} (DLMF 10.29.1) at k = nu + j
        ratio, log_value = state
        log_value = log_value + jnp.log1p(kappa * ratio / twice_k)
        return (kappa / (twice_k + kappa * ratio), log_value), None

    twice_orders = jnp.asarray([2 * (nu + j) for j in range(steps, 0, -1)], kappa.dtype)
    (ratio, log_value), _ = lax.scan(step, (ratio, log_value), twice_orders)
    return log_value, 1 + kappa * ratio
