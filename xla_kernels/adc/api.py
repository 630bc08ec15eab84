"""Scores and the best rows of codes, given a lookup table for each query (ADC).

The score of row i for query b is ``gain[i] * sum_m tables[b, m, codes[i, m]] + offset[i]``: the
inner product with a product-quantised row (Section 4 of Guo et al. 2020, arXiv:1908.10396) and the
form that additive, residual, scalar and binary codes share.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import implementations
from ..layout import PackedCodes, code_columns, code_rows
from . import cpu, reference, xla


class _Options(NamedTuple):
    k: int
    recall_target: float
    implementation: str
    interpret: Any = False


class FactoredTables(NamedTuple):
    """Tables ``<part m of the query, codeword j of subspace m>`` left as their two factors.

    Accepted wherever tables are. Kernels of accelerators decode rows with them and multiply, with
    k times fewer operations than tables take; other implementations multiply them out.

    Attributes:
      queries: ``float[b, d]``, zero-padded to m * s columns where d is less.
      codewords: ``float[m, k, s]``.
    """

    queries: Any
    codewords: Any

    def multiply(self) -> jax.Array:
        """``float32[b, m, k]`` tables."""
        queries, codewords = _factors(self)
        return jnp.einsum("bms,mks->bmk", queries, codewords, precision=lax.Precision.HIGHEST)


def adc_scores(
    tables: Any,
    codes: Any,
    *,
    gain: Any = None,
    offset: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Score every row of the codes against every query's table.

    Args:
      tables: ``float[b, m, k]``, one lookup table a query; computed in float32.
      codes: ``uint8[n, m]`` or `PackedCodes`.
      gain: ``float[n]`` or None, factor of a row's sum.
      offset: ``float[n]`` or None, added to a row's sum.
      implementation: None (the fastest here), ``"xla"``, ``"cpu"`` or ``"reference"``.

    Returns:
      ``float32[b, n]``. Sums run from subspace 0 upward on every implementation, so they agree bit
      for bit (with gain and offset to one rounding). Prefer `adc_top_k`: writing n scores costs
      more than computing them.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot run.

    Example:
      >>> import numpy as np
      >>> tables = np.array([[[1.0, 2.0], [10.0, 20.0]]], np.float32)
      >>> codes = np.array([[0, 0], [1, 0], [1, 1]], np.uint8)
      >>> adc_scores(tables, codes).tolist()
      [[11.0, 12.0, 22.0]]
    """
    tables, codes, gain, offset = _checked(tables, codes, gain, offset)
    options = _Options(0, 1.0, implementations.resolve(implementation))
    if isinstance(tables, FactoredTables):
        tables = tables.multiply()
    return _adc_scores(options, tables, codes, gain, offset)


def adc_top_k(
    tables: Any,
    codes: Any,
    k: Any,
    *,
    gain: Any = None,
    offset: Any = None,
    valid: Any = None,
    recall_target: Any = 1.0,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Find each query's k best rows, without writing all scores.

    Differentiable in ``tables``, ``gain`` and ``offset`` through the returned scores; the rows
    themselves have no gradient.

    Args:
      tables: ``float[b, m, k]``, one lookup table a query, or `FactoredTables`; in float32.
      codes: ``uint8[n, m]`` or `PackedCodes`.
      k: results a query, at least 1; may exceed n.
      gain: ``float[n]`` or None, factor of a row's sum.
      offset: ``float[n]`` or None, added to a row's sum.
      valid: ``bool[n]`` or ``bool[b, n]`` or None: rows that may be returned.
      recall_target: 1.0 gives exactly the best rows. Below 1, the compiled kernel may miss rows
        that its 8-bit tables round down by more than usual (scores stay exact for those returned);
        the Pallas kernels keep the best row of each bin, of as many bins as that expected recall
        takes for rows in random order.
      implementation: None (the fastest here that is exact), ``"xla"``, ``"cpu"``, ``"reference"``,
        ``"pallas_tpu"`` or ``"pallas_gpu"``. Those two round factors and tables to bfloat16, so
        scores are within 4e-3 of the largest; they have never run on a device.
      interpret: run a Pallas kernel as plain JAX, slowly, where its device is missing.

    Returns:
      ``(scores, ids)``, ``float32[b, k]`` descending and ``int32[b, k]``; equal scores lowest row
      first; missing results -inf and -1. A query whose table holds NaN or an infinity gets only
      missing results, and so does a row whose score is NaN or -inf.

    Raises:
      ValueError: shapes, dtypes, k or recall_target that do not fit, or an implementation that
        cannot run.

    Example:
      >>> import numpy as np
      >>> tables = np.array([[[1.0, 2.0], [10.0, 20.0]]], np.float32)
      >>> codes = np.array([[0, 0], [1, 0], [1, 1]], np.uint8)
      >>> scores, ids = adc_top_k(tables, codes, 2)
      >>> scores.tolist(), ids.tolist()
      ([[22.0, 12.0]], [[2, 1]])
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    if not 0.0 < recall_target <= 1.0:
        raise ValueError(f"recall_target must be in (0, 1], got {recall_target!r}")
    tables, codes, gain, offset = _checked(tables, codes, gain, offset)
    if valid is not None:
        valid = jnp.asarray(valid)
        shapes = ((codes.shape[0],), (_shape_of(tables)[0], codes.shape[0]))
        if valid.dtype != jnp.bool_ or valid.shape not in shapes:
            raise ValueError(
                f"valid must be bool[n] or bool[b, n] with (b, n) = {shapes[1]}, "
                f"got {valid.dtype}{list(valid.shape)}"
            )
        valid = valid.reshape(-1, codes.shape[0]) if codes.shape[0] else None
    implementation = implementations.resolve(implementation, pallas=True)
    if implementation in implementations.PALLAS:
        implementations.require_pallas(implementation, interpret, (tables, codes))
        if 0 in (*codes.shape, _shape_of(tables)[0]):
            implementation = implementations.resolve("xla")
    options = _Options(k, float(recall_target), implementation, interpret)
    if isinstance(tables, FactoredTables) and implementation not in implementations.PALLAS:
        tables = tables.multiply()
    return _adc_top_k(options, tables, codes, gain, offset, valid)


def _checked(tables: Any, codes: Any, gain: Any, offset: Any) -> tuple[Any, Any, Any, Any]:
    shape = _shape_of(tables)
    if not isinstance(codes, PackedCodes):
        codes = jnp.asarray(codes)
        if codes.ndim != 2 or codes.dtype != jnp.uint8:
            raise ValueError(f"codes must be uint8[n, m], got {codes.dtype}{list(codes.shape)}")
    n, m = codes.shape
    if shape[1] != m:
        raise ValueError(f"tables have m={shape[1]} subspaces, codes have m={m}")
    if not 1 <= shape[2] <= 256:
        raise ValueError(f"tables must have 1 to 256 codewords, got k={shape[2]}")
    if isinstance(codes, PackedCodes) and shape[2] != codes.num_codewords:
        raise ValueError(
            f"tables have k={shape[2]} codewords, codes were packed with "
            f"num_codewords={codes.num_codewords}"
        )
    if n > 2**31 - 64:
        raise ValueError(f"codes must have fewer than 2**31 - 64 rows (ids are int32), got n={n}")
    gain, offset = _per_row("gain", gain, n), _per_row("offset", offset, n)
    tables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tables)
    return tables, codes, gain, offset


def _shape_of(tables: Any) -> tuple[int, int, int]:
    """Shape ``(b, m, k)`` of tables, factored or not."""
    if not isinstance(tables, FactoredTables):
        kind = jnp.result_type(tables)
        if jnp.ndim(tables) != 3 or not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(f"tables must be float[b, m, k], got {kind}{list(jnp.shape(tables))}")
        b, m, k = jnp.shape(tables)
        return b, m, k
    queries, words = jnp.shape(tables.queries), jnp.shape(tables.codewords)
    kinds = [jnp.result_type(x) for x in tables]
    if (
        len(queries) != 2
        or len(words) != 3
        or queries[1] > words[0] * words[2]
        or not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds)
    ):
        raise ValueError(
            "FactoredTables must be queries float[b, d] and codewords float[m, k, s] with "
            f"d <= m * s, got {kinds[0]}{list(queries)} and {kinds[1]}{list(words)}"
        )
    return queries[0], words[0], words[1]


def _factors(tables: FactoredTables) -> tuple[jax.Array, jax.Array]:
    """Queries ``[b, m, s]`` and codewords ``[m, k, s]``."""
    b, m, _ = _shape_of(tables)
    queries = jnp.asarray(tables.queries, jnp.float32)
    words = jnp.asarray(tables.codewords, jnp.float32)
    width = m * words.shape[2]
    return jnp.pad(queries, ((0, 0), (0, width - queries.shape[1]))).reshape(
        b, *words.shape[::2]
    ), words


def _per_row(name: str, value: Any, n: int) -> jax.Array | None:
    if value is None:
        return None
    value = jnp.asarray(value)
    if value.shape != (n,) or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be float[n] with n={n}, got {value.dtype}{list(value.shape)}"
        )
    return value.astype(jnp.float32)


# The kernels run on inputs whose gradient is stopped; their scores pass through an identity that
# carries the derivative, a sum over the same table entries. So forward and reverse mode both work.


@functools.partial(jax.jit, static_argnums=0)
def _adc_scores(
    options: _Options,
    tables: jax.Array,
    codes: Any,
    gain: jax.Array | None,
    offset: jax.Array | None,
) -> jax.Array:
    def plain(tables: Any, codes: Any, *rest: Any) -> jax.Array:
        form = reference if options.implementation == "reference" else xla
        return form.adc_scores(tables, code_columns(codes), *rest)

    args = (tables, codes, gain, offset)
    stopped = jax.tree.map(lax.stop_gradient, args)
    scores = implementations.choose(options.implementation, cpu.adc_scores, plain, *stopped)
    return _with_derivative(scores, None, *args)


@functools.partial(jax.jit, static_argnums=0)
def _adc_top_k(
    options: _Options,
    tables: Any,
    codes: Any,
    gain: jax.Array | None,
    offset: jax.Array | None,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    def compiled(*args: Any) -> tuple[jax.Array, jax.Array]:
        return cpu.adc_top_k(*args, k=options.k, exact=options.recall_target == 1.0)

    def plain(tables: Any, codes: Any, *rest: Any) -> tuple[jax.Array, jax.Array]:
        form = reference if options.implementation == "reference" else xla
        return form.adc_top_k(tables, code_columns(codes), *rest, k=options.k)

    args = (tables, codes, gain, offset)
    stopped = jax.tree.map(lax.stop_gradient, (*args, valid))
    if options.implementation in implementations.PALLAS:
        scores, ids = _pallas_top_k(options, *stopped)
        if isinstance(tables, FactoredTables):
            args = (tables.multiply(), codes, gain, offset)
    else:
        scores, ids = implementations.choose(options.implementation, compiled, plain, *stopped)
    return _with_derivative(scores, ids, *args), ids


def _pallas_top_k(
    options: _Options, tables: Any, codes: Any, gain: Any, offset: Any, valid: Any
) -> tuple[jax.Array, jax.Array]:
    if isinstance(tables, FactoredTables):
        queries, words = _factors(tables)
        num_codewords = words.shape[1]
    else:
        queries, words, num_codewords = tables, None, tables.shape[2]
    if isinstance(codes, PackedCodes) and codes.layout == "nibbles":
        columns = codes.data
    else:
        columns = code_columns(codes)
    # Loaded when it is asked for: Pallas takes a while to import.
    kernel: Any
    if options.implementation == "pallas_tpu":
        from . import pallas_tpu

        kernel, columns = (
            pallas_tpu,
            columns.astype(jnp.uint4 if num_codewords <= 16 else jnp.uint8),
        )
    else:
        from . import pallas_gpu

        kernel, columns = pallas_gpu, columns.astype(jnp.uint8)
    return kernel.top_k(
        queries,
        words,
        columns,
        gain,
        offset,
        valid,
        k=options.k,
        recall_target=options.recall_target,
        interpret=options.interpret,
    )


@jax.custom_jvp
def _with_derivative(
    scores: jax.Array,
    ids: jax.Array | None,
    tables: jax.Array,
    codes: Any,
    gain: jax.Array | None,
    offset: jax.Array | None,
) -> jax.Array:
    """Scores of rows ``ids: int32[b, r]``, or of all rows, as a function of their tables."""
    del ids, tables, codes, gain, offset
    return scores


@_with_derivative.defjvp
def _with_derivative_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    scores, ids, tables, codes, gain, offset = primals
    _, _, tables_dot, _, gain_dot, offset_dot = tangents
    if codes.shape[0] == 0:
        return scores, jnp.zeros_like(scores)
    if ids is None:
        sums = functools.partial(_sums_of_all, columns=code_columns(codes))
        at_rows = _broadcast_row
    else:
        rows = jnp.maximum(ids, 0)
        picked = jnp.swapaxes(code_rows(codes, rows).astype(jnp.int32), 1, 2)  # [b, m, r]
        sums = functools.partial(_sums_of_some, picked=picked)
        at_rows = functools.partial(_row_of, rows=rows)
    # d(gain * raw + offset) = gain d(raw) + raw d(gain) + d(offset)
    scores_dot = sums(tables_dot)
    if gain is not None:
        scores_dot = scores_dot * at_rows(gain) + sums(tables) * at_rows(gain_dot)
    if offset is not None:
        scores_dot = scores_dot + at_rows(offset_dot)
    return scores, scores_dot if ids is None else jnp.where(ids >= 0, scores_dot, 0.0)


def _sums_of_all(table: jax.Array, columns: jax.Array) -> jax.Array:
    return reference.adc_scores(table, columns, None, None)


def _sums_of_some(table: jax.Array, picked: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, picked, axis=2).sum(axis=1)


def _broadcast_row(value: jax.Array) -> jax.Array:
    return value[None]


def _row_of(value: jax.Array, rows: jax.Array) -> jax.Array:
    return value[rows]
