"""The compiled kernels for CPUs, one call of an XLA FFI handler whatever is mapped over queries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ..layout import POINTS_LAST, PackedCodes, native_layout, pack_codes, repack_codes
from ..varying import ffi_call

#: `Layout` of csrc/codes.h.
LAYOUT_NUMBERS = {"dwords": 0, "lanes": 1, "bytes": 2}


def adc_scores(
    tables: jax.Array, codes: Any, gain: jax.Array | None, offset: jax.Array | None
) -> jax.Array:
    """Scores ``float32[b, n]``, the sums of `reference.adc_scores`."""
    packed = packed_codes(codes, tables.shape[2])

    @custom_vmap
    def call(tables: Any, data: Any, gain: Any, offset: Any) -> jax.Array:
        out = jax.ShapeDtypeStruct((tables.shape[0], packed.num_rows), jnp.float32)
        return ffi_call(
            "xla_kernels_adc_scores", out, tables, data, gain, offset, **_attributes(packed)
        )

    @call.def_vmap
    def _fold(size: int, batched: Any, tables: Any, *rest: Any) -> tuple[Any, Any]:
        if not batched[0] or any(batched[1:]):
            return _one_by_one(call, size, batched, (tables, *rest)), True
        b = tables.shape[1]
        scores = call(tables.reshape(size * b, *tables.shape[2:]), *rest)
        return scores.reshape(size, b, packed.num_rows), True

    return call(tables, packed.data, _or_empty(gain), _or_empty(offset))


def adc_top_k(
    tables: jax.Array,
    codes: Any,
    gain: jax.Array | None,
    offset: jax.Array | None,
    valid: jax.Array | None,
    *,
    k: int,
    exact: bool,
) -> tuple[jax.Array, jax.Array]:
    """Fused scan and selection: no array of n scores is ever written."""
    packed = packed_codes(codes, tables.shape[2])
    n = packed.num_rows

    @custom_vmap
    def call(tables: Any, data: Any, gain: Any, offset: Any, valid: Any) -> Any:
        b = tables.shape[0]
        out = (
            jax.ShapeDtypeStruct((b, k), jnp.float32),
            jax.ShapeDtypeStruct((b, k), jnp.int32),
        )
        return tuple(
            ffi_call(
                "xla_kernels_adc_top_k",
                out,
                *(tables, data, gain, offset, valid),
                **_attributes(packed),
                exact=np.bool_(exact),
            )
        )

    @call.def_vmap
    def _fold(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        tables, data, gain, offset, valid = args
        if any(batched[1:4]):
            return _one_by_one(call, size, batched, args), (True, True)
        if not batched[0]:
            tables = jnp.broadcast_to(tables[None], (size, *tables.shape))
        b = tables.shape[1]
        if batched[4]:
            valid = jnp.broadcast_to(valid, (size, b, n)).reshape(size * b, n)
        elif valid.shape[0] > 1 or (valid.shape[0] == 1 == b):
            valid = jnp.broadcast_to(valid[None], (size, b, n)).reshape(size * b, n)
        scores, ids = call(tables.reshape(size * b, *tables.shape[2:]), data, gain, offset, valid)
        return (scores.reshape(size, b, k), ids.reshape(size, b, k)), (True, True)

    if valid is None:
        valid = jnp.zeros((0, n), jnp.bool_)
    return call(tables, packed.data, _or_empty(gain), _or_empty(offset), valid)


def packed_codes(codes: Any, num_codewords: int) -> PackedCodes:
    """Codes in a layout that the kernels read: as they are, or packed now."""
    if not isinstance(codes, PackedCodes):
        return pack_codes(codes, num_codewords=num_codewords)
    if codes.layout in POINTS_LAST:
        return repack_codes(codes, native_layout(num_codewords))
    return codes


def _or_empty(row: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if row is None else row


def _attributes(packed: PackedCodes) -> dict[str, Any]:
    return {
        "num_rows": np.int64(packed.num_rows),
        "num_subspaces": np.int64(packed.num_subspaces),
        "layout": np.int32(LAYOUT_NUMBERS[packed.layout]),
    }


def _one_by_one(call: Any, size: int, batched: Any, args: Any) -> Any:
    """Map over codes or their terms: different scans, run one after another."""

    def step(index: jax.Array) -> Any:
        return call(*(x[index] if b else x for x, b in zip(args, batched, strict=True)))

    return jax.lax.map(step, jnp.arange(size))
