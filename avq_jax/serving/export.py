"""Export a search as one StableHLO program with the arrays of the index beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.export as jax_export
import jax.numpy as jnp
import numpy as np

from avq_jax.checks import as_count, is_traced
from avq_jax.mips.index import Index
from avq_jax.mips.safe_files import locked_folder, replacing
from avq_jax.mips.searcher import search
from avq_jax.serving import runtime
from xla_kernels import library
from xla_kernels.layout import repack_codes

__all__ = ["export"]

_ALIGN = 64
_KERNEL = "xla_kernels_tree_search"
# What `lax.top_k` was before jax 0.10, without a promise that later versions read it.
_TOP_K = "mhlo.topk"
_STANDALONE = "standalone.py"
_OURS = re.compile(
    r"(program|arrays)-[0-9a-f]{32}\.bin|standalone\.py|header\.json|\..+\.[0-9a-f]{8}\.tmp"
)


def export(
    index: Index,
    path: str | os.PathLike[str],
    *,
    batch: str | int = "b",
    k: int = 10,
    leaves_to_search: int | None = None,
    rescore: int | None = None,
    adaptive: float | None = None,
    overretrieve: float | None = None,
    encoder: Callable[[Any, Any], Any] | None = None,
    params: Any = None,
    inputs: Any = None,
    platforms: Sequence[str] = ("cpu", "tpu", "cuda"),
    implementation: Literal["xla", "cpu"] = "xla",
) -> None:
    """Write an index and its search as a program that runs without this package.

    The directory holds a ``jax.export`` program (StableHLO), the arrays, a header with their
    hashes, and ``standalone.py``, a loader that needs jax and flatbuffers alone
    (``from standalone import load_exported``). Files are written under names with their hash and
    the header last, so that at any moment the directory holds a whole export.

    Args:
      index: from :func:`avq_jax.build`.
      path: a directory, made if it does not exist.
      batch: a name for any batch size of at least 1, or one fixed size.
      k: results a query.
      leaves_to_search: as of :func:`avq_jax.search`.
      rescore: as of :func:`avq_jax.search`.
      adaptive: as of :func:`avq_jax.search`.
      overretrieve: as of :func:`avq_jax.search`.
      encoder: ``encoder(params, inputs) -> queries [b, d]``, a jittable model that becomes part of
        the program; ``None`` takes queries.
      params: pytree of its arrays, kept beside those of the index.
      inputs: an array or ``jax.ShapeDtypeStruct`` like its inputs; the first axis is the batch.
      platforms: where the program can run.
      implementation: ``"xla"``, which runs everywhere, or ``"cpu"``, the compiled kernel: only for
        ``platforms=("cpu",)``, and only where ``xla_kernels`` is installed, which the header says.

    Raises:
      TypeError: not an index, a traced one.
      ImportError: flatbuffers is not installed.
      ValueError: arguments out of range or that do not go together, a directory that holds other
        things, an encoder whose output is not ``[b, d]``.

    >>> import avq_jax.serving, jax, tempfile
    >>> x = jax.random.normal(jax.random.key(0), (1000, 16))
    >>> index = avq_jax.build(jax.random.key(1), x, num_leaves=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     avq_jax.serving.export(index, folder, k=1, rescore=50, platforms=("cpu",))
    ...     find = avq_jax.serving.load_exported(folder)
    >>> find(x[:3]).ids.tolist() == avq_jax.search(index, x[:3], k=1, rescore=50).ids.tolist()
    True
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    if is_traced(index, params):
        raise TypeError("export needs concrete arrays; call it outside jit")
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("export needs flatbuffers: pip install 'avq-jax[export]'")
    requires = _requirement(index, platforms, implementation)
    index = jax.tree.map(jnp.asarray, index)
    if requires is None and index.tree is not None:
        # The layout of plain XLA, without what only the compiled kernel reads.
        packed = index.tree.packed
        packed = packed._replace(
            codes=repack_codes(packed.codes, "columns"), tiles=packed.tiles[:0]
        )
        index = dataclasses.replace(index, tree=index.tree._replace(packed=packed))
    ids = index.ids
    bare = dataclasses.replace(index, ids=None, weight=None)
    leaves, structure = jax.tree.flatten((bare, params))
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    options: dict[str, Any] = {
        "k": k, "leaves_to_search": leaves_to_search, "rescore": rescore, "adaptive": adaptive,
        "overretrieve": overretrieve,
    }  # fmt: skip

    def program(arrays: Any, inputs: Any) -> Any:
        index, params = jax.tree.unflatten(structure, arrays)
        queries = inputs if encoder is None else encoder(params, inputs)
        if queries.ndim != 2 or queries.shape[1] != index.dim:
            raise ValueError(f"encoder must return [b, {index.dim}]; got {queries.shape}")
        return tuple(search(index, queries, implementation=implementation, **options))

    spec = _input_spec(index, encoder, inputs, batch)
    exported = jax_export.export(
        jax.jit(program),
        platforms=tuple(platforms),
        disabled_checks=[
            jax_export.DisabledSafetyCheck.custom_call(name)
            for name in ((_TOP_K, _KERNEL) if requires else (_TOP_K,))
        ],
    )([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves], spec)
    arguments = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    header = {
        "magic": runtime.MAGIC,
        "format_version": runtime.FORMAT_VERSION,
        "library_version": importlib.import_module("avq_jax").__version__,
        "jax_version": jax.__version__,
        "platforms": list(platforms),
        "requires": requires,
        "inputs": {
            "shape": [n if isinstance(n, int) else str(n) for n in spec.shape],
            "dtype": jnp.dtype(spec.dtype).name,
        },
        "metric": index.metric,
        "num_rows": index.num_rows,
        "dim": index.dim,
        "k": k,
        "encoder": encoder is not None,
        "arguments": list(arguments),
    }
    tensors = arguments if ids is None else {**arguments, "ids": np.asarray(ids)}
    _write(pathlib.Path(path), header, bytes(exported.serialize()), tensors)


def _requirement(
    index: Index, platforms: Sequence[str], implementation: str
) -> dict[str, Any] | None:
    if isinstance(platforms, str) or not platforms:
        raise ValueError(f"platforms must be a sequence of names; got {platforms!r}")
    if implementation == "xla":
        return None
    if implementation != "cpu" or tuple(platforms) != ("cpu",):
        raise ValueError(
            "implementation must be 'xla', or 'cpu' with platforms=('cpu',); "
            f"got {implementation!r} with {tuple(platforms)}"
        )
    if index.tree is None:
        raise ValueError("implementation must be 'xla' for an index without a tree")
    if not library.available():
        raise ValueError(f"implementation 'cpu' cannot run here: {library.load().reason}")
    return {
        "custom_call": _KERNEL,
        "interface": library.ABI,
        "simd_level": library.simd_level(),
    }


def _input_spec(index: Index, encoder: Any, inputs: Any, batch: str | int) -> Any:
    if (encoder is None) != (inputs is None):
        raise ValueError("encoder and inputs must be given together, or neither")
    like: Any = jax.ShapeDtypeStruct((1, index.dim), jnp.float32) if inputs is None else inputs
    if not isinstance(like, jax.ShapeDtypeStruct):
        like = jnp.asarray(like)
    if not len(like.shape):
        raise ValueError("inputs must have a batch axis; got a scalar")
    if isinstance(batch, str):
        if not batch.isidentifier():
            raise ValueError(f"batch must be a name or a number; got {batch!r}")
        (size,) = jax_export.symbolic_shape(batch, constraints=[f"{batch} >= 1"])
    else:
        size = as_count(batch, name="batch")
    return jax.ShapeDtypeStruct((size, *like.shape[1:]), like.dtype)


def _write(
    folder: pathlib.Path, header: dict[str, Any], program: bytes, tensors: dict[str, np.ndarray]
) -> None:
    folder.mkdir(exist_ok=True)
    with locked_folder(folder):
        before = {entry.name for entry in os.scandir(folder)}
        foreign = sorted(name for name in before if not _OURS.fullmatch(name))
        if foreign and runtime.HEADER not in before:
            raise ValueError(
                f"path must be an export or an empty directory; {str(folder)!r} holds "
                f"{foreign[0]!r}"
            )
        places, offset = {}, 0
        for name, array in tensors.items():
            places[name] = {
                "dtype": array.dtype.name, "shape": list(array.shape), "offset": offset
            }  # fmt: skip
            offset += array.nbytes + -array.nbytes % _ALIGN
        names = {_STANDALONE, runtime.HEADER}
        said = {}
        for kind, parts in (("program", [program]), ("arrays", _padded_bytes(tensors))):
            digest, size = hashlib.sha256(), 0
            parts = list(parts)
            for part in parts:
                digest.update(part)
                size += len(part)
            name = f"{kind}-{digest.hexdigest()[:32]}.bin"
            with replacing(folder / name) as file:
                for part in parts:
                    file.write(part)
            said[kind] = {"file": name, "bytes": size, "sha256": digest.hexdigest()}
            names.add(name)
        with replacing(folder / _STANDALONE) as file:
            file.write(inspect.getsource(runtime).encode())
        with replacing(folder / runtime.HEADER) as file:
            file.write(runtime.spell_header({**header, **said, "tensors": places}))
        for old in before - names:
            if _OURS.fullmatch(old):
                with contextlib.suppress(FileNotFoundError):
                    (folder / old).unlink()


def _padded_bytes(tensors: dict[str, np.ndarray]) -> list[Any]:
    """Bytes of the arrays, each from a multiple of 64; views, not copies."""
    parts: list[Any] = []
    for array in tensors.values():
        flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        parts += [memoryview(flat), b"\0" * (-array.nbytes % _ALIGN)]
    return parts
