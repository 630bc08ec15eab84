"""Rows in files of common formats, read where they are touched, so that they may exceed memory.

==========================  ====================================================================
``.fvecs .ivecs .bvecs``    TEXMEX: each row an int32 width, then float32, int32 or uint8 values
``.fbin .ibin .u8bin        big-ann-benchmarks: uint32 rows, uint32 width, then all values
.i8bin``
``.npy``                    NumPy matrix
``.hdf5 .h5``               ann-benchmarks; ``part`` names the data set
``.txt .vec``               GloVe or word2vec text: a word and its numbers on each line
==========================  ====================================================================

All numbers are little-endian.
"""

from __future__ import annotations

import math
import os
import pathlib
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from avq_jax.checks import as_count
from avq_jax.evaluation.datasets import read_npy

__all__ = ["BINS", "TEXTS", "VECS", "RowFile", "open_rows"]

VECS: dict[str, np.dtype] = {
    ".fvecs": np.dtype("<f4"),
    ".ivecs": np.dtype("<i4"),
    ".bvecs": np.dtype("u1"),
}
BINS: dict[str, np.dtype] = {
    ".fbin": np.dtype("<f4"),
    ".ibin": np.dtype("<i4"),
    ".u8bin": np.dtype("u1"),
    ".i8bin": np.dtype("i1"),
}
TEXTS = (".txt", ".vec")
_HDF5 = (".hdf5", ".h5")
_NAMED_LINES = 5


class _Source(NamedTuple):
    """An opened file: its shape, dtype and a function that reads rows ``[start, stop)``."""

    shape: tuple[int, int]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]
    close: Callable[[], None] = lambda: None
    words: list[str] | None = None
    malformed: list[tuple[int, str]] | None = None


class RowFile:
    """A matrix of rows in a file; made by :func:`open_rows`.

    Slices give NumPy arrays in the dtype of the file; nothing else is read. ``np.asarray`` reads
    all. It is a context manager, and need not be closed except for HDF5.

    Attributes:
      path: the file.
      shape: (n, d).
      dtype: of the values as stored.
      words: the word of each row of a text file, else ``None``.
      malformed: (line number, reason) of each line of a text file that was skipped.
    """

    ndim = 2

    def __init__(self, path: pathlib.Path, source: _Source) -> None:
        self.path = path
        self.shape = source.shape
        self.dtype = source.dtype
        self.words = source.words
        self.malformed = source.malformed or []
        self._source = source

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: int | slice | np.integer) -> np.ndarray:
        n = len(self)
        if isinstance(which, slice):
            start, stop, step = which.indices(n)
            if step < 1:
                raise ValueError(f"rows must be sliced forwards; got a step of {step}")
            return self._source.read(start, max(start, stop))[::step]
        row = int(which) + (n if which < 0 else 0)
        if not 0 <= row < n:
            raise IndexError(f"row {which} is outside the {n} rows of {str(self.path)!r}")
        return self._source.read(row, row + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"RowFile({str(self.path)!r}, {self.shape[0]} x {self.shape[1]} {self.dtype})"

    def iter_chunks(self, size: int = 65_536) -> Iterator[np.ndarray]:
        """Read all rows in order, a chunk at a time.

        Args:
          size: rows a chunk; the last may have fewer.

        Yields:
          ``[<= size, d]`` in the dtype of the file.

        Raises:
          ValueError: a size below 1, or a damaged row; names the file and the row.
        """
        size = as_count(size, name="size")
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_rows(
    path: str | os.PathLike[str],
    *,
    part: str = "train",
    on_malformed: Literal["raise", "skip"] = "raise",
) -> RowFile:
    """Open a matrix of rows without reading it; the suffix says the format.

    Only text is scanned once, to find its lines and check them all.

    Args:
      path: a file with one of the suffixes in the table of this module.
      part: data set of an HDF5 file: ``"train"``, ``"test"``, ``"neighbors"``, ...
      on_malformed: ``"raise"`` or ``"skip"`` lines of a text file that are not a word and d
        finite numbers; skipped ones are kept in :attr:`RowFile.malformed`.

    Returns:
      :class:`RowFile`.

    Raises:
      FileNotFoundError: no such file.
      ImportError: HDF5 without h5py.
      ValueError: an unknown suffix, a size that does not match the header, malformed lines; names
        the file, and lines by number.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".u8bin") as file:
    ...     _ = file.write(bytes([2, 0, 0, 0, 3, 0, 0, 0]) + b"abcdef")
    ...     file.flush()
    ...     open_rows(file.name)[1].tolist()
    [100, 101, 102]
    """
    file = pathlib.Path(path)
    suffix = file.suffix.lower()
    if on_malformed not in ("raise", "skip"):
        raise ValueError(f"on_malformed must be 'raise' or 'skip'; got {on_malformed!r}")
    known = (*VECS, *BINS, ".npy", *_HDF5, *TEXTS)
    if suffix not in known:
        raise ValueError(f"path must end in one of {', '.join(known)}; got {str(file)!r}")
    if not file.is_file():
        raise FileNotFoundError(f"no data at {str(file)!r}")
    if suffix in VECS:
        source = _open_vecs(file, VECS[suffix])
    elif suffix in BINS:
        source = _open_bin(file, BINS[suffix])
    elif suffix == ".npy":
        rows = read_npy(file, memory_map=True)
        source = _Source(rows.shape, rows.dtype, lambda a, b: np.asarray(rows[a:b]))
    elif suffix in _HDF5:
        source = _open_hdf5(file, part)
    else:
        source = _open_text(file, skip=on_malformed == "skip")
    return RowFile(file, source)


def _open_vecs(file: pathlib.Path, dtype: np.dtype) -> _Source:
    size = file.stat().st_size
    with open(file, "rb") as content:
        d = int.from_bytes(content.read(4), "little", signed=True)
    if size < 4 or d < 1:
        raise ValueError(
            f"{str(file)!r} must start with a row width of at least 1; "
            f"got {d if size >= 4 else f'{size} bytes'}"
        )
    stride = 4 + d * dtype.itemsize
    if size % stride:
        raise ValueError(
            f"{str(file)!r} must hold whole rows of {stride} bytes (width {d}); got {size} bytes, "
            f"{size % stride} too many: cut short, or of another format"
        )
    raw = np.memmap(file, np.uint8, mode="r", shape=(size // stride, stride))

    def read(start: int, stop: int) -> np.ndarray:
        rows = np.asarray(raw[start:stop])
        widths = np.ascontiguousarray(rows[:, :4]).view("<i4")[:, 0]
        if (widths != d).any():
            bad = int(np.argmax(widths != d))
            raise ValueError(
                f"{str(file)!r} must have rows of one width, {d}; got {widths[bad]} at row "
                f"{start + bad}"
            )
        return np.ascontiguousarray(rows[:, 4:]).view(dtype)

    read(0, 1)
    read(len(raw) - 1, len(raw))
    return _Source((len(raw), d), dtype, read)


def _open_bin(file: pathlib.Path, dtype: np.dtype) -> _Source:
    size = file.stat().st_size
    with open(file, "rb") as content:
        head = content.read(8)
    if len(head) < 8:
        raise ValueError(f"{str(file)!r} must start with 8 bytes of sizes; got {size} bytes")
    n, d = (int.from_bytes(part, "little") for part in (head[:4], head[4:]))
    needed = 8 + n * d * dtype.itemsize
    if not d or size != needed:
        raise ValueError(
            f"{str(file)!r} declares {n} rows of width {d} of {dtype.name}, which take {needed} "
            f"bytes; got {size}"
        )
    if not n:
        return _Source((0, d), dtype, lambda a, b: np.empty((0, d), dtype))
    rows = np.memmap(file, dtype, mode="r", offset=8, shape=(n, d))
    return _Source((n, d), dtype, lambda a, b: np.asarray(rows[a:b]))


def _open_hdf5(file: pathlib.Path, part: str) -> _Source:
    try:
        import h5py
    except ImportError as error:
        raise ImportError('reading HDF5 needs h5py: pip install "avq-jax[data]"') from error
    try:
        content = h5py.File(file, "r")
    except OSError as error:
        raise ValueError(f"{str(file)!r} is not a readable HDF5 file: {error}") from error
    rows = content.get(part)
    if not isinstance(rows, h5py.Dataset) or rows.ndim != 2 or rows.dtype.kind not in "fiu":
        names = ", ".join(sorted(content)) or "nothing"
        content.close()
        raise ValueError(f"{str(file)!r} must hold a matrix of numbers {part!r}; it has {names}")

    def read(start: int, stop: int) -> np.ndarray:
        try:
            return rows[start:stop]
        except OSError as error:
            raise ValueError(f"{str(file)!r}: {part!r} cannot be read: {error}") from error

    return _Source(rows.shape, rows.dtype, read, content.close)


def _open_text(file: pathlib.Path, *, skip: bool) -> _Source:
    starts, words = array("q"), []
    malformed: list[tuple[int, str]] = []
    d, declared, at = 0, None, 0
    with open(file, "rb") as content:
        for number, line in enumerate(content, 1):
            fields = line.rstrip(b" \r\n").split(b" ")
            if number == 1:
                if len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit():
                    declared, d = int(fields[0]), int(fields[1])
                    at += len(line)
                    continue
                d = len(fields) - 1
            found = _parse(fields, d)
            if isinstance(found, str):
                malformed.append((number, found))
            else:
                starts.append(at)
                words.append(found[0])
            at += len(line)
    if malformed and not skip:
        first = "; ".join(f"line {number}: {why}" for number, why in malformed[:_NAMED_LINES])
        more = len(malformed) - _NAMED_LINES
        raise ValueError(
            f"{str(file)!r} must have a word and {d} finite numbers on each line; "
            f"{len(malformed)} lines do not: {first}{f'; and {more} more' if more > 0 else ''}"
        )
    if not words or d < 1:
        raise ValueError(f"{str(file)!r} must hold at least one line of a word and numbers")
    if declared is not None and declared != len(words) + len(malformed):
        raise ValueError(
            f"{str(file)!r} declares {declared} rows on its first line; got "
            f"{len(words) + len(malformed)}"
        )

    def read(start: int, stop: int) -> np.ndarray:
        rows = np.empty((stop - start, d), np.float32)
        with open(file, "rb") as content:
            for row in range(start, stop):
                content.seek(starts[row])
                found = _parse(content.readline().rstrip(b" \r\n").split(b" "), d)
                if isinstance(found, str):
                    raise ValueError(f"{str(file)!r} changed since it was opened, at row {row}")
                rows[row - start] = found[1]
        return rows

    dtype = np.dtype(np.float32)
    return _Source((len(words), d), dtype, read, words=words, malformed=malformed)


def _parse(fields: list[bytes], d: int) -> tuple[str, np.ndarray] | str:
    """Read a line as a word and d numbers, or say why it is none."""
    if len(fields) < d + 1:
        return f"{len(fields)} fields, fewer than {d + 1}"
    numbers = fields[len(fields) - d :]
    head = fields[: len(fields) - d]
    # A few words of the Common Crawl vectors contain spaces; a number there is one too many.
    if len(head) > 1 and any(map(_is_number, head[1:])):
        return f"{len(fields)} fields, more than {d + 1}"
    try:
        word = b" ".join(head).decode()
        row = np.array([float(field) for field in numbers])
    except UnicodeDecodeError:
        return "the word is not UTF-8"
    except ValueError as error:
        return str(error)
    if not word:
        return "no word"
    if any(b"_" in field for field in numbers):
        return "an underscore in a number"
    if not np.isfinite(row).all() or np.abs(row).max(initial=0) > np.finfo(np.float32).max:
        return "a number that is not a finite float32"
    return word, row


def _is_number(field: bytes) -> bool:
    try:
        return math.isfinite(float(field))
    except ValueError:
        return False
