"""Scan of codes on GPUs in Pallas, by its Triton route: decode, tensor cores, best of each bin.

A program decodes a tile of points by gathers from the codewords, which stay in the first cache,
two bfloat16 columns a 32-bit entry; multiplies it with a tile of queries; and keeps, over all its
tiles, the best score of each of its lanes. Row i lies in tile ``i // points``, tile t is of program
``t mod programs``, so that a bin holds rows that are far apart. Triton's route is the only one of
Pallas that gathers; it is deprecated, which is why nothing outside this module knows of it.
Compiled for an H100, never run on one: see ``make aot``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .bins import best_of, bins_for, fold_mask, merge_blocks, results

# Programs along the points where more bins than the recall asks for cost little: two a core.
_PROGRAMS = 264
# Tiles of one row a bin that one call scores before they are merged.
_BLOCKS = 128


class Sizes(NamedTuple):
    """Points and queries of a tile, entries decoded at once, and warps of a program."""

    points: int = 128
    queries: int = 64
    step: int = 32
    warps: int = 8


#: Of devices that behave unlike the default; `benchmarks/tune_device.py` measures others.
SIZES: dict[str, Sizes] = {}


def sizes_for(device_kind: str) -> Sizes:
    """Block sizes for a device, by `jax.Device.device_kind`.

    Example:
      >>> sizes_for("NVIDIA H100 80GB HBM3")
      Sizes(points=128, queries=64, step=32, warps=8)
    """
    return SIZES.get(device_kind, Sizes())


def pack_words(codewords: jax.Array) -> jax.Array:
    """Codewords ``[m, k, s]`` as ``int32[m w, k]``, pairs of bfloat16 columns."""
    m, k, s = codewords.shape
    x = jnp.pad(codewords, ((0, 0), (0, 0), (0, s % 2))).astype(jnp.bfloat16)
    x = x.reshape(m, k, -1, 2).transpose(0, 2, 1, 3)
    return lax.bitcast_convert_type(x, jnp.int32).reshape(-1, k)


class _Plan(NamedTuple):
    num_rows: int
    num_queries: int
    words: int  # entries of a subspace
    tiles: int  # of a program
    programs: int
    entries: int  # of a point, a multiple of sizes.step
    sizes: Sizes
    operands: tuple[str, ...]


def products(
    named: dict[str, Any],
    rows: jax.Array,
    inside: jax.Array,
    queries_of: Callable[[str, Any], jax.Array],
    counts: tuple[int, int, int, int],
) -> jax.Array:
    """Decode some rows and multiply them with queries, within a kernel.

    Args:
      named: refs of "codes" and, where codes are of codewords, "words".
      rows: ``int32[points]`` which.
      inside: ``bool[points]`` those whose codes may be read.
      queries_of: gives ``bfloat16[queries, step]``, even or odd columns of a slice of the entries.
      counts: queries, entries of a subspace, entries of a row, and step.

    Returns:
      ``float32[queries, points]``.
    """
    queries, words, entries, step = counts
    codes_ref = named["codes"]
    m = codes_ref.shape[0]

    def multiply(i: Any, total: jax.Array) -> jax.Array:
        entry = i * step + jnp.arange(step, dtype=jnp.int32)
        subspace, word = entry // words, entry % words
        mask = (subspace < m)[:, None] & inside[None, :]
        code = plgpu.load(
            codes_ref.at[jnp.minimum(subspace, m - 1)[:, None], rows[None, :]],
            mask=mask,
            other=0,
        ).astype(jnp.int32)
        if "words" in named:
            # Rows beyond the last subspace meet queries of zero.
            table = jnp.minimum(entry, named["words"].shape[0] - 1)[:, None]
            pair = plgpu.load(named["words"].at[table, code])
            low = lax.bitcast_convert_type(pair << 16, jnp.float32)
            high = lax.bitcast_convert_type(pair & -65536, jnp.float32)
        else:
            low = jnp.where(code == 2 * word[:, None], 1.0, 0.0)
            high = jnp.where(code == 2 * word[:, None] + 1, 1.0, 0.0)
        part = pl.ds(i * step, step)
        for name, x in (("even", low), ("odd", high)):
            q = queries_of(name, part)
            total += jnp.dot(q, x.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        return total

    total = jnp.zeros((queries, rows.shape[0]), jnp.float32)
    return lax.fori_loop(0, entries // step, multiply, total)


def pack_queries(queries: jax.Array, multiple: int, step: int) -> tuple[jax.Array, jax.Array]:
    """Even and odd columns of queries ``[b, m, s]``, ``bfloat16[b, entries]``, both axes padded."""
    b, m, s = queries.shape
    words = -(-s // 2)
    x = jnp.pad(queries, ((0, -b % multiple), (0, 0), (0, s % 2))).astype(jnp.bfloat16)
    x = x.reshape(-1, m * words, 2)
    x = jnp.pad(x, ((0, 0), (0, -(m * words) % step), (0, 0)))
    return x[:, :, 0], x[:, :, 1]


def _kernel(first_ref: Any, *refs: Any, plan: _Plan) -> None:
    named = dict(zip(plan.operands, refs, strict=False))
    best_ref, at_ref = refs[len(plan.operands) :]
    sizes, program = plan.sizes, pl.program_id(0)
    lanes = jnp.arange(sizes.points, dtype=jnp.int32)
    q_rows = pl.program_id(1) * sizes.queries + jnp.arange(sizes.queries, dtype=jnp.int32)

    def tile(number: Any, carry: Any) -> Any:
        best, at = carry
        start = (first_ref[0] + number * plan.programs + program) * sizes.points
        rows = start + lanes
        inside = rows < plan.num_rows

        scores = products(
            named,
            rows,
            inside,
            lambda name, part: named[name][:, part],
            (sizes.queries, plan.words, plan.entries, sizes.step),
        )
        usable = jnp.broadcast_to(inside[None, :], scores.shape)
        if "gain" in named:
            scores *= plgpu.load(named["gain"].at[rows], mask=inside, other=0.0)[None, :]
        if "offset" in named:
            scores += plgpu.load(named["offset"].at[rows], mask=inside, other=0.0)[None, :]
        if "valid" in named:
            known = usable & (q_rows < plan.num_queries)[:, None]
            allowed = plgpu.load(
                named["valid"].at[q_rows[:, None], rows[None, :]], mask=known, other=0
            )
            usable &= allowed != 0
        # A NaN is never better.
        better = usable & (scores > best)
        return jnp.where(better, scores, best), jnp.where(better, start, at)

    shape = (sizes.queries, sizes.points)
    none = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    best_ref[...], at = lax.fori_loop(0, plan.tiles, tile, none)
    at_ref[...] = at + lanes[None, :]


def best_of_bins(
    queries: jax.Array,
    words: jax.Array | None,
    columns: jax.Array,
    gain: jax.Array | None = None,
    offset: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    programs: int,
    tiles: int,
    first: Any = 0,
    sizes: Sizes | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Best score of each bin and the row that has it.

    Args:
      queries: ``float32[b, m, s]``, or tables ``float32[b, m, k]`` without words.
      words: of `pack_words`, or None where ``queries`` holds tables.
      columns: ``uint8[m, n]`` codes.
      gain: ``float32[n]`` or None.
      offset: ``float32[n]`` or None; -inf takes a row out.
      valid: ``int8[b, n]`` or None.
      programs: programs along the points, each with bins of its own.
      tiles: tiles each of them scans.
      first: tile to begin with.
      sizes: block sizes.
      interpret: run as plain JAX, for tests.

    Returns:
      ``float32[b, programs * points]`` and ``int32`` of that shape; score -inf where a bin has no
      row.
    """
    sizes = sizes or sizes_for(jax.devices()[0].device_kind)
    b, _, s = queries.shape
    n = columns.shape[1]
    even, odd = pack_queries(queries, sizes.queries, sizes.step)
    padded, entries = even.shape

    def whole(array: Any) -> Any:
        return pl.BlockSpec(array.shape, lambda i, j: (0,) * array.ndim)

    by_query = pl.BlockSpec((sizes.queries, entries), lambda i, j: (j, 0))
    operands = {"even": even, "odd": odd, "words": words, "codes": columns}
    operands |= {"gain": gain, "offset": offset, "valid": valid}
    operands = {name: array for name, array in operands.items() if array is not None}
    first = jnp.asarray(first, jnp.int32).reshape(1)
    plan = _Plan(n, b, -(-s // 2), tiles, programs, entries, sizes, tuple(operands))
    out = (padded, programs * sizes.points)
    best, at = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(programs, padded // sizes.queries),
        in_specs=[
            whole(first),
            *(by_query if name in ("even", "odd") else whole(x) for name, x in operands.items()),
        ],
        out_specs=[pl.BlockSpec((sizes.queries, sizes.points), lambda i, j: (j, i))] * 2,
        out_shape=[jax.ShapeDtypeStruct(out, jnp.float32), jax.ShapeDtypeStruct(out, jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=2),
        interpret=interpret,
        name="adc_bins",
    )(first, *operands.values())
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
    """Merge the bins of `best_of_bins` into the k best rows; arguments of `pallas_tpu.top_k`."""
    sizes = sizes or sizes_for(jax.devices()[0].device_kind)
    usable = jnp.isfinite(queries).all(axis=(1, 2))
    offset, valid = fold_mask(offset, valid)
    words = None if codewords is None else pack_words(codewords)
    terms = (queries, words, columns, gain, offset, valid)
    scan = functools.partial(best_of_bins, *terms, sizes=sizes, interpret=interpret)
    steps = -(-columns.shape[1] // sizes.points)
    if recall_target < 1.0:
        programs = max(_PROGRAMS, bins_for(k, recall_target) // sizes.points)
        programs = min(programs, steps)
        found = best_of(*scan(programs=programs, tiles=-(-steps // programs)), k)
    else:
        blocks = min(_BLOCKS, steps)
        scan = functools.partial(scan, programs=blocks, tiles=1)
        found = merge_blocks(lambda i: scan(first=i * blocks), -(-steps // blocks), k)
    return results(*found, usable, k)
