"""Additive codes in a tree: what holds of product codes holds of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.mips.packing import coded_rows
from avq_jax.quantization import AdditiveCodebook

N, D, LEAVES = 300, 9, 5
OPTIONS = {
    "num_leaves": LEAVES, "num_subspaces": 3, "num_codewords": 4, "num_iterations": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(0).standard_normal((N + 20, D)).astype(np.float32)
    return x[:N], x[N:]


@pytest.fixture(scope="module", params=["dot", "l2"])
def index(request, data):
    return avq_jax.build(
        jax.random.key(0), data[0], metric=request.param, codec="additive", **OPTIONS
    )


def test_words_are_of_the_full_width(index):
    book = index.tree.codebook
    assert isinstance(book, AdditiveCodebook)
    assert book.codewords.shape == (3, 4, D)
    assert "additive codes 3 x 4" in repr(index)


def test_everything_rescored_is_exact(index, data):
    x, q = data
    found = avq_jax.search(index, q, k=7, leaves_to_search=LEAVES, rescore=N)
    exact = avq_jax.brute_force(q, x, k=7, metric=index.metric)
    np.testing.assert_array_equal(found.ids, exact.ids)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_estimates_are_those_of_decoded_rows(index, data, implementation):
    q = data[1]
    found = avq_jax.search(
        index, q, k=9, leaves_to_search=LEAVES, rescore=0, implementation=implementation
    )
    coded = coded_rows(index.tree, N)
    near = np.asarray(index.tree.centroids)[coded.leaves]
    near = near + np.asarray(avq_jax.decode(index.tree.codebook, coded.codes))
    scores = q @ near.T
    if index.metric == "l2":
        scores = 2 * (scores + coded.offset[None]) - np.sum(q * q, axis=1, keepdims=True)
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :9], atol=3e-5)


def test_codes_lose_less_than_product_codes(index, data):
    x, q = data
    plain = avq_jax.build(jax.random.key(0), x, metric=index.metric, **OPTIONS)
    exact = avq_jax.brute_force(q, x, k=10, metric=index.metric)
    options = {"k": 10, "leaves_to_search": LEAVES, "rescore": 0}
    recalls = [
        float(avq_jax.recall_k_at_k(avq_jax.search(each, q, **options).ids, exact.ids, k=10))
        for each in (plain, index)
    ]
    assert recalls[1] > recalls[0]


def test_saved_loaded_and_encoded_alike(index, data, tmp_path):
    avq_jax.save(index, tmp_path / "index")
    again = avq_jax.load(tmp_path / "index")
    for a, b in zip(jax.tree.leaves(index), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    roomy = avq_jax.reserve(avq_jax.remove(again, np.arange(40)), capacity=N + 30)
    roomy, rows = avq_jax.add(roomy, data[0][:40])
    assert rows.tolist() == list(range(40))
    # The words, kicks and loss are those of build, and so are the codes.
    options = {"k": 5, "leaves_to_search": LEAVES, "rescore": 0}
    found = avq_jax.search(roomy, data[1], **options)
    np.testing.assert_allclose(
        found.scores, avq_jax.search(index, data[1], **options).scores, atol=1e-4
    )
    fresh = avq_jax.rebalance(jax.random.key(1), roomy, num_iterations=2)
    assert isinstance(fresh.tree.codebook, AdditiveCodebook)


def test_gradients_reach_words_and_queries(index, data):
    q = jnp.asarray(data[1][:3])

    def total(words, q):
        packed = index.tree.packed._replace(codewords=words)
        tree = index.tree._replace(packed=packed)
        changed = avq_jax.Index(tree, index.store, None, index.weight, index.metric, N, D, LEAVES)
        return avq_jax.search(changed, q, k=2, leaves_to_search=LEAVES, rescore=0).scores.sum()

    words = index.tree.packed.codewords
    by_words, by_query = jax.grad(total, argnums=(0, 1))(words, q)
    step = 1e-2 * jax.random.normal(jax.random.key(2), words.shape)
    slope = (total(words + step, q) - total(words - step, q)) / 2
    np.testing.assert_allclose(jnp.sum(by_words * step), slope, rtol=2e-2, atol=1e-3)
    assert np.isfinite(by_query).all()


@pytest.mark.full
def test_built_otherwise(index, data, tmp_path):
    """On disk and over a mesh, up to the order of float sums."""
    options = {"metric": index.metric, "codec": "additive", **OPTIONS}
    key = jax.random.key(0)
    avq_jax.build_to_disk(key, data[0], tmp_path / "a", chunk_rows=70, **options)
    mesh = jax.make_mesh((4,), ("shards",))
    many = avq_jax.build_sharded(key, data[0], mesh=mesh, axis="shards", **options)
    for other, share in ((avq_jax.load(tmp_path / "a"), 0.99), (many, 0.95)):
        assert str(other) == str(index)
        assert isinstance(other.tree.codebook, AdditiveCodebook)
        np.testing.assert_array_equal(other.tree.kicks, index.tree.kicks)
        np.testing.assert_allclose(
            other.tree.codebook.codewords, index.tree.codebook.codewords, rtol=1e-2, atol=1e-2
        )
        a, b = coded_rows(other.tree, N), coded_rows(index.tree, N)
        assert (a.codes == b.codes).mean() > share


def test_kicks_out_of_range_are_refused(index, tmp_path):
    book = index.tree.codebook
    broken = index.tree._replace(kicks=book.kicks.at[0, 0, 1].set(4))
    avq_jax.save(
        avq_jax.Index(broken, index.store, None, index.weight, index.metric, N, D, LEAVES),
        tmp_path / "index",
    )
    with pytest.raises(avq_jax.IndexFormatError, match="kicks must be codebooks below 3 and words"):
        avq_jax.load(tmp_path / "index")
