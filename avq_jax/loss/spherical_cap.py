r"""The integrals of Theorem 3.2 for the threshold weight: moments of a spherical cap.

With c = T/||x||, s^2 = 1 - c^2 and I_d(c) = int_0^{arccos c} sin^d(theta) dtheta, Section 3.2 is

    h_orthogonal = I_d(c),    h_parallel = (d - 1)(I_{d-2}(c) - I_d(c)) = I_d(c) + c s^{d-1},

the last step by integration by parts, so eta = 1 + c s^{d-1} / I_d(c) without the cancellation
of the difference. Raw integrals underflow float32 (sin^98 at T = 0.95 is 2.9e-50) and the upward
recursion in d loses every digit; three regions cover the line instead:

*   tail, c >= c0: I_d = s^{d+1} H / ((d + 1) c) with H = 2F1(1, 1/2; (d+3)/2; -s^2/c^2), a
    Stieltjes continued fraction with positive coefficients;
*   centre, |c| < c0: I_d = I_d(0) - J(c), J(c) = c s^{d+1} 2F1(1, d/2 + 1; 3/2; c^2), a series of
    positive terms;
*   mirrored tail, c <= -c0: I_d(c) = 2 I_d(0) - I_d(-c).

Reference: Guo et al. 2020, Section 3.2; NIST DLMF 8.17.7, 8.17.8 and 15.7.5.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

GAP = 2.0**-20
"""Rows with T > (1 - GAP) ||x|| are evaluated at T = (1 - GAP) ||x||."""


def _log_half_cap(dim: int) -> float:
    """Return log I_d(0) in double precision, by d I_d(0) = (d - 1) I_{d-2}(0)."""
    start = 0.0 if dim % 2 else math.log(math.pi / 2)
    return math.fsum([start, *(math.log1p(-1 / k) for k in range(dim, 1, -2))])


def _tail_fraction(y: Array, dim: int, terms: int) -> Array:
    """Evaluate H = 2F1(1, 1/2; g; -y), g = (d + 3)/2, as 1/(1 + e1 y/(1 + e2 y/(1 + ...)))."""
    g = (dim + 3) / 2
    coefficients = [0.5 / g]
    for k in range(1, terms // 2 + 1):
        coefficients.append(k * (g - 1.5 + k) / ((g + 2 * k - 2) * (g + 2 * k - 1)))
        coefficients.append((0.5 + k) * (g + k - 1) / ((g + 2 * k - 1) * (g + 2 * k)))

    def step(tail: Array, e: Array) -> tuple[Array, None]:
        return 1 + e * y / tail, None

    tail, _ = lax.scan(step, jnp.ones_like(y), jnp.asarray(coefficients[::-1], y.dtype))
    return 1 / tail


def _centre_series(c2: Array, dim: int, terms: int) -> Array:
    """Evaluate 2F1(1, d/2 + 1; 3/2; c^2) by Horner's rule."""
    ratios = [(dim / 2 + k) / (k + 0.5) for k in range(terms, 0, -1)]

    def step(total: Array, ratio: Array) -> tuple[Array, None]:
        return 1 + total * (ratio * c2), None

    return lax.scan(step, jnp.ones_like(c2), jnp.asarray(ratios, c2.dtype))[0]


@functools.partial(jax.jit, static_argnames="dim")
def cap_moments(
    T: Float[Array, "*shape"], norm: Float[Array, "*shape"], *, dim: int
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""Return (log h_orthogonal, eta) of the threshold weight, elementwise.

    The logarithm is relative to I_d(0), a factor common to all rows.

    *   T <= -||x||: the weight is 1 on the whole sphere; eta = 1.
    *   T > (1 - 2^-20) ||x||: the value at T = (1 - 2^-20) ||x||, eta about 2^19 (d + 1).
    *   ||x|| = 0: <q, x> = 0 for every query, so the weight is constant: eta = 1, and the
        logarithm is log 2 for T <= 0, -inf for T > 0.

    Gradients are zero in these three cases.

    >>> import jax.numpy as jnp
    >>> log_orthogonal, eta = cap_moments(jnp.array([0.2]), jnp.array([1.0]), dim=100)
    >>> print(f"{eta[0]:.3f}")
    5.953
    """
    double = norm.dtype == jnp.float64
    terms = 96 if double else 24
    centre = math.sqrt((6 if double else 3) / (dim + (12 if double else 6)))
    log_half = _log_half_cap(dim)

    zero = norm <= 0
    whole = (-norm >= T) & ~zero
    empty = ((1 - GAP) * norm < T) & ~zero
    plain = ~(zero | whole | empty)
    n = jnp.where(plain, norm, 1)
    t = jnp.where(plain, T, jnp.where(empty, 1 - GAP, 0).astype(T.dtype))

    c = t / n
    c2 = c * c
    # (||x|| - T) is exact for T near ||x||, where 1 - c^2 would cancel.
    s2 = ((n - t) / n) * ((n + t) / n)
    log_s2 = jnp.where(c2 < 0.5, jnp.log1p(-jnp.where(c2 < 0.5, c2, 0)), jnp.log(s2))

    in_tail = jnp.abs(c) >= centre
    a = jnp.where(in_tail, jnp.abs(c), 1)
    a2 = a * a
    tail_s2 = jnp.where(in_tail, s2, 0.5)
    tail_log_s2 = jnp.where(in_tail, log_s2, math.log(0.5))
    H = _tail_fraction(tail_s2 / a2, dim, terms)
    # log(I_d(|c|) / I_d(0)), I_d = s^{d+1} H / ((d + 1) |c|)
    log_tail = (dim + 1) / 2 * tail_log_s2 + jnp.log(H / a) - (math.log(dim + 1) + log_half)
    # 1 + c s^{d-1} / I_d
    eta_tail = 1 + (dim + 1) * a2 / (tail_s2 * H)

    # 1 - tail / 2: the complement of the mirrored tail, relative to 2 I_d(0)
    log_mirror = math.log(2) + jnp.log1p(-0.5 * jnp.exp(jnp.where(in_tail & (c < 0), log_tail, -1)))

    m = jnp.where(in_tail, 0, c)
    m2 = m * m
    m_log_s2 = jnp.where(in_tail, 0, log_s2)
    # J(c) / I_d(0)
    J = m * jnp.exp((dim + 1) / 2 * m_log_s2 - log_half) * _centre_series(m2, dim, terms)
    log_centre = jnp.log1p(-J)

    log_body = jnp.where(in_tail, log_mirror, log_centre)
    body_log_s2 = jnp.where(in_tail & (c > 0), 0, log_s2)
    # eta = 1 + c s^{d-1} / I_d
    eta_body = 1 + c * jnp.exp((dim - 1) / 2 * body_log_s2 - log_half - log_body)

    upper = in_tail & (c > 0)
    log_cap = jnp.where(upper, log_tail, log_body)
    eta = jnp.where(upper, eta_tail, eta_body)

    constant = zero | whole
    log_constant = jnp.where(zero & (T > 0), -jnp.inf, math.log(2)).astype(log_cap.dtype)
    return jnp.where(constant, log_constant, log_cap), jnp.where(constant, 1, eta)
