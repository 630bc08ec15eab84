"""Which shard has which leaf: shares of like size, of neighbours or of leaves from all over."""

from __future__ import annotations

import heapq

import numpy as np
from jaxtyping import Float, Int, Int32

__all__ = ["LEAVES", "leaf_owners"]

LEAVES = ("near", "spread")
# Steps of the power iteration; a rough axis divides as well.
_STEPS = 20


def leaf_owners(
    vectors: Float[np.ndarray, "L d"],
    sizes: Int[np.ndarray, " L"],
    count: int,
    leaves: str,
) -> Int32[np.ndarray, " L"]:
    """Share leaves out.

    Args:
      vectors: of the leaves, what makes them neighbours.
      sizes: of the leaves.
      count: shards.
      leaves: ``"near"``: leaves are cut in two across the axis of their largest variance, parts in
        proportion to the shards they are for, and so on. ``"spread"``: the largest goes to the
        shard that has least.

    Returns:
      Shard of each leaf.

    >>> leaf_owners(np.array([[0.0], [9.0], [1.0], [8.0]]), np.ones(4, int), 2, "near").tolist()
    [1, 0, 1, 0]
    """
    owners = np.zeros(len(sizes), np.int32)
    if leaves == "spread":
        load = [(0, s) for s in range(count)]
        for leaf in np.argsort(-sizes, kind="stable"):
            has, least = load[0]
            owners[leaf] = least
            heapq.heapreplace(load, (has + int(sizes[leaf]), least))
        return owners
    parts = [(np.arange(len(sizes)), 0, count)]
    while parts:
        some, first, shards = parts.pop()
        owners[some] = first
        if shards == 1 or not len(some):
            continue
        order = some[np.argsort(_along(vectors[some], sizes[some]), kind="stable")]
        before = np.cumsum(sizes[order])
        left = shards // 2
        cut = int(np.searchsorted(before - sizes[order] / 2, before[-1] * left / shards))
        parts += [(order[:cut], first, left), (order[cut:], first + left, shards - left)]
    return owners


def _along(vectors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Places along the axis of largest variance, leaves weighted by size."""
    x = vectors.astype(np.float64)
    weight = np.maximum(sizes, 1e-9) / np.maximum(sizes, 1e-9).sum()
    x = x - weight @ x
    axis = x[np.argmax(np.einsum("ld,ld->l", x, x))]
    for _ in range(_STEPS):
        axis = (weight * (x @ axis)) @ x
        length = np.linalg.norm(axis)
        if length == 0:
            break
        axis = axis / length
    return x @ axis
