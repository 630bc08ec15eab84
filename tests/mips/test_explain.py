"""Explanations: the stage that loses a row, on indexes made to lose it there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.rescoring import store_rows


@pytest.fixture(scope="module")
def hand_made():
    """Rows 0 to 39 in the leaf of (1, 0), 40 to 79 in that of (0, 1); codes are 0 or 1 a column.

    Row 40 is (5, 1): its leaf ranks last for the query (1, 0). Row 3 is (3, 0), coded as (1, 0) +
    (-1, -1): its codes score it 0. All other rows are (a, 0.1) with a from 0.5 to 1.5.
    """
    x = np.stack([np.linspace(0.5, 1.5, 80), np.full(80, 0.1)], axis=1).astype(np.float32)
    x[40], x[3] = (5, 1), (3, 0)
    centroids = np.eye(2, dtype=np.float32)
    leaves = np.repeat(np.arange(2, dtype=np.int32), 40)
    words = np.array([[[-1.0], [1.0]]] * 2, np.float32)
    codes = np.ones((80, 2), np.uint8)
    codes[3] = 0
    return avq_jax.Index(
        tree=pack_tree(
            jnp.asarray(centroids), leaves, avq_jax.Codebook(jnp.asarray(words), 2), codes
        ),
        store=store_rows(x, "float32"),
        ids=None,
        weight=avq_jax.Uniform(),
        metric="dot",
        num_rows=80,
        dim=2,
        leaves_to_search=1,
    )


QUERY = np.array([1.0, 0.0], np.float32)
EFFORT = {"k": 2, "leaves_to_search": 1, "rescore": 3}


class TestStages:
    def test_returned(self, hand_made):
        row = int(avq_jax.search(hand_made, QUERY, **EFFORT).ids[1])
        found = avq_jax.explain(hand_made, QUERY, row, **EFFORT)
        assert (found.stage, found.place) == ("returned", 2)
        assert found.exact == pytest.approx(0.5 + row / 79)
        assert f"{row}: returned at place 2 of 2" in repr(found)

    def test_pruning(self, hand_made):
        found = avq_jax.explain(hand_made, QUERY, 40, **EFFORT)
        assert (found.stage, found.exact_rank) == ("pruning", 1)
        (copy,) = found.copies
        assert (copy.leaf, copy.leaf_rank, copy.probed) == (1, 2, False)
        # (0, 1) + (1, 1) = (1, 2), so the error is (4, -1): along (5, 1) it is 19 / sqrt(26).
        assert copy.approximate == pytest.approx(1.0)
        assert copy.parallel == pytest.approx(19 / np.sqrt(26), rel=1e-5)
        assert copy.orthogonal == pytest.approx(np.sqrt(17 - 19**2 / 26), rel=1e-5)
        assert "lost to pruning" in repr(found)
        assert "rank 2 (not probed, 1 were)" in repr(found)

    def test_quantization(self, hand_made):
        found = avq_jax.explain(hand_made, QUERY, 3, **EFFORT)
        assert (found.stage, found.exact_rank) == ("quantization", 2)
        assert found.copies[0].approximate == pytest.approx(0.0)
        assert found.candidate_bar == pytest.approx(2.0)
        again = avq_jax.explain(hand_made, QUERY, 3, **{**EFFORT, "rescore": 0})
        assert again.stage == "quantization"

    def test_rescoring(self, hand_made):
        x = np.asarray(hand_made.store.rows).copy()
        x[1, 0] = 0.1
        lossy = dataclasses.replace(hand_made, store=store_rows(x, "float32"))
        found = avq_jax.explain(lossy, QUERY, 1, vector=[2.0, 0.1], **EFFORT)
        assert found.stage == "rescoring"
        assert found.exact == pytest.approx(2.0)
        assert found.stored == pytest.approx(0.1)

    def test_outranked(self, hand_made):
        for rescore in (80, 0):
            effort = {**EFFORT, "leaves_to_search": 2, "rescore": rescore}
            assert avq_jax.explain(hand_made, QUERY, 50, **effort).stage == "outranked"

    def test_without_a_tree(self, exact_indexes, queries):
        ids = avq_jax.search(exact_indexes["l2"], queries[0], k=10).ids
        found = avq_jax.explain(exact_indexes["l2"], queries[0], int(ids[4]))
        assert (found.stage, found.place, found.exact_rank) == ("returned", 5, 5)
        assert found.copies == ()


class TestAgainstSearch:
    @pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
    def test_every_true_neighbour_has_a_stage_that_fits(self, indexes, rows, queries, metric):
        index, q = indexes[metric], queries[3]
        effort = {"k": 10, "leaves_to_search": 2, "rescore": 12}
        ids = np.asarray(avq_jax.search(index, q, **effort).ids).tolist()
        everything = avq_jax.search(index, q, k=600, leaves_to_search=8, rescore=0)
        estimates = dict(zip(everything.ids.tolist(), everything.scores.tolist(), strict=True))
        true = avq_jax.brute_force(q, rows, k=10, metric=metric)
        for rank, (row, score) in enumerate(zip(*map(np.asarray, true[::-1]), strict=True), 1):
            found = avq_jax.explain(index, q, int(row), **effort)
            assert (found.stage == "returned") == (row in ids)
            assert (found.stage == "pruning") == (not found.copies[0].probed)
            np.testing.assert_allclose(found.exact, score, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.copies[0].approximate, estimates[row], atol=1e-4)
            assert found.exact_rank == rank

    def test_user_ids(self, rows, queries):
        index = avq_jax.build(jax.random.key(0), rows[:40], ids=2**40 + np.arange(40))
        found = avq_jax.explain(index, queries[0], 2**40 + 7, k=40)
        assert (found.id, found.row, found.stage) == (2**40 + 7, 7, "returned")
        with pytest.raises(ValueError, match="id must be one of the index; got 7"):
            avq_jax.explain(index, queries[0], 7)


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"id": 600}, ValueError, "id must be below the number of rows, 600; got 600"),
            ({"id": 1.5}, TypeError, "id must be an integer"),
            ({"query": np.zeros((2, 12))}, ValueError, "query must be one finite row of width 12"),
            ({"query": np.full(12, np.nan)}, ValueError, "query must be one finite row"),
            ({"vector": np.full(12, np.inf)}, ValueError, "vector must be finite"),
        ],
    )
    def test_bad(self, index, queries, change, error, text):
        arguments = {"query": queries[0], "id": 1, **change}
        with pytest.raises(error, match=text):
            avq_jax.explain(index, **arguments)

    def test_an_index_without_rows(self, index, rows, queries):
        bare = dataclasses.replace(index, store=None)
        with pytest.raises(ValueError, match="vector must be given for an index"):
            avq_jax.explain(bare, queries[0], 1)
        found = avq_jax.explain(bare, queries[0], 1, vector=rows[1])
        assert found.stored is None
        assert found.exact == pytest.approx(float(rows[1] @ queries[0]), rel=1e-5)
