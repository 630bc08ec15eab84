import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xla_kernels import dot_top_k, library, pack_rows, rescore_top_k
from xla_kernels.rescore.layout import unpack_rows

RNG = np.random.default_rng(0)


def int_problem(n, d, b):
    """Integer queries whose largest component is 127 round to themselves."""
    queries = RNG.integers(-126, 127, (b, d)).astype(np.float32)
    if d:
        queries[:, 0] = 127
    return queries, RNG.integers(-128, 128, (n, d)).astype(np.int8)


def best(scores, k, valid=None):
    scores = scores if valid is None else np.where(valid, scores, -np.inf)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    top = np.take_along_axis(scores, ids, axis=1)
    ids[top == -np.inf] = -1
    missing = ((0, 0), (0, k - ids.shape[1]))
    return np.pad(top, missing, constant_values=-np.inf), np.pad(ids, missing, constant_values=-1)


class Suite:
    implementation = None

    @pytest.mark.parametrize("shape", [(0, 5, 2), (33, 7, 9), (500, 100, 11), (50, 0, 0)], ids=str)
    def test_dot_is_the_integer_product(self, shape):
        n, d, b = shape
        queries, rows = int_problem(n, d, b)
        product = queries.astype(np.int64) @ rows.T.astype(np.int64)
        scale = RNG.integers(-2, 4, n).astype(np.float32)
        valid = RNG.random((b, n)) < 0.6
        for terms, scores in (
            ({}, product),
            ({"scale": scale}, product * scale),
            ({"valid": valid}, product),
        ):
            got = dot_top_k(queries, rows, 12, implementation=self.implementation, **terms)
            want = best(scores.astype(np.float32), 12, terms.get("valid"))
            np.testing.assert_array_equal(got[1], want[1])
            np.testing.assert_array_equal(got[0], want[0])

    def test_dot_extremes_and_bad_queries(self):
        rows = np.full((20, 2000), -128, np.int8)
        rows[7] = 127
        queries = np.full((3, 2000), 1.0, np.float32)
        queries[1, 5] = np.nan
        queries[2] = 0
        scores, ids = dot_top_k(queries, pack_rows(rows), 2, implementation=self.implementation)
        np.testing.assert_array_equal(ids, [[7, 0], [-1, -1], [0, 1]])
        np.testing.assert_allclose(scores[0], [127 * 2000, -128 * 2000], rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8], ids=str)
    def test_rescore(self, dtype):
        rows = jnp.asarray(RNG.integers(-50, 50, (90, 37)), dtype)
        queries = RNG.integers(-5, 5, (4, 37)).astype(np.float32)
        candidates = RNG.integers(-3, 95, (4, 40)).astype(np.int32)
        scale = RNG.integers(1, 3, 90).astype(np.float32)
        scores = (queries @ np.asarray(rows, np.float32).T) * scale
        offered = np.zeros((4, 90), bool)
        for q in range(4):
            inside = candidates[q][(candidates[q] >= 0) & (candidates[q] < 90)]
            offered[q, inside] = True
        got = rescore_top_k(
            queries, rows, candidates, 45, scale=scale, implementation=self.implementation
        )
        want = best(scores.astype(np.float32), 45, offered)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_array_equal(got[0], want[0])

    def test_distances(self):
        rows = jnp.asarray(RNG.integers(-9, 9, (50, 37)), jnp.float32)
        queries = jnp.asarray(RNG.integers(-5, 5, (4, 37)), jnp.float32)
        candidates = jnp.asarray(
            RNG.permuted(np.tile(np.arange(50, dtype=np.int32), (4, 1)), axis=1)
        )

        def found(queries, rows):
            return rescore_top_k(
                queries, rows, candidates, 50, euclidean=True, implementation=self.implementation
            )

        def wanted(queries, rows):
            return -jnp.sum((queries[:, None, :] - rows[None]) ** 2, axis=2)

        scores, ids = found(queries, rows)
        want = best(np.asarray(wanted(queries, rows)), 50, np.ones((4, 50), bool))
        np.testing.assert_array_equal(ids, want[1])
        np.testing.assert_array_equal(scores, want[0])
        one, two = (
            jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1))(queries, rows)
            for f in (lambda *a: found(*a)[0], wanted)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, two)

    @pytest.mark.parametrize("shape", [(0, 3, 2, 4), (5, 3, 0, 4), (5, 0, 2, 3), (5, 3, 2, 0)])
    def test_rescore_empty(self, shape):
        n, d, b, r = shape
        candidates = jnp.zeros((b, r), jnp.int32)
        scores, ids = rescore_top_k(
            jnp.ones((b, d)), jnp.ones((n, d)), candidates, 3, implementation=self.implementation
        )
        assert scores.shape == ids.shape == (b, 3)
        if n == 0 or r == 0:
            assert (ids == -1).all()

    def test_rescore_gradients_and_vmap(self):
        rows = jnp.asarray(RNG.normal(size=(30, 9)), jnp.float32)
        queries = jnp.asarray(RNG.normal(size=(4, 9)), jnp.float32)
        scale = jnp.asarray(RNG.uniform(1, 2, 30), jnp.float32)
        candidates = jnp.asarray(RNG.integers(0, 30, (4, 12)), jnp.int32)

        def loss(queries, rows, scale):
            scores, ids = rescore_top_k(
                queries, rows, candidates, 3, scale=scale, implementation=self.implementation
            )
            return (scores**2).sum(), ids

        grads, ids = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(queries, rows, scale)
        want = jax.grad(
            lambda q, x, s: (jnp.einsum("bd,brd->br", q, x[ids]) * s[ids] ** 1).__pow__(2).sum(),
            argnums=(0, 1, 2),
        )(queries, rows, scale)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), grads, want
        )

        def one(query, wanted):
            return rescore_top_k(
                query[None], rows, wanted[None], 3, scale=scale, implementation=self.implementation
            )[1][0]

        np.testing.assert_array_equal(jax.vmap(one)(queries, candidates), ids)

    def test_dot_vmap(self):
        queries, rows = int_problem(100, 12, 6)
        packed = pack_rows(rows)
        valid = jnp.asarray(RNG.random(100) < 0.5)

        def one(query):
            return dot_top_k(
                query[None], packed, 4, valid=valid, implementation=self.implementation
            )[1][0]

        whole = dot_top_k(queries, packed, 4, valid=valid, implementation=self.implementation)[1]
        np.testing.assert_array_equal(jax.vmap(one)(jnp.asarray(queries)), whole)


class TestReference(Suite):
    implementation = "reference"


@pytest.mark.usefixtures("compiled")
class TestCompiled(Suite):
    implementation = "cpu"

    @pytest.fixture(autouse=True)
    def level(self, simd):
        self.simd = simd


def test_unpack_inverts_pack():
    rows = RNG.integers(-128, 128, (45, 10)).astype(np.int8)
    np.testing.assert_array_equal(unpack_rows(pack_rows(rows)), rows)


def test_bad_arguments_are_named():
    queries, rows = np.zeros((2, 4), np.float32), np.zeros((9, 4), np.int8)
    ids = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match="k must be"):
        dot_top_k(queries, rows, 0)
    with pytest.raises(ValueError, match="width 3"):
        dot_top_k(queries[:, :3], rows, 1)
    with pytest.raises(ValueError, match="rows must be int8"):
        dot_top_k(queries, queries, 1)
    with pytest.raises(ValueError, match="scale must be"):
        dot_top_k(queries, rows, 1, scale=np.zeros(8, np.float32))
    with pytest.raises(ValueError, match="valid must be"):
        dot_top_k(queries, rows, 1, valid=np.zeros(8, bool))
    with pytest.raises(ValueError, match="candidates must be"):
        rescore_top_k(queries, rows, ids[:1], 1)
    with pytest.raises(ValueError, match="candidates must be"):
        rescore_top_k(queries, rows, ids.astype(np.uint8), 1)
    if library.load().handle is not None:
        with pytest.raises(ValueError, match="need float32 rows"):
            rescore_top_k(queries, rows, ids, 1, euclidean=True, implementation="cpu")
    with pytest.raises(ValueError, match="rows must be float32"):
        rescore_top_k(queries, rows.astype(np.int32), ids, 1)
