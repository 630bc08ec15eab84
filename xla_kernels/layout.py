"""Packed codes: the same `uint8[n, m]` codes, laid out for the instruction set that scans them.

Canonical codes have one row a point. A scan wants many points of one subspace side by side, so
codes are packed once, when an index is loaded, into one of five layouts:

``columns``  ``uint8[m, n]``: the points on the last axis, for plain XLA, TPUs and GPUs.
``nibbles``  ``uint4[m, n]``, at most 16 codewords: the same in half the memory, for TPUs.
``dwords``   ``uint8[n/32, m/4, 64]``, at most 16 codewords, for AVX-512 VBMI. A block is 32 points,
             a group 4 subspaces. Byte ``4 v + c`` holds subspace ``c`` of the group, of point
             ``v`` in its low and of point ``16 + v`` in its high nibble: the four codes of a point
             fill one 32-bit lane, where ``vpdpbusd`` sums their table entries.
``lanes``    ``uint8[n/32, m/4, 64]``, at most 16 codewords, for AVX-512BW, AVX2, NEON and portable
             code. Byte ``32 h + v`` holds subspace ``2 h`` (low nibble) and ``2 h + 1`` (high) of
             point ``v``: every 16-byte lane looks up one 16-entry table.
``bytes``    ``uint8[n/64, m, 64]``, up to 256 codewords: one byte a point and subspace.

Blocks are contiguous, so a scan may start at any block; the last block is padded with code 0. A
saved index should hold canonical codes (`unpack_codes`) and pack where it is loaded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import library

#: Rows that `pack_parts` asks for at a time, whole blocks.
PART = 1 << 18
LAYOUTS = ("columns", "nibbles", "dwords", "lanes", "bytes")
#: Those with the points on the last axis, which no compiled kernel of a CPU reads.
POINTS_LAST = ("columns", "nibbles")
_BLOCK = {"dwords": 32, "lanes": 32, "bytes": 64}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedCodes:
    """Codes of ``num_rows`` points in one of the layouts above: a pytree with one array leaf."""

    data: Any
    num_rows: int = dataclasses.field(metadata={"static": True})
    num_subspaces: int = dataclasses.field(metadata={"static": True})
    num_codewords: int = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(n, m)`` of the canonical codes."""
        return self.num_rows, self.num_subspaces


def block_size(layout: str) -> int:
    """Points in a block of a layout (1 for those with the points last, which have no blocks)."""
    return _BLOCK.get(layout, 1)


def native_layout(num_codewords: int) -> str:
    """Return the layout that this machine's CPU scans fastest, for that many codewords."""
    level = library.simd_level()
    if level is None:
        return "columns"
    if num_codewords > 16:
        return "bytes"
    return "dwords" if level == "avx512vbmi" else "lanes"


def default_layout(num_codewords: int) -> str:
    """Return the layout `pack_codes` picks: that of the CPU, or the points last for accelerators.

    Example:
      >>> default_layout(16) in LAYOUTS
      True
    """
    platform = jax.default_backend()
    if platform == "tpu" and num_codewords <= 16:
        return "nibbles"
    return "columns" if platform in ("tpu", "gpu") else native_layout(num_codewords)


def pack_codes(codes: Any, *, num_codewords: int, layout: str | None = None) -> PackedCodes:
    """Pack ``uint8[n, m]`` codes for the fastest scan of this machine.

    Args:
      codes: codes of ``n`` points in ``m`` subspaces, each below ``num_codewords``. A larger code
        is memory safe but scores as an arbitrary codeword; check codes where they are loaded.
      num_codewords: entries of a subspace's table, 1 to 256.
      layout: one of `LAYOUTS`; None picks by the default device (see `available_implementations`).

    Returns:
      `PackedCodes`, accepted wherever codes are.

    Raises:
      ValueError: ``codes`` is not a two-dimensional uint8 array, ``num_codewords`` is out of range,
        or ``layout`` cannot hold so many codewords.

    Example:
      >>> import numpy as np
      >>> codes = np.arange(6, dtype=np.uint8).reshape(3, 2)
      >>> packed = pack_codes(codes, num_codewords=16)
      >>> unpack_codes(packed).tolist()
      [[0, 1], [2, 3], [4, 5]]
    """
    codes = jnp.asarray(codes)
    if codes.ndim != 2 or codes.dtype != jnp.uint8:
        raise ValueError(f"codes must be uint8[n, m], got {codes.dtype}{list(codes.shape)}")
    if not 1 <= num_codewords <= 256:
        raise ValueError(f"num_codewords must be 1 to 256, got {num_codewords}")
    if layout is None:
        layout = default_layout(num_codewords)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if layout in ("nibbles", "dwords", "lanes") and num_codewords > 16:
        raise ValueError(f"layout {layout!r} holds 16 codewords, got num_codewords={num_codewords}")
    n, m = codes.shape
    return PackedCodes(_pack(codes, layout), n, m, num_codewords, layout)


def pack_parts(
    part: Callable[[int, int], np.ndarray], shape: tuple[int, int], *, num_codewords: int
) -> PackedCodes:
    """Pack codes that are there a part at a time, in little more memory than the packed ones take.

    Args:
      part: gives the ``uint8[end - first, m]`` codes of rows ``first`` to ``end``.
      shape: ``(n, m)`` of all codes.
      num_codewords: as of `pack_codes`.

    Returns:
      `PackedCodes`, those of `pack_codes`.

    Example:
      >>> codes = np.arange(6, dtype=np.uint8).reshape(3, 2)
      >>> packed = pack_parts(lambda a, b: codes[a:b], (3, 2), num_codewords=16)
      >>> unpack_codes(packed).tolist()
      [[0, 1], [2, 3], [4, 5]]
    """
    n, m = shape
    layout = default_layout(num_codewords)
    if layout in POINTS_LAST or n <= PART:
        return pack_codes(part(0, n), num_codewords=num_codewords)
    size = block_size(layout)
    wanted = -(-n // size), m if layout == "bytes" else -(-m // 4), 64
    # Aligned, or the device would copy it.
    storage = np.empty(math.prod(wanted) + 64, np.uint8)
    start = -storage.ctypes.data % 64
    data = storage[start : start + math.prod(wanted)].reshape(wanted)
    for first in range(0, n, PART):
        end = min(first + PART, n)
        some = pack_codes(part(first, end), num_codewords=num_codewords, layout=layout)
        if some.shape != (end - first, m):
            raise ValueError(f"part must give codes [{end - first}, {m}], got {list(some.shape)}")
        data[first // size : -(-end // size)] = some.data
    return PackedCodes(jax.device_put(data), n, m, num_codewords, layout)


def unpack_codes(packed: PackedCodes) -> jax.Array:
    """Give back the canonical ``uint8[n, m]`` codes of packed ones; the inverse of `pack_codes`.

    Example:
      >>> import numpy as np
      >>> codes = np.full((5, 3), 7, np.uint8)
      >>> bool((unpack_codes(pack_codes(codes, num_codewords=8)) == codes).all())
      True
    """
    return _unpack(packed.data, packed.num_rows, packed.num_subspaces, packed.layout)


def repack_codes(packed: PackedCodes, layout: str) -> PackedCodes:
    """Move packed codes to another layout."""
    codes = unpack_codes(packed)
    return pack_codes(codes, num_codewords=packed.num_codewords, layout=layout)


def code_columns(codes: jax.Array | PackedCodes) -> jax.Array:
    """Give ``uint8[m, n]`` codes, the points last, of canonical or packed ones."""
    if isinstance(codes, PackedCodes):
        if codes.layout in POINTS_LAST:
            return codes.data.astype(jnp.uint8)
        return unpack_codes(codes).T
    return codes.T


def code_rows(codes: jax.Array | PackedCodes, rows: jax.Array) -> jax.Array:
    """Gather ``uint8[..., m]`` codes of chosen rows (in range) without unpacking the rest."""
    if not isinstance(codes, PackedCodes):
        return codes[rows]
    data, m = codes.data, codes.num_subspaces
    if codes.layout in POINTS_LAST:
        return jnp.moveaxis(data[:, rows], 0, -1).astype(jnp.uint8)
    size = block_size(codes.layout)
    block, point = rows // size, rows % size
    column = np.arange(m)
    block, point = block[..., None], point[..., None]
    spread = (1,) * (rows.ndim) + (m,)
    if codes.layout == "bytes":
        return data[block, column.reshape(spread), point]
    group, within = (column // 4).reshape(spread), (column % 4).reshape(spread)
    if codes.layout == "dwords":
        byte = data[block, group, 4 * (point % 16) + within]
        return jnp.where(point < 16, byte & np.uint8(15), byte >> np.uint8(4))
    byte = data[block, group, 32 * (within // 2) + point]
    return jnp.where(within % 2 == 0, byte & np.uint8(15), byte >> np.uint8(4))


def put_code_rows(packed: PackedCodes, rows: jax.Array, codes: jax.Array) -> PackedCodes:
    """Set ``uint8[b, m]`` codes of chosen rows; the inverse of `code_rows`.

    Args:
      packed: of n points.
      rows: ``int32[b]`` distinct row numbers; negative ones are skipped.
      codes: their codes.

    Returns:
      New `PackedCodes` of the same shape.

    Example:
      >>> import numpy as np
      >>> packed = pack_codes(np.zeros((3, 2), np.uint8), num_codewords=16)
      >>> new = put_code_rows(packed, jnp.array([2, -1]), jnp.array([[7, 8], [9, 9]], jnp.uint8))
      >>> unpack_codes(new).tolist()
      [[0, 0], [0, 0], [7, 8]]
    """
    data, m = packed.data, packed.num_subspaces
    if packed.layout in POINTS_LAST:
        row = jnp.where(rows >= 0, rows, packed.num_rows)
        new = codes.T.astype(data.dtype)
        return dataclasses.replace(packed, data=data.at[:, row].set(new, mode="drop"))
    size = block_size(packed.layout)
    # Beyond the last block nothing is written.
    block = jnp.where(rows >= 0, rows // size, data.shape[0])[:, None]
    point = (rows % size)[:, None]
    column = jnp.arange(m, dtype=rows.dtype)[None, :]
    if packed.layout == "bytes":
        data = data.at[block, column, point].set(codes, mode="drop")
        return dataclasses.replace(packed, data=data)
    within = column % 4
    if packed.layout == "dwords":
        byte, high = 4 * (point % 16) + within, jnp.broadcast_to(point >= 16, codes.shape)
    else:
        byte, high = 32 * (within // 2) + point, jnp.broadcast_to(within % 2 == 1, codes.shape)
    # Two codes share a byte: all low halves are written before any high half is read.
    for half, kept in ((False, 0xF0), (True, 0x0F)):
        at = jnp.where(high == half, block, data.shape[0]), column // 4, byte
        old = data.at[at].get(mode="fill", fill_value=0) & np.uint8(kept)
        new = (codes & np.uint8(15)) << np.uint8(4 if half else 0)
        data = data.at[at].set(old | new, mode="drop")
    return dataclasses.replace(packed, data=data)


@functools.partial(jax.jit, static_argnames=("layout",))
def _pack(codes: jax.Array, layout: str) -> jax.Array:
    n, m = codes.shape
    if layout in POINTS_LAST:
        return codes.T.astype(jnp.uint4 if layout == "nibbles" else jnp.uint8)
    size = block_size(layout)
    blocks = -(-n // size)
    if layout == "bytes":
        codes = jnp.pad(codes, ((0, blocks * size - n), (0, 0)))
        return codes.reshape(blocks, size, m).transpose(0, 2, 1)
    groups = -(-m // 4)
    codes = jnp.pad(codes & np.uint8(15), ((0, blocks * size - n), (0, 4 * groups - m)))
    if layout == "dwords":
        halves = codes.reshape(blocks, 2, 16, groups, 4).transpose(1, 0, 3, 2, 4)
    else:
        halves = codes.reshape(blocks, 32, groups, 2, 2).transpose(4, 0, 2, 3, 1)
    low, high = halves.reshape(2, blocks, groups, 64)
    return low | (high << np.uint8(4))


@functools.partial(jax.jit, static_argnames=("n", "m", "layout"))
def _unpack(data: jax.Array, n: int, m: int, layout: str) -> jax.Array:
    if layout in POINTS_LAST:
        return data.T.astype(jnp.uint8)
    blocks, groups = data.shape[0], data.shape[1]
    if layout == "bytes":
        return data.transpose(0, 2, 1).reshape(blocks * 64, m)[:n]
    halves = jnp.stack([data & np.uint8(15), data >> np.uint8(4)])
    if layout == "dwords":
        codes = halves.reshape(2, blocks, groups, 16, 4).transpose(1, 0, 3, 2, 4)
    else:
        codes = halves.reshape(2, blocks, groups, 2, 32).transpose(1, 4, 2, 3, 0)
    return codes.reshape(blocks * 32, groups * 4)[:n, :m]
