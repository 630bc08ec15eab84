"""Load an exported search and run it: this module needs jax, numpy and flatbuffers, nothing else.

A copy of it lies in every export as ``standalone.py``, for machines without avq_jax.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

__all__ = ["ExportError", "Exported", "Found", "load_exported"]

MAGIC = "avq_jax program"
FORMAT_VERSION = 1
HEADER = "header.json"
_MAX_HEADER = 1 << 24
_STEP = 1 << 24


class ExportError(ValueError):
    """Files are not a whole export: damaged, cut short, of another kind or of a newer version."""


class Found(NamedTuple):
    """Scores ``float32[b, k]`` and row numbers ``int32[b, k]``, best first, as NumPy arrays."""

    scores: np.ndarray
    ids: np.ndarray


class Exported:
    """A loaded export: call it with a batch of inputs.

    Attributes:
      header: what the export says of itself, in values of JSON.
      program: the ``jax.export.Exported`` whose ``call(arrays, inputs)`` gives scores and ids, to
        be called in programs of your own.
      arrays: the list of its arrays, on the default device.
    """

    def __init__(
        self,
        header: dict[str, Any],
        program: jax.export.Exported,
        arrays: list[jax.Array],
        ids: np.ndarray | None,
    ) -> None:
        self.header = header
        self.program = program
        self.arrays = arrays
        self._run: Callable = jax.jit(program.call)
        self._ids = ids

    def __call__(self, inputs: Any) -> Found:
        """Search for a batch of inputs (queries, unless the export has an encoder).

        Raises:
          ValueError: another shape than the export takes.
        """
        said = self.header["inputs"]
        inputs = np.asarray(inputs, jnp.dtype(said["dtype"]))
        want = said["shape"]
        fits = inputs.ndim == len(want) and all(
            isinstance(w, str) or w == n for w, n in zip(want, inputs.shape, strict=True)
        )
        if not fits:
            shape = ", ".join(str(n) for n in want)
            raise ValueError(f"inputs must have shape [{shape}]; got {list(inputs.shape)}")
        if inputs.shape[0] == 0:
            empty = (0, self.header["k"])
            return Found(np.empty(empty, np.float32), np.empty(empty, np.int32))
        scores, ids = self._run(self.arrays, inputs)
        return Found(np.asarray(scores), np.asarray(ids))

    def user_ids(self, rows: Any) -> np.ndarray:
        """Row numbers as the int64 ids given to ``build``; -1 stays -1."""
        rows = np.asarray(rows)
        if self._ids is None:
            return rows.astype(np.int64)
        words = self._ids[np.maximum(rows, 0)].astype(np.int64)
        return np.where(rows < 0, np.int64(-1), (words[..., 0] << 32) | words[..., 1])

    def __repr__(self) -> str:
        said = self.header
        shape = ", ".join(str(n) for n in said["inputs"]["shape"])
        return f"Exported([{shape}] -> k = {said['k']}, for {', '.join(said['platforms'])})"


def spell_header(body: dict[str, Any]) -> bytes:
    """Write the one spelling of a header, its own sha256 included."""

    def spell(value: dict[str, Any]) -> bytes:
        return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")

    return spell({**body, "sha256": hashlib.sha256(spell(body)).hexdigest()})


def load_exported(path: str | os.PathLike[str], *, verify: bool = True) -> Exported:
    """Read what :func:`avq_jax.serving.export` wrote.

    Nothing is unpickled and no code of the export is run but its StableHLO program.

    Args:
      path: the directory.
      verify: compare every byte with its sha256.

    Returns:
      :class:`Exported`, a callable from inputs ``[b, ...]`` to ``Found(scores, ids)``. Each new
      batch size is compiled once.

    Raises:
      FileNotFoundError: nothing is there.
      ExportError: not an export, damaged, or of a newer version; names the file.
      RuntimeError: a compiled kernel that the program needs is not here.

    >>> load_exported("/no/such/place")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no export at '/no/such/place'
    """
    place = pathlib.Path(path)
    if not place.exists():
        raise FileNotFoundError(f"no export at {str(place)!r}")
    header = _read_header(place / HEADER)
    _require(header["requires"])
    program = _file(place, header["program"], verify).tobytes()
    raw = _file(place, header["arrays"], verify)
    tensors = {name: _tensor(raw, said, place) for name, said in header["tensors"].items()}
    ids = tensors.pop("ids", None)
    try:
        exported = jax.export.deserialize(bytearray(program))
    except Exception as error:
        raise ExportError(
            f"{str(place)!r}: jax {jax.__version__} cannot read it: {error}"
        ) from None
    arrays = [jax.device_put(tensors[name]) for name in header["arguments"]]
    return Exported(header, exported, arrays, ids)


def _read_header(path: pathlib.Path) -> dict[str, Any]:
    where = repr(str(path))
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_HEADER)
    except FileNotFoundError:
        raise ExportError(f"{where} is missing: no export, or one cut short") from None
    try:
        body = json.loads(text.decode("ascii"))
        if body.get("magic") != MAGIC:
            raise ValueError(f"no magic {MAGIC!r}")
        version = body["format_version"]
        newer = type(version) is int and version > FORMAT_VERSION
        body.pop("sha256")
        whole = newer or spell_header(body) == text
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ExportError(f"{where} is not the header of an export: {error}") from None
    if newer:
        raise ExportError(
            f"{where} has format version {version}, written by avq_jax "
            f"{body.get('library_version')}; this loader reads up to {FORMAT_VERSION}"
        )
    if not whole:
        raise ExportError(f"{where} is damaged: it does not match its sha256")
    return body


def _file(place: pathlib.Path, said: dict[str, Any], verify: bool) -> np.ndarray:
    """Map a file whose size and hash are as the header says."""
    path = place / said["file"]
    try:
        size = path.stat().st_size
    except OSError:
        raise ExportError(f"{str(path)!r} is missing") from None
    if size != said["bytes"]:
        raise ExportError(f"{str(path)!r} is damaged: {size} bytes, {said['bytes']} were written")
    raw: Any = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    # A plain array over the map, which jax uses in place on a CPU.
    raw = np.asarray(raw)
    if verify:
        digest = hashlib.sha256()
        for start in range(0, size, _STEP):
            digest.update(raw[start : start + _STEP])
        if digest.hexdigest() != said["sha256"]:
            raise ExportError(f"{str(path)!r} is damaged: it does not match its sha256")
    return raw


def _tensor(raw: np.ndarray, said: dict[str, Any], place: pathlib.Path) -> np.ndarray:
    dtype, shape = jnp.dtype(said["dtype"]), tuple(said["shape"])
    start, size = said["offset"], math.prod(shape) * dtype.itemsize
    if not 0 <= start <= start + size <= raw.size:
        raise ExportError(f"{str(place)!r} is damaged: a tensor beyond the end of its file")
    return raw[start : start + size].view(dtype).reshape(shape)


def _require(kernels: dict[str, Any] | None) -> None:
    """Raise unless the compiled kernels that the program calls are here; register them."""
    if kernels is None:
        return
    problem = ""
    try:
        library = importlib.import_module("xla_kernels.library")
        problem = library.load().reason
        if not problem and kernels["interface"] != library.ABI:
            problem = f"interface {library.ABI} is installed"
    except ImportError as error:
        problem = str(error)
    if problem:
        raise RuntimeError(
            f"this export needs the compiled kernel {kernels['custom_call']} of xla_kernels "
            f"(interface {kernels['interface']}, exported at SIMD level {kernels['simd_level']}): "
            f"{problem}. Install avq-jax with its kernels, or export without implementation='cpu'"
        )
