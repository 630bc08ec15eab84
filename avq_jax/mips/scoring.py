"""Quantized scoring: leaves ranked, their codes scanned, the best candidates kept.

This is the path without a compiled kernel. Its scan is a loop over blocks of the probed leaves
whose length follows their sizes, so memory does not grow with n and shapes stay static.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.mips.index import Tree
from avq_jax.mips.partition import BLOCK
from avq_jax.quantization import lookup_table

__all__ = ["Candidates", "candidate_scores", "rank_leaves", "scan_leaves"]

# Blocks scored in one step of the scan: 4096 slots.
_STEP = 128


class Candidates(NamedTuple):
    """The best slots of a query, best first; slot -1 and score -inf where there are fewer."""

    scores: Float[Array, " R"]
    slots: Int32[Array, " R"]
    leaves: Int32[Array, " R"]


def leaf_scores(tree: Tree, queries: Float[Array, "b d"]) -> Float[Array, "b L"]:
    """``<q, centroid>``, the part of the score that all rows of a leaf share."""
    return jnp.matmul(queries, tree.centroids.T, precision=jax.lax.Precision.HIGHEST)


def rank_leaves(
    tree: Tree, scores: Float[Array, " L"], leaves_to_search: int
) -> Int32[Array, " a"]:
    """Choose the leaves to probe, best first; the lower number first among equals."""
    if tree.leaf_offset is not None:
        scores = scores + tree.leaf_offset
    return jax.lax.top_k(scores, leaves_to_search)[1].astype(jnp.int32)


def _slot_scores(tree: Tree, table: Float[Array, "m k"], blocks: Int32[Array, " B"]) -> Array:
    """``sum_m table[m, codes[m]] (+ offset)`` of all slots of some blocks.

    A gather of one table row at a time over many points takes 0.5 ns a lookup; gathering all
    subspaces of a point at once takes ten times as long.
    """
    codes = tree.codes[blocks].transpose(1, 0, 2).reshape(table.shape[0], -1)

    def add(total, subspace):
        row, code = subspace
        return total + row[code.astype(jnp.int32)], None

    first, _ = add(jnp.float32(0), (table[0], codes[0]))
    total, _ = jax.lax.scan(add, first, (table[1:], codes[1:]))
    if tree.offset is not None:
        total = total + tree.offset[blocks].reshape(-1)
    return total


def scan_leaves(
    tree: Tree,
    q: Float[Array, " d"],
    shared: Float[Array, " L"],
    leaves: Int32[Array, " a"],
    allowed: Bool[Array, " n"] | None,
    *,
    count: int,
) -> Candidates:
    """Find the best ``count`` slots of the probed leaves by quantized score.

    Equal scores: lowest row first, at the last place too.

    Args:
      tree: the quantized rows.
      q: ``[d]`` query.
      shared: ``[L]`` from :func:`leaf_scores`.
      leaves: ``int32[a]`` leaves to probe.
      allowed: rows that may be returned, or ``None`` for all.
      count: R.

    Returns:
      :class:`Candidates`, ``[R]`` each.
    """
    table = lookup_table(tree.codebook, q)
    starts = tree.layout.starts
    sizes = starts[leaves + 1] - starts[leaves]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    total = ends[-1]
    lanes = jnp.arange(BLOCK, dtype=jnp.int32)
    numbers = tree.layout.slots

    def lowest_rows(pool: Candidates) -> Int32[Array, " R"]:
        rows = numbers[jnp.maximum(pool.slots, 0)]
        return jnp.lexsort((rows, -pool.scores))[:count].astype(jnp.int32)

    def step(carry):
        best, begin = carry
        # The work list: position p lies in the first probed leaf whose end is beyond p.
        place = begin + jnp.arange(_STEP, dtype=jnp.int32)
        rank = jnp.searchsorted(ends, place, side="right", method="compare_all").astype(jnp.int32)
        rank = jnp.minimum(rank, len(leaves) - 1)
        leaf = leaves[rank]
        block = jnp.where(place < total, starts[leaf] + place - (ends - sizes)[rank], 0)
        scores = _slot_scores(tree, table, block) + jnp.repeat(shared[leaf], BLOCK)
        slots = (block[:, None] * BLOCK + lanes[None, :]).reshape(-1)
        rows = numbers.reshape(-1, BLOCK)[block].reshape(-1)
        usable = jnp.repeat(place < total, BLOCK) & (rows >= 0)
        if allowed is not None:
            usable = usable & allowed[jnp.maximum(rows, 0)]
        scores = jnp.where(usable & ~jnp.isnan(scores), scores, -jnp.inf)
        merged = Candidates(
            jnp.concatenate([best.scores, scores]),
            jnp.concatenate([best.slots, slots]),
            jnp.concatenate([best.leaves, jnp.repeat(leaf, BLOCK)]),
        )
        top, order = jax.lax.top_k(merged.scores, count)
        # A tie across the last place: top_k takes the first probed, the lowest row is wanted.
        last = top[-1]
        cut = jnp.sum(merged.scores == last) > jnp.sum(top == last)
        order = jax.lax.cond(
            cut & (last > -jnp.inf), lambda: lowest_rows(merged), lambda: order.astype(jnp.int32)
        )
        return jax.tree.map(lambda a: a[order], merged), begin + _STEP

    # Made from `total`, so that under shard_map the carry varies over devices from the start.
    none = jnp.broadcast_to(total * 0, count)
    empty = Candidates(none.astype(jnp.float32) - jnp.inf, none - 1, none)
    best, _ = jax.lax.while_loop(lambda c: c[1] < total, step, (empty, total * 0))
    return best._replace(slots=jnp.where(best.scores > -jnp.inf, best.slots, -1))


def candidate_scores(
    tree: Tree, q: Float[Array, " d"], candidates: Candidates
) -> Float[Array, " R"]:
    """Quantized scores of found candidates again, differentiable in the query and the tree."""
    slots = jnp.maximum(candidates.slots, 0)
    block, lane = slots // BLOCK, slots % BLOCK
    table = lookup_table(tree.codebook, q)
    codes = tree.codes[block, :, lane].astype(jnp.int32)
    lookups = jnp.take_along_axis(table, codes.T, axis=1)
    shared = jnp.matmul(tree.centroids[candidates.leaves], q, precision=jax.lax.Precision.HIGHEST)
    scores = shared + jnp.sum(lookups, axis=0)
    return scores if tree.offset is None else scores + tree.offset[block, lane]
