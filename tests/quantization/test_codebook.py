"""The product codebook as a codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite
from jax.test_util import check_grads

import avq_jax
from avq_jax.quantization import codebook as codebook_module


class TestProduct(CodecSuite):
    def make(self, key, x, scaling):
        return avq_jax.fit(key, x, scaling, num_subspaces=5, num_codewords=16)[0].codebook


@pytest.mark.full
class TestVector(CodecSuite):
    def make(self, key, x, scaling):
        return avq_jax.fit(key, x, scaling, num_subspaces=1, num_codewords=40)[0].codebook


@pytest.mark.full
class TestPadded(CodecSuite):
    def make(self, key, x, scaling):
        return avq_jax.fit(key, x, scaling, num_subspaces=4, num_codewords=3)[0].codebook


def example(m=3, k=5, dim=7):
    width = -(-dim // m)
    words = jax.random.normal(jax.random.key(0), (m, k, width))
    return avq_jax.Codebook(words, dim=dim)


def test_codes_beyond_the_codebook_are_clamped():
    book = example()
    last = avq_jax.decode(book, np.full((1, 3), 4, np.uint8))
    np.testing.assert_array_equal(avq_jax.decode(book, np.full((1, 3), 200, np.uint8)), last)


@pytest.mark.parametrize("codes", [np.zeros((2, 4), np.uint8), np.zeros(3, np.uint8)])
def test_codes_of_another_shape_raise(codes):
    with pytest.raises(ValueError, match=r"codes must be integers \[n, 3\]"):
        avq_jax.decode(example(), codes)


def test_float_codes_raise():
    with pytest.raises(ValueError, match="codes must be integers"):
        avq_jax.decode(example(), np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("function", ["encode", "decode", "lookup_table"])
def test_unknown_codec(function):
    with pytest.raises(TypeError, match="codec must be one of Codebook"):
        getattr(avq_jax, function)(object(), np.zeros((1, 3), np.float32))


def test_sizes():
    book = example(m=3, k=4)
    assert (book.num_subspaces, book.num_codewords, book.bits) == (3, 4, 6.0)


@pytest.mark.full
def test_many_rows_in_chunks_equal_one_call(monkeypatch):
    x = np.asarray(jax.random.normal(jax.random.key(1), (150, 7)))
    extra = avq_jax.QueryTerms(
        jax.random.normal(jax.random.key(2), (150, 2, 7)), jnp.ones((150, 2))
    )
    scaling = avq_jax.Scaling(jnp.linspace(1, 6, 150), jnp.ones(150))
    options = {"direction": x[::-1].copy(), "extra": extra}
    whole = avq_jax.encode(example(), x, scaling, **options)
    monkeypatch.setattr(codebook_module, "_CHUNK", 64)
    parts = avq_jax.encode(example(), x, scaling, **options)
    np.testing.assert_array_equal(parts.codes, whole.codes)


def test_table_gradient_with_respect_to_query_and_codewords():
    book, q = example(), jax.random.normal(jax.random.key(3), (7,))
    weights = jax.random.normal(jax.random.key(4), (3, 5))

    def f(words, q):
        return jnp.sum(weights * avq_jax.lookup_table(avq_jax.Codebook(words, dim=7), q))

    check_grads(f, (book.codewords, q), order=1, modes=["fwd", "rev"], rtol=2e-2)


def test_codes_of_equal_shape_are_encoded_by_one_trace():
    x = jax.random.normal(jax.random.key(5), (33, 7))
    cached = codebook_module._jit_encode._cache_size
    avq_jax.encode(example(), x, avq_jax.Scaling(jnp.full(33, 2.0), jnp.ones(33)))
    before = cached()
    for t in (0.1, 0.4, 0.9):
        norms = jnp.linalg.norm(x, axis=1)
        avq_jax.encode(example(), x + t, avq_jax.scaling(avq_jax.Threshold(t), norms, dim=7))
    assert cached() == before


def test_rows_without_weight_take_the_nearest_codewords():
    book, x = example(), jax.random.normal(jax.random.key(6), (50, 7))
    zero = avq_jax.Scaling(jnp.zeros(50), jnp.zeros(50))
    np.testing.assert_array_equal(
        avq_jax.encode(book, x, zero).codes, avq_jax.encode(book, x).codes
    )


def test_shard_map_over_eight_devices():
    n = 256
    book, x = example(m=3, k=49, dim=7), jax.random.normal(jax.random.key(7), (n, 7))
    scaling = avq_jax.Scaling(jnp.full(n, 5.0), jnp.ones(n))
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("rows")

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    def sharded(x, scaling):
        return avq_jax.encode(book, x, scaling).codes

    np.testing.assert_array_equal(sharded(x, scaling), avq_jax.encode(book, x, scaling).codes)
