"""Rotations before a codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite

import avq_jax


@pytest.mark.full
class TestRotated(CodecSuite):
    def make(self, key, x, scaling):
        matrix = avq_jax.rotation(key, x, num_subspaces=5)
        state, _ = avq_jax.fit(key, x @ matrix.T, scaling, num_subspaces=5)
        return avq_jax.Rotated(state.codebook, matrix)


def correlated(n=600, d=12, seed=0):
    rng = np.random.default_rng(seed)
    spread = np.geomspace(8, 0.05, d)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (rng.normal(size=(n, d)) * spread @ turn + 3).astype(np.float32)


def words_of(x, m=4, k=16):
    """A codebook that costs no learning: the words are those of the first rows."""
    return avq_jax.Codebook(jnp.asarray(x[:k]).reshape(k, m, -1).transpose(1, 0, 2), dim=12)


@pytest.mark.parametrize("method", ["pca", "random"])
@pytest.mark.parametrize("m", [1, 4, 5, 12])
def test_matrices_are_orthogonal(method, m):
    matrix = avq_jax.rotation(jax.random.key(1), correlated(), num_subspaces=m, method=method)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(12), atol=2e-6)


def test_principal_axes_are_dealt_evenly():
    x = correlated()
    matrix = np.asarray(avq_jax.rotation(jax.random.key(1), x, num_subspaces=4))
    covariance = np.cov((x @ matrix.T).T)
    spread = np.diagonal(covariance)
    np.testing.assert_allclose(covariance, np.diag(spread), atol=1e-3 * spread.max())
    shares = np.log(spread).reshape(4, 3).sum(axis=1)
    assert np.ptp(shares) < 0.3 * np.ptp(np.log(spread))


@pytest.mark.full
def test_correlated_rows_lose_less_when_rotated():
    x = correlated()
    scaling = avq_jax.Scaling(np.full(600, 4, np.float32), np.ones(600, np.float32))
    matrix = avq_jax.rotation(jax.random.key(0), x, num_subspaces=4)
    losses = []
    for turn in (jnp.eye(12), matrix):
        state, _ = avq_jax.fit(jax.random.key(1), x @ turn.T, scaling, num_subspaces=4)
        codec = avq_jax.Rotated(state.codebook, turn)
        rows = avq_jax.decode(codec, avq_jax.encode(codec, x, scaling))
        losses.append(float(avq_jax.score_aware_loss(x, rows, scaling).mean()))
    assert losses[1] < 0.7 * losses[0]


def test_directions_and_extra_terms_turn_along():
    x = correlated(n=80)
    rng = np.random.default_rng(1)
    scaling = avq_jax.Scaling(np.full(80, 9, np.float32), np.ones(80, np.float32))
    direction = rng.normal(size=x.shape).astype(np.float32)
    extra = avq_jax.QueryTerms(
        rng.normal(size=(80, 2, 12)).astype(np.float32), np.full((80, 2), 5, np.float32)
    )
    matrix = avq_jax.rotation(jax.random.key(2), x, method="random")
    book = words_of(x @ matrix.T)
    codes = avq_jax.encode(
        avq_jax.Rotated(book, matrix), x, scaling, direction=direction, extra=extra
    )
    turned = avq_jax.QueryTerms(extra.directions @ matrix.T, extra.weights)
    want = avq_jax.encode(book, x @ matrix.T, scaling, direction=direction @ matrix.T, extra=turned)
    assert (np.asarray(codes.codes) == want.codes).mean() > 0.99


def test_composes_with_a_scale():
    x = correlated()
    matrix = avq_jax.rotation(jax.random.key(0), x, num_subspaces=4)
    codec = avq_jax.fit_scale(avq_jax.Rotated(words_of(x @ matrix.T), matrix), x)
    codes = avq_jax.encode(codec, x)
    q = x[0]
    table = np.asarray(avq_jax.lookup_table(codec, q))
    scores = np.asarray(codes.gain) * table[np.arange(4), np.asarray(codes.codes)].sum(axis=1)
    np.testing.assert_allclose(scores, avq_jax.decode(codec, codes) @ q, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_subspaces": 13}, "num_subspaces must be at most the width of x, 12"),
        ({"num_subspaces": 0}, "num_subspaces must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        avq_jax.rotation(jax.random.key(0), correlated(), **options)
