"""Free slots for rows that come: their leaves, codes and places, in shapes that never change."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.loss import QueryTerms, Scaling, row_norms, scaling
from avq_jax.mips.index import Tree
from avq_jax.mips.partition import spill_losses
from avq_jax.mips.projection import Scanned, scanned_rows
from avq_jax.mips.rescoring import Store
from avq_jax.quantization import Codes, Scaled, decode, encode
from avq_jax.quantization.scale import level_numbers
from xla_kernels.layout import put_code_rows

__all__ = ["Place", "SlotCodes", "clear", "coded", "place", "put_rows", "put_slots", "scanned"]

# Leaves a row may go to, nearest first, before it is refused.
_CHOICES = 8
_ROWS_PER_STEP = 1024


class Place(NamedTuple):
    """Where the rows of a batch go: ``int32[b]`` leaves and slots, slot -1 for none."""

    leaves: Int32[Array, " b"]
    slots: Int32[Array, " b"]


def clear(tree: Tree, rows: Int32[Array, " b"], num_rows: int) -> Tree:
    """Free the slots of some rows; row numbers below zero are skipped."""
    packed = tree.packed
    gone = jnp.zeros(num_rows, bool).at[jnp.where(rows >= 0, rows, num_rows)].set(True, mode="drop")
    freed = (packed.slot_rows >= 0) & gone[jnp.maximum(packed.slot_rows, 0)]
    return tree._replace(
        packed=packed._replace(
            slot_rows=jnp.where(freed, -1, packed.slot_rows),
            usable=packed.usable & ~freed[None, :],
        )
    )


def _in_steps(function: Any, args: Any) -> Any:
    """Map over rows, a step of them at a time."""
    b = jax.tree.leaves(args)[0].shape[0]
    if b <= _ROWS_PER_STEP:
        return function(args)
    pad = -b % _ROWS_PER_STEP

    def cut(a: Array) -> Array:
        a = jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1))
        return a.reshape(-1, _ROWS_PER_STEP, *a.shape[1:])

    found = jax.lax.map(function, jax.tree.map(cut, args))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:b], found)


def place(
    tree: Tree,
    slot_rows: Int32[Array, " S"],
    x: Float[Array, "b d"],
    active: Bool[Array, " b"],
    first: Int32[Array, " b"] | None = None,
    soar_lambda: Any = None,
) -> Place:
    """Find free slots in the nearest leaves that have any, in row order.

    Args:
      tree: whose leaves.
      slot_rows: what its slots hold now.
      x: ``[b, p]`` rows, as they are scanned.
      active: rows that want a slot.
      first: their first leaves, if this is the second copy of each (SOAR).
      soar_lambda: of the second copy.
    """
    packed = tree.packed
    num_leaves = packed.centroids.shape[0]
    choices = min(_CHOICES, num_leaves if first is None else num_leaves - 1)

    def rank(args: Any) -> Array:
        x, first = args
        if first is None:
            score = jnp.matmul(x, tree.ranking.T, precision="highest")
            score = score - 0.5 * jnp.sum(tree.ranking**2, axis=1)[None, :]
        else:
            score = -spill_losses(x, first, tree.ranking, soar_lambda).T
        return jax.lax.top_k(score, choices)[1].astype(jnp.int32)

    ranked = _in_steps(rank, (x, first))
    free = jnp.cumsum((slot_rows < 0).astype(jnp.int32))
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), free])[packed.starts * packed.block]
    begin, end = bounds[:-1], bounds[1:]
    b = x.shape[0]

    def choose(carry: Any, leaf: Array) -> Any:
        leaves, slots, begin = carry
        want = active & (slots < 0)
        group = jnp.where(want, leaf, num_leaves)
        order = jnp.argsort(group, stable=True)
        ranks = jnp.arange(b) - jnp.searchsorted(group[order], group[order], side="left")
        ranks = jnp.zeros(b, jnp.int32).at[order].set(ranks.astype(jnp.int32))
        number = begin[leaf] + ranks
        fits = want & (number < end[leaf])
        # The slot where the count of free ones reaches this number.
        slot = jnp.searchsorted(free, number + 1, side="left").astype(jnp.int32)
        taken = jax.ops.segment_sum(fits.astype(jnp.int32), leaf, num_leaves)
        return (jnp.where(fits, leaf, leaves), jnp.where(fits, slot, slots), begin + taken), None

    start = jnp.zeros(b, jnp.int32), jnp.full(b, -1, jnp.int32), begin
    (leaves, slots, _), _ = jax.lax.scan(choose, start, ranked.T)
    return Place(leaves, slots)


def scanned(tree: Tree, x: Float[Array, "b d"], weight: Any, metric: str) -> Scanned:
    """Rows as ``build`` quantizes them, and their scaling."""
    if metric == "l2":
        return scanned_rows(tree.projection, tree.width, x, None)
    norms = row_norms(x)
    norms = (norms > 0).astype(jnp.float32) if metric == "cosine" else norms
    return scanned_rows(tree.projection, tree.width, x, scaling(weight, norms, dim=x.shape[1]))


class SlotCodes(NamedTuple):
    """What slots hold beside row numbers: ``uint8[b, m]`` codes, offsets (L2), numbers of gains."""

    codes: Any
    offset: Any
    gains: Any


def coded(tree: Tree, leaves: Int32[Array, " b"], rows: Scanned, weight: Any) -> SlotCodes:
    """Codes of rows in their leaves, as ``build`` has them."""
    x, codec = rows.rows, tree.codec
    residual = x - tree.centroids[leaves]

    def found(codes: Codes, offset: Any) -> SlotCodes:
        gains = level_numbers(codec, codes.gain) if isinstance(codec, Scaled) else None
        return SlotCodes(codes.codes, offset, gains)

    if rows.scaling is not None:
        return found(encode(codec, residual, rows.scaling, direction=x), None)
    norms = row_norms(x)
    # The lifted row (x, -||x||^2 / 2), whose last coordinate is not quantized.
    lifted = jnp.hypot(norms, 0.5 * norms * norms)
    each = scaling(weight, lifted, dim=x.shape[1] + 1)
    u = x / jnp.maximum(lifted, np.finfo(np.float32).tiny)[:, None]
    extra = QueryTerms(u[:, None, :], (each.parallel - each.orthogonal)[:, None])
    plain = Scaling(each.orthogonal, each.orthogonal)
    codes = encode(codec, residual, scaling=plain, extra=extra)
    left = residual - decode(codec, codes)
    return found(codes, jnp.sum(x * left, axis=1) - 0.5 * jnp.sum(x * x, axis=1))


def put_slots(
    tree: Tree, slots: Int32[Array, " b"], rows: Int32[Array, " b"], found: SlotCodes
) -> Tree:
    """Write rows into free slots; slots below zero are skipped."""
    packed = tree.packed
    at = jnp.where(slots >= 0, slots, packed.slot_rows.shape[0])
    packed = packed._replace(
        codes=put_code_rows(packed.codes, slots, found.codes),
        slot_rows=packed.slot_rows.at[at].set(rows, mode="drop"),
        usable=packed.usable.at[0, at].set(True, mode="drop"),
    )
    if found.offset is not None:
        packed = packed._replace(
            slot_offset=packed.slot_offset.at[at].set(found.offset, mode="drop"),
        )
    if found.gains is not None:
        level = packed.gains.level.at[at].set(found.gains, mode="drop")
        packed = packed._replace(gains=packed.gains._replace(level=level))
    return tree._replace(packed=packed)


def put_rows(
    store: Store, rows: Int32[Array, " b"], x: Float[Array, "b d"], weights: Scaling | None = None
) -> Store:
    """Write rows for exact scoring, in the type of the store; numbers below zero are skipped.

    int8 rows take the step of :func:`store_rows` for these weights; bfloat16 rows are rounded to
    the nearest, not up or down as lowers the loss.
    """
    at = jnp.where(rows >= 0, rows, store.rows.shape[0])
    scale = store.scale
    if scale is not None:
        step = jnp.max(jnp.abs(x), axis=1) / 127
        step = jnp.where(step >= np.finfo(np.float32).tiny, step, 0)
        exact = x / jnp.where(step > 0, step, jnp.inf)[:, None]
        x = jnp.round(exact)
        # In steps, as everything here.
        parallel, orthogonal = (1.0, 1.0) if weights is None else weights
        cross = jnp.sum(x * exact, axis=1)
        along = cross * cross / jnp.maximum(jnp.sum(exact * exact, axis=1), 1e-30)
        least = orthogonal * jnp.sum(x * x, axis=1) + (parallel - orthogonal) * along
        step = step * jnp.where(least > 0, parallel * cross / jnp.where(least > 0, least, 1), 1)
        scale = scale.at[at].set(step, mode="drop")
    held = None if store.held is None else store.held.at[at].set(True, mode="drop")
    return Store(store.rows.at[at].set(x.astype(store.rows.dtype), mode="drop"), scale, held)
