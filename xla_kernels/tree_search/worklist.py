"""What a scan by an accelerator reads: windows of slots, each with a group of its queries.

A window is a run of ``points`` slots that begins at a multiple of 128; a leaf is covered by as many
as it takes. An entry of the work list is a window and up to ``group`` queries that probe its leaf.
The pairs of query and window are sorted by window, so that queries with a leaf in common share its
decoding. All shapes are static: a round takes the next `Plan.windows` windows of each query.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..adc.bins import expected_recall
from .effort import Effort
from .packed import PackedTree

LANES = 128
# Bytes of the scores that a round writes.
_ROUND_BYTES = 32 << 20


class Sizes(NamedTuple):
    """Most slots of a window, fewest and most queries of a group, queries of a batch."""

    points: int = 2048
    fewest: int = 8
    most: int = 128
    batch: int = 256


class Plan(NamedTuple):
    """Static numbers of the scan of a batch of queries.

    Attributes:
      points: slots of a window, a multiple of ``bins``.
      bins: bins of a window; slot j of it lies in bin j mod bins.
      group: queries of an entry.
      windows: windows of each query in a round.
      entries: most entries of a round.
    """

    points: int
    bins: int
    group: int
    windows: int
    entries: int

    @property
    def bits(self) -> int:
        """Low bits of a score that tell which slot of its bin has it."""
        return (self.points // self.bins - 1).bit_length()


def plan_of(
    tree: PackedTree, b: int, effort: Effort, count: int, recall_target: float, sizes: Sizes
) -> Plan:
    """Choose the numbers of a scan for ``b`` queries that keeps ``count`` slots of each.

    The window holds a leaf of average size and a quarter more. Bins are as few as give
    `recall_target` if the best slots lie with equal chance anywhere in a quarter of the probed
    leaves: those near the query hold more of them.
    """
    slots, leaves = tree.slot_rows.shape[0], tree.centroids.shape[0]
    probed, mean = effort.leaves_to_search, slots / leaves
    points = min(_up(1.25 * mean, LANES), _up(slots, LANES), sizes.points)
    each = mean / points + 0.25
    bins = points
    if recall_target < 1.0:
        bins = LANES
        near = probed * each / 4
        while bins < points and expected_recall(count, max(1, int(near * bins))) < recall_target:
            bins *= 2
        bins = min(bins, points)
        points = _up(points, bins)
    shared = 1.5 * b * probed / leaves
    group = min(sizes.most, max(sizes.fewest, 1 << math.ceil(math.log2(max(shared, 1)))))
    there = slots // points + 2 * leaves
    windows = min(max(probed, math.ceil(1.5 * probed * each)), there)

    def entries(windows: int) -> int:
        pairs = b * windows
        return min(pairs, pairs // group + min(pairs, there))

    while windows > 1 and entries(windows) * group * bins * 4 > _ROUND_BYTES:
        windows = -(-windows // 2)
    return Plan(points, bins, group, windows, entries(windows))


def _up(x: float | int, multiple: int) -> int:
    return max(1, math.ceil(x / multiple)) * multiple


class Round(NamedTuple):
    """A work list, and where its results are found.

    Attributes:
      first: ``int32[E]`` first slot of the window of an entry, in units of 128.
      low: ``int32[E]`` first slot of the leaf, counted from there.
      high: ``int32[E]`` end of the leaf, counted from there.
      queries: ``int32[E, G]`` the queries; those beyond the last of an entry are any.
      count: ``int32[]`` entries there are.
      place: ``int32[b, C]`` row ``entry G + place in its group`` of the results of a query's
        windows, -1 where it has none left.
      start: ``int32[b, C]`` first slot of those windows.
      rank: ``int32[b, C]`` which of the probed leaves they belong to.
    """

    first: Any
    low: Any
    high: Any
    queries: Any
    count: Any
    place: Any
    start: Any
    rank: Any


def windows_of(tree: PackedTree, points: int) -> tuple[jax.Array, jax.Array]:
    """First window, in units of 128 slots, and number of windows of each leaf, ``int32[L]``."""
    low, high = tree.starts[:-1] * tree.block, tree.starts[1:] * tree.block
    first = low // LANES
    number = (high - first * LANES + points - 1) // points
    return first, jnp.where(high > low, number, 0)


def round_of(
    tree: PackedTree, leaves: jax.Array, ends: jax.Array, begin: jax.Array, plan: Plan
) -> Round:
    """The work list of windows ``begin`` to ``begin + plan.windows`` of each query.

    Args:
      tree: of the leaves.
      leaves: ``int32[b, P]`` leaves a query probes.
      ends: ``int32[b, P]`` running sums of their windows.
      begin: ``int32[]``.
      plan: of the scan.
    """
    b, each, group = leaves.shape[0], plan.windows, plan.group
    first, number = windows_of(tree, plan.points)
    before = jnp.cumsum(number, dtype=jnp.int32) - number
    at = begin + jnp.arange(each, dtype=jnp.int32)
    # The window at place p lies in the first probed leaf whose end is beyond p.
    rank = jnp.sum(ends[:, None, :] <= at[None, :, None], axis=2, dtype=jnp.int32)
    there = rank < leaves.shape[1]
    rank = jnp.minimum(rank, leaves.shape[1] - 1)
    leaf = jnp.take_along_axis(leaves, rank, axis=1)
    nth = at[None, :] - (jnp.take_along_axis(ends, rank, axis=1) - number[leaf])
    nth = jnp.where(there, nth, 0)
    key = jnp.where(there, before[leaf] + nth, jnp.iinfo(jnp.int32).max)

    pairs = b * each
    place = jnp.arange(pairs, dtype=jnp.int32)
    key, pair = jax.lax.sort((key.reshape(-1), place), num_keys=1, is_stable=True)
    fresh = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
    within = place - jax.lax.cummax(jnp.where(fresh, place, 0))
    opens = (within % group == 0) & (key < jnp.iinfo(jnp.int32).max)
    entry = jnp.cumsum(opens.astype(jnp.int32), dtype=jnp.int32) - 1
    count = entry[-1] + 1
    row = jnp.where(key < jnp.iinfo(jnp.int32).max, entry * group + within % group, -1)
    _, row = jax.lax.sort((pair, row), num_keys=1)

    opened = jax.lax.sort(jnp.where(opens, place, pairs - 1))[: plan.entries]
    members = opened[:, None] + jnp.arange(group, dtype=jnp.int32)[None, :]
    queries = pair[jnp.minimum(members, pairs - 1)] // each
    leader = pair[opened]
    leaf_of, nth_of = leaf.reshape(-1)[leader], nth.reshape(-1)[leader]
    step = plan.points // LANES
    window = first[leaf_of] + nth_of * step
    starts = tree.starts * tree.block
    low, high = (starts[leaf_of + i] - window * LANES for i in (0, 1))
    start = (first[leaf] + nth * step) * LANES
    return Round(window, low, high, queries, count, row.reshape(b, each), start, rank)
