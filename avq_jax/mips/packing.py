"""Rows of codes to the blocks that a scan reads, and back: files keep rows, memory keeps blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avq_jax.mips.index import Tree
from avq_jax.mips.partition import BLOCK, Layout, lay_out
from avq_jax.quantization import Codebook

__all__ = ["CodedRows", "coded_rows", "pack_tree"]

# Blocks handled at once, so that the peak stays near one copy of the codes.
_BLOCKS = 1 << 14


class CodedRows(NamedTuple):
    """What a tree knows of each row, in row order, free of any memory layout.

    Attributes:
      leaves: ``int32[n]`` leaf of each row.
      codes: ``uint8[n, m]``.
      offset: ``float32[n]`` term of each row, or ``None``.
    """

    leaves: np.ndarray
    codes: np.ndarray
    offset: np.ndarray | None


def pack_tree(
    centroids: Float[Array, "L d"],
    leaves: np.ndarray,
    codebook: Codebook,
    codes: np.ndarray,
    offset: Any = None,
    *,
    leaf_offset: Any = None,
) -> Tree:
    """Lay coded rows out by leaf, in blocks.

    Args:
      centroids: ``[L, d]``.
      leaves: ``int32[n]`` leaf of each row, below L.
      codebook: of the residuals.
      codes: ``uint8[n, m]`` in row order.
      offset: ``float32[n]`` term of each row (L2), or ``None``.
      leaf_offset: ``float32[L]``; ``None`` makes it from the centroids where there are offsets.

    Returns:
      The :class:`Tree`; :func:`coded_rows` gives the arguments back.
    """
    layout = lay_out(leaves, num_leaves=centroids.shape[0])
    slots = np.asarray(layout.slots)
    at = np.maximum(slots, 0).reshape(-1, BLOCK)
    blocked = np.empty((at.shape[0], codes.shape[1], BLOCK), np.uint8)
    for start in range(0, at.shape[0], _BLOCKS):
        part = slice(start, start + _BLOCKS)
        blocked[part] = codes[at[part]].transpose(0, 2, 1)
    if offset is not None:
        if leaf_offset is None:
            leaf_offset = -0.5 * jnp.sum(centroids * centroids, axis=1)
        offset = jnp.asarray(np.where(slots >= 0, offset[np.maximum(slots, 0)], 0))
        offset = offset.reshape(-1, BLOCK)
    return Tree(
        centroids=centroids,
        leaf_offset=leaf_offset,
        layout=Layout(jnp.asarray(slots), jnp.asarray(layout.starts)),
        codebook=codebook,
        codes=jnp.asarray(blocked),
        offset=offset,
    )


def coded_rows(tree: Tree, num_rows: int) -> CodedRows:
    """Undo :func:`pack_tree`.

    Args:
      tree: of an index.
      num_rows: n.

    Returns:
      :class:`CodedRows`, bit for bit what was packed.

    Raises:
      ValueError: a row that lies in no leaf.
    """
    slots = np.asarray(tree.layout.slots)
    sizes = np.diff(np.asarray(tree.layout.starts)) * BLOCK
    leaf_of_slot = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    used = slots >= 0
    leaves = np.full(num_rows, -1, np.int32)
    leaves[slots[used]] = leaf_of_slot[used]
    if num_rows and leaves.min() < 0:
        raise ValueError(f"row {int(np.argmin(leaves))} of the index lies in no leaf")
    blocked = np.asarray(tree.codes)
    codes = np.empty((num_rows, blocked.shape[1]), np.uint8)
    for start in range(0, blocked.shape[0], _BLOCKS):
        part = slice(start, start + _BLOCKS)
        rows, keep = slots.reshape(-1, BLOCK)[part].reshape(-1), used.reshape(-1, BLOCK)[part]
        found = blocked[part].transpose(0, 2, 1).reshape(-1, blocked.shape[1])
        codes[rows[keep.reshape(-1)]] = found[keep.reshape(-1)]
    offset = None
    if tree.offset is not None:
        offset = np.empty(num_rows, np.float32)
        offset[slots[used]] = np.asarray(tree.offset).reshape(-1)[used]
    return CodedRows(leaves, codes, offset)
