r"""The integrals of Theorem 3.2 for any weight function, by windowed Gauss-Legendre quadrature.

With t = ||x|| sin(phi), phi = pi/2 - theta,

    h_orthogonal = int w(||x|| sin phi) cos^d(phi) dphi,
    h_parallel = (d - 1) int w(||x|| sin phi) sin^2(phi) cos^{d-2}(phi) dphi.

The mass of cos^d sits in |phi| <~ 1/sqrt(d), but the weight may move it anywhere (a threshold at
0.95 ||x||, d = 100, leaves 1e-50 of it). So a coarse grid, dense near phi = 0, finds the largest
integrand of each row, bisection finds the two ends of the window in which the integrand exceeds
exp(-DEPTH) of it, and the rule is laid over that window. Sums are taken in logarithms.

Reference: Guo et al. 2020, Theorem 3.2; Golub and Welsch 1969 for the Gauss nodes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

DEPTH = 20.0
_GRID = 129
_BISECTIONS = 24
_PANELS, _ORDER = 64, 8
_ROWS = 512
_DATA = (jax.Array, np.ndarray, np.generic, bool, int, float)


@functools.lru_cache
def _composite_rule() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1]: _PANELS panels of _ORDER Gauss-Legendre nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(_ORDER)
    starts = np.arange(_PANELS)[:, None]
    return ((starts + (nodes + 1) / 2) / _PANELS).ravel(), np.tile(weights / (2 * _PANELS), _PANELS)


def _log_integrand(
    weight: Callable[[Array], Array], norm: Array, phi: Array, exponent: int
) -> Array:
    """Return log(w(norm sin phi) cos^exponent(phi)), -inf where the weight is not positive."""
    t = norm * jnp.sin(phi)
    w = jnp.broadcast_to(jnp.asarray(weight(t)).astype(t.dtype), t.shape)
    vanishes = w <= 0
    log_w = jnp.where(vanishes, -jnp.inf, jnp.log(jnp.where(vanishes, 1, w)))
    # through sin near 0, where cos(phi)^10000 needs it; through cos near the poles
    sine2 = jnp.sin(phi) ** 2
    cosine = jnp.maximum(jnp.cos(phi), jnp.finfo(t.dtype).tiny)
    log_cos = jnp.where(sine2 < 0.5, 0.5 * jnp.log1p(-jnp.minimum(sine2, 0.5)), jnp.log(cosine))
    return log_w + exponent * log_cos


def _window(
    log_f: Callable[[Array], Array], grid: Array, low: Array, high: Array
) -> tuple[Array, Array]:
    """Shrink [low, high] to where log_f exceeds its largest value on the grid less DEPTH."""
    phi = low + (high - low) * grid
    values = log_f(phi)
    level = jnp.max(values) - DEPTH
    inside = values > level
    first = jnp.argmax(inside)
    last = grid.shape[0] - 1 - jnp.argmax(inside[::-1])
    outer = jnp.stack(
        [phi[jnp.maximum(first - 1, 0)], phi[jnp.minimum(last + 1, phi.shape[0] - 1)]]
    )
    inner = jnp.stack([phi[first], phi[last]])

    def bisect(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        out, into = ends
        middle = 0.5 * (out + into)
        hit = log_f(middle) > level
        return jnp.where(hit, out, middle), jnp.where(hit, middle, into)

    ends_out, _ = lax.fori_loop(0, _BISECTIONS, bisect, (outer, inner))
    return lax.stop_gradient(ends_out[0]), lax.stop_gradient(ends_out[1])


def _row_moments(weight: Callable[[Array], Array], norm: Array, *, dim: int) -> tuple[Array, Array]:
    dtype = norm.dtype
    # the two integrands together are w cos^{d-2}; d = 1 has the one, w cos
    exponent = abs(dim - 2)
    fixed_weight = jax.tree.map(
        lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, weight
    )
    fixed_norm = lax.stop_gradient(norm)

    def log_f(phi: Array) -> Array:
        return _log_integrand(fixed_weight, fixed_norm, phi, exponent)

    scale = 1 / math.sqrt(dim)
    reach = math.asinh(math.pi / 2 / scale)
    stretched = scale * np.sinh(np.linspace(-reach, reach, _GRID))
    coarse = jnp.asarray((stretched + math.pi / 2) / math.pi, dtype)
    even = jnp.asarray(np.linspace(0, 1, _GRID), dtype)
    half_turn = jnp.asarray(math.pi / 2, dtype)
    low, high = _window(log_f, coarse, -half_turn, half_turn)
    low, high = _window(log_f, even, low, high)

    nodes, node_weights = _composite_rule()
    phi = low + (high - low) * jnp.asarray(nodes, dtype)
    log_rule = jnp.asarray(np.log(node_weights), dtype)
    log_terms = _log_integrand(weight, norm, phi, exponent) + log_rule
    top = lax.stop_gradient(jnp.max(log_terms))
    some = top > -jnp.inf
    top = jnp.where(some, top, 0)
    terms = jnp.exp(jnp.where(some, log_terms - top, 0))
    orthogonal = jnp.sum(terms if dim == 1 else terms * jnp.cos(phi) ** 2)
    log_orthogonal = jnp.where(some, jnp.log(orthogonal) + top + jnp.log(high - low), -jnp.inf)
    if dim == 1:
        # the limit d -> 1 of Theorem 3.2: the sphere is the two points +-x/||x||
        ends = _log_integrand(weight, norm, jnp.stack([-half_turn, half_turn]), 0)
        eta = jnp.sum(jnp.exp(ends - jnp.where(some, log_orthogonal, 0)))
    else:
        eta = (dim - 1) * jnp.sum(terms * jnp.sin(phi) ** 2) / orthogonal
    return log_orthogonal, jnp.where(some, eta, 1)


def quadrature_moments(
    weight: Callable[[Array], Array], norm: Float[Array, "*shape"], *, dim: int
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""Return (log h_orthogonal, eta) of any weight function, elementwise over the norms.

    512 Gauss-Legendre nodes in 64 panels over the window of each row. Relative error of eta in
    float32, tested for d from 1 to 10,000:

    *   weights that are smooth, or smooth where they are not zero (a jump from zero is found by
        bisection): below 2e-5;
    *   weights with a jump between two positive values: below 1e-2.

    A feature of w narrower than 1/20 of the scale ||x||/sqrt(d) (or of t itself, where t is
    larger) can be missed. A row on which w vanishes gets log h_orthogonal = -inf and eta = 1.
    Derivatives are those of w: the movement of a jump contributes nothing, as in all automatic
    differentiation; the closed forms do not have this limit. A plain function is taken as pure:
    it is traced once for each shape.

    Args:
        weight: w, elementwise, nonnegative (negative values count as zero).
        norm: row norms ||x||, any shape.
        dim: d >= 1.

    Returns:
        Two arrays of the shape of `norm`; the factor of the logarithm is common to all rows.

    >>> import jax.numpy as jnp
    >>> _, eta = quadrature_moments(lambda t: jnp.maximum(t, 0) ** 2, jnp.array([3.0]), dim=16)
    >>> print(f"{eta[0]:.4f}")
    3.0000
    """
    leaves, treedef = jax.tree.flatten(weight)
    data = [leaf if isinstance(leaf, _DATA) else None for leaf in leaves]
    rest = tuple(None if isinstance(leaf, _DATA) else leaf for leaf in leaves)
    # the name and the type too: equality of tree structures can miss the class of a dataclass
    static = (type(weight), str(treedef), treedef, rest)
    return _mapped_moments(data, norm, static=static, dim=dim)


@functools.partial(jax.jit, static_argnames=("static", "dim"))
def _mapped_moments(
    data: list[Any], norm: Array, *, static: tuple[Any, ...], dim: int
) -> tuple[Array, Array]:
    # plain functions are static, numbers are data: a new parameter does not retrace
    *_, treedef, rest = static
    leaves = [b if a is None else a for a, b in zip(data, rest, strict=True)]
    weight = jax.tree.unflatten(treedef, leaves)

    @jax.checkpoint
    def row(n: Array) -> tuple[Array, Array]:
        return _row_moments(weight, n, dim=dim)

    flat = norm.ravel()
    if flat.shape[0] <= _ROWS:
        log_orthogonal, eta = jax.vmap(row)(flat)
    else:
        log_orthogonal, eta = lax.map(row, flat, batch_size=_ROWS)
    return log_orthogonal.reshape(norm.shape), eta.reshape(norm.shape)
