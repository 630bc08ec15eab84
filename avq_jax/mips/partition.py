"""The k-means tree: leaves of nearby rows, most of which a query can skip (section 5.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Int64

from avq_jax.loss import Scaling
from avq_jax.progress import steps
from avq_jax.quantization.rows import Rows, in_blocks, unit
from avq_jax.quantization.update import over_devices, solve, worst_rows

__all__ = [
    "Layout",
    "anisotropic_centroids",
    "assign_first",
    "assign_second",
    "check_slots",
    "k_means_step",
    "lay_out",
    "leaf_groups",
    "nearest_centroids",
    "spill_losses",
    "spilled_leaves",
    "train_centroids",
]

_ROWS_PER_STEP = 1024
_CHUNK = 1 << 17


class Layout(NamedTuple):
    """Where the rows of each leaf lie.

    Attributes:
      slots: ``int32[S]`` row number in each slot, -1 where a leaf ends inside its last block.
        S is a multiple of the block size; inside a leaf row numbers rise.
      starts: ``int32[L + 1]`` first block of each leaf.
    """

    slots: Int32[Array | np.ndarray, " S"]
    starts: Int32[Array | np.ndarray, " L+1"]


def _nearest(x: Float[Array, "B d"], centroids: Float[Array, "L d"]) -> Int32[Array, " B"]:
    """Find the nearest centroid of each row, the first of equals.

    Two plain reductions vectorise where ``argmax`` does not (0.7 us against 3 us a row).
    """
    half = 0.5 * jnp.sum(centroids * centroids, axis=1)
    scores = jnp.matmul(centroids, x.T, precision="highest") - half[:, None]
    best = jnp.max(scores, axis=0, keepdims=True)
    number = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return jnp.min(jnp.where(scores == best, number, centroids.shape[0] - 1), axis=0)


def _in_steps(x: Array) -> Array:
    n, d = x.shape
    return jnp.pad(x, ((0, -n % _ROWS_PER_STEP), (0, 0))).reshape(-1, _ROWS_PER_STEP, d)


@jax.jit
def assign_first(x: Float[Array, "n d"], centroids: Float[Array, "L d"]) -> Int32[Array, " n"]:
    """Nearest centroid of every row, the first of equals."""
    leaves = jax.lax.map(lambda rows: _nearest(rows, centroids), _in_steps(x))
    return leaves.reshape(-1)[: x.shape[0]]


@functools.partial(jax.jit, static_argnames="axis")
def k_means_step(
    x: Float[Array, "n d"], centroids: Float[Array, "L d"], axis: str | None = None
) -> tuple[Float[Array, "L d"], Float[Array, ""]]:
    """New centroids and the mean squared distance to the old; rows may be shared out over devices.

    With ``axis``, a mesh axis of ``shard_map``, x are the rows of this device, as many on each.
    """
    num_leaves = centroids.shape[0]
    leaves = assign_first(x, centroids)
    size = jax.ops.segment_sum(jnp.ones(x.shape[0], jnp.float32), leaves, num_leaves)
    total = jax.ops.segment_sum(x, leaves, num_leaves)
    size, total = over_devices(size, axis), over_devices(total, axis)
    fresh = total / jnp.maximum(size, 1)[:, None]
    # An empty leaf restarts at one of the rows that lie farthest from their centroid.
    distance = jnp.sum((x - centroids[leaves]) ** 2, axis=1)
    far = worst_rows(x, distance, num_leaves, axis)
    empty = size == 0
    far = far[jnp.maximum(jnp.cumsum(empty.astype(jnp.int32)) - 1, 0)]
    mean = jnp.mean(distance)
    mean = mean if axis is None else jax.lax.pmean(mean, axis)
    return jnp.where(empty[:, None], far, fresh), mean


def train_centroids(
    key: Array,
    x: Float[Array, "n d"],
    *,
    num_leaves: int,
    num_iterations: int = 12,
    tolerance: float = 1e-3,
    spherical: bool = False,
    progress: bool | None = False,
    step: Callable[..., Any] = k_means_step,
) -> Float[Array, "L d"]:
    """Learn leaf centroids by k-means (Lloyd, 1982), from random distinct rows.

    Args:
      key: a typed key.
      x: ``[n, d]`` training rows, n >= num_leaves.
      num_leaves: L.
      num_iterations: most iterations.
      tolerance: stop when an iteration lowers the mean squared distance by a smaller fraction.
      spherical: give centroids length 1 after every iteration (Dhillon and Modha, 2001).
      progress: show a progress bar.
      step: :func:`k_means_step` where it runs.

    Returns:
      ``float32[L, d]`` centroids.
    """
    centroids = x[jax.random.choice(key, x.shape[0], (num_leaves,), replace=False)]
    if num_leaves == 1:
        centroids = jnp.mean(x, axis=0, keepdims=True)
        return unit(centroids) if spherical else centroids
    previous = np.inf
    for _ in steps(num_iterations, "partitioning", progress):
        centroids, loss = step(x, centroids)
        centroids = unit(centroids) if spherical else centroids
        if previous - (loss := float(loss)) <= tolerance * loss:
            break
        previous = loss
    return centroids


@jax.jit
def _anisotropic(x: Array, leaves: Array, centroids: Array, eta: Array) -> Array:
    n = x.shape[0]
    ones = jnp.ones(n, jnp.float32)
    blocks = in_blocks(Rows(x, Scaling(eta * ones, ones)), _ROWS_PER_STEP)
    codes = jnp.pad(leaves, (0, -n % _ROWS_PER_STEP)).reshape(-1, 1, _ROWS_PER_STEP)
    return solve(centroids[None], codes, blocks, solver="cg").codewords[0]


def anisotropic_centroids(
    x: Float[Array, "n d"],
    leaves: Int32[np.ndarray, " n"],
    centroids: Float[Array, "L d"],
    *,
    eta: float,
) -> Float[Array, "L d"]:
    """Centroids by Theorem 4.2 with leaves as partitions: ``<q, c>`` ranks leaves better.

    The mean of a spread-out leaf is short, and its product with a query that its rows answer is
    too small. The loss that weighs parallel errors by eta lengthens it.

    Args:
      x: ``[n, d]`` training rows.
      leaves: ``int32[n]`` their leaves.
      centroids: ``[L, d]`` where the solution starts.
      eta: ratio of the weights of parallel and orthogonal errors, the same for all rows; 1 gives
        means.

    Returns:
      ``float32[L, d]``.
    """
    return _anisotropic(x, jnp.asarray(leaves), centroids, jnp.float32(eta))


def nearest_centroids(
    x: Any, centroids: Float[Array, "L d"], *, assign: Callable[..., Any] = assign_first
) -> Int32[np.ndarray, " n"]:
    """Find the leaf of every row, chunk by chunk on the host.

    Args:
      x: ``[n, d]`` rows.
      centroids: ``[L, d]``.
      assign: :func:`assign_first` where it runs.

    Returns:
      ``int32[n]``; of equal distances the first leaf.
    """
    n = x.shape[0]
    leaves = np.empty(n, np.int32)
    for start in range(0, n, _CHUNK):
        start = max(0, min(start, n - _CHUNK))
        part = slice(start, start + _CHUNK)
        leaves[part] = assign(jnp.asarray(x[part]), centroids)
    return leaves


def leaf_groups(
    key: Array, vectors: Float[Array, "L d"], *, num_groups: int, eta: float
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """The upper level of a tree: k-means of the vectors that rank leaves.

    Args:
      key: a typed key.
      vectors: ``[L, d]``.
      num_groups: G, at most L.
      eta: as of :func:`anisotropic_centroids`, of the vectors that rank groups.

    Returns:
      The groups, their vectors ``float32[G, d]`` and first leaves ``int32[G + 1]``, and the order
      of leaves ``int[L]`` that puts those of a group together.
    """
    means = train_centroids(key, vectors, num_leaves=num_groups, num_iterations=20)
    group = nearest_centroids(vectors, means)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=num_groups))])
    best = anisotropic_centroids(vectors, group, means, eta=eta)
    return (np.asarray(best), starts.astype(np.int32)), order


def check_slots(num_slots: int) -> None:
    """Raise unless every slot of so many has an int32 number.

    Raises:
      ValueError: 2^31 slots or more.

    >>> check_slots(1000)
    """
    if num_slots > np.iinfo(np.int32).max:
        raise ValueError(
            f"an index must have fewer than 2^31 slots, rows and padding; got {num_slots}"
        )


def spill_losses(
    x: Float[Array, "B d"],
    first: Int32[Array, " B"],
    centroids: Float[Array, "L d"],
    soar_lambda: Float[Array, ""],
) -> Float[Array, "L B"]:
    """``||x - c||^2 + lambda <x - c, r>^2 / ||r||^2`` of all leaves but the first (SOAR)."""
    residual = x - centroids[first]
    square = jnp.sum(residual * residual, axis=1, keepdims=True)
    along = residual * jax.lax.rsqrt(jnp.where(square > 0, square, 1))
    cross = jnp.matmul(centroids, along.T, precision="highest")
    cross = jnp.sum(x * along, axis=1)[None, :] - cross
    distance = jnp.sum(centroids * centroids, axis=1)[:, None]
    distance = distance - 2 * jnp.matmul(centroids, x.T, precision="highest")
    loss = distance + soar_lambda * cross * cross
    number = jax.lax.broadcasted_iota(jnp.int32, loss.shape, 0)
    return jnp.where(number == first[None, :], jnp.inf, loss)


def _second(x: Array, first: Array, centroids: Array, soar_lambda: Array) -> Int32[Array, " B"]:
    """The leaf of least loss, the first of equals."""
    loss = spill_losses(x, first, centroids, soar_lambda)
    number = jax.lax.broadcasted_iota(jnp.int32, loss.shape, 0)
    best = jnp.min(loss, axis=0, keepdims=True)
    return jnp.min(jnp.where(loss == best, number, centroids.shape[0] - 1), axis=0)


@jax.jit
def assign_second(x: Array, first: Array, centroids: Array, soar_lambda: Array) -> Array:
    """Second leaf of every row, of least :func:`spill_losses`, the first of equals."""
    blocks = _in_steps(x), jnp.pad(first, (0, -x.shape[0] % _ROWS_PER_STEP))
    blocks = blocks[0], blocks[1].reshape(-1, _ROWS_PER_STEP)
    leaves = jax.lax.map(lambda z: _second(z[0], z[1], centroids, soar_lambda), blocks)
    return leaves.reshape(-1)[: x.shape[0]]


def spilled_leaves(
    x: Any,
    leaves: Int32[np.ndarray, " n"],
    centroids: Float[Array, "L d"],
    *,
    soar_lambda: float,
    assign: Callable[..., Any] = assign_second,
) -> Int32[np.ndarray, " n"]:
    """A second leaf for every row, whose residual is not parallel to the first.

    A query finds a row if either copy is found. The first copy fails where the residual lies
    along the query; so the second leaf is the one of least ``||r'||^2 + lambda <r', r>^2 /
    ||r||^2`` with r, r' the residuals of the two leaves.

    Args:
      x: ``[n, d]`` rows.
      leaves: ``int32[n]`` their first leaves.
      centroids: ``[L, d]``, L >= 2.
      soar_lambda: weight of the parallel part, >= 0; 0 takes the second nearest centroid.
      assign: :func:`assign_second` where it runs.

    Returns:
      ``int32[n]``, never the first leaf.

    Reference:
      Sun et al., SOAR: Improved Indexing for Approximate Nearest Neighbor Search, 2023.
    """
    n = x.shape[0]
    second = np.empty(n, np.int32)
    for start in range(0, n, _CHUNK):
        start = max(0, min(start, n - _CHUNK))
        part = slice(start, start + _CHUNK)
        second[part] = assign(
            jnp.asarray(x[part]), jnp.asarray(leaves[part]), centroids, jnp.float32(soar_lambda)
        )
    return second


def lay_out(
    leaves: Int32[np.ndarray, " n"],
    *,
    num_leaves: int,
    block: int,
    room: Int64[np.ndarray, " L"] | None = None,
) -> Layout:
    """Rows sorted by leaf, each leaf padded to whole blocks, and to ``room`` blocks at least.

    Raises:
      ValueError: more slots than int32 can number.

    >>> lay_out(np.array([1, 0, 1], np.int32), num_leaves=2, block=32).starts.tolist()
    [0, 1, 2]
    """
    order = np.argsort(leaves, kind="stable").astype(np.int32)
    sizes = np.bincount(leaves, minlength=num_leaves)
    blocks = -(-sizes // block)
    if room is not None:
        blocks = np.maximum(blocks, room)
    check_slots(int(blocks.sum()) * block)
    starts = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int32)
    slots = np.full(int(starts[-1]) * block, -1, np.int32)
    first = np.cumsum(sizes) - sizes
    shift = starts[:-1].astype(np.int64) * block - first
    slots[np.arange(len(order)) + np.repeat(shift, sizes)] = order
    return Layout(slots, starts)
