"""The compiled tree search for CPUs: one call of an XLA FFI handler for all queries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..adc.cpu import LAYOUT_NUMBERS
from ..varying import ffi_call
from .effort import Effort
from .folding import folded
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

    def search(queries: Any, row_queries: Any, usable: Any, rest: Any) -> Any:
        b = queries.shape[0]
        out = (
            jax.ShapeDtypeStruct((b, k), jnp.float32),
            jax.ShapeDtypeStruct((b, k), jnp.int32),
        )
        before, after = rest
        operands = (queries, *before, usable, *after, row_queries)
        return tuple(ffi_call("xla_kernels_tree_search", out, *operands, **attributes))

    # Its rule must not hold on to traced arrays.
    call = folded(search, k=k, slots=tree.slot_rows.shape[0])
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
