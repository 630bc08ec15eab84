"""The quantization layer: values, gradients, limits, and inside models of three libraries."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import avq_jax
from avq_jax import Codebook, Scaling, Threshold

N, D, M, K = 48, 6, 3, 4


@pytest.fixture(scope="module")
def book():
    return Codebook(jax.random.normal(jax.random.key(0), (M, K, D // M)), dim=D)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (N, D))


@pytest.fixture(scope="module")
def weights(x):
    return avq_jax.scaling(Threshold(0.6), jnp.linalg.norm(x, axis=1), dim=D)


def test_value_is_the_decoded_code(book, x, weights):
    out = avq_jax.quantize(book, x, weights, estimator="rotation", num_sweeps=10)
    codes = avq_jax.encode(book, x, weights).codes
    np.testing.assert_array_equal(out.codes, codes)
    np.testing.assert_array_equal(out.x_tilde, avq_jax.decode(book, codes))
    loss = avq_jax.score_aware_loss(x, out.x_tilde, weights)
    np.testing.assert_allclose(out.codebook_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(out.commitment_loss, loss, rtol=1e-6)


def test_each_loss_moves_its_own_side(book, x, weights):
    @jax.jit
    def gradients(book, x):
        _, back = jax.vjp(lambda b, x: avq_jax.quantize(b, x, weights)[2:], book, x)
        one, no = jnp.ones(N), jnp.zeros(N)
        return back((no, one)), back((one, no))

    (zero_book, pulled), (moved, zero_x) = gradients(book, x)
    assert (zero_book.codewords == 0).all()
    assert (zero_x == 0).all()
    codes = avq_jax.quantize(book, x, weights).codes
    expected = jax.grad(
        lambda b: avq_jax.score_aware_loss(x, avq_jax.decode(b, codes), weights).sum()
    )(book)
    np.testing.assert_allclose(moved.codewords, expected.codewords, rtol=1e-4, atol=1e-5)
    assert (jnp.abs(pulled).max(axis=1) > 0).all()


def test_task_gradient_of_codewords_is_that_of_decode(book, x):
    target = jax.random.normal(jax.random.key(2), x.shape)

    @jax.jit
    @jax.grad
    def got(book):
        return jnp.vdot(avq_jax.quantize(book, x, estimator="rotation").x_tilde, target)

    codes = avq_jax.quantize(book, x).codes
    want = jax.grad(lambda b: jnp.vdot(avq_jax.decode(b, codes), target))(book)
    np.testing.assert_allclose(got(book).codewords, want.codewords, rtol=1e-5, atol=1e-6)


def test_rotation_by_hand():
    """(1, 0) to (0, 2): a quarter turn and a factor 2."""
    book = Codebook(jnp.array([[[0.0, 2.0]]]), dim=2)
    jacobian = jax.jit(
        jax.jacobian(
            lambda book, x: avq_jax.quantize(book, x[None], estimator="rotation").x_tilde[0], 1
        )
    )
    one = jnp.array([1.0, 0.0])
    np.testing.assert_allclose(jacobian(book, one), [[0.0, -2.0], [2.0, 0.0]], atol=1e-6)
    # To the opposite direction, where no plane of rotation is given: still onto the codeword.
    back = Codebook(jnp.array([[[-3.0, 0.0]]]), dim=2)
    np.testing.assert_allclose(jacobian(back, one) @ one, [-3.0, 0.0], atol=1e-6)


@pytest.mark.full
def test_rotation_keeps_angles_and_scales_lengths(book, x):
    def layer(v):
        return avq_jax.quantize(book, v[None], estimator="rotation").x_tilde[0]

    out = jax.vmap(layer)(x[:5])
    jacobians = jax.jit(jax.vmap(jax.jacrev(layer)))(x[:5])
    scale = jnp.linalg.norm(out, axis=1) / jnp.linalg.norm(x[:5], axis=1)
    gram = jnp.einsum("nij,nik->njk", jacobians, jacobians)
    np.testing.assert_allclose(gram, scale[:, None, None] ** 2 * jnp.eye(D)[None], atol=1e-4)
    np.testing.assert_allclose(jnp.einsum("nij,nj->ni", jacobians, x[:5]), out, atol=1e-5)


def test_straight_through_is_the_identity(book, x):
    jacobian = jax.jacobian(lambda v: avq_jax.quantize(book, v[None]).x_tilde[0])(x[0])
    np.testing.assert_array_equal(jacobian, jnp.eye(D))


class TestSoft:
    def test_limits(self, book, x, weights):
        hard = avq_jax.quantize(book, x, weights, num_sweeps=10).x_tilde
        soft = jax.jit(avq_jax.soft_quantize)
        gaps = [
            float(jnp.abs(soft(book, x, weights, temperature=t) - hard).max())
            for t in (1.0, 1e-1, 1e-6)
        ]
        assert gaps[0] > gaps[1] > gaps[2]
        assert gaps[2] < 1e-5
        mean = jnp.broadcast_to(book.codewords.mean(axis=1).reshape(1, D), x.shape)
        np.testing.assert_allclose(soft(book, x, weights, temperature=1e6), mean, atol=1e-4)

    @pytest.mark.full
    def test_finite_differences(self, book, x):
        norms = jnp.linalg.norm(x[:6], axis=1)

        def value(words, rows, T, temperature):
            scaling = avq_jax.scaling(Threshold(T), norms, dim=D)
            soft = avq_jax.soft_quantize(
                Codebook(words, dim=D), rows, scaling, temperature=temperature, direction=x[:6]
            )
            return jnp.sum(jnp.sin(soft))

        args = (book.codewords, x[:6], jnp.float32(0.6), jnp.float32(0.5))
        value = jax.jit(value)
        check_grads(value, args, order=1, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2, eps=1e-3)
        assert abs(jax.grad(value, 2)(*args)) > 1e-4


def test_gradients_finite_at_zero_rows_and_ties():
    """FAULTS 34."""
    book = Codebook(jnp.array([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]]), dim=2)
    x = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    scaling = Scaling(jnp.array([4.0, 4.0, 4.0]), jnp.ones(3))

    def total(book, x, estimator):
        out = avq_jax.quantize(book, x, scaling, estimator=estimator)
        soft = avq_jax.soft_quantize(book, x, scaling, temperature=0.1)
        return jnp.sum(out.x_tilde**2 + soft) + jnp.sum(out.codebook_loss + out.commitment_loss)

    gradient = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)
    for which in (book, Codebook(jnp.zeros((1, 3, 2)), dim=2)):
        chex.assert_tree_all_finite(gradient(which, x, "rotation"))
    assert avq_jax.quantize(book, x).codes.tolist() == [[0], [0], [0]]


@pytest.mark.full
def test_transformations(book, x, weights):
    def layer(book, x):
        out = avq_jax.quantize(book, x, weights, estimator="rotation")
        return jnp.sum(jnp.sin(out.x_tilde)) + out.codebook_loss.sum()

    grad = jax.grad(layer, (0, 1))
    one = grad(book, x)
    books = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), book)
    remade = jax.grad(jax.checkpoint(layer), (0, 1))
    many = jax.jit(jax.vmap(remade, in_axes=(0, None)))(books, x)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], many), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "gumbel"}, "estimator must be one of"),
        ({"x": jnp.full((2, D), jnp.nan)}, "x must be finite: 2 of 2 rows"),
        ({"x": jnp.ones((2, D + 1))}, "x must have the width of the codec, 6"),
        ({"scaling": Scaling(jnp.ones(3), jnp.ones(3))}, "scaling.parallel must have shape"),
    ],
)
def test_errors_name_the_argument(book, change, message):
    arguments = {"x": jnp.ones((2, D)), "scaling": None, **change}
    with pytest.raises(ValueError, match=message):
        avq_jax.quantize(book, **arguments)


def test_soft_needs_a_temperature_above_zero(book, x):
    with pytest.raises(ValueError, match=r"temperature must be above 0; got -1"):
        avq_jax.soft_quantize(book, x, temperature=-1)


# The optimizers of optax promote integers.
promoting = pytest.mark.usefixtures("promotion")


@pytest.fixture
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


# Three ways to hold the parameters of the same small autoencoder.


def autoencoder_loss(encoder, book, decoder, x):
    out = avq_jax.quantize(book, jnp.tanh(x @ encoder), estimator="rotation")
    error = jnp.mean((out.x_tilde @ decoder - x) ** 2)
    return error + jnp.mean(out.codebook_loss) + 0.25 * jnp.mean(out.commitment_loss)


def initial():
    keys = jax.random.split(jax.random.key(3), 3)
    return (
        0.4 * jax.random.normal(keys[0], (8, D)),
        Codebook(0.5 * jax.random.normal(keys[1], (M, K, D // M)), dim=D),
        0.4 * jax.random.normal(keys[2], (D, 8)),
    )


def images():
    return jax.random.normal(jax.random.key(4), (64, 3)) @ jax.random.normal(
        jax.random.key(5), (3, 8)
    )


@promoting
def test_with_optax():
    optimizer = optax.adam(3e-2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        loss, gradient = jax.value_and_grad(lambda p: autoencoder_loss(*p, x))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    params = initial()
    state, losses = optimizer.init(params), []
    for _ in range(60):
        params, state, loss = step(params, state, images())
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


@promoting
@pytest.mark.full
def test_in_a_flax_nnx_module():
    nnx = pytest.importorskip("flax.nnx", reason="without the extra models: no flax")

    class Autoencoder(nnx.Module):
        def __init__(self):
            encoder, book, decoder = initial()
            self.encoder, self.decoder = nnx.Param(encoder), nnx.Param(decoder)
            self.codewords = nnx.Param(book.codewords)

        def __call__(self, x):
            book = Codebook(self.codewords[...], dim=D)
            return autoencoder_loss(self.encoder[...], book, self.decoder[...], x)

    model = Autoencoder()
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, gradient = nnx.value_and_grad(lambda model: model(x))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(step(model, optimizer, images())) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@promoting
@pytest.mark.full
def test_in_an_equinox_module():
    eqx = pytest.importorskip("equinox", reason="without the extra models: no equinox")

    class Autoencoder(eqx.Module):
        encoder: jax.Array
        book: Codebook
        decoder: jax.Array

        def __call__(self, x):
            return autoencoder_loss(self.encoder, self.book, self.decoder, x)

    model, optimizer = Autoencoder(*initial()), optax.adam(3e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, x):
        loss, gradient = eqx.filter_value_and_grad(lambda model: model(x))(model)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(60):
        model, state, loss = step(model, state, images())
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


class TestMovingAverages:
    def test_reconstruction_is_the_decayed_mean(self, x):
        """Van den Oord et al. 2017, appendix A.1, in NumPy."""
        book = Codebook(x[None, :K], dim=D)
        state = avq_jax.ema_init(book)
        totals, counts = np.zeros((K, D)), np.zeros(K)
        words = np.asarray(x[:K])
        for step in range(3):
            rows = x[16 * step : 16 * (step + 1)]
            codes = avq_jax.quantize(state.codebook, rows).codes
            state = avq_jax.ema_update(state, rows, codes, decay=0.8)
            one_hot = np.eye(K)[np.asarray(codes)[:, 0]]
            totals = 0.8 * totals + one_hot.T @ np.asarray(rows)
            counts = 0.8 * counts + one_hot.sum(axis=0)
            used = counts > 0
            words = np.where(used[:, None], totals / np.maximum(counts, 1e-9)[:, None], words)
            np.testing.assert_allclose(state.codebook.codewords[0], words, rtol=1e-4, atol=1e-5)

    @pytest.mark.full
    def test_score_aware_rests_at_the_joint_solution(self, book, x, weights):
        """Theorem 4.2 and section 7.5, by a solver, for the same codes."""
        lloyd = avq_jax.lloyd_init(
            jax.random.key(0), x, weights, num_subspaces=M, num_codewords=K, num_sweeps=1
        )
        codes = avq_jax.lloyd_update(lloyd, x, weights, num_sweeps=1).codes
        solved = avq_jax.lloyd_update(
            lloyd._replace(codes=codes), x, weights, num_sweeps=1, solver="dense"
        )

        def losses(book):
            return avq_jax.score_aware_loss(x, avq_jax.decode(book, solved.codes), weights)

        def update(state):
            return avq_jax.ema_update(state, x, solved.codes, weights, decay=0.9)

        state = avq_jax.ema_init(lloyd.codebook)
        state = jax.jit(lambda s: jax.lax.fori_loop(0, 600, lambda _, s: update(s), s))(state)
        reached, best = losses(state.codebook).mean(), losses(solved.codebook).mean()
        np.testing.assert_allclose(reached, best, rtol=1e-3)

    @pytest.mark.full
    def test_first_step_does_not_overshoot(self, x):
        steep = Scaling(jnp.full(N, 50.0), jnp.ones(N))
        state = avq_jax.ema_init(Codebook(0.1 * x[None, :K], dim=D))
        out = avq_jax.quantize(state.codebook, x, steep)
        after = avq_jax.ema_update(state, x, out.codes, steep, decay=0.99).codebook
        loss = avq_jax.score_aware_loss(x, avq_jax.decode(after, out.codes), steep).mean()
        assert loss < out.codebook_loss.mean()

    def test_revival(self, x):
        far = jnp.full((1, 2, D), 1e3).at[0, 0].set(0)
        state = avq_jax.ema_init(Codebook(far, dim=D))

        @jax.jit
        def step(key, state, rows):
            codes = avq_jax.quantize(state.codebook, rows).codes
            state = avq_jax.ema_update(state, rows, codes, decay=0.8)
            return avq_jax.revive(key, state, rows, threshold=0.2), codes

        used = []
        for key in jax.random.split(jax.random.key(0), 30):
            state, codes = step(key, state, x)
            used.append(len(np.unique(codes)))
        assert used[0] == 1
        assert used[-1] == 2
        assert (state.usage > 0.1).all()

    def test_revival_leaves_live_codewords_alone(self, book, x):
        state = avq_jax.ema_init(book)
        state = state._replace(usage=state.usage.at[1, 2].set(0), weight=state.weight + 3)
        after = avq_jax.revive(jax.random.key(0), state, x)
        changed = (after.codebook.codewords != book.codewords).any(axis=-1)
        assert np.argwhere(changed).tolist() == [[1, 2]]
        part = x[:, 2:4]
        assert (jnp.abs(part - after.codebook.codewords[1, 2][None]).sum(axis=1) == 0).any()
        assert after.weight[1, 2] == 0

    def test_errors(self, book, x):
        state = avq_jax.ema_init(book)
        with pytest.raises(ValueError, match=r"decay must be from 0 to below 1; got 1"):
            avq_jax.ema_update(state, x, jnp.zeros((N, M), jnp.uint8), decay=1.0)
        with pytest.raises(ValueError, match=r"codes must be integers \[48, 3\]"):
            avq_jax.ema_update(state, x, jnp.zeros((N, 1), jnp.uint8))
        with pytest.raises(ValueError, match="threshold must be at least 0"):
            avq_jax.revive(jax.random.key(0), state, x, threshold=-1)
