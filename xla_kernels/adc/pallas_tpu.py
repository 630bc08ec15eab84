"""Scan of codes on TPUs in Pallas: decode, matrix product, the best row of each bin, fused.

Codes lie with the points on lanes, ``uint4[m, n]`` or ``uint8[m, n]``. A table of at most 128
32-bit entries is looked up by one lane gather for eight subspaces and 128 points. Two neighbouring
columns of a codeword are the two bfloat16 halves of one entry, which is also how a bfloat16 tile
keeps two rows: the gathered words are the decoded tile, without a conversion. The MXU multiplies
it with the batch of queries; what leaves the kernel is the best score of each bin, and its row.
Tables that are not factored are multiplied with one-hot columns instead, k times the work.

Row i lies in bin ``i mod L``, so that neighbours of sorted data lie in different bins. For rows in
random order the expected share of the best k that is found is ``L (1 - (1 - 1/L)^k) / k``, the
share of k balls in L bins that come first in theirs; with one row a bin nothing is lost but
bfloat16's digits. Compiled for TPUs, never run on one: see ``make aot``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .bins import best_of, bins_for, fold_mask, merge_blocks, results

_LANES = 128
# Bytes of decoded columns in fast memory.
_TILE_BYTES = 4 << 20
# Bytes of the best scores and their rows in fast memory.
_BEST_BYTES = 4 << 20
# Most blocks of one row a bin that one call scores before they are merged.
_BLOCKS = 8


class Sizes(NamedTuple):
    """Points decoded together, queries multiplied together, and queries kept in fast memory."""

    points: int = 8192
    queries: int = 128
    batch: int = 256


#: Of devices that behave unlike the default; `benchmarks/tune_device.py` measures others.
SIZES: dict[str, Sizes] = {}


def sizes_for(device_kind: str) -> Sizes:
    """Block sizes for a device, by `jax.Device.device_kind`.

    Example:
      >>> sizes_for("TPU v5 lite")
      Sizes(points=8192, queries=128, batch=256)
    """
    return SIZES.get(device_kind, Sizes())


def pack_words(codewords: jax.Array) -> jax.Array:
    """Codewords ``[m, k, s]`` as gather tables ``int32[h, w, 8 ceil(m / 8), 128]``.

    Entry ``[h, w, m, j]`` holds columns 2 w (low half) and 2 w + 1 of codeword 128 h + j.
    """
    m, k, s = codewords.shape
    halves, words, rows = -(-k // _LANES), -(-s // 2), _rows(m)
    pad = ((0, rows - m), (0, halves * _LANES - k), (0, 2 * words - s))
    x = jnp.pad(codewords, pad).astype(jnp.bfloat16)
    x = x.reshape(rows, halves, _LANES, words, 2).transpose(1, 3, 0, 2, 4)
    return lax.bitcast_convert_type(x, jnp.int32)


def pack_queries(queries: jax.Array) -> jax.Array:
    """Queries, or tables, ``[b, m, s]`` with columns in the order of the decoded tile, bfloat16."""
    b, m, s = queries.shape
    words, rows = -(-s // 2), _rows(m)
    x = jnp.pad(queries, ((0, 0), (0, rows - m), (0, 2 * words - s)))
    x = x.reshape(b, rows, words, 2).transpose(0, 2, 1, 3)
    return x.reshape(b, 2 * words * rows).astype(jnp.bfloat16)


def _rows(m: int) -> int:
    return -(-m // 8) * 8


def decode(words_ref: Any, codes_ref: Any, tile_ref: Any) -> None:
    """Fill ``tile_ref: int32[w rows, points]``, pairs of bfloat16 rows, from a block of codes.

    ``words_ref`` holds the tables of `pack_words`; None makes one-hot columns.
    """
    rows = codes_ref.shape[0]
    words = tile_ref.shape[0] // rows

    def look_up(table: Any, codes: jax.Array) -> jax.Array:
        return jnp.take_along_axis(table, codes, axis=1, mode="promise_in_bounds")

    for g in range(0, codes_ref.shape[1], _LANES):
        lanes = pl.ds(g, _LANES)
        codes = codes_ref[:, lanes].astype(jnp.int32)
        if words_ref is None:
            one = jnp.where((codes & 1) == 0, 0x3F80, 0x3F800000)  # 1.0 in the low or the high half
        elif words_ref.shape[0] == 2:
            low, upper = codes & (_LANES - 1), codes >= _LANES
        for w in range(words):
            if words_ref is None:
                found = jnp.where((codes >> 1) == w, one, 0)
            elif words_ref.shape[0] == 2:
                found = jnp.where(
                    upper, look_up(words_ref[1, w], low), look_up(words_ref[0, w], low)
                )
            else:
                found = look_up(words_ref[0, w], codes)
            tile_ref[pl.ds(rows * w, rows), lanes] = found


class _Plan(NamedTuple):
    """What a call of the kernel is specialised on."""

    num_rows: int
    points: int
    queries: int
    bins: int
    one_each: bool  # each block of points has bins of its own, one a point
    operands: tuple[str, ...]


def _kernel(first_ref: Any, *refs: Any, plan: _Plan) -> None:
    named = dict(zip(plan.operands, refs, strict=False))
    best_ref, at_ref, tile_ref = refs[len(plan.operands) :]
    q_ref, points, bins = named["queries"], plan.points, plan.bins
    block = first_ref[0] + pl.program_id(1)

    @pl.when((pl.program_id(1) == 0) | plan.one_each)
    def _start() -> None:
        best_ref[...] = jnp.full(best_ref.shape, -jnp.inf, jnp.float32)
        at_ref[...] = jnp.zeros(at_ref.shape, jnp.int32)

    decode(named.get("words"), named["codes"], tile_ref)

    def scan(masked: bool) -> None:
        batch = q_ref.shape[0]
        for start in range(0, batch, plan.queries):
            some = pl.ds(start, min(plan.queries, batch - start))
            q = q_ref[some, :]
            for c in range(0, bins, _LANES):
                column = pl.ds(c, _LANES)
                best, at = best_ref[some, column], at_ref[some, column]
                for g in range(c, points, bins):
                    lanes = pl.ds(g, _LANES)
                    x = pltpu.bitcast(tile_ref[:, lanes], jnp.bfloat16)
                    scores = jnp.dot(q, x, preferred_element_type=jnp.float32)
                    if "gain" in named:
                        scores = scores * named["gain"][:, lanes]
                    if "offset" in named:
                        scores = scores + named["offset"][:, lanes]
                    # A NaN is never better.
                    better = scores > best
                    if "valid" in named:
                        better &= named["valid"][some, lanes].astype(jnp.int32) != 0
                    if masked:
                        lane = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                        better &= lane < plan.num_rows - (block * points + g)
                    best = jnp.where(better, scores, best)
                    at = jnp.where(better, block * points + g - c, at)
                best_ref[some, column] = best
                at_ref[some, column] = at

    if plan.num_rows % points == 0:
        scan(False)
    else:
        whole = (block + 1) * points <= plan.num_rows
        pl.when(whole)(lambda: scan(False))
        pl.when(jnp.logical_not(whole))(lambda: scan(True))


def best_of_bins(
    queries: jax.Array,
    words: jax.Array | None,
    columns: jax.Array,
    gain: jax.Array | None = None,
    offset: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    bins: int,
    first: Any = 0,
    blocks: int | None = None,
    sizes: Sizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Best score of each bin and the row that has it.

    Args:
      queries: ``bfloat16[b, 2 w rows]`` of `pack_queries`.
      words: of `pack_words`, or None where ``queries`` holds tables.
      columns: ``uint4[m, n]`` or ``uint8[m, n]`` codes.
      gain: ``float32[n]`` or None.
      offset: ``float32[n]`` or None; -inf takes a row out.
      valid: ``int8[b, n]`` or None.
      bins: a multiple of 128.
      first: block of ``sizes.points`` rows to begin with.
      blocks: None scans all rows; a number scans that many blocks, one row a bin, and ``bins`` is
        the size of a block.
      sizes: block sizes; ``points`` is a multiple of ``bins``.
      interpret: run as plain JAX, for tests.

    Returns:
      ``float32[b, L]`` and ``int32[b, L]``; score -inf where a bin has no row.
    """
    sizes = sizes or sizes_for(jax.devices()[0].device_kind)
    (m, n), b = columns.shape, queries.shape[0]
    rows, points = _rows(m), sizes.points
    if blocks is not None:
        bins = points
    least = 16 if valid is None else 32  # rows of a bfloat16 and of an int8 tile
    batch = min(sizes.batch, -(-b // least) * least, max(least, _BEST_BYTES // (8 * bins)))
    padded = -(-b // batch) * batch
    last = -(-n // points) - 1

    def at_block(i: Any, j: Any, first: Any) -> tuple[Any, Any]:
        return 0, jnp.minimum(first[0] + j, last)

    def fixed(i: Any, j: Any, first: Any) -> tuple[Any, ...]:
        return (0,) * 4

    by_row = pl.BlockSpec((1, points), at_block)
    operands = {
        "queries": (
            jnp.pad(queries, ((0, padded - b), (0, 0))),
            pl.BlockSpec((batch, queries.shape[1]), lambda i, j, first: (i, 0)),
        ),
        "words": (words, words is not None and pl.BlockSpec(words.shape, fixed)),
        "codes": (columns, pl.BlockSpec((rows, points), at_block)),
        "gain": (None if gain is None else gain[None, :], by_row),
        "offset": (None if offset is None else offset[None, :], by_row),
        "valid": (
            None if valid is None else jnp.pad(valid, ((0, padded - b), (0, 0))),
            pl.BlockSpec((batch, points), lambda i, j, first: (i, at_block(i, j, first)[1])),
        ),
    }
    operands = {name: pair for name, pair in operands.items() if pair[0] is not None}
    plan = _Plan(n, points, sizes.queries, bins, blocks is not None, tuple(operands))
    steps = last + 1 if blocks is None else blocks
    width = bins if blocks is None else bins * blocks
    best, at = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(padded // batch, steps),
            in_specs=[spec for _, spec in operands.values()],
            out_specs=[pl.BlockSpec((batch, bins), lambda i, j, _: (i, 0 if blocks is None else j))]
            * 2,
            scratch_shapes=[pltpu.VMEM((queries.shape[1] // 2, points), jnp.int32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((padded, width), kind) for kind in (jnp.float32, jnp.int32)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="adc_bins",
    )(jnp.asarray(first, jnp.int32).reshape(1), *(array for array, _ in operands.values()))
    at = at + (jnp.arange(width, dtype=jnp.int32) % bins)[None]
    return best[:b], jnp.where(best > -jnp.inf, at, -1)[:b]


def top_k(
    queries: jax.Array,
    codewords: jax.Array | None,
    columns: jax.Array,
    gain: jax.Array | None,
    offset: jax.Array | None,
    valid: jax.Array | None,
    *,
    k: int,
    recall_target: float = 1.0,
    sizes: Sizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Merge the bins of `best_of_bins` into the k best rows.

    Args:
      queries: ``float32[b, m, s]``, or tables ``float32[b, m, k]`` without codewords.
      codewords: ``float32[m, k, s]`` or None.
      columns: ``uint4`` or ``uint8[m, n]``.
      gain: ``float32[n]`` or None.
      offset: ``float32[n]`` or None.
      valid: ``bool[1 or b, n]`` or None.
      k: results a query.
      recall_target: below 1, as many bins as it takes for that expected recall; 1 scores one row
        a bin, block after block, so that memory holds the scores of a few blocks.
      sizes: block sizes.
      interpret: run as plain JAX, for tests.

    Returns:
      ``float32[b, k]`` and ``int32[b, k]``, scores to bfloat16's digits of their terms.
    """
    sizes = sizes or sizes_for(jax.devices()[0].device_kind)
    n = columns.shape[1]
    usable = jnp.isfinite(queries).all(axis=(1, 2))
    offset, valid = fold_mask(offset, valid)
    words = None if codewords is None else pack_words(codewords)
    most = max(_LANES, _TILE_BYTES // (2 * queries.shape[1] * queries.shape[2]))
    most = 1 << (most.bit_length() - 1)
    whole = -(-n // _LANES) * _LANES
    bins = 0 if recall_target == 1.0 else min(bins_for(k, recall_target), whole)
    scan = functools.partial(
        best_of_bins,
        pack_queries(queries),
        words,
        columns,
        gain,
        offset,
        valid,
        interpret=interpret,
    )
    if 0 < bins <= most:
        points = min(max(sizes.points, bins), most, whole) // bins * bins
        found = best_of(*scan(bins=bins, sizes=sizes._replace(points=points)), k)
    else:
        # Also where there would be more bins than rows in a block.
        sizes = sizes._replace(points=min(sizes.points, 2048, most, whole))
        steps = -(-n // sizes.points)
        blocks = min(_BLOCKS, steps)
        scan = functools.partial(scan, bins=0, blocks=blocks, sizes=sizes)
        found = merge_blocks(lambda i: scan(first=i * blocks), -(-steps // blocks), k)
    return results(*found, usable, k)
