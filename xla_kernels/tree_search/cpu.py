"""The compiled tree search for CPUs: one call of an XLA FFI handler for all queries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ..adc.cpu import LAYOUT_NUMBERS
from ..varying import ffi_call
from .packed import PackedTree


def tree_search(
    tree: PackedTree,
    queries: jax.Array,
    rows: jax.Array | None,
    row_scale: jax.Array | None,
    usable: jax.Array | None,
    *,
    k: int,
    leaves_to_search: int,
    rescore: int,
    euclidean: bool,
) -> tuple[jax.Array, jax.Array]:
    """Scores ``float32[b, k]`` and rows ``int32[b, k]``; see `api.tree_search`."""
    attributes = {
        "layout": np.int32(LAYOUT_NUMBERS[tree.codes.layout]),
        "leaves_to_search": np.int64(leaves_to_search),
        "rescore": np.int64(rescore),
        "euclidean": np.bool_(euclidean),
    }
    empty = jnp.zeros(0, jnp.float32)
    slots = tree.slot_rows.shape[0]  # the rule below must not hold on to traced arrays

    @custom_vmap
    def call(queries: Any, usable: Any, rest: Any) -> Any:
        b = queries.shape[0]
        out = (
            jax.ShapeDtypeStruct((b, k), jnp.float32),
            jax.ShapeDtypeStruct((b, k), jnp.int32),
        )
        before, after = rest
        return tuple(
            ffi_call("xla_kernels_tree_search", out, queries, *before, usable, *after, **attributes)
        )

    @call.def_vmap
    def _fold(size: int, batched: Any, queries: Any, usable: Any, rest: Any) -> Any:
        if any(jax.tree.leaves(batched[2])):
            args = (queries, usable, rest)

            def step(i: Any) -> Any:
                return call(*jax.tree.map(lambda x, b: x[i] if b else x, args, tuple(batched)))

            return jax.lax.map(step, jnp.arange(size)), (True, True)
        if not batched[0]:
            queries = jnp.broadcast_to(queries[None], (size, *queries.shape))
        b = queries.shape[1]
        if batched[1] or usable.shape[-2] > 1:
            usable = usable if batched[1] else usable[None]
            usable = jnp.broadcast_to(usable, (size, b, slots)).reshape(size * b, slots)
        scores, ids = call(queries.reshape(size * b, queries.shape[2]), usable, rest)
        return (scores.reshape(size, b, k), ids.reshape(size, b, k)), (True, True)

    before = (
        tree.centroids,
        tree.tiles,
        tree.centroid_scale,
        tree.leaf_offset,
        tree.starts,
        tree.codewords,
        tree.codes.data,
        tree.slot_offset,
        tree.slot_rows,
    )
    after = (empty if rows is None else rows, empty if row_scale is None else row_scale)
    return call(queries, tree.usable if usable is None else usable, (before, after))
