"""Filters: recall that a mask does not lower, in every form of search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import avq_jax
from avq_jax.mips import filtering
from avq_jax.mips.filtering import allowed_rows, exact_bound, restrict, restrict_tree, widths
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.rescoring import store_rows

N, D, LEAVES, PROBED = 6000, 16, 64, 6
OPTIONS = {"k": 10, "leaves_to_search": PROBED, "rescore": 61}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((LEAVES, D))
    x = centers[rng.integers(LEAVES, size=N + 64)] + 0.6 * rng.standard_normal((N + 64, D))
    return x[:N].astype(np.float32), x[N:].astype(np.float32)


@pytest.fixture(scope="module")
def index(data):
    """A tree of rows as centroids and a grid of 16 values a column: nothing to learn."""
    x = data[0]
    centroids = x[:LEAVES]
    leaves = np.argmax(x @ centroids.T - 0.5 * (centroids**2).sum(axis=1), axis=1).astype(np.int32)
    grid = np.linspace(-3, 3, 16, dtype=np.float32)
    codes = np.abs((x - centroids[leaves])[..., None] - grid).argmin(axis=-1).astype(np.uint8)
    words = np.broadcast_to(grid[None, :, None], (D, 16, 1))
    return avq_jax.Index(
        tree=pack_tree(
            jnp.asarray(centroids), leaves, avq_jax.Codebook(jnp.asarray(words), D), codes
        ),
        store=store_rows(x, "float32"),
        ids=None,
        weight=avq_jax.Uniform(),
        metric="dot",
        num_rows=N,
        dim=D,
        leaves_to_search=PROBED,
    )


@pytest.fixture(scope="module", autouse=True)
def small_bound():
    """Score up to 2 % of the rows exactly, so that few rows make both kinds of search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtering, "_EXACT_ROWS", 0)
        patch.setattr(filtering, "_EXACT_SHARE", 50)
        yield


def masks(x, share):
    rng = np.random.default_rng(int(1000 * share))
    near = np.argsort(-(x @ x[rng.integers(N)]))[: int(share * N)]
    ball = np.zeros(N, bool)
    ball[near] = True
    return {"random": rng.random(N) < share, "ball": ball}


def recall(ids, truth):
    found = [len(set(a) & set(b)) / len(set(b)) for a, b in zip(ids, truth, strict=True)]
    return np.mean(found)


class TestRecall:
    def test_masks_do_not_lower_it(self, data, index):
        x, q = data
        scores = q @ x.T
        plain = np.asarray(avq_jax.search(index, q, **OPTIONS).ids)
        usual = recall(plain.tolist(), np.argsort(-scores, axis=1)[:, :10].tolist())
        assert 0.6 < usual < 0.99  # there is recall to lose
        assert exact_bound(N) == 120
        for share in (0.1, 0.01, 0.001):
            for mask in masks(x, share).values():
                found = avq_jax.search(index, q, allowed=mask, **OPTIONS)
                ids = np.asarray(found.ids)
                truth = np.argsort(-np.where(mask, scores, -np.inf), axis=1)[:, :10]
                truth = [[i for i in row if mask[i]] for row in truth.tolist()]
                assert mask[ids[ids >= 0]].all()
                assert recall(ids.tolist(), truth) >= usual - 0.01
                handle = avq_jax.searcher(index, allowed=mask, **OPTIONS)(q)
                np.testing.assert_array_equal(handle.ids, ids)
                np.testing.assert_array_equal(handle.scores, found.scores)

    def test_a_mask_each_query(self, data, index):
        x, q = data
        each = np.stack(list(masks(x, 0.2).values()) + list(masks(x, 0.01).values()))
        search = jax.jit(lambda i, q, m: avq_jax.search(i, q, allowed=m, **OPTIONS))
        found = search(index, q[:4], each)
        mapped = jax.vmap(search, in_axes=(None, 0, 0))(index, q[:4], each)
        for i, mask in enumerate(each):
            alone = avq_jax.searcher(index, allowed=mask, **OPTIONS)(q[i])
            for result in (found, mapped):
                np.testing.assert_array_equal(result.ids[i], alone.ids)
                np.testing.assert_allclose(result.scores[i], alone.scores, atol=1e-5)

    @pytest.mark.full
    def test_without_rescoring_few_rows_are_still_found(self, data, index):
        x, q = data
        options = {**OPTIONS, "rescore": 0}
        for mask in masks(x, 0.005).values():
            found = avq_jax.search(index, q, allowed=mask, **options)
            assert (np.asarray(found.ids) >= 0).all()
            assert mask[found.ids].all()
            handle = avq_jax.searcher(index, allowed=mask, **options)(q)
            np.testing.assert_array_equal(handle.ids, found.ids)


    @pytest.mark.full
    def test_under_shard_map(self, data, index):
        x, q = data
        mesh = Mesh(np.array(jax.devices()[:8]), ("q",))
        for mask, spec in (
            (masks(x, 0.2)["ball"], PartitionSpec()),
            (np.stack([masks(x, 0.2)["ball"], masks(x, 0.01)["random"]] * 8), PartitionSpec("q")),
        ):
            split = jax.shard_map(
                lambda i, q, m: avq_jax.search(i, q, allowed=m, **OPTIONS),
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec("q"), spec),
                out_specs=PartitionSpec("q"),
            )
            found = jax.jit(split)(index, q[:16], mask)
            whole = avq_jax.search(index, q[:16], allowed=mask, **OPTIONS)
            np.testing.assert_array_equal(found.ids, whole.ids)


class TestEdges:
    def test_nothing_allowed(self, data, index):
        nothing = np.zeros(N, bool)
        for found in (
            avq_jax.search(index, data[1], allowed=nothing, **OPTIONS),
            avq_jax.searcher(index, allowed=nothing, **OPTIONS)(data[1][:2]),
        ):
            assert (np.asarray(found.ids) == -1).all()
            assert (np.asarray(found.scores) == -np.inf).all()

    def test_user_ids_after_a_handle(self, data):
        x, q = data
        index = avq_jax.build(jax.random.key(0), x[:100], ids=1000 + np.arange(100))
        mask = np.arange(100) % 2 == 1
        ids = avq_jax.user_ids(index, avq_jax.searcher(index, k=3, allowed=mask)(q[:5]).ids)
        assert (ids % 2 == 1).all()
        assert (ids >= 1000).all()

    def test_gradient_goes_through(self, data, index):
        x, q = data
        mask = jnp.asarray(masks(x, 0.2)["random"])
        found = avq_jax.search(index, q[0], allowed=mask, **OPTIONS)
        grad = jax.grad(lambda q: avq_jax.search(index, q, allowed=mask, **OPTIONS).scores.sum())
        np.testing.assert_allclose(grad(q[0]), x[found.ids].sum(axis=0), rtol=1e-4, atol=1e-4)

    def test_bad_mask_of_a_handle(self, index):
        with pytest.raises(ValueError, match=r"allowed must have shape \(6000,\); got \(2, 6000\)"):
            avq_jax.searcher(index, allowed=np.ones((2, N), bool))
        with pytest.raises(TypeError, match="allowed must be a boolean mask"):
            avq_jax.searcher(index, allowed=np.arange(3))


class TestParts:
    @pytest.mark.parametrize("n", [1, 65])
    def test_allowed_rows(self, n):
        mask = np.random.default_rng(n).random(n) < 0.4
        rows = np.flatnonzero(mask)
        for size in (1, len(rows) + 2):
            expected = np.full(size, n)
            expected[: min(size, len(rows))] = rows[:size]
            np.testing.assert_array_equal(allowed_rows(jnp.asarray(mask), size), expected)

    def test_leaves_without_allowed_rows_rank_last(self, index):
        packed = index.tree.packed
        rows, starts = np.asarray(packed.slot_rows), np.asarray(packed.starts) * packed.block
        mask = np.zeros(N, bool)
        mask[[i for i in rows[starts[3] : starts[5]] if i >= 0]] = True
        tree, share = restrict_tree(packed, jnp.asarray(mask))
        assert np.flatnonzero(np.asarray(tree.leaf_offset) > -1).tolist() == [3, 4]
        assert int(tree.usable.sum()) == mask.sum()
        np.testing.assert_allclose(share, mask.sum() / 2 / (N / LEAVES), rtol=1e-5)

    def test_few_rows_leave_the_tree(self, index):
        mask = np.arange(N) < 50
        small = restrict(index, mask, leaves=3, rescore=20)
        assert small.part.tree is None
        np.testing.assert_array_equal(small.rows, np.arange(50))
        assert restrict(index, mask, leaves=3, rescore=0).leaves == LEAVES

    def test_widths(self):
        assert widths(3, 1000) == [3, 6, 12, 24, 48]
        assert widths(40, 50) == [40, 50]
