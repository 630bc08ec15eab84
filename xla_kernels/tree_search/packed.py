"""The operands of a tree search, laid out for the scan of this machine."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..layout import PackedCodes, pack_codes

#: Norm of the longest centroid in 16-bit integers; the query has the same, so sums fit 32 bits.
_INTEGER_NORM = 32000.0
_TILE = 16


class PackedTree(NamedTuple):
    """Rows in leaves; a pytree. A row of leaf l stands for ``centroids[l] + decode(codes)``.

    A slot is a place in a leaf. Leaves fill whole blocks of slots, so that a scan can start at any
    leaf; slots beyond the rows of a leaf are not usable. A row may have slots in several leaves.

    Attributes:
      centroids: ``float32[L, d]``.
      tiles: ``int16[ceil(L / 16), ceil(d / 2), 16, 2]`` the vectors that rank leaves, times
        ``centroid_scale``.
      centroid_scale: ``float32[]``.
      leaf_offset: ``float32[L]`` added to the products that rank leaves; ``[0]`` for none.
      starts: ``int32[L + 1]`` first block of each leaf.
      codewords: ``float32[m, s, k]``, the codewords of a subspace on the last axis.
      codes: `PackedCodes` of the slots.
      slot_offset: ``float32[S]`` term of each slot's score; ``[0]`` for none.
      slot_rows: ``int32[S]`` row in each slot, -1 for none.
      usable: ``bool[1, S]``, false where there is no row.
      ranking: ``float32[L, d]``, leaves are probed by ``<q, ranking[l]>``; ``[0, d]`` where these
        are the centroids.
    """

    centroids: Any
    tiles: Any
    centroid_scale: Any
    leaf_offset: Any
    starts: Any
    codewords: Any
    codes: PackedCodes
    slot_offset: Any
    slot_rows: Any
    usable: Any
    ranking: Any

    @property
    def block(self) -> int:
        """Slots in a block."""
        return slots_per_block(self.codes.num_codewords)


def centroid_tiles(centroids: Any) -> tuple[np.ndarray, np.float32]:
    """Vectors of leaves in 16-bit integers, sixteen leaves by two columns, and their scale.

    Example:
      >>> tiles, scale = centroid_tiles(np.ones((3, 5), np.float32))
      >>> tiles.shape
      (1, 3, 16, 2)
    """
    centroids = np.asarray(centroids, np.float32)
    leaves, dim = centroids.shape
    longest = float(np.sqrt((centroids.astype(np.float64) ** 2).sum(axis=1).max(initial=0)))
    scale = np.float32(_INTEGER_NORM / longest if longest > 0 else 1.0)
    padded = np.zeros((-(-leaves // _TILE) * _TILE, -(-dim // 2) * 2), np.int16)
    padded[:leaves, :dim] = np.rint(centroids * scale)
    tiles = padded.reshape(-1, _TILE, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles), scale


def pack_tree(
    centroids: Any,
    starts: Any,
    slot_rows: Any,
    codewords: Any,
    codes: Any,
    *,
    ranking: Any = None,
    leaf_offset: Any = None,
    slot_offset: Any = None,
) -> PackedTree:
    """Pack the leaves of a tree for `tree_search`.

    Args:
      centroids: ``[L, d]``.
      starts: ``int32[L + 1]`` first block of each leaf, of `slots_per_block` slots each.
      slot_rows: ``int32[S]`` row in each slot, -1 for none.
      codewords: ``[m, k, s]`` with m * s >= d.
      codes: ``uint8[S, m]`` codes of the slots, or `PackedCodes` of them.
      ranking: ``[L, d]`` vectors whose products with a query rank the leaves, or None for the
        centroids.
      leaf_offset: ``[L]`` added to those products, or None.
      slot_offset: ``[S]`` term of each slot's score, or None.

    Returns:
      `PackedTree`.

    Raises:
      ValueError: shapes that do not fit together.
    """
    starts, slot_rows = np.asarray(starts, np.int32), np.asarray(slot_rows, np.int32)
    words = np.asarray(codewords, np.float32)
    if not isinstance(codes, PackedCodes):
        codes = pack_codes(codes, num_codewords=words.shape[1])
    size, slots = slots_per_block(words.shape[1]), len(slot_rows)
    if codes.shape != (slots, words.shape[0]):
        raise ValueError(
            f"codes must be [{slots}, {words.shape[0]}], one row a slot and one column a "
            f"subspace; got {list(codes.shape)}"
        )
    if (
        len(starts) != len(centroids) + 1
        or starts[-1] * size != slots
        or np.any(np.diff(starts) < 0)
    ):
        raise ValueError(
            f"starts must rise to {slots // size}, the number of blocks of {size} slots, over "
            f"{len(centroids)} leaves"
        )
    centroids = np.asarray(centroids, np.float32)
    ranking = centroids[:0] if ranking is None else np.asarray(ranking, np.float32)
    if len(ranking) and ranking.shape != centroids.shape:
        raise ValueError(f"ranking must have shape {centroids.shape}; got {ranking.shape}")
    tiles, scale = centroid_tiles(ranking if len(ranking) else centroids)
    empty = np.zeros(0, np.float32)
    operands = (
        centroids,
        tiles,
        scale,
        empty if leaf_offset is None else np.asarray(leaf_offset, np.float32),
        starts,
        np.ascontiguousarray(words.transpose(0, 2, 1)),
        codes,
        empty if slot_offset is None else np.asarray(slot_offset, np.float32).reshape(-1),
        slot_rows,
        (slot_rows >= 0)[None],
        ranking,
    )
    return PackedTree(*jax.tree.map(jnp.asarray, operands))


def slots_per_block(num_codewords: int) -> int:
    """Slots in a block: leaves begin at multiples of it, on every machine.

    Example:
      >>> slots_per_block(16), slots_per_block(256)
      (32, 64)
    """
    return 32 if num_codewords <= 16 else 64
