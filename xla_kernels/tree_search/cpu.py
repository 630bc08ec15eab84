"""The compiled tree search for CPUs: one call of an XLA FFI handler for all queries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from ..adc.cpu import LAYOUT_NUMBERS
from ..varying import ffi_call
from .effort import Effort
from .packed import PackedTree


def tree_search(
    tree: PackedTree,
    queries: jax.Array,
    rows: jax.Array | None,
    row_scale: jax.Array | None,
    row_queries: jax.Array | None,
    usable: jax.Array | None,
    *,
    effort: Effort,
    euclidean: bool,
) -> tuple[jax.Array, jax.Array]:
    """Scores ``float32[b, k]`` and rows ``int32[b, k]``; see `api.tree_search`."""
    attributes = {
        "layout": np.int32(LAYOUT_NUMBERS[tree.codes.layout]),
        "leaves_to_search": np.int64(effort.leaves_to_search),
        "leaves_ranked": np.int64(effort.leaves_ranked),
        "deviations": np.float32(effort.deviations),
        "rescore": np.int64(effort.rescore),
        "retrieve": np.int64(effort.retrieve),
        "euclidean": np.bool_(euclidean),
    }
    empty, k = jnp.zeros(0, jnp.float32), effort.k
    slots = tree.slot_rows.shape[0]  # the rule below must not hold on to traced arrays

    @custom_vmap
    def call(queries: Any, row_queries: Any, usable: Any, rest: Any) -> Any:
        b = queries.shape[0]
        out = (
            jax.ShapeDtypeStruct((b, k), jnp.float32),
            jax.ShapeDtypeStruct((b, k), jnp.int32),
        )
        before, after = rest
        operands = (queries, *before, usable, *after, row_queries)
        return tuple(ffi_call("xla_kernels_tree_search", out, *operands, **attributes))

    @call.def_vmap
    def _fold(
        size: int, batched: Any, queries: Any, row_queries: Any, usable: Any, rest: Any
    ) -> Any:
        if any(jax.tree.leaves(batched[3])):
            args = (queries, row_queries, usable, rest)

            def step(i: Any) -> Any:
                return call(*jax.tree.map(lambda x, b: x[i] if b else x, args, tuple(batched)))

            return jax.lax.map(step, jnp.arange(size)), (True, True)
        if not batched[0]:
            queries = jnp.broadcast_to(queries[None], (size, *queries.shape))
        if not batched[1]:
            row_queries = jnp.broadcast_to(row_queries[None], (size, *row_queries.shape))
        b = queries.shape[1]
        if batched[2] or usable.shape[-2] > 1:
            usable = usable if batched[2] else usable[None]
            usable = jnp.broadcast_to(usable, (size, b, slots)).reshape(size * b, slots)
        queries, row_queries = (q.reshape(size * b, q.shape[2]) for q in (queries, row_queries))
        scores, ids = call(queries, row_queries, usable, rest)
        return (scores.reshape(size, b, k), ids.reshape(size, b, k)), (True, True)

    pairs = (tree.centroids.shape[1] + 1) // 2
    tiles = jnp.zeros((0, pairs, 16, 2), jnp.int16)
    groups: tuple = (tiles, jnp.float32(1), empty, jnp.zeros(0, jnp.int32))
    if tree.groups is not None:
        g = tree.groups
        groups = (g.tiles, g.scale, g.offset, g.starts)
    gains = (jnp.zeros(0, jnp.uint8), empty) if tree.gains is None else tuple(tree.gains)
    before = (
        tree.centroids,
        tree.tiles,
        tree.centroid_scale,
        tree.leaf_offset,
        tree.spread,
        *groups,
        tree.starts,
        tree.codewords,
        tree.codes.data,
        tree.slot_offset,
        *gains,
        tree.slot_rows,
    )
    after = (empty if rows is None else rows, empty if row_scale is None else row_scale)
    if row_queries is None:
        row_queries = queries[:, :0]  # the same, to the kernel
    return call(queries, row_queries, tree.usable if usable is None else usable, (before, after))
