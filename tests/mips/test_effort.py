"""How much of the tree a search looks at: groups of leaves, adaptive effort, overretrieving."""

import dataclasses

import jax
import numpy as np
import pytest

import avq_jax
from avq_jax.mips.options import group_count

N, D, LEAVES, GROUPS = 1200, 10, 40, 6


def make(n, seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((30, D))
    x = centers[rng.integers(30, size=n)] + 0.5 * rng.standard_normal((n, D))
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def data():
    return make(N), make(40, seed=1)


@pytest.fixture(scope="module", params=["dot", "l2"])
def grouped(request, data):
    return avq_jax.build(
        jax.random.key(0), data[0], metric=request.param, num_leaves=LEAVES, num_groups=GROUPS,
        num_subspaces=5, num_iterations=3, soar_lambda=None,
    )  # fmt: skip


def flat(index):
    """The same leaves in one level."""
    packed = index.tree.packed._replace(groups=None)
    return dataclasses.replace(index, tree=index.tree._replace(packed=packed))


def share(found, wanted):
    found, wanted = np.asarray(found.ids), np.asarray(wanted.ids)
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)])


class TestGroups:
    def test_every_leaf_lies_in_the_group_of_the_nearest_mean(self, grouped):
        groups = grouped.tree.packed.groups
        starts = np.asarray(groups.starts)
        assert starts[0] == 0
        assert starts[-1] == LEAVES
        assert len(starts) == GROUPS + 1

    def test_all_leaves_probed_is_the_search_of_one_level(self, grouped, data):
        options = {"k": 8, "leaves_to_search": LEAVES, "rescore": 100}
        found = avq_jax.search(grouped, data[1], **options)
        np.testing.assert_array_equal(
            found.ids, avq_jax.search(flat(grouped), data[1], **options).ids
        )

    @pytest.mark.parametrize("leaves", [1, 2])
    def test_fewer_leaves_are_ranked_in_every_form(self, grouped, data, leaves, tmp_path):
        options = {"k": 5, "leaves_to_search": leaves, "rescore": 60}
        wanted = avq_jax.search(grouped, data[1], implementation="xla", **options)
        avq_jax.save(grouped, tmp_path / "index")
        for found in (
            avq_jax.search(grouped, data[1], **options),
            avq_jax.searcher(grouped, **options)(data[1]),
            avq_jax.search(avq_jax.load(tmp_path / "index"), data[1], **options),
        ):
            assert share(found, wanted) > 0.97
        eager = avq_jax.search(grouped, data[1][:3], **options)
        assert share(eager, jax.tree.map(lambda a: a[:3], wanted)) > 0.97
        # Groups may lose leaves that ranking all of them would have found, but few.
        assert share(wanted, avq_jax.search(flat(grouped), data[1], **options)) > 0.7

    def test_the_leaves_probed_are_those_of_the_best_groups(self, grouped, data):
        # 16 leaves are ranked for one that is probed: by hand, from the groups alone.
        packed = grouped.tree.packed
        groups = packed.groups
        starts = np.asarray(groups.starts)
        q = data[1][0]
        score = np.asarray(groups.vectors) @ q
        score = score + np.asarray(groups.offset) if groups.offset.shape[0] else score
        left, ranked = 16, []
        for g in np.argsort(-score):
            if left <= 0:
                break
            ranked += range(starts[g], starts[g + 1])
            left -= starts[g + 1] - starts[g]
        assert len(ranked) < LEAVES
        rank = np.asarray(grouped.tree.ranking) @ q
        rank = rank if grouped.tree.leaf_offset is None else rank + grouped.tree.leaf_offset
        leaf = max(ranked, key=lambda l: rank[l])  # noqa: E741
        begin, end = np.asarray(packed.starts)[leaf : leaf + 2] * packed.block
        inside = set(np.asarray(packed.slot_rows)[begin:end].tolist()) - {-1}
        for implementation in ("xla", None):
            ids = avq_jax.search(
                grouped, q[None], k=4, leaves_to_search=1, implementation=implementation
            ).ids
            assert set(np.asarray(ids)[0].tolist()) - {-1} <= inside

    def test_filters_updates_and_sharding(self, grouped, data):
        mask = np.zeros(N, bool)
        mask[::7] = True
        options = {"k": 3, "leaves_to_search": LEAVES, "rescore": 100}
        ids = np.asarray(avq_jax.search(grouped, data[1], allowed=mask, **options).ids)
        assert mask[ids].all()
        roomy = avq_jax.reserve(grouped, capacity=N + 10)
        assert roomy.tree.packed.groups is not None
        again, _ = avq_jax.add(roomy, 3 * data[0][:2])
        assert avq_jax.rebalance(jax.random.key(1), again).tree.packed.groups is not None
        parts = avq_jax.shard(grouped, jax.make_mesh((2,), ("shards",)), axis="shards")
        options["leaves_to_search"] = 2
        found = avq_jax.search_sharded(parts, data[1], **options)
        assert share(found, avq_jax.search(grouped, data[1], **options)) > 0.97

    def test_counts(self, data):
        assert group_count("auto", 16383) is None
        assert group_count("auto", 16384) == 128
        for bad in (LEAVES + 1, 0):
            with pytest.raises(ValueError, match="num_groups"):
                avq_jax.build(
                    jax.random.key(0), data[0], num_leaves=LEAVES, num_subspaces=5, num_groups=bad
                )


class TestAdaptive:
    def test_enough_deviations_pass_nothing_over(self, grouped, data):
        options = {"k": 5, "leaves_to_search": LEAVES, "rescore": 60}
        wanted = avq_jax.search(grouped, data[1], **options)
        found = avq_jax.search(grouped, data[1], adaptive=1e6, **options)
        np.testing.assert_array_equal(found.ids, wanted.ids)

    def test_recall_rises_with_them_from_that_of_four_leaves(self, grouped, data):
        index, q = flat(grouped), data[1]
        options = {"k": 5, "leaves_to_search": LEAVES, "rescore": 60}
        exact = avq_jax.brute_force(q, data[0], k=5, metric=index.metric)
        recalls = [
            share(avq_jax.search(index, q, adaptive=z, **options), exact)
            for z in (0.0, 1.0, 3.0, 9.0)
        ]
        assert recalls == sorted(recalls)
        few = avq_jax.search(index, q, k=5, leaves_to_search=4, rescore=60)
        none = avq_jax.search(index, q, adaptive=0.0, **options)
        # A leaf whose mean alone is above the bar may still be probed.
        assert share(none, exact) >= share(few, exact)
        assert recalls[-1] > 0.99

    @pytest.mark.parametrize("rescore", [0, 60])
    @pytest.mark.parametrize("z", [0.5, 2.0])
    def test_forms_agree(self, grouped, data, z, rescore):
        index = flat(grouped)
        options = {"k": 5, "leaves_to_search": 25, "rescore": rescore, "adaptive": z}
        batch = avq_jax.search(index, data[1], **options)
        one = [avq_jax.search(index, q[None], **options) for q in data[1][:6]]
        np.testing.assert_array_equal(np.concatenate([o.ids for o in one]), batch.ids[:6])
        handle = avq_jax.searcher(index, **options)
        np.testing.assert_array_equal(handle(data[1])[1], batch.ids)
        xla = avq_jax.search(index, data[1], implementation="xla", **options)
        assert share(batch, xla) > 0.97

    def test_explained(self, grouped, data):
        index, q = flat(grouped), data[1][0]
        options = {"k": 5, "leaves_to_search": LEAVES, "rescore": 20}
        seen = 0
        for row in range(0, N, 40):
            told = avq_jax.explain(index, q, row, adaptive=0.5, **options)
            assert all(copy.probed for copy in told.copies if copy.leaf_rank <= 4)
            seen += any(not copy.probed for copy in told.copies)
            if told.place:
                assert any(copy.probed for copy in told.copies)
        assert seen > 0

    @pytest.mark.parametrize("bad", [-1.0, float("nan")], ids=str)
    def test_bad(self, grouped, data, bad):
        with pytest.raises(ValueError, match="adaptive must be None or a number >= 0"):
            avq_jax.search(grouped, data[1], adaptive=bad)


class TestOverretrieve:
    @pytest.fixture(scope="class")
    def spilled(self, data):
        return avq_jax.build(
            jax.random.key(0), data[0], num_leaves=LEAVES, num_subspaces=2, num_codewords=4,
            num_iterations=3, soar_lambda=1.0,
        )  # fmt: skip

    def test_second_copies_cost_candidates_unless_more_are_kept(self, spilled, data):
        exact = avq_jax.brute_force(data[1], data[0], k=10)
        options = {"k": 10, "leaves_to_search": LEAVES, "rescore": 30}
        recalls = [
            share(avq_jax.search(spilled, data[1], overretrieve=f, **options), exact)
            for f in (1.0, 1.5, 2.0)
        ]
        assert recalls == sorted(recalls)
        assert recalls[2] > recalls[0]

    def test_twice_as_many_are_the_best_distinct_rows(self, spilled, data):
        options = {"k": 10, "leaves_to_search": LEAVES}
        found = avq_jax.search(spilled, data[1], rescore=25, overretrieve=2.0, **options)
        xla = avq_jax.search(
            spilled, data[1], rescore=25, overretrieve=2.0, implementation="xla", **options
        )
        # Sixteen different residuals a leaf: many estimates are equal but for rounding.
        assert share(found, xla) > 0.9
        # By hand: the 25 best rows by estimate, rescored.
        estimates = avq_jax.search(
            spilled, data[1], k=25, leaves_to_search=LEAVES, rescore=0, implementation="xla"
        )
        for ids, scores, q in zip(estimates.ids, xla.scores, data[1], strict=True):
            exact = np.sort(data[0][np.asarray(ids)] @ q)[::-1][:10]
            np.testing.assert_allclose(scores, exact, rtol=1e-5)

    def test_default_is_two_for_few_candidates(self, spilled, data):
        options = {"k": 10, "leaves_to_search": 8, "rescore": 20}
        found = avq_jax.search(spilled, data[1], **options)
        again = avq_jax.search(spilled, data[1], overretrieve=2.0, **options)
        np.testing.assert_array_equal(found.ids, again.ids)

    @pytest.mark.parametrize("query", [0, slice(0, 20)], ids=["few", "batch"])
    def test_far_more_than_there_are_is_all(self, spilled, data, query):
        options = {"k": 10, "leaves_to_search": LEAVES, "rescore": 20}
        found = avq_jax.search(spilled, data[1][query], overretrieve=1e300, **options)
        again = avq_jax.search(spilled, data[1][query], overretrieve=1e6, **options)
        np.testing.assert_array_equal(found.ids, again.ids)

    @pytest.mark.parametrize("bad", [0.5, float("inf")], ids=str)
    def test_bad(self, spilled, data, bad):
        with pytest.raises(ValueError, match="overretrieve must be None or a number >= 1"):
            avq_jax.search(spilled, data[1], overretrieve=bad)


def test_tune_finds_adaptive_effort_where_it_pays(data):
    index = avq_jax.build(
        jax.random.key(0), data[0], num_leaves=LEAVES, num_subspaces=5, num_iterations=3
    )
    found = avq_jax.tune(index, data[1], k=5, target_recall=0.98)
    tried = [t for t in found.trials if t.adaptive is not None]
    assert all(0 <= t.recall <= 1 for t in tried)
    again = avq_jax.search(
        index, data[1], k=5, leaves_to_search=found.leaves_to_search, rescore=found.rescore,
        adaptive=found.adaptive,
    )  # fmt: skip
    exact = avq_jax.brute_force(data[1], data[0], k=5)
    on_chosen = share(*(jax.tree.map(lambda a: a[0::2], r) for r in (again, exact)))
    assert on_chosen >= 0.98
