"""FAULTS 35 for the layers: a NaN shows in the loss of its step, and the state before is whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avq_jax
from avq_jax import Codebook

BOOK = Codebook(jax.random.normal(jax.random.key(0), (3, 4, 2)), dim=6)
X = jax.random.normal(jax.random.key(1), (48, 6))
BROKEN = X.at[5].set(jnp.nan)


def train_step(params, x):
    """One traced step: the layers cannot raise in it, so its loss has to tell."""

    def loss(params):
        rows = x @ params["encoder"]
        out = avq_jax.quantize(params["book"], rows)
        kept = out.codebook_loss.mean() + out.commitment_loss.mean()
        return jnp.mean((x - out.x_tilde) ** 2) + kept

    value, slope = jax.value_and_grad(loss)(params)
    return optax.apply_updates(params, jax.tree.map(lambda g: -1e-2 * g, slope)), value


def test_a_loop_over_the_layer_sees_the_step_of_a_nan():
    params, step = {"encoder": jnp.eye(6), "book": BOOK}, jax.jit(train_step)
    states, values = [params], []
    for x in (X, X, BROKEN, X):
        params, value = step(params, x)
        states.append(params)
        values.append(float(value))
    # NaN in its own step, not later, and from then on.
    assert np.isnan(values).tolist() == [False, False, True, True]
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(states[:3]))


@pytest.mark.parametrize("field", ["codebook_loss", "commitment_loss"])
def test_the_loss_of_a_broken_row_is_nan_and_of_the_others_is_not(field):
    loss = getattr(jax.jit(avq_jax.quantize)(BOOK, BROKEN), field)
    np.testing.assert_array_equal(np.isnan(loss), np.arange(48) == 5)


def test_soft_rows_of_a_broken_row_are_nan_and_of_the_others_are_not():
    rows = jax.jit(lambda x: avq_jax.soft_quantize(BOOK, x, temperature=0.1))(BROKEN)
    np.testing.assert_array_equal(np.isnan(rows).any(axis=1), np.arange(48) == 5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_broken_codeword_shows_even_where_no_row_would_choose_it(value):
    book = Codebook(BOOK.codewords.at[1, 2].set(value), dim=6)
    out = jax.jit(avq_jax.quantize)(book, X)
    for part in (out.x_tilde, out.codebook_loss, out.commitment_loss):
        assert np.isnan(part).all()


def test_moving_averages_refuse_rows_that_are_not_finite_and_keep_their_state():
    state = avq_jax.ema_init(BOOK)
    codes = avq_jax.quantize(BOOK, X).codes
    before = jax.tree.map(np.asarray, state)
    with pytest.raises(ValueError, match="x must be finite: 1 of 48 rows"):
        avq_jax.ema_update(state, BROKEN, codes)
    with pytest.raises(ValueError, match="x must be finite: 1 of 48 rows"):
        avq_jax.revive(jax.random.key(2), state, BROKEN)
    jax.tree.map(np.testing.assert_array_equal, state, before)
    after = jax.jit(avq_jax.ema_update)(state, BROKEN, codes)
    assert np.isnan(after.codebook.codewords).any()
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_refresh_refuses_rows_that_are_not_finite_and_keeps_the_index():
    index = avq_jax.build(jax.random.key(3), X)
    before = avq_jax.search(index, X[:4], k=5)
    with pytest.raises(ValueError, match="rows must be finite"):
        avq_jax.refresh(index, [5], BROKEN[5:6])
    jax.tree.map(np.testing.assert_array_equal, avq_jax.search(index, X[:4], k=5), before)
