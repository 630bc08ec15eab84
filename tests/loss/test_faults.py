"""Bad inputs: raised with the argument, the rule and what was got, or a documented value."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    row_norms,
    scaling,
    score_aware_loss,
)

ONES = Scaling(jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize("dim", [0, -3])
def test_dim_out_of_range(dim):
    for call in (
        lambda: eta(Uniform(), 1.0, dim=dim),
        lambda: eta_limit(0.2, 1.0, dim=dim),
        lambda: scaling(Uniform(), jnp.ones(2), dim=dim),
    ):
        with pytest.raises(ValueError, match=f"dim must be at least 1, got {dim}"):
            call()


@pytest.mark.parametrize("dim", [2.5, "8", None, True])
def test_dim_not_an_integer(dim):
    with pytest.raises(TypeError, match="dim"):
        eta(Uniform(), 1.0, dim=dim)


@pytest.mark.parametrize("kind", [Threshold, Power, Exponential])
def test_parameters_that_are_not_numbers(kind):
    name = {Threshold: "T", Power: "p", Exponential: "b"}[kind]
    with pytest.raises(ValueError, match=f"{name} must not be NaN, got nan"):
        scaling(kind(float("nan")), jnp.ones(2), dim=4)
    with pytest.raises(ValueError, match=f"{name} must not be NaN"):
        eta(kind(jnp.array(jnp.nan)), 1.0, dim=4)
    with pytest.raises(TypeError, match=f"{name} must be a real number, got True"):
        eta(kind(True), 1.0, dim=4)
    # under jit: NaN in, NaN out
    assert np.isnan(jax.jit(lambda v: eta(kind(v), 1.0, dim=4))(jnp.nan))


def test_negative_power():
    with pytest.raises(ValueError, match="p must be at least 0, got -1"):
        eta(Power(-1.0), 1.0, dim=4)
    # gradients and masks come in the same class
    by_p = jax.grad(lambda w: -jnp.sum(w(jnp.array([2.0]))))(Power(1.0))
    np.testing.assert_allclose(by_p.p, -2 * np.log(2), rtol=1e-6)
    assert jax.tree.map(lambda leaf: leaf > 0, Power(1.0)).p is True


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_norms_no_row_can_have(bad):
    with pytest.raises(
        ValueError, match=r"norms must be finite and at least 0, got .* at 2 \(1 such of 3\)"
    ):
        scaling(Uniform(), jnp.array([1.0, 0.0, bad]), dim=4)
    with pytest.raises(ValueError, match="norm must be finite"):
        eta(Uniform(), bad, dim=4)


def test_parameter_of_another_shape():
    with pytest.raises(
        ValueError, match=r"T must be a scalar or have the shape of the norms, \(3,\)"
    ):
        scaling(Threshold(jnp.ones(2)), jnp.ones(3), dim=4)


def test_zero_rows():
    """Finite weights; the loss is that of reconstruction."""
    norms = jnp.array([0.0, 1.0])
    for weight in (
        Threshold(0.2),
        Threshold(0.0),
        Threshold(-0.2),
        Power(2.0),
        Exponential(1.0),
        lambda t: t * t,
    ):
        weights = scaling(weight, norms, dim=16)
        chex.assert_tree_all_finite(weights)
        assert float(weights.orthogonal[0]) > 0
    assert float(eta(Threshold(0.2), 0.0, dim=16)) == 1
    x = jnp.zeros((2, 3))
    np.testing.assert_array_equal(score_aware_loss(x, x + 1, ONES), 3)
    parallel, orthogonal = residuals(x, x + 1)
    np.testing.assert_array_equal(parallel, 0)
    np.testing.assert_array_equal(orthogonal, -1)


def test_rows_shorter_than_the_threshold():
    """Floored, never 0/0."""
    weights = scaling(Threshold(0.5), jnp.array([0.1, 0.4, 0.5, 1.0]), dim=64)
    np.testing.assert_allclose(weights.orthogonal[:3], 1e-20, rtol=1e-5)
    assert float(weights.orthogonal[3]) == 1
    # no row above the threshold, or none with a positive weight
    for weight in (Threshold(5.0), lambda t: (t >= 5.0).astype(t.dtype)):
        weights = scaling(weight, jnp.array([0.1, 0.4]), dim=64)
        np.testing.assert_array_equal(weights.orthogonal, 1)
        chex.assert_tree_all_finite(weights)
    np.testing.assert_array_equal(weights.parallel, 1)
    np.testing.assert_array_equal(scaling(Power(2.0), jnp.zeros(3), dim=5).orthogonal, 1)


def test_extreme_norms():
    """Norms whose squares leave float32."""
    x = jnp.array([[1e-30, 0.0], [0.0, 1e30], [3e-30, 4e-30], [3e30, 4e30]])
    np.testing.assert_allclose(row_norms(x), [1e-30, 1e30, 5e-30, 5e30], rtol=1e-6)
    for weight in (
        Threshold(0.2),
        Power(2.0),
        Exponential(3.0),
        Uniform(),
        lambda t: jnp.tanh(t) + 1,
    ):
        chex.assert_tree_all_finite(scaling(weight, row_norms(x), dim=2))
    parallel, _ = residuals(x, 0.5 * x)
    np.testing.assert_allclose(parallel, 0.5 * x, rtol=1e-5)


def test_array_kinds():
    """Any real dtype and memory order gives the answer of float32."""
    x = np.array([[3, 4], [1, 0]])
    x_tilde = np.array([[3, 3], [1, 1]])
    weights = scaling(Threshold(0.2), np.array([5, 1]), dim=2)
    expected = score_aware_loss(x.astype(np.float32), x_tilde.astype(np.float32), weights)
    for dtype in (np.float64, np.int8, np.uint8, np.float16):
        got = score_aware_loss(np.asfortranarray(x.astype(dtype)), x_tilde.astype(dtype), weights)
        np.testing.assert_array_equal(got, expected)
    strided = np.repeat(x.astype(np.float32), 2, axis=0)[::2]
    strided.flags.writeable = False
    np.testing.assert_array_equal(score_aware_loss(strided, x_tilde, weights), expected)


def test_shapes_are_checked():
    x = jnp.ones((2, 3))
    one = Scaling(jnp.ones(1), jnp.ones(1))
    terms = QueryTerms(jnp.ones((2, 4, 3)), jnp.ones((2, 5)))
    with pytest.raises(
        ValueError, match=r"scaling.parallel must have shape \[n\] = \(2,\), got \(1,\)"
    ):
        score_aware_loss(x, x, one)
    with pytest.raises(ValueError, match=r"extra.weights must have shape \[n, R\] = \(2, 4\)"):
        score_aware_loss(x, x, ONES, extra=terms)
    with pytest.raises(ValueError, match=r"extra.directions must have shape"):
        score_aware_loss(x, x, ONES, extra=QueryTerms(jnp.ones((2, 3)), jnp.ones((2, 3))))
    # x_tilde and direction are caught by the annotations where those are checked at run time
    with pytest.raises((ValueError, TypeError)):
        score_aware_loss(x, x[:1], ONES)
    with pytest.raises((ValueError, TypeError)):
        residuals(x, x, direction=x[:1])


def test_single_row_and_single_dimension():
    """d = 1: the sphere is {-1, 1}, all of the residual is parallel."""
    weights = scaling(Threshold(0.2), jnp.array([0.1, 1.0, 2.0]), dim=1)
    chex.assert_tree_all_finite(weights)
    # h_parallel = w(||x||) + w(-||x||) = 1 for both rows above T
    np.testing.assert_allclose(weights.parallel[1], weights.parallel[2], rtol=1e-6)
    x = jnp.array([[2.0]])
    loss = score_aware_loss(x, jnp.array([[1.0]]), Scaling(jnp.array([4.0]), jnp.array([1.0])))
    np.testing.assert_allclose(loss, 4.0, rtol=1e-6)


def test_closed_form_can_be_registered():
    class Square:
        def __call__(self, t):
            return t * t

    before = moments.dispatch(object)(Square(), jnp.ones(1), dim=6)[1]

    @moments.register
    def _(weight: Square, norm, *, dim):
        return 2 * jnp.log(norm), jnp.full_like(norm, 3.0)

    np.testing.assert_allclose(before, eta(Square(), jnp.ones(1), dim=6), rtol=1e-5)
