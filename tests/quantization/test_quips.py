"""QUIPS: codebooks under the second moments of queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite

import avq_jax
from avq_jax.quantization.quips import _best_rows, _factors

KEY = jax.random.key(1)
fit_quips = functools.partial(avq_jax.fit_quips, num_iterations=10, num_rounds=5, progress=False)


class TestMahalanobis(CodecSuite):
    def make(self, key, x, scaling):
        return fit_quips(key, x, num_subspaces=5)[0]


@pytest.mark.full
class TestRotatedMahalanobis(CodecSuite):
    def make(self, key, x, scaling):
        matrix = avq_jax.rotation(key, x, num_subspaces=3)
        codec, _ = fit_quips(key, x @ matrix.T, num_subspaces=3)  # of padded columns
        return avq_jax.Rotated(codec, matrix)


def correlated(n, d, seed=0, spread=0.1):
    rng = np.random.default_rng(seed)
    turn = np.random.default_rng(99).normal(size=(d, d))
    return (rng.normal(size=(n, d)) * np.geomspace(1, spread, d) @ turn).astype(np.float32)


def metric(codec):
    """Matrix of the whole row, one block a subspace."""
    factors = np.asarray(codec.factors, np.float64)
    m, s, _ = factors.shape
    whole = np.zeros((m * s, m * s))
    for j in range(m):
        whole[j * s : (j + 1) * s, j * s : (j + 1) * s] = factors[j] @ factors[j].T
    return whole[: codec.dim, : codec.dim]


def mahalanobis(codec, r):
    return np.einsum("nd,de,ne->n", r, metric(codec), r)


def test_factors_are_those_of_the_second_moments():
    x = correlated(500, 7) + 3  # far from the origin: moments are not centred
    factors, unit = _factors(x, 3)  # widths 3, 3 and 1
    moments = unit * factors @ factors.transpose(0, 2, 1)
    for j, part in enumerate((x[:, :3], x[:, 3:6], x[:, 6:])):
        want = part.astype(np.float64).T @ part / len(x)
        width = part.shape[1]
        np.testing.assert_allclose(moments[j, :width, :width], want, atol=1e-4 * want.max())


def test_codes_are_nearest_in_the_metric_by_enumeration():
    x = correlated(300, 8)
    codec, _ = fit_quips(KEY, x, num_subspaces=2, num_codewords=8)
    codes = np.asarray(avq_jax.encode(codec, x).codes)
    words = np.asarray(codec.codec.codewords, np.float64)
    sigma = metric(codec)
    for j in range(2):
        block = sigma[4 * j : 4 * j + 4, 4 * j : 4 * j + 4]
        gap = x[:, None, 4 * j : 4 * j + 4] - words[None, j]
        cost = np.einsum("nks,st,nkt->nk", gap, block, gap)
        taken = np.take_along_axis(cost, codes[:, j : j + 1].astype(int), axis=1)[:, 0]
        np.testing.assert_allclose(taken, cost.min(axis=1), rtol=1e-3, atol=1e-5 * cost.max())
    # Another metric, other codes: the Euclidean ones differ.
    assert (np.asarray(avq_jax.encode(codec.codec, x).codes) != codes).mean() > 0.02


def test_codewords_are_means_of_their_rows():
    x = correlated(400, 6)
    state_x, _ = fit_quips(KEY, x, num_subspaces=3, num_codewords=4, num_iterations=200)
    codes = np.asarray(avq_jax.encode(state_x, x).codes)
    for j in range(3):
        for word in range(4):
            rows = x[codes[:, j] == word][:, 2 * j : 2 * j + 2]
            got = state_x.codec.codewords[j, word]
            np.testing.assert_allclose(got, rows.mean(axis=0), atol=0.02 * np.abs(x).max())


def test_loss_is_the_expected_squared_error_of_scores():
    x = correlated(400, 6)
    # Independent coordinates: the products between subspaces, which QUIPS leaves out, are zero.
    queries = np.random.default_rng(5).normal(size=(20_000, 6)).astype(np.float32)
    queries *= np.array([3, 1, 1, 0.3, 0.3, 0.1], np.float32)
    codec, history = fit_quips(KEY, x, queries=queries, variant="cov_q", num_subspaces=3)
    r = x - np.asarray(avq_jax.decode(codec, avq_jax.encode(codec, x)))
    assert history.loss[-1] == pytest.approx(np.mean((queries @ r.T) ** 2), rel=0.03)
    assert (np.diff(history.loss) <= 0).all()
    assert (history.usage > 0).all()


def test_errors_go_where_queries_do_not_look():
    x = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    queries = x[:400] * np.tile([1, 0.1], 4).astype(np.float32)
    plain, _ = avq_jax.fit(KEY, x, num_subspaces=4, num_codewords=8, progress=False)
    options = {"num_subspaces": 4, "num_codewords": 8}
    errors = {}
    for name, codec in {
        "plain": plain.codebook,
        "cov_x": fit_quips(KEY, x, **options)[0],
        "cov_q": fit_quips(KEY, x, queries=queries, variant="cov_q", **options)[0],
    }.items():
        r = x - avq_jax.decode(codec, avq_jax.encode(codec, x))
        errors[name] = float(jnp.mean((queries @ r.T) ** 2))
    assert errors["cov_q"] < 0.5 * errors["plain"]
    assert errors["cov_x"] == pytest.approx(errors["plain"], rel=0.15)


@pytest.fixture(scope="module")
def task():
    """Rows of unit length and sample queries."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 16))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), rng.normal(size=(600, 16)).astype(np.float32)


def recall(codec, x, queries):
    decoded = avq_jax.decode(codec, avq_jax.encode(codec, x))
    truth = np.argmax(queries @ x.T, axis=1)
    found = np.argsort(-(queries @ np.asarray(decoded).T), axis=1)[:, :10]
    return (found == truth[:, None]).any(axis=1).mean()


def violation(codec, x, queries):
    """Mean over queries of how far rows come before the best one, summed over rows."""
    scores = queries @ np.asarray(avq_jax.decode(codec, avq_jax.encode(codec, x))).T
    best = np.argmax(queries @ x.T, axis=1)[:, None]
    ahead = np.maximum(scores - np.take_along_axis(scores, best, axis=1), 0)
    return ahead.sum(axis=1).mean()


def test_constraints_are_what_opt_adds(task):
    x, sample = task
    options = {"queries": sample, "num_subspaces": 8, "variant": "opt"}
    free, before = fit_quips(KEY, x, penalty=0, **options)
    codec, after = fit_quips(KEY, x, penalty=0.3, **options)
    assert violation(codec, x, sample) < 0.85 * violation(free, x, sample)
    assert recall(codec, x, sample) > recall(free, x, sample)
    assert after.loss[-1] < after.loss[-5]
    # They cost some of the loss.
    losses = [
        mahalanobis(c, x - np.asarray(avq_jax.decode(c, avq_jax.encode(c, x)))).mean()
        for c in (free, codec)
    ]
    assert losses[0] < losses[1] < 2 * losses[0]
    assert before.loss[-1] < after.loss[-1]


def test_without_penalty_or_rounds_opt_is_cov_q(task):
    x, sample = task
    options = {"queries": sample, "num_subspaces": 8}
    start, before = fit_quips(KEY, x, variant="cov_q", **options)
    none, history = fit_quips(KEY, x, variant="opt", num_rounds=0, **options)
    jax.tree.map(np.testing.assert_array_equal, none, start)
    np.testing.assert_array_equal(history.loss, before.loss)
    # Without a penalty the rounds are more steps of k-means.
    _, history = fit_quips(KEY, x, variant="opt", penalty=0, **options)
    assert 0.95 * before.loss[-1] < history.loss[-1] < 1.02 * before.loss[-1]


def test_best_rows_are_those_of_the_largest_product(task):
    x, sample = task
    found = _best_rows(jnp.asarray(x), jnp.asarray(sample))
    np.testing.assert_array_equal(found, np.argmax(sample @ x.T, axis=1))


def test_same_key_same_codebook(task):
    x, sample = task
    options = {"queries": sample, "num_subspaces": 8, "variant": "opt"}
    one, two = (fit_quips(KEY, x, **options)[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("kind", ["zero", "equal", "constant columns", "rank one", "uneven"])
def test_singular_moments(kind):
    x = correlated(100, 6)
    if kind == "zero":
        x[:] = 0
    elif kind == "equal":
        x[:] = x[0]
    elif kind == "constant columns":
        x[:, 2:5] = 1.5
    elif kind == "rank one":
        x = x[:, :1] * x[:1]
    else:
        x *= np.array([1e6, 1, 1, 1, 1, 1e-6], np.float32)
    codec, history = fit_quips(KEY, x, num_subspaces=2)
    decoded = np.asarray(avq_jax.decode(codec, avq_jax.encode(codec, x)))
    assert np.isfinite(decoded).all()
    assert np.isfinite(history.loss).all()
    assert np.mean((decoded - x) ** 2) <= np.mean(x**2)
    if kind in ("zero", "equal"):
        np.testing.assert_allclose(decoded, x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_scale_of_rows_does_not_matter(size):
    x = correlated(200, 8)
    codec, history = fit_quips(KEY, x, num_subspaces=4)
    other, scaled = fit_quips(KEY, x * np.float32(size), num_subspaces=4)
    same = avq_jax.encode(other, x * np.float32(size)).codes == avq_jax.encode(codec, x).codes
    assert same.mean() > 0.9
    if size < 1:
        assert np.isfinite(scaled.loss).all()
    else:
        np.testing.assert_allclose(scaled.loss[-1], history.loss[-1] * size**4, rtol=0.1)


def test_a_scaling_has_no_effect_and_is_checked():
    x = correlated(200, 8)
    codec, _ = fit_quips(KEY, x, num_subspaces=4)
    scaling = avq_jax.Scaling(np.full(200, 9, np.float32), np.ones(200, np.float32))
    want = avq_jax.encode(codec, x).codes
    np.testing.assert_array_equal(avq_jax.encode(codec, x, scaling, direction=x + 1).codes, want)
    with pytest.raises(ValueError, match="scaling"):
        avq_jax.encode(codec, x[1:], scaling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "cov_q"}, "queries must be a sample of queries for variant 'cov_q'"),
        ({"queries": np.ones((3, 8))}, "queries must be None for variant 'cov_x'"),
        ({"queries": np.ones((3, 7)), "variant": "opt"}, "queries must have the width of x, 8"),
        ({"queries": np.full((3, 8), np.nan), "variant": "opt"}, "queries must be finite"),
        ({"num_subspaces": 9}, "num_subspaces must be at most the width of x, 8"),
        ({"num_codewords": 257}, "num_codewords must be at most 256"),
        ({"penalty": -1}, "penalty must be >= 0"),
        ({"num_constraints": 0}, "num_constraints must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    x = correlated(100, 8)
    with pytest.raises(ValueError, match=message):
        fit_quips(KEY, x, **{"num_subspaces": 4, **options})


def test_bad_rows_and_jit_are_named():
    x = correlated(100, 8)
    x[7, 2] = np.nan
    with pytest.raises(ValueError, match="x must be finite: 1 of 100 rows"):
        fit_quips(KEY, x, num_subspaces=4)
    with pytest.raises(ValueError, match="x must have at least num_codewords rows"):
        fit_quips(KEY, x[10:20], num_subspaces=4)
    with pytest.raises(TypeError, match="fit_quips is a host loop"):
        jax.jit(lambda x: fit_quips(KEY, x, num_subspaces=4)[0])(x[10:])
