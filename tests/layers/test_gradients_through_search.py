"""Gradients of search inside a model: both implementations, vmap, checkpoint, scan, limits."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax import Codebook
from avq_jax.mips.packing import pack_tree
from xla_kernels import library

N, D, B = 200, 6, 4


@pytest.fixture(scope="module")
def rows():
    return jax.random.normal(jax.random.key(0), (N, D))


@pytest.fixture(scope="module")
def index(rows):
    return avq_jax.build(jax.random.key(1), rows, num_leaves=4, num_subspaces=3, num_iterations=2)


@pytest.fixture(scope="module")
def queries():
    return jax.random.normal(jax.random.key(2), (B, D))


def parts_of(index):
    packed = index.tree.packed
    return {
        "codewords": packed.codewords,
        "centroids": packed.centroids,
        "store": index.store.rows,
    }


def with_parts(index, parts):
    packed = index.tree.packed._replace(codewords=parts["codewords"], centroids=parts["centroids"])
    return dataclasses.replace(
        index,
        tree=index.tree._replace(packed=packed),
        store=index.store._replace(rows=parts["store"]),
    )


def value(parts, queries, index, rescore, implementation):
    found = avq_jax.search(
        with_parts(index, parts),
        queries,
        k=3,
        leaves_to_search=4,
        rescore=rescore,
        implementation=implementation,
    )
    return jnp.sum(jnp.sin(found.scores)), found.ids


@pytest.mark.parametrize("rescore", [50, pytest.param(0, marks=pytest.mark.full)])
def test_compiled_kernel_and_xla_agree_in_both_modes(index, queries, rescore):
    if not library.available():
        pytest.skip(f"no compiled kernels: {library.load().reason}")
    parts = parts_of(index)
    tangents = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(3), a.shape), (parts, queries)
    )

    @jax.jit
    def both():
        out = {}
        for name in ("cpu", "xla"):

            def f(parts, queries, name=name):
                return value(parts, queries, index, rescore, name)

            total, back, ids = jax.vjp(f, parts, queries, has_aux=True)
            out[name] = ids, back(jnp.ones_like(total))
            out[name] += (jax.jvp(lambda *a, f=f: f(*a)[0], (parts, queries), tangents),)
        return out

    got = both()
    np.testing.assert_array_equal(got["cpu"][0], got["xla"][0])
    chex.assert_trees_all_close(got["cpu"], got["xla"], rtol=1e-4, atol=1e-5)
    products = jax.tree.map(jnp.vdot, got["cpu"][1], tangents)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), got["cpu"][2][1], rtol=1e-3)
    moving = {"store"} if rescore else {"codewords", "centroids"}
    for name, gradient in got["cpu"][1][0].items():
        assert bool((gradient != 0).any()) == (name in moving), name


@pytest.mark.full
def test_vmap_over_indexes_and_queries(index, rows, queries):
    parts = parts_of(index)
    many = jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), parts)
    grad = jax.grad(lambda p, q: value(p, q, index, 50, None)[0], (0, 1))
    together = jax.jit(jax.vmap(grad, in_axes=(0, None)))(many, queries)
    for i in range(2):
        alone = grad(jax.tree.map(lambda a, i=i: a[i], many), queries)
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=i: a[i], together), alone, rtol=1e-4, atol=1e-5
        )


def test_checkpoint_and_scan_do_not_retrace(index, queries):
    """Gradient descent of queries on their scores, inside a scan, by a remade search."""
    parts = parts_of(index)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def climb(parts, queries):
        def total(q):
            return jnp.mean(avq_jax.search(with_parts(index, parts), q, k=3).scores)

        def step(q, _):
            score, slope = jax.value_and_grad(jax.checkpoint(total))(q)
            return q + 0.5 * slope, score

        return jax.lax.scan(step, queries, length=6)

    _, scores = climb(parts, queries)
    assert (np.diff(scores) > 0).all()
    climb(parts, queries + 1)
    with jax.checking_leaks():
        jax.grad(lambda q: avq_jax.search(index, q, k=2).scores.sum())(queries)


def test_limit_of_many_codewords_is_the_exact_search(index, rows, queries):
    """One codeword a row: scores and gradients of the codes are those of brute force."""
    few = rows[:64]
    tree = pack_tree(
        jnp.zeros((1, D)),
        np.zeros(64, np.int32),
        Codebook(few[None], dim=D),
        np.arange(64, dtype=np.uint8)[:, None],
    )
    index = dataclasses.replace(index, tree=tree, num_rows=64)

    def total(find):
        return jax.value_and_grad(lambda q: jnp.sum(jnp.sin(find(q).scores)))(queries)

    got = total(lambda q: avq_jax.search(index, q, k=3, rescore=0))
    chex.assert_trees_all_close(
        got, total(lambda q: avq_jax.brute_force(q, few, k=3)), rtol=1e-3, atol=1e-4
    )


def test_ids_have_no_gradient(index, queries):
    """FAULTS 34: integer outputs say so."""
    _, tangent = jax.jvp(
        lambda q: avq_jax.search(index, q, k=2).ids, (queries,), (jnp.ones_like(queries),)
    )
    assert tangent.dtype == jax.dtypes.float0
    with pytest.raises(TypeError, match="requires real-valued outputs"):
        jax.grad(lambda q: avq_jax.search(index, q, k=2).ids[0, 0])(queries)


@pytest.mark.full
def test_vmap_over_weights_of_the_loss(rows):
    """A sweep of T is one program: the learner under vmap over weight pytrees."""
    norms = jnp.linalg.norm(rows, axis=1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sweep(weights):
        def one(weight):
            scaling = avq_jax.scaling(weight, norms, dim=D)
            state, _ = avq_jax.fit(
                jax.random.key(0),
                rows,
                scaling,
                num_subspaces=3,
                num_codewords=4,
                num_iterations=3,
            )
            return state.loss

        return jax.vmap(one)(weights)

    losses = sweep(avq_jax.Threshold(jnp.array([0.1, 0.5, 1.0])))
    assert losses.shape == (3,)
    assert len(set(losses.tolist())) == 3
    sweep(avq_jax.Threshold(jnp.array([0.2, 0.3, 0.4])))
