"""RaBitQ's codes, their unbiased gain and the bounds of their scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite

import avq_jax
from xla_kernels import adc_scores, pack_codes


class TestRaBitQ(CodecSuite):
    # Of ten signs some random codes are as good.
    dim = 32
    gain_atol = 1e-6

    def make(self, key, x, scaling):
        return avq_jax.rabitq(key, x.shape[1])


@pytest.mark.full
class TestUnbiasedProduct(CodecSuite):
    def make(self, key, x, scaling):
        state, _ = avq_jax.fit(key, x, scaling, num_subspaces=5)
        return avq_jax.Unbiased(state.codebook)


def rows(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def identity_rotation(dim):
    codec = avq_jax.rabitq(jax.random.key(0), dim)
    return avq_jax.Unbiased(avq_jax.Rotated(codec.codec.codec, jnp.eye(dim)))


def test_by_hand():
    # x = (2, -1, 1, 0.5), s = (1, -1, 1, 1): <s, x> = 4.5, ||x||^2 = 6.25, ||x~||^2 = 4 g^2.
    codec, x = identity_rotation(4), np.array([[2, -1, 1, 0.5]], np.float32)
    codes = avq_jax.encode(codec, x)
    g = 6.25 / 4.5
    np.testing.assert_allclose(codes.gain, [g], rtol=1e-6)
    np.testing.assert_allclose(avq_jax.decode(codec, codes), [[g, -g, g, g]], rtol=1e-6)
    p = 4.5 / (2 * 6.25**0.5)
    error = avq_jax.error_norms(codec, codes, x)
    np.testing.assert_allclose(error, [6.25**0.5 * np.sqrt(1 - p**2) / p], rtol=1e-5)
    # RaBitQ's own form: unit row o, unit code o_bar, <o_bar, q> / <o_bar, o> for a query q.
    q = np.array([1, 2, 3, 4], np.float32)
    o, o_bar = x[0] / 2.5, np.array([1, -1, 1, 1]) / 2
    np.testing.assert_allclose(
        avq_jax.decode(codec, codes)[0] @ q, 2.5 * (o_bar @ q) / (o_bar @ o), rtol=1e-5
    )
    width = 2.5 * np.sqrt((1 - p**2) / p**2) * 1.9 / np.sqrt(3) * np.linalg.norm(q)
    np.testing.assert_allclose(avq_jax.score_bounds(error, q), [width], rtol=1e-5)


def test_codes_are_the_signs_of_rotated_rows():
    x, codec = rows(50, 24), avq_jax.rabitq(jax.random.key(3), 24)
    matrix = np.asarray(codec.codec.matrix)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(24), atol=2e-6)
    decoded = np.asarray(avq_jax.decode(codec, avq_jax.encode(codec, x)))
    np.testing.assert_array_equal(np.sign(decoded @ matrix.T), np.sign(x @ matrix.T))
    assert (codec.num_subspaces, codec.num_codewords, codec.bits) == (6, 16, 56)


def test_product_with_the_row_itself_is_exact_and_the_error_across_it():
    x, codec = rows(50, 30), avq_jax.rabitq(jax.random.key(3), 30)
    codes = avq_jax.encode(codec, x)
    decoded = np.asarray(avq_jax.decode(codec, codes), np.float64)
    square = (x.astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose((decoded * x).sum(axis=1), square, rtol=1e-5)
    error = np.sqrt((decoded**2).sum(axis=1) - square)  # Pythagoras
    np.testing.assert_allclose(avq_jax.error_norms(codec, codes, x), error, rtol=1e-4)


def over_rotations(x, queries, count, seed=0):
    """Estimates and bounds `[count, b, n]` (epsilon 1) of independent rotations."""

    @jax.jit
    def one(key):
        codec = avq_jax.rabitq(key, x.shape[1])
        codes = avq_jax.encode(codec, x)
        decoded = avq_jax.decode(codec, codes)
        errors = avq_jax.error_norms(codec, codes, x)
        return queries @ decoded.T, avq_jax.score_bounds(errors, queries, epsilon=1.0)

    return jax.lax.map(one, jax.random.split(jax.random.key(seed), count))


@pytest.fixture(scope="module")
def drawn():
    x, queries = rows(20, 32), rows(6, 32, seed=1)
    # Rows that a fixed code would treat unevenly: one coordinate dominates.
    x[:, 0] *= 5
    estimates, bounds = over_rotations(x, queries, 2000)
    return x, queries, np.asarray(estimates, np.float64), np.asarray(bounds)


def test_unbiased_over_rotations(drawn):
    x, queries, estimates, _ = drawn
    gap = estimates.mean(axis=0) - queries.astype(np.float64) @ x.T
    standard = estimates.std(axis=0) / np.sqrt(len(estimates))
    z = gap / standard
    assert np.abs(z).max() < 4.5  # of 120 means
    assert 0.8 < np.sqrt((z**2).mean()) < 1.2
    # The test can see a bias: the least squares gain shrinks scores by <x, x~> / ||x~||^2.
    least_squares = estimates.mean(axis=0) * 2 / np.pi
    assert np.abs((least_squares - queries @ x.T) / standard).max() > 20


def test_coverage_is_that_of_a_coordinate_of_a_random_unit_vector(drawn):
    x, queries, estimates, bounds = drawn
    exact = queries.astype(np.float64) @ x.T
    ratio = np.abs(estimates - exact) / bounds
    inside = {e: (ratio <= e).mean() for e in (0.3, 1.0, 1.9, 3.0, 4.5)}
    # sin(q, x) is below 1: coverage a little above the normal 0.236, 0.683, 0.943, 0.997.
    assert 0.23 < inside[0.3] < 0.28
    assert 0.68 < inside[1.0] < 0.73
    assert 0.94 < inside[1.9] < 0.97
    assert inside[3.0] > 0.995
    assert inside[4.5] == 1.0
    # With the part of the query across the row in place of all of it, the variance is exact.
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = queries @ unit.T / np.linalg.norm(queries, axis=1, keepdims=True)
    across = np.sqrt(1 - cosine**2)
    error = (estimates - exact) / (bounds * across)
    assert np.sqrt((error**2).mean()) == pytest.approx(1, abs=0.02)


def test_bounds_of_one_rotation_over_many_rows():
    x, queries = rows(4000, 64), rows(20, 64, seed=1)
    codec = avq_jax.rabitq(jax.random.key(5), 64)
    codes = avq_jax.encode(codec, x)
    estimates = avq_jax.lookup_table(codec, queries)
    packed = pack_codes(codes.codes, num_codewords=16)
    estimates = np.asarray(adc_scores(estimates, packed, gain=codes.gain))
    errors = avq_jax.error_norms(codec, codes, x)
    gap = np.abs(estimates - queries @ x.T)
    inside = {e: (gap <= avq_jax.score_bounds(errors, queries, epsilon=e)).mean() for e in (0.3, 3)}
    assert inside[0.3] < 0.3
    assert inside[3] > 0.99


def test_bounds_hold_for_another_codec_behind_the_rotation():
    x, queries = rows(3000, 32), rows(10, 32, seed=1)
    matrix = avq_jax.rotation(jax.random.key(2), x, method="random")
    words = jnp.linspace(-2, 2, 4)[None, :, None]
    book = avq_jax.Codebook(jnp.broadcast_to(words, (32, 4, 1)), dim=32)
    codec = avq_jax.Unbiased(avq_jax.Rotated(book, matrix))
    codes = avq_jax.encode(codec, x)
    errors = avq_jax.error_norms(codec, codes, x)
    gap = np.abs(queries @ avq_jax.decode(codec, codes).T - queries @ x.T)
    inside = {
        e: (gap <= avq_jax.score_bounds(errors, queries, epsilon=e)).mean() for e in (0.3, 1.9)
    }
    assert inside[0.3] < 0.3
    assert inside[1.9] > 0.93
    signs = avq_jax.rabitq(jax.random.key(2), 32)
    assert errors.mean() < 0.6 * avq_jax.error_norms(signs, avq_jax.encode(signs, x), x).mean()


def test_zero_tiny_and_huge_rows():
    x = rows(40, 8)
    x[0] = 0
    x[1] *= 1e-20
    x[2] *= 1e13
    codec = avq_jax.rabitq(jax.random.key(0), 8)
    codes = avq_jax.encode(codec, x)
    decoded = np.asarray(avq_jax.decode(codec, codes), np.float64)
    assert codes.gain[0] == 0
    np.testing.assert_array_equal(decoded[0], 0)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(
        (decoded * exact)[1:].sum(axis=1), (exact[1:] ** 2).sum(axis=1), 1e-4
    )
    errors = avq_jax.error_norms(codec, codes, x)
    np.testing.assert_allclose(errors, np.linalg.norm(exact - decoded, axis=1), rtol=1e-3)


def test_one_dimension_is_exact():
    x = rows(10, 1)
    codec = avq_jax.rabitq(jax.random.key(0), 1)
    codes = avq_jax.encode(codec, x)
    np.testing.assert_allclose(avq_jax.decode(codec, codes), x, rtol=1e-6)
    errors = avq_jax.error_norms(codec, codes, x)
    np.testing.assert_allclose(avq_jax.score_bounds(errors, x[0]), 0, atol=1e-6)


def test_no_scaling_changes_codes_or_gain():
    x = rows(60, 12)
    scaling = avq_jax.Scaling(np.full(60, 50, np.float32), np.ones(60, np.float32))
    codec = avq_jax.rabitq(jax.random.key(0), 12)
    plain = avq_jax.encode(codec, x)
    for options in ({}, {"direction": np.roll(x, 1, axis=1)}):
        codes = avq_jax.encode(codec, x, scaling, **options)
        jax.tree.map(np.testing.assert_array_equal, codes, plain)


def test_signs_have_the_least_loss_under_the_gain_for_every_scaling():
    x, codec = rows(5, 6), identity_rotation(6)
    signs = 2.0 * ((np.arange(64)[:, None] >> np.arange(6)) & 1) - 1
    along = x @ signs.T
    gain = np.where(along > 0, (x * x).sum(axis=1, keepdims=True) / along, 0)
    all_rows = gain[..., None] * signs
    decoded = avq_jax.decode(codec, avq_jax.encode(codec, x))
    for eta in (1, 5, 50):
        scaling = avq_jax.Scaling(np.full(5, eta, np.float32), np.ones(5, np.float32))
        losses = np.stack(
            [
                avq_jax.score_aware_loss(x, all_rows[:, j].astype(np.float32), scaling)
                for j in range(64)
            ]
        )
        # Without a gain the loss of a row is eta ||x||^2: no code at all.
        losses[(gain == 0).T] = np.inf
        got = avq_jax.score_aware_loss(x, decoded, scaling)
        np.testing.assert_allclose(got, losses.min(axis=0), rtol=1e-4)


def test_bounds_of_one_query_and_of_a_batch_and_in_jit():
    errors, queries = jnp.array([0.5, 2.0]), jnp.asarray(rows(3, 5))
    batch = avq_jax.score_bounds(errors, queries, epsilon=3)
    assert batch.shape == (3, 2)
    np.testing.assert_allclose(avq_jax.score_bounds(errors, queries[1], epsilon=3), batch[1])
    compiled = jax.jit(lambda e, q, s: avq_jax.score_bounds(e, q, epsilon=s))
    np.testing.assert_allclose(compiled(errors, queries, 3.0), batch, rtol=1e-6)
    broken = queries.at[0, 0].set(jnp.nan)
    assert bool(jnp.isnan(avq_jax.score_bounds(errors, broken)[0]).all())
    assert bool(jnp.isfinite(avq_jax.score_bounds(errors, broken)[1:]).all())


def test_bad_arguments_are_named():
    x = rows(10, 4)
    with pytest.raises(ValueError, match="dim must be at least 1"):
        avq_jax.rabitq(jax.random.key(0), 0)
    codec = avq_jax.rabitq(jax.random.key(0), 4)
    codes = avq_jax.encode(codec, x)
    with pytest.raises(ValueError, match="x must be the rows of the codes, \\(10, 4\\)"):
        avq_jax.error_norms(codec, codes, x[1:])
    with pytest.raises(ValueError, match="x must be finite"):
        avq_jax.error_norms(codec, codes, x * np.nan)
    with pytest.raises(ValueError, match="errors must be"):
        avq_jax.score_bounds(x, x)
    with pytest.raises(ValueError, match="queries must be"):
        avq_jax.score_bounds(x[0], x[None])
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        avq_jax.score_bounds(x[0], x, epsilon=-1.0)
    with pytest.raises(ValueError, match="Codes with a gain"):
        avq_jax.decode(codec, codes.codes)
    with pytest.raises(TypeError, match="no gain and no offset; got Unbiased"):
        avq_jax.encode(avq_jax.Unbiased(codec), x)
