"""Rows of codes to the slots that a scan reads, and back: files keep rows, memory keeps slots."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import xla_kernels
from avq_jax.mips.index import Tree
from avq_jax.mips.partition import lay_out
from avq_jax.quantization import AdditiveCodebook, Codebook, Scaled
from xla_kernels import slots_per_block, unpack_codes

__all__ = ["CodedRows", "HalfBytes", "coded_rows", "pack_tree"]

_STEP = 1 << 20


class CodedRows(NamedTuple):
    """What a tree knows of each row, in row order, free of any memory layout.

    With spilling a row lies in c leaves, and every leaf has an axis ``[n, c, ...]`` more.

    Attributes:
      leaves: ``int32[n]`` or ``[n, c]``, leaf of each row.
      codes: ``uint8[n, m]`` or ``[n, c, m]``.
      offset: ``float32[n]`` or ``[n, c]``, term of each row, or ``None``.
      gains: ``uint8[n]`` or ``[n, c]``, numbers of the levels of a :class:`avq_jax.Scaled` codec,
        or ``None``.
    """

    leaves: np.ndarray
    codes: np.ndarray
    offset: np.ndarray | None
    gains: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class HalfBytes:
    """Codes of at most 16 codewords as files hold them, two a byte; unpacked as they are asked for.

    Attributes:
      packed: ``uint8[n, ceil(m / 2)]``, even subspaces in the low halves.
      num_subspaces: m.

    >>> HalfBytes(np.array([[0x21, 0x03]], np.uint8), 3)[np.array([0])].tolist()
    [[1, 2, 3]]
    """

    packed: np.ndarray
    num_subspaces: int

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """``uint8[..., m]`` codes of some rows."""
        packed = self.packed[rows]
        codes = np.empty((*packed.shape[:-1], self.num_subspaces), np.uint8)
        codes[..., 0::2] = packed & 15
        codes[..., 1::2] = packed[..., : self.num_subspaces // 2] >> 4
        return codes

    def largest(self) -> int:
        """Find the largest code."""
        steps = range(0, len(self.packed), _STEP)
        parts = [self.packed[i : i + _STEP] for i in steps]
        return max(
            (int(max((x & 15).max(initial=0), x.max(initial=0) >> 4)) for x in parts), default=0
        )


def pack_tree(
    centroids: Float[Array, "L d"],
    leaves: np.ndarray,
    codec: Codebook | AdditiveCodebook | Scaled,
    codes: np.ndarray | HalfBytes,
    offset: Any = None,
    *,
    gains: Any = None,
    ranking: Any = None,
    leaf_offset: Any = None,
    groups: Any = None,
    projection: Any = None,
) -> Tree:
    """Lay coded rows out by leaf, in blocks.

    Args:
      centroids: ``[L, d]``.
      leaves: ``int32[n]`` or ``[n, c]``, leaf of each row (or of its c copies), below L.
      codec: of the residuals.
      codes: ``uint8[n, m]`` or ``[n, c, m]`` in row order, or :class:`HalfBytes` of n c rows.
      offset: ``float32[n]`` or ``[n, c]``, term of each row (L2), or ``None``.
      gains: ``uint8[n]`` or ``[n, c]`` numbers of the levels of a :class:`avq_jax.Scaled` codec.
      ranking: ``float32[L, d]`` vectors that rank leaves; ``None`` for the centroids.
      leaf_offset: ``float32[L]``; ``None`` makes it from the centroids where there are offsets.
      groups: vectors ``[G, d]`` and first leaves ``[G + 1]`` of groups of leaves, or ``None``.
      projection: of the rows before all this.

    Returns:
      The :class:`Tree`; :func:`coded_rows` gives the arguments back.
    """
    copies = 1 if leaves.ndim == 1 else leaves.shape[1]
    codebook = codec.codec if isinstance(codec, Scaled) else codec
    block = slots_per_block(codebook.num_codewords)
    layout = lay_out(leaves.reshape(-1), num_leaves=centroids.shape[0], block=block)
    entries = np.asarray(layout.slots)
    at = np.maximum(entries, 0)
    if offset is not None:
        if leaf_offset is None:
            leaf_offset = -0.5 * jnp.sum(jnp.asarray(centroids) ** 2, axis=1)
        offset = np.where(entries >= 0, offset.reshape(-1)[at], 0)
    if isinstance(codec, Scaled):
        gains = (np.where(entries >= 0, gains.reshape(-1)[at], np.uint8(0)), codec.levels)
    flat = codes if isinstance(codes, HalfBytes) else codes.reshape(-1, codes.shape[-1])
    packed = xla_kernels.pack_tree(
        centroids,
        layout.starts,
        np.where(entries >= 0, entries // copies, -1),
        codebook.codewords,
        lambda first, end: flat[at[first:end]],
        ranking=ranking,
        leaf_offset=leaf_offset,
        slot_offset=offset,
        groups=groups,
        gains=gains,
    )
    return Tree(packed, projection, getattr(codebook, "kicks", None))


def coded_rows(tree: Tree, num_rows: int) -> CodedRows:
    """Undo :func:`pack_tree`.

    Args:
      tree: of an index.
      num_rows: n.

    Returns:
      :class:`CodedRows`, bit for bit what was packed.

    Raises:
      ValueError: a row that lies in no leaf, or in fewer than others.
    """
    packed = tree.packed
    rows = np.asarray(packed.slot_rows)
    block = slots_per_block(packed.codes.num_codewords)
    sizes = np.diff(np.asarray(packed.starts)) * block
    leaf_of_slot = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    used = np.flatnonzero(rows >= 0)
    copies = max(1, -(-len(used) // max(num_rows, 1)))
    present = np.bincount(rows[used], minlength=num_rows)
    if num_rows and (present != copies).any():
        row = int(np.argmax(present != copies))
        raise ValueError(
            f"row {row} of the index lies in {present[row]} leaves, not {copies}; an index that "
            "rows were added to or removed from must be made compact first (avq_jax.compact)"
        )
    # By row; the copies of a row by leaf, which is how slots lie.
    order = used[np.argsort(rows[used], kind="stable")]
    shape = (num_rows,) if copies == 1 else (num_rows, copies)
    codes = np.asarray(unpack_codes(packed.codes))[order].reshape(
        *shape, packed.codes.num_subspaces
    )
    offset = None
    if tree.offset is not None:
        offset = np.asarray(tree.offset)[order].reshape(shape)
    gains = None
    if packed.gains is not None:
        gains = np.asarray(packed.gains.level)[order].reshape(shape)
    return CodedRows(leaf_of_slot[order].reshape(shape), codes, offset, gains)
