"""The operands of a tree search, laid out for the scan of this machine."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..layout import PART, PackedCodes, pack_codes, pack_parts, unpack_codes

#: Norm of the longest centroid in 16-bit integers; the query has the same, so sums fit 32 bits.
_INTEGER_NORM = 32000.0
_TILE = 16
# Rows of a leaf whose additive codes are decoded for its spread.
_SAMPLED = 32


class LeafGroups(NamedTuple):
    """Groups of neighbouring leaves, ranked before the leaves; a pytree.

    Attributes:
      vectors: ``float32[G, d]``, groups are ranked by ``<q, vectors[g]>``.
      offset: ``float32[G]`` added to those products; ``[0]`` for none.
      starts: ``int32[G + 1]`` first leaf of each group.
      tiles: the vectors in 16-bit integers, as those of leaves.
      scale: ``float32[]`` of the tiles.
    """

    vectors: Any
    offset: Any
    starts: Any
    tiles: Any
    scale: Any


class SlotGains(NamedTuple):
    """Factors of what the codes of slots stand for; a pytree.

    Attributes:
      level: ``uint8[S]`` number of the factor of each slot.
      levels: ``float32[16 or 256]`` the factors.
    """

    level: Any
    levels: Any


class PackedTree(NamedTuple):
    """Rows in leaves; a pytree. A row of leaf l stands for ``centroids[l] + gain decode(codes)``.

    A slot is a place in a leaf. Leaves fill whole blocks of slots, so that a scan can start at any
    leaf; slots beyond the rows of a leaf are not usable. A row may have slots in several leaves.

    Attributes:
      centroids: ``float32[L, d]``.
      tiles: ``int16[ceil(L / 16), ceil(d / 2), 16, 2]`` the vectors that rank leaves, times
        ``centroid_scale``.
      centroid_scale: ``float32[]``.
      leaf_offset: ``float32[L]`` added to the products that rank leaves; ``[0]`` for none.
      starts: ``int32[L + 1]`` first block of each leaf.
      codewords: ``float32[m, s, k]``, the codewords of a subspace on the last axis. Words of
        s = d columns are of additive codebooks, shorter ones of subspaces side by side.
      codes: `PackedCodes` of the slots.
      slot_offset: ``float32[S]`` term of each slot's score; ``[0]`` for none.
      slot_rows: ``int32[S]`` row in each slot, -1 for none.
      usable: ``bool[1, S]``, false where there is no row.
      ranking: ``float32[L, d]``, leaves are probed by ``<q, ranking[l]>``; ``[0, d]`` where these
        are the centroids.
      spread: ``float32[L]`` deviation of a coordinate of what the codes of a leaf stand for, the
        root of the mean of ``||gain decode(codes)||^2 / d`` over the rows packed.
      groups: `LeafGroups`, or None where all leaves are ranked.
      gains: `SlotGains`, or None where all are 1.
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
    spread: Any
    groups: Any = None
    gains: Any = None

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
    groups: Any = None,
    gains: Any = None,
) -> PackedTree:
    """Pack the leaves of a tree for `tree_search`.

    Args:
      centroids: ``[L, d]``.
      starts: ``int32[L + 1]`` first block of each leaf, of `slots_per_block` slots each.
      slot_rows: ``int32[S]`` row in each slot, -1 for none.
      codewords: ``[m, k, s]`` with s = ceil(d / m) of product codes, s = d of additive ones.
      codes: ``uint8[S, m]`` codes of the slots, or `PackedCodes` of them, or a function that gives
        those of slots ``first`` to ``end``, so that they need not all be in memory at once.
      ranking: ``[L, d]`` vectors whose products with a query rank the leaves, or None for the
        centroids.
      leaf_offset: ``[L]`` added to those products, or None.
      slot_offset: ``[S]`` term of each slot's score, or None.
      groups: ``[G, d]`` vectors that rank groups of leaves and ``int32[G + 1]`` first leaf of each
        group, or None for one level.
      gains: ``uint8[S]`` numbers and the 16 or 256 levels that they count, factors of what the
        codes of slots add to the term of their leaf; None for 1.

    Returns:
      `PackedTree`.

    Raises:
      ValueError: shapes that do not fit together.
    """
    starts, slot_rows = np.asarray(starts, np.int32), np.asarray(slot_rows, np.int32)
    words = np.asarray(codewords, np.float32)
    size, slots = slots_per_block(words.shape[1]), len(slot_rows)
    part = codes if callable(codes) else _parts_of(codes)
    if callable(codes):
        codes = pack_parts(part, (slots, len(words)), num_codewords=words.shape[1])
    elif not isinstance(codes, PackedCodes):
        codes = pack_codes(codes, num_codewords=words.shape[1])
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
    gains = None if gains is None else _gains(gains, slots)
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
        _spread(part, words, starts * size, slot_rows, centroids.shape[1], gains),
        None if groups is None else _groups(groups, centroids.shape, leaf_offset is not None),
        gains,
    )
    return PackedTree(*jax.tree.map(jnp.asarray, operands))


def _gains(gains: Any, slots: int) -> SlotGains:
    level, levels = np.asarray(gains[0]), np.asarray(gains[1], np.float32)
    if level.dtype != np.uint8 or level.shape != (slots,) or levels.shape not in ((16,), (256,)):
        raise ValueError(
            f"gains must be uint8[{slots}] numbers and float32[16 or 256] levels; got "
            f"{level.dtype}{list(level.shape)} and {list(levels.shape)}"
        )
    if level.max(initial=0) >= len(levels):
        raise ValueError(f"gains must be numbers below {len(levels)}; got {level.max()}")
    return SlotGains(level, levels)


def _parts_of(codes: Any) -> Callable[[int, int], np.ndarray]:
    plain = np.asarray(unpack_codes(codes) if isinstance(codes, PackedCodes) else codes)
    return lambda first, end: plain[first:end]


def _spread(
    part: Callable[[int, int], np.ndarray],
    words: np.ndarray,
    starts: np.ndarray,
    slot_rows: np.ndarray,
    dim: int,
    gains: SlotGains | None,
) -> np.ndarray:
    """Deviation of a decoded coordinate, leaf by leaf; leaves without rows take the mean."""
    leaves, slots = len(starts) - 1, int(starts[-1])
    total, count = np.zeros(leaves), np.zeros(leaves, np.int64)
    sizes = np.sum(words.astype(np.float64) ** 2, axis=2)
    for first in range(0, slots, PART):
        end = min(first + PART, slots)
        at = np.arange(first, end)
        held = slot_rows[first:end] >= 0
        leaf = np.searchsorted(starts, at, side="right") - 1
        codes = np.minimum(part(first, end), words.shape[1] - 1)
        if words.shape[2] == dim and len(words) > 1:
            # Words that are not orthogonal have to be added up; some rows of a leaf tell enough.
            held &= at - starts[leaf] < _SAMPLED
            codes = codes[held]
            whole = np.zeros((len(codes), dim))
            for subspace, each in zip(codes.T, words, strict=True):
                whole += each[subspace]
            square = np.sum(whole * whole, axis=1)
        else:
            square = np.zeros(len(codes))
            for subspace, size in zip(codes.T, sizes, strict=True):
                square += size[subspace]
            square = square[held]
        if gains is not None:
            square *= gains.levels.astype(np.float64)[gains.level[first:end][held]] ** 2
        total += np.bincount(leaf[held], square, leaves)
        count += np.bincount(leaf[held], minlength=leaves)
    mean = total.sum() / max(count.sum(), 1)
    each = np.where(count > 0, total / np.maximum(count, 1), mean) / dim
    return _float32(np.sqrt(each))


def _groups(groups: Any, shape: tuple[int, int], offset: bool) -> LeafGroups:
    vectors, starts = np.asarray(groups[0], np.float32), np.asarray(groups[1], np.int32)
    leaves, dim = shape
    if vectors.ndim != 2 or vectors.shape[1] != dim or starts.shape != (len(vectors) + 1,):
        raise ValueError(
            f"groups must be vectors [G, {dim}] and starts [G + 1]; got {vectors.shape} and "
            f"{starts.shape}"
        )
    if not len(vectors) or starts[0] or starts[-1] != leaves or np.any(np.diff(starts) < 0):
        raise ValueError(f"groups must start at leaf 0 and rise to {leaves}, the leaves there are")
    tiles, scale = centroid_tiles(vectors)
    half = -0.5 * np.sum(vectors.astype(np.float64) ** 2, axis=1)
    return LeafGroups(vectors, _float32(half if offset else half[:0]), starts, tiles, scale)


def _float32(x: np.ndarray) -> np.ndarray:
    """Cut to the largest finite numbers, which a damaged file may exceed."""
    most = np.finfo(np.float32).max
    return np.clip(x, -most, most).astype(np.float32)


def slots_per_block(num_codewords: int) -> int:
    """Slots in a block: leaves begin at multiples of it, on every machine.

    Example:
      >>> slots_per_block(16), slots_per_block(256)
      (32, 64)
    """
    return 32 if num_codewords <= 16 else 64
