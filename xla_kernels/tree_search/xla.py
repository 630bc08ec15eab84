"""Tree search in plain XLA: what runs where no kernel does, and what kernels are tested against.

The scan is a loop over blocks of the probed leaves whose length follows their sizes: memory does
not grow with the number of rows, and shapes stay static.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..layout import POINTS_LAST, PackedCodes, code_rows, unpack_codes
from .effort import SURE_LEAVES, Effort
from .packed import LeafGroups, PackedTree

# Slots scored in one step of the scan.
_STEP = 4096
# Queries that share a product with the centroids. Always this many, so that a query gets the same
# bits whatever the batch around it.
_TILE = 8

# Estimates kept beyond twice the results, as csrc/tree_search.cc does.
SPARE = 32

_HIGHEST = jax.lax.Precision.HIGHEST


class Candidates(NamedTuple):
    """The best slots of a query, best first; slot -1 and score -inf where there are fewer."""

    scores: Any
    slots: Any


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
    b, k, rescore = queries.shape[0], effort.k, effort.rescore
    finite = jnp.all(jnp.isfinite(queries), axis=1)
    if rescore and row_queries is not None:
        finite = finite & jnp.all(jnp.isfinite(row_queries), axis=1)
        row_queries = jnp.where(finite[:, None], row_queries, 0)
    else:
        row_queries = None
    queries = jnp.where(finite[:, None], queries, 0)

    def one(args: Any) -> Any:
        q, full, shared, leaves, mask, ok = args
        mask = tree.usable[0] if mask is None else mask

        def run() -> Any:
            found = _candidates(tree, q, shared, leaves, mask, effort, kept_slots(effort))
            store = (rows, row_scale)
            q_full = q if full is None else full
            return best_of_slots(tree, q, q_full, found.slots, store, effort, euclidean)

        def nothing() -> Any:
            # Made from `ok`, so that both branches vary alike over the devices of shard_map.
            none = jnp.broadcast_to(ok.astype(jnp.int32) * 0, (k,))
            return none.astype(jnp.float32) - jnp.inf, none - 1

        return jax.lax.cond(ok, run, nothing)

    def tile(args: Any) -> Any:
        q, full, leaves, mask, ok = args
        shared, rank = leaf_scores(tree, q, effort)
        leaves = best_leaves(rank, effort.leaves_to_search) if leaves is None else leaves
        return jax.lax.map(one, (q, full, shared, leaves, mask, ok))

    if usable is not None and usable.shape[0] == 1:
        tree, usable = tree._replace(usable=usable), None
    return _in_tiles(tile, b, (queries, row_queries, leaves, usable, finite))


def rank_leaves(
    tree: PackedTree, queries: jax.Array, *, leaves_to_search: int, leaves_ranked: int
) -> jax.Array:
    """Leaves ``int32[b, leaves_to_search]``; see `parts.tree_leaves`."""
    effort = Effort(1, leaves_to_search, leaves_ranked, math.inf, 0, 0)

    def tile(args: Any) -> Any:
        q, ok = args
        _, rank = leaf_scores(tree, jnp.where(ok[:, None], q, 0), effort)
        return jnp.where(ok[:, None], best_leaves(rank, leaves_to_search), -1)

    finite = jnp.all(jnp.isfinite(queries), axis=1)
    return _in_tiles(tile, queries.shape[0], (queries, finite))


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
    del floor  # what may be left out costs nothing here

    def one(args: Any) -> Any:
        q, shared, leaves = args
        found = _candidates(tree, q, shared, leaves, tree.usable[0], effort, kept_slots(effort))
        rows = tree.slot_rows[jnp.maximum(found.slots, 0)]
        return cut_or_pad((found.scores, jnp.where(found.slots >= 0, rows, -1)), width)

    def tile(args: Any) -> Any:
        q, leaves, ok = args
        q = jnp.where(ok[:, None], q, 0)
        shared, _ = leaf_scores(tree, q, effort)
        return jax.lax.map(one, (q, shared, jnp.where(ok[:, None], leaves, -1)))

    finite = jnp.all(jnp.isfinite(queries), axis=1)
    return _in_tiles(tile, queries.shape[0], (queries, leaves, finite))


def _in_tiles(tile: Any, b: Any, operands: Any) -> Any:
    # Written so that a batch of symbolic size divides too (jax.export).
    tiles = (b + _TILE - 1) // _TILE

    def split(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, tiles * _TILE - b),) + ((0, 0),) * (a.ndim - 1))
        return a.reshape(tiles, _TILE, *a.shape[1:])

    found = jax.lax.map(tile, jax.tree.map(split, operands))
    return jax.tree.map(lambda a: a.reshape(tiles * _TILE, *a.shape[2:])[:b], found)


def cut_or_pad(found: tuple[jax.Array, jax.Array], width: int) -> tuple[jax.Array, jax.Array]:
    """Scores and rows of candidates ``[..., c]``, best first, in ``[..., width]`` places."""
    scores, rows = (a[..., :width] for a in found)
    pad = [(0, 0)] * (scores.ndim - 1) + [(0, width - scores.shape[-1])]
    return jnp.pad(scores, pad, constant_values=-jnp.inf), jnp.pad(rows, pad, constant_values=-1)


def kept_slots(effort: Effort) -> int:
    """Slots a scan keeps; where a row may have two, one of them is spare."""
    return max(effort.retrieve, 2 * effort.k) if effort.rescore else 2 * effort.k + SPARE


def leaf_scores(tree: PackedTree, q: jax.Array, effort: Effort) -> tuple[jax.Array, jax.Array]:
    """``<q, centroid>`` and what ranks the leaves, both ``float32[b, L]``."""
    shared = jnp.matmul(q, tree.centroids.T, precision=_HIGHEST)
    rank = shared
    if tree.ranking.shape[0]:
        rank = jnp.matmul(q, tree.ranking.T, precision=_HIGHEST)
    rank = rank + tree.leaf_offset[None, :] if tree.leaf_offset.shape[0] else rank
    if tree.groups is not None:
        inside = _in_best_groups(tree.groups, q, rank.shape[1], effort.leaves_ranked)
        rank = jnp.where(inside, rank, -jnp.inf)
    return shared, rank


def best_leaves(rank: jax.Array, count: int) -> jax.Array:
    """``int32[..., count]`` leaves that rank best, best first, -1 beyond those that are ranked."""
    score, leaves = jax.lax.top_k(rank, min(count, rank.shape[-1]))
    return jnp.where(score > -jnp.inf, leaves, -1).astype(jnp.int32)


def best_of_slots(
    tree: PackedTree,
    q: jax.Array,
    q_full: jax.Array,
    slots: jax.Array,
    store: tuple[jax.Array | None, jax.Array | None],
    effort: Effort,
    euclidean: bool,
) -> tuple[jax.Array, jax.Array]:
    """The k best rows of a query, of slots best first, by score from the store or from codes."""
    numbers = tree.slot_rows[jnp.maximum(slots, 0)]
    kept = slots >= 0
    if effort.rescore:
        if effort.retrieve > effort.rescore:
            kept = kept & first_distinct(numbers, effort.rescore)
        scores = row_scores(*store, q_full, numbers, euclidean=euclidean)
    else:
        scores = slot_scores(tree, q, slots)
    return best_rows(jnp.where(kept, scores, -jnp.inf), numbers, effort.k)


def row_scores(rows: Any, row_scale: Any, q: Any, numbers: Any, *, euclidean: bool) -> jax.Array:
    """Exact scores of some rows, ``<q, x>`` or ``-||q - x||^2``; out-of-range rows are clamped."""
    numbers = jnp.clip(numbers, 0, rows.shape[0] - 1)
    x = rows[numbers].astype(jnp.float32)
    if rows.dtype == jnp.int8:
        x = x * row_scale[numbers][:, None]
    if euclidean:
        return -jnp.sum((q[None, :] - x) ** 2, axis=1)
    # Not a matrix product: equal rows get equal bits wherever they stand.
    return jnp.sum(q[None, :] * x, axis=1)


def best_rows(scores: jax.Array, numbers: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best distinct rows, best first and the lowest first among equals."""
    numbers = jnp.where(scores > -jnp.inf, numbers, jnp.iinfo(jnp.int32).max)
    order = jnp.lexsort((-scores, numbers))
    same = jnp.concatenate([jnp.zeros(1, bool), numbers[order][1:] == numbers[order][:-1]])
    # A row that lies in two leaves stands twice: its better score stays.
    scores = jnp.where(same, -jnp.inf, scores[order])
    numbers = numbers[order]
    order = jnp.lexsort((numbers, -scores))[:k]
    scores, numbers = scores[order], numbers[order]
    numbers = jnp.where(scores > -jnp.inf, numbers, -1)
    pad = (0, k - len(order))
    return (
        jnp.pad(scores, pad, constant_values=-jnp.inf),
        jnp.pad(numbers, pad, constant_values=-1).astype(jnp.int32),
    )


def lookup_table(tree: PackedTree, q: jax.Array) -> jax.Array:
    """``float32[m, k]`` products of a query, or of its parts, with the codewords."""
    m, width, _ = tree.codewords.shape
    if width == q.shape[0]:
        return jnp.einsum("s,msk->mk", q, tree.codewords, precision=_HIGHEST)
    parts = jnp.pad(q, (0, m * width - q.shape[0])).reshape(m, width)
    return jnp.einsum("ms,msk->mk", parts, tree.codewords, precision=_HIGHEST)


def _slot_scores(tree: PackedTree, table: jax.Array, blocks: jax.Array) -> jax.Array:
    """``(gain *) sum_m table[m, code] (+ offset)`` of all slots of some blocks.

    One subspace after another over many slots: a gather of one short row of the table takes 0.6 ns
    a look-up, where gathering all subspaces of a slot at once takes ten times as long.
    """
    size = tree.block
    if tree.codes.layout in POINTS_LAST:
        data = tree.codes.data
        columns = data.reshape(data.shape[0], -1, size)[:, blocks].reshape(data.shape[0], -1)
    else:
        part = PackedCodes(
            tree.codes.data[blocks],
            blocks.shape[0] * size,
            tree.codes.num_subspaces,
            tree.codes.num_codewords,
            tree.codes.layout,
        )
        columns = unpack_codes(part).T

    def add(total: jax.Array, subspace: Any) -> Any:
        row, code = subspace
        return total + row[code.astype(jnp.int32)], None

    first, _ = add(jnp.float32(0), (table[0], columns[0]))
    total, _ = jax.lax.scan(add, first, (table[1:], columns[1:]))
    if tree.gains is not None:
        level = tree.gains.level.reshape(-1, size)[blocks].reshape(-1)
        total = total * tree.gains.levels[level.astype(jnp.int32)]
    if tree.slot_offset.shape[0]:
        total = total + tree.slot_offset.reshape(-1, size)[blocks].reshape(-1)
    return total


def first_distinct(numbers: jax.Array, count: int) -> jax.Array:
    """Which of some rows, best first, are the first ``count`` different ones."""
    place = jnp.arange(numbers.shape[0], dtype=jnp.int32)
    order = jnp.lexsort((place, numbers))
    repeated = jnp.concatenate([jnp.zeros(1, bool), numbers[order][1:] == numbers[order][:-1]])
    fresh = jnp.zeros(numbers.shape, bool).at[order].set(~repeated)
    return fresh & (jnp.cumsum(fresh.astype(jnp.int32)) <= count)


def _in_best_groups(groups: LeafGroups, q: jax.Array, leaves: int, count: int) -> jax.Array:
    """``bool[b, L]`` the leaves of the best groups, of as many as hold ``count`` leaves."""
    rank = jnp.matmul(q, groups.vectors.T, precision=_HIGHEST)
    rank = rank + groups.offset[None, :] if groups.offset.shape[0] else rank
    sizes = groups.starts[1:] - groups.starts[:-1]
    order = jnp.argsort(-rank, axis=1, stable=True)
    before = jnp.cumsum(sizes[order], axis=1, dtype=jnp.int32) - sizes[order]
    query = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    chosen = jnp.zeros(rank.shape, bool).at[query, order].set(before < count)
    return jnp.repeat(chosen, sizes, axis=1, total_repeat_length=leaves)


def _candidates(
    tree: PackedTree,
    q: Any,
    shared: Any,
    leaves: Any,
    usable: Any,
    effort: Effort,
    count: int,
) -> Candidates:
    """The best ``count`` slots of some leaves by quantized score."""
    probed, leaves = leaves >= 0, jnp.clip(leaves, 0, tree.centroids.shape[0] - 1)
    table = lookup_table(tree, q)
    size = tree.block
    count = min(count, tree.slot_rows.shape[0])
    per_step = max(_STEP // size, -(-count // size))
    sizes = jnp.where(probed, tree.starts[leaves + 1] - tree.starts[leaves], 0)
    lanes = jnp.arange(size, dtype=jnp.int32)

    def lowest_rows(pool: Candidates) -> jax.Array:
        rows = tree.slot_rows[jnp.maximum(pool.slots, 0)]
        return jnp.lexsort((rows, -pool.scores))[:count].astype(jnp.int32)

    def scan(best: Candidates, sizes: jax.Array) -> Candidates:
        ends = jnp.cumsum(sizes, dtype=jnp.int32)
        total = ends[-1]

        def step(carry: Any) -> Any:
            best, begin = carry
            # The work list: place p lies in the first probed leaf whose end is beyond p.
            place = begin + jnp.arange(per_step, dtype=jnp.int32)
            rank = jnp.searchsorted(ends, place, side="right", method="compare_all")
            rank = jnp.minimum(rank.astype(jnp.int32), leaves.shape[0] - 1)
            leaf = leaves[rank]
            block = jnp.where(place < total, tree.starts[leaf] + place - (ends - sizes)[rank], 0)
            scores = _slot_scores(tree, table, block) + jnp.repeat(shared[leaf], size)
            slots = (block[:, None] * size + lanes[None, :]).reshape(-1)
            valid = jnp.repeat(place < total, size) & usable.reshape(-1, size)[block].reshape(-1)
            scores = jnp.where(valid & ~jnp.isnan(scores), scores, -jnp.inf)
            merged = Candidates(
                jnp.concatenate([best.scores, scores]), jnp.concatenate([best.slots, slots])
            )
            top, order = jax.lax.top_k(merged.scores, count)
            # A tie across the last place: top_k takes the first probed, the lowest row is wanted.
            # Not top[-1]: XLA would merge that slice into the selection and sort everything.
            last = jnp.min(top)
            cut = jnp.sum(merged.scores == last) > jnp.sum(top == last)
            order = jax.lax.cond(
                cut & (last > -jnp.inf),
                lambda: lowest_rows(merged),
                lambda: order.astype(jnp.int32),
            )
            return jax.tree.map(lambda a: a[order], merged), begin + per_step

        return jax.lax.while_loop(lambda c: c[1] < total, step, (best, total * 0))[0]

    # Made from `sizes`, so that under shard_map the carry varies over devices from the start.
    none = jnp.broadcast_to(jnp.sum(sizes, dtype=jnp.int32) * 0, (count,))
    best = Candidates(none.astype(jnp.float32) - jnp.inf, none - 1)
    if effort.deviations < math.inf and sizes.shape[0] > SURE_LEAVES:
        sure = jnp.arange(sizes.shape[0]) < SURE_LEAVES
        best = scan(best, jnp.where(sure, sizes, 0))
        bar = best.scores[min(effort.retrieve, count) - 1 if effort.rescore else count - 1]
        likely = highest_estimates(tree, q, leaves, shared[leaves], effort.deviations) >= bar
        best = scan(best, jnp.where(likely & ~sure, sizes, 0))
    else:
        best = scan(best, sizes)
    return best._replace(slots=jnp.where(best.scores > -jnp.inf, best.slots, -1))


def highest_estimates(
    tree: PackedTree, q: jax.Array, leaves: jax.Array, mean: jax.Array, deviations: float
) -> jax.Array:
    """Estimates that rows of some leaves are unlikely to exceed.

    A row of leaf l stands for c + r with r of deviation ``spread`` in every coordinate, so
    <q, c + r> has the mean <q, c> and the deviation ||q|| spread. With slot offsets, which make the
    estimate (||q||^2 - ||q - c - r||^2) / 2, r is weighed by q - c and lowers the mean by
    ||r||^2 / 2.
    """
    spread = tree.spread[leaves]
    norm = jnp.sqrt(jnp.sum(q * q))
    if tree.slot_offset.shape[0]:
        mean = mean + tree.leaf_offset[leaves] if tree.leaf_offset.shape[0] else mean
        norm = jnp.sqrt(jnp.maximum(norm * norm - 2 * mean, 0))
        mean = mean - 0.5 * spread * spread * q.shape[0]
    return mean + deviations * norm * spread


def slot_scores(tree: PackedTree, q: jax.Array, slots: jax.Array) -> jax.Array:
    """Quantized scores of some slots, differentiable in the query and the tree."""
    slots = jnp.maximum(slots, 0)
    block = slots // tree.block
    leaf = jnp.searchsorted(tree.starts, block, side="right", method="compare_all") - 1
    codes = code_rows(tree.codes, slots).astype(jnp.int32)
    lookups = jnp.take_along_axis(lookup_table(tree, q), codes.T, axis=1)
    sums = jnp.sum(lookups, axis=0)
    if tree.gains is not None:
        sums = sums * tree.gains.levels[tree.gains.level[slots].astype(jnp.int32)]
    scores = jnp.matmul(tree.centroids[leaf], q, precision=_HIGHEST) + sums
    return scores + tree.slot_offset[slots] if tree.slot_offset.shape[0] else scores
