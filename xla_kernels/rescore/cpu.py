"""The compiled int8 scan and rescoring."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ..varying import ffi_call
from .layout import PackedRows


def dot_top_k(
    queries: jax.Array,
    rows: PackedRows,
    scale: jax.Array | None,
    valid: jax.Array | None,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.dot_top_k`; fused with the selection."""
    n = rows.num_rows

    @custom_vmap
    def call(queries: Any, data: Any, scale: Any, valid: Any) -> Any:
        return tuple(
            ffi_call(
                "xla_kernels_dot_top_k",
                _results(queries.shape[0], k),
                *(queries, data, scale, valid),
                num_rows=np.int64(n),
            )
        )

    @call.def_vmap
    def _fold(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        queries, data, scale, valid = args
        if any(batched[1:3]):
            return _one_by_one(call, size, batched, args), (True, True)
        queries = _folded(queries, batched[0], size)
        b = queries.shape[0] // size
        if batched[3] or valid.shape[0] > 0:
            valid = jnp.broadcast_to(valid, (size, b, n)).reshape(size * b, n)
        return _unfolded(call(queries, data, scale, valid), size, k), (True, True)

    if valid is None:
        valid = jnp.zeros((0, n), jnp.bool_)
    return call(queries, rows.data, _or_empty(scale), valid)


def rescore_top_k(
    queries: jax.Array,
    rows: jax.Array,
    scale: jax.Array | None,
    candidates: jax.Array,
    *,
    k: int,
    euclidean: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.rescore_top_k`."""

    @custom_vmap
    def call(queries: Any, rows: Any, scale: Any, candidates: Any) -> Any:
        results = _results(queries.shape[0], k)
        return tuple(
            ffi_call(
                "xla_kernels_rescore_top_k",
                results,
                *(queries, rows, scale, candidates),
                euclidean=np.bool_(euclidean),
            )
        )

    @call.def_vmap
    def _fold(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        queries, rows, scale, candidates = args
        if any(batched[1:3]):
            return _one_by_one(call, size, batched, args), (True, True)
        queries = _folded(queries, batched[0], size)
        candidates = _folded(candidates, batched[3], size)
        return _unfolded(call(queries, rows, scale, candidates), size, k), (True, True)

    return call(queries, rows, _or_empty(scale), candidates)


def _results(b: Any, k: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((b, k), jnp.float32), jax.ShapeDtypeStruct((b, k), jnp.int32)


def _or_empty(row: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if row is None else row


def _folded(x: jax.Array, mapped: bool, size: int) -> jax.Array:
    if not mapped:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _unfolded(results: Any, size: int, k: int) -> Any:
    return tuple(x.reshape(size, x.shape[0] // size, k) for x in results)


def _one_by_one(call: Any, size: int, batched: Any, args: Any) -> Any:
    def step(index: jax.Array) -> Any:
        return call(*(x[index] if b else x for x, b in zip(args, batched, strict=True)))

    return jax.lax.map(step, jnp.arange(size))
