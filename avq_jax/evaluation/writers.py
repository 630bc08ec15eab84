"""Rows to files of common formats, a chunk at a time; a file appears only when it is whole."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from avq_jax.evaluation.readers import BINS, VECS
from avq_jax.mips.safe_files import locked_folder, replacing

__all__ = ["WRITABLE", "write_rows"]

WRITABLE = (*VECS, *BINS, ".npy")


def write_rows(
    path: str | os.PathLike[str],
    chunks: Iterable[Any],
    *,
    shape: tuple[int, int],
    dtype: Any = None,
) -> None:
    """Write rows in the format that the suffix names, see :mod:`avq_jax.evaluation.readers`.

    Values are never changed silently: one that the dtype of the format cannot hold (beyond its
    range, a fraction in an integer format) raises, except that float64 is rounded to float32.

    Args:
      path: a file ending in ``.npy``, ``.fvecs``, ``.ivecs``, ``.bvecs``, ``.fbin``, ``.ibin``,
        ``.u8bin`` or ``.i8bin``; one that exists is replaced once the new one is whole.
      chunks: arrays ``[c, d]`` whose rows add up to n.
      shape: (n, d).
      dtype: of a ``.npy`` file; ``None`` takes that of the first chunk.

    Raises:
      ValueError: an unknown suffix, a chunk of another width, a wrong number of rows, a value
        that does not fit; names the file and the row.

    >>> import tempfile
    >>> from avq_jax.evaluation.readers import open_rows
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_rows(folder + "/a.bvecs", [[[1.0, 2.0]], [[3.0, 4.0]]], shape=(2, 2))
    ...     open_rows(folder + "/a.bvecs")[:].tolist()
    [[1, 2], [3, 4]]
    """
    file = pathlib.Path(path)
    suffix = file.suffix.lower()
    if suffix not in WRITABLE:
        raise ValueError(f"path must end in one of {', '.join(WRITABLE)}; got {str(file)!r}")
    n, d = shape
    if suffix in BINS and max(n, d) >= 2**32:
        raise ValueError(f"{suffix} holds sizes below 2^32; got shape {shape}")
    fixed = {**VECS, **BINS}.get(suffix, None if dtype is None else np.dtype(dtype))
    done = 0
    with locked_folder(file.parent), replacing(file) as out:
        for given in chunks:
            chunk = np.asarray(given)
            if chunk.ndim != 2 or chunk.shape[1] != d:
                raise ValueError(f"chunks must have {d} columns; got shape {chunk.shape}")
            if fixed is None:
                fixed = chunk.dtype
            if not done:
                _write_head(out, suffix, n, d, fixed)
            rows = _convert(chunk, fixed, done, str(file))
            if suffix in VECS:
                width = np.full((len(rows), 1), d, "<i4").view(np.uint8)
                out.write(np.hstack([width, rows.view(np.uint8).reshape(len(rows), -1)]).data)
            else:
                out.write(rows.tobytes())
            done += len(rows)
        if done != n:
            raise ValueError(f"chunks must hold {n} rows in all; got {done}")
        if not n:
            _write_head(out, suffix, n, d, fixed or np.dtype(np.float32))


def _write_head(out: BinaryIO, suffix: str, n: int, d: int, dtype: np.dtype) -> None:
    if suffix in BINS:
        out.write(n.to_bytes(4, "little") + d.to_bytes(4, "little"))
    elif suffix == ".npy":
        np.lib.format.write_array_header_1_0(
            out,
            {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": (n, d),
            },
        )


def _convert(chunk: np.ndarray, dtype: np.dtype, first: int, where: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.ascontiguousarray(chunk, dtype=dtype)
    if chunk.dtype == dtype:
        return rows
    if dtype.kind == "f":
        wrong = np.isinf(rows) & np.isfinite(chunk)
        if chunk.dtype.kind in "iu":
            wrong |= rows.astype(np.float64) != chunk
    else:
        wrong = rows != chunk
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{where} holds {dtype.name}, which cannot be {chunk[row, column]} (row "
            f"{first + row}, column {column})"
        )
    return rows
