"""The engine under jit, vmap, scan, shard_map and differentiation, and how often it is traced."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import avq_jax

N, LEAVES = 600, 8  # of the shared indexes


def find(index, q, rescore=None):
    return avq_jax.search(index, q, k=5, rescore=rescore)


def assert_same(one, two):
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_allclose(one.scores, two.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rescore", [None, pytest.param(0, marks=pytest.mark.full)])
def test_jit_vmap_shard_map(index, queries, rescore):
    eager = find(index, queries, rescore)
    assert_same(jax.jit(find, static_argnames="rescore")(index, queries, rescore), eager)
    assert_same(jax.vmap(lambda q: find(index, q, rescore))(queries), eager)
    mesh = Mesh(np.array(jax.devices()[:8]), ("q",))
    split = jax.shard_map(
        lambda i, q: find(i, q, rescore),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("q")),
        out_specs=PartitionSpec("q"),
    )
    assert_same(jax.jit(split)(index, queries), eager)


def test_exact_index_under_jit_and_shard_map(exact_indexes, queries):
    index = exact_indexes["l2"]
    eager = find(index, queries)
    mesh = Mesh(np.array(jax.devices()[:8]), ("q",))
    split = jax.shard_map(
        find,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("q")),
        out_specs=PartitionSpec("q"),
    )
    assert_same(jax.jit(split)(index, queries), eager)


def test_index_as_argument_and_through_scan(index, queries):
    eager = find(index, queries)

    def step(carry, q):
        return carry, find(carry, q)

    last, found = jax.jit(lambda i, q: jax.lax.scan(step, i, q))(index, queries.reshape(8, 8, -1))
    assert_same(jax.tree.map(lambda a: a.reshape(64, 5), found), eager)
    assert last.metric == "dot"
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(index), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pytree_round_trip(index, queries):
    leaves, structure = jax.tree.flatten(index)
    assert_same(find(jax.tree.unflatten(structure, leaves), queries), find(index, queries))
    host = jax.tree.map(np.asarray, index)
    assert_same(find(host, queries), find(index, queries))
    assert jax.tree.map(lambda _: None, index).num_rows == N


def test_no_new_trace_for_new_data(index, queries):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(index, queries):
        return find(index, queries)

    moved = jax.tree.map(lambda a: a + 1 if a.dtype == jnp.float32 else a, index)
    run(index, queries)
    run(moved, queries[::-1])
    run(dataclasses.replace(index, weight=avq_jax.Power(jnp.float32(9))), queries + 1)
    run(index, jnp.asarray(queries))


def test_python_and_array_thresholds_give_one_structure(rows):
    few = rows[:40]
    kinds = [avq_jax.Threshold(T) for T in (0.5, np.float64(0.5), jnp.float32(0.5))]
    structures = {
        str(jax.tree.map(jax.typeof, avq_jax.build(jax.random.key(0), few, weight=w)))
        for w in kinds
    }
    assert len(structures) == 1


def with_parts(index, parts):
    words = parts["codewords"].transpose(0, 2, 1)
    packed = index.tree.packed._replace(codewords=words, centroids=parts["centroids"])
    tree = index.tree._replace(packed=packed)
    store = index.store._replace(rows=parts["store"])
    return dataclasses.replace(index, tree=tree, store=store)


@pytest.mark.parametrize(
    ("metric", "rescore", "moving"),
    [
        ("dot", None, ("queries", "store")),
        ("dot", 0, ("queries", "codewords", "centroids")),
        pytest.param("cosine", None, ("queries", "store"), marks=pytest.mark.full),
        pytest.param("l2", None, ("queries", "store"), marks=pytest.mark.full),
        pytest.param("l2", 0, ("queries", "codewords", "centroids"), marks=pytest.mark.full),
    ],
)
def test_gradients_against_finite_differences(indexes, queries, metric, rescore, moving):
    index = indexes[metric]
    parts = {
        "queries": jnp.asarray(queries[:8]),
        "store": index.store.rows,
        "codewords": index.tree.codebook.codewords,
        "centroids": index.tree.centroids,
    }

    def each(parts):
        found = avq_jax.search(
            with_parts(index, parts),
            parts["queries"],
            k=5,
            leaves_to_search=LEAVES,
            rescore=rescore,
        )
        return jnp.sum(found.scores * jnp.linspace(1.0, 2.0, 5)[None, :], axis=1), found.ids

    value = jax.jit(each)
    gradient = jax.jit(jax.grad(lambda p: each(p)[0].sum()))(parts)
    forward = jax.jit(lambda p, t: jax.jvp(each, (p,), (t,))[1][0])
    _, ids = value(parts)
    for name in parts:
        tangent = jax.tree.map(jnp.zeros_like, parts)
        tangent[name] = jax.random.normal(jax.random.key(3), parts[name].shape)
        slopes = forward(parts, tangent)
        np.testing.assert_allclose(
            jnp.vdot(gradient[name], tangent[name]), slopes.sum(), rtol=1e-4, atol=1e-4
        )
        if name not in moving:
            assert (slopes == 0).all()
            continue
        step = 1e-3
        (up, ids_up), (down, ids_down) = (
            value(jax.tree.map(lambda a, t, h=h: a + h * t, parts, tangent)) for h in (step, -step)
        )
        # Where the order of the rows changes, the total has a kink.
        smooth = np.asarray((ids_up == ids) & (ids_down == ids)).all(axis=1)
        assert smooth.sum() >= 4
        difference = (up - down) / (2 * step)
        np.testing.assert_allclose(slopes[smooth], difference[smooth], rtol=2e-2, atol=0.1)


@pytest.mark.full
def test_gradients_are_finite_at_zero_and_padding(indexes, queries):
    q = jnp.asarray(queries[:8]).at[0].set(0).at[1].set(jnp.nan)

    def total(q):
        scores = find(indexes["cosine"], q).scores
        return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0))

    gradient = jax.grad(total)(q)
    assert jnp.isfinite(gradient).all()
    assert (gradient[1] == 0).all()


@pytest.mark.full
def test_under_64_bit_mode(index, exact_indexes, queries):
    for each in (index, exact_indexes["dot"]):
        expected = find(each, queries)
        with jax.enable_x64(True):
            found = find(each, queries)
        assert found.scores.dtype == jnp.float32
        assert found.ids.dtype == jnp.int32
        np.testing.assert_array_equal(found.ids, expected.ids)
