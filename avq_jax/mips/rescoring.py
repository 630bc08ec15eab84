"""The rescoring store: the rows themselves, in the precision that memory allows."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

__all__ = ["Store", "StoreType", "store_rows", "store_scores"]

StoreType = Literal["float32", "bfloat16", "int8"]


class Store(NamedTuple):
    """Rows for exact scoring.

    Attributes:
      rows: ``[n, d]`` float32 (scores exact), bfloat16 or int8 (scores nearly so).
      scale: ``float32[n]`` step of the int8 rows, else ``None``.
    """

    rows: Array
    scale: Float[Array, " n"] | None = None


def store_rows(x: Any, kind: StoreType) -> Store:
    """Keep rows in float32, bfloat16 or int8 (one step a row, largest value 127 steps).

    Raises:
      ValueError: an unknown kind.

    >>> store_rows(np.array([[1.0, -0.5]], np.float32), "int8").rows.tolist()
    [[127, -64]]
    """
    if kind == "float32":
        return Store(jnp.asarray(x, jnp.float32))
    if kind == "bfloat16":
        return Store(jnp.asarray(x).astype(jnp.bfloat16))
    if kind == "int8":
        x = np.asarray(x)
        step = np.abs(x).max(axis=1, initial=0) / np.float32(127)
        rows = np.rint(x / np.where(step > 0, step, 1)[:, None]).astype(np.int8)
        return Store(jnp.asarray(rows), jnp.asarray(step))
    raise ValueError(f"rescore_dtype must be 'float32', 'bfloat16' or 'int8'; got {kind!r}")


def store_scores(
    store: Store, q: Float[Array, " d"], rows: Int32[Array, " R"], *, metric: str
) -> Float[Array, " R"]:
    """Scores of some rows for a query, one by one: ``<q, x>``, or ``-||q - x||^2`` for L2.

    Args:
      store: the rows.
      q: ``[d]`` query (of unit length for cosine).
      rows: ``int32[R]`` row numbers, all in range.
      metric: ``"dot"``, ``"cosine"`` or ``"l2"``.

    Returns:
      ``float32[R]``.
    """
    x = store.rows[rows].astype(jnp.float32)
    if store.scale is not None:
        x = x * store.scale[rows][:, None]
    if metric == "l2":
        return -jnp.sum((q[None, :] - x) ** 2, axis=1)
    return jnp.matmul(x, q, precision=jax.lax.Precision.HIGHEST)
