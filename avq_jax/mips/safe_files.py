"""Files one can trust: safetensors with a hashed header, replaced atomically, mapped when read.

Nothing here unpickles. Every byte of a file is either hashed or compared with the one spelling it
may have, so a flipped bit anywhere is found; sizes are compared before anything is allocated.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

try:
    import fcntl
except ImportError:  # not a POSIX system: two savers at once are then not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["IndexFormatError", "Spec", "dump_header", "parse_header"]

MAGIC = "avq_jax index"
MAX_HEADER = 1 << 20
_ALIGN = 64  # so that mapped rows can be used by XLA in place
_STEP = 1 << 24
DTYPES: dict[str, Any] = {
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "U32": np.dtype(np.uint32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class IndexFormatError(ValueError):
    """A file is not a whole index: damaged, cut short, of another kind or of a newer version."""


class Spec(NamedTuple):
    """What a header says of a tensor: a safetensors dtype name, the shape, the sha256 in hex."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """Bytes of the data; a Python int, which cannot wrap."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def spec_of(array: np.ndarray) -> Spec:
    """Hash an array."""
    digest = hashlib.sha256()
    for part in _parts(array):
        digest.update(part)
    return Spec(NAMES[array.dtype], array.shape, digest.hexdigest())


def _parts(array: np.ndarray) -> Iterator[memoryview]:
    flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _STEP):
        yield memoryview(flat[start : start + _STEP])


def dump_header(body: Mapping[str, Any]) -> bytes:
    """Write the one spelling of a header, its own sha256 included.

    >>> sorted(json.loads(dump_header({"magic": "x"})))
    ['magic', 'sha256']
    """
    own = {"sha256": hashlib.sha256(spell(dict(body))).hexdigest()}
    return spell({**body, **own})


def spell(body: dict[str, Any]) -> bytes:
    """Values of JSON in the one spelling that headers have."""
    return (json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def parse_header(text: bytes, *, where: str, newest: int) -> dict[str, Any]:
    """Read a header and prove it whole.

    Args:
      text: the bytes of the header.
      where: the file, for messages.
      newest: the newest format version that can be read.

    Returns:
      The header without its own hash.

    Raises:
      IndexFormatError: not a header, a damaged one, or one of a newer version.
    """
    try:
        body = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise IndexFormatError(f"{where} is damaged: its header is not JSON ({error})") from None
    if not isinstance(body, dict) or body.get("magic") != MAGIC:
        raise IndexFormatError(f"{where} is not an index: its header lacks the magic {MAGIC!r}")
    version = body.get("format_version")
    if type(version) is int and version > newest:
        raise IndexFormatError(
            f"{where} has format version {version}, written by avq_jax "
            f"{body.get('library_version')}; this avq_jax reads up to {newest}: upgrade it"
        )
    if type(version) is not int or version < 1:
        raise IndexFormatError(f"{where} is damaged: format version {version!r}")
    body.pop("sha256", None)
    try:
        whole = dump_header(body) == text
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise IndexFormatError(f"{where} is damaged: its header does not match its sha256")
    return body


def tensors_header(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The head of a safetensors file: length, JSON, spaces up to a multiple of 64 bytes."""
    body: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, spec in specs.items():
        end = start + spec.nbytes
        body[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(body, separators=(",", ":")).encode("ascii")
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file under a temporary name, sync it, then move it into place."""
    with replacing(path) as file:
        file.write(tensors_header(specs, metadata))
        for name in specs:
            for part in _parts(arrays[name]):
                file.write(part)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once it is whole and on disk.

    After an error the file that was there is untouched and nothing else is left; after a kill a
    temporary file may stay, which the next save to this place removes. To be used inside
    :func:`locked_folder`.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: pathlib.Path) -> None:
    """Have the names in a folder on disk; systems that cannot are let off."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: pathlib.Path) -> Iterator[None]:
    """Let one saver at a time into a folder; the lock dies with its process and leaves no file."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # file systems without locks
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def read_tensors(
    file: BinaryIO,
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str] | None = None,
    *,
    where: str,
    verify: bool,
    mapped: frozenset[str] = frozenset(),
) -> dict[str, np.ndarray]:
    """Read what :func:`write_tensors` wrote.

    Args:
      file: opened for reading, unbuffered or at its start.
      specs: what must be in it.
      metadata: likewise.
      where: the file, for messages.
      verify: compare hashes; sizes and the safetensors head are compared in any case.
      mapped: tensors left in the file and read page by page when used; others are copied.

    Returns:
      Arrays by name; mapped ones are read-only.

    Raises:
      IndexFormatError: the file differs from what is expected.
    """
    head = tensors_header(specs, metadata)
    size = os.fstat(file.fileno()).st_size
    needed = len(head) + sum(spec.nbytes for spec in specs.values())
    if size != needed:
        kind = "cut short" if size < needed else "too long"
        raise IndexFormatError(f"{where} is {kind}: it needs {needed} bytes, it has {size}")
    file.seek(0)
    if file.read(len(head)) != head:
        raise IndexFormatError(f"{where} is damaged: its safetensors header is not as declared")
    arrays, start = {}, len(head)
    for name, spec in specs.items():
        keep = name not in mapped
        array = np.empty(spec.shape, DTYPES[spec.dtype]) if keep else None
        if keep or verify:
            _read(file, start, spec, array, name=name, where=where, verify=verify)
        arrays[name] = _map(file, start, spec) if array is None else array
        start += spec.nbytes
    return arrays


def _read(
    file: BinaryIO,
    start: int,
    spec: Spec,
    array: np.ndarray | None,
    *,
    name: str,
    where: str,
    verify: bool,
) -> None:
    digest, done = hashlib.sha256(), 0
    raw: Any = None if array is None else array.reshape(-1).view(np.uint8)
    target = None if raw is None else memoryview(raw)
    scratch = memoryview(bytearray(min(spec.nbytes, _STEP))) if target is None else None
    file.seek(start)
    while done < spec.nbytes:
        step = min(_STEP, spec.nbytes - done)
        part = scratch[:step] if target is None else target[done : done + step]  # type: ignore[index]
        count = file.readinto(part)  # type: ignore[attr-defined]
        if not count:
            raise IndexFormatError(f"{where} was cut short while it was read")
        if verify:
            digest.update(part[:count])
        done += count
    if verify and digest.hexdigest() != spec.sha256:
        raise IndexFormatError(f"{where} is damaged: {name!r} does not match its sha256")


def _map(file: BinaryIO, start: int, spec: Spec) -> np.ndarray:
    dtype = DTYPES[spec.dtype]
    if not spec.nbytes:
        return np.empty(spec.shape, dtype)
    # A plain array over the map: JAX does not take np.memmap itself as an argument.
    raw = np.memmap(file, np.uint8, mode="r", offset=start, shape=(spec.nbytes,))
    return np.asarray(raw).view(dtype).reshape(spec.shape)
