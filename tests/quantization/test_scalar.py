"""Scalar quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite

import avq_jax


@pytest.mark.full
class TestScalar(CodecSuite):
    def make(self, key, x, scaling):
        return avq_jax.fit_scalar(key, x, scaling, bits=4)


@pytest.mark.full
class TestRotatedSigns(CodecSuite):
    # The gain multiplies before the rotation adds up, so small numbers round at the size of large.
    gain_atol = 1e-6

    def make(self, key, x, scaling):
        return avq_jax.fit_scalar(key, x, scaling, bits=1, rotate=True)


def rows(n=200, d=16, eta=5.0):
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    return x, avq_jax.Scaling(np.full(n, eta, np.float32), np.ones(n, np.float32))


def loss(codec, x, scaling):
    decoded = avq_jax.decode(codec, avq_jax.encode(codec, x, scaling))
    return float(avq_jax.score_aware_loss(x, decoded, scaling).mean())


def rounded(x, bits):
    """Each coordinate at the nearest of 2^bits values between plus and minus the largest."""
    top = np.abs(x).max(axis=1, keepdims=True)
    steps = 2**bits - 1
    return (2 * np.round((x / top + 1) / 2 * steps) / steps - 1) * top


def test_four_bits_beat_rounding_to_the_interval_of_each_row():
    x, scaling = rows()
    codec = avq_jax.fit_scalar(jax.random.key(0), x, scaling, bits=4)
    plain = float(avq_jax.score_aware_loss(x, rounded(x, 4), scaling).mean())
    assert loss(codec, x, scaling) < 0.9 * plain
    assert (codec.num_subspaces, codec.num_codewords, codec.bits) == (16, 16, 72)
    words = np.asarray(codec.codec.codewords)
    np.testing.assert_allclose(words, -words[:, ::-1], atol=1e-6)


def test_one_bit_is_signs_with_the_score_aware_scale():
    x, scaling = rows(eta=1.0)
    codec = avq_jax.fit_scalar(jax.random.key(0), x, scaling, bits=1)
    codes = avq_jax.encode(codec, x, scaling)
    decoded = np.asarray(avq_jax.decode(codec, codes))
    np.testing.assert_array_equal(np.sign(decoded), np.sign(x))
    np.testing.assert_allclose(codes.gain, np.abs(x).mean(axis=1), rtol=0.02, atol=0.02)
    assert codec.bits == 16 + 8


def test_rotation_keeps_scores():
    x, scaling = rows()
    codec = avq_jax.fit_scalar(jax.random.key(0), x, scaling, bits=1, rotate=True)
    codes = avq_jax.encode(codec, x, scaling)
    table = np.asarray(avq_jax.lookup_table(codec, x[0]))
    picked = table[np.arange(4), np.asarray(codes.codes)].sum(axis=1) * np.asarray(codes.gain)
    np.testing.assert_allclose(picked, avq_jax.decode(codec, codes) @ x[0], rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named():
    x, scaling = rows()
    with pytest.raises(ValueError, match="bits must be at most 8"):
        avq_jax.fit_scalar(jax.random.key(0), x, scaling, bits=9)
    with pytest.raises(ValueError, match="x must be finite"):
        avq_jax.fit_scalar(jax.random.key(0), x * jnp.nan)
