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
    leaves: jax.Array | None = None,
    *,
    effort: Effort,
    euclidean: bool,
) -> tuple[jax.Array, jax.Array]:
    """Scores ``float32[b, k]`` and rows ``int32[b, k]``; see `api.tree_search`."""
    if leaves is not None:
        return _scan(tree, queries, leaves, usable, k=effort.k, retrieve=0)
    attributes: dict[str, Any] = {
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
        out = _results(queries.shape[0], k)
        before, after = rest
        operands = (queries, *before, usable, *after, row_queries)
        return tuple(ffi_call("xla_kernels_tree_search", out, *operands, **attributes))

    # Its rule must not hold on to traced arrays.
    call = folded(search, k=k, slots=tree.slot_rows.shape[0])
    before = (
        tree.centroids,
        tree.tiles,
        tree.centroid_scale,
        tree.leaf_offset,
        tree.spread,
        *_groups(tree),
        tree.starts,
        *_slots(tree),
    )
    after = (empty if rows is None else rows, empty if row_scale is None else row_scale)
    if row_queries is None:
        row_queries = queries[:, :0]  # the same, to the kernel
    return call(queries, row_queries, tree.usable if usable is None else usable, (before, after))


def rank_leaves(
    tree: PackedTree, queries: jax.Array, *, leaves_to_search: int, leaves_ranked: int
) -> jax.Array:
    """Leaves ``int32[b, leaves_to_search]``; see `parts.tree_leaves`."""
    out = jax.ShapeDtypeStruct((queries.shape[0], leaves_to_search), jnp.int32)
    return ffi_call(
        "xla_kernels_tree_leaves",
        out,
        *(queries, tree.tiles, tree.centroid_scale, tree.leaf_offset, *_groups(tree)),
        vmap_method="sequential",
        num_leaves=np.int64(tree.centroids.shape[0]),
        leaves_ranked=np.int64(leaves_ranked),
    )


def candidates(
    tree: PackedTree,
    queries: jax.Array,
    leaves: jax.Array,
    floor: jax.Array,
    *,
    effort: Effort,
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """Estimates ``float32[b, width]`` and rows of slots; see `parts.tree_candidates`."""
    return _scan(tree, queries, leaves, None, floor, k=width, retrieve=effort.retrieve)


def last_estimate(
    tree: PackedTree, queries: jax.Array, leaves: jax.Array, *, retrieve: int
) -> jax.Array:
    """Estimates ``float32[b]``; see `parts.tree_floor`."""
    return _scan(tree, queries, leaves, k=1, retrieve=retrieve, last=True)[0][:, 0]


def _scan(
    tree: PackedTree,
    queries: jax.Array,
    leaves: jax.Array,
    usable: Any = None,
    floor: Any = None,
    *,
    k: int,
    retrieve: int,
    last: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The k best rows of chosen leaves, or about ``retrieve`` slots by rounded tables."""
    attributes: dict[str, Any] = {
        "layout": np.int32(LAYOUT_NUMBERS[tree.codes.layout]),
        "retrieve": np.int64(retrieve),
        "last": np.bool_(last),
    }
    floor = queries[:, :0] if floor is None else floor[:, None]

    def search(queries: Any, own: Any, usable: Any, rest: Any) -> Any:
        out = _results(queries.shape[0], k)
        operands = (queries, *rest, usable, *own)
        return tuple(ffi_call("xla_kernels_tree_scan", out, *operands, **attributes))

    call = folded(search, k=k, slots=tree.slot_rows.shape[0])
    rest = (tree.centroids, tree.spread, tree.starts, *_slots(tree))
    return call(queries, (leaves, floor), tree.usable if usable is None else usable, rest)


def _results(b: Any, k: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((b, k), jnp.float32), jax.ShapeDtypeStruct((b, k), jnp.int32)


def _groups(tree: PackedTree) -> tuple:
    if tree.groups is not None:
        g = tree.groups
        return g.tiles, g.scale, g.offset, g.starts
    pairs = (tree.centroids.shape[1] + 1) // 2
    tiles = jnp.zeros((0, pairs, 16, 2), jnp.int16)
    return tiles, jnp.float32(1), jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32)


def _slots(tree: PackedTree) -> tuple:
    gains = (jnp.zeros(0, jnp.uint8), jnp.zeros(0, jnp.float32))
    return (
        tree.codewords,
        tree.codes.data,
        tree.slot_offset,
        *(gains if tree.gains is None else tuple(tree.gains)),
        tree.slot_rows,
    )
