"""Additive codebooks: the codec, the codebook step, the learner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite

import avq_jax
from avq_jax.quantization import additive_update
from avq_jax.quantization.rows import Rows, in_blocks


class TestAdditive(CodecSuite):
    def make(self, key, x, scaling):
        return avq_jax.fit_additive(key, x, scaling, num_codebooks=5, num_iterations=4)[0]


def problem(n=120, d=6, m=3, k=4, r=0, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    extra = avq_jax.QueryTerms(draw(n, r, d), np.abs(draw(n, r))) if r else None
    scaling = avq_jax.Scaling(*(np.abs(draw(n)) + c for c in (4, 1)))
    return draw(n, d), draw(m, k, d), rng.integers(0, k, (n, m)), scaling, extra


@pytest.mark.parametrize(("r", "dense"), [(0, True), (2, True), (2, False)])
def test_codebook_step_solves_the_normal_equations(r, dense, monkeypatch):
    x, words, codes, scaling, extra = problem(r=r)
    n, d = x.shape
    m, k, _ = words.shape
    if not dense:
        monkeypatch.setattr(additive_update, "_DENSE_WORDS", 0)
    monkeypatch.setattr(additive_update, "_CG_TOLERANCE", 1e-6)
    monkeypatch.setattr(additive_update, "_CG_ITERATIONS", 100)
    rows = jax.tree.map(jnp.asarray, Rows(x, scaling, None, extra))
    blocks = in_blocks(rows, n)
    blocked = jnp.asarray(codes.T[None], jnp.int32)
    found, used = additive_update.solve_additive(jnp.asarray(words), blocked, blocks)
    assert bool(used.all())

    # Rows of weighted least squares, one for each component of each row's metric.
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    parts, sides = [], []
    for i in range(n):
        a = scaling.orthogonal[i]
        roots = [np.sqrt(a) * np.eye(d), np.sqrt(scaling.parallel[i] - a) * u[i : i + 1]]
        if extra is not None:
            roots.append(np.sqrt(extra.weights[i])[:, None] * extra.directions[i])
        root = np.concatenate(roots)
        hot = np.zeros(m * k)
        hot[np.arange(m) * k + codes[i]] = 1
        parts.append(np.einsum("rd,w->rwd", root, hot).reshape(len(root), -1))
        sides.append(root @ x[i])
    matrix, side = np.concatenate(parts), np.concatenate(sides)
    best = np.linalg.lstsq(matrix, side, rcond=None)[0]
    least = np.sum((matrix @ best - side) ** 2)
    loss = np.sum((matrix @ np.asarray(found, np.float64).reshape(-1) - side) ** 2)
    assert loss <= least * (1 + 1e-4)
    assert least < 0.9 * np.sum((matrix @ words.reshape(-1) - side) ** 2)


def test_unused_words_are_named_and_kept():
    x, words, codes, scaling, _ = problem()
    codes[:, 1] %= 3
    blocks = in_blocks(Rows(jnp.asarray(x), jax.tree.map(jnp.asarray, scaling)), len(x))
    blocked = jnp.asarray(codes.T[None], jnp.int32)
    found, used = additive_update.solve_additive(jnp.asarray(words), blocked, blocks)
    np.testing.assert_array_equal(np.argwhere(~np.asarray(used)), [[1, 3]])
    np.testing.assert_array_equal(found[1, 3], words[1, 3])
    assert bool(jnp.isfinite(found).all())


@pytest.fixture(scope="module")
def learned():
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    scaling = avq_jax.Scaling(np.full(400, 5, np.float32), np.ones(400, np.float32))
    codec, history = avq_jax.fit_additive(
        jax.random.key(0), x, scaling, num_codebooks=4, num_iterations=10, tolerance=0
    )
    return x, scaling, codec, history


def mean_loss(codec, x, scaling, **options):
    rows = avq_jax.decode(codec, avq_jax.encode(codec, x, scaling, **options))
    direction = options.get("direction")
    return float(avq_jax.score_aware_loss(x, rows, scaling, direction=direction).mean())


def test_loss_never_rises_and_beats_product_codes(learned):
    x, scaling, codec, history = learned
    assert (np.diff(history.loss) <= 0).all()
    assert (history.usage > 0.9).all()
    state, _ = avq_jax.fit(jax.random.key(0), x, scaling, num_subspaces=4)
    assert mean_loss(codec, x, scaling) < 0.8 * mean_loss(state.codebook, x, scaling)
    assert mean_loss(codec, x, scaling) < 1.1 * float(history.loss[-1])


def test_rounds_of_search_lower_the_loss(learned):
    x, scaling, codec, _ = learned
    plain = avq_jax.AdditiveCodebook(codec.codewords)
    before, after = (
        avq_jax.score_aware_loss(x, avq_jax.decode(c, avq_jax.encode(c, x, scaling)), scaling)
        for c in (plain, codec)
    )
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.mean()) < 0.95 * float(before.mean())


def test_codes_are_the_best_of_all_where_they_can_be_listed():
    x, words, _, scaling, extra = problem(n=60, d=5, m=3, k=4, r=1)
    every = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    rows = words[np.arange(3), every].sum(axis=1)
    losses = np.stack(
        [
            avq_jax.score_aware_loss(x, np.broadcast_to(row, x.shape), scaling, extra=extra)
            for row in rows
        ]
    )
    kicks = np.random.default_rng(1).integers(0, [3, 4], (60, 2, 2)).astype(np.int32)
    codec = avq_jax.AdditiveCodebook(jnp.asarray(words), jnp.asarray(kicks))
    codes = np.asarray(avq_jax.encode(codec, x, scaling, extra=extra).codes)
    assert (codes == every[losses.argmin(axis=0)]).all(axis=1).mean() > 0.95


def test_direction_is_that_of_the_loss(learned):
    x, scaling, codec, _ = learned
    other = np.roll(x, 1, axis=0)
    with_it = mean_loss(codec, x, scaling, direction=other)
    codes = avq_jax.encode(codec, x, scaling)
    without = avq_jax.score_aware_loss(x, avq_jax.decode(codec, codes), scaling, direction=other)
    assert with_it < 0.9 * float(without.mean())


@pytest.mark.full
def test_same_key_same_codec_also_in_jit(learned):
    x, scaling, codec, history = learned
    options = {"num_codebooks": 4, "num_iterations": 10, "tolerance": 0}
    again, _ = jax.jit(lambda key, x, s: avq_jax.fit_additive(key, x, s, **options))(
        jax.random.key(0), x, scaling
    )
    np.testing.assert_array_equal(again.kicks, codec.kicks)
    # The product codebooks run a fixed number of iterations in jit.
    assert mean_loss(again, x, scaling) == pytest.approx(float(history.loss[-1]), rel=0.1)


def test_weightless_rows_and_repeated_rows():
    x = np.repeat(np.eye(3, 4, dtype=np.float32), 8, axis=0)
    zero = avq_jax.Scaling(np.zeros(24, np.float32), np.zeros(24, np.float32))
    codec, history = avq_jax.fit_additive(
        jax.random.key(0), x, num_codebooks=2, num_codewords=4, num_iterations=6
    )
    assert float(history.loss[-1]) < 1e-6
    np.testing.assert_allclose(avq_jax.decode(codec, avq_jax.encode(codec, x, zero)), x, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_codebooks": 9}, "num_codebooks must be at most the width of x, 8; got 9"),
        ({"num_codebooks": 0}, "num_codebooks must be at least 1"),
        ({"num_codewords": 257}, "num_codewords must be at most 256"),
        ({"num_rounds": -1}, "num_rounds must be at least 0"),
        ({"tolerance": -1.0}, "tolerance must be >= 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x = np.ones((300, 8), np.float32)
    with pytest.raises(ValueError, match=message):
        avq_jax.fit_additive(jax.random.key(0), x, **({"num_codebooks": 2} | change))


def test_codes_of_another_shape_raise():
    codec = avq_jax.AdditiveCodebook(jnp.zeros((3, 5, 7)))
    with pytest.raises(ValueError, match=r"codes must be integers \[n, 3\]"):
        avq_jax.decode(codec, np.zeros((2, 4), np.uint8))
