"""Softmax over many classes: estimates, bounds, samples, and gradients of a few rows alone."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avq_jax
from avq_jax import SparseRows

N, D, B, K, S = 3000, 12, 8, 40, 200


@pytest.fixture(scope="module")
def table():
    keys = jax.random.split(jax.random.key(0), 3)
    centers = jax.random.normal(keys[0], (20, D))
    rows = centers[jax.random.randint(keys[1], (N,), 0, 20)]
    return (rows + 0.5 * jax.random.normal(keys[2], (N, D))) / 2


@pytest.fixture(scope="module")
def index(table):
    return avq_jax.build(jax.random.key(1), table, num_leaves=12, num_subspaces=6, num_iterations=4)


@pytest.fixture(scope="module")
def hidden(table):
    return 2 * table[:B] + 0.3 * jax.random.normal(jax.random.key(2), (B, D))


LABELS = jnp.arange(B, dtype=jnp.int32) * 100


def exact_loss(table, hidden):
    logits = hidden @ table.T
    at = jnp.take_along_axis(logits, LABELS[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - at


def choose(key, index, hidden, **options):
    return avq_jax.softmax_classes(
        key, index, hidden, LABELS, **{"k": K, "num_samples": S, **options}
    )


def step(key, index, table, hidden):
    classes = choose(key, index, hidden)
    rows = avq_jax.gather_rows(table, classes.ids)
    return jax.value_and_grad(
        lambda r, h: avq_jax.softmax_cross_entropy(h, r, classes).mean(), (0, 1)
    )(rows, hidden), classes


def dense(ids, rows):
    return np.asarray(jnp.zeros((N + 1, D)).at[ids].add(rows)[:N])


def test_classes_are_distinct_and_stand_for_all(index, hidden):
    classes = jax.jit(choose)(jax.random.key(3), index, hidden)
    ids = np.asarray(classes.ids)
    assert len(ids) == B * K + B + S
    used = ids[ids >= 0]
    assert len(np.unique(used)) == len(used)
    np.testing.assert_array_equal(ids[classes.labels], LABELS)
    assert (np.asarray(classes.log_weight)[ids < 0] == -np.inf).all()
    found = np.asarray(avq_jax.search(index, hidden, k=K, rescore=0).ids)
    assert np.isin(found, ids).all()


@pytest.mark.full
def test_every_class_sampled_is_exact(index, table, hidden):
    """With all ranges of size one the sum is complete, whatever the search found."""
    classes = choose(jax.random.key(3), index, hidden, num_samples=N)
    rows = avq_jax.gather_rows(table, classes.ids)
    loss = avq_jax.softmax_cross_entropy(hidden, rows, classes)
    np.testing.assert_allclose(loss, exact_loss(table, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_unbiased_even_by_a_stale_index(index, table, hidden):
    """A search that finds next to nothing, in an index of other rows, costs variance, not bias."""
    stale = avq_jax.refresh(index, np.arange(N), np.asarray(table)[::-1])
    exact = jax.nn.logsumexp(hidden @ table.T, axis=1)

    @jax.jit
    @jax.vmap
    def ratio(key):
        got = avq_jax.log_sum_exp(
            key, stale, hidden, k=K, num_samples=S, table=table, rescore=0
        ).value
        return jnp.exp(got - exact)

    ratios = np.asarray(ratio(jax.random.split(jax.random.key(4), 200)))
    error = ratios.std(axis=0) / 200**0.5
    assert error.min() > 1e-3
    assert (np.abs(ratios.mean(axis=0) - 1) < 4 * error).all()


def test_gradients_near_the_exact_ones(index, table, hidden):
    (_, (of_rows, of_hidden)), classes = jax.jit(step)(jax.random.key(4), index, table, hidden)
    rows, queries = jax.jit(jax.grad(lambda t, h: exact_loss(t, h).mean(), (0, 1)))(table, hidden)
    assert jnp.linalg.norm(of_hidden - queries) < 0.1 * jnp.linalg.norm(queries)
    assert np.linalg.norm(dense(classes.ids, of_rows) - rows) < 0.25 * jnp.linalg.norm(rows)


def test_no_array_of_the_table_is_made(index, table, hidden):
    """The compiled step names the table as its argument and in gathers, and makes no other."""
    lowered = jax.jit(step).lower(jax.random.key(0), index, table, hidden)
    text = lowered.compile().as_text()
    made = re.findall(rf"= f32\[{N},{D}\][^ ]* (\S+?)\(", text)
    assert "parameter" in made
    assert set(made) <= {"parameter", "get-tuple-element", "bitcast"}, set(made)
    whole = jax.jit(jax.grad(lambda t, h: exact_loss(t, h).mean()))
    text = whole.lower(table, hidden).compile().as_text()
    assert re.search(rf"= f32\[{N},{D}\][^ ]* (?!parameter)", text)


class TestLogSumExp:
    def test_bounds_hold(self, table):
        """Exact search, flat and peaked queries; delta = 0.1."""
        index = avq_jax.build(jax.random.key(1), table)
        hidden = jax.random.normal(jax.random.key(5), (16, D)) * jnp.linspace(0, 4, 16)[:, None]
        exact = jax.nn.logsumexp(hidden @ table.T, axis=1)

        @jax.jit
        @jax.vmap
        def draws(key):
            return avq_jax.log_sum_exp(
                key, index, hidden, k=60, num_samples=100, table=table, delta=0.1
            )

        got = draws(jax.random.split(jax.random.key(6), 40))
        inside = (got.lower <= exact[None]) & (exact[None] <= got.upper)
        assert inside.mean(axis=0).min() >= 0.9
        np.testing.assert_allclose(jnp.exp(got.value - exact[None]).mean(axis=0), 1, atol=0.1)
        ratio = 2 * np.log(2 / 0.1) * N / (60 * 100)
        assert (got.upper - exact[None]).max() < np.log1p(2.5 * (ratio**0.5 + ratio))

    @pytest.mark.full
    def test_gradient_and_whole_table(self, index, table, hidden):
        def value(h):
            return avq_jax.log_sum_exp(jax.random.key(0), index, h, k=K, num_samples=N).value

        got, back = jax.vjp(value, hidden)
        want, exact = jax.vjp(lambda h: jax.nn.logsumexp(h @ table.T, axis=1), hidden)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        one = jnp.ones(B)
        np.testing.assert_allclose(back(one)[0], exact(one)[0], rtol=1e-3, atol=1e-4)


def test_samples_follow_the_softmax(table):
    few = table[:200]
    index = avq_jax.build(jax.random.key(1), few)
    q = 2 * few[3]
    drawn = jax.jit(lambda key, q: avq_jax.sample_softmax(key, index, q, k=15, num_samples=120))(
        jax.random.key(7), jnp.broadcast_to(q, (4000, D))
    )
    assert drawn.complete.mean() > 0.99
    odds = jax.nn.softmax(few @ q)
    counts = np.bincount(np.asarray(drawn.ids), minlength=200)
    # Pearson's statistic over ten classes and the rest has 10 degrees of freedom.
    top = np.argsort(-odds)[:10]
    have = np.append(counts[top], 4000 - counts[top].sum())
    want = 4000 * np.append(odds[top], 1 - odds[top].sum())
    assert ((have - want) ** 2 / want).sum() < 30


class TestSparseUpdate:
    def test_equals_the_dense_step_on_touched_rows(self):
        table = jax.random.normal(jax.random.key(0), (6, 3))
        sparse = SparseRows(jnp.array([4, 1, -1], jnp.int32), jnp.ones((3, 3)))
        optimizer = optax.adam(0.1)
        with jax.numpy_dtype_promotion("standard"):
            state = optimizer.init(table)
            got, kept = jax.jit(lambda *a: avq_jax.sparse_update(optimizer, *a))(
                sparse, state, table
            )
            whole = jnp.zeros((6, 3)).at[jnp.array([4, 1])].set(1)
            updates, want = optimizer.update(whole, state, table)
        np.testing.assert_allclose(got, optax.apply_updates(table, updates), rtol=1e-6)
        chex.assert_trees_all_close(kept, want, rtol=1e-6)

    def test_coalesce(self):
        ids = jnp.array([3, -1, 0, 3, 0, 3], jnp.int32)
        rows = jnp.arange(12.0).reshape(6, 2)
        got = jax.jit(avq_jax.coalesce)(SparseRows(ids, rows))
        assert got.ids.tolist() == [0, 3, -1, -1, -1, -1]
        np.testing.assert_array_equal(got.rows[:2], [[12, 14], [16, 19]])
        assert (got.rows[2:] == 0).all()

    def test_gradient_of_gathered_rows_is_in_place(self, table):
        rows = avq_jax.gather_rows(table, jnp.array([5, -1, 7]))
        np.testing.assert_array_equal(rows[0], table[5])
        assert (rows[1] == 0).all()


def check_refresh(index, table):
    n = index.num_rows
    moved = np.asarray(table[:5]) + 2.0
    later = avq_jax.refresh(index, [10, 20, -1, 30, 20], moved)
    probe = {"k": 3, "leaves_to_search": 12}
    found = avq_jax.search(later, moved, **probe).ids
    assert int(found[0, 0]) == 10
    assert int(found[3, 0]) == 30
    assert 20 in found[4].tolist()
    chex.assert_trees_all_equal_shapes_and_dtypes(index, later)
    same = avq_jax.refresh(index, np.arange(n), np.asarray(table[:n]))
    for a, b in zip(jax.tree.leaves(index), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_refresh_finds_moved_rows(index, table):
    check_refresh(index, table)


@pytest.mark.full
def test_refresh_with_spilling_and_int8_rows(table):
    index = avq_jax.build(
        jax.random.key(1),
        table[:300],
        num_leaves=4,
        num_subspaces=4,
        num_iterations=2,
        rescore_dtype="int8",
        soar_lambda=1.0,
    )
    check_refresh(index, table)


def test_training_step_with_refresh_traces_once(index, table, hidden):
    optimizer = optax.sgd(0.5)
    start = table

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train(key, index, table, state):
        (loss, (of_rows, _)), classes = step(key, index, table, hidden)
        sparse = SparseRows(classes.ids, of_rows)
        table, state = avq_jax.sparse_update(optimizer, sparse, state, table)
        return table, state, loss, classes.ids

    state, losses = optimizer.init(table), []
    for i in range(12):
        table, state, loss, ids = train(jax.random.key(i), index, table, state)
        losses.append(float(loss))
        if i % 4 == 3:
            index = avq_jax.refresh(index, ids, avq_jax.gather_rows(table, ids))
    assert losses[-1] < losses[0] - 0.5
    assert exact_loss(table, hidden).mean() < exact_loss(start, hidden).mean() - 0.5


def test_errors_name_the_argument(index, hidden, table):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"num_samples must be at most the number of classes"):
        avq_jax.softmax_classes(key, index, hidden, k=4, num_samples=N + 1)
    with pytest.raises(ValueError, match=r"labels must be integers \[8\]"):
        avq_jax.softmax_classes(key, index, hidden, jnp.zeros(8), k=4, num_samples=4)
    with pytest.raises(ValueError, match="hidden must be as wide"):
        avq_jax.softmax_classes(key, index, hidden[:, 1:], k=4, num_samples=4)
    few = avq_jax.softmax_classes(key, index, hidden, k=4, num_samples=4)
    with pytest.raises(ValueError, match="classes must have labels"):
        avq_jax.softmax_cross_entropy(hidden, avq_jax.gather_rows(table, few.ids), few)
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        avq_jax.log_sum_exp(key, index, hidden, k=4, num_samples=4, delta=1.0)
    with pytest.raises(ValueError, match=r"ids must be -1 or from 0 to 2999; got 3000"):
        avq_jax.refresh(index, [N], np.zeros((1, D)))
    euclidean = avq_jax.build(key, table[:64], metric="l2")
    with pytest.raises(ValueError, match="must have the metric 'dot'"):
        avq_jax.softmax_classes(key, euclidean, hidden, k=4, num_samples=4)
