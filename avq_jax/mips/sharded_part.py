"""What one device does in a search of an index whose leaves are shared out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from avq_jax.mips.effort import Effort
from avq_jax.mips.exact import SearchResult
from avq_jax.mips.index import Tree
from avq_jax.mips.searcher import probes_of, result_of
from xla_kernels import (
    SURE_LEAVES,
    PackedTree,
    best_candidates,
    highest_estimates,
    rescore_top_k,
    tree_candidates,
    tree_floor,
    tree_leaves,
    tree_search,
)

__all__ = ["Part"]

# A bar that candidates must reach comes from the best leaves, so many that they hold about this
# many times the slots that are kept.
_ENOUGH = 4


class Part(NamedTuple):
    """What a device has of an index, its place among the others, and slots kept by estimate."""

    packed: PackedTree
    rows: Any
    scale: Any
    metric: str
    axis: str
    shards: int
    kept: int

    def search(self, q: Array, projection: Any, effort: Effort) -> SearchResult:
        """The results of all queries, on every device."""
        b, k, by = q.shape[0], effort.k, effort.implementation
        if b == 0:
            return SearchResult(jnp.zeros((0, k), jnp.float32), jnp.zeros((0, k), jnp.int32))
        # Of each query's own device are its preparation, its leaves and its choices.
        probes = probes_of(self._own(q), self.metric)
        mine = Tree(self.packed, projection).scanned(probes.q)
        leaves = tree_leaves(
            self.packed, mine, leaves_to_search=effort.leaves_to_search, implementation=by
        )
        leaves = jnp.where(probes.usable[:, None], leaves, -1)
        seen = self._for_all(mine)
        if effort.adaptive is not None and leaves.shape[1] > SURE_LEAVES:
            leaves = self._likely(seen, mine, leaves, effort, effort.adaptive)
        leaves = self._for_all(leaves)
        if effort.rescore:
            full = seen if mine is probes.q else self._for_all(probes.q)
            found = self._rescored(seen, full, leaves, effort)
        else:
            found = tree_search(
                self.packed,
                seen,
                k=k,
                leaves_to_search=effort.leaves_to_search,
                leaves=leaves,
                recall_target=effort.recall_target,
                implementation=by,
            )
        scores, ids = (self._to_own(a) for a in found)
        # Equal scores in the order of the rows.
        retrieve = max(self.shards * k, k + 1)
        scores, ids = self._chosen(scores, ids, effort, retrieve=retrieve, keep=k, k=k)
        if self.metric == "l2" and not effort.rescore:
            # <q, x> - ||x||^2 / 2 back to -||q - x||^2
            scores = 2 * scores - jnp.sum(mine * mine, axis=1, keepdims=True)
        result = result_of(probes, scores, ids)
        return jax.tree.map(lambda a: self._for_all(a)[:b], result)

    def _rescored(
        self, seen: Array, full: Array, leaves: Array, effort: Effort
    ) -> tuple[Array, Array]:
        """Exact scores of the rows of this device among the candidates of all, and their ids."""
        floor = self._floor(seen, leaves, effort)
        retrieve, keep, k = self.kept, effort.rescore, effort.k
        found = self._candidates(seen, leaves, effort, retrieve=retrieve, k=k, floor=floor)
        _, chosen = self._chosen(*found, effort, retrieve=retrieve, keep=keep, k=k)
        chosen = self._for_all(chosen)
        me = jax.lax.axis_index(self.axis)
        here = (chosen >= 0) & (chosen % self.shards == me)
        local = jnp.where(here, chosen // self.shards, -1)
        # Rows are rescored by XLA where the scan has a kernel of an accelerator.
        by = effort.implementation if effort.implementation in ("xla", "cpu") else None
        scores, rows = rescore_top_k(
            full,
            self.rows,
            local,
            k,
            scale=self.scale,
            euclidean=self.metric == "l2",
            implementation=by,
        )
        return scores, jnp.where(rows >= 0, rows * self.shards + me, -1)

    def _floor(self, seen: Array, leaves: Array, effort: Effort) -> Array | None:
        """What candidates must reach by the best leaves, so that others need not look below."""
        slots = self.packed.slot_rows.shape[0] * self.shards // self.packed.centroids.shape[0]
        first = -(-_ENOUGH * self.kept // max(1, slots))
        if self.shards == 1 or leaves.shape[1] <= 2 * first:
            return None
        floor = tree_floor(
            self.packed,
            seen,
            leaves[:, :first],
            retrieve=self.kept,
            implementation=effort.implementation,
        )
        return jax.lax.pmax(floor, self.axis)

    def _candidates(
        self,
        seen: Array,
        leaves: Array,
        effort: Effort,
        *,
        retrieve: int,
        k: int,
        floor: Array | None = None,
    ) -> tuple[Array, Array]:
        """Estimates and rows that all devices found for the queries of this one."""
        found = tree_candidates(
            self.packed,
            seen,
            leaves,
            retrieve=retrieve,
            k=k,
            floor=floor,
            recall_target=effort.recall_target,
            implementation=effort.implementation,
        )
        scores, rows = (self._to_own(a) for a in found)
        return scores, rows

    def _chosen(
        self, scores: Array, rows: Array, effort: Effort, *, retrieve: int, keep: int, k: int
    ) -> tuple[Array, Array]:
        by = effort.implementation
        return best_candidates(scores, rows, retrieve=retrieve, keep=keep, k=k, implementation=by)

    def _likely(
        self, seen: Array, mine: Array, leaves: Array, effort: Effort, deviations: float
    ) -> Array:
        """Leaves of this device's queries without those that are passed over."""
        kept = self.kept
        sure = self._for_all(leaves[:, :SURE_LEAVES])
        found = self._candidates(seen, sure, effort, retrieve=kept, k=1)
        scores, _ = self._chosen(*found, effort, retrieve=kept, keep=kept, k=1)
        there = scores > -jnp.inf
        last = jnp.min(jnp.where(there, scores, jnp.inf), axis=1)
        bar = jnp.where(jnp.sum(there, axis=1) >= kept, last, -jnp.inf)

        def likely(q: Array, leaves: Array, bar: Array) -> Array:
            some = jnp.maximum(leaves, 0)
            mean = jnp.sum(self.packed.centroids[some] * q[None, :], axis=1)
            return highest_estimates(self.packed, q, some, mean, deviations) >= bar

        first = (jnp.arange(leaves.shape[1]) < SURE_LEAVES)[None, :]
        return jnp.where(first | jax.vmap(likely)(mine, leaves, bar), leaves, -1)

    def _own(self, q: Array) -> Array:
        """The queries of this device; those that are none are not finite."""
        q = jnp.pad(q, ((0, -q.shape[0] % self.shards), (0, 0)), constant_values=jnp.nan)
        each = q.shape[0] // self.shards
        return jax.lax.dynamic_slice_in_dim(q, jax.lax.axis_index(self.axis) * each, each)

    def _for_all(self, a: Array) -> Array:
        """What each device has for its queries, for all queries on all devices."""
        return jax.lax.all_gather(a, self.axis, tiled=True)

    def _to_own(self, a: Array) -> Array:
        """``[b, r]`` on each device to what all have for its own queries, ``[shards, b', r]``."""
        a = a.reshape(self.shards, -1, a.shape[1])
        return jax.lax.all_to_all(a, self.axis, 0, 0)
