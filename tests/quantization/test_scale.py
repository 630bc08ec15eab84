"""The score-aware scale around any codec."""

import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite

import avq_jax
from avq_jax.quantization.scale import _levels


def rows_as_words(x, m, k=16):
    """A codebook that costs no learning: the words are those of the first rows."""
    words = jnp.asarray(x[:k]).reshape(k, m, -1).transpose(1, 0, 2)
    return avq_jax.Codebook(words, dim=x.shape[1])


class TestScaledProduct(CodecSuite):
    def make(self, key, x, scaling):
        return avq_jax.fit_scale(rows_as_words(x, 5), x, scaling)


@pytest.mark.full
class TestScaledAdditive(CodecSuite):
    def make(self, key, x, scaling):
        codec, _ = avq_jax.fit_additive(key, x, scaling, num_codebooks=5, num_iterations=3)
        return avq_jax.fit_scale(codec, x, scaling, bits=8)


def learn(n=300, d=8, m=2, r=0, eta=6.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(np.float32)
    scaling = avq_jax.Scaling(np.full(n, eta, np.float32), np.ones(n, np.float32))
    extra = None
    if r:
        terms = rng.normal(size=(n, r, d)), np.abs(rng.normal(size=(n, r)))
        extra = avq_jax.QueryTerms(*(t.astype(np.float32) for t in terms))
    return x, scaling, extra, rows_as_words(x, m)


def test_scale_is_the_formula_of_the_unit_row():
    # eta p / (eta p^2 + o^2), by hand: x = e1, x~ = (0.6, 0.8), eta = 3.
    book = avq_jax.Codebook(jnp.array([[[0.6], [0.0]], [[0.8], [0.0]]]), dim=2)
    x, eta = np.array([[1.0, 0.0]], np.float32), 3.0
    grid = jnp.linspace(0.5, 2.0, 151)
    codec = avq_jax.Scaled(avq_jax.Codebook(book.codewords[:, :1], dim=2), grid)
    scaling = avq_jax.Scaling(np.array([eta], np.float32), np.ones(1, np.float32))
    want = eta * 0.6 / (eta * 0.6**2 + 0.8**2)
    assert float(avq_jax.encode(codec, x, scaling).gain[0]) == pytest.approx(want, abs=0.006)


@pytest.mark.parametrize("r", [0, 2])
def test_each_gain_is_the_best_level_for_its_codes(r):
    x, scaling, extra, book = learn(r=r)
    direction = np.roll(x, 1, axis=1)
    options = {"direction": direction, "extra": extra}
    codec = avq_jax.fit_scale(book, x, scaling, **options)
    codes = avq_jax.encode(codec, x, scaling, **options)
    losses = []
    for level in codec.levels:
        rows = avq_jax.decode(codec, codes._replace(gain=jnp.full(len(x), level)))
        losses.append(avq_jax.score_aware_loss(x, rows, scaling, **options))
    got = avq_jax.score_aware_loss(x, avq_jax.decode(codec, codes), scaling, **options)
    np.testing.assert_allclose(got, np.min(losses, axis=0), rtol=1e-4)


def test_loss_falls_by_the_scale_and_by_alternating():
    x, scaling, _, book = learn()
    codec = avq_jax.fit_scale(book, x, scaling)
    losses = [
        float(avq_jax.score_aware_loss(x, rows, scaling).mean())
        for rows in (
            avq_jax.decode(book, avq_jax.encode(book, x, scaling)),
            *(
                avq_jax.decode(codec, avq_jax.encode(codec, x, scaling, num_alternations=count))
                for count in (0, 1, 3)
            ),
        )
    ]
    assert losses[1] < 0.99 * losses[0]
    assert losses[3] <= losses[2] * (1 + 1e-6) <= losses[1] * (1 + 2e-6)
    assert losses[2] < losses[1]


def test_levels_are_a_lloyd_max_quantizer():
    rng = np.random.default_rng(0)
    square, best = rng.uniform(0.5, 2, 5000), rng.uniform(0.8, 1.2, 5000)
    levels = _levels(square, square * best, 4)
    np.testing.assert_allclose(levels, [0.85, 0.95, 1.05, 1.15], atol=0.01)
    assert levels.dtype == np.float32


def test_levels_of_rows_without_a_scale():
    levels = _levels(np.zeros(3), np.zeros(3), 4)
    assert (np.diff(levels) > 0).all()
    assert (levels > 0).all()


def test_levels_learned_again_serve_the_new_codes():
    x, scaling, _, book = learn()
    codec = avq_jax.Scaled(book, jnp.linspace(0.5, 3.0, 16))
    losses = []
    for _ in range(3):
        rows = avq_jax.decode(codec, avq_jax.encode(codec, x, scaling))
        losses.append(float(avq_jax.score_aware_loss(x, rows, scaling).mean()))
        codec = avq_jax.fit_scale(codec, x, scaling)
    assert losses[2] < losses[1] < losses[0]


def test_zero_rows_are_finite():
    x, scaling, _, book = learn()
    x[3] = 0
    codec = avq_jax.fit_scale(book, x, scaling)
    codes = avq_jax.encode(codec, x, scaling)
    assert bool(jnp.isfinite(codes.gain).all())
    assert bool(jnp.isfinite(avq_jax.decode(codec, codes)).all())


def test_bad_arguments_are_named():
    x, scaling, _, book = learn()
    with pytest.raises(ValueError, match="bits must be at most 8"):
        avq_jax.fit_scale(book, x, scaling, bits=9)
    codec = avq_jax.fit_scale(book, x, scaling)
    with pytest.raises(TypeError, match="no gain and no offset; got Scaled"):
        avq_jax.encode(avq_jax.Scaled(codec, codec.levels), x, scaling)
    with pytest.raises(ValueError, match="Codes with a gain"):
        avq_jax.decode(codec, jnp.zeros((3, 2), jnp.uint8))
