"""The codebook as a function of the weight of the loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import avq_jax
from avq_jax import Codebook, Threshold

N, D, M, K = 80, 6, 3, 4


@pytest.fixture(scope="module")
def problem():
    x = jax.random.normal(jax.random.key(0), (N, D))
    weights = avq_jax.scaling(Threshold(0.6), jnp.linalg.norm(x, axis=1), dim=D)
    state = avq_jax.lloyd_init(
        jax.random.key(1), x, weights, num_subspaces=M, num_codewords=K, num_sweeps=1
    )
    return x, weights, state


def test_solves_the_joint_system(problem):
    """The gradient of the loss in the codewords vanishes, wherever the iteration starts."""
    x, weights, state = problem

    def loss(book):
        return avq_jax.score_aware_loss(x, avq_jax.decode(book, state.codes), weights).mean()

    solved = avq_jax.solve_codebook(state.codebook, x, state.codes, weights)
    slope = jax.jit(jax.grad(loss))
    assert jnp.abs(slope(solved).codewords).max() < 1e-4
    assert jnp.abs(slope(state.codebook).codewords).max() > 1e-2
    assert loss(solved) < loss(state.codebook)


@pytest.mark.full
def test_derivatives_in_the_threshold_and_the_rows(problem):
    x, _, state = problem
    norms = jnp.linalg.norm(x, axis=1)

    @jax.jit
    def value(T, x):
        scaling = avq_jax.scaling(Threshold(T), norms, dim=D)
        book = avq_jax.solve_codebook(state.codebook, x, state.codes, scaling)
        return jnp.sum(jnp.sin(book.codewords))

    args = jnp.float32(0.6), x
    check_grads(value, args, order=1, modes=["fwd", "rev"], atol=3e-2, rtol=3e-2, eps=1e-2)
    assert abs(jax.grad(value)(*args)) > 1e-2


def test_unused_codewords_stay_and_gradients_are_finite(problem):
    """FAULTS 34."""
    x, weights, _ = problem
    book = Codebook(jnp.arange(2.0 * D).reshape(1, 2, D), dim=D)
    x = x.at[0].set(0)

    def words(x, weights):
        codes = jnp.zeros((N, 1), jnp.uint8)
        return avq_jax.solve_codebook(book, x, codes, weights).codewords

    np.testing.assert_array_equal(words(x, weights)[0, 1], book.codewords[0, 1])
    chex.assert_tree_all_finite(jax.grad(lambda *a: words(*a).sum(), (0, 1))(x, weights))


def test_codes_that_do_not_fit(problem):
    x, weights, state = problem
    with pytest.raises(ValueError, match=r"codes must be integers \[80, 3\]; got uint8 \(80, 2\)"):
        avq_jax.solve_codebook(state.codebook, x, state.codes[:, :2], weights)
