"""One suite over all implementations, instruction sets and layouts: integer tables bit for bit."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xla_kernels import (
    FactoredTables,
    adc_scores,
    adc_top_k,
    direct_adc_top_k,
    library,
    pack_codes,
)
from xla_kernels.layout import LAYOUTS, POINTS_LAST

from .oracle import numpy_scores, numpy_top_k

# (n, m, k, b, results): odd sizes, none, one, blocks of 32 and 64 and their neighbours.
SHAPES = [
    (1000, 7, 16, 3, 10),
    (0, 3, 16, 2, 3),
    (65, 5, 200, 9, 70),
    (33, 0, 4, 1, 5),
    (1, 1, 1, 1, 1),
    (64, 4, 16, 0, 4),
    (2049, 50, 16, 17, 100),
    (1027, 25, 256, 8, 50),
    (700, 34, 64, 4, 20),
    (500, 9, 100, 5, 499),
]


def problem(seed, n, m, k, b):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, k, (n, m)).astype(np.uint8)
    tables = rng.integers(-60, 60, (b, m, k)).astype(np.float32)
    return rng, tables, codes


def layouts_for(k):
    return [x for x in LAYOUTS if k <= 16 or x in ("columns", "bytes")]


class Suite:
    """Inherited by each implementation, which gives `top_k` and `scores`."""

    def top_k(self, tables, codes, k, **terms):
        raise NotImplementedError

    def scores(self, tables, codes, **terms):
        raise NotImplementedError

    def check(self, tables, codes, k, **terms):
        scores, ids = self.top_k(tables, codes, k, **terms)
        want_scores, want_ids = numpy_top_k(tables, codes, k, **terms)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_array_equal(scores, want_scores)
        assert ids.dtype == jnp.int32
        assert scores.dtype == jnp.float32

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_top_k_of_integer_tables(self, shape):
        n, m, k, b, results = shape
        _, tables, codes = problem(0, n, m, k, b)
        self.check(tables, codes, results)

    @pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[7]], ids=str)
    def test_masks_gains_and_offsets(self, shape):
        n, m, k, b, results = shape
        rng, tables, codes = problem(1, n, m, k, b)
        gain = rng.integers(-3, 4, n).astype(np.float32)
        offset = rng.integers(-99, 99, n).astype(np.float32)
        valid = rng.random((b, n)) < 0.5
        self.check(tables, codes, results, gain=gain)
        self.check(tables, codes, results, gain=gain, offset=offset, valid=valid)
        self.check(tables, codes, results, offset=offset, valid=valid[0])
        self.check(tables, codes, results, valid=np.zeros(n, bool))

    @pytest.mark.parametrize("shape", SHAPES[:7], ids=str)
    def test_scores(self, shape):
        n, m, k, b, _ = shape
        rng, tables, codes = problem(2, n, m, k, b)
        gain = rng.integers(-3, 4, n).astype(np.float32)
        np.testing.assert_array_equal(self.scores(tables, codes), numpy_scores(tables, codes))
        np.testing.assert_array_equal(
            self.scores(tables, codes, gain=gain), numpy_scores(tables, codes, gain=gain)
        )

    @pytest.mark.parametrize("m", [256, 300, 1100])
    @pytest.mark.parametrize("k", [16, 40])
    def test_largest_sums_do_not_saturate(self, m, k):
        """All-maximal tables (FAULTS 27); a single smaller entry must still show."""
        codes = np.full((100, m), k - 1, np.uint8)
        codes[37, m - 1] = 0
        tables = np.full((2, m, k), 0, np.float32)
        tables[:, :, k - 1] = 255
        self.check(tables, codes, 100)

    def test_constant_tables_are_ties(self):
        _, tables, codes = problem(3, 3000, 6, 16, 2)
        self.check(np.full_like(tables, 7), codes, 20)
        self.check(np.zeros_like(tables), codes, 20)
        # Not representable: every sum is rounded, and to the same value.
        _, ids = self.top_k(np.full_like(tables, 0.1), codes, 20)
        np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(20), (2, 20)))

    def test_equal_rows_are_ties(self):
        rng, tables, _ = problem(4, 0, 6, 16, 2)
        codes = np.broadcast_to(rng.integers(0, 16, (1, 6)), (5000, 6)).astype(np.uint8)
        self.check(tables, codes, 30)
        _, ids = self.top_k(rng.normal(size=(2, 6, 16)).astype(np.float32), codes, 30)
        np.testing.assert_array_equal(ids, np.broadcast_to(np.arange(30), (2, 30)))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_bad_query_has_no_results_and_changes_no_other(self, bad):
        rng, tables, codes = problem(5, 500, 7, 16, 4)
        tables = rng.normal(size=tables.shape).astype(np.float32)
        scores, ids = self.top_k(tables, codes, 5)
        broken = tables.copy()
        broken[2, 3, 4] = bad
        broken_scores, broken_ids = self.top_k(broken, codes, 5)
        assert (broken_ids[2] == -1).all()
        assert (broken_scores[2] == -np.inf).all()
        others = np.array([0, 1, 3])
        np.testing.assert_array_equal(np.asarray(scores)[others], np.asarray(broken_scores)[others])
        np.testing.assert_array_equal(np.asarray(ids)[others], np.asarray(broken_ids)[others])

    def test_rows_without_a_score_are_not_returned(self):
        _, tables, codes = problem(6, 100, 4, 16, 2)
        offset = np.zeros(100, np.float32)
        offset[10], offset[20] = np.nan, -np.inf
        _, ids = self.top_k(tables, codes, 100, offset=offset)
        assert not np.isin(ids, [10, 20]).any()
        assert (np.asarray(ids)[:, -2:] == -1).all()

    def test_huge_and_tiny_tables(self):
        rng, tables, codes = problem(7, 300, 5, 16, 4)
        unit = rng.normal(size=tables.shape).astype(np.float32)
        for scale in (1e37, 1e30, 1e-30, 1e-34):
            tables = unit * np.float32(scale)
            _, ids = self.top_k(tables, codes, 10)
            _, want = numpy_top_k(tables, codes, 10)
            np.testing.assert_array_equal(ids, want)

    def test_real_tables_agree_with_numpy(self):
        rng, tables, codes = problem(8, 4000, 50, 16, 5)
        tables = rng.normal(size=tables.shape).astype(np.float32)
        self.check(tables, codes, 100)  # sums in the same order: bit for bit
        gain = rng.uniform(0.5, 2, 4000).astype(np.float32)
        scores, _ = self.top_k(tables, codes, 100, gain=gain)
        want, _ = numpy_top_k(tables, codes, 100, gain=gain)
        np.testing.assert_allclose(scores, want, rtol=1e-5)

    def test_large_constant_part_does_not_hide_small_differences(self):
        """A common term of 1e4 with differences of 1e-3: rounding of the sums decides."""
        rng, tables, codes = problem(9, 2000, 8, 16, 2)
        tables = (1e4 + 1e-3 * rng.normal(size=tables.shape)).astype(np.float32)
        self.check(tables, codes, 50)

    def test_random_shapes(self):
        rng = np.random.default_rng(10)
        for _ in range(self.random_shapes):
            n, m, b = int(rng.integers(0, 300)), int(rng.integers(0, 12)), int(rng.integers(0, 12))
            k, results = int(rng.integers(1, 40)), int(rng.integers(1, 60))
            _, tables, codes = problem(11, n, m, k, b)
            self.check(tables, codes, results, valid=rng.random((b, n)) < 0.7)

    random_shapes = 3  # each shape is a compilation


@pytest.mark.full
class TestReference(Suite):
    def top_k(self, tables, codes, k, **terms):
        return adc_top_k(tables, codes, k, implementation="reference", **terms)

    def scores(self, tables, codes, **terms):
        return adc_scores(tables, codes, implementation="reference", **terms)


class TestXla(Suite):
    def top_k(self, tables, codes, k, **terms):
        packed = pack_codes(codes, num_codewords=tables.shape[2], layout="columns")
        return adc_top_k(tables, packed, k, implementation="xla", **terms)

    def scores(self, tables, codes, **terms):
        return adc_scores(tables, codes, implementation="xla", **terms)


@pytest.mark.usefixtures("compiled")
class TestCompiled(Suite):
    """Every instruction set of this machine, each on every layout it may be given."""

    @pytest.fixture(autouse=True)
    def level(self, simd):
        self.simd = simd

    def each_layout(self, function, tables, codes):
        results = [
            function(pack_codes(codes, num_codewords=tables.shape[2], layout=layout))
            for layout in layouts_for(tables.shape[2])
            if layout not in POINTS_LAST
        ]
        for other in results[1:]:
            jax.tree.map(np.testing.assert_array_equal, results[0], other)
        return results[0]

    def top_k(self, tables, codes, k, **terms):
        return self.each_layout(
            lambda packed: adc_top_k(tables, packed, k, implementation="cpu", **terms),
            tables,
            codes,
        )

    def scores(self, tables, codes, **terms):
        return self.each_layout(
            lambda packed: adc_scores(tables, packed, implementation="cpu", **terms), tables, codes
        )

    random_shapes = 6

    def test_plain_codes(self):
        _, tables, codes = problem(12, 500, 9, 16, 3)
        _, ids = adc_top_k(tables, codes, 7, implementation="cpu")
        np.testing.assert_array_equal(ids, numpy_top_k(tables, codes, 7)[1])

    def test_batch_size_changes_nothing(self):
        rng, _, codes = problem(13, 3000, 20, 16, 0)
        tables = rng.normal(size=(11, 20, 16)).astype(np.float32)
        packed = pack_codes(codes, num_codewords=16)
        scores, ids = adc_top_k(tables, packed, 40, implementation="cpu")
        for q in range(11):
            alone = adc_top_k(tables[q : q + 1], packed, 40, implementation="cpu")
            np.testing.assert_array_equal(alone[0][0], scores[q])
            np.testing.assert_array_equal(alone[1][0], ids[q])

    @pytest.mark.parametrize("leading", [0, 20, 300])
    def test_thresholds_of_samples(self, leading):
        """Batches begin with the threshold of a sample, every 32nd block: rows 0 to 31 and on."""
        rng, tables, codes = problem(16, 13_000, 5, 16, 17)
        codes[:leading] = 15
        tables[:, :, 15] = 70  # as good as rows can be, and too few of them where 20 lead
        self.check(tables, codes, 48)
        self.check(tables, codes, 60, valid=rng.random(13_000) < 0.7)
        gain = rng.integers(-3, 4, 13_000).astype(np.float32)
        offset = rng.integers(-30, 30, 13_000).astype(np.float32)
        self.check(tables, codes, 60, gain=gain, offset=offset)

    @pytest.mark.parametrize("k", [16, 9])
    def test_plain_4_bit_codes_of_many_rows(self, k):
        """Rows are flagged first: batches of 8, 4, 2 and 1, ties, a sample that misleads."""
        rng, tables, codes = problem(17, 30_011, 6, k, 15)
        for results in (1, 10, 100):
            self.check(tables, codes, results)
        self.check(tables[:1], codes, 50)
        self.check(tables[:1] % 3, codes, 50)  # whole blocks of equals
        self.check(np.full_like(tables[:3], 7), codes, 20)
        self.check(rng.normal(size=tables.shape).astype(np.float32), codes, 100)
        for share in (0.9, 0.2, 0.004, 0.0):
            self.check(tables, codes, 100, valid=rng.random(30_011) < share)
            self.check(tables[:1], codes, 100, valid=rng.random(30_011) < share)
            self.check(tables[:3], codes, 20, valid=rng.random((3, 30_011)) < share)
        worst = numpy_scores(tables[:1], codes)[0] < 100  # all that pass at first are not valid
        self.check(tables, codes, 100, valid=worst)
        self.check(tables[:1], codes, 100, valid=worst)
        tables[:, :, k - 1] = 70
        codes[np.arange(30_011) // 64 % 8 == 0] = k - 1  # the best rows are those of a sample
        self.check(tables, codes, 100)
        codes[5000:] = 0  # and far fewer than expected
        codes[:40] = k - 1
        self.check(tables, codes, 100)

    def test_recall_target_returns_exact_scores_of_nearly_all_rows(self):
        rng, _, codes = problem(14, 20000, 30, 16, 0)
        tables = rng.normal(size=(3, 30, 16)).astype(np.float32)
        packed = pack_codes(codes, num_codewords=16)
        scores, ids = adc_top_k(tables, packed, 50, recall_target=0.9, implementation="cpu")
        _, want = adc_top_k(tables, packed, 50, implementation="cpu")
        sums = numpy_scores(tables, codes)
        np.testing.assert_array_equal(scores, np.take_along_axis(sums, np.asarray(ids), 1))
        shared = [len(np.intersect1d(x, y)) for x, y in zip(ids, want, strict=True)]
        assert min(shared) >= 40


class TestDirect(Suite):
    """Without JAX's dispatch: tables as they are, and as products of queries and codewords."""

    def top_k(self, tables, codes, k, valid=None, **terms):
        if valid is not None and valid.ndim == 2 and len(tables):
            found = [
                self.top_k(tables[q : q + 1], codes, k, valid=valid[q], **terms)
                for q in range(len(tables))
            ]
            return tuple(np.concatenate(x) for x in zip(*found, strict=True))
        if valid is not None and valid.ndim == 2:
            valid = None
        b, m, num_codewords = tables.shape
        packed = pack_codes(codes, num_codewords=num_codewords)
        found = direct_adc_top_k(packed, k=k, valid=valid, **terms)(tables)
        if b and np.isfinite(tables).all():
            # Query q has a one in column q of every subspace, where the codewords are its table.
            queries = np.tile(np.eye(b, dtype=np.float32), m)
            codewords = np.moveaxis(tables, 0, 2)
            find = direct_adc_top_k(codes, k=k, codewords=codewords, valid=valid, **terms)
            for a, c in zip(found, find(queries), strict=True):
                np.testing.assert_array_equal(a, c)
        assert all(type(x) is np.ndarray for x in found)
        return found

    test_scores = None  # of all rows: not here

    def test_equals_the_call_through_xla(self):
        rng, _, codes = problem(18, 20_000, 50, 16, 0)
        codewords = rng.normal(size=(50, 16, 2)).astype(np.float32)
        queries = rng.normal(size=(300, 100)).astype(np.float32)
        packed = pack_codes(codes, num_codewords=16)
        find = direct_adc_top_k(packed, k=20, codewords=codewords)
        scores, ids = find(queries)
        want_scores, want_ids = adc_top_k(FactoredTables(queries, codewords), packed, 20)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_allclose(scores, want_scores, rtol=1e-5)
        # Narrower queries, other types and orders, one at a time, from threads at once.
        np.testing.assert_array_equal(
            find(queries[:, :99])[1], find(queries * (np.arange(100) < 99))[1]
        )
        np.testing.assert_array_equal(find(np.asfortranarray(queries))[1], ids)
        np.testing.assert_array_equal(find(queries.tolist())[1], ids)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda q: find(queries[q : q + 1])[1], range(300)))
        np.testing.assert_array_equal(np.concatenate(parts), ids)

    def test_queries_that_are_not_finite_zero_or_huge(self):
        """FAULTS 2, 3 and 12, with more results than rows; and words of no columns."""
        rng, _, codes = problem(19, 30, 6, 16, 0)
        codewords = rng.normal(size=(6, 16, 2)).astype(np.float32)
        queries = rng.normal(size=(6, 12)).astype(np.float32)
        packed = pack_codes(codes, num_codewords=16)
        find = direct_adc_top_k(packed, k=40, codewords=codewords)
        scores, ids = find(queries)
        assert (np.sort(ids[:, :30]) == np.arange(30)).all()
        assert (ids[:, 30:] == -1).all()
        assert (scores[:, 30:] == -np.inf).all()
        odd = queries.copy()
        odd[0, 3], odd[1, 0], odd[2], odd[3] = np.nan, np.inf, 0, 3e38
        found = find(odd)
        wanted = adc_top_k(FactoredTables(odd, codewords), packed, 40)
        np.testing.assert_array_equal(found[1][:3], wanted[1][:3])
        assert (found[1][:2] == -1).all()
        np.testing.assert_array_equal(found[1][2, :30], np.arange(30))
        for a, b in zip(found, (scores, ids), strict=True):
            np.testing.assert_array_equal(a[4:], b[4:])
        nothing = direct_adc_top_k(packed, k=3, codewords=codewords[:, :, :0])
        np.testing.assert_array_equal(nothing(queries[:, :0])[0], np.zeros((6, 3)))
        np.testing.assert_array_equal(nothing(queries[:, :0])[1], [[0, 1, 2]] * 6)

    def test_later_writes_of_the_caller_change_nothing(self):
        _, tables, codes = problem(20, 200, 6, 16, 2)
        gain, valid = np.ones(200, np.float32), np.ones(200, bool)
        packed = pack_codes(codes, num_codewords=16)
        find = direct_adc_top_k(packed, k=5, gain=gain, valid=valid)
        before = find(tables)
        gain[:], valid[:] = -1, False
        for a, b in zip(before, find(tables), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"k": 0}, "k must be"),
            ({"codewords": np.zeros((3, 16), np.float32)}, "codewords must be"),
            ({"codewords": np.zeros((4, 16, 2), np.float32)}, "m=4"),
            ({"codewords": np.zeros((3, 8, 2), np.float32)}, "k=8"),
            ({"gain": np.zeros(4, np.float32)}, "gain must be"),
            ({"valid": np.zeros((2, 5), bool)}, "valid must be"),
            ({"recall_target": 2.0}, "recall_target"),
            ({"codes": np.zeros((5, 3), np.uint8)}, "codes must be packed"),
            ({"codes": [[1, 2]], "codewords": np.ones((2, 16, 2))}, "codes must be uint8"),
            ({"codes": 3, "codewords": np.ones((2, 16, 2))}, "codes must be uint8"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        packed = pack_codes(np.zeros((5, 3), np.uint8), num_codewords=16)
        arguments = {"codes": packed, "k": 2} | change
        with pytest.raises(ValueError, match=message):
            direct_adc_top_k(**arguments)

    def test_bad_calls_are_named(self):
        packed = pack_codes(np.zeros((5, 3), np.uint8), num_codewords=16)
        find = direct_adc_top_k(packed, k=2)
        with pytest.raises(
            ValueError, match=r"tables must be float32\[b, 3, 16\], got \[1, 3, 8\]"
        ):
            find(np.zeros((1, 3, 8), np.float32))
        find = direct_adc_top_k(packed, k=2, codewords=np.zeros((3, 16, 2), np.float32))
        for shape in [(6,), (1, 7), (1, 6, 1)]:
            with pytest.raises(ValueError, match=r"queries must be float32\[b, 6\]"):
                find(np.zeros(shape, np.float32))
        with pytest.raises(TypeError, match="inside jit call adc_top_k"):
            jax.jit(lambda gain: direct_adc_top_k(packed, k=2, gain=gain))(jnp.zeros(5))

    def test_codes_that_do_not_fill_their_shape_are_refused(self):
        packed = pack_codes(np.zeros((5, 3), np.uint8), num_codewords=16, layout="dwords")
        for change in ({"num_rows": 500}, {"num_subspaces": 9}):
            with pytest.raises(ValueError, match=r"codes\.data must be"):
                direct_adc_top_k(dataclasses.replace(packed, **change), k=2)


@pytest.mark.full
@pytest.mark.usefixtures("compiled")
def test_many_rows_every_level(simd):
    rng = np.random.default_rng(15)
    codes = rng.integers(0, 16, (120_000, 50)).astype(np.uint8)
    tables = rng.normal(size=(9, 50, 16)).astype(np.float32)
    scores, ids = adc_top_k(tables, pack_codes(codes, num_codewords=16), 100, implementation="cpu")
    want_scores, want_ids = numpy_top_k(tables, codes, 100)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(scores, want_scores)
    assert library.simd_level() == simd


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": np.zeros((2, 3), np.float32)}, "tables must be float"),
        ({"tables": np.zeros((2, 3, 4), np.int32)}, "tables must be float"),
        ({"tables": np.zeros((2, 5, 4), np.float32)}, "m=5"),
        ({"tables": np.zeros((2, 3, 257), np.float32)}, "1 to 256 codewords"),
        ({"codes": np.zeros((6, 3), np.int8)}, "codes must be uint8"),
        ({"codes": np.zeros(6, np.uint8)}, "codes must be uint8"),
        ({"k": 0}, "k must be"),
        ({"k": 2.0}, "k must be"),
        ({"k": True}, "k must be"),
        ({"gain": np.zeros(5, np.float32)}, "gain must be"),
        ({"offset": np.zeros(6, np.int32)}, "offset must be"),
        ({"valid": np.zeros(5, bool)}, "valid must be"),
        ({"valid": np.zeros(6, np.float32)}, "valid must be"),
        ({"recall_target": 0.0}, "recall_target"),
        ({"implementation": "magic"}, "implementation must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "tables": np.zeros((2, 3, 4), np.float32),
        "codes": np.zeros((6, 3), np.uint8),
        "k": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        adc_top_k(arguments.pop("tables"), arguments.pop("codes"), arguments.pop("k"), **arguments)
