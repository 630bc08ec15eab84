"""Rows from whatever a user holds, a chunk at a time: maps, data sets, functions of iterators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from avq_jax.checks import as_rows
from avq_jax.loss import row_norms
from avq_jax.progress import steps
from avq_jax.quantization.codebook import check_magnitude

__all__ = ["checked_rows", "row_chunks", "rows_and_norms", "sample_rows", "source_shape"]


def source_shape(source: Any) -> tuple[int, int]:
    """Number and width of the rows of a source, which is gone through if it is a function.

    Raises:
      ValueError: no rows, or chunks that are not ``[c, d]`` of one width.
    """
    if not callable(source):
        shape = tuple(source.shape)
        if len(shape) != 2 or not all(shape):
            raise ValueError(f"source must have shape [n, d], n and d at least 1; got {shape}")
        return shape
    n, d = 0, None
    for chunk in source():
        shape = np.shape(chunk)
        if len(shape) != 2 or shape[1] != (d or shape[1]):
            raise ValueError(f"source must give [c, d] arrays of one width; got {shape} after {d}")
        n, d = n + shape[0], shape[1]
    if not n or not d:
        raise ValueError("source must give at least one row; it gives none")
    return n, d


def row_chunks(source: Any, start: int, size: int, n: int, d: int) -> Iterator[np.ndarray]:
    """Rows from ``start`` on, ``size`` at a time."""
    if not callable(source):
        for begin in range(start, n, size):
            yield np.asarray(source[begin : begin + size])
        return
    waiting: list[np.ndarray] = []
    have, skip = 0, start
    for given in source():
        chunk = np.asarray(given)
        dropped = min(skip, len(chunk))
        skip, chunk = skip - dropped, chunk[dropped:]
        while len(chunk):
            taken = chunk[: size - have]
            chunk = chunk[len(taken) :]
            waiting.append(taken)
            have += len(taken)
            if have == size:
                yield np.concatenate(waiting)
                waiting, have = [], 0
    if waiting:
        yield np.concatenate(waiting)


def checked_rows(x: Any, metric: str) -> np.ndarray:
    """Rows in float32 as they are kept, of length 1 for cosine.

    Raises:
      ValueError: rows that are not finite.
    """
    x = np.asarray(as_rows(x, name="source"))
    check_magnitude(x)
    return rows_and_norms(x, metric)[0]


def rows_and_norms(x: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows, of length 1 for cosine, and the norms that their scaling depends on."""
    norms = np.asarray(row_norms(x))
    if metric != "cosine":
        return x, norms
    return x / np.where(norms > 0, norms, 1)[:, None], (norms > 0).astype(np.float32)


def sample_rows(
    key: Array, source: Any, n: int, d: int, size: int, chunk: int, progress: bool | None
) -> np.ndarray:
    """One random row of each of ``size`` equal stretches: sorted, distinct, read once."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    edges = np.arange(size + 1, dtype=np.int64) * n // size
    picked = edges[:-1] + (rng.random(size) * np.diff(edges)).astype(np.int64)
    sample = np.empty((size, d), np.float32)
    bar = iter(steps(-(-n // chunk), "sampling", progress))
    begin = 0
    for x in row_chunks(source, 0, chunk, n, d):
        next(bar, None)
        low, high = np.searchsorted(picked, [begin, begin + len(x)])
        sample[low:high] = x[picked[low:high] - begin]
        begin += len(x)
    return np.asarray(as_rows(sample, name="source"))
