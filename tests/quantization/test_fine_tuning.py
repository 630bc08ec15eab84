"""Fine-tuning of codewords for the order of the best rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avq_jax
from avq_jax.quantization.fine_tuning import _join, _list_loss
from avq_jax.quantization.ranking import nearest_rows

QUIET = {"progress": False, "num_rounds": 3, "num_steps": 40, "batch_size": 64}


def draw(n, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 12)) * np.geomspace(3, 0.3, 12) + 0.5).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    return draw(600, 0), draw(300, 1)


def codecs(x):
    """A codec of each kind, hardly learned, so that there is something to gain."""
    words = jnp.asarray(x[:8]).reshape(8, 4, 3).transpose(1, 0, 2)
    product = avq_jax.Codebook(words, dim=12)
    additive, _ = avq_jax.fit_additive(
        jax.random.key(0), x, num_codebooks=4, num_codewords=8, num_iterations=1, progress=False
    )
    turn = avq_jax.rotation(jax.random.key(1), x, method="random")
    return {"product": product, "additive": additive, "rotated": avq_jax.Rotated(product, turn)}


@pytest.fixture(scope="module")
def learned(rows):
    return codecs(rows[0])


def own_loss(codec, x, queries, tau):
    """The ranking loss in float64, from its definition."""
    decoded = np.asarray(avq_jax.decode(codec, avq_jax.encode(codec, x)), np.float64)
    q = queries / np.linalg.norm(queries, axis=1, keepdims=True)

    def logs(rows):
        scores = q.astype(np.float64) @ rows.T / tau
        scores -= scores.max(axis=1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    p, other = logs(x.astype(np.float64)), logs(decoded)
    return (np.exp(p) * (p - other)).sum(axis=1).mean()


class TestRankingLoss:
    @pytest.mark.parametrize("tau", [0.05, 0.5, 20.0])
    def test_is_the_divergence_of_its_definition(self, rows, learned, tau):
        x, queries = rows
        codec = learned["product"]
        got = avq_jax.ranking_loss(codec, avq_jax.encode(codec, x), x, queries, temperature=tau)
        np.testing.assert_allclose(got, own_loss(codec, x, queries, tau), rtol=1e-3, atol=1e-6)

    def test_norms_of_queries_change_nothing(self, rows, learned):
        x, queries = rows
        codec = learned["product"]
        codes = avq_jax.encode(codec, x)
        one, two = (
            avq_jax.ranking_loss(codec, codes, x, q, temperature=0.3)
            for q in (queries, 7 * queries)
        )
        np.testing.assert_allclose(one, two, rtol=1e-4)

    def test_queries_in_blocks_and_padding(self, rows, learned, monkeypatch):
        from avq_jax.quantization import ranking

        x, queries = rows
        codec = learned["product"]
        codes = avq_jax.encode(codec, x)
        whole = avq_jax.ranking_loss(codec, codes, x, queries[:101], temperature=0.3)
        monkeypatch.setattr(ranking, "_SCORES", 600 * 7)
        ranking.mean_divergence.clear_cache()
        parts = avq_jax.ranking_loss(codec, codes, x, queries[:101], temperature=0.3)
        ranking.mean_divergence.clear_cache()
        np.testing.assert_allclose(parts, whole, rtol=1e-5)

    def test_sizes_that_do_not_fit_are_named(self, rows, learned):
        x, queries = rows
        codec = learned["product"]
        codes = avq_jax.encode(codec, x)
        with pytest.raises(ValueError, match="queries must be as wide as x, 12"):
            avq_jax.ranking_loss(codec, codes, x, queries[:, 1:], temperature=1.0)
        with pytest.raises(ValueError, match="codes must be those of x"):
            avq_jax.ranking_loss(codec, codes, x[1:], queries, temperature=1.0)


class TestCandidates:
    def test_true_neighbours_come_first_and_no_row_counts_twice(self, rows):
        x, queries = (jnp.asarray(v) for v in rows)
        top = nearest_rows(queries, x, 5)
        scores = np.asarray(queries) @ np.asarray(x).T
        want = np.argsort(-scores, axis=1)
        np.testing.assert_array_equal(top[1], want[:, :5])
        found = jnp.asarray(want[:, [0, 9, 3, 7]].astype(np.int32))
        lists = _join(queries, x, top, found)
        assert np.asarray(lists.valid[:, 5:]).tolist() == [[False, True, False, True]] * 300
        np.testing.assert_allclose(
            lists.exact, np.take_along_axis(scores, np.asarray(lists.ids), axis=1), rtol=1e-4
        )

    @pytest.mark.parametrize("kind", ["product", "additive", "rotated"])
    def test_gradient_is_that_of_decoded_rows(self, rows, learned, kind):
        x, queries = (jnp.asarray(v) for v in rows)
        codec = learned[kind]
        codes = avq_jax.encode(codec, x).codes
        top = nearest_rows(queries, x, 4)
        lists = _join(queries, x, top, jnp.zeros((300, 3), jnp.int32))
        inner = codec.codec if kind == "rotated" else codec

        def through_rows(words):
            new = dataclasses.replace(inner, codewords=words)
            new = dataclasses.replace(codec, codec=new) if kind == "rotated" else new
            scores = jnp.einsum("bd,bcd->bc", queries, avq_jax.decode(new, codes)[lists.ids])
            exact = jnp.where(lists.valid, lists.exact / 0.5, -jnp.inf)
            other = jnp.where(lists.valid, scores / 0.5, -jnp.inf)
            p = jax.nn.softmax(exact, axis=1)
            cross = jnp.where(lists.valid, p * jax.nn.log_softmax(other, axis=1), 0)
            return -jnp.mean(jnp.sum(cross, axis=1))

        got = jax.grad(_list_loss)(inner.codewords, codec, codes, lists, jnp.float32(0.5))
        want = jax.grad(through_rows)(inner.codewords)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * float(jnp.abs(want).max()))


class TestFitRanking:
    @pytest.mark.parametrize("kind", ["product", "additive", "rotated"])
    def test_gains_on_held_out_queries_and_moves_codewords_alone(self, rows, learned, kind):
        x, queries = rows
        codec = learned[kind]
        new, history = avq_jax.fit_ranking(
            jax.random.key(0), codec, x, queries, num_neighbors=8, num_negatives=24, **QUIET
        )
        assert type(new) is type(codec)
        assert history.held_out.min() < history.held_out[0]
        assert len(history.held_out) == len(history.loss) + 1
        inner, start = (c.codec if kind == "rotated" else c for c in (new, codec))
        assert np.abs(np.asarray(inner.codewords - start.codewords)).max() > 0
        if kind == "rotated":
            np.testing.assert_array_equal(new.matrix, codec.matrix)
        if kind == "additive":
            np.testing.assert_array_equal(new.kicks, codec.kicks)

    def test_what_is_returned_is_the_best_of_the_rounds(self, rows, learned):
        x, queries = rows
        codec, seen = learned["product"], []
        options = {"temperature": 0.3, "held_out": 0.5, **QUIET}
        new, history = avq_jax.fit_ranking(
            jax.random.key(0), codec, x, queries, callback=lambda c: seen.append(c), **options
        )
        best = [codec, *seen][int(np.argmin(history.held_out))]
        jax.tree.map(np.testing.assert_array_equal, new, best)
        order = jax.random.permutation(jax.random.split(jax.random.key(0))[0], 300)
        judges = queries[np.asarray(order[:150])]
        for one, value in zip([codec, *seen], history.held_out, strict=True):
            assert value == pytest.approx(own_loss(one, x, judges, 0.3), rel=1e-3)

    @pytest.mark.parametrize("kind", ["product", "additive", "rotated"])
    def test_gives_back_the_codec_where_nothing_is_gained(self, rows, learned, kind):
        x, queries = rows
        codec = learned[kind]
        uphill = optax.chain(optax.scale_by_adam(), optax.scale(0.2))
        new, history = avq_jax.fit_ranking(
            jax.random.key(0), codec, x, queries, optimizer=uphill, **QUIET
        )
        assert np.all(history.held_out[1:] > history.held_out[0])
        assert len(history.loss) == 2  # and gives up
        jax.tree.map(np.testing.assert_array_equal, new, codec)

    def test_no_rounds(self, rows, learned):
        x, queries = rows
        new, history = avq_jax.fit_ranking(
            jax.random.key(0), learned["product"], x, queries, **QUIET | {"num_rounds": 0}
        )
        assert new is learned["product"]
        assert history.loss.shape == (0,)
        assert history.held_out.shape == (1,)

    def test_the_same_key_gives_the_same_codec(self, rows, learned):
        x, queries = rows
        one, two = (
            avq_jax.fit_ranking(jax.random.key(5), learned["product"], x, queries, **QUIET)
            for _ in range(2)
        )
        jax.tree.map(np.testing.assert_array_equal, one, two)

    def test_codes_without_error_have_no_loss_and_stay(self):
        words = jnp.asarray(draw(8, 3)).reshape(8, 4, 3).transpose(1, 0, 2)
        codec = avq_jax.Codebook(words, dim=12)
        codes = np.random.default_rng(0).integers(0, 8, (200, 4)).astype(np.uint8)
        x = avq_jax.decode(codec, codes)
        new, history = avq_jax.fit_ranking(jax.random.key(0), codec, x, draw(40, 4), **QUIET)
        np.testing.assert_allclose(history.held_out, 0, atol=1e-4)
        np.testing.assert_allclose(new.codewords, words, atol=1e-2)

    def test_a_loss_that_is_not_finite_raises_with_the_round(self, rows, learned):
        x, queries = rows
        wild = optax.scale(jnp.inf)
        with pytest.raises(FloatingPointError, match="in round 0") as caught:
            avq_jax.fit_ranking(
                jax.random.key(0), learned["product"], x, queries, optimizer=wild, **QUIET
            )
        assert caught.value.state is learned["product"]

    def test_codecs_of_other_kinds_and_traced_rows(self, rows, learned):
        x, queries = rows
        scaled = avq_jax.fit_scale(learned["product"], x)
        with pytest.raises(TypeError, match="scale it afterwards"):
            avq_jax.fit_ranking(jax.random.key(0), scaled, x, queries)
        with pytest.raises(TypeError, match="outside jit"):
            jax.jit(
                lambda x: avq_jax.fit_ranking(jax.random.key(0), learned["product"], x, queries)
            )(x)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"held_out": 1.0}, "held_out must be above 0 and below 1"),
            ({"temperature": 0.0}, "temperature must be a finite number above 0"),
            ({"num_neighbors": 0}, "num_neighbors must be at least 1"),
            ({"queries": draw(1, 0)}, "queries must have at least 2"),
            ({"queries": draw(9, 0)[:, 1:]}, "queries must have the width of the codec, 12"),
            ({"x": draw(9, 0)[:, 1:]}, "x must have the width of the codec, 12"),
        ],
    )
    def test_bad_arguments_are_named(self, rows, learned, options, message):
        options = {"x": rows[0], "queries": rows[1]} | options
        with pytest.raises(ValueError, match=message):
            avq_jax.fit_ranking(jax.random.key(0), learned["product"], **options)
