"""Scan of the windows of a work list on GPUs, in Pallas by its Triton route.

A program takes the bins of one entry: it loads the queries of the entry by their numbers, decodes
slots as the flat scan does, multiplies on tensor cores and keeps the best slot of each bin. What
leaves it is a score for each bin and query. The route is deprecated; see `adc.pallas_gpu`.
Compiled for an H100, never run on one: see ``make aot``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..adc.pallas_gpu import pack_queries, pack_words, products
from .worklist import LANES, Plan, Round, Sizes

#: Of devices that behave unlike the default; `benchmarks/tune_device.py` measures others.
SIZES: dict[str, Sizes] = {}
#: Tensor cores multiply no fewer than 16 rows.
DEFAULT = Sizes(fewest=16)
_STEP, _WARPS = 32, 4


class Operands(NamedTuple):
    """What all entries share.

    Attributes:
      even: ``bfloat16[b, entries]``, of `adc.pallas_gpu.pack_queries`.
      odd: the same shape.
      words: of `adc.pallas_gpu.pack_words`, or None where queries are tables.
      codes: ``uint8[m, S]``.
      offset: ``float32[S]``, -inf where a slot may not be returned.
      each: entries of a subspace.
      gain: ``float32[S]``, factors of the sums of the slots, or None.
    """

    even: Any
    odd: Any
    words: Any
    codes: Any
    offset: Any
    each: int
    gain: Any


def pack(
    queries: jax.Array,
    codewords: jax.Array | None,
    columns: jax.Array,
    offset: jax.Array,
    gain: jax.Array | None = None,
) -> Operands:
    """Lay the operands out; arguments of `pallas_tpu.pack`."""
    words = None if codewords is None else pack_words(codewords)
    even, odd = pack_queries(queries, 1, _STEP)
    each = -(-queries.shape[2] // 2)
    return Operands(even, odd, words, columns.astype(jnp.uint8), offset, each, gain)


def fits(num_columns: int) -> bool:
    """Whether rows of so many columns can be decoded: all, a few columns at a time."""
    return num_columns > 0


def _kernel(first_ref: Any, low_ref: Any, high_ref: Any, count_ref: Any, *refs: Any,
            plan: Plan, names: tuple[str, ...], each: int) -> None:  # fmt: skip
    named = dict(zip(names, refs, strict=False))
    best_ref, group, entry = refs[-1], plan.group, pl.program_id(0)
    lanes = pl.program_id(1) * LANES + jnp.arange(LANES, dtype=jnp.int32)

    @pl.when(entry < count_ref[0])
    def _scan() -> None:
        first, low, high = first_ref[entry] * LANES, low_ref[entry], high_ref[entry]
        member = jnp.arange(group, dtype=jnp.int32)
        numbers = plgpu.load(named["queries"].at[entry * group + member])
        wide = jnp.arange(_STEP, dtype=jnp.int32)

        def queries_of(name: str, part: Any) -> jax.Array:
            return plgpu.load(named[name].at[numbers[:, None], part.start + wide[None, :]])

        def turn(i: Any, best: jax.Array) -> jax.Array:
            at = i * plan.bins + lanes
            inside = (at >= low) & (at < high)
            counts = (group, each, named["even"].shape[1], _STEP)
            scores = products(named, first + at, inside, queries_of, counts)
            if "gain" in named:
                gain = plgpu.load(named["gain"].at[first + at], mask=inside, other=1.0)
                scores = scores * gain[None, :]
            offset = plgpu.load(named["offset"].at[first + at], mask=inside, other=0.0)
            scores = scores + offset[None, :]
            if plan.bits:
                bits = lax.bitcast_convert_type(scores, jnp.int32) & -(1 << plan.bits)
                scores = lax.bitcast_convert_type(bits | i, jnp.float32)
            # A NaN is never better.
            return jnp.where(inside[None, :] & (scores > best), scores, best)

        none = jnp.full((group, LANES), -jnp.inf, jnp.float32)
        best_ref[...] = lax.fori_loop(0, plan.points // plan.bins, turn, none)


def scan(operands: Operands, work: Round, plan: Plan, *, axes: Any, interpret: Any) -> jax.Array:
    """Best score of each bin of each entry and query; see `pallas_tpu.scan`."""
    named = {**operands._asdict(), "queries": work.queries.reshape(-1)}
    each = named.pop("each")
    named = {name: array for name, array in named.items() if array is not None}
    scalars = (work.first, work.low, work.high, work.count.reshape(1))

    def whole(array: Any) -> Any:
        return pl.BlockSpec(array.shape, lambda i, j: (0,) * array.ndim)

    arrays = (*scalars, *named.values())
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, names=tuple(named), each=each),
        grid=(plan.entries, plan.bins // LANES),
        in_specs=[whole(x) for x in arrays],
        out_specs=pl.BlockSpec((plan.group, LANES), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct(
            (plan.entries * plan.group, plan.bins), jnp.float32, **({"vma": axes} if axes else {})
        ),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=2),
        interpret=interpret,
        name="tree_windows",
    )(*arrays)
