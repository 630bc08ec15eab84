"""Search of an index whose leaves are shared out over the devices of a mesh axis.

Every device has the centroids and codebooks, the codes of whole leaves that are its own, and of the
rows for exact scores those that are dealt out to it one by one: row r lies on device r mod shards.
Queries are shared out too: a device ranks the leaves for its part of them, and all scan what they
have of these leaves. For its part of the queries a device chooses among the candidates of all, the
devices that have their rows score them exactly, and it chooses among those. Candidates are compared
by the estimates that one device compares them by, so they are the same.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from avq_jax.checks import as_queries, is_traced
from avq_jax.mips.capacity import Held, held_slots, lay_out_again
from avq_jax.mips.effort import Effort, Has, checked_effort
from avq_jax.mips.exact import SearchResult
from avq_jax.mips.index import Index, Tree
from avq_jax.mips.leaf_owners import LEAVES, leaf_owners
from avq_jax.mips.sharded_part import Part
from xla_kernels import SPARE, Implementation, PackedTree

__all__ = ["ShardedIndex", "search_sharded", "shard"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "packed", "rows", "scale", "projection"],
    meta_fields=["mesh", "axis", "rows_per_shard", "num_slots"],
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
      rows_per_shard: stored rows of a device, the last device's padding counted.
      projection: axes along which queries are scanned, or ``None``; as of the tree.
      num_slots: slots of the whole tree.
    """

    index: Any
    packed: Any
    rows: Any
    scale: Any
    mesh: Mesh
    axis: str
    rows_per_shard: int
    projection: Any = None
    num_slots: int = 0


def shard(index: Index, mesh: Mesh, *, axis: str, leaves: str = "spread") -> ShardedIndex:
    """Share an index out over the devices of a mesh axis: leaves, and row r to device r mod shards.

    In a run of several processes each calls this with the same index and keeps its own part.

    Args:
      index: with a tree, of concrete arrays.
      mesh: of devices.
      axis: its axis over which leaves and rows are shared out; the index is repeated over other
        axes.
      leaves: who has which. ``"spread"`` gives every device leaves from all over, so that any
        query is work for all devices: least time for a query and for a batch. ``"near"`` keeps
        neighbouring leaves together, so that a query has work on fewer devices: a twentieth less
        work in all, but devices whose leaves are asked for more have more of it (a half more than
        the mean, of word vectors).

    Returns:
      :class:`ShardedIndex` for :func:`avq_jax.search_sharded`.

    Raises:
      TypeError: a traced index.
      ValueError: an index without a tree, an axis that the mesh does not have, another word for
        ``leaves``.

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
    if leaves not in LEAVES:
        raise ValueError(f"leaves must be one of {LEAVES}; got {leaves!r}")
    count = mesh.shape[axis]
    each = -(-index.num_rows // count)
    sizes = np.diff(np.asarray(index.tree.packed.starts))
    owners = leaf_owners(np.asarray(index.tree.ranking), sizes, count, leaves)
    held = held_slots(index.tree)
    parts = [_part(index.tree, held.part(owners[held.leaves] == s)) for s in range(count)]
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
    slots = index.tree.packed.slot_rows.shape[0]
    return ShardedIndex(rest, packed, rows, scale, mesh, axis, each, index.tree.projection, slots)


def _split(a: Any, count: int, each: int) -> np.ndarray:
    a = np.asarray(a)
    a = np.pad(a, ((0, count * each - len(a)),) + ((0, 0),) * (a.ndim - 1))
    return a.reshape(each, count, *a.shape[1:]).swapaxes(0, 1)


def _part(tree: Tree, held: Held) -> PackedTree:
    """The tree of some slots; all leaves keep their numbers, most have no slots."""
    part = lay_out_again(tree, held, held.rows).packed
    return part._replace(spread=tree.packed.spread)


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
    adaptive: float | None = None,
    overretrieve: float | None = None,
    recall_target: float = 1.0,
    queries_axis: str | None = None,
    implementation: Implementation | None = None,
) -> SearchResult:
    """Search a shared-out index: the ids of :func:`avq_jax.search` on one device.

    The same leaves are probed, the same R candidates are chosen by quantized score over all
    devices and rescored. Ids agree up to ties of scores within rounding, and to candidates within
    the rounding of the compiled kernel's tables where codes have more or less than 16 codewords.

    Args:
      sharded: from :func:`avq_jax.shard`.
      queries: ``[b, d]`` or ``[d]``.
      k: as of :func:`avq_jax.search`.
      leaves_to_search: as of :func:`avq_jax.search`.
      rescore: as of :func:`avq_jax.search`.
      adaptive: as of :func:`avq_jax.search`; the four best leaves are scanned before the others,
        which takes one more exchange.
      overretrieve: as of :func:`avq_jax.search`.
      recall_target: as of :func:`avq_jax.search`.
      queries_axis: another axis of the mesh over which queries are shared out, b a multiple of
        its size; ``None`` gives every device all queries.
      implementation: as of :func:`avq_jax.search`.

    Returns:
      ``SearchResult(scores, ids)``, on every device along the axis of the index.

    Raises:
      TypeError: as :func:`avq_jax.search`.
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
    has = Has(
        index.leaves_to_search,
        sharded.packed.centroids.shape[1],
        sharded.num_slots,
        sharded.rows is not None,
    )
    more = (adaptive, overretrieve, recall_target)
    effort = checked_effort(has, k, leaves_to_search, rescore, implementation, *more)
    axes = set(sharded.mesh.shape) - {sharded.axis}
    if queries_axis is not None and queries_axis not in axes:
        raise ValueError(f"queries_axis must be None or one of {axes}; got {queries_axis!r}")
    kept = effort.retrieve
    if kept is None:
        copies = sharded.num_slots >= 2 * index.num_rows
        kept = effort.rescore * (2 if copies and effort.rescore < 3 * effort.k else 1)
    kept = kept if effort.rescore else 2 * effort.k + SPARE
    parts = (sharded.packed, sharded.rows, sharded.scale, sharded.projection)
    meta = (sharded.mesh, sharded.axis, queries_axis, index.metric, kept)
    scores, ids = _search_parts(parts, jnp.asarray(q), effort, meta)
    return SearchResult(scores[0], ids[0]) if single else SearchResult(scores, ids)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _search_parts(parts: Any, q: Array, effort: Effort, meta: tuple) -> SearchResult:
    mesh, axis, queries_axis, metric, kept = meta

    def device(parts: Any, projection: Any, q: Array) -> SearchResult:
        packed, rows, scale = jax.tree.map(lambda a: a[0], parts)
        part = Part(packed, rows, scale, metric, axis, mesh.shape[axis], kept)
        return part.search(q, projection, effort)

    whole, shared = PartitionSpec(axis), PartitionSpec(queries_axis)
    # Every device gathers the same values, which the type system cannot see.
    everywhere = PartitionSpec()
    run = jax.shard_map(
        device, mesh=mesh, in_specs=(whole, everywhere, shared), out_specs=shared, check_vma=False
    )
    return run(parts[:3], parts[3], q)
