"""Indexes of more rows than fit memory: encoded a chunk at a time, straight into their files.

What has been written is told by a journal, so a build that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from avq_jax.checks import as_count, as_rows
from avq_jax.loss import Threshold, Uniform, Weight, row_norms
from avq_jax.mips import safe_files
from avq_jax.mips.build import default_threshold
from avq_jax.mips.exact import METRICS
from avq_jax.mips.file_format import halves, header_of
from avq_jax.mips.index import Index, pack_ids
from avq_jax.mips.io import check_folder, install
from avq_jax.mips.journal import Journal, Learned, Part
from avq_jax.mips.learning import as_pytree, build_tree, encode_leaves, loss_terms, tree_sizes
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.partition import nearest_centroids, spilled_leaves
from avq_jax.mips.rescoring import StoreType, check_store_type, store_rows
from avq_jax.mips.safe_files import Spec
from avq_jax.progress import steps
from avq_jax.quantization import Codebook
from avq_jax.quantization.codebook import check_magnitude

__all__ = ["build_to_disk"]

_TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}


def build_to_disk(
    key: Array,
    source: Any,
    path: str | os.PathLike[str],
    *,
    metric: Literal["dot", "cosine", "l2"] = "dot",
    num_leaves: int | None = None,
    num_subspaces: int | None = None,
    num_codewords: int = 16,
    weight: Weight | None = None,
    ids: Any = None,
    soar_lambda: float | None = None,
    leaves_to_search: int | None = None,
    rescore_dtype: StoreType | None = "float32",
    num_iterations: int = 12,
    sample_size: int = 100_000,
    chunk_rows: int = 65_536,
    progress: bool | None = None,
) -> None:
    """Build an index of rows on disk, into a saved index for :func:`avq_jax.load`.

    Centroids and codebooks are learned from a sample, as ``build`` does; then every chunk of rows
    is read, encoded and appended to the files of the index. Memory does not grow with the rows,
    but for 24 bytes a row where ``ids`` are given: it holds some copies of the sample and of a
    chunk in float32 (825 MB at most, Python and JAX included, were measured for 10^6 x 96 rows
    and the sizes of the defaults). A build that ends early leaves
    ``<path>.partial``; called again with the same arguments it goes on after the last chunk that
    the disk has.

    Args:
      key: a typed key.
      source: rows ``[n, d]`` as ``np.memmap``, ``h5py.Dataset`` or anything else with ``shape``
        and slices; or a function without arguments that gives a new iterator over ``[c, d]``
        arrays each time, which is gone through three times.
      path: a directory, as of :func:`avq_jax.save`.
      metric: as of :func:`avq_jax.build`.
      num_leaves: L; ``None`` takes sqrt(n).
      num_subspaces: as of :func:`avq_jax.build`.
      num_codewords: as of :func:`avq_jax.build`.
      weight: as of :func:`avq_jax.build`.
      ids: as of :func:`avq_jax.build`.
      soar_lambda: as of :func:`avq_jax.build`.
      leaves_to_search: as of :func:`avq_jax.build`.
      rescore_dtype: as of :func:`avq_jax.build`; the rows of a loaded index stay in the file.
      num_iterations: as of :func:`avq_jax.build`.
      sample_size: as of :func:`avq_jax.build`.
      chunk_rows: rows encoded at a time.
      progress: show progress.

    Raises:
      TypeError: sizes or ids that are not integers.
      ValueError: as of ``build``; too few rows to learn codes from; other arguments than those of
        the build to go on with.

    >>> import avq_jax, jax, numpy as np, tempfile
    >>> x = np.asarray(jax.random.normal(jax.random.key(0), (2000, 16)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     build_to_disk(jax.random.key(1), x, folder + "/a", num_leaves=20, chunk_rows=512)
    ...     index = avq_jax.load(folder + "/a")
    >>> index.num_rows, index.num_leaves
    (2000, 20)
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    check_store_type(rescore_dtype)
    as_count(chunk_rows, name="chunk_rows")
    as_count(sample_size, name="sample_size", minimum=256)
    place = pathlib.Path(path)
    n, d = _shape(source)
    sizes = tree_sizes(
        n, d, num_leaves or max(1, round(math.sqrt(n))), num_subspaces, num_codewords
    )
    if sizes is None:
        raise ValueError(f"source has {n} rows, too few to learn codes from; use build")
    leaves, m = sizes
    words = None if ids is None else pack_ids(ids, n)
    weight = None if weight is None else as_pytree(weight)
    told = json.dumps(
        {
            "rows": [n, d], "metric": metric, "sizes": [leaves, m, num_codewords],
            "weight": str(jax.tree.map(float, weight)), "soar_lambda": soar_lambda,
            "rescore_dtype": rescore_dtype, "num_iterations": num_iterations,
            "sample_size": sample_size, "key": np.asarray(jax.random.key_data(key)).tolist(),
        },
        sort_keys=True,
    )  # fmt: skip
    check_folder(place)
    work = place.with_name(place.name + ".partial")
    work.mkdir(exist_ok=True)
    with _unless_empty(work), safe_files.locked_folder(work):
        journal = Journal(work / "journal.json", told)
        learned = journal.learned(work)
        if learned is None:
            size = min(n, max(sample_size, 32 * leaves))
            sample = _sample(key, source, n, d, size, chunk_rows, progress)
            learned = _learn(
                key, sample, metric, weight, leaves, m, num_codewords, num_iterations,
                soar_lambda, progress,
            )  # fmt: skip
            del sample
            journal.keep(work, learned)
        if weight is None:
            weight = Uniform() if metric == "l2" else Threshold(jnp.float32(learned.T[0]))
        book = Codebook(jnp.asarray(learned.codewords), d)
        center = np.asarray(learned.centroids)
        none = np.zeros(0, np.float32) if metric == "l2" else None
        nothing = np.zeros((0, m), np.uint8)
        ranking = np.asarray(learned.ranking)
        tree = pack_tree(
            jnp.asarray(center), np.zeros(0, np.int32), book, nothing, none, ranking=ranking
        )
        whole = {"centroids": center, "codewords": np.asarray(learned.codewords)}
        if len(ranking):
            whole["ranking"] = ranking
        if tree.leaf_offset is not None:
            whole["leaf_offset"] = np.asarray(tree.leaf_offset)
        if words is not None:
            whole["ids"] = words
        copies = 1 if soar_lambda is None or leaves < 2 else 2
        shapes = _shapes(n, d, m, num_codewords, copies, metric, rescore_dtype)

        def encoded(x: np.ndarray) -> dict[str, np.ndarray]:
            return _encoded(x, center, ranking, book, weight, metric, rescore_dtype, soar_lambda)

        with contextlib.ExitStack() as stack:
            parts = {
                name: stack.enter_context(
                    Part(_part_path(work, name), name, spec, journal.rows / n)
                )
                for name, spec in shapes.items()
            }
            total = -(-(n - journal.rows) // chunk_rows)
            bar = iter(steps(total, "encoding", progress))
            for x in _chunks(source, journal.rows, chunk_rows, n, d):
                next(bar, None)
                for name, array in encoded(_checked(x, metric)).items():
                    parts[name].append(array)
                for part in parts.values():
                    part.sync()
                journal.write(journal.rows + len(x))
            specs = {name: part.spec() for name, part in parts.items()}
        specs |= {name: safe_files.spec_of(array) for name, array in whole.items()}
        for name, array in whole.items():
            safe_files.write_tensors(_part_path(work, name), {name: array}, {name: specs[name]})
        searched = leaves_to_search or max(1, min(leaves, max(8, math.ceil(leaves / 10))))
        shell = Index(tree, None, None, weight, metric, n, d, searched)
        install(
            place,
            header_of(shell, specs),
            specs,
            {name: _part_path(work, name) for name in specs},
        )
    shutil.rmtree(work)


@contextlib.contextmanager
def _unless_empty(work: pathlib.Path) -> Iterator[None]:
    """Keep a directory after an error only if there is something to go on with."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            work.rmdir()


def _shape(source: Any) -> tuple[int, int]:
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


def _chunks(source: Any, start: int, size: int, n: int, d: int) -> Iterator[np.ndarray]:
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


def _checked(x: Any, metric: str) -> np.ndarray:
    x = np.asarray(as_rows(x, name="source"))
    check_magnitude(x)
    if metric == "cosine":
        norms = np.asarray(row_norms(x))
        x = x / np.where(norms > 0, norms, 1)[:, None]
    return x


def _sample(
    key: Array, source: Any, n: int, d: int, size: int, chunk: int, progress: bool | None
) -> np.ndarray:
    """One random row of each of ``size`` equal stretches: sorted, distinct, read once."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    edges = np.arange(size + 1, dtype=np.int64) * n // size
    picked = edges[:-1] + (rng.random(size) * np.diff(edges)).astype(np.int64)
    sample = np.empty((size, d), np.float32)
    bar = iter(steps(-(-n // chunk), "sampling", progress))
    begin = 0
    for x in _chunks(source, 0, chunk, n, d):
        next(bar, None)
        low, high = np.searchsorted(picked, [begin, begin + len(x)])
        sample[low:high] = x[picked[low:high] - begin]
        begin += len(x)
    return np.asarray(as_rows(sample, name="source"))


def _learn(
    key: Array, x: np.ndarray, metric: Any, weight: Any, leaves: int, m: int, k: int,
    num_iterations: int, soar_lambda: float | None, progress: bool | None,
) -> Learned:  # fmt: skip
    norms = np.asarray(row_norms(x))
    if metric == "cosine":
        x = x / np.where(norms > 0, norms, 1)[:, None]
        norms = (norms > 0).astype(np.float32)
    T = default_threshold(norms, dim=x.shape[1])
    if weight is None:
        weight = Uniform() if metric == "l2" else Threshold(jnp.float32(T))
    tree = build_tree(
        key, x, loss_terms(weight, norms, x, metric), metric=metric, num_leaves=leaves,
        num_subspaces=m, num_codewords=k, num_iterations=num_iterations, sample_size=len(x),
        soar_lambda=soar_lambda, progress=progress,
    )  # fmt: skip
    words = np.asarray(tree.codebook.codewords)
    packed = tree.packed
    return Learned(
        np.asarray(packed.centroids), np.asarray(packed.ranking), words, np.array([T], np.float32)
    )


def _encoded(
    x: np.ndarray, center: np.ndarray, ranking: np.ndarray, book: Codebook, weight: Any,
    metric: str, kind: Any, soar_lambda: float | None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What the files hold of a chunk, by tensor."""
    norms = np.asarray(row_norms(x))
    norms = (norms > 0).astype(np.float32) if metric == "cosine" else norms
    terms = loss_terms(weight, norms, x, metric)
    vectors = jnp.asarray(ranking if len(ranking) else center)
    leaves = [nearest_centroids(x, vectors)]
    if soar_lambda is not None and len(center) > 1:
        leaves.append(spilled_leaves(x, leaves[0], vectors, soar_lambda=soar_lambda))
    pairs = [encode_leaves(x, each, center, book, terms, metric, False) for each in leaves]
    codes = np.stack([codes for codes, _ in pairs], axis=1).reshape(-1, book.num_subspaces)
    found = {
        "leaves": np.stack(leaves, axis=1).reshape(-1),
        "codes": halves(codes) if book.num_codewords <= 16 else codes,
    }
    if metric == "l2":
        found["offset"] = np.stack([offset for _, offset in pairs], axis=1).reshape(-1)
    if kind is not None:
        store = store_rows(x, kind, None if metric == "l2" else terms(slice(None))["scaling"])
        found["rows"] = np.asarray(store.rows)
        if store.scale is not None:
            found["scale"] = np.asarray(store.scale)
    return found


def _shapes(n: int, d: int, m: int, k: int, copies: int, metric: str, kind: Any) -> dict[str, Spec]:
    entries = n * copies
    specs = {
        "leaves": Spec("I32", (entries,), ""),
        "codes": Spec("U8", (entries, -(-m // 2) if k <= 16 else m), ""),
    }
    if metric == "l2":
        specs["offset"] = Spec("F32", (entries,), "")
    if kind is not None:
        specs["rows"] = Spec(_TYPES[kind], (n, d), "")
        if kind == "int8":
            specs["scale"] = Spec("F32", (n,), "")
    return specs


def _part_path(work: pathlib.Path, name: str) -> pathlib.Path:
    return work / f"{name}.safetensors"
