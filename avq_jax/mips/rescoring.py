"""The rescoring store: the rows themselves, in the precision that memory allows."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from avq_jax.loss import Scaling

__all__ = ["Store", "StoreType", "check_store_type", "rough_scores", "store_rows"]

StoreType = Literal["float32", "bfloat16", "int8"]

# Rows rounded at once, so that the peak stays near one copy of the data.
_CHUNK = 1 << 14


class Store(NamedTuple):
    """Rows for exact scoring.

    Attributes:
      rows: ``[n, d]`` float32 (scores exact), bfloat16 or int8 (scores nearly so).
      scale: ``float32[n]`` step of the int8 rows, else ``None``; see :func:`store_rows`.
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


def store_rows(x: Any, kind: StoreType, scaling: Scaling | None = None) -> Store:
    r"""Keep rows in float32, bfloat16 or int8.

    An int8 row is z = round(127 x / max |x|) times a step that minimises the loss of Theorem 3.2
    given z, :math:`s = h_\parallel \langle x, z \rangle / (h_\perp \|z\|^2 + (h_\parallel -
    h_\perp) \langle x, z \rangle^2 / \|x\|^2)`: with a large ratio the error is orthogonal to
    the row, at no cost in its length; single roundings up or down on top of that gain nothing.
    bfloat16 has no step, so there each number in turn is rounded up or down as lowers that loss.

    The store never shares memory with ``x``.

    Args:
      x: ``[n, d]``.
      kind: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
      scaling: h_parallel and h_orthogonal of each row; ``None`` minimises the squared error.

    Raises:
      ValueError: an unknown kind.

    >>> import avq_jax
    >>> x = np.array([[1.0, -0.5]], np.float32)
    >>> store = store_rows(x, "int8", avq_jax.Scaling(np.array([1e6]), np.array([1.0])))
    >>> store.rows.tolist()
    [[127, -64]]
    >>> kept = np.float32(store.rows) * store.scale[:, None]
    >>> bool(abs(x[0] @ (x[0] - kept[0])) < 1e-6)
    True

    Reference:
      Guo et al., 2020, Theorem 3.2.
    """
    check_store_type(kind)
    if kind == "float32":
        return Store(_in_large_pages(np.asarray(x, np.float32)))
    x = np.asarray(x)
    if kind == "bfloat16" and scaling is None:
        return Store(jnp.asarray(x).astype(jnp.bfloat16))
    if kind == "bfloat16":
        halves = np.empty(x.shape, jnp.bfloat16)
        for start in range(0, x.shape[0], _CHUNK):
            part = slice(start, start + _CHUNK)
            halves[part] = _shaped(x[part], _some(scaling, part))
        return Store(jnp.asarray(halves))
    rows, scale = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
    for start in range(0, x.shape[0], _CHUNK):
        part = x[start : start + _CHUNK]
        some = slice(start, start + len(part))
        weights = None if scaling is None else _some(scaling, some)
        step = np.abs(part).max(axis=1, initial=0) / np.float32(127)
        # Below the smallest normal number a step has no digits left.
        step = np.where(step >= np.finfo(np.float32).tiny, step, 0).astype(np.float32)
        rounded = np.rint(part / np.where(step > 0, step, np.inf)[:, None])
        rows[some], scale[some] = rounded, _best_step(part, rounded, step, weights)
    return Store(jnp.asarray(rows), jnp.asarray(scale))


def _some(scaling: Any, part: slice) -> Any:
    return jax.tree.map(lambda a: np.asarray(a)[part], scaling)


def _best_step(
    x: np.ndarray, rounded: np.ndarray, step: np.ndarray, scaling: Scaling | None
) -> np.ndarray:
    """The step of least loss for given roundings; the plain one for rows of zeros."""
    unit = np.where(step > 0, step, 1).astype(np.float32)
    x = x / unit[:, None]  # in steps: neither overflows nor underflows
    cross = np.einsum("nd,nd->n", x, rounded, dtype=np.float64)
    square = np.einsum("nd,nd->n", rounded, rounded, dtype=np.float64)
    along = cross * cross / np.maximum(np.einsum("nd,nd->n", x, x, dtype=np.float64), 1e-30)
    parallel, orthogonal = (1.0, 1.0) if scaling is None else scaling
    least = orthogonal * square + (np.asarray(parallel) - orthogonal) * along
    factor = np.where(least > 0, parallel * cross / np.where(least > 0, least, 1), 1)
    return (step * factor).astype(np.float32)


def _shaped(x: np.ndarray, scaling: Scaling) -> np.ndarray:
    """Rows rounded to bfloat16, up or down column after column as lowers the loss of Theorem 3.2.

    bfloat16 is the upper half of float32, so both neighbours of a number differ by one there.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    inner = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    outer = ((bits & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    # The outer neighbour of the largest number is infinite.
    closer = (np.abs(x - inner) <= np.abs(outer - x)) | ~np.isfinite(outer)
    near, other = np.where(closer, inner, outer), np.where(closer, outer, inner)
    unit = np.abs(x).max(axis=1, keepdims=True)
    unit = np.where(unit >= np.finfo(np.float32).tiny, unit, 1)
    # In parts of the largest component: no square overflows.
    u = (x / unit).T
    square = np.maximum(np.sum(u * u, axis=0), 1e-30)
    error = ((x - near) / unit).T.copy()
    swap = ((x - np.where(np.isfinite(other), other, near)) / unit).T
    extra = (scaling.parallel - scaling.orthogonal) / square
    along = np.sum(error * u, axis=0)
    taken = np.zeros(error.shape, bool)
    for j in range(len(error)):
        after = along + (swap[j] - error[j]) * u[j]
        change = scaling.orthogonal * (swap[j] ** 2 - error[j] ** 2)
        taken[j] = change + extra * (after**2 - along**2) < 0
        along = np.where(taken[j], after, along)
    return np.where(taken.T & np.isfinite(other), other, near).astype(jnp.bfloat16)


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
