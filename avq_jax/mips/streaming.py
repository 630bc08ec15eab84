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

from avq_jax.checks import as_count
from avq_jax.loss import Weight, row_norms, scaling
from avq_jax.mips import safe_files
from avq_jax.mips.build import (
    check_arguments,
    default_effort,
    default_weight,
)
from avq_jax.mips.file_format import halves, header_of
from avq_jax.mips.index import Index, Tree, pack_ids
from avq_jax.mips.io import check_folder, install
from avq_jax.mips.journal import Journal, Learned, Part
from avq_jax.mips.learning import (
    as_pytree,
    encode_leaves,
    learn_tree,
    row_leaves,
    scanned_terms,
)
from avq_jax.mips.options import TreeOptions, tree_options
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.rescoring import StoreType, store_rows
from avq_jax.mips.row_source import (
    checked_rows,
    row_chunks,
    rows_and_norms,
    sample_rows,
    source_shape,
)
from avq_jax.mips.safe_files import Spec
from avq_jax.progress import steps
from avq_jax.quantization import AdditiveCodebook, Codebook, Scaled

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
    codec: Literal["product", "additive"] = "product",
    scale: Literal[4, 8] | None = None,
    weight: Weight | None = None,
    ids: Any = None,
    soar_lambda: float | Literal["auto"] | None = "auto",
    spherical: bool = False,
    num_groups: int | Literal["auto"] | None = "auto",
    scanned_dim: int | None = None,
    projection: Literal["pca", "prefix"] = "pca",
    leaves_to_search: int | None = None,
    rescore_dtype: StoreType | None = "float32",
    num_iterations: int = 10,
    sample_size: int = 100_000,
    chunk_rows: int = 65_536,
    progress: bool | None = None,
) -> None:
    """Build an index of rows on disk, into a saved index for :func:`avq_jax.load`.

    Centroids and codebooks are learned from a sample, as ``build`` does; then every chunk of rows
    is read, encoded and appended to the files of the index. Where the sample is all rows the index
    is that of ``build`` with the same arguments; of more rows it takes one out of each of equal
    stretches, where ``build`` draws from all. ``balance`` is left out: its leaves depend on all
    rows at once. Memory does not grow with the rows,
    but for 24 bytes a row where ``ids`` are given: it holds some copies of the sample and of a
    chunk in float32 (790 MB at most, Python and JAX included, were measured for 10^7 x 96 rows
    in one leaf each and the sizes of the defaults). A build that ends early leaves
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
      codec: as of :func:`avq_jax.build`.
      scale: as of :func:`avq_jax.build`.
      weight: as of :func:`avq_jax.build`.
      ids: as of :func:`avq_jax.build`.
      soar_lambda: as of :func:`avq_jax.build`.
      spherical: as of :func:`avq_jax.build`.
      num_groups: as of :func:`avq_jax.build`.
      scanned_dim: as of :func:`avq_jax.build`.
      projection: as of :func:`avq_jax.build`, learned from the sample.
      leaves_to_search: as of :func:`avq_jax.build`.
      rescore_dtype: as of :func:`avq_jax.build`; the rows of a loaded index stay in the file.
      num_iterations: as of :func:`avq_jax.build`.
      sample_size: as of :func:`avq_jax.build`.
      chunk_rows: rows encoded at a time.
      progress: show progress.

    Raises:
      TypeError: sizes or ids that are not integers, a key that is not typed.
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
    check_arguments(key, metric, rescore_dtype, leaves_to_search)
    as_count(chunk_rows, name="chunk_rows")
    weight = None if weight is None else as_pytree(weight)
    place = pathlib.Path(path)
    n, d = source_shape(source)
    options = tree_options(
        n,
        d,
        metric=metric,
        num_leaves=max(1, round(math.sqrt(n))) if num_leaves is None else num_leaves,
        num_subspaces=num_subspaces,
        num_codewords=num_codewords,
        num_iterations=num_iterations,
        sample_size=sample_size,
        soar_lambda=soar_lambda,
        spherical=spherical,
        num_groups=num_groups,
        scanned_dim=scanned_dim,
        projection=projection,
        codec=codec,
        scale=scale,
    )
    if options is None:
        raise ValueError(f"source has {n} rows, too few to learn codes from; use build")
    words = None if ids is None else pack_ids(ids, n)
    told = json.dumps(
        {
            "rows": [n, d], "metric": metric, "options": options._asdict(),
            "weight": str(jax.tree.map(float, weight)), "rescore_dtype": rescore_dtype,
            "key": np.asarray(jax.random.key_data(key)).tolist(),
        },
        sort_keys=True,
    )  # fmt: skip
    check_folder(place)
    work = place.with_name(place.name + ".partial")
    work.mkdir(exist_ok=True)
    with _unless_empty(work), safe_files.locked_folder(work):
        journal = Journal(work / "journal.json", told)
        learned = journal.learned(work)
        if weight is None:
            weight = default_weight(metric, dim=d)
        if learned is None:
            size = min(n, max(options.sample_size, 32 * options.num_leaves))
            sample = sample_rows(key, source, n, d, size, chunk_rows, progress)
            learned = _learn(key, sample, metric, weight, options, progress)
            del sample
            journal.keep(work, learned)
        tree = _empty_tree(learned, metric)
        whole = {
            "centroids": learned.centroids,
            "ranking": learned.ranking,
            "groups": learned.groups,
            "group_starts": learned.group_starts,
            "projection": learned.projection,
            "codewords": learned.codewords,
            "levels": learned.levels,
            "kicks": learned.kicks,
        }
        whole = {name: array for name, array in whole.items() if array.size}
        if tree.leaf_offset is not None:
            whole["leaf_offset"] = np.asarray(tree.leaf_offset)
        if words is not None:
            whole["ids"] = words
        shapes = _shapes(n, d, options, metric, rescore_dtype)

        def encoded(x: np.ndarray) -> dict[str, np.ndarray]:
            return _encoded(x, tree, weight, metric, rescore_dtype, options.soar_lambda)

        with contextlib.ExitStack() as stack:
            parts = {
                name: stack.enter_context(
                    Part(_part_path(work, name), name, spec, journal.rows / n)
                )
                for name, spec in shapes.items()
            }
            total = -(-(n - journal.rows) // chunk_rows)
            bar = iter(steps(total, "encoding", progress))
            for x in row_chunks(source, journal.rows, chunk_rows, n, d):
                next(bar, None)
                for name, array in encoded(checked_rows(x, metric)).items():
                    parts[name].append(array)
                for part in parts.values():
                    part.sync()
                journal.write(journal.rows + len(x))
            specs = {name: part.spec() for name, part in parts.items()}
        specs |= {name: safe_files.spec_of(array) for name, array in whole.items()}
        for name, array in whole.items():
            safe_files.write_tensors(_part_path(work, name), {name: array}, {name: specs[name]})
        searched = leaves_to_search or default_effort(options.num_leaves)
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


def _learn(
    key: Array, x: np.ndarray, metric: Any, weight: Any, options: TreeOptions, progress: bool | None
) -> Learned:
    x, norms = rows_and_norms(x, metric)
    tree = learn_tree(key, x, norms, weight, options, metric=metric, progress=progress)
    packed = tree.packed
    groups, starts = np.zeros((0, tree.width), np.float32), np.zeros(0, np.int32)
    if packed.groups is not None:
        groups, starts = packed.groups.vectors, packed.groups.starts
    axes = np.zeros((0, 0), np.float32) if tree.projection is None else tree.projection
    words = tree.codebook.codewords
    levels = np.zeros(0, np.float32) if packed.gains is None else packed.gains.levels
    kicks = np.zeros((0, 0, 2), np.int32) if tree.kicks is None else tree.kicks
    found = (packed.centroids, packed.ranking, words, groups, starts, axes, levels, kicks)
    return Learned(*map(np.asarray, found))


def _empty_tree(learned: Learned, metric: str) -> Tree:
    """The tree of no rows."""
    words = jnp.asarray(learned.codewords)
    m, width = words.shape[0], learned.centroids.shape[1]
    book: Codebook | AdditiveCodebook = Codebook(words, width)
    if m > 1 and words.shape[2] == width:
        book = AdditiveCodebook(words, jnp.asarray(learned.kicks) if learned.kicks.size else None)
    return pack_tree(
        jnp.asarray(learned.centroids),
        np.zeros(0, np.int32),
        Scaled(book, jnp.asarray(learned.levels)) if learned.levels.size else book,
        np.zeros((0, m), np.uint8),
        np.zeros(0, np.float32) if metric == "l2" else None,
        gains=np.zeros(0, np.uint8) if learned.levels.size else None,
        ranking=learned.ranking if learned.ranking.size else None,
        groups=(learned.groups, learned.group_starts) if learned.groups.size else None,
        projection=jnp.asarray(learned.projection) if learned.projection.size else None,
    )


def _encoded(
    x: np.ndarray, tree: Tree, weight: Any, metric: str, kind: Any, soar_lambda: float | None
) -> dict[str, np.ndarray]:
    """What the files hold of a chunk, by tensor."""
    norms = np.asarray(row_norms(x))
    norms = (norms > 0).astype(np.float32) if metric == "cosine" else norms
    seen, terms = scanned_terms(tree.projection, tree.width, weight, norms, x, metric=metric)
    leaves = row_leaves(seen, jnp.asarray(tree.ranking), soar_lambda)
    codec = tree.codec
    coded = encode_leaves(seen, leaves, np.asarray(tree.centroids), codec, terms, metric, False)
    codes = coded.codes.reshape(-1, codec.num_subspaces)
    found = {
        "leaves": leaves.reshape(-1),
        "codes": halves(codes) if codec.num_codewords <= 16 else codes,
    }
    if coded.offset is not None:
        found["offset"] = coded.offset.reshape(-1)
    if coded.gains is not None:
        found["gains"] = coded.gains.reshape(-1)
    if kind is not None:
        each = None if metric == "l2" else scaling(weight, norms, dim=x.shape[1])
        store = store_rows(x, kind, each)
        found["rows"] = np.asarray(store.rows)
        if store.scale is not None:
            found["scale"] = np.asarray(store.scale)
    return found


def _shapes(n: int, d: int, options: TreeOptions, metric: str, kind: Any) -> dict[str, Spec]:
    m, k = options.num_subspaces, options.num_codewords
    entries = n * (1 if options.soar_lambda is None or options.num_leaves < 2 else 2)
    specs = {
        "leaves": Spec("I32", (entries,), ""),
        "codes": Spec("U8", (entries, -(-m // 2) if k <= 16 else m), ""),
    }
    if metric == "l2":
        specs["offset"] = Spec("F32", (entries,), "")
    if options.scale is not None:
        specs["gains"] = Spec("U8", (entries,), "")
    if kind is not None:
        specs["rows"] = Spec(_TYPES[kind], (n, d), "")
        if kind == "int8":
            specs["scale"] = Spec("F32", (n,), "")
    return specs


def _part_path(work: pathlib.Path, name: str) -> pathlib.Path:
    return work / f"{name}.safetensors"
