"""The rescoring store: the rows themselves, in the precision that memory allows."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

__all__ = ["Store", "StoreType", "check_store_type", "rough_scores", "store_rows"]

StoreType = Literal["float32", "bfloat16", "int8"]

# Rows rounded at once, so that the peak stays near one copy of the data.
_CHUNK = 1 << 14


class Store(NamedTuple):
    """Rows for exact scoring.

    Attributes:
      rows: ``[n, d]`` float32 (scores exact), bfloat16 or int8 (scores nearly so).
      scale: ``float32[n]`` step of the int8 rows, else ``None``.
      held: ``bool[n]``, false for row numbers that no row holds; ``None`` where all are held, or
        where a tree says so.
    """

    rows: Array
    scale: Float[Array, " n"] | None = None
    held: Bool[Array, " n"] | None = None


def check_store_type(kind: Any) -> None:
    """Raise unless ``kind`` is a storage type, or ``None`` for no store.

    Raises:
      ValueError: an unknown kind.

    >>> check_store_type("int8")
    """
    if kind is not None and kind not in get_args(StoreType):
        raise ValueError(f"rescore_dtype must be 'float32', 'bfloat16' or 'int8'; got {kind!r}")


def store_rows(x: Any, kind: StoreType) -> Store:
    """Keep rows in float32, bfloat16 or int8 (one step a row, largest value 127 steps).

    The store never shares memory with ``x``.

    Raises:
      ValueError: an unknown kind.

    >>> store_rows(np.array([[1.0, -0.5]], np.float32), "int8").rows.tolist()
    [[127, -64]]
    """
    check_store_type(kind)
    if kind == "float32":
        return Store(_in_large_pages(np.asarray(x, np.float32)))
    if kind == "bfloat16":
        return Store(jnp.asarray(x).astype(jnp.bfloat16))
    x = np.asarray(x)
    rows, scale = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
    for start in range(0, x.shape[0], _CHUNK):
        part = x[start : start + _CHUNK]
        step = np.abs(part).max(axis=1, initial=0) / np.float32(127)
        # Below the smallest normal number a step has no digits left.
        step = np.where(step >= np.finfo(np.float32).tiny, step, 0).astype(np.float32)
        rows[start : start + _CHUNK] = np.rint(part / np.where(step > 0, step, np.inf)[:, None])
        scale[start : start + _CHUNK] = step
    return Store(jnp.asarray(rows), jnp.asarray(scale))


def _in_large_pages(x: np.ndarray) -> jax.Array:
    """A copy in memory that NumPy asks large pages for, where rows picked at random miss less.

    It begins at a multiple of 64 bytes, so that a CPU device uses it in place.
    """
    buffer = np.empty(x.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    own = buffer[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    own[...] = x
    return jax.device_put(own)


def rough_scores(store: Store, queries: Float[Array, "b d"], *, metric: str) -> Float[Array, "b n"]:
    """Scores of all rows as one matrix product, to select by: ``<q, x>``, or an order-equal of L2.

    L2 ranks by ``<q - c, x - c> - ||x - c||^2 / 2`` about the mean row c, which loses no digits
    to a common offset of the rows.
    """
    x = store.rows.astype(jnp.float32)
    if store.scale is not None:
        x = x * store.scale[:, None]
    half = jnp.zeros(x.shape[0], jnp.float32)
    if metric == "l2":
        center = jnp.mean(x, axis=0, keepdims=True)
        x, queries = x - center, queries - center
        half = 0.5 * jnp.sum(x * x, axis=1)
    return jnp.matmul(queries, x.T, precision=jax.lax.Precision.HIGHEST) - half[None, :]
