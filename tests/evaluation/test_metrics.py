"""Recall and relative error: hand-worked cases, ties, padding, transformations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avq_jax.evaluation import (
    brute_force,
    query_recalls,
    recall_1_at_n,
    recall_interval,
    recall_k_at_k,
    relative_error,
)


class TestRecallKAtK:
    def test_hand_worked(self):
        ids, true_ids = [[3, 1, 2], [7, 8, 9]], [[1, 2, 5], [9, 6, 4]]
        assert recall_k_at_k(ids, true_ids) == pytest.approx((2 / 3 + 1 / 3) / 2)
        assert recall_k_at_k(ids, true_ids, k=1) == 0
        assert recall_k_at_k(ids, true_ids, k=2) == pytest.approx(0.25)
        assert isinstance(recall_k_at_k(ids, true_ids), float)

    def test_padding_and_repeated_ids_never_count(self):
        assert recall_k_at_k([[-1, -1]], [[-1, 4]]) == 0
        assert recall_k_at_k([[4, 4]], [[4, 5]]) == 0.5
        scores = {"scores": [[2.0, 2.0]], "true_scores": [[2.0, 1.0]]}
        assert recall_k_at_k([[4, 4]], [[4, 5]], **scores) == 0.5
        assert recall_k_at_k([[-1, -1]], [[4, 5]], **scores) == 0

    def test_fewer_true_rows_than_k(self):
        assert recall_k_at_k([[4, 1]], [[4, -1]]) == 1
        scores = {"scores": [[2.0, -np.inf]], "true_scores": [[2.0, -np.inf]]}
        assert recall_k_at_k([[4, -1]], [[4, -1]], **scores) == 1

    def test_queries_without_an_answer_are_left_out(self):
        assert recall_k_at_k([[1], [2]], [[1], [-1]]) == 1
        assert math.isnan(recall_k_at_k([[1]], [[-1]]))
        assert math.isnan(recall_k_at_k(np.zeros((0, 2), int), np.zeros((0, 2), int)))

    def test_ties(self):
        ids, true_ids = [[0, 2]], [[0, 1]]
        assert recall_k_at_k(ids, true_ids) == 0.5
        for sign in (1.0, -1.0):
            worst = sign * 4.0
            true_scores = [[5.0, worst]]
            near = [[5.0, worst - 4e-7 * 4]]
            far = [[5.0, worst - 4e-6 * 4]]
            assert recall_k_at_k(ids, true_ids, scores=near, true_scores=true_scores) == 1
            assert recall_k_at_k(ids, true_ids, scores=far, true_scores=true_scores) == 0.5

    def test_user_ids_beyond_32_bits(self):
        big = 2**40 + 5
        assert recall_k_at_k(np.array([[big]]), np.array([[5]])) == 0
        assert recall_k_at_k(np.array([[big]]), np.array([[big]])) == 1

    def test_jit_agrees(self):
        rng = np.random.default_rng(0)
        ids, true_ids = rng.integers(-1, 30, (2, 8, 10)).astype(np.int32)
        scores, true_scores = -np.sort(-rng.random((2, 8, 10)).astype(np.float32))
        for extra in ({}, {"scores": scores, "true_scores": true_scores}):
            expected = recall_k_at_k(ids, true_ids, k=7, **extra)
            traced = jax.jit(lambda i, t, e: recall_k_at_k(i, t, k=7, **e))(ids, true_ids, extra)
            assert float(traced) == pytest.approx(expected, rel=1e-6)

    def test_search_results_go_straight_in(self):
        x = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
        result = brute_force(x[:5], x, k=3, metric="cosine")
        assert recall_k_at_k(result.ids, result.ids) == 1
        assert recall_1_at_n(result.ids, np.arange(5)) == 1

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (([1, 2], [[1, 2]]), {}, "ids must have two axes"),
            (([[1, 2]], [[1]]), {}, "true_ids must have at least 2 columns"),
            (([[1, 2]], [[1, 2], [3, 4]]), {}, "true_ids must have as many rows as ids, 1, got 2"),
            (([[1, 2]], [[1, 2]]), {"k": 3}, "ids must have at least 3 columns"),
            (([[1, 2]], [[1, 2]]), {"k": 0}, "k must be at least 1, got 0"),
            (([[1]], [[1]]), {"scores": [[1.0]]}, "true_scores is None"),
            (([[1]], [[1]]), {"true_scores": [[1.0]]}, "scores is None"),
        ],
    )
    def test_errors(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            recall_k_at_k(*arguments, **options)


class TestRecall1AtN:
    def test_hand_worked(self):
        ids = [[5, 6, 7], [8, 9, 1], [2, -1, -1]]
        true_ids = [[7, 5], [8, 3], [4, 4]]
        values = [recall_1_at_n(ids, true_ids, n=n) for n in (1, 2, 3)]
        assert values == pytest.approx([1 / 3, 1 / 3, 2 / 3])
        assert recall_1_at_n(ids, [7, 8, 4]) == pytest.approx(2 / 3)

    def test_padding_never_counts(self):
        assert math.isnan(recall_1_at_n([[-1]], [-1]))

    def test_jit(self):
        assert float(jax.jit(recall_1_at_n)(jnp.array([[1, 2], [3, 4]]), jnp.array([2, 9]))) == 0.5

    def test_n_beyond_the_width(self):
        with pytest.raises(ValueError, match="ids must have at least 4 columns"):
            recall_1_at_n([[1, 2, 3]], [1], n=4)


class TestRelativeError:
    def test_hand_worked(self):
        assert relative_error([1.5, -1.0], [1.0, -2.0]) == 0.5
        assert relative_error(np.float32([[2.0]]), np.float32([[2.0]])) == 0

    def test_zero_scores_are_left_out(self):
        assert relative_error([9.0, 3.0], [0.0, 2.0]) == 0.5
        assert math.isnan(relative_error([1.0], [0.0]))

    def test_gradient_is_finite_at_zero(self):
        exact = jnp.array([0.0, 2.0, -4.0])
        gradient = jax.grad(lambda e: relative_error(e, exact))(jnp.array([1.0, 3.0, -3.0]))
        np.testing.assert_allclose(gradient, [0.0, 0.25, 0.125])

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(1,\)"):
            relative_error([1.0, 2.0], [1.0])


class TestInterval:
    def test_published_value(self):
        # Newcombe 1998, table I: 81 of 263, Wilson 95 %: 0.2553 to 0.3662.
        low, high = recall_interval([1.0] * 81 + [0.0] * 182)
        assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)

    def test_ends(self):
        low, high = recall_interval(np.ones(20))
        assert 0.8 < low < 1 == high
        assert recall_interval(np.zeros(20))[0] == 0

    def test_covers_the_mean(self):
        rng = np.random.default_rng(0)
        misses = 0
        for _ in range(300):
            low, high = recall_interval(rng.binomial(10, 0.9, 200) / 10)
            misses += not low <= 0.9 <= high
        assert misses <= 0.05 * 300

    def test_takes_query_recalls(self):
        low, high = recall_interval(query_recalls([[1], [2], [3]], [[1], [9], [-1]]))
        assert low < 0.5 < high

    @pytest.mark.parametrize(
        ("recalls", "confidence", "message"),
        [
            ([], 0.95, "at least one query"),
            ([1.5], 0.95, r"must lie in \[0, 1\]"),
            ([0.5], 1.0, "confidence must be between"),
        ],
    )
    def test_errors(self, recalls, confidence, message):
        with pytest.raises(ValueError, match=message):
            recall_interval(recalls, confidence=confidence)
