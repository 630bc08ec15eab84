"""The statements of Section 3, against mpmath, Monte Carlo and each other."""

import dataclasses
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avq_jax.loss import (
    Exponential,
    Power,
    QueryTerms,
    Scaling,
    Threshold,
    Uniform,
    eta,
    eta_limit,
    moments,
    residuals,
    scaling,
    score_aware_loss,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opaque:
    """A weight whose closed form the package does not see."""

    weight: object

    def __call__(self, t):
        return self.weight(t)


def full(value):
    """Mark a parameter of the longer suite."""
    return pytest.param(value, marks=pytest.mark.full)


# Computed with mpmath at 40 digits: d, T/||x||, eta, log(h_orthogonal / int_0^{pi/2} sin^d).
GOLDEN = [
    (1, -0.5, 0.666666667, 0.405465108),
    (1, 0.5, 2, -0.693147181),
    (2, -0.5, 0.657346392, 0.475611489),
    (2, 0.2, 1.33397981, -0.291609676),
    (2, 0.9, 14.3603999, -3.28645666),
    (3, 0.2, 1.40909092, -0.350976929),
    (16, 0.2, 2.15953783, -0.887506486),
    (16, 0.7, 18.1582186, -7.07311826),
    (100, -0.2, 0.891644816, 0.671507722),
    (100, 0.1, 2.54460088, -1.15554857),
    (100, 0.2, 5.95331434, -3.15088991),
    (100, 0.25, 8.53870592, -4.521708),
    (100, 0.3, 11.8368801, -6.17601323),
    (100, 0.95, 936.875789, -120.044664),
    (960, -0.05, 0.801860568, 0.630736769),
    (960, 0.05, 4.07674238, -2.1119189),
    (960, 0.2, 41.9952353, -21.689105),
    (10000, -0.01, 0.712389783, 0.520407775),
    (10000, 0.01, 2.5253278, -1.14795069),
    (10000, 0.2, 418.703407, -207.354374),
]


def cap(d, c):
    """Return I_d(c) = int_0^{arccos c} sin^d in mpmath."""
    with mp.workdps(30):
        c = mp.mpf(c)
        tail = mp.betainc(mp.mpf(d + 1) / 2, mp.mpf(1) / 2, 0, 1 - c * c) / 2
        return tail if c >= 0 else mp.beta(mp.mpf(d + 1) / 2, mp.mpf(1) / 2) - tail


def eta_reference(d, c):
    with mp.workdps(30):
        c = mp.mpf(c)
        return 1 + c * mp.sqrt(1 - c * c) ** (d - 1) / cap(d, c)


@pytest.mark.parametrize(("d", "c", "expected", "log_h"), GOLDEN)
def test_threshold_golden(d, c, expected, log_h):
    value = eta(Threshold(c), np.ones(2, np.float32), dim=d)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # the logarithm is as good as float32 norms allow: (eta - 1) times a rounding error
    got = moments(Threshold(c), jnp.ones(2), dim=d)[0]
    np.testing.assert_allclose(got, log_h, rtol=3e-7, atol=1e-6 + 2e-7 * expected)


@pytest.mark.parametrize("d", [full(1), 2, full(3), full(16), 100, full(960), 10_000])
def test_threshold_grid_against_mpmath(d):
    ratio = np.concatenate(
        [[-0.999, -0.3, 0.3, 0.9, 0.99999], np.linspace(-3, 3, 13) / np.sqrt(d + 3)]
    )
    ratio = ratio[np.abs(ratio) < 1]
    norm = np.geomspace(1e-6, 1e6, ratio.size).astype(np.float32)
    T = (ratio * norm).astype(np.float32)
    got = np.asarray(eta(Threshold(T), norm, dim=d))
    expected = [
        float(eta_reference(d, mp.mpf(float(t)) / float(n))) for t, n in zip(T, norm, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=3e-6)


@pytest.mark.parametrize(
    ("d", "exact", "limit"), [(16, 2.160, 0.625), (100, 5.953, 4.125), (960, 41.995, 39.958)]
)
def test_paper_scale_numbers(d, exact, limit):
    assert float(eta(Threshold(0.2), 1.0, dim=d)) == pytest.approx(exact, abs=6e-4)
    assert float(eta_limit(0.2, 1.0, dim=d)) == pytest.approx(limit, abs=6e-4)


def test_threshold_three_dimensions_closed_form():
    c = np.linspace(-0.95, 0.95, 39).astype(np.float32)
    expected = 1 + 3 * c * (1 + c) / ((1 - c) * (2 + c))
    np.testing.assert_allclose(eta(Threshold(c), 1.0, dim=3), expected, rtol=1e-5)


def test_threshold_edges():
    norms = jnp.array([0.0, 0.1, 0.2, 1.0])
    whole = eta(Threshold(-1.0), norms, dim=100)
    np.testing.assert_array_equal(whole, 1)  # T <= -||x||: the whole sphere
    assert float(eta(Threshold(-0.2), 1.0, dim=100)) == pytest.approx(0.8916, abs=5e-5)
    assert float(eta(Threshold(0.0), 1.0, dim=100)) == 1
    clipped = eta(Threshold(0.2), norms, dim=100)
    assert float(clipped[0]) == 1  # the score of a zero row does not depend on the query
    assert float(clipped[1]) == float(clipped[2]) == pytest.approx(101 * 2**19, rel=1e-5)
    chex.assert_tree_all_finite(clipped)


def test_recursion_of_the_cap_integrals():
    """d I_d = (d - 1) I_{d-2} - cos(a) sin^{d-1}(a), the recursion of Section 3.2."""
    c = jnp.array([-0.4, 0.1, 0.2, 0.5])
    for d in (3, 100):

        def integral(d):
            start = math.lgamma((d + 1) / 2) - math.lgamma(d / 2 + 1) + math.log(math.pi) / 2
            return np.exp(np.asarray(moments(Threshold(c), jnp.ones(4), dim=d)[0]) + start) / 2

        right = (d - 1) * integral(d - 2) - c * (1 - c**2) ** ((d - 1) / 2)
        # the difference cancels all but 1/eta of its terms
        np.testing.assert_allclose(d * integral(d), right, rtol=2e-4)


def test_parallel_is_orthogonal_plus_boundary_term():
    """h_parallel = h_orthogonal + c s^{d-1}, between rows of different norm."""
    norms = np.linspace(0.5, 2.0, 7).astype(np.float32)
    for d in (1, 16):
        weights = scaling(Threshold(0.2), norms, dim=d)
        c = 0.2 / norms.astype(np.float64)
        boundary = c * (1 - c**2) ** ((d - 1) / 2) / float(cap(d, c[-1]))
        np.testing.assert_allclose(weights.parallel - weights.orthogonal, boundary, rtol=1e-4)


def test_limit_of_theorem_3_4():
    """eta/(d - 1) tends to Equation 3 as d grows, from above."""
    errors = [
        float(eta(Threshold(0.2), 1.0, dim=d) / eta_limit(0.2, 1.0, dim=d)) - 1
        for d in (100, 1000, 10_000)
    ]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] == pytest.approx(0.005, abs=1e-3)  # about 2/(d c^2)


weights_of_theorem_3_3 = st.one_of(
    st.floats(0, 3, width=32).map(Threshold),
    st.floats(0, 8, width=32).map(Power),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    weight=weights_of_theorem_3_3,
    norm=st.floats(2**-10, 2**10, width=32),
    d=st.sampled_from([1, 2, 2000]),
)
def test_theorem_3_3(weight, norm, d):
    """Eta >= 1 for w nondecreasing and zero below 0."""
    assert float(eta(weight, norm, dim=d)) >= 1 - 1e-6


@pytest.mark.parametrize("d", [full(2), 300])
def test_theorem_3_3_for_other_weights(d):
    norm = jnp.geomspace(0.1, 10, 5)

    def steps(t):
        return (t >= 0.05).astype(t.dtype) + 2 * (t >= 0.3).astype(t.dtype)

    assert float(jnp.min(eta(steps, norm, dim=d))) >= 1
    # equality: w constant on (0, ||x||]
    np.testing.assert_allclose(eta(lambda t: jnp.where(t > 0, 3.0, 0.0), norm, dim=d), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "weight", [Threshold(0.2), Threshold(-0.3), Power(2.5), Exponential(3.0), Uniform()]
)
@pytest.mark.parametrize("d", [full(1), 100])
def test_eta_is_a_logarithmic_derivative(weight, d):
    """Eta = 1 + d log h_orthogonal / d log ||x||, for every weight."""
    norms = jnp.array([0.4, 0.9, 1.0, 3.0])

    def log_h(norms):
        return jnp.sum(moments(weight, norms, dim=d)[0])

    slope = norms * jax.jit(jax.grad(log_h))(norms)
    np.testing.assert_allclose(eta(weight, norms, dim=d), 1 + slope, rtol=2e-5)


@pytest.mark.parametrize("d", [1, 2, 50, 10_000])
def test_power_is_p_plus_one(d):
    norms = jnp.array([0.0, 1e-6, 1.0, 1e6])
    for p in (0.0, 0.5, 3.0):
        np.testing.assert_array_equal(eta(Power(p), norms, dim=d), p + 1)
    weights = scaling(Power(3.0), jnp.array([0.5, 1.0, 2.0]), dim=d)
    np.testing.assert_allclose(weights.orthogonal, [1 / 64, 1 / 8, 1], rtol=1e-6)
    np.testing.assert_allclose(weights.parallel, 4 * weights.orthogonal, rtol=1e-6)


def test_uniform_is_the_reconstruction_loss():
    weights = scaling(Uniform(), jnp.array([0.0, 0.5, 4.0]), dim=7)
    chex.assert_trees_all_equal(weights, Scaling(jnp.ones(3), jnp.ones(3)))


@pytest.mark.parametrize("d", [1, full(2), full(3), 100, full(960)])
def test_exponential_against_mpmath(d):
    kappa = np.array([-30.0, -1.0, 0.0, 1e-3, 0.1, 1.0, 10.0, 100.0, 3000.0], np.float32)
    log_h, value = moments(Exponential(kappa), jnp.ones(kappa.size), dim=d)
    for k, got_log, got in zip(kappa, log_h, value, strict=True):
        with mp.workdps(30):
            k, nu = abs(mp.mpf(float(k))), mp.mpf(d) / 2
            ratio = mp.besseli(nu + 1, k) / mp.besseli(nu, k) if k else mp.mpf(0)
            log_ratio = mp.log(mp.gamma(nu + 1) * (2 / k) ** nu * mp.besseli(nu, k)) if k else 0
            assert float(got) == pytest.approx(float(1 + k * ratio), rel=2e-6)
            assert float(got_log) == pytest.approx(float(log_ratio), rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("b", [1e3, 1e6])
def test_exponential_far_out(b):
    """kappa >> d: eta -> kappa - (d - 1)/2, without overflow."""
    assert float(eta(Exponential(b), 1.0, dim=100)) == pytest.approx(b - 49.5, rel=2e-3)


# Quadrature, and weights the package does not know


@pytest.mark.parametrize("d", [full(1), 2, full(100), full(10_000)])
@pytest.mark.parametrize(
    "weight", [Threshold(0.2), Power(0.5), Power(10.0), Exponential(4.0), Exponential(-1.0)]
)
def test_quadrature_error_smooth_or_zero_below_a_jump(weight, d):
    norms = np.geomspace(0.21, 20, 15).astype(np.float32)
    log_h, exact = moments(weight, jnp.asarray(norms), dim=d)
    log_q, value = moments(Opaque(weight), jnp.asarray(norms), dim=d)
    np.testing.assert_allclose(value, exact, rtol=2e-5)
    shift = np.asarray(log_q - log_h)
    # the common factor is common; logs of size L carry L roundings
    np.testing.assert_allclose(shift - shift[-1], 0, atol=5e-5 + 4e-7 * float(-log_h.min()))


@pytest.mark.parametrize("d", [full(2), 100])
def test_quadrature_error_at_a_positive_jump(d):
    """w = I(t >= 0) + 2 I(t >= T): the exact integrals are sums of two closed forms."""
    norms = jnp.geomspace(0.25, 4, 9)

    def steps(t):
        return (t >= 0).astype(t.dtype) + 2 * (t >= 0.2).astype(t.dtype)

    low, high = (moments(Threshold(T), norms, dim=d) for T in (0.0, 0.2))
    h = [jnp.exp(low[0]), 2 * jnp.exp(high[0])]
    exact = (h[0] * low[1] + h[1] * high[1]) / (h[0] + h[1])
    np.testing.assert_allclose(eta(steps, norms, dim=d), exact, rtol=1e-2)


def test_quadrature_deep_tail():
    """A threshold that leaves 1e-50 of the sphere."""
    value = eta(lambda t: (t >= 0.95).astype(t.dtype), 1.0, dim=100)
    assert float(value) == pytest.approx(
        float(eta_reference(100, float(np.float32(0.95)))), rel=2e-5
    )


# Lemma 7.1, Definition 3.1


def sphere(rng, n, d):
    q = rng.standard_normal((n, d))
    return q / np.linalg.norm(q, axis=1, keepdims=True)


def test_lemma_7_1():
    rng = np.random.default_rng(0)
    d, n, t = 6, 200_000, 0.7
    x, r = rng.standard_normal(d), rng.standard_normal(d)
    norm = np.linalg.norm(x)
    u = x / norm
    across = sphere(rng, n, d - 1) @ np.linalg.svd(u[None])[2][1:]
    q = (t / norm) * u + np.sqrt(1 - (t / norm) ** 2) * across
    np.testing.assert_allclose(q @ x, t, rtol=1e-10)
    samples = (q @ r) ** 2
    parallel, orthogonal = residuals(x[None], (x - r)[None])
    expected = (t / norm) ** 2 * jnp.sum(parallel**2) + (1 - (t / norm) ** 2) / (d - 1) * jnp.sum(
        orthogonal**2
    )
    assert abs(samples.mean() - float(expected)) < 4 * samples.std() / np.sqrt(n)


@pytest.mark.parametrize(
    "weight",
    [Threshold(0.3), Threshold(-0.2), Power(2.0), Exponential(2.0), Opaque(Exponential(0.5))],
)
@pytest.mark.parametrize("d", [full(1), 8])
def test_loss_is_definition_3_1(weight, d):
    """One factor turns the row losses into E_q[w(<q, x>) <q, x - x~>^2], whatever the norms."""
    rng = np.random.default_rng(1)
    samples, n = 50_000, 4
    x = sphere(rng, n, d) * np.array([[0.5], [1.0], [1.5], [2.0]])
    x_tilde = x + 0.3 * rng.standard_normal((n, d))
    q = sphere(rng, samples, d)
    w = np.asarray(weight(jnp.asarray(q @ x.T, jnp.float32)))
    draws = w * (q @ (x - x_tilde).T) ** 2
    expected, error = draws.mean(0), draws.std(0) / np.sqrt(samples)
    weights = scaling(weight, np.linalg.norm(x, axis=1), dim=d)
    loss = np.asarray(score_aware_loss(x, x_tilde, weights))
    factor = expected.sum() / loss.sum()
    assert np.all(np.abs(factor * loss - expected) < 5 * error + 1e-6 * expected)


def test_loss_with_a_known_query_distribution():
    """E_q over a finite set of queries is `extra` with their weights, and nothing else."""
    rng = np.random.default_rng(2)
    x, x_tilde = rng.standard_normal((2, 5, 7))
    q, w = rng.standard_normal((5, 3, 7)), rng.random((5, 3))
    none = Scaling(jnp.zeros(5), jnp.zeros(5))
    loss = score_aware_loss(x, x_tilde, none, extra=QueryTerms(jnp.asarray(q), jnp.asarray(w)))
    expected = (w * np.einsum("nrd,nd->nr", q, x - x_tilde) ** 2).sum(1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_loss_is_the_quadratic_form_of_definition_4_1():
    rng = np.random.default_rng(3)
    x, x_tilde, direction = rng.standard_normal((3, 6, 5))
    weights = Scaling(jnp.asarray(rng.random(6)), jnp.asarray(rng.random(6)))
    r, u = x - x_tilde, direction / np.linalg.norm(direction, axis=1, keepdims=True)
    parallel, orthogonal = np.asarray(weights.parallel), np.asarray(weights.orthogonal)
    expected = orthogonal * (r**2).sum(1) + (parallel - orthogonal) * (r * u).sum(1) ** 2
    np.testing.assert_allclose(
        score_aware_loss(x, x_tilde, weights, direction=direction), expected, rtol=1e-5
    )


def test_residuals_split():
    rng = np.random.default_rng(4)
    x, x_tilde = rng.standard_normal((2, 20, 9))
    along, across = residuals(x, x_tilde)
    np.testing.assert_allclose(along + across, x - x_tilde, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(across * x.astype(np.float32), axis=1), 0, atol=1e-5)
    expected = ((x - x_tilde) * x).sum(1, keepdims=True) * x / (x**2).sum(1, keepdims=True)
    np.testing.assert_allclose(along, expected, rtol=1e-4, atol=1e-6)


def test_loss_does_not_cancel():
    """A residual along x is not charged the rounding of ||r||^2 - <u, r>^2, nor turned negative."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((100, 50)).astype(np.float32)
    weights = Scaling(jnp.zeros(100), jnp.ones(100))
    loss = score_aware_loss(x, np.zeros_like(x), weights)
    assert float(jnp.min(loss)) >= 0
    assert float(jnp.max(loss / jnp.sum(x**2, axis=1))) < 1e-11


def test_relative_weights_in_logarithms():
    """Rows 10^49 apart: far below float32, floored and finite, their ratio kept."""
    weights = scaling(Threshold(0.5), jnp.array([1.0, 2.0]), dim=1000)
    np.testing.assert_allclose(weights.orthogonal, [1e-20, 1], rtol=1e-5)
    ratio = weights.parallel / weights.orthogonal
    np.testing.assert_allclose(ratio, eta(Threshold(0.5), jnp.array([1.0, 2.0]), dim=1000))
    # all rows in the deep tail, where the integrals themselves are about 1e-105
    norms = np.array([1.0, 1.01, 1.03], np.float32)
    weights = scaling(Threshold(0.6), norms, dim=1000)
    expected = np.array([float(cap(1000, np.float64(np.float32(0.6)) / n)) for n in norms.tolist()])
    assert expected[0] == 0 or expected[0] < 1e-90
    with mp.workdps(30):
        caps = [cap(1000, mp.mpf(float(np.float32(0.6))) / n) for n in norms.tolist()]
        exact = [float(c / caps[-1]) for c in caps]
    np.testing.assert_allclose(weights.orthogonal, exact, rtol=2e-4)


def test_normalisation():
    weights = scaling(Threshold(0.2), jnp.full(3, 1.0), dim=100)
    np.testing.assert_array_equal(weights.orthogonal, 1)  # Section 3.2: (eta, 1)
    np.testing.assert_allclose(weights.parallel, 5.953, rtol=1e-4)
    assert partial(scaling, dim=3)(Uniform(), jnp.zeros(0)).parallel.shape == (0,)
