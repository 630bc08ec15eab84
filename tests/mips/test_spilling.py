"""Rows in two leaves (SOAR): found once, exactly, and by fewer leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.evaluation import clustered
from avq_jax.mips.packing import coded_rows, pack_tree
from avq_jax.mips.partition import nearest_centroids, spilled_leaves

LEAVES = 12


@pytest.fixture(scope="module")
def rows():
    return np.asarray(clustered(jax.random.key(0), 1500, 12, num_clusters=30))


@pytest.fixture(scope="module")
def index(rows):
    return avq_jax.build(
        jax.random.key(1), rows, num_leaves=LEAVES, soar_lambda=1.5, num_iterations=3
    )


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("rescore", [0, 1500 * 2])
def test_each_row_comes_once(index, rows, rescore, implementation):
    found = avq_jax.search(
        index,
        rows[:20],
        k=40,
        leaves_to_search=LEAVES,
        rescore=rescore,
        implementation=implementation,
    )
    for ids in np.asarray(found.ids):
        assert len(set(ids.tolist())) == 40
    if rescore:
        exact = avq_jax.brute_force(rows[:20], rows, k=40)
        np.testing.assert_array_equal(found.ids, exact.ids)
        np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-5)


def test_second_leaf_minimises_the_soar_loss(rows):
    centroids = jnp.asarray(rows[:9] * 0.8)
    first = nearest_centroids(rows, centroids)
    second = spilled_leaves(rows, first, centroids, soar_lambda=1.5)
    c = np.asarray(centroids, np.float64)
    residual = rows - c[first]
    unit = residual / np.maximum(np.linalg.norm(residual, axis=1, keepdims=True), 1e-30)
    other = rows[:, None] - c[None]
    loss = (other**2).sum(-1) + 1.5 * np.einsum("nld,nd->nl", other, unit) ** 2
    loss[np.arange(len(rows)), first] = np.inf
    assert (second != first).all()
    chosen = loss[np.arange(len(rows)), second]
    np.testing.assert_allclose(chosen, loss.min(axis=1), rtol=1e-4, atol=1e-4)


def test_without_penalty_the_second_nearest_leaf(rows):
    centroids = jnp.asarray(rows[:5])
    first = nearest_centroids(rows, centroids)
    second = spilled_leaves(rows, first, centroids, soar_lambda=0.0)
    distance = ((rows[:, None] - rows[None, :5]) ** 2).sum(-1)
    distance[np.arange(len(rows)), first] = np.inf
    chosen = distance[np.arange(len(rows)), second]
    np.testing.assert_allclose(chosen, distance.min(axis=1), rtol=1e-4, atol=1e-4)


def test_codes_are_residuals_of_their_own_leaf(index, rows):
    coded = coded_rows(index.tree, len(rows))
    assert coded.leaves.shape == (len(rows), 2)
    center = np.asarray(index.tree.centroids)
    for copy in range(2):
        decoded = avq_jax.decode(index.tree.codebook, coded.codes[:, copy])
        error = np.linalg.norm(rows - center[coded.leaves[:, copy]] - decoded, axis=1)
        size = np.linalg.norm(rows - center[coded.leaves[:, copy]], axis=1)
        assert np.mean(error) < 0.7 * np.mean(size)


def test_packing_has_an_inverse(index, rows):
    coded = coded_rows(index.tree, len(rows))
    tree = index.tree
    again = pack_tree(
        tree.centroids, coded.leaves, tree.codebook, coded.codes, ranking=tree.packed.ranking
    )
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(index.tree), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("metric", "name"),
    [("dot", "folder"), pytest.param("l2", "one.safetensors", marks=pytest.mark.full)],
)
def test_saved_and_loaded(tmp_path, rows, metric, name):
    index = avq_jax.build(
        jax.random.key(1),
        rows[:400],
        metric=metric,
        num_leaves=5,
        soar_lambda=1.0,
        num_iterations=2,
    )
    avq_jax.save(index, tmp_path / name)
    loaded = avq_jax.load(tmp_path / name)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(index), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_bad_lambda(rows):
    with pytest.raises(ValueError, match=r"soar_lambda must be None or .* got -1"):
        avq_jax.build(jax.random.key(0), rows, num_leaves=4, soar_lambda=-1.0)
