"""Building: the loss the codes are chosen by, bad arguments, odd data, user ids, determinism."""

import importlib
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.mips.options import tree_sizes
from avq_jax.mips.packing import coded_rows
from avq_jax.mips.partition import check_slots, lay_out, nearest_centroids
from avq_jax.mips.rescoring import store_rows

build_module = importlib.import_module("avq_jax.mips.build")  # the name is the function

N, D, LEAVES = 600, 12, 8  # of the shared rows
SIZES = {"num_leaves": LEAVES, "num_subspaces": 6, "num_iterations": 4}


def make(x, **options):
    return avq_jax.build(jax.random.key(0), x, **{**SIZES, **options})


def assert_equal_indexes(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


class TestLoss:
    """Section 5.3: residual codes, parallel direction and scaling of the ORIGINAL rows."""

    @pytest.mark.parametrize("metric", ["dot", "cosine"])
    def test_codes_are_those_of_the_original_direction(self, indexes, rows, metric):
        index = indexes[metric]
        coded = coded_rows(index.tree, N)
        norms = np.linalg.norm(rows, axis=1)
        x = rows
        if metric == "cosine":
            x = np.asarray(index.store.rows)
            norms = (norms > 0).astype(np.float32)
        residual = x - np.asarray(index.tree.centroids)[coded.leaves]
        scaling = avq_jax.scaling(index.weight, norms, dim=D)
        book = index.tree.codebook

        right = avq_jax.encode(book, residual, scaling, direction=x)
        np.testing.assert_array_equal(np.mean(coded.codes != right.codes), 0)
        mistaken = avq_jax.encode(book, residual, scaling)
        assert np.mean(coded.codes != mistaken.codes) > 0.05

        def loss(codes):
            decoded = avq_jax.decode(book, codes)
            return np.mean(avq_jax.score_aware_loss(residual, decoded, scaling, direction=x))

        assert loss(coded.codes) < 0.95 * loss(mistaken)

    def test_rows_lie_in_the_leaf_of_the_nearest_ranking_vector(self, index, rows):
        ranking = np.asarray(index.tree.ranking)
        distance = np.sum((rows[:, None] - ranking[None]) ** 2, -1)
        leaves = coded_rows(index.tree, N).leaves
        np.testing.assert_allclose(distance[np.arange(N), leaves], distance.min(1), rtol=1e-5)

    def test_residuals_are_those_from_the_means(self, index, rows):
        # All rows are in the sample here.
        leaves = coded_rows(index.tree, N).leaves
        means = np.stack([rows[leaves == leaf].mean(axis=0) for leaf in range(LEAVES)])
        np.testing.assert_allclose(index.tree.centroids, means, rtol=1e-3, atol=1e-3)
        assert not np.allclose(index.tree.ranking, means, rtol=1e-2)

    def test_default_weight(self, indexes):
        assert isinstance(indexes["dot"].weight, avq_jax.Power)
        assert float(avq_jax.eta(indexes["dot"].weight, 3.0, dim=D)) == pytest.approx(6)
        np.testing.assert_allclose(indexes["cosine"].weight.T, 2 / np.sqrt(D + 3), rtol=1e-6)
        assert isinstance(indexes["l2"].weight, avq_jax.Uniform)

    def test_default_weight_suits_the_long_rows_that_win(self):
        """One eta for every norm; a threshold for the median norm has an eta near 1 for them."""
        draw = np.random.default_rng(0)
        x = draw.standard_normal((2000, 16)) * np.exp(draw.standard_normal((2000, 1)))
        x, queries = x.astype(np.float32), draw.standard_normal((200, 16)).astype(np.float32)
        truth = np.asarray(avq_jax.brute_force(queries, x, k=10).ids)
        T = avq_jax.default_threshold(np.linalg.norm(x, axis=1), dim=16)
        found = [
            avq_jax.search(make(x, weight=weight), queries, k=10, leaves_to_search=8, rescore=0).ids
            for weight in (None, avq_jax.Threshold(T))
        ]
        power, threshold = (avq_jax.recall_k_at_k(np.asarray(i), truth, k=10) for i in found)
        assert power > threshold + 0.05

    def test_a_plain_function_as_weight(self, rows, queries):
        index = avq_jax.build(jax.random.key(0), rows, weight=lambda t: jnp.maximum(t, 0) ** 2)
        assert avq_jax.search(index, queries, k=5).ids.shape == (64, 5)

    @pytest.mark.full
    def test_a_plain_function_gives_the_codes_of_its_closed_form(self, rows):
        function = make(rows, weight=lambda t: jnp.maximum(t, 0) ** 2)
        power = make(rows, weight=avq_jax.Power(2.0))
        codes = [coded_rows(index.tree, N).codes for index in (function, power)]
        assert np.mean(codes[0] == codes[1]) > 0.9


class TestDeterminism:
    def test_same_key_same_index(self, indexes, rows):
        for metric in indexes:
            assert_equal_indexes(make(rows, metric=metric), indexes[metric])

    @pytest.mark.parametrize("metric", ["dot", "cosine"])
    def test_index_owns_its_rows(self, rows, metric):
        mine = rows.copy()
        for options in (SIZES, {}):
            index = avq_jax.build(jax.random.key(0), mine, metric=metric, **options)
            before = jax.tree.map(np.array, index)
            mine += 1
            assert_equal_indexes(index, before)
            mine -= 1

    @pytest.mark.parametrize(
        "convert",
        [
            lambda x, _: x.astype(np.float64),
            lambda x, _: x.astype(np.float16),
            lambda x, _: x.tolist(),
            lambda x, _: np.asfortranarray(x),
            lambda x, _: np.repeat(x, 2, axis=1)[:, ::2],
            lambda x, _: jnp.asarray(x),
            lambda x, _: jnp.asarray(x).astype(jnp.float16),
            lambda x, path: as_memmap(x, path),
        ],
        ids=["float64", "float16", "list", "fortran", "strided", "jax", "jax16", "memmap"],
    )
    def test_rows_of_any_kind(self, rows, convert, tmp_path):
        x = rows.astype(np.float16).astype(np.float32)
        for options in (SIZES, {}):
            expected = avq_jax.build(jax.random.key(0), x, **options)
            found = avq_jax.build(jax.random.key(0), convert(x, tmp_path), **options)
            assert_equal_indexes(found, expected)

    def test_int8_rows(self, rows):
        x = np.clip(np.rint(rows * 20), -127, 127).astype(np.int8)
        assert_equal_indexes(make(x), make(x.astype(np.float32)))


def as_memmap(x, path):
    np.save(path / "x.npy", x)
    return np.load(path / "x.npy", mmap_mode="r")


class TestData:
    def test_not_finite(self, rows):
        bad = rows.copy()
        bad[7, 3] = np.nan
        bad[9, 0] = np.inf
        with pytest.raises(ValueError, match="2 of 600 rows hold NaN or Inf, the first is row 7"):
            make(bad)

    def test_too_few_rows_are_searched_exactly(self, rows, queries):
        for n, options in [(20, SIZES), (1, {}), (31, {}), (100, {"num_codewords": 256})]:
            with pytest.warns(UserWarning, match=f"{n} rows are too few") as caught:
                index = avq_jax.build(jax.random.key(0), rows[:n], **options)
            assert len(caught) == 1
            assert index.tree is None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = avq_jax.build(jax.random.key(0), rows[:1])
        found = avq_jax.search(one, queries[:2], k=3)
        assert found.ids.tolist() == [[0, -1, -1]] * 2

    def test_no_rows(self):
        with pytest.raises(ValueError, match="x must have at least 1 row"):
            make(np.zeros((0, 4)))

    def test_more_leaves_than_rows(self):
        with pytest.warns(UserWarning, match="num_leaves = 99 is more than the 64 rows") as caught:
            assert tree_sizes(64, 8, 99, None, 16) == (2, 4)
        assert len(caught) == 1
        assert tree_sizes(64, 8, 64, 8, 16) == (64, 8)

    @pytest.mark.full
    @pytest.mark.parametrize(("n", "d", "leaves"), [(64, 3, 64), (64, 3, 99), (50, 1, 2)])
    def test_small_trees(self, n, d, leaves):
        x = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            index = avq_jax.build(jax.random.key(0), x, num_leaves=leaves)
        found = avq_jax.search(index, x[:5], k=n, leaves_to_search=n, rescore=n)
        expected = avq_jax.brute_force(x[:5], x, k=n)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("metric", ["dot", pytest.param("l2", marks=pytest.mark.full)])
    def test_all_rows_equal_and_empty_leaves(self, metric):
        x = np.ones((N, D), np.float32)
        index = make(x, metric=metric)
        sizes = np.bincount(coded_rows(index.tree, N).leaves, minlength=LEAVES)
        assert (sizes == 0).sum() == LEAVES - 1
        for k, rescore in ((20, 0), (10, N)):
            found = avq_jax.search(index, 2 * x[:64], k=k, leaves_to_search=LEAVES, rescore=rescore)
            assert found.ids[0].tolist() == list(range(k))
            expected = 2 * D if metric == "dot" else -D
            np.testing.assert_allclose(found.scores, expected, rtol=1e-5)

    @pytest.mark.full
    def test_zero_rows_have_cosine_zero(self, indexes, queries):
        scores, ids = avq_jax.search(
            indexes["cosine"], queries, k=N, leaves_to_search=LEAVES, rescore=N
        )
        scores, ids = np.asarray(scores), np.asarray(ids)
        assert (scores[ids == 5] == 0).all()
        assert np.isfinite(scores).all()

    @pytest.mark.parametrize(
        "metric",
        ["dot", *(pytest.param(m, marks=pytest.mark.full) for m in ("cosine", "l2"))],
    )
    def test_norms_over_many_decades(self, rows, queries, metric):
        scale = np.logspace(-30, 0, N).astype(np.float32)[:, None]
        index = make(rows * scale, metric=metric)
        for leaf in jax.tree.leaves((index.tree, index.weight)):
            assert np.isfinite(leaf).all()
        for k, rescore in ((20, 0), (10, N)):
            found = avq_jax.search(index, queries, k=k, leaves_to_search=LEAVES, rescore=rescore)
            assert np.isfinite(found.scores).all()
        with pytest.raises(ValueError, match="x must have its largest absolute value between"):
            make(rows * np.float32(1e30), metric=metric)

    def test_int8_store_of_tiny_rows(self):
        x = np.array([[0, 0], [1e-30, -1e-30], [1e-44, 0], [3, 4]], np.float32)
        store = store_rows(x, "int8")
        assert store.rows.tolist() == [[0, 0], [127, -127], [0, 0], [95, 127]]
        restored = np.asarray(store.rows) * np.asarray(store.scale)[:, None]
        np.testing.assert_allclose(restored, x, rtol=6e-3, atol=1e-37)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"num_leaves": 0}, ValueError, "num_leaves must be at least 1, got 0"),
            ({"num_leaves": True}, TypeError, "num_leaves must be an integer"),
            ({"num_subspaces": 0}, ValueError, "num_subspaces must be at least 1, got 0"),
            ({"num_subspaces": 13}, ValueError, "num_subspaces must be at most .* 12; got 13"),
            ({"num_codewords": 1}, ValueError, "num_codewords must be at least 2, got 1"),
            ({"num_codewords": 257}, ValueError, "num_codewords must be at most 256.*257"),
            ({"leaves_to_search": 0}, ValueError, "leaves_to_search must be at least 1, got 0"),
            ({"num_iterations": 0}, ValueError, "num_iterations must be at least 1, got 0"),
            ({"sample_size": 3}, ValueError, "sample_size must be at least 256, got 3"),
            ({"ids": np.arange(3)}, ValueError, r"ids must have shape \(600,\).*\(3,\)"),
            ({"ids": np.arange(600.0)}, TypeError, "ids must be integers; got dtype float64"),
            ({"ids": -np.arange(600)}, ValueError, "ids must be >= 0; got -1 at row 1"),
            ({"ids": np.arange(600) // 2}, ValueError, "ids must be distinct; 0 comes 2 times"),
            ({"ids": np.full(600, 2**63, np.uint64)}, ValueError, "ids must fit int64"),
        ],
    )
    def test_bad_argument_before_any_work(self, rows, monkeypatch, options, error, text):
        monkeypatch.setattr(build_module, "row_norms", None)
        monkeypatch.setattr(build_module, "learn_tree", None)
        with pytest.raises(error, match=text):
            make(rows, **options)

    @pytest.mark.parametrize("name", ["metric", "rescore_dtype", "weight"])
    def test_bad_kinds(self, rows, name):
        with pytest.raises((TypeError, ValueError), match=name):
            make(rows, **{name: 3})

    def test_bad_key(self, rows):
        for key in (jax.random.PRNGKey(0), jnp.float32(0)):
            with pytest.raises(TypeError, match="key must be a typed key"):
                avq_jax.build(key, rows)

    def test_no_store_and_no_tree(self, rows):
        with pytest.raises(ValueError, match="rescore_dtype must not be None"):
            avq_jax.build(jax.random.key(0), rows, rescore_dtype=None)

    def test_inside_jit(self, rows):
        with pytest.raises(TypeError, match="call it outside jit"):
            jax.jit(lambda x: avq_jax.build(jax.random.key(0), x).store)(rows)


class TestIds:
    def test_beyond_32_bits(self, rows, queries):
        ids = 2**40 + 5 + 3 * np.arange(N)[::-1]
        index = avq_jax.build(jax.random.key(0), rows, ids=ids)
        found = avq_jax.search(index, queries, k=10)
        given = avq_jax.user_ids(index, found.ids)
        assert given.dtype == np.int64
        np.testing.assert_array_equal(given, ids[np.asarray(found.ids)])
        assert avq_jax.user_ids(index, np.array([-1, 0])).tolist() == [-1, ids[0]]
        largest = avq_jax.build(jax.random.key(0), rows[:40], ids=[*range(39), 2**63 - 1])
        assert avq_jax.user_ids(largest, 39) == 2**63 - 1

    def test_bad_rows(self, index):
        for bad in (-2, N):
            with pytest.raises(ValueError, match=f"rows must be -1 or from 0 to 599; got {bad}"):
                avq_jax.user_ids(index, [0, bad])
        with pytest.raises(TypeError, match="rows must be integers"):
            avq_jax.user_ids(index, [0.5])
        assert avq_jax.user_ids(index, []).shape == (0,)


class TestLayout:
    def test_each_row_once_and_leaves_in_whole_blocks(self):
        leaves = np.random.default_rng(0).integers(7, size=500).astype(np.int32)
        leaves[leaves == 3] = 4  # an empty leaf
        slots, starts = lay_out(leaves, num_leaves=7, block=32)
        assert sorted(slots[slots >= 0]) == list(range(500))
        for leaf in range(7):
            part = slots[starts[leaf] * 32 : starts[leaf + 1] * 32]
            found = part[part >= 0]
            np.testing.assert_array_equal(found, np.flatnonzero(leaves == leaf))

    def test_slots_fit_int32(self):
        check_slots(2**31 - 1)
        with pytest.raises(ValueError, match=r"fewer than 2\^31 slots.*2147483648"):
            check_slots(2**31)

    def test_ties_go_to_the_first_leaf(self):
        centroids = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
        x = np.array([[1, 0], [0, 5], [-1, 0]], np.float32)
        assert nearest_centroids(x, centroids).tolist() == [0, 0, 2]


def run_python(code):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_changes_no_flag_and_writes_nothing(tmp_path):
    out = run_python(f"""
import os
os.chdir({str(tmp_path)!r})
import jax
before = dict(jax.config.values)
import avq_jax
assert dict(jax.config.values) == before
print(os.listdir("."))
""")
    assert out.strip() == "[]"


@pytest.mark.full
def test_peak_memory():
    """Building takes at most 5 times the data over 300 MB of code and compiler."""
    out = run_python("""
import resource, jax, numpy as np, avq_jax
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = np.random.default_rng(0).standard_normal((2048, 64), np.float32)
avq_jax.build(jax.random.key(0), small, num_leaves=16)
x = np.random.default_rng(0).standard_normal((800_000, 64), np.float32)
before = peak()
index = avq_jax.build(jax.random.key(0), x, num_leaves=64, sample_size=20_000, num_iterations=3)
built = peak()
avq_jax.search(index, x[:256], k=10).ids.block_until_ready()
print(x.nbytes / 2**20, built - before, peak() - built)
""")
    data, building, searching = map(float, out.split())
    print(f"data {data:.0f} MB, build {building:.0f} MB more, search {searching:.0f} MB more")
    assert building <= 5 * data + 300
    assert searching <= 0.5 * data + 100
