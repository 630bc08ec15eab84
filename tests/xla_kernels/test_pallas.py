"""The kernels for accelerators, run as plain JAX on tiny shapes; `make aot` compiles them."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from xla_kernels import FactoredTables, adc_top_k, pack_codes
from xla_kernels.adc import bins as bins_of
from xla_kernels.adc import pallas_tpu

from .oracle import numpy_top_k


def problem(seed, n, m, k, s, b):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, k, (n, m)).astype(np.uint8)
    queries = rng.integers(-8, 9, (b, m * s)).astype(np.float32)
    codewords = rng.integers(-8, 9, (m, k, s)).astype(np.float32)
    return rng, FactoredTables(queries, codewords), codes


class Suite:
    """Inherited by each kernel. Small integers are exact in bfloat16, so ids are exact too."""

    implementation = ""
    interpret = True

    def top_k(self, tables, codes, k, **terms):
        return adc_top_k(
            tables,
            codes,
            k,
            implementation=self.implementation,
            interpret=self.interpret,
            **terms,
        )

    def check(self, tables, codes, k, **terms):
        full = np.asarray(tables.multiply() if isinstance(tables, FactoredTables) else tables)
        scores, ids = self.top_k(tables, codes, k, **terms)
        want_scores, want_ids = numpy_top_k(full, codes, k, **terms)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_array_equal(scores, want_scores)
        assert ids.dtype == jnp.int32
        assert scores.dtype == jnp.float32

    @pytest.mark.parametrize("shape", [(100, 5, 16, 2, 3, 9), (130, 3, 200, 3, 2, 150)], ids=str)
    def test_one_row_a_bin_is_exact(self, shape):
        *sizes, results = shape
        _, tables, codes = problem(0, *sizes)
        self.check(tables, codes, results)

    def test_masks_gains_offsets_and_bad_queries(self):
        rng, tables, codes = problem(1, 120, 9, 16, 1, 3)
        gain = rng.integers(-3, 4, 120).astype(np.float32)
        offset = rng.integers(-99, 99, 120).astype(np.float32)
        offset[10], offset[20] = np.nan, -np.inf
        tables.queries[1, 4] = np.nan
        valid = rng.random((3, 120)) < 0.5
        self.check(tables, codes, 80, gain=gain, offset=offset, valid=valid)
        self.check(tables, codes, 7, offset=offset, valid=valid[0])

    def test_tables_that_are_not_factored(self):
        rng, _, codes = problem(2, 100, 5, 12, 1, 2)
        self.check(rng.integers(-60, 60, (2, 5, 12)).astype(np.float32), codes, 10)

    def test_real_factors_are_within_the_digits_of_bfloat16(self):
        rng, tables, codes = problem(3, 128, 25, 16, 4, 4)
        tables = FactoredTables(*(rng.normal(size=x.shape).astype(np.float32) for x in tables))
        scores, ids = self.top_k(tables, codes, 128)
        want, want_ids = numpy_top_k(np.asarray(tables.multiply()), codes, 128)
        by_row = np.take_along_axis(want, np.argsort(want_ids), 1)
        error = np.abs(np.asarray(scores) - np.take_along_axis(by_row, np.asarray(ids), 1))
        assert error.max() < 4e-3 * np.abs(want).max()

    def test_gradients_are_those_of_the_sums(self):
        _, tables, codes = problem(4, 100, 4, 16, 2, 2)
        packed = pack_codes(codes, num_codewords=16, layout="nibbles")

        def total(tables, run):
            return run(tables, packed, 3)[0].sum()

        found = jax.grad(total)(jax.tree.map(jnp.asarray, tables), self.top_k)
        want = jax.grad(total)(
            jax.tree.map(jnp.asarray, tables), lambda *a: adc_top_k(*a, implementation="xla")
        )
        jax.tree.map(np.testing.assert_array_equal, found, want)

    def test_it_does_not_run_elsewhere(self):
        _, tables, codes = problem(5, 5, 4, 16, 2, 2)
        with pytest.raises(ValueError, match="cannot run"):
            adc_top_k(tables, codes, 2, implementation=self.implementation)


class TestTpu(Suite):
    implementation = "pallas_tpu"

    def test_more_blocks_than_one_call_scores(self, monkeypatch):
        monkeypatch.setattr(pallas_tpu, "_BLOCKS", 2)
        _, tables, codes = problem(6, 400, 3, 16, 2, 2)
        queries, words = tables.queries.reshape(2, 3, 2), tables.codewords
        scores, ids = pallas_tpu.top_k(
            jnp.asarray(queries),
            jnp.asarray(words),
            jnp.asarray(codes.T).astype(jnp.uint4),
            None,
            None,
            None,
            k=300,
            sizes=pallas_tpu.Sizes(points=128),
            interpret=True,
        )
        want_scores, want_ids = numpy_top_k(np.asarray(tables.multiply()), codes, 300)
        np.testing.assert_array_equal(ids, want_ids)
        np.testing.assert_array_equal(scores, want_scores)

    @pytest.mark.full
    def test_the_tpu_interpreter_agrees(self):
        from jax.experimental.pallas import tpu as pltpu

        self.interpret = pltpu.InterpretParams()
        _, tables, codes = problem(7, 200, 5, 16, 2, 3)
        self.check(tables, codes, 9)


class TestGpu(Suite):
    implementation = "pallas_gpu"


class TestExport:
    """A smoke test: lowering alone also passes what a device's compiler would refuse."""

    @pytest.mark.parametrize(("name", "platform"), [("tpu", "tpu"), ("gpu", "cuda")])
    @pytest.mark.parametrize("recall_target", [1.0, 0.9])
    def test_it_is_lowered_for_its_platform(self, name, platform, recall_target):
        _, tables, codes = problem(10, 300, 5, 16, 2, 3)
        packed = pack_codes(codes, num_codewords=16, layout="nibbles")
        run = functools.partial(
            adc_top_k, k=7, recall_target=recall_target, implementation=f"pallas_{name}"
        )
        # Triton's call may change between versions of jax: an exported program is for its own.
        checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
        exported = jax.export.export(jax.jit(run), platforms=[platform], disabled_checks=checks)(
            tables, packed
        )
        text = exported.mlir_module()
        assert {"tpu": "tpu_custom_call", "gpu": "triton"}[name] in text
        assert [aval.shape for aval in exported.out_avals] == [(3, 7), (3, 7)]


class TestBins:
    def test_recall_is_the_expected_one(self):
        """Rows in random order; and sorted by score, where neighbours lie in different bins."""
        rng = np.random.default_rng(8)
        n, m, b, k = 1024, 4, 16, 20
        codes = rng.integers(0, 16, (n, m)).astype(np.uint8)
        tables = FactoredTables(
            rng.normal(size=(b, 8)).astype(np.float32),
            rng.normal(size=(m, 16, 2)).astype(np.float32),
        )
        assert bins_of.bins_for(k, 0.8) == 128
        expected = bins_of.expected_recall(k, 128)
        assert 0.92 < expected < 0.94

        def recall(codes):
            _, ids = adc_top_k(
                tables, codes, k, recall_target=0.8, implementation="pallas_tpu", interpret=True
            )
            _, want = numpy_top_k(np.asarray(tables.multiply()), codes, k)
            return [len(np.intersect1d(x, y)) / k for x, y in zip(ids, want, strict=True)]

        found = recall(codes)
        # Four times the standard error of the mean of b queries, and places that bfloat16 swaps.
        assert abs(np.mean(found) - expected) < 4 * np.std(found) / np.sqrt(b) + 0.02
        scores = np.asarray(tables.multiply())[0][np.arange(m), codes].sum(axis=1)
        assert recall(codes[np.argsort(-scores)])[0] >= 0.95

    def test_the_formula_is_that_of_balls_in_bins(self):
        rng = np.random.default_rng(9)
        for k, bins in ((1, 128), (10, 128), (100, 256)):
            thrown = rng.integers(0, bins, (4000, k))
            kept = np.mean([len(set(row)) for row in thrown]) / k
            assert abs(kept - bins_of.expected_recall(k, bins)) < 5e-3
        assert bins_of.expected_recall(1, 1) == 1.0
        assert bins_of.expected_recall(4, 1) == 0.25
