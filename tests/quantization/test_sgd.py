"""Minibatch gradient descent on product codebooks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avq_jax
from avq_jax.evaluation import clustered
from avq_jax.quantization.rows import Rows
from avq_jax.quantization.sgd import _batch_loss

N, DIM, M, K = 600, 8, 4, 4
KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def data():
    x = clustered(jax.random.key(0), N, DIM, norm_spread=0.3)
    norms = jnp.linalg.norm(x, axis=1)
    return x, avq_jax.scaling(avq_jax.Threshold(0.4), norms, dim=DIM)


# One shape for most tests, so that the steps compile once.
fit_sgd = functools.partial(
    avq_jax.fit_sgd,
    num_subspaces=M,
    num_codewords=K,
    num_steps=300,
    batch_size=128,
    log_every=50,
    init="random",
)


@pytest.fixture(scope="module")
def learned(data):
    return fit_sgd(KEY, *data)


def test_descent_lowers_the_loss(data, learned):
    start, _ = fit_sgd(KEY, *data, num_steps=0)
    assert float(learned[0].loss) < 0.7 * float(start.loss)


@pytest.mark.full
def test_loss_is_close_to_lloyds(data, learned):
    state, _ = learned
    lloyd, _ = avq_jax.fit(KEY, *data, num_subspaces=M, num_codewords=K, init="random")
    assert float(state.loss) < 1.02 * float(lloyd.loss)


def test_state_and_history(data, learned):
    x, scaling = data
    state, history = learned
    assert state.codes.shape == (N, M)
    assert int(state.step) == 300
    each = avq_jax.score_aware_loss(x, avq_jax.decode(state.codebook, state.codes), scaling)
    assert float(state.loss) == pytest.approx(float(each.mean()), rel=1e-5)
    assert history.loss.shape == history.usage.shape == (6,)
    assert history.loss[-1] < history.loss[0]
    assert history.usage.min() > 0.9


@pytest.mark.full
def test_k_means_plus_plus_start(data, learned):
    state, _ = fit_sgd(KEY, *data, init="k-means++")
    assert float(state.loss) < 1.05 * float(learned[0].loss)


@pytest.mark.full
def test_interval_does_not_change_the_codebook(data, learned):
    again, history = fit_sgd(KEY, *data, log_every=70)
    assert history.loss.shape == (5,)
    np.testing.assert_array_equal(again.codebook.codewords, learned[0].codebook.codewords)


def test_same_key_same_codebook(data, learned):
    again, _ = fit_sgd(KEY, *data)
    np.testing.assert_array_equal(again.codebook.codewords, learned[0].codebook.codewords)
    other, _ = fit_sgd(jax.random.key(2), *data)
    assert not np.array_equal(other.codebook.codewords, learned[0].codebook.codewords)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.5, momentum=0.9),
        pytest.param(
            optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.02)),
            marks=pytest.mark.full,
        ),
        pytest.param(optax.rmsprop(0.01), marks=pytest.mark.full),
        pytest.param(optax.lion(0.003), marks=pytest.mark.full),
        pytest.param(optax.adafactor(0.02), marks=pytest.mark.full),
    ],
    ids=["momentum", "clipped-adamw", "rmsprop", "lion", "adafactor"],
)
def test_any_optimizer(data, optimizer):
    start, _ = fit_sgd(KEY, *data, num_steps=0)
    state, _ = fit_sgd(KEY, *data, num_steps=200, optimizer=optimizer)
    assert float(state.loss) < 0.9 * float(start.loss)


def test_gradient_is_that_of_the_mean_loss(data):
    x, scaling = (jax.tree.map(lambda v: v[:32], part) for part in data)
    direction = jax.random.normal(jax.random.key(3), x.shape)
    extra = avq_jax.QueryTerms(
        jax.random.normal(jax.random.key(4), (32, 2, DIM)), jnp.full((32, 2), 0.3)
    )
    codewords = 0.3 * jax.random.normal(jax.random.key(5), (M, K, DIM // M))
    codes = jax.random.randint(jax.random.key(6), (M, 32), 0, K)

    @jax.jit
    @jax.value_and_grad
    def reference(codewords):
        rows = avq_jax.decode(avq_jax.Codebook(codewords, dim=DIM), codes.T)
        return avq_jax.score_aware_loss(x, rows, scaling, direction=direction, extra=extra).mean()

    batch = Rows(x, scaling, direction, extra)
    loss, gradient = jax.jit(jax.value_and_grad(lambda c: _batch_loss(c, codes, batch)[0]))(
        codewords
    )
    expected = reference(codewords)
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_direction_and_extra_enter_the_loss(data):
    x, scaling = data
    direction = x + 0.3
    extra = avq_jax.QueryTerms(x[:, None, ::-1], jnp.ones((N, 1)))
    state, _ = fit_sgd(KEY, x, scaling, direction=direction, extra=extra, num_steps=50)
    rows = avq_jax.decode(state.codebook, state.codes)
    each = avq_jax.score_aware_loss(x, rows, scaling, direction=direction, extra=extra)
    assert float(state.loss) == pytest.approx(float(each.mean()), rel=1e-5)


def test_goes_on_from_a_codebook(data, learned):
    same, history = fit_sgd(KEY, *data, init=learned[0].codebook, num_steps=0)
    np.testing.assert_array_equal(same.codebook.codewords, learned[0].codebook.codewords)
    assert history.loss.shape == (0,)
    with pytest.raises(ValueError, match=r"init must have codewords \[4, 4, 2\]"):
        fit_sgd(KEY, *data, init=avq_jax.Codebook(jnp.zeros((2, 4, 4)), dim=8))


def test_dead_codewords_restart(data, learned):
    far = learned[0].codebook.codewords.at[:, 2:].set(1e3)
    start = avq_jax.Codebook(far, dim=DIM)
    before, _ = fit_sgd(KEY, *data, init=start, num_steps=0)
    state, history = fit_sgd(KEY, *data, init=start)
    assert len(np.unique(np.asarray(before.codes))) == 2
    assert history.usage[-1] == 1.0
    assert float(state.loss) < 0.5 * float(before.loss)


def test_callback_sees_every_interval_and_stops(data):
    seen = []

    def callback(state):
        seen.append((int(state.step), float(state.loss)))
        return len(seen) == 2

    state, history = fit_sgd(KEY, *data, callback=callback)
    assert [step for step, _ in seen] == [50, 100]
    assert int(state.step) == 100
    assert seen[1][1] == float(state.loss)
    assert history.loss.shape == (2,)


def test_a_loss_that_is_not_finite_raises_with_the_last_good_state(data):
    with pytest.raises(FloatingPointError, match=r"at step \d+; the last good state") as caught:
        fit_sgd(KEY, *data, optimizer=optax.sgd(1e25))
    state = caught.value.state
    assert isinstance(state, avq_jax.LloydState)
    assert np.isfinite(state.codebook.codewords).all()
    assert np.isfinite(state.loss)
    assert f"at step {int(state.step)};" in str(caught.value)


def test_jit(data, learned):
    inside, history = jax.jit(fit_sgd)(KEY, *data)
    np.testing.assert_allclose(
        inside.codebook.codewords, learned[0].codebook.codewords, rtol=1e-3, atol=1e-4
    )
    assert history.loss.shape == (6,)


@pytest.mark.full
def test_vmap_over_keys(data):
    keys = jax.random.split(KEY, 2)
    fit = functools.partial(fit_sgd, num_steps=60)
    mapped, history = jax.vmap(lambda key: fit(key, *data))(keys)
    assert history.loss.shape == (2, 2)
    alone, _ = fit(keys[1], *data)
    assert float(mapped.loss[1]) == pytest.approx(float(alone.loss), rel=1e-3)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rows_of_any_size(data, learned, size):
    x, scaling = data
    state, _ = fit_sgd(KEY, size * x, scaling)
    assert float(state.loss) / size**2 == pytest.approx(float(learned[0].loss), rel=0.02)


def test_other_types_of_rows(data, learned):
    x, scaling = data
    for other in (np.asarray(x, np.float64), np.asfortranarray(x)):
        state, _ = fit_sgd(KEY, other, scaling)
        np.testing.assert_array_equal(state.codes, learned[0].codes)
    half = np.asarray(x, np.float16)
    state, _ = fit_sgd(KEY, half, scaling)
    exact, _ = fit_sgd(KEY, half.astype(np.float32), scaling)
    np.testing.assert_array_equal(state.codes, exact.codes)


@pytest.mark.parametrize("kind", ["equal", "few", "zero", "constant columns"])
def test_degenerate_rows(data, kind):
    x = np.array(data[0])
    if kind == "equal":
        x[:] = x[0]
    elif kind == "few":
        x = x[np.arange(N) % 3]
    elif kind == "zero":
        x[::2] = 0
    else:
        x[:, :3] = 1.0
    state, history = fit_sgd(KEY, x, data[1])
    assert np.isfinite(state.loss)
    assert np.isfinite(history.loss).all()
    if kind in ("equal", "few"):
        assert float(state.loss) < 1e-3


def test_bad_arguments(data):
    x, scaling = data
    with pytest.raises(ValueError, match=r"x must be finite: 1 of 600 rows .* the first is row 7"):
        fit_sgd(KEY, x.at[7, 2].set(jnp.nan), scaling)
    with pytest.raises(ValueError, match="at least num_codewords rows"):
        fit_sgd(KEY, x[:3], None)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        fit_sgd(KEY, x, scaling, batch_size=0)
    with pytest.raises(ValueError, match="num_steps must be at least 0, got -1"):
        fit_sgd(KEY, x, scaling, num_steps=-1)
    with pytest.raises(ValueError, match="init must be 'k-means\\+\\+', 'random' or a Codebook"):
        fit_sgd(KEY, x, scaling, init="reconstruction")
    with pytest.raises(TypeError, match="optimizer must be an optax"):
        fit_sgd(KEY, x, scaling, optimizer=0.1)
