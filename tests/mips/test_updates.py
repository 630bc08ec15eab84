"""Rows that come and go: ids, numbers, room, trace counts, readers of old indexes, recall."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.mips import updates
from avq_jax.mips.packing import coded_rows
from avq_jax.mips.rebalancing import statistics
from avq_jax.mips.searcher import _search

from .conftest import LEAVES, SIZES, D, N, make_rows


def brute(queries, x, held, metric="dot", k=5):
    """Truth over the held rows, by row number."""
    rows = np.flatnonzero(held)
    found = avq_jax.brute_force(queries, x[rows], k=k, metric=metric)
    return rows[np.asarray(found.ids)]


@pytest.fixture(scope="module")
def roomy(indexes):
    return {metric: avq_jax.reserve(index, capacity=N + 100) for metric, index in indexes.items()}


def everything(index, queries, k=5):
    return avq_jax.search(index, queries, k=k, leaves_to_search=LEAVES, rescore=index.num_rows)


@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_room_changes_no_result(indexes, roomy, queries, metric):
    one, two = (avq_jax.search(i[metric], queries, k=5) for i in (indexes, roomy))
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.scores, two.scores)
    tight, was = avq_jax.compact(roomy[metric]), indexes[metric]
    np.testing.assert_array_equal(tight.store.rows, was.store.rows)
    np.testing.assert_array_equal(tight.tree.packed.slot_rows, was.tree.packed.slot_rows)
    for a, b in zip(coded_rows(tight.tree, N), coded_rows(was.tree, N), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("metric", ["dot", pytest.param("cosine", marks=pytest.mark.full), "l2"])
def test_updates_find_what_brute_force_finds(roomy, rows, queries, metric):
    """Every change of the rows, followed by a search of all leaves with all rows rescored."""
    x = np.concatenate([rows, np.zeros((100, D), np.float32)])
    held = np.arange(N + 100) < N
    index, fresh = roomy[metric], make_rows(70, D, seed=5)
    index = avq_jax.remove(index, np.arange(0, 300, 10))
    held[0:300:10] = False
    index, numbers = avq_jax.add(index, fresh[:50])
    np.testing.assert_array_equal(numbers, np.flatnonzero(~held)[:50])
    x[numbers], held[numbers] = fresh[:50], True
    index = avq_jax.replace(index, [1, 2, 601], fresh[50:53])
    x[[1, 2, 601]] = fresh[50:53]
    found = everything(index, queries)
    np.testing.assert_array_equal(found.ids, brute(queries, x, held, metric))
    np.testing.assert_array_equal(np.asarray(avq_jax.held_rows(index)), held)
    found = avq_jax.searcher(index, k=5, leaves_to_search=LEAVES, rescore=700)(queries)
    np.testing.assert_array_equal(found.ids, brute(queries, x, held, metric))
    tight = avq_jax.compact(index)
    assert tight.num_rows == held.sum()
    found = np.flatnonzero(held)[np.asarray(everything(tight, queries).ids)]
    np.testing.assert_array_equal(found, brute(queries, x, held, metric))


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_added_rows_get_the_codes_of_build(indexes, roomy, rows, metric):
    """Removing rows and adding the same ones gives back leaves, codes and offsets."""
    numbers = np.arange(20, 40)
    index = avq_jax.remove(roomy[metric], numbers)
    index, got = avq_jax.add(index, rows[20:40])
    np.testing.assert_array_equal(got, numbers)
    new, old = (coded_rows(avq_jax.compact(i).tree, N) for i in (index, indexes[metric]))
    np.testing.assert_array_equal(new.leaves, old.leaves)
    # Coordinate descent may end at another of two equal codes after rounding.
    assert (new.codes == old.codes).mean() > 0.999
    if metric == "l2":
        same = (new.codes == old.codes).all(axis=1)
        np.testing.assert_allclose(new.offset[same], old.offset[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_stored_rows_in_few_bytes(index, rows, kind):
    # As `build` rounds them, but for bfloat16, of which an added row is rounded to the nearest.
    weights = avq_jax.scaling(index.weight, np.linalg.norm(rows, axis=1), dim=D)
    weights = weights if kind == "int8" else None
    store = avq_jax.mips.rescoring.store_rows(rows, kind, weights)
    small = avq_jax.reserve(dataclasses.replace(index, store=store), capacity=N + 30)
    small, numbers = avq_jax.add(small, rows[:20])
    assert small.store.rows.dtype == store.rows.dtype
    for leaf in jax.tree.leaves(small.store):
        leaf = np.asarray(leaf, np.float32)
        np.testing.assert_allclose(leaf[numbers], leaf[:20], rtol=1e-5)


def test_exact_index(exact_indexes, rows, queries):
    index = avq_jax.reserve(exact_indexes["dot"], capacity=N + 4)
    index, numbers = avq_jax.add(index, 5 * rows[:3])
    assert numbers.tolist() == [N, N + 1, N + 2]
    index = avq_jax.remove(index, [N, 7])
    x, held = np.concatenate([rows, 5 * rows[:4]]), np.ones(N + 4, bool)
    held[[N, 7, N + 3]] = False
    found = avq_jax.search(index, queries, k=5)
    np.testing.assert_array_equal(found.ids, brute(queries, x, held))
    with pytest.raises(ValueError, match=r"avq_jax\.compact"):
        avq_jax.save(index, "/nowhere/at/all")


@pytest.mark.full
def test_spilled_copies(rows, queries):
    index = avq_jax.build(jax.random.key(0), rows, soar_lambda=1.0, **SIZES)
    index = avq_jax.reserve(index, capacity=N + 60)
    index, numbers = avq_jax.add(index, make_rows(40, D, seed=6), soar_lambda=1.0)
    found = coded_rows(avq_jax.compact(index).tree, N + 40)
    assert found.leaves.shape == (N + 40, 2)
    assert (found.leaves[:, 0] != found.leaves[:, 1]).all()
    gone = avq_jax.remove(index, numbers)
    assert not np.isin(np.asarray(gone.tree.packed.slot_rows), numbers).any()
    ids = np.asarray(everything(index, queries).ids)
    assert all(len(set(row)) == 5 for row in ids.tolist())


def test_user_ids_follow_their_rows(rows):
    index = avq_jax.build(jax.random.key(0), rows, ids=2**40 + np.arange(N), **SIZES)
    index = avq_jax.reserve(index, capacity=N + 10)
    index = avq_jax.remove(index, avq_jax.row_numbers(index, [2**40 + 3]))
    index, numbers = avq_jax.add(index, 9 * rows[:2], ids=[2**50 + 1, 2**40 + 3])
    assert avq_jax.user_ids(index, numbers).tolist() == [2**50 + 1, 2**40 + 3]
    assert avq_jax.row_numbers(index, [[2**50 + 1, 2**40, 5]]).tolist() == [[3, 0, -1]]
    tight = avq_jax.compact(index)
    assert avq_jax.row_numbers(tight, [2**40 + 3]).tolist() == [N]
    for ids, error in [
        ([2**40, 1], "new; row 0 has the id"),
        ([1, 1], "distinct"),
        ([1], "shape"),
        ([-1, 1], ">= 0"),
        (None, "must be given"),
    ]:
        with pytest.raises(ValueError, match=error):
            avq_jax.add(index, rows[:2], ids=ids)


def test_faults(roomy, rows):
    index = roomy["dot"]
    bad = rows[:3].copy()
    bad[1, 2] = np.nan
    for call, error in [
        (lambda: avq_jax.add(index, bad), "x must be finite: 1 of 3 rows"),
        (lambda: avq_jax.add(index, rows[:2, :5]), f"width of the index, {D}; got 5"),
        (lambda: avq_jax.add(index, rows[:2], ids=[1, 2]), "ids must be None"),
        (lambda: avq_jax.add(index, rows[:101]), "1 of 101 rows found no free row number"),
        (lambda: avq_jax.remove(index, [3, N]), f"none holds {N}"),
        (lambda: avq_jax.remove(index, [-1]), "none holds -1"),
        (lambda: avq_jax.replace(index, [3, 3], rows[:2]), "distinct; 3"),
        (lambda: avq_jax.replace(index, [3], rows[:2]), "as many rows"),
        (lambda: avq_jax.reserve(index, capacity=5), f"at least the rows of the index, {N + 100}"),
        (lambda: avq_jax.save(index, "/nowhere/at/all"), r"avq_jax\.compact"),
    ]:
        with pytest.raises(ValueError, match=error):
            call()
    with pytest.raises(TypeError, match="rows must be integers"):
        avq_jax.remove(index, [1.0])
    same, numbers = avq_jax.add(index, rows[:0])
    assert numbers.shape == (0,)
    assert statistics(same).rows == N
    assert statistics(avq_jax.remove(index, [])).rows == N


def test_leaves_that_fill_up_pass_rows_on(roomy, rows):
    """Rows of one place go to further leaves, and are refused whole when those are full too."""
    index = roomy["dot"]
    near = np.repeat(rows[17:18], 90, axis=0)
    more, numbers = avq_jax.add(index, near)
    sizes = statistics(more).leaf_sizes - statistics(index).leaf_sizes
    assert sizes.sum() == 90
    assert (sizes > 0).sum() > 1
    assert statistics(index).rows == N
    held = coded_rows(avq_jax.compact(more).tree, N + 90)
    assert (held.codes[N:].max(axis=0) < 16).all()
    assert len(set(numbers.tolist())) == 90


def test_emptied_index(roomy, queries):
    empty = avq_jax.remove(roomy["dot"], np.arange(N))
    found = avq_jax.search(empty, queries, k=3)
    assert (np.asarray(found.ids) == -1).all()
    assert np.isneginf(np.asarray(found.scores)).all()
    again, numbers = avq_jax.add(empty, queries)
    assert numbers.tolist() == list(range(len(queries)))
    assert (np.asarray(everything(again, queries).ids[:, 0]) < len(queries)).all()
    with pytest.raises(ValueError, match="holds none"):
        avq_jax.compact(empty)


def test_no_recompilation_and_old_indexes_stay(roomy, rows, queries):
    index = roomy["dot"]
    before = avq_jax.search(index, queries, k=5)
    arrays = [np.array(leaf) for leaf in jax.tree.leaves(index)]
    functions = updates._add, updates._remove, updates._replace, _search
    new, numbers = avq_jax.add(index, rows[:9])
    new = avq_jax.replace(avq_jax.remove(new, numbers[:4]), numbers[4:], rows[4:9])
    avq_jax.search(new, queries, k=5)
    traces = [function._cache_size() for function in functions]
    for size in (16, 3, 11):
        new, numbers = avq_jax.add(new, 2 * rows[:size])
        new = avq_jax.replace(avq_jax.remove(new, numbers[:2]), numbers[2:], rows[2:size])
        avq_jax.search(new, queries, k=5)
    assert traces == [function._cache_size() for function in functions]
    for old, leaf in zip(arrays, jax.tree.leaves(index), strict=True):
        np.testing.assert_array_equal(old, leaf)
    after = avq_jax.search(index, queries, k=5)
    np.testing.assert_array_equal(before.ids, after.ids)


def test_under_jit(roomy, rows, queries):
    @jax.jit
    def turn_over(index, gone, x):
        new = avq_jax.add(avq_jax.remove(index, gone), x)
        return new, avq_jax.search(new.index, x, k=1).ids

    (_, numbers), _ = turn_over(roomy["dot"], jnp.array([4, -1, 2]), 9 * rows[:5])
    assert numbers.tolist() == [2, 4, N, N + 1, N + 2]
    full = avq_jax.add(roomy["dot"], rows[:99]).index
    (_, numbers), _ = turn_over(full, jnp.array([-1, -1, -1]), rows[:5])
    assert numbers.tolist() == [N + 99, -1, -1, -1, -1]


@pytest.mark.parametrize("layout", ["columns", "dwords", "lanes", "bytes"])
def test_put_code_rows_in_every_layout(layout):
    rng = np.random.default_rng(0)
    k = 256 if layout in ("bytes", "columns") else 16
    codes = rng.integers(0, k, (70, 7)).astype(np.uint8)
    packed = avq_jax.mips.packing.xla_kernels.pack_codes(codes, num_codewords=k, layout=layout)
    rows = np.array([69, 3, 19, -1, 0, 16, 35], np.int32)  # 3 and 19, 0 and 16 share bytes
    new = rng.integers(0, k, (7, 7)).astype(np.uint8)
    put = avq_jax.mips.placing.put_code_rows(packed, jnp.asarray(rows), jnp.asarray(new))
    codes[rows[rows >= 0]] = new[rows >= 0]
    found = avq_jax.mips.capacity.unpack_codes(put)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.full
def test_drift_and_rebalance(index, rows, queries):
    """Rows of another place raise the drift and lower recall; learning anew brings both back."""
    roomy = avq_jax.reserve(index, capacity=2 * N)
    told = statistics(roomy)
    assert (told.rows, told.capacity) == (N, 2 * N)
    np.testing.assert_array_equal(told.leaf_sizes, statistics(index).leaf_sizes)
    assert (told.leaf_slots >= 2 * told.leaf_sizes).all()
    far = make_rows(300, D, seed=9) + 3 * rows[0]
    moved = avq_jax.remove(avq_jax.add(roomy, far).index, np.arange(300))
    x, held = np.concatenate([rows, far, far]), np.arange(2 * N)
    held = (held >= 300) & (held < N + 300)
    again = avq_jax.rebalance(jax.random.key(1), moved, num_iterations=4)
    assert statistics(moved).drift > statistics(again).drift + 0.1
    assert statistics(again).drift < 0.02
    np.testing.assert_array_equal(avq_jax.held_rows(again), held)
    np.testing.assert_array_equal(everything(again, queries).ids, brute(queries, x, held))


@pytest.mark.full
def test_recall_after_churn(rows, queries):
    """30 % of the rows replaced: recall within a point of a fresh index of the same rows."""
    x = make_rows(6000, D, seed=3)
    options = {"num_leaves": 32, "num_subspaces": 6, "num_iterations": 5}
    index = avq_jax.build(jax.random.key(0), x[:4600], **options)
    index = avq_jax.reserve(index, capacity=4600)
    index = avq_jax.remove(index, np.arange(1400))
    index, numbers = avq_jax.add(index, x[4600:])
    assert sorted(numbers) == list(range(1400))
    fresh = avq_jax.build(jax.random.key(0), x[1400:], **options)
    of_row = np.concatenate([np.arange(4600, 6000), np.arange(1400, 4600)])
    q = make_rows(400, D, seed=4)
    truth = np.asarray(avq_jax.brute_force(q, x[1400:], k=10).ids)

    def recall(ids):
        hits = [len(set(a) & set(b)) for a, b in zip(ids.tolist(), truth.tolist(), strict=True)]
        return np.mean(hits) / 10

    find = {"k": 10, "leaves_to_search": 8, "rescore": 60}
    churned = of_row[np.asarray(avq_jax.search(index, q, **find).ids)] - 1400
    anew = np.asarray(avq_jax.search(fresh, q, **find).ids)
    assert 0.8 < recall(anew) < 1
    assert recall(churned) > recall(anew) - 0.01


@pytest.mark.parametrize("share", [0.02, 0.9])
def test_filters_never_return_removed_rows(roomy, queries, share):
    index = roomy["dot"]
    n = index.num_rows
    allowed = np.random.default_rng(3).random(n) < share
    gone = np.flatnonzero(allowed & np.asarray(avq_jax.held_rows(index)))[:40]
    left = avq_jax.remove(index, gone)
    found = avq_jax.search(left, queries, k=10, leaves_to_search=99, allowed=allowed).ids
    assert not np.isin(np.asarray(found), gone).any()
    handle = avq_jax.searcher(left, k=10, leaves_to_search=99, allowed=allowed)
    assert np.array_equal(handle(queries).ids, found)
