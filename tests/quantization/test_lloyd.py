"""Lloyd's algorithm: the loss never rises, whatever the data, sizes and weights."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.evaluation.datasets import clustered
from avq_jax.quantization import lloyd


def data(n=96, d=6, seed=0):
    return np.asarray(clustered(jax.random.key(seed), n, d, norm_spread=0.3))


def weights(n, eta=4.0):
    return avq_jax.Scaling(jnp.full(n, eta), jnp.ones(n))


def check(state, history, x, scaling, **options):
    """Finite, never rising, and the reported loss is that of the codes."""
    assert np.isfinite(history.loss).all()
    assert (np.diff(history.loss) <= 0).all()
    assert ((history.usage > 0) & (history.usage <= 1)).all()
    assert bool(jnp.isfinite(state.codebook.codewords).all())
    decoded = avq_jax.decode(state.codebook, state.codes)
    loss = avq_jax.score_aware_loss(x, decoded, scaling, **options).mean()
    np.testing.assert_allclose(
        state.loss, loss, rtol=1e-3, atol=1e-6 * float(np.mean(x**2)) + 1e-30
    )


@pytest.mark.parametrize(
    ("n", "d", "m", "k"),
    [
        (40, 1, 1, 5),
        pytest.param(16, 6, 2, 16, marks=pytest.mark.full),
        pytest.param(96, 6, 4, 2, marks=pytest.mark.full),
        pytest.param(96, 6, 1, 3, marks=pytest.mark.full),
        pytest.param(96, 6, 6, 33, marks=pytest.mark.full),
        pytest.param(300, 6, 3, 256, marks=pytest.mark.full),
    ],
)
def test_sizes(n, d, m, k):
    x, scaling = data(n, d), weights(n)
    state, history = avq_jax.fit(
        jax.random.key(1), x, scaling, num_subspaces=m, num_codewords=k, num_iterations=5
    )
    assert state.codebook.codewords.shape == (m, k, -(-d // m))
    assert state.codes.shape == (n, m)
    assert state.codes.dtype == jnp.uint8
    check(state, history, x, scaling)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 50.0, 1e6])
@pytest.mark.parametrize("solver", ["dense", pytest.param("cg", marks=pytest.mark.full)])
def test_any_eta(eta, solver):
    x = data()
    scaling = weights(96, eta)
    sizes = {"num_subspaces": 3, "num_codewords": 4}
    state, history = avq_jax.fit(
        jax.random.key(1), x, scaling, solver=solver, init="random", **sizes
    )
    start = avq_jax.lloyd_init(jax.random.key(1), x, scaling, method="random", **sizes)
    assert (np.diff(history.loss) <= 0).all()
    assert np.isfinite(history.loss).all()
    assert float(state.loss) < float(start.loss)
    check(state, history, x, scaling) if eta <= 50 else None


@pytest.mark.parametrize(
    ("R", "separate"),
    [
        (3, True),
        pytest.param(3, False, marks=pytest.mark.full),
        pytest.param(0, True, marks=pytest.mark.full),
    ],
)
def test_directions_and_query_terms(R, separate):
    n, d = 96, 6
    x, scaling = data(), weights(n)
    options = {}
    if separate:
        options["direction"] = np.asarray(jax.random.normal(jax.random.key(2), (n, d)))
    if R:
        directions = jax.random.normal(jax.random.key(3), (n, R, d))
        options["extra"] = avq_jax.QueryTerms(directions, jnp.ones((n, R)))
    result = avq_jax.fit(jax.random.key(1), x, scaling, num_subspaces=3, num_codewords=4, **options)
    check(*result, x, scaling, **options)


@pytest.mark.parametrize("method", ["random", "k-means++", "reconstruction"])
def test_initialization(method):
    x, scaling = data(), weights(96)
    sizes = {"num_subspaces": 3, "num_codewords": 4}
    state = avq_jax.lloyd_init(jax.random.key(1), x, scaling, method=method, **sizes)
    assert int(state.step) == 0
    if method != "reconstruction":  # codewords are pieces of rows
        pieces = np.asarray(x).reshape(96, 3, 2)
        for j in range(3):
            gap = np.abs(pieces[:, j, None] - np.asarray(state.codebook.codewords[j])).sum(-1)
            assert (gap.min(0) < 1e-6).all()
    again = avq_jax.lloyd_update(state, x, scaling)
    assert int(again.step) == 1
    assert float(again.loss) < float(state.loss)


# In the shape of `data()` and its sizes: what costs time here is compilation.
DEGENERATE = {
    "equal rows": np.tile(np.arange(1, 7, dtype=np.float32), (96, 1)),
    "zero rows": np.zeros((96, 6), np.float32),
    "few distinct rows": np.tile(np.eye(3, 6, dtype=np.float32), (32, 1)),
    "constant columns": np.concatenate([data(96, 3), np.full((96, 3), 7, np.float32)], axis=1),
    "rank one": np.linspace(-1, 1, 96, dtype=np.float32)[:, None] * np.arange(1, 7, dtype="f"),
    "a huge column": data() + np.float32([0, 0, 0, 0, 0, 1e4]),
    "a zero row": np.concatenate([np.zeros((1, 6), np.float32), data(95)]),
    "one tiny row": np.concatenate([np.full((1, 6), 1e-30, np.float32), data(95)]),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("m", [pytest.param(1, marks=pytest.mark.full), 3])
def test_degenerate_data(name, m):
    x, scaling = DEGENERATE[name], weights(96)
    state, history = avq_jax.fit(
        jax.random.key(1), x, scaling, num_subspaces=m, num_codewords=4, solver="dense"
    )
    check(state, history, x, scaling)
    codes = avq_jax.encode(state.codebook, x, scaling).codes
    assert int(codes.max()) < 4
    distinct = len(np.unique(x, axis=0))
    if distinct <= 3:
        assert float(state.loss) <= 1e-9
        assert history.usage[-1] <= distinct / 4


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_rows_of_zero_weight(share):
    x = data()
    on = jnp.arange(96) >= int(96 * share)
    scaling = avq_jax.Scaling(jnp.where(on, 4.0, 0.0), jnp.where(on, 1.0, 0.0))
    state, history = avq_jax.fit(jax.random.key(1), x, scaling, num_subspaces=3, num_codewords=4)
    check(state, history, x, scaling)


def test_parallel_error_alone_is_learned():
    x = data()
    scaling = avq_jax.Scaling(jnp.ones(96), jnp.zeros(96))
    start = avq_jax.lloyd_init(jax.random.key(1), x, scaling, num_subspaces=3, num_codewords=4)
    state, history = avq_jax.fit(
        jax.random.key(1), x, scaling, num_subspaces=3, num_codewords=4, solver="cg"
    )
    check(state, history, x, scaling)
    assert float(state.loss) < 0.5 * float(start.loss)


def test_dead_codewords_are_seeded_again():
    x = data(200, 4)
    far = jnp.full((2, 8, 2), 100.0).at[:, 0].set(0.0)
    codebook = avq_jax.Codebook(far, dim=4)
    start = avq_jax.LloydState(
        codebook, jnp.zeros((200, 2), jnp.uint8), jnp.float32(jnp.inf), jnp.int32(0)
    )
    one = avq_jax.lloyd_update(start, x, weights(200))
    assert float(jnp.abs(one.codebook.codewords).max()) < 10
    two = avq_jax.lloyd_update(one, x, weights(200))
    assert float(two.loss) < 0.9 * float(one.loss)
    assert len(np.unique(np.asarray(two.codes[:, 0]))) > 4


def test_the_score_aware_loss_ends_below_that_of_plain_codes():
    x, scaling = data(), weights(96, 8.0)
    sizes = {"num_subspaces": 3, "num_codewords": 4}
    aware, _ = avq_jax.fit(jax.random.key(1), x, scaling, **sizes)
    plain, _ = avq_jax.fit(jax.random.key(1), x, **sizes)
    decoded = avq_jax.decode(plain.codebook, plain.codes)
    assert float(aware.loss) < 0.8 * float(avq_jax.score_aware_loss(x, decoded, scaling).mean())


def test_same_key_same_bits():
    x, scaling = data(), weights(96)
    sizes = {"num_subspaces": 3, "num_codewords": 4}
    a, b = (avq_jax.fit(jax.random.key(5), x, scaling, **sizes) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    other = avq_jax.fit(jax.random.key(6), x, scaling, **sizes)[0]
    assert not np.array_equal(other.codebook.codewords, a[0].codebook.codewords)


def test_tolerance_stops_early_and_zero_goes_on():
    x, scaling = data(), weights(96)
    sizes = {"num_subspaces": 3, "num_codewords": 4}
    _, loose = avq_jax.fit(jax.random.key(1), x, scaling, tolerance=0.5, **sizes)
    _, tight = avq_jax.fit(jax.random.key(1), x, scaling, tolerance=0, **sizes)
    assert len(loose.loss) <= 2 < len(tight.loss)
    assert len(tight.loss) == 25 or tight.loss[-1] == tight.loss[-2]


def test_callback_sees_states_and_stops():
    seen = []

    def callback(state):
        seen.append((int(state.step), float(state.loss)))
        return len(seen) == 2

    x = data()
    state, history = avq_jax.fit(
        jax.random.key(1), x, num_subspaces=3, num_codewords=4, init="random", callback=callback
    )
    assert [step for step, _ in seen] == [1, 2]
    assert [loss for _, loss in seen] == history.loss.tolist()
    assert int(state.step) == 2


def test_interrupt_leaves_fit_at_once():
    def callback(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        avq_jax.fit(jax.random.key(1), data(), num_subspaces=3, num_codewords=4, callback=callback)


def test_a_signal_is_heard_while_a_step_runs(monkeypatch):
    class Never:
        def is_ready(self):
            return False

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lloyd.time, "sleep", interrupted)
    state = types.SimpleNamespace(loss=Never())
    with pytest.raises(KeyboardInterrupt):
        lloyd._wait.__wrapped__(state) if hasattr(lloyd._wait, "__wrapped__") else lloyd._wait(
            state
        )


def test_a_loss_that_is_not_finite_raises_with_the_last_good_state(monkeypatch):
    step = lloyd._jit_step

    def broken(state, rows, options):
        new, usage = step(state, rows, options)
        return (new._replace(loss=new.loss * jnp.nan) if int(state.step) == 2 else new), usage

    monkeypatch.setattr(lloyd, "_jit_step", broken)
    with pytest.raises(FloatingPointError, match="nan at iteration 2") as caught:
        fit(data(), init="random", tolerance=0)
    assert int(caught.value.state.step) == 2
    assert np.isfinite(float(caught.value.state.loss))


def test_no_iterations():
    state, history = avq_jax.fit(
        jax.random.key(1), data(), num_subspaces=3, num_codewords=4, num_iterations=0
    )
    assert history.loss.shape == (0,)
    assert int(state.step) == 0


def test_progress_is_drawn_when_asked(capsys):
    avq_jax.fit(
        jax.random.key(1), data(), num_subspaces=3, num_codewords=4, num_iterations=2, progress=True
    )
    assert "learning codebooks" in capsys.readouterr().err


# Transformations


def test_jit_equals_the_host_loop():
    x, scaling = data(), weights(96)
    sizes = {"num_subspaces": 3, "num_codewords": 4, "num_iterations": 5}
    state, history = avq_jax.fit(jax.random.key(1), x, scaling, tolerance=0, **sizes)
    inside, losses = jax.jit(lambda k, x, s: avq_jax.fit(k, x, s, **sizes))(
        jax.random.key(1), x, scaling
    )
    assert len(history.loss) == 5
    np.testing.assert_allclose(losses.loss, history.loss, rtol=1e-5)
    np.testing.assert_array_equal(inside.codes, state.codes)


@pytest.mark.parametrize("over", ["scaling", pytest.param("key", marks=pytest.mark.full)])
def test_vmap(over):
    x, sizes = data(), {"num_subspaces": 3, "num_codewords": 4, "num_iterations": 4}
    keys, etas = jax.random.split(jax.random.key(1), 2), jnp.array([1.0, 6.0])

    def learn(key, eta):
        return avq_jax.fit(key, x, weights(96, eta), **sizes)

    if over == "key":
        mapped, _ = jax.vmap(lambda key: learn(key, 6.0))(keys)
    else:
        mapped, _ = jax.vmap(lambda eta: learn(keys[1], eta))(etas)
    single, _ = avq_jax.fit(keys[1], x, weights(96, 6.0), tolerance=0, **sizes)
    np.testing.assert_allclose(mapped.loss[1], single.loss, rtol=1e-4)


def test_new_weights_and_new_data_do_not_retrace():
    sizes = {"num_subspaces": 3, "num_codewords": 4, "num_iterations": 2}
    compiled = (lloyd._jit_start, lloyd._jit_warm, lloyd._jit_step, lloyd._jit_finish)
    avq_jax.fit(jax.random.key(1), data(), weights(96), **sizes)
    before = [f._cache_size() for f in compiled]
    for t in (0.1, 0.5):
        x = data(seed=3) + np.float32(t)
        scaling = avq_jax.scaling(
            avq_jax.Threshold(t), np.linalg.norm(x, axis=1).astype(np.float32), dim=6
        )
        avq_jax.fit(jax.random.key(2), x, scaling, **sizes)
    assert [f._cache_size() for f in compiled] == before


# Faults


def fit(x, scaling=None, **options):
    return avq_jax.fit(
        jax.random.key(0), x, scaling, **{"num_subspaces": 3, "num_codewords": 4} | options
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_subspaces": 7}, "num_subspaces must be at most the width of x, 6; got 7"),
        ({"num_subspaces": 0}, "num_subspaces must be at least 1"),
        ({"num_codewords": 1}, "num_codewords must be at least 2"),
        ({"num_codewords": 257}, "num_codewords must be at most 256"),
        ({"num_codewords": 100}, "x must have at least num_codewords rows .* 100; got 96"),
        ({"num_iterations": -1}, "num_iterations must be at least 0"),
        ({"num_sweeps": 0}, "num_sweeps must be at least 1"),
        ({"tolerance": -1.0}, "tolerance must be >= 0"),
        ({"tolerance": float("nan")}, "tolerance must be >= 0"),
        ({"direction": np.ones((95, 6))}, "direction must have the shape of x"),
    ],
)
def test_errors_name_the_argument_and_the_rule(options, text):
    with pytest.raises(ValueError, match=text):
        fit(data(), **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_raise(bad):
    x = data().copy()
    x[7, 2] = x[9, 0] = bad
    with pytest.raises(ValueError, match=r"x must be finite: 2 of 96 rows .* the first is row 7"):
        fit(x)


def test_scalings_out_of_range_raise():
    for value in (np.nan, -1.0, np.inf):
        parallel = jnp.ones(96).at[5].set(value)
        with pytest.raises(ValueError, match=r"scaling.parallel must be finite and >= 0.* row 5"):
            fit(data(), avq_jax.Scaling(parallel, jnp.ones(96)))
    with pytest.raises(ValueError, match=r"scaling.parallel must have shape \(96,\)"):
        fit(data(), weights(95))


def test_query_terms_out_of_range_raise():
    directions = jnp.ones((96, 2, 6))
    for terms, text in (
        (avq_jax.QueryTerms(directions, jnp.ones((96, 3))), "extra must have directions"),
        (avq_jax.QueryTerms(directions, -jnp.ones((96, 2))), "extra.weights must be >= 0"),
        (avq_jax.QueryTerms(directions * jnp.nan, jnp.ones((96, 2))), "extra.directions must be"),
    ):
        with pytest.raises(ValueError, match=text):
            fit(data(), extra=terms)


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e13, 1e30])
def test_extreme_norms_are_finite_or_raise(scale):
    x = data() * np.float32(scale)
    if scale in (1e-30, 1e30):
        with pytest.raises(ValueError, match="x must have its largest absolute value between"):
            fit(x)
        return
    state, history = fit(x, weights(96))
    assert np.isfinite(history.loss).all()
    unscaled, _ = fit(data(), weights(96))
    assert float(state.loss) / scale**2 == pytest.approx(float(unscaled.loss), rel=0.02)


def test_input_types_and_layouts_give_the_float32_answer(tmp_path):
    x = np.clip(np.round(data() * 40), -120, 120).astype(np.float32)
    expected = fit(x)[0]
    np.save(tmp_path / "x.npy", x)
    frozen = x.copy()
    frozen.flags.writeable = False
    inputs = [
        x.astype(np.float64),
        x.astype(np.int8),
        x.astype(np.float16),
        jnp.asarray(x, jnp.bfloat16),
        x.tolist(),
        np.asfortranarray(x),
        np.repeat(x, 2, axis=0)[::2],
        frozen,
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        jnp.asarray(x),
    ]
    for other in inputs:
        jax.tree.map(np.testing.assert_array_equal, fit(other)[0], expected)


def test_half_precision_rows_whose_square_overflows():
    x = (data() * 2000).astype(np.float16)
    scaling = weights(96)
    jax.tree.map(np.testing.assert_array_equal, fit(x, scaling), fit(x.astype(np.float32), scaling))


def test_a_state_of_other_rows_raises():
    state, _ = fit(data())
    with pytest.raises(ValueError, match="x must have the rows of the state, 96; got 90"):
        avq_jax.lloyd_update(state, data()[:90], None)
    with pytest.raises(ValueError, match="x must have the width of the codec, 6"):
        avq_jax.lloyd_update(state, data(96, 5), None)


@pytest.mark.full
@pytest.mark.parametrize(("m", "k"), [(64, 16), (96, 16), (96, 256), (1, 256)])
def test_wide_rows(m, k):
    rows = 2000 if k == 16 else 800  # many codewords take long
    x, scaling = data(rows, 768), weights(rows)
    state, history = fit(x, scaling, num_subspaces=m, num_codewords=k, num_iterations=3)
    check(state, history, x, scaling)
