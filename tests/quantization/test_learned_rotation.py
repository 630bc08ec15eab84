"""Rotations learned with the codewords, and the choice among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_suite import CodecSuite

import avq_jax
from avq_jax.quantization.lloyd_steps import LloydState, mean_loss
from avq_jax.quantization.procrustes import RotatedState, turn_step
from avq_jax.quantization.rotation import turn_rows
from avq_jax.quantization.rows import Rows


@pytest.mark.full
class TestLearnedRotation(CodecSuite):
    def make(self, key, x, scaling):
        return avq_jax.fit_rotated(
            key, x, scaling, num_subspaces=5, num_iterations=8, method="learned"
        )[0]


def correlated(n=400, d=8, seed=0):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (rng.normal(size=(n, d)) * np.geomspace(8, 0.1, d) @ turn).astype(np.float32)


def anisotropic(n, eta=5.0):
    rng = np.random.default_rng(9)
    return avq_jax.Scaling(
        (eta * rng.uniform(0.5, 1, n)).astype(np.float32), rng.uniform(0.5, 1, n).astype(np.float32)
    )


def product(x, matrix, scaling, direction=None, extra=None, m=4, k=16):
    """The state of a codebook of rows of the turned data, which costs no learning."""
    rows = jax.tree.map(jnp.asarray, Rows(jnp.asarray(x), scaling, direction, extra))
    turned = turn_rows(matrix, rows)
    words = turned.x[:k].reshape(k, m, -1).transpose(1, 0, 2)
    book = avq_jax.Codebook(words, dim=x.shape[1])
    codes = avq_jax.encode(
        book, turned.x, turned.scaling, direction=turned.direction, extra=turned.extra
    ).codes
    loss, _ = mean_loss(words, codes.T.astype(jnp.int32), turned)
    lloyd = LloydState(book, codes, loss, jnp.array(0, jnp.int32))
    return RotatedState(lloyd, matrix, turned), rows


def loss_of(matrix, state, rows):
    """The objective of the rotation step in float64, from its definition."""
    y = np.asarray(avq_jax.decode(state.lloyd.codebook, state.lloyd.codes), np.float64)
    x = np.asarray(rows.x, np.float64)
    r = x - y @ np.asarray(matrix, np.float64)
    u = x if rows.direction is None else np.asarray(rows.direction, np.float64)
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    p, a = (np.asarray(v, np.float64) for v in rows.scaling)
    each = a * (r**2).sum(axis=1) + (p - a) * (u * r).sum(axis=1) ** 2
    if rows.extra is not None:
        along = np.einsum("nrd,nd->nr", np.asarray(rows.extra.directions, np.float64), r)
        each += (np.asarray(rows.extra.weights) * along**2).sum(axis=1)
    return each.mean()


class TestStep:
    @pytest.mark.parametrize("eta", [0.3, 1.0, 5.0, 200.0])
    @pytest.mark.parametrize("terms", [False, True])
    def test_lowers_the_loss_and_stays_orthogonal(self, eta, terms):
        x, rng = correlated(), np.random.default_rng(3)
        direction = extra = None
        if terms:
            direction = rng.normal(size=x.shape).astype(np.float32)
            extra = avq_jax.QueryTerms(
                rng.normal(size=(400, 2, 8)).astype(np.float32), np.full((400, 2), 3, np.float32)
            )
        matrix = avq_jax.rotation(jax.random.key(0), x, method="random")
        state, rows = product(x, matrix, anisotropic(400, eta), direction, extra)
        turn = jax.jit(turn_step)
        losses = [loss_of(matrix, state, rows)]
        np.testing.assert_allclose(state.lloyd.loss, losses[0], rtol=1e-4)
        for _ in range(5):
            state = turn(state, rows)
            losses.append(loss_of(state.matrix, state, rows))
            np.testing.assert_allclose(state.lloyd.loss, losses[-1], rtol=1e-4)
        assert np.all(np.diff(losses) <= 1e-6 * losses[0])
        assert losses[-1] < 0.99 * losses[0]
        np.testing.assert_allclose(state.matrix @ state.matrix.T, np.eye(8), atol=5e-6)
        np.testing.assert_allclose(state.turned.x, x @ state.matrix.T, atol=1e-3)

    def test_isotropic_step_is_the_procrustes_solution(self):
        x = correlated()
        one = avq_jax.Scaling(np.ones(400, np.float32), np.ones(400, np.float32))
        matrix = avq_jax.rotation(jax.random.key(0), x, method="random")
        state, rows = product(x, matrix, one)
        y = np.asarray(avq_jax.decode(state.lloyd.codebook, state.lloyd.codes), np.float64)
        left, _, right = np.linalg.svd(y.T @ x.astype(np.float64))
        np.testing.assert_allclose(turn_step(state, rows).matrix, left @ right, atol=1e-4)

    def test_the_true_rotation_is_found_where_codes_are_right(self):
        # Rows that a codebook decodes without error under R*, seen from a nearby matrix.
        rng = np.random.default_rng(1)
        words = jnp.asarray(rng.normal(size=(4, 16, 2)), jnp.float32)
        codes = jnp.asarray(rng.integers(0, 16, (400, 4)), jnp.uint8)
        book = avq_jax.Codebook(words, dim=8)
        true = np.linalg.qr(rng.normal(size=(8, 8)))[0]
        x = jnp.asarray(np.asarray(avq_jax.decode(book, codes)) @ true, jnp.float32)
        near = np.linalg.qr(true + 0.2 * rng.normal(size=(8, 8)))
        matrix = jnp.asarray(near[0] * np.sign(np.diagonal(near[1])), jnp.float32)
        rows = jax.tree.map(jnp.asarray, Rows(x, anisotropic(400, 8.0)))
        turned = turn_rows(matrix, rows)
        loss, _ = mean_loss(words, codes.T.astype(jnp.int32), turned)
        state = RotatedState(LloydState(book, codes, loss, jnp.int32(0)), matrix, turned)
        turn = jax.jit(turn_step)
        for _ in range(30):
            state = turn(state, rows)
        np.testing.assert_allclose(state.matrix, true, atol=1e-3)

    def test_rows_without_any_weight_turn_nothing(self):
        x = correlated()
        zero = avq_jax.Scaling(np.zeros(400, np.float32), np.zeros(400, np.float32))
        matrix = avq_jax.rotation(jax.random.key(0), x, method="random")
        state, rows = product(x, matrix, zero)
        np.testing.assert_array_equal(turn_step(state, rows).matrix, matrix)


SIZES = {"num_subspaces": 4, "num_codewords": 8, "progress": False}


class TestLearner:
    @pytest.mark.parametrize("start", ["pca", "random"])
    def test_loss_never_rises_and_ends_below_the_fixed_rotation(self, start):
        x, scaling = correlated(), anisotropic(400)
        codec, history = avq_jax.fit_rotated(
            jax.random.key(0), x, scaling, method="learned", start=start, **SIZES
        )
        _, fixed = avq_jax.fit_rotated(jax.random.key(0), x, scaling, method=start, **SIZES)
        assert np.all(np.diff(history.loss) <= 0)
        assert history.loss[-1] < fixed.loss[-1]
        np.testing.assert_allclose(codec.matrix @ codec.matrix.T, np.eye(8), atol=5e-6)
        rows = avq_jax.decode(codec, avq_jax.encode(codec, x, scaling))
        again = float(avq_jax.score_aware_loss(x, rows, scaling).mean())
        assert again < 1.1 * history.loss[-1]

    def test_none_is_the_plain_learner(self):
        x, key = correlated(), jax.random.key(4)
        codec, history = avq_jax.fit_rotated(key, x, method="none", **SIZES)
        plain, past = avq_jax.fit(jax.random.split(key, 3)[2], x, **SIZES)
        np.testing.assert_array_equal(codec.codec.codewords, plain.codebook.codewords)
        np.testing.assert_array_equal(history.loss, past.loss)
        np.testing.assert_array_equal(codec.matrix, np.eye(8))

    def test_the_same_key_gives_the_same_codec(self):
        x = correlated()
        first, second = (
            avq_jax.fit_rotated(jax.random.key(0), x, method="learned", num_iterations=3, **SIZES)[
                0
            ]
            for _ in range(2)
        )
        jax.tree.map(np.testing.assert_array_equal, first, second)

    @pytest.mark.full
    def test_inside_jit(self):
        x = jnp.asarray(correlated())

        @jax.jit
        def learn(key, x):
            return avq_jax.fit_rotated(
                key, x, method="learned", start="random", num_iterations=4, **SIZES
            )

        codec, history = learn(jax.random.key(0), x)
        _, want = avq_jax.fit_rotated(
            jax.random.key(0),
            x,
            method="learned",
            start="random",
            num_iterations=4,
            tolerance=0,
            **SIZES,
        )
        np.testing.assert_allclose(history.loss, want.loss, rtol=1e-3)
        np.testing.assert_allclose(codec.matrix @ codec.matrix.T, np.eye(8), atol=5e-6)
        with pytest.raises(TypeError, match="outside jit"):
            jax.jit(lambda x: avq_jax.fit_rotated(jax.random.key(0), x, **SIZES))(x)

    def test_callback_ends_the_learning(self):
        seen = []
        _, history = avq_jax.fit_rotated(
            jax.random.key(0),
            correlated(),
            method="learned",
            callback=lambda codec: seen.append(codec) or len(seen) == 2,
            **SIZES,
        )
        assert len(history.loss) == 2
        assert all(isinstance(codec, avq_jax.Rotated) for codec in seen)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_subspaces": 9}, "num_subspaces must be at most the width of x, 8"),
            ({"tolerance": -1}, "tolerance must be >= 0"),
        ],
    )
    def test_bad_arguments_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            avq_jax.fit_rotated(jax.random.key(0), correlated(), **SIZES | options)


class TestChoice:
    @pytest.mark.full
    def test_correlated_rows_are_rotated_by_default(self):
        x = correlated(2000)
        codec, _ = avq_jax.fit_rotated(
            jax.random.key(0), x, num_subspaces=4, num_codewords=8, progress=False
        )
        assert np.abs(np.asarray(codec.matrix) - np.eye(8)).max() > 0.1

    @pytest.mark.full
    def test_a_rotation_that_harms_is_not_chosen(self):
        # Independent clusters in each subspace, which a rotation mixes.
        rng = np.random.default_rng(0)
        words = rng.normal(size=(4, 8, 2))
        x = words[np.arange(4), rng.integers(0, 8, (4000, 4))].reshape(4000, 8)
        x = (x + 0.05 * rng.normal(size=x.shape)).astype(np.float32)
        method, losses = avq_jax.choose_rotation(
            jax.random.key(0), x, num_subspaces=4, num_codewords=8, methods=("none", "random")
        )
        assert method == "none"
        assert losses["random"] > 1.5 * losses["none"]

    def test_the_first_method_is_kept_within_the_margin(self):
        x = correlated(1000)
        method, losses = avq_jax.choose_rotation(
            jax.random.key(0), x, num_subspaces=4, num_codewords=8, methods=("pca", "none")
        )
        assert method == "pca"
        assert losses["pca"] < losses["none"]

    def test_residuals_are_judged_with_the_rows_they_come_from(self):
        x = correlated(1200)
        centroid = 20 * np.ones(8, np.float32)
        sizes = {"num_subspaces": 4, "num_codewords": 8, "methods": ("none",)}
        _, alone = avq_jax.choose_rotation(jax.random.key(0), x, **sizes)
        _, behind = avq_jax.choose_rotation(jax.random.key(0), x, direction=x + centroid, **sizes)
        assert np.isfinite(behind["none"])
        assert behind != alone

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"methods": ()}, "methods must name at least one"),
            ({"methods": ("auto",)}, "method must be one of 'none'"),
            ({"sample": 3}, "sample must be at least 8"),
            ({"x": correlated(6)}, "x must have at least 8 rows"),
        ],
    )
    def test_bad_arguments_are_named(self, options, message):
        options = {"x": correlated(), "num_subspaces": 4} | options
        with pytest.raises(ValueError, match=message):
            avq_jax.choose_rotation(jax.random.key(0), **options)
