"""Scan of the windows of a work list on TPUs, in Pallas.

A step decodes one window of a leaf (`adc.pallas_tpu.decode`: a lane gather for eight subspaces and
128 slots), multiplies it with the queries of its entry and keeps the best slot of each bin. The
list is prefetched to scalar memory, so that windows are fetched while the ones before them are
scanned; it has as many steps as there are entries.

The queries that probe a leaf are gathered to a group; those that do not probe it take no part. The
other way, one product of a window with all queries of the batch and a mask, needs no lists. A v5e's
flat scan of 64 subspaces takes 47 bundles for 128 slots and 128 queries, and 30 for 16 queries: the
decoding that both ways need is most of it. But with 1,000 leaves of which 30 are probed, a leaf is
wanted by 4 of 128 queries: nearly every leaf is decoded either way, 124 of 128 rows of the product
are thrown away, and a larger batch is decoded once more for every 128 or 256 queries, where groups
grow. What gathering costs is one small product, of a matrix that picks the queries with the
queries, which stay in fast memory. From a few tens of queries on, a v5e should scan all rows in no
more time than their leaves, either way: `benchmarks/roofline.py`.

Compiled for TPUs, never run on one: see ``make aot``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..adc.pallas_tpu import decode, pack_queries, pack_words
from .worklist import LANES, Plan, Round, Sizes

#: Of devices that behave unlike the default; `benchmarks/tune_device.py` measures others.
SIZES: dict[str, Sizes] = {}
DEFAULT = Sizes()
# Bytes of decoded columns in fast memory.
_TILE_BYTES = 4 << 20


class Operands(NamedTuple):
    """What all entries share.

    Attributes:
      queries: ``bfloat16[b, 2 w rows]``, of `adc.pallas_tpu.pack_queries`.
      words: of `adc.pallas_tpu.pack_words`, or None where ``queries`` holds tables.
      columns: ``uint4[m, S]`` or ``uint8[m, S]``.
      offset: ``float32[S]``, -inf where a slot may not be returned.
      gain: ``float32[S]``, factors of the sums of the slots, or None.
    """

    queries: Any
    words: Any
    columns: Any
    offset: Any
    gain: Any


def pack(
    queries: jax.Array,
    codewords: jax.Array | None,
    columns: jax.Array,
    offset: jax.Array,
    gain: jax.Array | None = None,
) -> Operands:
    """Lay the operands out.

    Args:
      queries: ``float32[b, m, s]``, or tables ``float32[b, m, k]`` without codewords.
      codewords: ``float32[m, k, s]`` or None.
      columns: ``uint8`` or ``uint4[m, S]``.
      offset: ``float32[S]``.
      gain: ``float32[S]`` or None.
    """
    count = queries.shape[2] if codewords is None else codewords.shape[1]
    packed = pack_queries(queries)
    packed = jnp.pad(packed, ((0, -packed.shape[0] % LANES), (0, 0)))
    words = None if codewords is None else pack_words(codewords)
    columns = columns.astype(jnp.uint4 if count <= 16 else jnp.uint8)
    return Operands(packed, words, columns, offset, gain)


def fits(num_columns: int) -> bool:
    """Whether a window of so many columns can be decoded in fast memory."""
    return 2 * num_columns * DEFAULT.points <= _TILE_BYTES


def _kernel(first_ref: Any, low_ref: Any, high_ref: Any, *refs: Any,
            plan: Plan, names: tuple[str, ...]) -> None:  # fmt: skip
    named = dict(zip(names, refs, strict=False))
    q_ref, ids_ref, offset_ref = named["queries"], named["ids"], named["offset"]
    best_ref, tile_ref = refs[-2:]
    group, entry = plan.group, pl.program_id(0)
    decode(named.get("words"), named["columns"], tile_ref)

    # The queries of the entry: one row of ones for each, from their numbers along the lanes.
    square = (group, group)
    same = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(jnp.int32, square, 1)
    number = jnp.sum(jnp.where(same, ids_ref[0], 0), axis=1, keepdims=True)
    column = lax.broadcasted_iota(jnp.int32, (group, q_ref.shape[0]), 1)
    picks = (column == number).astype(jnp.float32).astype(jnp.bfloat16)
    q = jnp.dot(picks, q_ref[...], preferred_element_type=jnp.float32).astype(jnp.bfloat16)

    low, high = low_ref[entry], high_ref[entry]
    lane = lax.broadcasted_iota(jnp.int32, (group, LANES), 1)
    for c in range(0, plan.bins, LANES):
        best = jnp.full((group, LANES), -jnp.inf, jnp.float32)
        for turn, g in enumerate(range(c, plan.points, plan.bins)):
            lanes = pl.ds(g, LANES)
            x = pltpu.bitcast(tile_ref[:, lanes], jnp.bfloat16)
            scores = jnp.dot(q, x, preferred_element_type=jnp.float32)
            if "gain" in named:
                scores = scores * named["gain"][:, lanes]
            scores = scores + offset_ref[:, lanes]
            if plan.bits:
                bits = pltpu.bitcast(scores, jnp.int32) & -(1 << plan.bits)
                scores = pltpu.bitcast(bits | turn, jnp.float32)
            # A NaN is never better.
            better = (scores > best) & (lane >= low - g) & (lane < high - g)
            best = jnp.where(better, scores, best)
        best_ref[:, pl.ds(c, LANES)] = best


def scan(operands: Operands, work: Round, plan: Plan, *, axes: Any, interpret: Any) -> jax.Array:
    """Best score of each bin of each entry and query, with the turn of its slot in the low bits.

    Args:
      operands: of `pack`.
      work: the list.
      plan: of the scan.
      axes: mesh axes over which results vary, inside ``jax.shard_map``.
      interpret: run as plain JAX, for tests.

    Returns:
      ``float32[E G, bins]``, -inf where a bin has no slot; rows beyond ``work.count`` entries, and
      those of queries beyond the last of an entry, hold anything.
    """
    queries, words, columns, offset, gain = operands
    m, rows = columns.shape[0], -(-columns.shape[0] // 8) * 8

    def window(entry: Any, first: Any, *_: Any) -> tuple[Any, Any]:
        return 0, pl.multiple_of(first[entry] * LANES, LANES)

    def whole(array: Any) -> Any:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    # Windows may end beyond the last slot; what is there is below `low` or from `high` on.
    points = pl.Element(plan.points, (0, plan.points))
    slots = pl.BlockSpec((pl.Element(1), points), window)
    named = {
        "queries": (queries, whole(queries)),
        "ids": (
            work.queries[:, None, :],
            pl.BlockSpec((1, 1, plan.group), lambda entry, *_: (entry, 0, 0)),
        ),
        "columns": (columns, pl.BlockSpec((pl.Element(rows, (0, rows - m)), points), window)),
        "offset": (offset[None], slots),
    }
    if words is not None:
        named["words"] = (words, whole(words))
    if gain is not None:
        named["gain"] = (gain[None], slots)
    arrays, specs = zip(*named.values(), strict=True)
    out = (plan.entries * plan.group, plan.bins)
    # The interpreter of TPU details takes no grid of a size found while it runs.
    steps = plan.entries if isinstance(interpret, pltpu.InterpretParams) else work.count
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, names=tuple(named)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(steps,),
            in_specs=specs,
            out_specs=pl.BlockSpec((plan.group, plan.bins), lambda entry, *_: (entry, 0)),
            scratch_shapes=[pltpu.VMEM((queries.shape[1] // 2, plan.points), jnp.int32)],
        ),
        out_shape=jax.ShapeDtypeStruct(out, jnp.float32, **({"vma": axes} if axes else {})),
        # Entries are shared out over the cores; the interpreter takes no such list of any length.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if interpret else "parallel",)
        ),
        interpret=interpret,
        name="tree_windows",
    )(work.first, work.low, work.high, *arrays)
