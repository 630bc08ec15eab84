"""jit, vmap, grad, precision and trace counts."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

from avq_jax.loss import (
    Exponential,
    Power,
    Scaling,
    Threshold,
    Uniform,
    eta,
    eta_limit,
    residuals,
    row_norms,
    scaling,
    score_aware_loss,
)


def full(value):
    """Mark a parameter of the longer suite."""
    return pytest.param(value, marks=pytest.mark.full)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logistic:
    """A weight the package does not know."""

    centre: jax.Array
    rate: jax.Array

    def __call__(self, t):
        return jax.nn.sigmoid(self.rate * (t - self.centre))


LOGISTIC = Logistic(jnp.float32(0.2), jnp.float32(20.0))
WEIGHTS = [Threshold(0.2), Power(2.0), Exponential(3.0), Uniform(), LOGISTIC]
NORMS = jnp.array([0.0, 0.1, 0.5, 1.0, 1.0, 3.0])


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: type(w).__name__)
def test_jit_eager_and_vmap_agree(weight):
    eager = scaling(weight, NORMS, dim=20)
    compiled = jax.jit(partial(scaling, dim=20))(weight, NORMS)
    chex.assert_trees_all_close(eager, compiled, rtol=1e-6)
    each = jax.vmap(lambda norm: eta(weight, norm, dim=20))(NORMS)
    np.testing.assert_allclose(each, eta(weight, NORMS, dim=20), rtol=1e-5)


def test_structures_of_the_families_differ():
    """One jitted function serves all families; a cache must not take one for another."""
    trees = [jax.tree.structure(kind(0.5)) for kind in (Threshold, Power, Exponential)]
    assert len(set(trees)) == 3
    assert trees[0] != trees[1] != trees[2] != trees[0]
    compiled = jax.jit(partial(eta, dim=20))
    for weight in (Threshold(0.5), Power(0.5), Exponential(0.5), Uniform()):
        np.testing.assert_allclose(compiled(weight, 1.0), eta(weight, 1.0, dim=20), rtol=1e-6)
        assert "family" not in repr(weight)


def test_vmap_over_parameters():
    T = jnp.array([-0.1, 0.1, 0.2])
    batched = jax.vmap(lambda w: eta(w, 1.0, dim=100))(Threshold(T))
    np.testing.assert_allclose(batched, eta(Threshold(T), 1.0, dim=100), rtol=1e-6)
    np.testing.assert_allclose(batched[1:], [2.545, 5.953], atol=1e-3)


@pytest.mark.parametrize("kind", [Threshold, Power, Exponential])
def test_a_new_parameter_does_not_retrace(kind):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def weights(weight, norms):
        return scaling(weight, norms, dim=8)

    chex.clear_trace_counter()
    for parameter in (0.1, 0.2, 0.7):
        weights(kind(parameter), NORMS)


@pytest.mark.parametrize("d", [full(2), 100, full(10_000)])
def test_gradient_of_eta_for_the_threshold(d):
    """Against the derivative of the exact form in mpmath."""
    c = np.concatenate([[0.3, 0.95], np.linspace(-3, 3, 7) / np.sqrt(d + 3)]).astype(np.float32)
    c = c[np.abs(c) < 1]
    norm = np.float32(1.0)

    def total(T, norm):
        return jnp.sum(eta(Threshold(T), norm, dim=d))

    by_T, by_norm = jax.jit(jax.grad(total, argnums=(0, 1)))(c, jnp.full(c.shape, norm))
    with mp.workdps(30):
        for T, got_T, got_norm in zip(c.tolist(), by_T, by_norm, strict=True):
            T = mp.mpf(T)
            s2 = 1 - T * T
            integral = mp.betainc(mp.mpf(d + 1) / 2, mp.mpf(1) / 2, 0, s2) / 2
            if T < 0:
                integral = mp.beta(mp.mpf(d + 1) / 2, mp.mpf(1) / 2) - integral
            hazard = mp.sqrt(s2) ** (d - 1) / integral
            expected = hazard + T * hazard * (hazard - (d - 1) * T / s2)
            assert float(got_T) == pytest.approx(float(expected), rel=3e-5, abs=1e-6)
            assert float(got_norm) == pytest.approx(float(-T * expected), rel=3e-5, abs=1e-6)


@partial(jax.jit, static_argnums=2)
def objective(weight, norms, d):
    weights = scaling(weight, norms, dim=d)
    rows = jnp.arange(1, 4).astype(norms.dtype)
    return jnp.sum(rows * weights.parallel) - jnp.sum(jnp.sqrt(weights.orthogonal) * rows)


@pytest.mark.parametrize(
    ("kind", "parameter"), [(Threshold, 0.2), (Threshold, -0.1), (Power, 2.0), (Exponential, 1.5)]
)
@pytest.mark.parametrize("d", [full(1), 100])
def test_gradients_through_scaling(kind, parameter, d):
    """Against central differences in float64."""
    norms = np.array([0.5, 0.9, 1.3])
    by_weight, by_norms = jax.grad(objective, argnums=(0, 1))(
        kind(jnp.float32(parameter)), jnp.asarray(norms, jnp.float32), d
    )
    with jax.enable_x64(True):
        norms, step = jnp.asarray(norms), 1e-5

        def at(parameter, norms):
            return objective(kind(jnp.float64(parameter)), norms, d)

        expected = (at(parameter + step, norms) - at(parameter - step, norms)) / (2 * step)
        np.testing.assert_allclose(jax.tree.leaves(by_weight)[0], expected, rtol=1e-4, atol=1e-5)
        for i in range(3):
            up, down = norms.at[i].add(step), norms.at[i].add(-step)
            expected = (at(parameter, up) - at(parameter, down)) / (2 * step)
            np.testing.assert_allclose(by_norms[i], expected, rtol=1e-4, atol=1e-5)


def test_gradients_through_quadrature():
    @jax.jit
    def total(weight, norm):
        return jnp.sum(eta(weight, norm, dim=30))

    norm = jnp.array([0.3, 1.0])
    by_weight, by_norm = jax.jit(jax.grad(total, argnums=(0, 1)))(LOGISTIC, norm)
    with jax.enable_x64(True):
        wide, step = norm.astype(jnp.float64), 1e-5

        def at(centre, norm):
            return float(total(Logistic(jnp.float64(centre), jnp.float64(20.0)), norm))

        centre = float(LOGISTIC.centre)
        expected = (at(centre + step, wide) - at(centre - step, wide)) / (2 * step)
        assert float(by_weight.centre) == pytest.approx(expected, rel=1e-3)
        expected = (at(centre, wide.at[1].add(step)) - at(centre, wide.at[1].add(-step))) / (
            2 * step
        )
        assert float(by_norm[1]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("d", [full(1), 64])
def test_gradients_are_finite_everywhere(weight, d):
    """Zero rows, T = ||x||, T > ||x||, floored rows, ties at the largest."""
    norms = jnp.array([0.0, 1e-30, 0.1, 0.2, 0.20000002, 1.0, 1.0, 1e6, 1e30])

    def total(weight, norms):
        weights = scaling(weight, norms, dim=d)
        return jnp.sum(jnp.log(weights.parallel)) + jnp.sum(weights.orthogonal)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    for rows in (norms, norms.at[7:].set(0.5)):
        value = scaling(weight, rows, dim=d)
        chex.assert_tree_all_finite(value)
        assert all(bool(jnp.all(w > 0)) for w in value)
        chex.assert_tree_all_finite(gradient(weight, rows))


def test_weight_gradients_are_finite():
    t = jnp.array([-1.0, 0.0, 0.5])
    for p in (0.0, 0.5, 1.0, 3.0):
        by_p, by_t = jax.grad(lambda p, t: jnp.sum(Power(p)(t)), argnums=(0, 1))(p, t)
        chex.assert_tree_all_finite((by_p, by_t))
        np.testing.assert_allclose(by_p, 0.5**p * np.log(0.5), rtol=1e-5)


def test_loss_gradients_are_finite_at_zero_rows():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [1e-30, 0.0]])
    x_tilde = jnp.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    weights = Scaling(jnp.full(3, 4.0), jnp.ones(3))

    def total(x, x_tilde, weights):
        return jnp.sum(score_aware_loss(x, x_tilde, weights))

    chex.assert_tree_all_finite(jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, x_tilde, weights))
    chex.assert_tree_all_finite(jax.grad(lambda x: jnp.sum(row_norms(x)))(x))
    split = jax.jit(jax.jacrev(lambda x: residuals(x, x_tilde)))
    chex.assert_tree_all_finite(split(x))


def test_loss_gradients_against_finite_differences():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, x_tilde, direction = (jnp.asarray(a) for a in rng.standard_normal((3, 4, 5)))
        weights = Scaling(jnp.asarray(rng.random(4)), jnp.asarray(rng.random(4)))
        for given in (None, direction):
            jax.test_util.check_grads(
                partial(score_aware_loss, direction=given),
                (x, x_tilde, weights),
                order=1,
                modes=["rev"],
            )


def test_loss_under_jit_and_vmap():
    rng = np.random.default_rng(1)
    x, x_tilde = (jnp.asarray(a, jnp.float32) for a in rng.standard_normal((2, 6, 5)))
    weights = scaling(Threshold(0.2), row_norms(x), dim=5)
    eager = score_aware_loss(x, x_tilde, weights)
    np.testing.assert_allclose(jax.jit(score_aware_loss)(x, x_tilde, weights), eager, rtol=1e-6)
    rows = jax.vmap(
        lambda a, b, w: score_aware_loss(a[None], b[None], jax.tree.map(lambda v: v[None], w))[0]
    )(x, x_tilde, weights)
    np.testing.assert_allclose(rows, eager, rtol=1e-6)


def test_double_precision():
    with jax.enable_x64(True):
        value = eta(Threshold(0.2), np.float64(1.0), dim=100)
        assert value.dtype == jnp.float64
        with mp.workdps(30):
            c = mp.mpf(0.2)
            tail = mp.betainc(mp.mpf(101) / 2, mp.mpf(1) / 2, 0, 1 - c * c) / 2
            assert float(value) == pytest.approx(
                float(1 + c * mp.sqrt(1 - c * c) ** 99 / tail), rel=1e-12
            )
        assert eta(Threshold(0.2), jnp.float32(1.0), dim=100).dtype == jnp.float32
        for weight in (Threshold(0.2), Power(2.0), Exponential(3.0), Uniform()):
            assert scaling(weight, np.ones(3), dim=4).parallel.dtype == jnp.float64
            assert scaling(weight, np.ones(3, np.float32), dim=4).parallel.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """Rows whose squared norm overflows float16 too."""
    x = jnp.array([[300.0, 400.0], [1.0, 2.0]], dtype)
    wide = x.astype(jnp.float32)
    np.testing.assert_array_equal(row_norms(x), row_norms(wide))
    ones = Scaling(jnp.ones(2), jnp.ones(2))
    low, high = (score_aware_loss(v, jnp.zeros_like(v), ones) for v in (x, wide))
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, high)
    norms = jnp.array([0.5, 300.0], dtype)
    for weight in WEIGHTS:
        chex.assert_trees_all_equal(
            scaling(weight, norms, dim=8), scaling(weight, norms.astype(jnp.float32), dim=8)
        )


def test_eta_limit_gradient_and_edges():
    by_T = jax.grad(lambda T: eta_limit(T, 1.0, dim=101))(0.2)
    assert float(by_T) == pytest.approx(100 * 2 * 0.2 / (1 - 0.04) ** 2, rel=1e-5)
    norms = jnp.array([0.0, 0.1, 0.2, 1.0])
    chex.assert_tree_all_finite(eta_limit(0.2, norms, dim=10))
    chex.assert_tree_all_finite(jax.grad(lambda n: jnp.sum(eta_limit(0.2, n, dim=10)))(norms))
    assert float(eta_limit(0.2, 1.0, dim=1)) == 0
