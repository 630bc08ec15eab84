"""Exact search against NumPy, its transformations and the inputs it must survive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avq_jax.mips import exact
from avq_jax.mips.exact import METRICS, SearchResult, brute_force


def reference(queries, x, k, metric):
    q, x = np.asarray(queries, np.float64), np.asarray(x, np.float64)
    scores = q @ x.T
    if metric == "l2":
        scores = -np.square(q[:, None, :] - x[None, :, :]).sum(axis=2)
    if metric == "cosine":
        norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(x, axis=1)[None, :]
        scores = np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


def assert_same(result, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(result.scores, expected[0], rtol=rtol, atol=atol)
    np.testing.assert_array_equal(result.ids, expected[1])


def data(n=400, d=6, b=5, seed=0):
    """Rows of one shape in most tests: compiling is what takes their time."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((b, d)).astype(np.float32),
        rng.standard_normal((n, d)).astype(np.float32),
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks of rows and of queries; read when tracing, so use shapes no other test has."""
    monkeypatch.setattr(exact, "_QUERY_BLOCK", 4)
    monkeypatch.setattr(exact, "_BLOCK_ELEMENTS", 4096)
    monkeypatch.setattr(exact, "_GATHER_ELEMENTS", 600)
    monkeypatch.setattr(exact, "_ROW_BLOCK", 1200)


class TestRecallTarget:
    def test_it_is_exact_without_a_tpu(self):
        q, x = data()
        wanted = brute_force(q, x, k=9, recall_target=0.9)
        np.testing.assert_array_equal(wanted.ids, brute_force(q, x, k=9).ids)

    def test_a_tpu_picks_by_partial_reduction(self):
        def search(q, x):
            return tuple(brute_force(q, x, k=5, recall_target=0.9))

        arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in data()]
        lowered = jax.export.export(jax.jit(search), platforms=["tpu"])(*arguments)
        assert "PartialReduce" in lowered.mlir_module() or "ApproxTopK" in lowered.mlir_module()

    @pytest.mark.parametrize("target", [0, 1.5, True, "most"])
    def test_what_is_not_a_share_is_refused(self, target):
        with pytest.raises(ValueError, match="recall_target must be a number"):
            brute_force(*data(), k=3, recall_target=target)


class TestAnswer:
    @pytest.mark.parametrize(
        ("metric", "scores", "ids"),
        [
            ("dot", [10.0, 2.0, 0.0], [2, 0, 3]),
            ("cosine", [0.8, 0.6, 0.0], [0, 2, 3]),
            ("l2", [-1.0, -4.0, -5.0], [0, 3, 1]),
        ],
    )
    def test_hand_worked(self, metric, scores, ids):
        x = {
            "dot": [[1, 0], [0, -1], [3, 4], [0, 0]],
            "cosine": [[4, 3], [-1, 0], [3, 4], [0, 0]],
            "l2": [[2, 1], [0, -1], [3, 4], [0, 0]],
        }[metric]
        query = {"dot": [2, 1], "cosine": [5, 0], "l2": [2, 0]}[metric]
        result = brute_force(query, x, k=3, metric=metric)
        np.testing.assert_allclose(result.scores, scores, rtol=1e-6)
        assert result.ids.tolist() == ids
        assert result.scores.dtype == jnp.float32
        assert result.ids.dtype == jnp.int32

    @pytest.mark.parametrize("metric", METRICS)
    def test_against_numpy(self, metric):
        q, x = data()
        assert_same(brute_force(q, x, k=9, metric=metric), reference(q, x, 9, metric))

    @pytest.mark.parametrize("metric", METRICS)
    def test_many_blocks(self, small_blocks, metric):
        q, x = data(5001, 8, 11)
        assert_same(brute_force(q, x, k=7, metric=metric), reference(q, x, 7, metric))

    def test_k_larger_than_half_a_block(self, small_blocks):
        q, x = data(2500, 4, 3)
        assert_same(brute_force(q, x, k=900), reference(q, x, 900, "dot"))

    @settings(max_examples=15, deadline=None)
    @given(
        shape=st.sampled_from([(1, 1, 1), (37, 5, 50)]),
        metric=st.sampled_from(METRICS),
        seed=st.integers(0, 2**31),
    )
    def test_integers_are_exact(self, shape, metric, seed):
        n, d, k = shape
        rng = np.random.default_rng(seed)
        q, x = rng.integers(-9, 10, (2, d)), rng.integers(-9, 10, (n, d))
        result = brute_force(q, x, k=k, metric=metric)
        assert result.ids.shape == (2, k)
        kept = min(n, k)
        expected = reference(q, x, kept, metric)
        np.testing.assert_allclose(result.scores[:, :kept], expected[0], rtol=1e-5, atol=1e-6)
        if metric != "cosine":  # cosines of different rows tie only up to rounding
            np.testing.assert_array_equal(result.ids[:, :kept], expected[1])
        assert (np.asarray(result.ids[:, kept:]) == -1).all()
        assert np.isneginf(result.scores[:, kept:]).all()

    @pytest.mark.parametrize("metric", METRICS)
    def test_ties_give_the_lowest_row_first(self, small_blocks, metric):
        x = np.tile(np.array([[1.0, 2.0, 2.0]], np.float32), (6000, 1))
        x[4500:] *= -1
        result = brute_force(np.ones((3, 3)), x, k=20, metric=metric)
        np.testing.assert_array_equal(result.ids, np.tile(np.arange(20), (3, 1)))

    @pytest.mark.parametrize("metric", ["dot", "l2"])
    def test_batch_does_not_change_the_answer(self, metric):
        q, x = data(3000, 50, 33)
        together = brute_force(q, x, k=10, metric=metric)
        for row in (0, 32):
            alone = brute_force(q[row], x, k=10, metric=metric)
            np.testing.assert_array_equal(alone.ids, together.ids[row])
            np.testing.assert_allclose(alone.scores, together.scores[row], rtol=1e-6)


class TestTransformations:
    @pytest.mark.parametrize("metric", METRICS)
    def test_jit_and_vmap(self, metric):
        q, x = map(jnp.asarray, data())
        expected = brute_force(q, x, k=9, metric=metric)
        jitted = jax.jit(lambda q, x: brute_force(q, x, k=9, metric=metric))(q, x)
        mapped = jax.vmap(lambda q: brute_force(q, x, k=9, metric=metric))(q)
        tables = jax.vmap(lambda x: brute_force(q, x, k=9, metric=metric))(jnp.stack([x, -x]))
        for result in (jitted, mapped, SearchResult(tables.scores[0], tables.ids[0])):
            np.testing.assert_array_equal(result.ids, expected.ids)
            np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-5)

    @pytest.mark.parametrize("metric", METRICS)
    def test_gradient(self, metric):
        q, x = map(jnp.asarray, data(n=40, b=2))
        weights = jnp.array([1.0, -2.0, 3.0])
        ids = brute_force(q, x, k=3, metric=metric).ids

        def searched(q, x):
            return (brute_force(q, x, k=3, metric=metric).scores * weights[None, :]).sum()

        def direct(q, x):
            rows = x[ids]
            if metric == "l2":
                scores = -jnp.square(q[:, None, :] - rows).sum(axis=2)
            else:
                scores = jnp.einsum("bd,bkd->bk", q, rows)
            if metric == "cosine":
                lengths = jnp.linalg.norm(q, axis=1)[:, None] * jnp.linalg.norm(rows, axis=2)
                scores = scores / lengths
            return (scores * weights[None, :]).sum()

        gradients = jax.jit(jax.grad(searched, argnums=(0, 1)))(q, x)
        expected = jax.jit(jax.grad(direct, argnums=(0, 1)))(q, x)
        for gradient, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("metric", METRICS)
    def test_gradient_is_finite_at_zero_and_ties(self, metric):
        x = jnp.zeros((4, 3)).at[2:].set(1.0)

        @jax.jit
        def gradients(q, x):
            return jax.grad(
                lambda q, x: brute_force(q, x, k=4, metric=metric).scores.sum(), argnums=(0, 1)
            )(q, x)

        for q in (jnp.zeros(3), jnp.ones(3)):
            for gradient in gradients(q, x):
                assert jnp.isfinite(gradient).all()

    def test_gradient_is_finite_with_padding_and_a_bad_query(self):
        q = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])
        gradient = jax.grad(
            lambda x: jnp.where(
                jnp.isfinite(s := brute_force(q, x, k=5).scores), s, jnp.zeros_like(s)
            ).sum()
        )(jnp.ones((3, 2)))
        assert jnp.isfinite(gradient).all()

    def test_one_trace_for_one_shape(self):
        q, x = data(n=50)
        before = exact._brute_force._cache_size()
        for factor in (1, 2, 3):
            brute_force(q * factor, x, k=3)
        assert exact._brute_force._cache_size() == before + 1


class TestInputs:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("metric", METRICS)
    def test_bad_query_row(self, metric, bad):
        q, x = data()
        clean = brute_force(q, x, k=9, metric=metric)
        q[2, 3] = bad
        result = brute_force(q, x, k=9, metric=metric)
        assert (np.asarray(result.ids[2]) == -1).all()
        assert np.isneginf(result.scores[2]).all()
        others = np.array([0, 1, 3, 4])
        np.testing.assert_array_equal(result.ids[others], clean.ids[others])
        np.testing.assert_array_equal(result.scores[others], clean.scores[others])

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("device", [False, True])
    def test_bad_data_row(self, metric, bad, device):
        q, x = data()
        x[[41, 300], 3] = bad
        with pytest.raises(ValueError, match=r"x must be finite: 2 of 400 .* row 41$"):
            brute_force(q, jnp.asarray(x) if device else x, k=9, metric=metric)

    @pytest.mark.parametrize("metric", METRICS)
    def test_bad_data_row_under_a_trace(self, metric):
        q, x = data(n=60)
        search = jax.jit(lambda q, x: brute_force(q, x, k=60, metric=metric))
        for bad in (np.nan, np.inf, -np.inf):
            x[[41, 50], 3] = bad
            result = search(q, x)
            assert not np.isin([41, 50], result.ids).any()
            assert (np.asarray(result.ids[:, -2:]) == -1).all()

    @pytest.mark.parametrize("metric", METRICS)
    def test_zero_rows(self, metric):
        x = np.array([[0, 0], [1, 1], [-1, 0]], np.float32)
        result = brute_force(np.array([[1, 0], [0, 0]]), x, k=3, metric=metric)
        assert np.isfinite(result.scores).all()
        if metric == "cosine":
            assert result.ids[0].tolist() == [1, 0, 2]
            assert result.scores[0, 1] == 0
        if metric != "l2":
            assert result.ids[1].tolist() == [0, 1, 2]

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
    def test_extreme_norms(self, metric, size):
        q, x = data()
        expected = brute_force(q, x, k=9, metric=metric)
        result = brute_force(
            q if metric == "dot" else q * np.float32(size),
            x * np.float32(size),
            k=9,
            metric=metric,
        )
        np.testing.assert_array_equal(result.ids, expected.ids)
        assert np.isfinite(result.scores).all()

    @pytest.mark.parametrize("metric", METRICS)
    def test_one_huge_row_and_one_huge_query(self, metric):
        q, x = data()
        x[7] = -np.sign(q[0])
        clean = brute_force(q, x, k=9, metric=metric)
        x[7] *= 1e30
        result = brute_force(q, x, k=9, metric=metric)
        np.testing.assert_array_equal(result.ids[0], clean.ids[0])
        x[7] /= 1e30
        q[2] *= 1e30
        result = brute_force(q, x, k=9, metric=metric)
        np.testing.assert_array_equal(result.ids[:2], clean.ids[:2])
        np.testing.assert_array_equal(result.scores[:2], clean.scores[:2])
        assert (np.asarray(result.ids) >= 0).all()
        assert np.isfinite(result.scores).all()

    def test_l2_with_a_large_common_offset(self):
        q, x = data()
        q, x = q + np.float32(3000), x + np.float32(3000)
        assert_same(brute_force(q, x, k=9, metric="l2"), reference(q, x, 9, "l2"))

    def test_cosine_with_norms_from_tiny_to_large(self):
        q, x = data()
        x *= np.float32(10.0) ** np.linspace(-15, 15, 400, dtype=np.float32)[:, None]
        assert_same(brute_force(q, x, k=9, metric="cosine"), reference(q, x, 9, "cosine"))

    @pytest.mark.parametrize(
        "convert",
        [
            lambda x: x.astype(np.float64),
            lambda x: x.astype(np.int8),
            lambda x: x.astype(np.uint8),
            lambda x: x.tolist(),
            np.asfortranarray,
            lambda x: np.repeat(x, 2, axis=0)[::2],
            lambda x: np.flip(np.flip(x, 1).copy(), 1),
            lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
            lambda x: x.astype(np.float16),
            lambda x: jnp.asarray(x, jnp.bfloat16),
            lambda x: jnp.asarray(x, jnp.bfloat16).__array__(),
        ],
        ids=[
            *("float64", "int8", "uint8", "list", "fortran", "strided", "flipped", "readonly"),
            *("float16", "bfloat16", "bfloat16-host"),
        ],
    )
    def test_any_dtype_and_layout(self, convert):
        rng = np.random.default_rng(0)
        x = rng.integers(0, 50, (90, 6)).astype(np.float32)
        q = rng.integers(0, 50, (4, 6)).astype(np.float32)
        expected = brute_force(q, x, k=5)
        result = brute_force(convert(q), convert(x), k=5)
        np.testing.assert_array_equal(result.ids, expected.ids)
        np.testing.assert_array_equal(result.scores, expected.scores)

    def test_memmap_and_dlpack(self, tmp_path):
        q, x = data(60, 4, 2)
        mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
        mapped[:] = x

        class Exporter:
            def __dlpack__(self, **options):
                return jnp.asarray(x).__dlpack__(**options)

            def __dlpack_device__(self):
                return jnp.asarray(x).__dlpack_device__()

        expected = brute_force(q, x, k=3)
        for rows in (mapped, Exporter()):
            np.testing.assert_array_equal(brute_force(q, rows, k=3).ids, expected.ids)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        q, x = data(200, 64, 3)
        q, x = jnp.asarray(q * 300, dtype), jnp.asarray(x * 300, dtype)
        expected = brute_force(q.astype(jnp.float32), x.astype(jnp.float32), k=4, metric="l2")
        assert_same(brute_force(q, x, k=4, metric="l2"), expected)

    def test_shapes(self):
        q, x = data(20, 4, 3)
        assert brute_force(q[0], x, k=2).ids.shape == (2,)
        assert brute_force(q[0].tolist(), x, k=2).scores.shape == (2,)
        assert brute_force(np.zeros((0, 4)), x, k=2).ids.shape == (0, 2)
        assert brute_force([], x, k=2).ids.shape == (0, 2)
        padded = brute_force(q, x, k=25)
        assert padded.ids.shape == (3, 25)
        assert (np.asarray(padded.ids[:, 20:]) == -1).all()
        assert np.isneginf(padded.scores[:, 20:]).all()
        empty = brute_force(q, x[:0], k=2)
        assert (np.asarray(empty.ids) == -1).all()
        assert np.isneginf(empty.scores).all()

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"queries": np.ones((2, 5))}, ValueError, r"queries .*, 4, got width 5"),
            ({"queries": np.ones(3)}, ValueError, r"queries .*, 4, got width 3"),
            ({"queries": np.ones((1, 2, 4))}, ValueError, r"queries must have one axis or two"),
            ({"queries": ["a", "b"]}, TypeError, r"queries must hold real numbers"),
            ({"x": np.ones(4)}, ValueError, r"x must have two axes"),
            ({"x": np.ones((4, 0))}, ValueError, r"x must have at least one column"),
            ({"x": np.ones((4, 4), complex)}, TypeError, r"x must hold real numbers"),
            ({"x": [[1.0, 2.0], [3.0]]}, ValueError, r"x must be a rectangular"),
            ({"k": 0}, ValueError, r"k must be at least 1, got 0"),
            ({"k": -3}, ValueError, r"k must be at least 1, got -3"),
            ({"k": 2.0}, TypeError, r"k must be an integer, got 2.0"),
            ({"k": True}, TypeError, r"k must be an integer, got True"),
            ({"k": None}, TypeError, r"k must be an integer, got None"),
            ({"metric": "L2"}, ValueError, r"metric must be one of dot, cosine, l2, got 'L2'"),
        ],
    )
    def test_wrong_arguments(self, change, error, message):
        arguments = {"queries": np.ones((2, 4)), "x": np.ones((6, 4)), "k": 2, "metric": "dot"}
        arguments.update(change)
        with pytest.raises(error, match=message):
            brute_force(
                arguments["queries"], arguments["x"], k=arguments["k"], metric=arguments["metric"]
            )

    def test_traced_k(self):
        with pytest.raises(TypeError, match="k must be a Python int, got a traced value"):
            jax.jit(lambda k: brute_force(np.ones((1, 2)), np.ones((3, 2)), k=k))(2)

    def test_float64_beyond_float32(self):
        with pytest.raises(ValueError, match=r"x must be finite: 1 of 3 .* row 1$"):
            brute_force([[1.0]], np.array([[1.0], [1e300], [2.0]]), k=1)

    def test_numpy_integer_k(self):
        q, x = data(20, 4, 3)
        assert brute_force(q, x, k=np.int64(2)).ids.shape == (3, 2)


def test_memory_does_not_grow_with_the_scores():
    b, n, d = 600, 200_000, 8
    lowered = exact._brute_force.lower(
        jax.ShapeDtypeStruct((b, d), jnp.float32),
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        k=10,
        metric="dot",
        target=1.0,
    )
    analysis = lowered.compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 40e6  # all scores of 600 queries: 480 MB
