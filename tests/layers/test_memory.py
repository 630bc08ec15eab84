"""Attention over found keys, and a memory that learns by writing few slots."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import avq_jax
from avq_jax import SparseRows

N, D, V, B, K = 600, 8, 5, 6, 32


@pytest.fixture(scope="module")
def memory():
    keys = jax.random.normal(jax.random.key(0), (N, D))
    return keys, jax.random.normal(jax.random.key(1), (N, V))


@pytest.fixture(scope="module")
def index(memory):
    return avq_jax.build(jax.random.key(2), memory[0])


@pytest.fixture(scope="module")
def queries(memory):
    return 2 * memory[0][:B]


def exact(queries, keys, values):
    return jax.nn.softmax(queries @ keys.T / D**0.5, axis=1) @ values


def test_all_keys_is_exact_attention_with_its_gradients(index, memory, queries):
    keys, values = memory

    def found(q, keys, values):
        return avq_jax.top_k_attention(index, q, values, keys=keys, k=N, rescore=N)

    one = jax.random.normal(jax.random.key(3), (B, V))
    got, back = jax.vjp(jax.jit(found), queries, keys, values)
    want, exactly = jax.vjp(exact, queries, keys, values)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(back(one), exactly(one), rtol=1e-3, atol=1e-5)


@pytest.mark.full
def test_error_bound(index, memory, queries):
    keys, values = memory
    share = jax.nn.softmax(queries @ keys.T / D**0.5, axis=1)
    kept = jax.lax.top_k(share, K)[0].sum(axis=1)
    got = avq_jax.top_k_attention(index, queries, values, k=K, rescore=N)
    error = jnp.linalg.norm(got - exact(queries, keys, values), axis=1)
    bound = 2 * (1 - kept) * jnp.linalg.norm(values, axis=1).max()
    assert (error <= bound).all()
    assert error.max() > 0


def test_masked_single_and_broken_queries(index, memory, queries):
    _, values = memory
    mask = jnp.arange(N) < 3
    got = avq_jax.top_k_attention(index, queries[0], values, k=K, allowed=mask)
    np.testing.assert_allclose(
        got, exact(queries[:1], memory[0][:3], values[:3])[0], rtol=1e-4, atol=1e-5
    )
    broken = queries.at[1].set(jnp.nan)

    def total(q, values):
        return avq_jax.top_k_attention(index, q, values, k=K).sum()

    out = avq_jax.top_k_attention(index, broken, values, k=K)
    assert (out[1] == 0).all()
    chex.assert_tree_all_finite(jax.grad(total, (0, 1))(broken, values))


def test_sparse_writes_learn_an_association(index, memory, queries):
    """Only the slots read move; the values come to answer the queries."""
    keys, values = memory
    target = jax.random.normal(jax.random.key(4), (B, V))
    optimizer = optax.sgd(5.0)
    state = optimizer.init(values)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(values, state):
        ids = avq_jax.search(index, queries, k=K).ids
        flat = ids.reshape(-1)
        key_rows = avq_jax.gather_rows(keys, flat).reshape(B, K, D)

        def loss(rows):
            out = avq_jax.memory_read(queries, key_rows, rows.reshape(B, K, V), ids)
            return jnp.mean((out - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(avq_jax.gather_rows(values, flat))
        sparse = avq_jax.coalesce(SparseRows(flat, gradient))
        values, state = avq_jax.sparse_update(optimizer, sparse, state, values)
        return values, state, value, flat

    start, losses = values, []
    for _ in range(20):
        values, state, loss, read = step(values, state)
        losses.append(float(loss))
    assert losses[-1] < 0.05 * losses[0]
    untouched = np.setdiff1d(np.arange(N), np.asarray(read))
    np.testing.assert_array_equal(values[untouched], start[untouched])


def test_errors_name_the_argument(index, memory, queries):
    with pytest.raises(ValueError, match=r"values must have one row a key, 600; got 3"):
        avq_jax.top_k_attention(index, queries, memory[1][:3], k=2)
    with pytest.raises(ValueError, match="queries must be as wide"):
        avq_jax.top_k_attention(index, queries[:, 1:], memory[1], k=2)
