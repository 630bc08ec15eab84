"""Binary quantization: the codec, the gradients of the bits, the refinement of codes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from codec_suite import CodecSuite

import avq_jax
from avq_jax.evaluation import clustered
from avq_jax.quantization.binary_gradient import Weights, batch_loss, real_bits
from avq_jax.quantization.bits import from_bits, refine_codes, solve_decoder, to_bits
from avq_jax.quantization.rows import Rows, quadratic_form

N, DIM, BITS = 200, 10, 18
KEY = jax.random.key(1)

# The shapes of the suite, so that learning compiles once.
fit_binary = functools.partial(
    avq_jax.fit_binary, num_bits=BITS, num_steps=200, batch_size=64, log_every=100
)


@pytest.fixture(scope="module")
def data():
    x = clustered(jax.random.key(0), N, DIM, norm_spread=0.3)
    norms = jnp.linalg.norm(x, axis=1)
    return x, avq_jax.scaling(avq_jax.Threshold(0.4), norms, dim=DIM)


@pytest.fixture(scope="module")
def learned(data):
    return fit_binary(KEY, *data)


class BinarySuite(CodecSuite):
    """A sum over all bits rounds in another order in a batch or under jit: 1e-6 of its terms."""

    def test_table_scores_equal_products_with_decoded_rows(self, learned):
        codec, _, _, codes = learned
        queries = jax.random.normal(jax.random.key(2), (3, self.dim))
        tables = avq_jax.lookup_table(codec, queries)
        alone = avq_jax.lookup_table(codec, queries[1])
        np.testing.assert_allclose(tables[1], alone, rtol=1e-6, atol=1e-6)
        exact = np.asarray(queries, np.float64) @ np.asarray(avq_jax.decode(codec, codes)).T
        for table, expected in zip(tables, exact, strict=True):
            np.testing.assert_allclose(
                self.scores(table, codes), expected, rtol=1e-5, atol=1e-5 * np.abs(exact).max()
            )

    def test_jit(self, learned):
        codec, x, scaling, codes = learned
        np.testing.assert_array_equal(jax.jit(avq_jax.encode)(codec, x, scaling).codes, codes.codes)
        for function, argument in ((avq_jax.decode, codes), (avq_jax.lookup_table, x[0])):
            inside = jax.jit(function)(codec, argument)
            np.testing.assert_allclose(inside, function(codec, argument), rtol=1e-6, atol=1e-6)


class TestRefined(BinarySuite):
    def make(self, key, x, scaling):
        return fit_binary(key, x, scaling)[0]


@pytest.mark.full
class TestSigns(BinarySuite):
    def make(self, key, x, scaling):
        return fit_binary(key, x, scaling, refine=0, num_bits=40, num_steps=2000)[0]

    def test_encoding_beats_random_codes(self, learned):
        """Signs do not search for the best code of a row: they win by less."""
        codec, x, scaling, codes = learned
        draws = jax.random.randint(jax.random.key(3), codes.codes.shape, 0, 16)
        best, drawn = (loss_of(codec, c, x, scaling) for c in (codes.codes, draws))
        assert float(jnp.mean(best <= drawn)) > 0.9
        assert float(best.mean()) < 0.8 * float(drawn.mean())


def loss_of(codec, codes, x, scaling):
    return avq_jax.score_aware_loss(x, avq_jax.decode(codec, codes), scaling)


REFINE = jax.jit(refine_codes)  # the number of sweeps is no shape: one compilation


@pytest.fixture(scope="module")
def problem():
    """Twelve bits, sixteen rows, two further directions each."""
    keys = jax.random.split(jax.random.key(7), 6)
    n, d, h = 16, 5, 12
    rows = Rows(
        jax.random.normal(keys[0], (n, d)),
        avq_jax.Scaling(jnp.linspace(1.0, 9.0, n), jnp.linspace(2.0, 0.5, n)),
        jax.random.normal(keys[1], (n, d)),
        avq_jax.QueryTerms(jax.random.normal(keys[2], (n, 2, d)), jnp.full((n, 2), 0.4)),
    )
    decoder = jax.random.normal(keys[3], (h, d)) / 3
    offset = jax.random.normal(keys[4], (d,)) / 5
    codes = jax.random.randint(keys[5], (h // 4, n), 0, 16)
    return rows, decoder, offset, codes


def exact_losses(rows, decoder, offset, bits):
    """Float64 losses of signs ``[h, n]``, straight from Definition 4.1."""
    x, decoder, offset = (np.asarray(v, np.float64) for v in (rows.x, decoder, offset))
    r = x - (np.asarray(bits, np.float64).T @ decoder + offset)
    u = np.asarray(rows.direction, np.float64)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    a, p = np.asarray(rows.scaling.orthogonal), np.asarray(rows.scaling.parallel)
    extra = np.einsum("nrd,nd->nr", np.asarray(rows.extra.directions, np.float64), r)
    return (
        a * (r**2).sum(1)
        + (p - a) * (u * r).sum(1) ** 2
        + (np.asarray(rows.extra.weights) * extra**2).sum(1)
    )


def test_bits_and_codes_are_inverse():
    codes = jax.random.randint(KEY, (3, 7), 0, 16)
    bits = to_bits(codes)
    assert set(np.unique(np.asarray(bits))) == {-1.0, 1.0}
    np.testing.assert_array_equal(from_bits(bits), codes)
    assert to_bits(jnp.array([[5]]))[:, 0].tolist() == [1, -1, 1, -1]


def test_refinement_ends_where_no_flip_helps(problem):
    rows, decoder, offset, codes = problem
    form = quadratic_form(rows, 1)
    before = exact_losses(rows, decoder, offset, to_bits(codes))
    for sweeps in (1, 50):
        found = REFINE(decoder, offset, form, codes, num_sweeps=sweeps)
        after = exact_losses(rows, decoder, offset, to_bits(found))
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    bits = np.asarray(to_bits(found))
    for i in range(len(bits)):
        flipped = bits.copy()
        flipped[i] *= -1
        assert (exact_losses(rows, decoder, offset, flipped) >= after * (1 - 1e-5)).all()
    # Nor does any other word of a group of four bits.
    words = np.asarray(to_bits(jnp.arange(16)[None])).T
    for g, word in itertools.product(range(3), words):
        other = bits.copy()
        other[4 * g : 4 * g + 4] = word[:, None]
        worse = exact_losses(rows, decoder, offset, other)
        assert (worse >= after * (1 - 1e-5)).all()


def test_four_bits_are_refined_to_the_optimum(problem):
    rows, decoder, offset, codes = problem
    form = quadratic_form(rows, 1)
    only = decoder.at[4:].set(0)
    found = REFINE(only, offset, form, codes, num_sweeps=1)
    words = [to_bits(jnp.full((3, 16), word)) for word in range(16)]
    every = [exact_losses(rows, only, offset, bits) for bits in words]
    np.testing.assert_array_equal(found[0], np.argmin(every, axis=0))


def test_decoder_is_the_minimum_for_its_codes(problem):
    rows, decoder, offset, codes = problem
    # More rows than unknown bits, so that the minimum is one point.
    rows = jax.tree.map(lambda v: jnp.concatenate([v, v[::-1] * 0.7, v * 1.3]), rows)
    codes = jax.random.randint(KEY, (3, 48), 0, 16)
    real = real_bits(10)
    decoder = jnp.where(real[:, None], decoder, 0)
    new, shift = jax.jit(solve_decoder)(decoder, offset, codes, rows, real)
    bits = to_bits(codes)
    best = exact_losses(rows, new, shift, bits).mean()
    assert best < exact_losses(rows, decoder, offset, bits).mean()
    np.testing.assert_array_equal(new[10:], 0)
    for seed in range(5):
        step = np.random.default_rng(seed).normal(size=new.shape) * np.asarray(real)[:, None]
        for eps in (0.05, -0.05):
            moved = exact_losses(rows, new + eps * step, shift + eps * step[0], bits)
            assert moved.mean() > best


def test_stochastic_neuron_is_unbiased(problem):
    rows, decoder, offset, _ = problem
    form = quadratic_form(jax.tree.map(lambda v: v[:3], rows), 1)
    weights = Weights(
        jax.random.normal(KEY, (4, 5)) / 2, jnp.array([0.3, -0.5, 0.0, 1.0]), decoder[:4], offset
    )
    words = np.asarray(list(itertools.product([-1.0, 1.0], repeat=4)), np.float32)

    def expected(weights):
        """E[l] by enumeration of the sixteen codes."""
        z = weights.encoder @ form.x[0] + weights.threshold[:, None]
        total = 0.0
        for word in words:
            bits = jnp.broadcast_to(jnp.asarray(word)[:, None], z.shape)
            r = form.x[0] - weights.decoder.T @ bits - weights.offset[:, None]
            projection = jnp.einsum("rdb,db->rb", form.directions[:, 0], r)
            loss = form.isotropic * jnp.sum(r * r, axis=0)
            loss = loss + jnp.sum(form.weights * projection**2, axis=0)
            total = total + jnp.mean(loss * jnp.prod(jax.nn.sigmoid(bits * z), axis=0))
        return total

    exact = jax.jit(jax.grad(expected))(weights)

    @jax.jit
    def sample(keys):
        estimate = jax.vmap(
            lambda key: jax.grad(lambda w: batch_loss(w, key, form, "stochastic_neuron")[0])(
                weights
            )
        )(keys)
        return jax.tree.map(lambda v: (v.mean(0), v.std(0) / np.sqrt(len(keys))), estimate)

    mean = sample(jax.random.split(jax.random.key(11), 20_000))
    for name in Weights._fields:
        value, error = getattr(mean, name)
        gap = np.abs(np.asarray(value - getattr(exact, name)))
        assert (gap < 4.5 * np.asarray(error) + 1e-5).all(), name
        assert np.abs(getattr(exact, name)).max() > 0.05, name


def test_straight_through_passes_the_gradient_where_the_sign_is_near(problem):
    rows, decoder, offset, _ = problem
    form = quadratic_form(jax.tree.map(lambda v: v[:1], rows), 1)
    # z of 0.5, -0.5, 3 and -3: the last two are beyond the reach of the estimator.
    threshold = jnp.array([0.5, -0.5, 3.0, -3.0])
    weights = Weights(jnp.zeros((4, 5)), threshold, decoder[:4], offset)
    gradient = jax.jit(jax.grad(lambda w: batch_loss(w, KEY, form, "straight_through")[0]))(weights)

    def by_bits(bits):
        r = form.x[0] - weights.decoder.T @ bits[:, None] - weights.offset[:, None]
        projection = jnp.einsum("rdb,db->rb", form.directions[:, 0], r)
        return jnp.sum(
            form.isotropic * jnp.sum(r * r, axis=0) + jnp.sum(form.weights * projection**2, axis=0)
        )

    expected = jax.jit(jax.grad(by_bits))(jnp.sign(threshold))
    np.testing.assert_allclose(gradient.threshold[:2], expected[:2], rtol=1e-4)
    np.testing.assert_array_equal(gradient.threshold[2:], 0)


def test_history_and_loss(data, learned):
    codec, history = learned
    codes = avq_jax.encode(codec, *data)
    assert float(history.loss[-1]) == pytest.approx(
        float(loss_of(codec, codes, *data).mean()), rel=1e-4
    )
    alternations = history.loss[2:]
    assert (np.diff(alternations) <= 0).all()
    assert alternations[-1] < 0.7 * history.loss[1]
    assert history.usage.shape == history.loss.shape
    assert history.usage[-1] == 1.0
    assert codec.bits == BITS


def test_encode_refines_as_told(data, learned):
    codec, _ = learned
    x, scaling = data
    losses = [
        loss_of(codec, avq_jax.encode(codec, x, scaling, refine=sweeps), x, scaling)
        for sweeps in (0, 10)
    ]
    assert bool((losses[1] <= losses[0] * (1 + 1e-5)).all())
    assert float(losses[1].mean()) < 0.8 * float(losses[0].mean())
    z = x @ codec.encoder.T + codec.threshold[None]
    signs = avq_jax.encode(codec, x, scaling, refine=0)
    np.testing.assert_array_equal(signs.codes, from_bits(z.T).T.astype(jnp.uint8))


def test_added_bits_stay_off(data, learned):
    codec, _ = learned
    assert codec.decoder.shape == (20, DIM)
    codes = avq_jax.encode(codec, *data).codes
    assert int(codes[:, -1].max()) < 4
    np.testing.assert_array_equal(codec.decoder[BITS:], 0)


def test_table_has_the_offset_once(learned):
    codec, _ = learned
    zero = avq_jax.decode(codec, jnp.zeros((1, 5), jnp.uint8))[0]
    q = jnp.arange(DIM, dtype=jnp.float32)
    table = avq_jax.lookup_table(codec, q)
    assert table.shape == (5, 16)
    assert float(table[:, 0].sum()) == pytest.approx(float(q @ zero), rel=1e-4)


def test_one_argument_changes_the_loss(data, learned):
    x, scaling = data
    plain, _ = fit_binary(KEY, x, None)
    ours = loss_of(learned[0], avq_jax.encode(learned[0], x, scaling), x, scaling).mean()
    theirs = loss_of(plain, avq_jax.encode(plain, x), x, scaling).mean()
    assert float(ours) < 0.9 * float(theirs)


@pytest.mark.full
@pytest.mark.parametrize("gradient", ["straight_through", "stochastic_neuron"])
def test_both_gradients_learn(data, gradient):
    start, _ = fit_binary(KEY, *data, num_steps=0, refine=0, gradient=gradient)
    codec, _ = fit_binary(KEY, *data, num_steps=2000, refine=0, gradient=gradient)
    before, after = (
        float(loss_of(c, avq_jax.encode(c, *data), *data).mean()) for c in (start, codec)
    )
    assert after < 0.9 * before


def test_same_key_same_codec(data, learned):
    again, _ = fit_binary(KEY, *data)
    jax.tree.map(np.testing.assert_array_equal, again, learned[0])
    other, _ = fit_binary(jax.random.key(2), *data)
    assert not np.array_equal(other.encoder, learned[0].encoder)


@pytest.mark.full
def test_jit_and_vmap(data, learned):
    fit = functools.partial(fit_binary, num_iterations=2, tolerance=0.0)
    codec, history = fit(KEY, *data)
    _, inside_history = jax.jit(fit)(KEY, *data)
    assert inside_history.loss.shape == (4,)
    np.testing.assert_allclose(inside_history.loss, history.loss, rtol=1e-2)
    keys = jax.random.split(KEY, 2)
    mapped, mapped_history = jax.vmap(lambda key: fit(key, *data))(keys)
    assert mapped.encoder.shape == (2, *codec.encoder.shape)
    assert np.isfinite(mapped_history.loss).all()


def test_callback_stops(data):
    seen = []

    def callback(codec):
        seen.append(codec)
        return len(seen) == 2

    _, history = fit_binary(KEY, *data, callback=callback)
    assert isinstance(seen[0], avq_jax.BinaryCodec)
    assert history.loss.shape == (2,)


def test_a_loss_that_is_not_finite_raises_with_the_last_good_codec(data):
    with pytest.raises(FloatingPointError, match=r"at step \d+; the last good state") as caught:
        fit_binary(KEY, *data, optimizer=optax.sgd(1e25))
    codec = caught.value.state
    assert isinstance(codec, avq_jax.BinaryCodec)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(codec))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rows_of_any_size(data, learned, size):
    x, scaling = data
    _, history = fit_binary(KEY, size * x, scaling)
    assert float(history.loss[-1]) / size**2 == pytest.approx(float(learned[1].loss[-1]), rel=0.05)


def test_half_precision_rows(data):
    x, scaling = data
    half = np.asarray(x, np.float16)
    codec, _ = fit_binary(KEY, half, scaling)
    exact, _ = fit_binary(KEY, half.astype(np.float32), scaling)
    np.testing.assert_array_equal(codec.decoder, exact.decoder)


@pytest.mark.parametrize("kind", ["equal", "zero", "constant columns"])
def test_degenerate_rows(data, kind):
    x = np.array(data[0])
    if kind == "equal":
        x[:] = x[0]
    elif kind == "zero":
        x[::2] = 0
    else:
        x[:, :3] = 1.0
    codec, history = fit_binary(KEY, x, data[1])
    assert np.isfinite(history.loss).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(codec))
    if kind == "equal":
        assert float(history.loss[-1]) < 1e-4


def test_bad_arguments(data, learned):
    x, scaling = data
    with pytest.raises(ValueError, match=r"x must be finite: 1 of 200 rows .* the first is row 7"):
        fit_binary(KEY, x.at[7, 2].set(jnp.nan), scaling)
    with pytest.raises(ValueError, match="num_bits must be at least 1, got 0"):
        fit_binary(KEY, x, scaling, num_bits=0)
    with pytest.raises(ValueError, match="refine must be at least 0, got -1"):
        fit_binary(KEY, x, scaling, refine=-1)
    with pytest.raises(ValueError, match="gradient must be 'straight_through' or"):
        fit_binary(KEY, x, scaling, gradient="reinforce")
    with pytest.raises(TypeError, match="optimizer must be an optax"):
        fit_binary(KEY, x, scaling, optimizer=0.1)
    with pytest.raises(ValueError, match=r"codes must be integers \[n, 5\]"):
        avq_jax.decode(learned[0], jnp.zeros((3, 4), jnp.uint8))
