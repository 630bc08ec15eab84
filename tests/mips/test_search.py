"""Search: against exact search, its arguments, and the inputs it must survive."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.mips.packing import coded_rows
from avq_jax.mips.rescoring import store_rows

LEAVES, N = 8, 600  # of the shared indexes

METRICS = ("dot", "cosine", "l2")
SOME = ["dot", pytest.param("cosine", marks=pytest.mark.full), "l2"]


def unit(x):
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


def assert_ranked_as(result, expected, rtol=1e-5):
    """Equal scores; equal ids but where the neighbouring scores are a rounding apart."""
    scores, exact = np.asarray(result.scores), np.asarray(expected.scores)
    np.testing.assert_allclose(scores, exact, rtol=rtol, atol=2e-6)
    differ = np.asarray(result.ids) != np.asarray(expected.ids)
    assert np.all(np.abs(scores - exact)[differ] <= 1e-6 * np.abs(exact[differ]) + 1e-6)
    assert differ.mean() < 0.01


class TestAnswer:
    @pytest.mark.parametrize("metric", METRICS)
    def test_everything_probed_and_rescored_is_exact(self, indexes, rows, queries, metric):
        found = avq_jax.search(indexes[metric], queries, k=10, leaves_to_search=LEAVES, rescore=N)
        assert_ranked_as(found, avq_jax.brute_force(queries, rows, k=10, metric=metric))

    @pytest.mark.parametrize("metric", METRICS)
    def test_few_rows_are_searched_exactly(self, exact_indexes, rows, queries, metric):
        found = avq_jax.search(exact_indexes[metric], queries, k=10)
        assert_ranked_as(found, avq_jax.brute_force(queries, rows, k=10, metric=metric))

    def test_offset_rows_keep_their_distances(self, rows, queries):
        far = np.float32(512)
        index = avq_jax.build(jax.random.key(0), rows + far, metric="l2")
        found = avq_jax.search(index, queries + far, k=10)
        exact = avq_jax.brute_force(queries + far, rows + far, k=10, metric="l2")
        assert_ranked_as(found, exact)

    @pytest.mark.parametrize(
        ("metric", "kind"),
        [
            ("dot", "bfloat16"),
            ("l2", "int8"),
            pytest.param("dot", "int8", marks=pytest.mark.full),
            pytest.param("l2", "bfloat16", marks=pytest.mark.full),
            pytest.param("cosine", "bfloat16", marks=pytest.mark.full),
            pytest.param("cosine", "int8", marks=pytest.mark.full),
        ],
    )
    def test_smaller_stores_are_exact_within_their_precision(
        self, indexes, rows, queries, metric, kind
    ):
        error = {"bfloat16": 2.0**-8, "int8": 0.5 / 127}[kind]
        kept = unit(rows) if metric == "cosine" else rows
        index = dataclasses.replace(indexes[metric], store=store_rows(kept, kind))
        found = avq_jax.search(index, queries, k=10, leaves_to_search=LEAVES, rescore=N)
        ids = np.asarray(found.ids)
        q, x = queries[:, None, :], kept[ids]
        if metric == "l2":
            expected, lever = -np.sum((q - x) ** 2, -1), 2 * np.abs(q - x)
        else:
            q = unit(q) if metric == "cosine" else q
            expected, lever = np.sum(q * x, -1), np.abs(q)
        step = error * (
            np.abs(x) if kind == "bfloat16" else np.abs(x).max(-1, keepdims=True) + 0 * x
        )
        bound = np.sum(lever * step + (step**2 if metric == "l2" else 0), -1) + 1e-5
        assert np.all(np.abs(found.scores - expected) <= bound)
        assert all(len(set(row)) == 10 for row in ids)

    @pytest.mark.parametrize("metric", SOME)
    def test_scores_without_rescoring_are_those_of_the_codes(self, indexes, rows, queries, metric):
        index = indexes[metric]
        found = avq_jax.search(index, queries, k=20, leaves_to_search=LEAVES, rescore=0)
        coded = coded_rows(index.tree, N)
        decoded = np.asarray(avq_jax.decode(index.tree.codebook, coded.codes))
        approximate = np.asarray(index.tree.centroids)[coded.leaves] + decoded
        if metric == "l2":
            # -||q - x||^2 with <q - x, x - x~> left out
            q, x = queries[:, None, :].astype(np.float64), rows[None].astype(np.float64)
            expected = -np.sum((q - x) ** 2, -1) - 2 * np.sum((q - x) * (x - approximate), -1)
        else:
            expected = (unit(queries) if metric == "cosine" else queries) @ approximate.T
        np.testing.assert_allclose(
            found.scores, np.take_along_axis(expected, np.asarray(found.ids), 1), atol=3e-5
        )
        np.testing.assert_allclose(found.scores, -np.sort(-expected, 1)[:, :20], atol=3e-5)

    @pytest.mark.parametrize("metric", SOME)
    def test_zeroed_rows_change_nothing_without_rescoring(self, indexes, queries, metric):
        index = indexes[metric]
        blank = index.store._replace(rows=jnp.zeros_like(index.store.rows))
        options = {"k": 20, "leaves_to_search": LEAVES, "rescore": 0}
        found = avq_jax.search(index, queries, **options)
        again = avq_jax.search(dataclasses.replace(index, store=blank), queries, **options)
        np.testing.assert_array_equal(found.scores, again.scores)
        np.testing.assert_array_equal(found.ids, again.ids)

    def test_equal_rows_come_lowest_first(self, index, exact_indexes, rows, queries):
        q = rows[[17, 17]] * 3
        for each in (index, exact_indexes["dot"]):
            scores, ids = avq_jax.search(each, q, k=N + 9, leaves_to_search=LEAVES)
            place = np.asarray(ids[0]).tolist().index(17)
            assert ids[0, place + 1] == 100
            assert scores[0, place] == scores[0, place + 1]

    @pytest.mark.parametrize("rescore", [0, pytest.param(20, marks=pytest.mark.full)])
    def test_a_tie_of_all_rows_gives_the_lowest(self, index, exact_indexes, rescore):
        q = np.zeros((64, index.dim), np.float32)
        for each in (index, exact_indexes["dot"]):
            found = avq_jax.search(each, q, k=20, leaves_to_search=LEAVES, rescore=rescore)
            assert found.ids[0].tolist() == list(range(20))

    @pytest.mark.parametrize("magnitude", [1e-30, 1e30, 1e37])
    def test_extreme_queries(self, index, exact_indexes, queries, magnitude):
        q = queries * np.float32(magnitude)
        usual = avq_jax.search(index, queries, k=5)
        for each in (index, exact_indexes["dot"]):
            found = avq_jax.search(each, q, k=5, leaves_to_search=LEAVES)
            assert np.isfinite(found.scores).all()
        found = avq_jax.search(index, q, k=5)
        np.testing.assert_array_equal(found.ids, usual.ids)


class TestArguments:
    def test_one_query_is_squeezed(self, index, queries):
        one, batch = avq_jax.search(index, queries[3], k=5), avq_jax.search(index, queries, k=5)
        assert one.ids.shape == (5,)
        np.testing.assert_array_equal(one.ids, batch.ids[3])
        np.testing.assert_array_equal(one.scores, batch.scores[3])

    def test_no_queries(self, index):
        assert avq_jax.search(index, np.zeros((0, index.dim)), k=4).ids.shape == (0, 4)
        assert avq_jax.searcher(index, k=4)([]).ids.shape == (0, 4)

    def test_more_results_than_rows(self, index, exact_indexes, queries):
        for each in (index, exact_indexes["dot"]):
            found = avq_jax.search(each, queries[:2], k=N + 9, leaves_to_search=LEAVES)
            assert found.ids.shape == (2, N + 9)
            assert sorted(found.ids[0, :N].tolist()) == list(range(N))
            assert (found.ids[:, N:] == -1).all()
            assert (found.scores[:, N:] == -np.inf).all()

    def test_more_results_than_candidates(self, index, queries):
        found = avq_jax.search(index, queries[:2], k=N, leaves_to_search=1)
        for scores, ids in zip(*map(np.asarray, found), strict=True):
            count = (ids >= 0).sum()
            assert 0 < count < N
            assert len(set(ids[:count])) == count
            assert (ids[count:] == -1).all()
            assert (scores[count:] == -np.inf).all()

    def test_effort_beyond_the_leaves_means_all(self, index, queries):
        all_leaves = avq_jax.search(index, queries, k=5, leaves_to_search=LEAVES)
        more = avq_jax.search(index, queries, k=5, leaves_to_search=10**6)
        np.testing.assert_array_equal(all_leaves.ids, more.ids)

    def test_allowed_rows(self, index, exact_indexes, rows, queries):
        each = np.random.default_rng(0).random((64, N)) < 0.3
        options = {"k": 5, "leaves_to_search": LEAVES, "rescore": N}
        targets = [(index, each[0]), (index, each), (exact_indexes["dot"], each)]
        for target, mask in targets:
            found = avq_jax.search(target, queries, allowed=mask, **options)
            exact = np.where(mask, queries @ rows.T, -np.inf)
            np.testing.assert_allclose(found.scores, -np.sort(-exact, 1)[:, :5], rtol=1e-5)
            wide = np.broadcast_to(mask, (64, N))
            assert np.take_along_axis(wide, np.asarray(found.ids), 1).all()

    @pytest.mark.full
    def test_allowed_rows_without_rescoring(self, index, queries):
        mask = np.random.default_rng(0).random(N) < 0.3
        found = avq_jax.search(index, queries, k=5, rescore=0, allowed=mask)
        assert mask[found.ids].all()

    def test_no_row_allowed(self, index, exact_indexes, queries):
        for target in (index, exact_indexes["dot"]):
            found = avq_jax.search(
                target,
                queries,
                k=5,
                leaves_to_search=LEAVES,
                rescore=N,
                allowed=np.zeros((64, N), bool),
            )
            assert (found.ids == -1).all()
            assert (found.scores == -np.inf).all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_rows_of_the_batch_that_are_not_finite(self, index, exact_indexes, queries, bad):
        q = queries.copy()
        q[2, 3] = bad
        for target in (index, exact_indexes["dot"]):
            whole, found = (avq_jax.search(target, z, k=5) for z in (queries, q))
            assert (found.ids[2] == -1).all()
            assert (found.scores[2] == -np.inf).all()
            others = np.arange(64) != 2
            np.testing.assert_array_equal(found.ids[others], whole.ids[others])
            np.testing.assert_array_equal(found.scores[others], whole.scores[others])

    @pytest.mark.parametrize("b", [1, 7, 8, 9])
    @pytest.mark.parametrize("rescore", [None, pytest.param(0, marks=pytest.mark.full)])
    def test_batch_size_changes_no_bit(self, index, queries, b, rescore):
        whole = avq_jax.search(index, queries, k=5, rescore=rescore)
        part = avq_jax.search(index, queries[5 : 5 + b], k=5, rescore=rescore)
        np.testing.assert_array_equal(part.ids, whole.ids[5 : 5 + b])
        np.testing.assert_array_equal(part.scores, whole.scores[5 : 5 + b])

    @pytest.mark.parametrize(
        "convert", [np.float64, np.float16, np.asfortranarray, np.ndarray.tolist]
    )
    def test_queries_of_any_kind(self, index, queries, convert):
        q = queries.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(
            avq_jax.search(index, convert(q), k=5).ids, avq_jax.search(index, q, k=5).ids
        )

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"k": 0}, ValueError, "k must be at least 1, got 0"),
            ({"k": 2.5}, TypeError, "k"),
            ({"k": True}, TypeError, "k must be an integer"),
            ({"leaves_to_search": 0}, ValueError, "leaves_to_search must be at least 1"),
            ({"rescore": -1}, ValueError, "rescore must be at least 0"),
            ({"rescore": 9}, ValueError, r"rescore must be 0 \(off\) or at least k = 10; got 9"),
            ({"allowed": np.ones(3, bool)}, ValueError, r"allowed must have shape \(600,\)"),
            ({"allowed": np.arange(3)}, TypeError, "allowed must be a boolean mask"),
        ],
    )
    def test_bad_options(self, index, queries, options, error, text):
        with pytest.raises(error, match=text):
            avq_jax.search(index, queries, **options)

    def test_bad_queries_and_index(self, index, queries):
        with pytest.raises(ValueError, match=r"queries must be as wide .* 12, got width 11"):
            avq_jax.search(index, queries[:, :11])
        with pytest.raises(TypeError, match="queries must hold real numbers"):
            avq_jax.search(index, np.array([["a"] * 12]))
        for call in (lambda i: avq_jax.search(i, queries), avq_jax.searcher):
            with pytest.raises(TypeError, match="index"):
                call(queries)

    def test_an_index_without_rows_to_rescore(self, index, queries):
        bare = dataclasses.replace(index, store=None)
        options = {"k": 20, "leaves_to_search": LEAVES}
        codes_only = avq_jax.search(index, queries, rescore=0, **options)
        np.testing.assert_array_equal(avq_jax.search(bare, queries, **options).ids, codes_only.ids)
        with pytest.raises(ValueError, match="rescore must be 0 for an index built with"):
            avq_jax.search(bare, queries, k=5, rescore=10)


class TestSearcher:
    @pytest.mark.parametrize("rescore", [None, pytest.param(0, marks=pytest.mark.full)])
    def test_equals_search(self, index, queries, rescore):
        find = avq_jax.searcher(index, k=5, rescore=rescore)
        for q in (queries, queries[0], jnp.asarray(queries), queries.tolist()):
            expected = avq_jax.search(index, q, k=5, rescore=rescore)
            found = find(q)
            assert type(found.ids) is np.ndarray
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.scores, expected.scores)

    def test_eight_threads(self, index, queries):
        find = avq_jax.searcher(index, k=5)
        expected = find(queries)
        answers = [None] * 8

        def work(i):
            answers[i] = [find(queries) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for found in (found for answer in answers for found in answer):
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.scores, expected.scores)

    def test_refuses_tracers(self, index, queries):
        find = avq_jax.searcher(index, k=5)
        with pytest.raises(TypeError, match="inside jit call search"):
            jax.jit(lambda q: find(q).scores)(queries)
        with pytest.raises(TypeError, match="inside jit call search"):
            jax.jit(lambda i: avq_jax.searcher(i)(queries))(index)


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_few_queries_from_the_host_skip_dispatch_and_agree(indexes, queries, metric):
    index, q = indexes[metric], np.asarray(queries, np.float32)
    for few in (q[0], q[:3], q[:0]):
        direct = avq_jax.search(index, few, k=4)
        traced = jax.jit(lambda i, q: avq_jax.search(i, q, k=4))(index, few)
        assert isinstance(direct.ids, jax.Array)
        np.testing.assert_array_equal(direct.ids, traced.ids)
        np.testing.assert_allclose(direct.scores, traced.scores, rtol=1e-6)
    with pytest.raises(ValueError, match="k must be"):
        avq_jax.search(index, q[0], k=0)
    with pytest.raises(ValueError, match=str(index.dim)):
        avq_jax.search(index, q[0, :-1], k=4)


def test_a_float_that_equals_an_integer_is_refused_also_after_it(index, queries):
    few = np.array(queries[:2])
    avq_jax.search(index, few, k=3)
    # Past the types that tests check at run time, as a user's call is.
    search_ = getattr(avq_jax.search, "__wrapped__", avq_jax.search)
    with pytest.raises(TypeError):
        search_(index, few, k=3.0)
    with pytest.raises(ValueError, match="recall_target"):
        search_(index, few, k=3, recall_target=True)
