"""Balanced leaves: none holds more than a given multiple of the mean number of rows.

Prices on crowded leaves, added to the squared distances, spread the rows while the centroids are
learned; what is still too many in the end moves to the nearest leaf with room.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from avq_jax.progress import steps

__all__ = ["balanced_centroids", "balanced_leaves"]

_ROWS_PER_STEP = 1024
_CHUNK = 1 << 17
# Change of a price for a leaf of e times the mean size, in parts of the mean squared distance.
_RATE = 0.1
_ROUNDS = 12


def _priced(x: Array, centroids: Array, prices: Array) -> tuple[Array, Array]:
    """Leaf of least ``||x - c||^2 + price`` of each row, and the squared distance to it."""
    base = jnp.sum(centroids * centroids, axis=1) + prices

    def nearest(rows: Array) -> tuple[Array, Array]:
        cost = base[:, None] - 2 * jnp.matmul(centroids, rows.T, precision="highest")
        best = jnp.min(cost, axis=0, keepdims=True)
        number = jax.lax.broadcasted_iota(jnp.int32, cost.shape, 0)
        leaf = jnp.min(jnp.where(cost == best, number, cost.shape[0] - 1), axis=0)
        return leaf, best[0] - prices[leaf] + jnp.sum(rows * rows, axis=1)

    n, d = x.shape
    blocks = jnp.pad(x, ((0, -n % _ROWS_PER_STEP), (0, 0))).reshape(-1, _ROWS_PER_STEP, d)
    leaves, distances = jax.lax.map(nearest, blocks)
    return leaves.reshape(-1)[:n], distances.reshape(-1)[:n]


@jax.jit
def _step(x: Array, centroids: Array, prices: Array) -> tuple[Array, Array, Array]:
    """One round: leaves at these prices, then new centroids, prices and the largest leaf."""
    leaves, distances = _priced(x, centroids, prices)
    count = centroids.shape[0]
    size = jax.ops.segment_sum(jnp.ones(x.shape[0], jnp.float32), leaves, count)
    total = jax.ops.segment_sum(x, leaves, count)
    fresh = jnp.where(size[:, None] > 0, total / jnp.maximum(size, 1)[:, None], centroids)
    crowding = size * count / x.shape[0]
    change = _RATE * jnp.mean(distances) * jnp.log(jnp.maximum(crowding, 0.25))
    return fresh, prices + change, jnp.max(crowding)


def balanced_centroids(
    x: Float[Array, "n d"],
    centroids: Float[Array, "L d"],
    *,
    balance: float,
    progress: bool | None = False,
) -> tuple[Float[Array, "L d"], Float[Array, " L"]]:
    """Go on with k-means under prices, until no leaf is larger than ``balance`` times the mean.

    Args:
      x: ``[n, d]`` training rows.
      centroids: ``[L, d]`` of ordinary k-means.
      balance: at least 1.
      progress: show a progress bar.

    Returns:
      ``float32[L, d]`` centroids and ``float32[L]`` prices, for :func:`balanced_leaves`.
    """
    prices = jnp.zeros(centroids.shape[0], jnp.float32)
    for _ in steps(_ROUNDS, "balancing", progress):
        centroids, prices, largest = _step(x, centroids, prices)
        if float(largest) <= balance:
            break
    return centroids, prices


def balanced_leaves(
    x: Any, centroids: Float[Array, "L d"], prices: Float[Array, " L"], *, balance: float
) -> Int32[np.ndarray, " n"]:
    """Leaf of every row, none with more than ``ceil(balance * n / L)`` rows.

    Args:
      x: ``[n, d]`` rows.
      centroids: ``[L, d]``.
      prices: ``[L]`` of :func:`balanced_centroids`.
      balance: at least 1.

    Returns:
      ``int32[n]``. Rows go to the leaf of least squared distance and price; of a leaf that is too
      full its farthest rows go on to the nearest leaf with room.
    """
    n, count = x.shape[0], centroids.shape[0]
    leaves, distances = np.empty(n, np.int32), np.empty(n, np.float32)
    assign = jax.jit(_priced)
    for start in range(0, n, _CHUNK):
        part = slice(max(0, min(start, n - _CHUNK)), start + _CHUNK)
        found = assign(jnp.asarray(x[part]), centroids, prices)
        leaves[part], distances[part] = found
    most = math.ceil(balance * n / count)
    center = np.asarray(centroids)
    sizes = np.bincount(leaves, minlength=count)
    while (sizes > most).any():
        # Places in its leaf, nearest first; those beyond the last place move on.
        order = np.lexsort((distances, leaves))
        place = np.arange(n) - (np.cumsum(sizes) - sizes)[leaves[order]]
        moving = order[place >= most]
        room = np.flatnonzero(sizes < most)
        for start in range(0, len(moving), _ROWS_PER_STEP):
            rows = moving[start : start + _ROWS_PER_STEP]
            cost = np.sum(center[room] ** 2, axis=1) - 2 * (x[rows] @ center[room].T)
            best = np.argmin(cost, axis=1)
            leaves[rows] = room[best]
            distances[rows] = cost[np.arange(len(rows)), best] + np.sum(x[rows] ** 2, axis=1)
        sizes = np.bincount(leaves, minlength=count)
    return leaves
