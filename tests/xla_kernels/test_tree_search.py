"""Tree search: the compiled kernel against plain XLA, at every instruction set."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xla_kernels import (
    direct_tree_search,
    library,
    pack_tree,
    slots_per_block,
    tree_search,
    unpack_codes,
)
from xla_kernels import layout as layouts
from xla_kernels.tree_search import packed as packed_tree
from xla_kernels.tree_search import xla

compiled = pytest.mark.usefixtures("compiled")


def make(
    seed=0, *, leaves=7, n=900, d=10, m=5, k=16, offsets=False, integers=False, gains=0, wide=False
):
    rng = np.random.default_rng(seed)
    draw = (lambda *s: rng.integers(-3, 4, s)) if integers else (lambda *s: rng.standard_normal(s))
    centroids = np.asarray(draw(leaves, d), np.float32)
    leaf = rng.integers(0, leaves, n)
    rows = np.asarray(centroids[leaf] + draw(n, d), np.float32)
    size = slots_per_block(k)
    order, count = np.argsort(leaf, kind="stable"), np.bincount(leaf, minlength=leaves)
    starts = np.concatenate([[0], np.cumsum(-(-count // size))]).astype(np.int32)
    slots = np.full(starts[-1] * size, -1, np.int32)
    slots[np.arange(n) + np.repeat(starts[:-1] * size - (np.cumsum(count) - count), count)] = order
    tree = pack_tree(
        centroids,
        starts,
        slots,
        np.asarray(draw(m, k, d if wide else -(-d // m)), np.float32),
        rng.integers(0, k, (len(slots), m)).astype(np.uint8),
        leaf_offset=np.asarray(draw(leaves), np.float32) if offsets else None,
        slot_offset=np.asarray(draw(len(slots)), np.float32) if offsets else None,
        gains=make_gains(rng, gains, len(slots)) if gains else None,
    )
    queries = np.asarray(draw(13, d), np.float32)
    return tree, jnp.asarray(rows), jnp.asarray(queries)


def make_gains(rng, count, slots):
    """Numbers of levels from a third to three."""
    levels = np.geomspace(1 / 3, 3, count).astype(np.float32)
    return rng.integers(0, count, slots).astype(np.uint8), levels


def assert_close(found, wanted, *, share=1.0):
    """So many ids in common, in any place: one that is missing moves all that follow."""
    pairs = zip(np.asarray(found[1]), np.asarray(wanted[1]), strict=True)
    common = [len(set(a) & set(b)) / len(b) for a, b in pairs]
    assert np.mean(common) >= share
    same = np.asarray(found[1]) == np.asarray(wanted[1])
    assert share < 1 or same.all()
    np.testing.assert_allclose(
        np.asarray(found[0])[same], np.asarray(wanted[0])[same], rtol=2e-5, atol=2e-5
    )


SHAPES = [
    {},
    {"leaves": 40, "n": 3000, "d": 33, "m": 11},
    {"leaves": 3, "n": 700, "d": 8, "m": 8, "k": 4},
    {"leaves": 5, "n": 1000, "d": 16, "m": 4, "k": 256},
    {"leaves": 1, "n": 90, "d": 5, "m": 5, "k": 7},
    {"offsets": True},
]
GAINED = [
    {"gains": 16},
    {"gains": 256, "leaves": 40, "n": 3000, "d": 33, "m": 11},
    {"gains": 16, "leaves": 5, "n": 1000, "d": 16, "m": 4, "k": 256},
    {"gains": 16, "leaves": 3, "n": 700, "d": 8, "m": 8, "k": 4},
    {"gains": 256, "offsets": True},
    {"gains": 16, "d": 12, "m": 4, "wide": True},
]


@compiled
class TestAgainstXla:
    @pytest.mark.parametrize("shape", SHAPES + GAINED, ids=str)
    @pytest.mark.parametrize("probed", [1, 100])
    def test_estimates(self, shape, probed):
        tree, _, queries = make(**shape)
        options = {"k": 6, "leaves_to_search": probed}
        wanted = tree_search(tree, queries, implementation="xla", **options)
        found = tree_search(tree, queries, implementation="cpu", **options)
        # Tables rounded to bytes choose what is ranked exactly.
        assert_close(found, wanted, share=0.95)

    @pytest.mark.parametrize("shape", SHAPES[:4] + GAINED[:2], ids=str)
    def test_rescored(self, shape):
        tree, rows, queries = make(**shape)
        options = {"k": 5, "leaves_to_search": 3, "rescore": 200, "rows": rows}
        wanted = tree_search(tree, queries, implementation="xla", **options)
        found = tree_search(tree, queries, implementation="cpu", **options)
        # Tables of 7 bits, as levels below AVX-512 with VBMI have, lose more.
        assert_close(found, wanted, share=0.93 if "gains" in shape else 0.97)

    @pytest.mark.parametrize("gains", [0, 16, 256])
    def test_every_level_gives_the_same_bits(self, simd, gains):
        def search(level):
            library.set_simd_level(level)
            # Codes are packed for the level.
            tree, rows, queries = make(3, leaves=12, n=1500, d=21, m=7, gains=gains)
            options = {"k": 5, "leaves_to_search": 5, "rescore": 300, "rows": rows}
            return [np.asarray(a) for a in tree_search(tree, queries, **options)]

        wanted, found = search("portable"), search(simd)
        # A table of 7 or of 8 bits may choose another last candidate.
        pairs = zip(found[1], wanted[1], strict=True)
        assert np.mean([len(set(a) & set(b)) / 5 for a, b in pairs]) > (0.94 if gains else 0.98)
        same = found[1] == wanted[1]
        np.testing.assert_array_equal(found[0][same], wanted[0][same])

    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
    def test_stores(self, kind):
        tree, rows, queries = make()
        scale = None
        if kind == "int8":
            scale = jnp.max(jnp.abs(rows), axis=1) / 127
            rows = jnp.round(rows / scale[:, None]).astype(jnp.int8)
        rows = rows.astype(kind)
        options = {"k": 5, "leaves_to_search": 7, "rescore": 300, "rows": rows}
        options["row_scale"] = scale
        wanted = tree_search(tree, queries, implementation="xla", **options)
        found = tree_search(tree, queries, implementation="cpu", **options)
        assert_close(found, wanted, share=0.97)

    def test_euclidean(self):
        tree, rows, queries = make(offsets=True)
        options = {"k": 5, "leaves_to_search": 7, "rescore": 900, "rows": rows, "euclidean": True}
        distance = np.sum((np.asarray(queries)[:, None] - np.asarray(rows)[None]) ** 2, axis=-1)
        scores, ids = tree_search(tree, queries, implementation="cpu", **options)
        np.testing.assert_array_equal(ids, np.argsort(distance, axis=1, kind="stable")[:, :5])
        np.testing.assert_allclose(-scores, np.sort(distance, axis=1)[:, :5], rtol=1e-5)


@pytest.fixture(params=["xla", "cpu"])
def implementation(request):
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return {"implementation": request.param}


class TestAnswer:
    """Inherited by the kernels for accelerators too."""

    def test_everything_rescored_is_exact_and_ties_go_to_the_lowest_row(self, implementation):
        tree, rows, queries = make(integers=True)
        scores = np.asarray(queries) @ np.asarray(rows).T
        found = tree_search(
            tree,
            queries,
            k=20,
            leaves_to_search=7,
            rescore=900,
            rows=rows,
            **implementation,
        )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :20]
        np.testing.assert_array_equal(found[1], order)
        np.testing.assert_array_equal(found[0], np.take_along_axis(scores, order, axis=1))

    def test_masks_padding_and_queries_that_are_not_finite(self, implementation):
        tree, _, queries = make()
        usable = np.zeros((1, len(tree.slot_rows)), bool)
        usable[0, np.flatnonzero(np.asarray(tree.slot_rows) >= 0)[:3]] = True
        queries = queries.at[2, 1].set(jnp.nan).at[5, 0].set(jnp.inf)
        options = {"k": 5, "leaves_to_search": 7, **implementation}
        scores, ids = (np.asarray(a) for a in tree_search(tree, queries, usable=usable, **options))
        allowed = set(np.asarray(tree.slot_rows)[usable[0]].tolist())
        for i in range(len(ids)):
            if i in (2, 5):
                assert (ids[i] == -1).all()
                assert (scores[i] == -np.inf).all()
            else:
                assert set(ids[i, :3].tolist()) == allowed
                assert (ids[i, 3:] == -1).all()
        clean = tree_search(tree, queries.at[2].set(1.0).at[5].set(1.0), usable=usable, **options)
        others = [i for i in range(len(ids)) if i not in (2, 5)]
        np.testing.assert_array_equal(np.asarray(clean[0])[others], scores[others])

    def test_batches_change_nothing(self, implementation):
        tree, rows, queries = make(leaves=20, n=2000)
        options = {"k": 5, "leaves_to_search": 6, "rescore": 30, "rows": rows}
        options |= implementation
        whole = tree_search(tree, queries, **options)
        single = [tree_search(tree, q[None], **options) for q in queries]
        for i, part in enumerate(("scores", "ids")):
            np.testing.assert_array_equal(whole[i], np.concatenate([s[i] for s in single]), part)
        mapped = jax.vmap(lambda q: tree_search(tree, q[None], **options))(queries)
        np.testing.assert_array_equal(mapped[1][:, 0], whole[1])

    def test_gradients(self, implementation):
        tree, rows, queries = make(d=6, m=3)

        def total(q, rows):
            found = tree_search(
                tree,
                q,
                k=3,
                leaves_to_search=7,
                rescore=50,
                rows=rows,
                **implementation,
            )
            return found[0].sum()

        options = {"k": 3, "leaves_to_search": 7, "rescore": 50, "rows": rows}
        ids = tree_search(tree, queries, **implementation, **options)[1]
        by_query, by_row = jax.grad(total, argnums=(0, 1))(queries, rows)
        np.testing.assert_allclose(by_query, rows[ids].sum(axis=1), rtol=1e-5)
        expected = np.zeros(rows.shape, np.float32)
        np.add.at(expected, np.asarray(ids), np.asarray(queries)[:, None, :])
        np.testing.assert_allclose(by_row, expected, rtol=1e-5, atol=1e-6)


def numpy_estimates(tree, queries):
    """Scores ``[b, S]`` of all slots by the definition, in float64."""
    packed = jax.tree.map(lambda a: np.asarray(a, np.float64), tree._replace(codes=None))
    m, width, _ = packed.codewords.shape
    d = queries.shape[1]
    codes = np.asarray(unpack_codes(tree.codes))
    parts = np.pad(queries.astype(np.float64), ((0, 0), (0, max(0, m * width - d))))
    total = 0
    for j in range(m):
        part = parts[:, :d] if width == d else parts[:, j * width : (j + 1) * width]
        total = total + (part @ packed.codewords[j])[:, codes[:, j]]
    if tree.gains is not None:
        total = total * packed.gains.levels[np.asarray(tree.gains.level)]
    leaf = np.searchsorted(tree.starts, np.arange(len(codes)) // tree.block, side="right") - 1
    total = total + (queries @ packed.centroids.T)[:, leaf]
    return total + packed.slot_offset if len(packed.slot_offset) else total


class TestGains:
    @pytest.mark.parametrize("shape", GAINED, ids=str)
    @pytest.mark.parametrize("single", [True, False])
    def test_scores_are_those_of_the_definition(self, implementation, shape, single):
        tree, _, queries = make(**shape)
        queries = queries[:1] if single else queries
        options = {"k": 9, "leaves_to_search": 40, **implementation}
        found = jax.tree.map(np.asarray, tree_search(tree, queries, **options))
        exact = numpy_estimates(tree, np.asarray(queries))
        exact[:, np.asarray(tree.slot_rows) < 0] = -np.inf
        np.testing.assert_allclose(found[0], -np.sort(-exact, axis=1)[:, :9], rtol=1e-5, atol=2e-5)
        rows = np.asarray(tree.slot_rows)
        each = [exact[i, np.flatnonzero(np.isin(rows, ids))] for i, ids in enumerate(found[1])]
        np.testing.assert_allclose(np.sort(found[0]), np.sort(each), rtol=1e-5, atol=2e-5)

    @compiled
    @pytest.mark.parametrize("shape", GAINED, ids=str)
    def test_every_level_finds_them(self, simd, shape):
        library.set_simd_level(simd)
        tree, _, queries = make(**shape)
        options = {"k": 9, "leaves_to_search": 40, "implementation": "cpu"}
        scores, _ = tree_search(tree, queries, **options)
        exact = numpy_estimates(tree, np.asarray(queries))
        exact[:, np.asarray(tree.slot_rows) < 0] = -np.inf
        # Of 50 slots that rounded tables choose nine are returned.
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :9], rtol=1e-5, atol=2e-5)

    def test_gradients_reach_levels(self, implementation):
        tree, _, queries = make(gains=16, d=6, m=3)

        def total(levels, q):
            changed = tree._replace(gains=tree.gains._replace(levels=levels))
            options = {"k": 3, "leaves_to_search": 7, **implementation}
            return tree_search(changed, q, **options)[0].sum()

        by_level, by_query = jax.grad(total, argnums=(0, 1))(tree.gains.levels, queries)
        step = 1e-3 * jax.random.normal(jax.random.key(0), (16,))
        slope = total(tree.gains.levels + step, queries) - total(tree.gains.levels, queries)
        np.testing.assert_allclose(by_level @ step, slope, rtol=0.02, atol=2e-3)
        ids = tree_search(tree, queries, k=3, leaves_to_search=7)[1]
        place = jnp.argmax(tree.slot_rows[None, None, :] == ids[:, :, None], axis=-1)

        def estimates(q):
            return sum(
                xla.slot_scores(tree, each, slots).sum()
                for each, slots in zip(q, place, strict=True)
            )

        exact = jax.grad(estimates)(queries)
        np.testing.assert_allclose(by_query, exact, rtol=1e-5, atol=1e-5)

    def test_gains_that_do_not_fit_are_refused(self):
        tree, _, _ = make()
        words = np.asarray(tree.codewords).transpose(0, 2, 1)
        parts = (tree.centroids, tree.starts, tree.slot_rows, words, tree.codes)
        level = np.zeros(len(tree.slot_rows), np.uint8)
        for gains in [
            (level[1:], np.ones(16)),
            (level.astype(np.int32), np.ones(16)),
            (level, np.ones(17)),
            (level + np.uint8(16), np.ones(16)),
        ]:
            with pytest.raises(ValueError, match="gains must be"):
                pack_tree(*parts, gains=gains)


@pytest.mark.parametrize("options", [{}, {"wide": True}, {"gains": 16}, {"k": 40}], ids=str)
def test_packed_in_parts(monkeypatch, options):
    """Codes that a function gives, and their spread leaf by leaf, whatever the parts are."""
    wanted, _, _ = make(n=3000, **options)
    monkeypatch.setattr(packed_tree, "PART", 128)
    monkeypatch.setattr(layouts, "PART", 128)
    codes = np.asarray(unpack_codes(wanted.codes))
    gains = wanted.gains
    found = pack_tree(
        wanted.centroids,
        wanted.starts,
        wanted.slot_rows,
        np.asarray(wanted.codewords).transpose(0, 2, 1),
        lambda first, end: codes[first:end],
        leaf_offset=wanted.leaf_offset if wanted.leaf_offset.size else None,
        slot_offset=wanted.slot_offset if wanted.slot_offset.size else None,
        gains=None if gains is None else (gains.level, gains.levels),
    )
    np.testing.assert_allclose(found.spread, wanted.spread, rtol=1e-6)
    same = found._replace(spread=wanted.spread)
    jax.tree.map(np.testing.assert_array_equal, same, wanted)


@compiled
class TestDirect:
    @pytest.mark.parametrize("gains", [0, 16, 256])
    def test_equals_the_call_through_xla(self, gains):
        tree, rows, queries = make(leaves=20, n=2000, gains=gains)
        options = {"k": 5, "leaves_to_search": 6, "rescore": 30, "rows": rows}
        wanted = tree_search(tree, queries, implementation="cpu", **options)
        found = direct_tree_search(tree, **options)(np.asarray(queries))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_leaves_extreme_queries_to_others(self, size):
        tree, _, queries = make()
        find = direct_tree_search(tree, k=2, leaves_to_search=2)
        assert find(np.asarray(queries) * np.float32(size)) is None


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": jnp.array([0, 2, 1, 3, 4, 5, 6, 7], jnp.int32)}, "starts must rise"),
        ({"centroid_scale": jnp.zeros(2)}, "centroid_scale must have shape"),
        ({"slot_rows": jnp.zeros(31, jnp.int32)}, "must"),
        ({"usable": jnp.zeros((2, 5), bool)}, "usable must be"),
        ({"tiles": jnp.zeros((1, 1, 16, 2), jnp.int16)}, "tiles must have shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_operands_are_an_error_status(change, message):
    tree, _, queries = make()
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=message):
        jax.block_until_ready(
            tree_search(
                tree._replace(**change), queries, k=2, leaves_to_search=2, implementation="cpu"
            )
        )


@compiled
def test_a_row_beyond_the_store_is_never_read():
    tree, rows, queries = make()
    wrong = tree._replace(slot_rows=jnp.where(tree.slot_rows >= 0, 10**9, -1))
    ids = tree_search(
        wrong,
        queries,
        k=3,
        leaves_to_search=7,
        rescore=40,
        rows=rows,
        implementation="cpu",
    )[1]
    assert (ids == -1).all()


def test_bad_arguments():
    tree, rows, queries = make()
    with pytest.raises(ValueError, match="k and leaves_to_search must be at least 1"):
        tree_search(tree, queries, k=0, leaves_to_search=1)
    with pytest.raises(ValueError, match="rescore must be 0, or at least k = 5"):
        tree_search(tree, queries, k=5, leaves_to_search=1, rescore=3, rows=rows)
    with pytest.raises(ValueError, match="codes must be"):
        pack_tree(
            np.zeros((1, 2)), [0, 1], np.zeros(32), np.zeros((2, 16, 1)), np.zeros((3, 2), np.uint8)
        )


def in_groups(tree, count=3):
    """The tree with groups of equally many neighbouring leaves."""
    leaves = tree.centroids.shape[0]
    starts = np.linspace(0, leaves, count + 1).astype(np.int32)
    means = [np.mean(tree.centroids[a:b], axis=0) for a, b in itertools.pairwise(starts)]
    return pack_tree(
        tree.centroids,
        tree.starts,
        tree.slot_rows,
        np.asarray(tree.codewords).transpose(0, 2, 1),
        tree.codes,
        leaf_offset=tree.leaf_offset if tree.leaf_offset.shape[0] else None,
        slot_offset=tree.slot_offset if tree.slot_offset.shape[0] else None,
        groups=(np.stack(means), starts),
        gains=tree.gains,
    )


class TestEffort:
    @compiled
    @pytest.mark.parametrize(
        ("offsets", "deviations", "grouped", "gains"),
        [
            *itertools.product([False, True], [None, 0.5, 3.0], [False, True], [0]),
            (False, 3.0, False, 16),
            (True, 3.0, False, 256),
            (True, None, True, 16),
        ],
    )
    def test_kernel_does_as_plain_xla(self, simd, offsets, deviations, grouped, gains):
        library.set_simd_level(simd)
        tree, rows, queries = make(leaves=60, n=4000, d=24, m=12, offsets=offsets, gains=gains)
        tree = in_groups(tree) if grouped else tree
        wide = jnp.concatenate([queries, queries[:, :5]], axis=1)
        more = jnp.concatenate([rows, rows[:, 5:10]], axis=1)
        options = {
            "k": 5, "leaves_to_search": 2 if grouped else 30, "rescore": 40, "retrieve": 50,
            "rows": more, "row_queries": wide, "deviations": deviations,
        }  # fmt: skip
        wanted = tree_search(tree, queries, implementation="xla", **options)
        found = tree_search(tree, queries, implementation="cpu", **options)
        # A border of rounded tables may fall on the other side of one leaf or candidate.
        pairs = zip(np.asarray(found[1]), np.asarray(wanted[1]), strict=True)
        assert np.mean([len(set(a) & set(b)) / 5 for a, b in pairs]) > 0.93
        assert_close(found, wanted, share=0.85)
        bound = {name: options[name] for name in options if name != "row_queries"}
        direct = direct_tree_search(tree, **bound)(np.asarray(queries), np.asarray(wide))
        np.testing.assert_array_equal(direct[1], found[1])
        mapped = jax.vmap(
            lambda q, w: tree_search(tree, q[None], **{**options, "row_queries": w[None]})[1][0]
        )(queries, wide)
        np.testing.assert_array_equal(mapped, found[1])

    @pytest.mark.parametrize("gains", [0, 16])
    def test_spread_is_the_deviation_of_decoded_coordinates(self, gains):
        tree, _, _ = make(leaves=3, n=200, d=6, m=3, k=4, gains=gains)
        words = np.asarray(tree.codewords)
        codes = np.asarray(unpack_codes(tree.codes))
        decoded = np.concatenate([words[j].T[codes[:, j]] for j in range(3)], axis=1)
        if gains:
            decoded *= np.asarray(tree.gains.levels)[np.asarray(tree.gains.level)][:, None]
        starts = np.asarray(tree.starts) * tree.block
        for leaf, (a, b) in enumerate(itertools.pairwise(starts)):
            held = decoded[a:b][np.asarray(tree.slot_rows)[a:b] >= 0]
            np.testing.assert_allclose(tree.spread[leaf], np.sqrt(np.mean(held**2)), rtol=1e-5)

    def test_wider_rows_need_their_queries(self):
        tree, rows, queries = make()
        options = {"k": 2, "leaves_to_search": 2, "rescore": 4}
        find = direct_tree_search(tree, rows=jnp.tile(rows, (1, 2)), **options)
        if find is not None:
            with pytest.raises(ValueError, match="row_queries must be given"):
                find(np.asarray(queries))

    def test_bad_arguments(self):
        tree, rows, queries = make()
        options = {"k": 2, "leaves_to_search": 2}
        with pytest.raises(ValueError, match="deviations must be None or at least 0"):
            tree_search(tree, queries, deviations=-1.0, **options)
        with pytest.raises(ValueError, match="retrieve must be at least rescore = 9"):
            tree_search(tree, queries, rows=rows, rescore=9, retrieve=8, **options)
        parts = (tree.centroids, tree.starts, tree.slot_rows)
        words = np.asarray(tree.codewords).transpose(0, 2, 1)
        for groups in [
            (np.zeros((2, 3)), [0, 1, 7]),
            (np.zeros((2, 10)), [0, 7]),
            (np.zeros((2, 10)), [0, 8, 7]),
            (np.zeros((2, 10)), [0, 3, 6]),
        ]:
            with pytest.raises(ValueError, match="groups must"):
                pack_tree(*parts, words, tree.codes, groups=groups)

    @compiled
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"starts": jnp.array([0, 5, 3, 7], jnp.int32)}, "group_starts must rise"),
            ({"starts": jnp.array([0, 2, 4, 9], jnp.int32)}, "group_starts must rise"),
            ({"tiles": jnp.zeros((2, 5, 16, 2), jnp.int16)}, "group_tiles must have shape"),
            ({"offset": jnp.zeros(2)}, "group_offset must have shape"),
        ],
        ids=str,
    )
    def test_bad_groups_are_an_error_status(self, change, message):
        tree, _, queries = make()
        tree = in_groups(tree)
        broken = tree._replace(groups=tree.groups._replace(**change))
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=message):
            jax.block_until_ready(
                tree_search(broken, queries, k=2, leaves_to_search=2, implementation="cpu")
            )
