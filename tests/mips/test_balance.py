"""Options of the partition: balanced leaves and spherical k-means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.mips.balance import balanced_centroids, balanced_leaves
from avq_jax.mips.partition import nearest_centroids, train_centroids

LEAVES = 8


@pytest.fixture(scope="module")
def skewed():
    """Three quarters of the rows in one clump, the rest spread."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 4)) * np.where(np.arange(1000) % 4, 0.3, 3.0)[:, None]
    return x.astype(np.float32)


def sizes_of(leaves):
    return np.bincount(leaves, minlength=LEAVES)


@pytest.fixture(scope="module")
def centroids(skewed):
    return train_centroids(
        jax.random.key(0), jnp.asarray(skewed), num_leaves=LEAVES, num_iterations=4
    )


@pytest.mark.parametrize("balance", [1.05, 1.5])
def test_no_leaf_is_fuller_than_asked(skewed, centroids, balance):
    plain = nearest_centroids(skewed, centroids)
    most = np.ceil(balance * len(skewed) / LEAVES)
    assert sizes_of(plain).max() > 2 * most
    center, prices = balanced_centroids(jnp.asarray(skewed), centroids, balance=balance)
    leaves = balanced_leaves(skewed, center, prices, balance=balance)
    assert sizes_of(leaves).max() <= most
    assert sizes_of(leaves).sum() == len(skewed)

    def spread(leaves, center):
        return np.mean(np.sum((skewed - np.asarray(center)[leaves]) ** 2, axis=1))

    # Rows stay near their centroids: far nearer than in balanced leaves at random.
    shuffled = np.random.default_rng(1).permutation(leaves)
    assert spread(leaves, center) < 0.8 * spread(shuffled, center)


def test_leaves_that_fit_are_those_of_k_means(skewed, centroids):
    leaves = balanced_leaves(skewed, centroids, jnp.zeros(LEAVES), balance=float(LEAVES))
    np.testing.assert_array_equal(leaves, nearest_centroids(skewed, centroids))


def test_equal_rows_are_dealt_out():
    x = np.ones((64, 3), np.float32)
    leaves = balanced_leaves(x, jnp.ones((4, 3)), jnp.zeros(4), balance=1.1)
    assert np.bincount(leaves).max() <= np.ceil(1.1 * 16)


def test_spherical_centroids_have_length_one(skewed):
    for leaves in (1, LEAVES):
        found = train_centroids(
            jax.random.key(0),
            jnp.asarray(skewed),
            num_leaves=leaves,
            num_iterations=4,
            spherical=True,
        )
        np.testing.assert_allclose(jnp.linalg.norm(found, axis=1), 1, rtol=1e-5)


@pytest.mark.full
def test_built_so(rows, queries):
    index = avq_jax.build(
        jax.random.key(0),
        rows,
        metric="cosine",
        num_leaves=8,
        num_subspaces=6,
        num_iterations=4,
        balance=1.2,
        spherical=True,
    )
    packed = index.tree.packed
    ends = np.concatenate([[0], np.cumsum(np.asarray(packed.slot_rows) >= 0)])
    sizes = np.diff(ends[np.asarray(packed.starts) * packed.block])
    assert sizes.max() <= np.ceil(1.2 * 600 / 8)
    np.testing.assert_allclose(jnp.linalg.norm(index.tree.centroids, axis=1), 1, rtol=1e-5)
    found = avq_jax.search(index, queries, k=10, leaves_to_search=8, rescore=600)
    exact = avq_jax.brute_force(queries, rows, k=10, metric="cosine")
    assert avq_jax.recall_k_at_k(found.ids, exact.ids, k=10) == 1


@pytest.mark.parametrize("balance", [1.0, 0.0, -2.0, np.inf, np.nan])
def test_bad_balance(rows, balance):
    with pytest.raises(ValueError, match="balance must be None or a finite number above 1"):
        avq_jax.build(jax.random.key(0), rows, balance=balance)
