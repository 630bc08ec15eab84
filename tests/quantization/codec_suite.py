"""What every codec keeps: inherit :class:`CodecSuite` and give a factory.

class TestMyCodec(CodecSuite):
    def make(self, key, x, scaling):
        return fit_mine(key, x, scaling, ...)[0]
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.evaluation.datasets import clustered


class CodecSuite:
    """Tests of the seam "codes + table"; `make` is the only thing a codec has to give."""

    n, dim = 200, 10
    gain_atol = 1e-7

    def make(self, key, x, scaling):
        """Learn a codec of rows `x[n, dim]`."""
        raise NotImplementedError

    # A learned codec is costly: one for all tests of a class.
    @pytest.fixture(scope="class")
    def learned(self):
        x = clustered(jax.random.key(0), self.n, self.dim, norm_spread=0.3)
        norms = jnp.linalg.norm(x, axis=1)
        scaling = avq_jax.scaling(avq_jax.Threshold(0.4), norms, dim=self.dim)
        codec = self.make(jax.random.key(1), x, scaling)
        return codec, x, scaling, avq_jax.encode(codec, x, scaling)

    def table(self, codec):
        return avq_jax.lookup_table(codec, jnp.zeros(self.dim))

    def test_codes_are_bytes_below_the_number_of_codewords(self, learned):
        codec, _, _, codes = learned
        m, k = self.table(codec).shape
        assert codes.codes.dtype == jnp.uint8
        assert codes.codes.shape == (self.n, m)
        assert int(codes.codes.max()) < k
        for part in (codes.gain, codes.offset):
            assert part is None or (part.shape == (self.n,) and part.dtype == jnp.float32)

    def test_decode_gives_float32_rows(self, learned):
        codec, _, _, codes = learned
        rows = avq_jax.decode(codec, codes)
        assert rows.shape == (self.n, self.dim)
        assert rows.dtype == jnp.float32
        assert bool(jnp.isfinite(rows).all())

    def test_table_scores_equal_products_with_decoded_rows(self, learned):
        codec, _, _, codes = learned
        queries = jax.random.normal(jax.random.key(2), (3, self.dim))
        tables = avq_jax.lookup_table(codec, queries)
        assert tables.dtype == jnp.float32
        single = avq_jax.lookup_table(codec, queries[1])
        np.testing.assert_allclose(tables[1], single, rtol=1e-5, atol=1e-5)
        exact = np.asarray(queries, np.float64) @ np.asarray(avq_jax.decode(codec, codes)).T
        for table, expected in zip(tables, exact, strict=True):
            np.testing.assert_allclose(
                self.scores(table, codes), expected, rtol=1e-5, atol=1e-5 * np.abs(exact).max()
            )

    def scores(self, table, codes):
        """Score codes as the kernels do."""
        picked = np.asarray(table)[np.arange(table.shape[0]), np.asarray(codes.codes)]
        scores = picked.sum(axis=1)
        if codes.gain is not None:
            scores = scores * np.asarray(codes.gain)
        return scores if codes.offset is None else scores + np.asarray(codes.offset)

    def test_encoding_beats_random_codes(self, learned):
        codec, x, scaling, codes = learned
        k = self.table(codec).shape[1]
        draws = jax.random.randint(jax.random.key(3), codes.codes.shape, 0, k).astype(jnp.uint8)
        best, drawn = (
            avq_jax.score_aware_loss(x, avq_jax.decode(codec, c), scaling)
            for c in (codes, codes._replace(codes=draws))
        )
        assert float(jnp.mean(best <= drawn * (1 + 1e-5))) > 0.98
        assert float(best.mean()) < 0.5 * float(drawn.mean())

    def test_encoding_again_gives_the_same_codes(self, learned):
        codec, x, scaling, codes = learned
        again = avq_jax.encode(codec, x, scaling)
        jax.tree.map(np.testing.assert_array_equal, again, codes)

    def test_a_row_is_encoded_alone(self, learned):
        codec, x, scaling, codes = learned
        some = slice(17, 40)
        part = avq_jax.encode(codec, x[some], jax.tree.map(lambda v: v[some], scaling))
        np.testing.assert_array_equal(part.codes, codes.codes[some])

    def test_gain_multiplies_the_decoded_rows(self, learned):
        codec, _, _, codes = learned
        one = jnp.ones(self.n)
        gain = codes.gain if codes.gain is not None else one
        plain = avq_jax.decode(codec, codes._replace(gain=one))
        doubled = avq_jax.decode(codec, codes._replace(gain=2 * gain))
        np.testing.assert_allclose(
            doubled, plain * (2 * gain)[:, None], rtol=1e-6, atol=self.gain_atol
        )

    def test_jit(self, learned):
        codec, x, scaling, codes = learned
        q = x[0]
        inside = jax.jit(avq_jax.encode)(codec, x, scaling)
        np.testing.assert_array_equal(inside.codes, codes.codes)
        np.testing.assert_allclose(
            jax.jit(avq_jax.decode)(codec, codes), avq_jax.decode(codec, codes), rtol=1e-6
        )
        np.testing.assert_allclose(
            jax.jit(avq_jax.lookup_table)(codec, q),
            avq_jax.lookup_table(codec, q),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_vmap_over_groups_of_rows(self, learned):
        codec, x, scaling, codes = learned
        groups = jax.tree.map(lambda v: v.reshape(2, self.n // 2, *v.shape[1:]), (x, scaling))
        mapped = jax.vmap(lambda x, s: avq_jax.encode(codec, x, s).codes)(*groups)
        np.testing.assert_array_equal(mapped.reshape(codes.codes.shape), codes.codes)

    def test_vmap_over_queries(self, learned):
        codec, x, _, _ = learned
        mapped = jax.vmap(lambda q: avq_jax.lookup_table(codec, q))(x[:4])
        np.testing.assert_allclose(mapped, avq_jax.lookup_table(codec, x[:4]), rtol=1e-5, atol=1e-6)

    def test_codec_is_a_pytree(self, learned):
        codec, _, _, codes = learned
        leaves, tree = jax.tree.flatten(codec)
        back = jax.tree.unflatten(tree, leaves)
        assert type(back) is type(codec)
        np.testing.assert_array_equal(avq_jax.decode(back, codes), avq_jax.decode(codec, codes))
        assert jax.tree.structure(jax.tree.map(lambda v: None, codec)) is not None

    def test_lists_and_other_types_of_rows(self, learned):
        codec, x, scaling, codes = learned
        for other in (np.asarray(x, np.float64), np.asfortranarray(x), np.asarray(x).tolist()):
            np.testing.assert_array_equal(avq_jax.encode(codec, other, scaling).codes, codes.codes)

    def test_errors_name_the_argument(self, learned):
        codec, x, scaling, _ = learned
        with pytest.raises((ValueError, TypeError), match="x must have the width"):
            avq_jax.encode(codec, x[:, 1:], scaling)
        with pytest.raises(ValueError, match="x must be finite: 1 of"):
            avq_jax.encode(codec, x.at[3, 1].set(jnp.nan), scaling)
        with pytest.raises((ValueError, TypeError), match="q "):
            avq_jax.lookup_table(codec, jnp.zeros(self.dim + 1))

    def test_gradients_of_decode_and_table_with_respect_to_the_codec(self, learned):
        codec, x, _, codes = learned
        q = x[0]

        def through_rows(codec):
            return jnp.sum(avq_jax.decode(codec, codes) @ q)

        grads = jax.grad(through_rows, allow_int=True)(codec)
        step = jax.tree.map(
            lambda v: (
                jax.random.normal(jax.random.key(5), v.shape)
                if jnp.issubdtype(v.dtype, jnp.floating)
                else v
            ),
            codec,
        )
        eps = 1e-2

        def moved(sign):
            return jax.tree.map(
                lambda v, s: v + sign * eps * s if jnp.issubdtype(v.dtype, jnp.floating) else v,
                codec,
                step,
            )

        numeric = (through_rows(moved(1.0)) - through_rows(moved(-1.0))) / (2 * eps)
        exact = sum(
            float(jnp.vdot(g, s))
            for g, s in zip(jax.tree.leaves(grads), jax.tree.leaves(step), strict=True)
            if jnp.issubdtype(s.dtype, jnp.floating)
        )
        assert exact == pytest.approx(float(numeric), rel=2e-2, abs=1e-2)
