"""One small clustered data set and one index a metric, shared by all tests of the engine."""

import jax
import numpy as np
import pytest

import avq_jax

N, D, LEAVES, SUBSPACES = 600, 12, 8, 6
SIZES = {"num_leaves": LEAVES, "num_subspaces": SUBSPACES, "num_iterations": 4}


def make_rows(n=N, d=D, seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((10, d))
    rows = centers[rng.integers(10, size=n)] + 0.6 * rng.standard_normal((n, d))
    return (rows * rng.uniform(0.6, 1.6, (n, 1))).astype(np.float32)


@pytest.fixture(scope="session")
def rows():
    rows = make_rows()
    rows[5] = 0
    rows[100] = rows[17]  # equal rows, far apart
    rows.setflags(write=False)
    return rows


@pytest.fixture(scope="session")
def queries():
    return make_rows(64, D, seed=1)


@pytest.fixture(scope="session")
def indexes(rows):
    return {
        metric: avq_jax.build(jax.random.key(0), rows, metric=metric, **SIZES)
        for metric in ("dot", "cosine", "l2")
    }


@pytest.fixture(scope="session")
def exact_indexes(rows):
    return {
        metric: avq_jax.build(jax.random.key(0), rows, metric=metric)
        for metric in ("dot", "cosine", "l2")
    }


@pytest.fixture(scope="session")
def index(indexes):
    return indexes["dot"]
