"""int8 rows packed for a scan: four components of sixteen rows side by side."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows ``int8[n, d]`` as ``uint8[n/16, d/4, 64]``: a pytree with one array leaf.

    Byte ``4 v + c`` of a group is 128 plus component ``c`` of the group, of row ``v`` of the block:
    the four products that one ``vpdpbusd`` lane adds. Padding is 128, a zero component.
    """

    data: Any
    num_rows: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(n, d)`` of the rows."""
        return self.num_rows, self.width


def pack_rows(rows: Any) -> PackedRows:
    """Pack ``int8[n, d]`` rows, d at most 32768, for `dot_top_k`.

    Raises:
      ValueError: not a two-dimensional int8 array, or too wide.

    Example:
      >>> import numpy as np
      >>> rows = np.arange(-3, 3, dtype=np.int8).reshape(3, 2)
      >>> unpack_rows(pack_rows(rows)).tolist()
      [[-3, -2], [-1, 0], [1, 2]]
    """
    rows = jnp.asarray(rows)
    if rows.ndim != 2 or rows.dtype != jnp.int8 or rows.shape[1] > 32768:
        raise ValueError(f"rows must be int8[n, d <= 32768], got {rows.dtype}{list(rows.shape)}")
    return PackedRows(_pack(rows), *rows.shape)


def unpack_rows(packed: PackedRows) -> jax.Array:
    """Give back the ``int8[n, d]`` rows; the inverse of `pack_rows`."""
    blocks, groups = packed.data.shape[:2]
    signed = jax.lax.bitcast_convert_type(packed.data ^ jnp.uint8(128), jnp.int8)
    rows = signed.reshape(blocks, groups, 16, 4).transpose(0, 2, 1, 3)
    return rows.reshape(blocks * 16, groups * 4)[: packed.num_rows, : packed.width]


@functools.partial(jax.jit)
def _pack(rows: jax.Array) -> jax.Array:
    n, d = rows.shape
    blocks, groups = -(-n // 16), -(-d // 4)
    rows = jnp.pad(rows, ((0, blocks * 16 - n), (0, groups * 4 - d)))
    packed = rows.reshape(blocks, 16, groups, 4).transpose(0, 2, 1, 3)
    # Adding 128 is flipping the sign bit.
    return jax.lax.bitcast_convert_type(packed, jnp.uint8).reshape(blocks, groups, 64) ^ jnp.uint8(
        128
    )
