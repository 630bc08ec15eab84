"""Indexes on disk: safetensors and a JSON header, hashed, replaced atomically, mapped on load.

A directory has ``header.json`` and one safetensors file a tensor, named by tensor and hash. The
single-file form is one safetensors file with the same header in its metadata under ``avq_jax``.
What they hold is told in :mod:`avq_jax.mips.file_format`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from avq_jax.mips import safe_files
from avq_jax.mips.file_format import (
    FORMAT_VERSION,
    TENSORS,
    arrays_of,
    check_header,
    header_of,
    index_of,
)
from avq_jax.mips.index import Index
from avq_jax.mips.safe_files import MAGIC, MAX_HEADER, IndexFormatError, Spec

__all__ = ["IndexFormatError", "describe", "load", "save"]

_HEADER = "header.json"
_KEY = "avq_jax"
_OURS = re.compile(
    rf"({'|'.join(TENSORS)})-[0-9a-f]{{32}}\.safetensors"
    rf"|{re.escape(_HEADER)}|\..+\.[0-9a-f]{{8}}\.tmp"
)
_MAPPED = frozenset({"rows", "ids"})


def save(index: Index, path: str | os.PathLike[str], *, single_file: bool | None = None) -> None:
    """Write an index so that at any moment the place holds a whole index, the old or the new.

    Arrays are written under names that carry their hash and synced, the header is replaced last,
    then the old arrays are removed; a single file is replaced by a rename. A save that fails or
    is killed leaves the old index as it was.

    Args:
      index: from :func:`avq_jax.build`.
      path: a directory, made if it does not exist (its parent must), or a file.
      single_file: one file or a directory; ``None`` takes one file where ``path`` ends in
        ``.safetensors``.

    Raises:
      TypeError: not an index.
      ValueError: ``path`` is a directory that holds other things than an index, or a file where
        a directory is asked for, or the other way round.
      OSError: no space, no permission, no parent directory.

    >>> import avq_jax, jax, tempfile
    >>> index = avq_jax.build(jax.random.key(0), jax.numpy.eye(40))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     avq_jax.save(index, folder + "/four")
    ...     avq_jax.load(folder + "/four")
    Index(40 rows x 40, dot, exact scoring of float32 rows)
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    place = pathlib.Path(path)
    if single_file is None:
        single_file = place.suffix == ".safetensors"
    if single_file and place.is_dir():
        raise ValueError(f"path must be a file for the single-file form; {str(place)!r} is not")
    if not single_file and place.exists() and not place.is_dir():
        raise ValueError(f"path must be a directory; {str(place)!r} is a file")
    arrays = arrays_of(index)
    specs = {name: safe_files.spec_of(array) for name, array in arrays.items()}
    header = safe_files.dump_header(header_of(index, specs))
    if single_file:
        metadata = {_KEY: header.decode("ascii")}
        with safe_files.locked_folder(place.parent):
            safe_files.write_tensors(place, arrays, specs, metadata)
    else:
        _save_folder(place, arrays, specs, header)


def _save_folder(
    folder: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    specs: Mapping[str, Spec],
    header: bytes,
) -> None:
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    with safe_files.locked_folder(folder):
        before = check_folder(folder)
        names = {_file_name(name, spec) for name, spec in specs.items()}
        try:
            for name, spec in specs.items():
                safe_files.write_tensors(folder / _file_name(name, spec), arrays, {name: spec})
            with safe_files.replacing(folder / _HEADER) as file:
                file.write(header)
        except BaseException:
            if _bytes_of(folder / _HEADER) == header:  # replaced already: the new index stands
                raise
            for new in names - before:
                (folder / new).unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        for old in before - names - {_HEADER}:
            if _OURS.fullmatch(old):
                (folder / old).unlink(missing_ok=True)
    safe_files.sync_folder(folder.parent)


def check_folder(folder: pathlib.Path) -> set[str]:
    """Names in a directory that an index may be written to; empty where there is none.

    Raises:
      ValueError: it holds other things than an index, or is a file.
    """
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise ValueError(f"path must be a directory; {str(folder)!r} is a file")
    names = {entry.name for entry in os.scandir(folder)}
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign and MAGIC.encode() not in _bytes_of(folder / _HEADER):
        raise ValueError(
            f"path must be an index or an empty directory; {str(folder)!r} holds {foreign[0]!r}"
        )
    return names


def install(
    folder: pathlib.Path,
    header: Mapping[str, Any],
    specs: Mapping[str, Spec],
    files: Mapping[str, pathlib.Path],
) -> None:
    """Make an index of tensor files that are written and synced, one a tensor, by links to them.

    Killed at any moment it leaves the old index or the new one, and the files where they were.
    """
    folder.mkdir(exist_ok=True)
    with safe_files.locked_folder(folder):
        before = check_folder(folder)
        names = {_file_name(name, spec) for name, spec in specs.items()}
        for name, spec in specs.items():
            temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
            try:
                os.link(files[name], temporary)
            except OSError:  # a file system without links
                shutil.copyfile(files[name], temporary)
            os.replace(temporary, folder / _file_name(name, spec))
        safe_files.sync_folder(folder)
        with safe_files.replacing(folder / _HEADER) as file:
            file.write(safe_files.dump_header(header))
        for old in before - names - {_HEADER}:
            if _OURS.fullmatch(old):
                (folder / old).unlink(missing_ok=True)
    safe_files.sync_folder(folder.parent)


def _bytes_of(header: pathlib.Path) -> bytes:
    try:
        with open(header, "rb") as file:
            return file.read(MAX_HEADER)
    except OSError:
        return b""


def _file_name(name: str, spec: Spec) -> str:
    return f"{name}-{spec.sha256[:32]}.safetensors"


def load(
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    memory_map: bool = True,
    weight: Any = None,
) -> Index:
    """Read an index that :func:`save` wrote; metric, width and sizes are those of the file.

    Nothing is unpickled. Sizes, shapes and ranges are always checked: a code beyond the codebook
    or a leaf beyond the tree is refused, and no size that a header declares is believed before
    the file is seen to be that long.

    Args:
      path: a directory or a single file.
      verify: compare every byte with its sha256, which reads the file once. Without, damaged
        numbers pass, but none that would reach outside an array.
      memory_map: leave rescoring rows and user ids in the file, read page by page when a search
        touches them (on a CPU device; others copy them). The rest, codes above all, is copied
        into the layout of this processor. The file may be replaced or removed meanwhile, but not
        overwritten or cut short in place.
      weight: the weight of an index saved with a user-defined one; without it the loaded index
        searches, and calling its weight raises.

    Returns:
      :class:`avq_jax.Index`.

    Raises:
      FileNotFoundError: nothing is there.
      IndexFormatError: not an index, damaged, or of a newer version; names the file.
      ValueError: ``weight`` given for an index whose own weight is known.

    >>> load("/no/such/place")
    Traceback (most recent call last):
    ...
    FileNotFoundError: no index at '/no/such/place'
    """
    place = pathlib.Path(path)
    for attempt in range(3):
        try:
            header, arrays = _read(place, verify=verify, memory_map=memory_map)
            break
        except _MissingError as error:  # replaced between the header and an array: read again
            if attempt == 2:
                raise IndexFormatError(str(error)) from None
    return index_of(header, arrays, weight, repr(str(place)))


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tell what a saved index is from its header alone, without reading its arrays.

    Args:
      path: a directory or a single file.

    Returns:
      The header as saved, in values of JSON, with ``form`` ("directory" or "file"), ``bytes`` on
      disk and the bytes of each tensor.

    Raises:
      FileNotFoundError: nothing is there.
      IndexFormatError: not an index, a damaged header or a newer version.

    >>> import avq_jax, jax, tempfile
    >>> index = avq_jax.build(jax.random.key(0), jax.numpy.eye(40))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     avq_jax.save(index, folder + "/four.safetensors")
    ...     describe(folder + "/four.safetensors")["metric"]
    'dot'
    """
    place = pathlib.Path(path)
    header, specs = _read_header(place)
    folder = place.is_dir()
    files = [place / _file_name(*item) for item in specs.items()] + [place / _HEADER]
    try:
        size = sum(os.path.getsize(file) for file in (files if folder else [place]))
    except FileNotFoundError as error:
        raise IndexFormatError(f"{str(error.filename)!r} is missing") from None
    tensors = {
        name: {**header["tensors"][name], "bytes": spec.nbytes} for name, spec in specs.items()
    }
    form = "directory" if folder else "file"
    return {**header, "tensors": tensors, "form": form, "bytes": size}


class _MissingError(Exception):
    pass


def _read_header(place: pathlib.Path) -> tuple[dict[str, Any], dict[str, Spec]]:
    where = repr(str(place))
    try:
        mode = os.stat(place).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"no index at {where}") from None
    if stat.S_ISREG(mode):
        with open(place, "rb") as file:
            return _embedded(file, where)
    if not stat.S_ISDIR(mode):
        raise IndexFormatError(f"{where} is neither a file nor a directory")
    where = repr(str(place / _HEADER))
    try:
        with open(place / _HEADER, "rb") as file:
            text = file.read(MAX_HEADER + 1)
    except FileNotFoundError:
        raise IndexFormatError(f"{where} is missing: no index, or a save cut short") from None
    return _parse(text, where)


def _parse(text: bytes, where: str) -> tuple[dict[str, Any], dict[str, Spec]]:
    if len(text) > MAX_HEADER:
        raise IndexFormatError(f"{where} is damaged: its header exceeds {MAX_HEADER} bytes")
    header = safe_files.parse_header(text, where=where, newest=FORMAT_VERSION)
    return header, check_header(header, where)


def _embedded(file: BinaryIO, where: str) -> tuple[dict[str, Any], dict[str, Spec]]:
    """Take the header out of the metadata of a safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(2 * MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
        raise IndexFormatError(f"{where} is no whole safetensors file: header of {length} bytes")
    try:
        text = json.loads(file.read(length))["__metadata__"][_KEY].encode("ascii")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise IndexFormatError(f"{where} holds no readable header of an index") from None
    return _parse(text, where)


def _read(
    place: pathlib.Path, *, verify: bool, memory_map: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    mapped = _MAPPED if memory_map else frozenset()
    if place.is_file():
        with open(place, "rb") as file:  # opened once: it may be replaced meanwhile
            where = repr(str(place))
            header, specs = _embedded(file, where)
            metadata = {_KEY: safe_files.dump_header(header).decode("ascii")}
            return header, safe_files.read_tensors(
                file, specs, metadata, where=where, verify=verify, mapped=mapped
            )
    header, specs = _read_header(place)
    arrays: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        path = place / _file_name(name, spec)
        try:
            with open(path, "rb") as file:
                arrays |= safe_files.read_tensors(
                    file, {name: spec}, where=repr(str(path)), verify=verify, mapped=mapped
                )
        except FileNotFoundError:
            raise _MissingError(f"{str(path)!r} is missing") from None
    return header, arrays
