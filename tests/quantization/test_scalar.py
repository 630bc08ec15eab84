"""Scalar quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite

import avq_jax
from xla_kernels import adc_scores, pack_codes


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


class TestTernary(CodecSuite):
    def make(self, key, x, scaling):
        return avq_jax.fit_scalar(key, x, scaling, num_levels=3)


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


def test_ternary_codes_are_thresholds_of_each_coordinate():
    x, _ = rows(d=15)  # an odd width: the last code has one coordinate
    codec = avq_jax.fit_scalar(jax.random.key(0), x, num_levels=3)
    codes = avq_jax.encode(codec, x)
    decoded, gain = np.asarray(avq_jax.decode(codec, codes)), np.asarray(codes.gain)[:, None]
    sure = np.abs(np.abs(x) - gain / 2) > 1e-5
    np.testing.assert_allclose(
        decoded[sure], (np.sign(x) * gain * (np.abs(x) > gain / 2))[sure], rtol=1e-6
    )
    assert set(np.unique(np.sign(decoded))) == {-1, 0, 1}


def test_ternary_error_of_normal_rows_is_that_of_the_best_quantizer():
    # Lloyd-Max of three levels on a normal variable leaves 0.1902 of its variance (Max, 1960); a
    # scale of its own fits a row a little better.
    x, _ = rows(n=400, d=128)
    codec = avq_jax.fit_scalar(jax.random.key(0), x, num_levels=3)
    error = np.mean((avq_jax.decode(codec, avq_jax.encode(codec, x)) - x) ** 2)
    assert 0.97 * 0.1902 < error < 0.1902
    assert codec.bits == pytest.approx(128 * np.log2(3) + 8)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"num_levels": 2}, (4, 16)),
        ({"num_levels": 3}, (8, 9)),
        ({"bits": 2}, (8, 16)),
        ({"num_levels": 5}, (16, 5)),
        ({"bits": 8}, (16, 256)),
        ({}, (16, 16)),
    ],
)
def test_coordinates_share_a_code_of_four_bits(options, shape):
    x, _ = rows(n=20)
    codec = avq_jax.fit_scalar(jax.random.key(0), x, num_iterations=1, **options)
    assert (codec.num_subspaces, codec.num_codewords) == shape


def test_ternary_codes_are_scanned_by_the_kernels():
    x, scaling = rows(n=300)
    codec = avq_jax.fit_scalar(jax.random.key(0), x, scaling, num_levels=3)
    codes = avq_jax.encode(codec, x, scaling)
    packed = pack_codes(codes.codes, num_codewords=codec.num_codewords)
    tables = avq_jax.lookup_table(codec, x[:5])
    scores = adc_scores(tables, packed, gain=codes.gain)
    np.testing.assert_allclose(scores, x[:5] @ avq_jax.decode(codec, codes).T, rtol=1e-4, atol=1e-4)


def test_zero_rows_and_huge_and_tiny_ones_are_finite():
    x, _ = rows(n=60)
    x[:2] = 0
    for size in (1e-8, 1.0, 1e8):
        codec = avq_jax.fit_scalar(jax.random.key(0), x * np.float32(size), num_levels=3)
        codes = avq_jax.encode(codec, x * np.float32(size))
        decoded = np.asarray(avq_jax.decode(codec, codes))
        assert np.isfinite(decoded).all()
        np.testing.assert_array_equal(decoded[:2], 0)
        assert np.mean((decoded / size - x) ** 2) < 0.25


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
    with pytest.raises(ValueError, match="bits must be None where num_levels is given"):
        avq_jax.fit_scalar(jax.random.key(0), x, bits=2, num_levels=3)
    with pytest.raises(ValueError, match="num_levels must be at least 2"):
        avq_jax.fit_scalar(jax.random.key(0), x, num_levels=1)
    with pytest.raises(ValueError, match="num_levels must be at most 256"):
        avq_jax.fit_scalar(jax.random.key(0), x, num_levels=257)
    with pytest.raises(ValueError, match="x must be finite"):
        avq_jax.fit_scalar(jax.random.key(0), x * jnp.nan)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 6, 7, 9, 10])
@pytest.mark.parametrize("levels", [2, 3])
def test_any_width(dim, levels):
    """Fewer columns than the coordinates of a code, and those that do not divide by them."""
    x = np.random.default_rng(dim).standard_normal((60, dim)).astype(np.float32)
    codec = avq_jax.fit_scalar(jax.random.key(0), x, num_levels=levels)
    codes = avq_jax.encode(codec, x)
    rows = np.asarray(avq_jax.decode(codec, codes))
    assert rows.shape == x.shape
    table = np.asarray(avq_jax.lookup_table(codec, x[0]))
    sums = np.take_along_axis(table, np.asarray(codes.codes).T.astype(int), axis=1).sum(axis=0)
    np.testing.assert_allclose(sums * np.asarray(codes.gain), rows @ x[0], rtol=1e-4, atol=1e-5)
    # Nothing is nearer than the sign, or the nearest of three levels, of each coordinate.
    scaled = x / np.asarray(codes.gain)[:, None]
    nearest = np.where(scaled >= 0, 1, -1) if levels == 2 else np.clip(np.rint(scaled), -1, 1)
    best = np.asarray(codes.gain)[:, None] * nearest
    loss = ((x - rows) ** 2).sum(axis=1)
    np.testing.assert_allclose(loss, ((x - best) ** 2).sum(axis=1), rtol=1e-4, atol=1e-6)
