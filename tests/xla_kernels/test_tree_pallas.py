"""Tree search by the kernels for accelerators, run as plain JAX; `make aot` compiles them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xla_kernels import pack_codes, slots_per_block, tree_search
from xla_kernels.adc.bins import expected_recall
from xla_kernels.tree_search import pallas, worklist
from xla_kernels.tree_search.effort import Effort
from xla_kernels.tree_search.xla import leaf_scores, lookup_table, slot_scores

from . import test_tree_search as base

make = base.make


def effort(leaves, *, k=5):
    return Effort(k, leaves, leaves, np.inf, 0, 0)


def scanned(name, tree, queries, plan, leaves):
    """Scores ``[b, windows, points]`` of the kernel, and the work list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas, "plan_of", lambda *_: plan)
        kernel = pallas.Kernel(name, 1.0, None, True)
        terms, work = pallas.slot_terms(tree), effort(leaves.shape[1])
        scanner = pallas.scanner_of(tree, terms, queries, leaves, work, 10, kernel)
    ends = jnp.cumsum(scanner.sizes, axis=1, dtype=jnp.int32)
    found, work = scanner.round(ends, jnp.int32(0))
    found = np.asarray(found)[np.maximum(work.place, 0)]
    return np.where(np.asarray(work.place)[:, :, None] >= 0, found, -np.inf), work


class Suite(base.TestAnswer):
    name = ""

    @pytest.fixture
    def implementation(self):
        return {"implementation": self.name, "interpret": True}

    @pytest.mark.parametrize(
        "shape",
        [
            {"leaves": 9, "n": 700, "d": 33, "m": 11},
            {"leaves": 5, "n": 400, "d": 16, "m": 4, "k": 256},
            {"leaves": 4, "n": 300, "d": 3, "m": 2, "k": 4, "offsets": True},
        ],
        ids=str,
    )
    def test_estimates_are_those_of_plain_xla(self, implementation, shape):
        tree, _, queries = make(**shape)
        options = {"k": 6, "leaves_to_search": 3}
        wanted = tree_search(tree, queries, implementation="xla", **options)
        found = tree_search(tree, queries, **implementation, **options)
        base.assert_close(found, wanted)

    def test_effort_groups_wider_rows_and_second_copies(self, implementation):
        tree, rows, queries = make(leaves=20, n=600, d=12, m=6)
        tree = base.in_groups(tree)
        # Every third row lies in the leaves of its neighbour too.
        numbers = np.asarray(tree.slot_rows)
        tree = tree._replace(slot_rows=jnp.where(numbers % 3 == 1, numbers - 1, numbers))
        wide, more = (jnp.concatenate([x, x[:, :5]], axis=1) for x in (queries, rows))
        options = {
            "k": 5, "leaves_to_search": 12, "rescore": 20, "retrieve": 40,
            "rows": more, "row_queries": wide, "deviations": 1.0,
        }  # fmt: skip
        wanted = tree_search(tree, queries, implementation="xla", **options)
        found = tree_search(tree, queries, **implementation, **options)
        # A border may fall on the other side of one leaf or candidate.
        base.assert_close(found, wanted, share=0.95)
        assert all(len(set(ids)) == 5 for ids in np.asarray(found[1]).tolist())

    def test_scores_have_the_digits_of_bfloat16(self):
        tree, _, queries = make(leaves=4, n=500, d=50, m=25)
        plan = worklist.Plan(128, 128, 16, 16, 60)
        leaves = jnp.tile(jnp.arange(4, dtype=jnp.int32), (len(queries), 1))
        found, work = scanned(self.name, tree, queries, plan, leaves)
        slots = np.asarray(work.start)[:, :, None] + np.arange(128)
        assert (found > -np.inf).sum() == len(queries) * 500
        error, largest = [], []
        for i, q in enumerate(np.asarray(queries)):
            known = found[i] > -np.inf
            leaf = np.searchsorted(tree.starts, slots[i][known] // tree.block, side="right") - 1
            wanted = (
                slot_scores(tree, jnp.asarray(q), jnp.asarray(slots[i][known]))
                - np.asarray(tree.centroids)[leaf] @ q
            )
            error.append(np.abs(found[i][known] - wanted).max())
            largest.append(np.abs(wanted).max())
        assert max(error) < 4e-3 * max(largest)

    def test_no_queries(self, implementation):
        tree, _, queries = make(leaves=2, n=70)
        found = tree_search(tree, queries[:0], k=3, leaves_to_search=1, **implementation)
        assert [x.shape for x in found] == [(0, 3), (0, 3)]

    def test_additive_codes_are_scored_by_tables(self, implementation):
        tree, _, queries = make(leaves=3, n=200, d=6, m=3, k=4)
        words = np.random.default_rng(1).integers(-3, 4, (3, 6, 4)).astype(np.float32)
        tree = tree._replace(codewords=jnp.asarray(words))
        options = {"k": 4, "leaves_to_search": 2}
        wanted = tree_search(tree, queries, implementation="xla", **options)
        base.assert_close(tree_search(tree, queries, **implementation, **options), wanted)

    def test_it_does_not_run_elsewhere(self):
        tree, _, queries = make(leaves=2, n=70)
        with pytest.raises(ValueError, match="cannot run"):
            tree_search(tree, queries, k=1, leaves_to_search=1, implementation=self.name)
        with pytest.raises(ValueError, match="recall_target must be in"):
            tree_search(tree, queries, k=1, leaves_to_search=1, recall_target=0.0)


class TestTpu(Suite):
    name = "pallas_tpu"

    def test_what_does_not_fit_is_said(self, implementation):
        tree, _, queries = make(leaves=2, n=70, d=48, m=16, k=256)
        tree = tree._replace(codewords=jnp.zeros((16, 48, 256)))
        with pytest.raises(ValueError, match="additive codes as columns of ones are 4096 columns"):
            tree_search(tree, queries, k=1, leaves_to_search=1, **implementation)

    def test_rounds_and_batches_change_nothing(self, implementation, monkeypatch):
        tree, rows, queries = make(leaves=6, n=600)
        options = {"k": 5, "leaves_to_search": 6, "rescore": 80, "rows": rows, **implementation}
        whole = tree_search(tree, queries, **options)
        monkeypatch.setattr(worklist, "_ROUND_BYTES", 1 << 16)
        small = worklist.Sizes(points=128, batch=8)
        module = pallas._module(self.name)
        monkeypatch.setattr(pallas, "parts_of", lambda kernel: (module, small))
        count = effort(6)
        assert worklist.plan_of(tree, 8, count, 80, 1.0, small).windows < 6
        parts = tree_search(tree, queries, **options)
        np.testing.assert_array_equal(parts[1], whole[1])
        np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)

    @pytest.mark.full
    def test_the_tpu_interpreter_agrees(self):
        from jax.experimental.pallas import tpu as pltpu

        tree, rows, queries = make(leaves=3, n=200, integers=True)
        options = {"k": 5, "leaves_to_search": 2, "rescore": 60, "rows": rows}
        wanted = tree_search(tree, queries, implementation="xla", **options)
        found = tree_search(
            tree, queries, implementation=self.name, interpret=pltpu.InterpretParams(), **options
        )
        np.testing.assert_array_equal(found[1], wanted[1])


class TestGpu(Suite):
    name = "pallas_gpu"

    # The lists and the merging are those of the other kernel.
    @pytest.mark.full
    def test_batches_change_nothing(self, implementation):
        super().test_batches_change_nothing(implementation)


class TestWorkList:
    @pytest.mark.parametrize("group", [1, 4, 8])
    def test_each_query_meets_each_of_its_windows_once(self, group):
        rng = np.random.default_rng(group)
        tree, _, _ = make(leaves=11, n=3000)
        # Leaves of very different sizes, one of them empty.
        blocks = int(tree.starts[-1])
        inner = np.sort(rng.integers(0, blocks, 9))
        starts = np.concatenate([[0], inner, inner[-1:], [blocks]]).astype(np.int32)
        tree = tree._replace(starts=jnp.asarray(starts))
        b, probed, size = 6, 7, slots_per_block(16)
        leaves = jnp.asarray(np.stack([rng.permutation(11)[:probed] for _ in range(b)]), jnp.int32)
        sizes = worklist.Sizes(points=256, fewest=group, most=group)
        plan = worklist.plan_of(tree, b, effort(probed), 10, 1.0, sizes)
        _, number = worklist.windows_of(tree, plan.points)
        ends = jnp.cumsum(number[leaves], axis=1, dtype=jnp.int32)
        seen = [np.zeros(blocks * size, int) for _ in range(b)]
        for begin in range(0, int(ends.max()), plan.windows):
            work = worklist.round_of(tree, leaves, ends, jnp.int32(begin), plan)
            assert int(work.count) <= plan.entries
            rows = np.asarray(work.place)
            assert len(set(rows[rows >= 0].tolist())) == (rows >= 0).sum()
            for i, place in zip(*np.nonzero(rows >= 0), strict=True):
                entry, within = divmod(int(rows[i, place]), group)
                assert work.queries[entry, within] == i
                assert work.start[i, place] == 128 * work.first[entry]
                low = max(int(work.low[entry]), 0)
                high = min(int(work.high[entry]), plan.points)
                first = int(work.start[i, place])
                seen[i][first + low : first + high] += 1
        for counts, mine in zip(seen, np.asarray(leaves), strict=True):
            wanted = np.zeros(blocks * size, int)
            for leaf in mine:
                wanted[starts[leaf] * size : starts[leaf + 1] * size] = 1
            np.testing.assert_array_equal(counts, wanted)

    def test_bins_follow_the_recall_asked_for(self):
        tree, _, _ = make(leaves=2, n=4000)
        sizes = worklist.Sizes()
        plans = [
            worklist.plan_of(tree, 4, effort(2), 100, target, sizes) for target in (0.5, 0.9, 1.0)
        ]
        assert [plan.bins for plan in plans] == [128, 1024, plans[2].points]
        assert all(plan.points % plan.bins == 0 for plan in plans)


def test_recall_of_fewer_bins_is_the_expected_one():
    """Codes in random order in one leaf: the k best are balls in the bins of its windows."""
    tree, _, _ = make(leaves=1, n=2048, d=8, m=8)
    rng = np.random.default_rng(5)
    queries = jnp.asarray(rng.standard_normal((24, 8)), jnp.float32)
    k, count = 10, 10
    plan = worklist.Plan(1024, 128, 16, 2, 24)
    kernel = pallas.Kernel("pallas_tpu", 0.9, None, True)
    shared, rank = leaf_scores(tree, queries, effort(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas, "plan_of", lambda *_: plan)
        patch.setattr(pallas, "kept_slots", lambda _: count)
        terms = pallas.slot_terms(tree)
        found = pallas.best_slots(tree, terms, queries, shared, rank, effort(1), kernel)
    tables = jax.vmap(lambda q: lookup_table(tree, q))(queries)
    codes = np.asarray(pallas._columns(tree))
    scores = np.asarray(tables)[:, np.arange(8)[:, None], codes].sum(axis=1)
    best = np.argsort(-scores, axis=1)[:, :k]
    shares = [len(np.intersect1d(a, b)) / k for a, b in zip(found, best, strict=True)]
    expected = expected_recall(k, 2 * 128)
    # Four times the standard error of the mean, and places that bfloat16 swaps.
    assert abs(np.mean(shares) - expected) < 4 * np.std(shares) / np.sqrt(len(shares)) + 0.02
    # Of those it kept, each is the best of its bin.
    for row, kept in zip(scores, np.asarray(found), strict=True):
        bin_of = kept // 1024 * 128 + kept % 128
        assert len(set(bin_of.tolist())) == count
        of_all = np.arange(2048) // 1024 * 128 + np.arange(2048) % 128
        for slot, number in zip(kept, bin_of, strict=True):
            assert row[slot] >= row[of_all == number].max() - 4e-3 * np.abs(scores).max()


def test_codes_with_the_points_last_give_the_same():
    tree, rows, queries = make(leaves=3, n=300)
    plain = np.asarray(jax.device_get(pallas._columns(tree))).T
    options = {"k": 5, "leaves_to_search": 2, "rescore": 40, "rows": rows}
    options |= {"implementation": "pallas_tpu", "interpret": True}
    wanted = tree_search(tree, queries, **options)
    for layout in ("nibbles", "columns"):
        packed = pack_codes(plain, num_codewords=16, layout=layout)
        found = tree_search(tree._replace(codes=packed), queries, **options)
        for a, b in itertools.zip_longest(found, wanted):
            np.testing.assert_array_equal(a, b)
