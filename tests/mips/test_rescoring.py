"""The rescoring store: roundings under the score-aware loss, and what a row takes in memory."""

import dataclasses

import jax
import numpy as np
import pytest

import avq_jax
from avq_jax import Scaling
from avq_jax.mips.rescoring import Store, store_rows

KINDS = ("int8", "bfloat16")


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((500, 24)) * rng.uniform(0.2, 5, (500, 1))).astype(np.float32)


def weights(n, ratio):
    return Scaling(np.full(n, ratio, np.float32), np.ones(n, np.float32))


def kept(store):
    rows = np.asarray(store.rows).astype(np.float64)
    return rows if store.scale is None else rows * np.asarray(store.scale, np.float64)[:, None]


def errors(x, store):
    """Squared error along each row, and in all."""
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    r = x - kept(store)
    return np.sum(r * u, axis=1) ** 2, np.sum(r * r, axis=1)


class TestRounding:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("ratio", [1.0, 6.0, 1e4])
    def test_loss_is_at_most_that_of_nearest_rounding(self, x, kind, ratio):
        scaling = weights(len(x), ratio)
        loss = [
            whole + (ratio - 1) * along
            for along, whole in (
                errors(x, store_rows(x, kind, scaling)),
                errors(x, nearest(x, kind)),
            )
        ]
        assert (loss[0] <= loss[1] * (1 + 1e-4) + 1e-12).all()
        if ratio > 1:
            assert loss[0].mean() < 0.9 * loss[1].mean()

    @pytest.mark.parametrize(("kind", "share"), [("int8", 1e-6), ("bfloat16", 0.05)])
    def test_a_strong_ratio_leaves_an_error_across_the_row(self, x, kind, share):
        along, _ = errors(x, store_rows(x, kind, weights(len(x), 1e4)))
        before, whole = errors(x, nearest(x, kind))
        assert along.mean() < share * before.mean()
        _, now = errors(x, store_rows(x, kind, weights(len(x), 1e4)))
        assert now.mean() < 2 * whole.mean()

    def test_step_is_the_minimiser(self, x):
        store = store_rows(x, "int8", weights(len(x), 6.0))
        best = np.add(*[f * e for f, e in zip((5, 1), errors(x, store), strict=True)])
        for change in (0.999, 1.001):
            other = Store(store.rows, store.scale * np.float32(change))
            loss = np.add(*[f * e for f, e in zip((5, 1), errors(x, other), strict=True)])
            assert (loss >= best * (1 - 1e-5)).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_extreme_rows(self, kind):
        x = np.zeros((6, 4), np.float32)
        x[1], x[2], x[3] = 1e30, 1e-30, 1e-42
        x[4, 2], x[5] = -7.0, [3.4e38, 0, 0, 0]
        values = kept(store_rows(x, kind, weights(6, 6.0)))
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values, x, rtol=5e-3, atol=1e-37)

    def test_numbers_that_fit_stay_as_they_are(self):
        x = np.array([[1.0, -0.5, 0.25, 0]], np.float32)
        for scaling in (None, weights(1, 6.0)):
            np.testing.assert_array_equal(kept(store_rows(x, "bfloat16", scaling)), x)


def nearest(x, kind):
    if kind == "bfloat16":
        return Store(x.astype(jax.numpy.bfloat16))
    step = np.abs(x).max(axis=1) / np.float32(127)
    return Store(np.rint(x / step[:, None]).astype(np.int8), step)


class TestMemory:
    def test_parts_add_up_to_all_arrays(self, indexes, exact_indexes):
        for index in (*indexes.values(), *exact_indexes.values()):
            weight = sum(leaf.nbytes for leaf in jax.tree.leaves(index.weight))
            memory = index.bytes_per_row
            assert memory.total * index.num_rows + weight == pytest.approx(index.num_bytes)
        assert exact_indexes["dot"].bytes_per_row == (0, 0, 4 * 12, 0, 0)

    def test_store_and_ids(self, index, rows):
        memory = dataclasses.replace(index, store=store_rows(rows, "int8")).bytes_per_row
        assert memory.rows == 12 + 4
        assert f"{memory.total:.1f} bytes a row (codes" in repr(memory)
        small = avq_jax.build(jax.random.key(0), rows[:40], ids=np.arange(40))
        assert small.bytes_per_row.ids == 8
