"""Search of an index whose rows are shared out over the devices of a mesh axis.

Every device has the centroids and codebooks, and of each leaf the rows that are its own, dealt out
one by one: row r lies on device r mod shards, whatever order rows come in. It scans its part of
the probed leaves. For the rest queries are shared out too: a device compares the candidates of all
devices for its part of the queries, tells each device which of its own to rescore, and compares
what comes back. A device gives little more than its share of the R candidates; where one of them
turns out to hold more, all are asked for R.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from avq_jax.checks import as_count, as_queries, is_traced
from avq_jax.mips.capacity import held_slots, lay_out_again
from avq_jax.mips.exact import SearchResult, power_of_two
from avq_jax.mips.index import Index, Tree
from avq_jax.mips.searcher import search
from avq_jax.quantization.rows import unit
from xla_kernels import Implementation, PackedTree, best_rows, rescore_top_k, row_scores

__all__ = ["ShardedIndex", "search_sharded", "shard"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "packed", "rows", "scale", "projection"],
    meta_fields=["mesh", "axis", "rows_per_shard"],
)
@dataclasses.dataclass(frozen=True)
class ShardedIndex:
    """An index over the devices of a mesh axis; a pytree.

    Made by :func:`avq_jax.shard`.

    >>> import avq_jax, jax, numpy as np
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> avq_jax.shard(index, jax.make_mesh((1,), ("shards",)), axis="shards").rows_per_shard
    1000

    Attributes:
      index: the index without its tree and rows: user ids, metric, sizes, default effort.
      packed: a :class:`xla_kernels.PackedTree` a device, leaves ``[shards, ...]``.
      rows: ``[shards, rows_per_shard, d]`` rows for exact scores, or ``None``.
      scale: ``float32[shards, rows_per_shard]`` of int8 rows, or ``None``.
      mesh: the mesh.
      axis: the name of its axis.
      rows_per_shard: rows of a device, the last device's padding counted.
      projection: axes along which queries are scanned, or ``None``; as of the tree.
    """

    index: Any
    packed: Any
    rows: Any
    scale: Any
    mesh: Mesh
    axis: str
    rows_per_shard: int
    projection: Any = None


def shard(index: Index, mesh: Mesh, *, axis: str) -> ShardedIndex:
    """Share an index out over the devices of a mesh axis, row r to device r mod shards.

    In a run of several processes each calls this with the same index and keeps its own part.

    Args:
      index: with a tree, of concrete arrays.
      mesh: of devices.
      axis: its axis over which rows are shared out; the index is repeated over other axes.

    Returns:
      :class:`ShardedIndex` for :func:`avq_jax.search_sharded`.

    Raises:
      TypeError: a traced index.
      ValueError: an index without a tree, an axis that the mesh does not have.

    >>> import avq_jax, jax, numpy as np
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> parts = shard(index, jax.make_mesh((1,), ("shards",)), axis="shards")
    >>> avq_jax.search_sharded(parts, x[:2], k=3).ids.shape
    (2, 3)
    """
    if is_traced(index):
        raise TypeError("shard lays arrays out; call it outside jit")
    if index.tree is None:
        raise ValueError("index must have a tree to be shared out; this one scores all rows")
    if axis not in mesh.shape:
        raise ValueError(f"axis must be one of {tuple(mesh.shape)}; got {axis!r}")
    count = mesh.shape[axis]
    each = -(-index.num_rows // count)
    parts = [_part(index, s, count) for s in range(count)]
    # Shapes are the same on all devices: free blocks at the end, which no leaf owns.
    slots = max(parts[0].block, *(part.slot_rows.shape[0] for part in parts))
    packed = jax.tree.map(lambda *a: np.stack(a), *(_padded_tree(part, slots) for part in parts))
    rows = scale = None
    if index.store is not None:
        rows = _split(index.store.rows, count, each)
        scale = None if index.store.scale is None else _split(index.store.scale, count, each)
    place = NamedSharding(mesh, PartitionSpec(axis))

    def put(a: np.ndarray) -> Array:
        return jax.make_array_from_callback(a.shape, place, lambda part: a[part])

    packed, rows, scale = jax.tree.map(put, (packed, rows, scale))
    rest = dataclasses.replace(index, tree=None, store=None, weight=None)
    return ShardedIndex(rest, packed, rows, scale, mesh, axis, each, index.tree.projection)


def _split(a: Any, count: int, each: int) -> np.ndarray:
    a = np.asarray(a)
    a = np.pad(a, ((0, count * each - len(a)),) + ((0, 0),) * (a.ndim - 1))
    return a.reshape(each, count, *a.shape[1:]).swapaxes(0, 1)


def _part(index: Index, shard: int, count: int) -> PackedTree:
    """The tree of the rows of a shard, numbered from 0 in their order."""
    held = held_slots(index.tree)
    mine = held.part(held.rows % count == shard)
    return lay_out_again(index.tree, mine, mine.rows // count).packed


def _padded_tree(packed: PackedTree, slots: int) -> PackedTree:
    more = slots - packed.slot_rows.shape[0]
    codes = packed.codes
    axis, blocks = (
        (1, more) if codes.layout in ("columns", "nibbles") else (0, more // packed.block)
    )
    widths = [(0, 0)] * codes.data.ndim
    widths[axis] = (0, blocks)
    data = np.pad(np.asarray(codes.data), widths)
    offset = packed.slot_offset
    if offset.shape[0] or (packed.slot_rows.shape[0] == 0 and packed.leaf_offset.shape[0]):
        offset = np.pad(np.asarray(offset), (0, more))
    gains = packed.gains
    if gains is not None:
        gains = gains._replace(level=np.pad(np.asarray(gains.level), (0, more)))
    return packed._replace(
        gains=gains,
        codes=dataclasses.replace(codes, data=data, num_rows=slots),
        slot_offset=offset,
        slot_rows=np.pad(np.asarray(packed.slot_rows), (0, more), constant_values=-1),
        usable=np.pad(np.asarray(packed.usable), ((0, 0), (0, more))),
    )


def search_sharded(
    sharded: ShardedIndex,
    queries: Any,
    *,
    k: int = 10,
    leaves_to_search: int | None = None,
    rescore: int | None = None,
    queries_axis: str | None = None,
    implementation: Implementation | None = None,
) -> SearchResult:
    """Search a shared-out index: the ids of :func:`avq_jax.search` on one device.

    The same leaves are probed, the same R candidates are chosen by quantized score over all
    devices and rescored. Ids agree up to ties of scores within rounding; with ``soar_lambda``, R
    counts distinct rows here and copies of rows there.

    Args:
      sharded: from :func:`avq_jax.shard`.
      queries: ``[b, d]`` or ``[d]``.
      k: as of :func:`avq_jax.search`.
      leaves_to_search: as of :func:`avq_jax.search`.
      rescore: as of :func:`avq_jax.search`.
      queries_axis: another axis of the mesh over which queries are shared out, b a multiple of
        its size; ``None`` gives every device all queries.
      implementation: as of :func:`avq_jax.search`.

    Returns:
      ``SearchResult(scores, ids)``, on every device along the axis of the index.

    Raises:
      ValueError: as :func:`avq_jax.search`; a ``queries_axis`` that is not another axis.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> parts = avq_jax.shard(index, jax.make_mesh((1,), ("shards",)), axis="shards")
    >>> one, many = avq_jax.search(index, x[:9], k=3), search_sharded(parts, x[:9], k=3)
    >>> bool((one.ids == many.ids).all())
    True
    """
    index = sharded.index
    q, single = as_queries(queries, width=index.dim)
    k = as_count(k, name="k")
    leaves = index.leaves_to_search if leaves_to_search is None else leaves_to_search
    leaves = as_count(leaves, name="leaves_to_search")
    if rescore is None:
        rescore = max(10 * k, 100) if sharded.rows is not None else 0
    rescore = as_count(rescore, name="rescore", minimum=0)
    if rescore and (sharded.rows is None or rescore < k):
        raise ValueError(
            f"rescore must be 0 (off), or at least k = {k} for an index with stored rows; "
            f"got {rescore}"
        )
    axes = set(sharded.mesh.shape) - {sharded.axis}
    if queries_axis is not None and queries_axis not in axes:
        raise ValueError(f"queries_axis must be None or one of {axes}; got {queries_axis!r}")
    effort = (k, leaves, rescore, implementation)
    parts = (sharded.packed, sharded.rows, sharded.scale, sharded.projection)
    meta = (sharded.mesh, sharded.axis, queries_axis, index.metric, sharded.rows_per_shard)
    scores, ids = _search_parts(parts, jnp.asarray(q), effort, meta)
    return SearchResult(scores[0], ids[0]) if single else SearchResult(scores, ids)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _search_parts(parts: Any, q: Array, effort: tuple, meta: tuple) -> tuple[Array, Array]:
    k, leaves, rescore, implementation = effort
    mesh, axis, queries_axis, metric, each = meta
    # Rows are rescored by XLA where the scan has a kernel of an accelerator.
    exact_by = implementation if implementation in ("xla", "cpu") else None

    count = mesh.shape[axis]

    def device(parts: Any, projection: Any, q: Array) -> tuple[Array, Array]:
        packed, rows, scale = jax.tree.map(lambda a: a[0], parts)
        b = q.shape[0]
        local = Index(Tree(packed, projection), None, None, None, metric, each, q.shape[1], leaves)

        def estimated(width: int) -> tuple[Array, Array]:
            return search(local, q, k=width, rescore=0, implementation=implementation)

        def rescored(width: int) -> tuple[Array, Array, Array]:
            """The k best of this device among the R candidates, and whether there may be others."""
            scores, numbers = estimated(width)
            everywhere = _my_queries(scores, axis, count)
            _, place = jax.lax.top_k(everywhere, rescore)
            stays = jnp.zeros(everywhere.shape, bool)
            stays = jax.vmap(lambda s, a: s.at[a].set(True))(stays, place)
            stays = stays & (everywhere > -jnp.inf)
            more = jnp.any(stays.reshape(-1, count, width)[:, :, -1])
            chosen = jnp.where(_my_rows(stays, axis, count)[:b], numbers, -1)
            found = _rescored(q, rows, scale, chosen, k, metric, exact_by)
            return *found, jax.lax.pmax(more.astype(jnp.int32), axis)

        if rescore:
            width = _share(rescore, k, count)
            scores, numbers, more = rescored(width)
            if width < rescore:
                scores, numbers = jax.lax.cond(
                    more > 0, lambda: rescored(rescore)[:2], lambda: (scores, numbers)
                )
        else:
            scores, numbers = estimated(k)
        numbers = jnp.where(numbers >= 0, numbers * count + jax.lax.axis_index(axis), -1)
        found = (-_my_queries(scores, axis, count), _my_queries(numbers, axis, count))
        # Equal scores in the order of the rows.
        less, ids = (a[:, :k] for a in jax.lax.sort(found, num_keys=2))
        return tuple(jax.lax.all_gather(a, axis, tiled=True)[:b] for a in (-less, ids))

    whole, shared = PartitionSpec(axis), PartitionSpec(queries_axis)
    # Every device gathers the same values, which the type system cannot see.
    everywhere = PartitionSpec()
    run = jax.shard_map(
        device, mesh=mesh, in_specs=(whole, everywhere, shared), out_specs=shared, check_vma=False
    )
    return run(parts[:3], parts[3], q)


def _share(rescore: int, k: int, count: int) -> int:
    """Candidates of a device that hold its part of R in all but rare cases.

    Of R rows dealt out at random a device has R / count in the mean, with a variance below that.

    >>> [_share(100, 10, count) for count in (1, 2, 8)]
    [100, 87, 35]
    """
    if count == 1:
        return rescore
    mean = rescore / count
    return min(rescore, max(k, math.ceil(mean + 4 * math.sqrt(mean) + 8)))


def _my_queries(a: Array, axis: str, count: int) -> Array:
    """``[b, r]`` of each device to what all have for its part of the queries, ``[b', count r]``."""
    b, r = a.shape
    nothing = -jnp.inf if jnp.issubdtype(a.dtype, jnp.floating) else -1
    a = jnp.pad(a, ((0, -b % count), (0, 0)), constant_values=nothing).reshape(count, -1, r)
    return jax.lax.all_to_all(a, axis, 0, 0).transpose(1, 0, 2).reshape(-1, count * r)


def _my_rows(a: Array, axis: str, count: int) -> Array:
    """Undo :func:`_my_queries`, but for the padding."""
    parts = a.reshape(a.shape[0], count, -1).transpose(1, 0, 2)
    parts = jax.lax.all_to_all(parts, axis, 0, 0)
    return parts.reshape(-1, parts.shape[2])


def _rescored(
    q: Array, rows: Array, scale: Any, chosen: Array, k: int, metric: str, implementation: Any
) -> tuple[Array, Array]:
    """The k best of the chosen rows by exact score, of a device; -1 are skipped."""
    if metric == "l2":

        def one(args: Any) -> Any:
            q, chosen = args
            exact = row_scores(rows, scale, q, jnp.maximum(chosen, 0), euclidean=True)
            return best_rows(jnp.where(chosen >= 0, exact, -jnp.inf), chosen, k)

        return jax.lax.map(one, (q, chosen))
    q = jnp.where(jnp.all(jnp.isfinite(q), axis=1, keepdims=True), q, 0)
    if metric == "cosine":
        return rescore_top_k(unit(q), rows, chosen, k, scale=scale, implementation=implementation)
    # A power of two, taken out and put back exactly, keeps products inside float32.
    factor = power_of_two(jnp.max(jnp.abs(q), axis=1, keepdims=True))
    scores, ids = rescore_top_k(
        q / factor, rows, chosen, k, scale=scale, implementation=implementation
    )
    largest = jnp.finfo(jnp.float32).max
    return jnp.where(ids >= 0, jnp.clip(scores * factor, -largest, largest), -jnp.inf), ids
