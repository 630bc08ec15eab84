"""The state of a build on disk: tensor files that grow, and a journal of how far they are."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from avq_jax.mips import safe_files
from avq_jax.mips.safe_files import Spec

__all__ = ["Journal", "Learned", "Part"]

_STEP = 1 << 24


class Learned(NamedTuple):
    """What a build learns before it encodes; some may be empty."""

    centroids: Any
    ranking: Any
    codewords: Any
    groups: Any
    group_starts: Any
    projection: Any
    levels: Any
    kicks: Any


class Part:
    """A tensor file that grows a chunk at a time, hashed on the way; what a kill left is cut."""

    def __init__(self, path: pathlib.Path, name: str, spec: Spec, done: float) -> None:
        self._spec, self._digest = spec, hashlib.sha256()
        head = safe_files.tensors_header({name: spec})
        size = len(head) + round(spec.nbytes * done)
        self._file: BinaryIO = open(path, "r+b" if done and path.exists() else "w+b")  # noqa: SIM115
        if not done:
            self._file.write(head)
            return
        if os.fstat(self._file.fileno()).st_size < size:
            raise safe_files.IndexFormatError(
                f"{str(path)!r} is shorter than its journal says; remove {str(path.parent)!r}"
            )
        self._file.truncate(size)
        self._file.seek(len(head))
        while part := self._file.read(_STEP):
            self._digest.update(part)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def append(self, array: np.ndarray) -> None:
        """Write the next rows."""
        flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._file.write(memoryview(flat))
        self._digest.update(memoryview(flat))

    def sync(self) -> None:
        """Have what was appended on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def spec(self) -> Spec:
        """Tell what the whole tensor is, its hash included."""
        return self._spec._replace(sha256=self._digest.hexdigest())


class Journal:
    """How far a build is: its arguments, hashes of what was learned, rows written."""

    def __init__(self, path: pathlib.Path, told: str) -> None:
        self._path, self._told = path, told
        self._hashes: dict[str, str] = {}
        self.rows = 0
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return
        if found["arguments"] != told:
            raise ValueError(
                f"path has a build to go on with, of other arguments; remove {str(path.parent)!r} "
                f"or give these: {found['arguments']}"
            )
        self.rows, self._hashes = found["rows"], found["learned"]

    def learned(self, work: pathlib.Path) -> Learned | None:
        """Read what was learned, or ``None`` before that."""
        if not self._hashes:
            return None
        arrays = []
        for name in Learned._fields:
            array = np.load(work / f"{name}.npy", allow_pickle=False)
            if safe_files.spec_of(array).sha256 != self._hashes[name]:
                raise safe_files.IndexFormatError(
                    f"{str(work / name)!r}.npy is damaged; remove {str(work)!r}"
                )
            arrays.append(array)
        return Learned(*arrays)

    def keep(self, work: pathlib.Path, learned: Learned) -> None:
        """Have what was learned on disk."""
        for name, array in learned._asdict().items():
            with safe_files.replacing(work / f"{name}.npy") as file:
                np.save(file, array, allow_pickle=False)
            self._hashes[name] = safe_files.spec_of(array).sha256
        self.write(0)

    def write(self, rows: int) -> None:
        """Have the number of rows written on disk."""
        self.rows = rows
        body = {"arguments": self._told, "learned": self._hashes, "rows": rows}
        with safe_files.replacing(self._path) as file:
            file.write(json.dumps(body).encode())
