"""The index: a pytree of few arrays that search needs, and what users ask of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int64, UInt32

from avq_jax.mips.projection import project
from avq_jax.quantization import AdditiveCodebook, Codebook, Scaled
from xla_kernels import PackedTree

__all__ = ["BytesPerRow", "Index", "Tree", "user_ids"]


class BytesPerRow(NamedTuple):
    """Bytes of memory a row; the sum is that of all arrays over the number of rows.

    Attributes:
      codes: packed codes of all its copies, with the padding of leaves to whole blocks, and their
        scales, one byte each.
      slots: row numbers, offsets and marks of the places in leaves.
      rows: the stored row and, for int8, its step.
      ids: user id.
      shared: its part of what all rows share, centroids and codewords.
    """

    codes: float
    slots: float
    rows: float
    ids: float
    shared: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self)

    def __repr__(self) -> str:
        parts = zip(self._fields, self, strict=True)
        told = " + ".join(f"{name} {size:.1f}" for name, size in parts if size)
        return f"{self.total:.1f} bytes a row ({told})"


class Tree(NamedTuple):
    """Quantized rows in leaves; a pytree.

    A row of leaf l is approximated by ``centroids[l] + decode(codec, codes)``.

    Attributes:
      packed: what a scan reads, in the layout of this machine; see
        :class:`xla_kernels.PackedTree`.
      projection: ``float32[d, p]`` axes along which rows are quantized and queries scanned, or
        ``None``: the first coordinates, as many as centroids have, of which most trees have all.
      kicks: of the :class:`avq_jax.AdditiveCodebook` that encodes rows to come, or ``None``.
    """

    packed: PackedTree
    projection: Any = None
    kicks: Any = None

    @property
    def width(self) -> int:
        """Dimensions that are scanned, p."""
        return self.packed.centroids.shape[1]

    def scanned(self, x: Any) -> Any:
        """Rows or queries ``[..., d]`` in the dimensions that are scanned, ``[..., p]``."""
        return project(self.projection, self.width, x)

    @property
    def centroids(self) -> Any:
        """``float32[L, d]``."""
        return self.packed.centroids

    @property
    def ranking(self) -> Any:
        """``float32[L, d]``, leaves are probed by ``<q, ranking[l]>``; often not the centroids."""
        return self.packed.ranking if self.packed.ranking.shape[0] else self.packed.centroids

    @property
    def leaf_offset(self) -> Any:
        """``float32[L]`` added to those products, or ``None``."""
        return self.packed.leaf_offset if self.packed.leaf_offset.shape[0] else None

    @property
    def offset(self) -> Any:
        """``float32[S]`` term of the score of each slot (L2 only), or ``None``."""
        return self.packed.slot_offset if self.packed.slot_offset.shape[0] else None

    @property
    def codebook(self) -> Codebook | AdditiveCodebook:
        """Codewords of the residuals."""
        words = self.packed.codewords.transpose(0, 2, 1)
        if words.shape[0] > 1 and words.shape[2] == self.width:
            return AdditiveCodebook(words, self.kicks)
        return Codebook(words, dim=self.width)

    @property
    def codec(self) -> Codebook | AdditiveCodebook | Scaled:
        """The codebook, inside a :class:`avq_jax.Scaled` where rows have a scale."""
        gains = self.packed.gains
        return self.codebook if gains is None else Scaled(self.codebook, gains.levels)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tree", "store", "ids", "weight"],
    meta_fields=["metric", "num_rows", "dim", "leaves_to_search"],
)
@dataclasses.dataclass(frozen=True)
class Index:
    """A searchable set of rows; a pytree, so it passes through ``jit`` as an argument.

    Made by :func:`avq_jax.build`. Small sets have no ``tree`` and are searched exactly.

    >>> import avq_jax, jax, numpy as np
    >>> avq_jax.build(jax.random.key(0), np.eye(40))
    Index(40 rows x 40, dot, exact scoring of float32 rows)

    Attributes:
      tree: the quantized rows, or ``None`` where all rows are scored exactly.
      store: the rows for exact scoring, or ``None`` if dropped.
      ids: ``uint32[n, 2]`` high and low words of the user's int64 ids, or ``None``.
      weight: the weight of the score-aware loss the codes were learned under.
      metric: ``"dot"``, ``"cosine"`` or ``"l2"``.
      num_rows: n.
      dim: d.
      leaves_to_search: default of :func:`avq_jax.search`.
    """

    tree: Any
    store: Any
    ids: Any
    weight: Any
    metric: str
    num_rows: int
    dim: int
    leaves_to_search: int

    @property
    def num_leaves(self) -> int:
        """Leaves of the tree; 0 without one."""
        return 0 if self.tree is None else self.tree.centroids.shape[0]

    @property
    def code_bytes(self) -> float:
        """Bytes of a row's codes, at log2(k) bits each, and scale, without the rescoring row."""
        if self.tree is None:
            return 0.0
        return self.tree.codec.bits / 8 + (0 if self.tree.offset is None else 4)

    @property
    def bytes_per_row(self) -> BytesPerRow:
        """Memory of a row, by what it is spent on."""
        n = max(self.num_rows, 1)

        def each(*arrays: Any) -> float:
            return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) / n

        if self.tree is None:
            return BytesPerRow(0.0, 0.0, each(self.store), each(self.ids), 0.0)
        packed, rest = self.tree.packed, self.tree[1:]
        slots = (packed.slot_rows, packed.usable, packed.slot_offset)
        scales = None if packed.gains is None else packed.gains.level
        codes, places = each(packed.codes, scales), each(*slots)
        return BytesPerRow(
            codes,
            places,
            each(self.store),
            each(self.ids),
            each(packed, rest) - codes - places,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays as they lie in memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self) if hasattr(leaf, "nbytes"))

    def __repr__(self) -> str:
        kept = "none" if self.store is None else str(self.store.rows.dtype)
        head = f"Index({self.num_rows} rows x {self.dim}, {self.metric}"
        if self.tree is None:
            return f"{head}, exact scoring of {kept} rows)"
        book = self.tree.codebook
        kind = "first" if self.tree.projection is None else "principal"
        scanned = "" if self.tree.width == self.dim else f", {self.tree.width} {kind} dimensions"
        codes = "codes" if isinstance(book, Codebook) else "additive codes"
        gains, groups = self.tree.packed.gains, self.tree.packed.groups
        scale = "" if gains is None else f", a scale of {len(gains.levels).bit_length() - 1} bits"
        upper = "" if groups is None else f" in {groups.vectors.shape[0]} groups"
        return (
            f"{head}{scanned}, {self.num_leaves} leaves{upper} of which {self.leaves_to_search} "
            "are searched, "
            f"{codes} {book.num_subspaces} x {book.num_codewords}{scale} "
            f"({self.code_bytes:g} bytes a row) under {_printable(self.weight)}, "
            f"rescoring rows {kept})"
        )


def _printable(weight: Any) -> Any:
    leaves, structure = jax.tree.flatten(weight)
    if any(isinstance(leaf, jax.core.Tracer) or np.ndim(leaf) for leaf in leaves):
        return weight
    return jax.tree.unflatten(structure, [float(f"{float(leaf):.6g}") for leaf in leaves])


def pack_ids(ids: Any, n: int) -> UInt32[np.ndarray, "n 2"]:
    """User ids as two 32-bit words; JAX would cut a 64-bit leaf to 32 bits without a word.

    Raises:
      TypeError: ids that are not integers.
      ValueError: a wrong number of ids, a negative or a repeated one.

    >>> pack_ids([2**40 + 5], 1).tolist()
    [[256, 5]]
    """
    values = np.asarray(ids)
    if values.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers; got dtype {values.dtype}")
    if values.shape != (n,):
        raise ValueError(f"ids must have shape ({n},), one for each row; got {values.shape}")
    if values.dtype.kind == "u" and n and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"ids must fit int64; got {values.max()}")
    values = values.astype(np.int64)
    if n and values.min() < 0:
        row = int(np.argmax(values < 0))
        raise ValueError(f"ids must be >= 0; got {values[row]} at row {row}")
    unique, first, count = np.unique(values, return_index=True, return_counts=True)
    if len(unique) < n:
        twice = int(np.argmax(count > 1))
        raise ValueError(
            f"ids must be distinct; {unique[twice]} comes {count[twice]} times, first at row "
            f"{first[twice]}"
        )
    return np.stack([values >> 32, values & 0xFFFFFFFF], axis=1).astype(np.uint32)


def user_ids(index: Index, rows: Any) -> Int64[np.ndarray, "*shape"]:
    """Row numbers of a search result as the ids given to ``build``.

    Args:
      index: the index searched.
      rows: row numbers of any shape; -1 stays -1.

    Returns:
      ``int64`` NumPy array of the same shape; the row numbers themselves without user ids.

    Raises:
      TypeError: row numbers that are not integers.
      ValueError: a row number beyond the index.

    >>> import avq_jax, jax, numpy as np
    >>> x = np.eye(40, dtype=np.float32)
    >>> index = avq_jax.build(jax.random.key(0), x, ids=2**40 + np.arange(40))
    >>> user_ids(index, avq_jax.search(index, x[2], k=1).ids).tolist()
    [1099511627778]
    """
    rows = np.asarray(rows)
    if rows.size == 0:
        return np.zeros(rows.shape, np.int64)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"rows must be integers; got dtype {rows.dtype}")
    if rows.min() < -1 or rows.max() >= index.num_rows:
        wrong = rows.min() if rows.min() < -1 else rows.max()
        raise ValueError(f"rows must be -1 or from 0 to {index.num_rows - 1}; got {wrong}")
    if index.ids is None:
        return rows.astype(np.int64)
    words = np.asarray(index.ids).astype(np.int64)
    found = (words[:, 0] << 32) | words[:, 1]
    return np.where(rows < 0, np.int64(-1), found[np.maximum(rows, 0)])
