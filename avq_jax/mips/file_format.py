"""Format version 1 of a saved index: which tensors it has, and what its header says of them.

A file holds what an index means, not how it lies in memory, which may change with the processor.
Tensors, by name (n rows, d width, m subspaces, k codewords, L leaves):

=============  ==============================  =================================================
``rows``       F32, BF16 or I8 ``[n, d]``      rescoring rows, absent where none were kept
``scale``      F32 ``[n]``                     step of I8 rows
``ids``        U32 ``[n, 2]``                  high and low words of user ids, absent without
``leaves``     I32 ``[n c]``                   leaf of each row (and of each of its c copies where
                                               ``codec.copies`` is c); from here on absent without
                                               tree, and of n c entries where said of rows
``centroids``  F32 ``[L, p]``                  p is ``scanned_dim``, or d without it
``ranking``    F32 ``[L, p]``, where leaves are not ranked by their centroids
``groups``     F32 ``[G, p]``, where leaves lie in groups
``group_starts``  I32 ``[G + 1]``              first leaf of each
``projection``  F32 ``[d, p]``                 axes of the p dimensions, absent where these are the
                                               first of d
``leaf_offset``  F32 ``[L]``                   l2 only
``kicks``      I32 ``[t, j, 2]``               additive codes only: of their encoder
``codewords``  F32 ``[m, k, ceil(p / m)]``, or ``[m, k, p]`` of additive codes
``levels``     F32 ``[16 or 256]``             scales that rows choose from, where they have one
``offset``     F32 ``[n]``                     l2 only
``gains``      U8 ``[n]``                      number of the scale of each row, where it has one
``codes``      U8 ``[n, m]``; k <= 16: U8      at k <= 16 byte j holds subspace 2j in its low half
               ``[n, ceil(m / 2)]``            and subspace 2j + 1 in its high half (0 if none)
=============  ==============================  =================================================
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avq_jax.mips.exact import METRICS
from avq_jax.mips.index import Index
from avq_jax.mips.packing import HalfBytes, coded_rows, pack_tree
from avq_jax.mips.rescoring import Store
from avq_jax.mips.safe_files import MAGIC, IndexFormatError, Spec
from avq_jax.mips.weight_format import weight_from_json, weight_to_json
from avq_jax.quantization import AdditiveCodebook, Codebook, Scaled

__all__ = [
    "FORMAT_VERSION",
    "TENSORS",
    "arrays_of",
    "check_header",
    "header_of",
    "index_of",
]

FORMAT_VERSION = 1
TENSORS = (
    "rows", "scale", "ids", "leaves", "centroids", "ranking", "groups", "group_starts",
    "projection", "kicks", "leaf_offset", "codewords", "levels", "offset", "gains", "codes",
)  # fmt: skip
_KINDS = ("product", "additive")
# Row numbers are int32.
_MOST_ROWS = 2**31 - 1


def arrays_of(index: Index) -> dict[str, np.ndarray]:
    """Take the tensors out of an index, rows first so that they can be used in place when mapped.

    Raises:
      TypeError: codes that format version 1 does not know.
      ValueError: an index with room for rows to come.
    """
    found: dict[str, Any] = {}
    if index.store is not None:
        if index.store.held is not None:
            raise ValueError(
                "index must be made compact before it is saved (avq_jax.compact): it has room for "
                "rows to come"
            )
        found.update(rows=index.store.rows, scale=index.store.scale)
    found.update(ids=index.ids)
    if index.tree is not None:
        tree = index.tree
        rows = coded_rows(tree, index.num_rows)
        # The copies of a row, where it lies in several leaves, follow one another.
        flat = rows.codes.reshape(-1, rows.codes.shape[-1])
        found.update(
            leaves=rows.leaves.reshape(-1),
            centroids=tree.centroids,
            ranking=tree.packed.ranking if tree.packed.ranking.shape[0] else None,
            groups=None if tree.packed.groups is None else tree.packed.groups.vectors,
            group_starts=None if tree.packed.groups is None else tree.packed.groups.starts,
            projection=tree.projection,
            kicks=tree.kicks,
            leaf_offset=tree.leaf_offset,
            codewords=tree.codebook.codewords,
            levels=None if tree.packed.gains is None else tree.packed.gains.levels,
            offset=None if rows.offset is None else rows.offset.reshape(-1),
            gains=None if rows.gains is None else rows.gains.reshape(-1),
            codes=halves(flat) if tree.codebook.num_codewords <= 16 else flat,
        )
    arrays = {name: np.asarray(array) for name, array in found.items() if array is not None}
    return {name: arrays[name] for name in TENSORS if name in arrays}


def halves(codes: np.ndarray) -> np.ndarray:
    packed = codes[:, 0::2].copy()
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return packed


def header_of(index: Index, specs: Mapping[str, Spec]) -> dict[str, Any]:
    """Describe an index and its tensors in values of JSON."""
    codec = None
    if index.tree is not None:
        book = index.tree.codebook
        codec = {
            "kind": "product" if isinstance(book, Codebook) else "additive",
            "num_subspaces": book.num_subspaces,
            "num_codewords": book.num_codewords,
        }
        if index.num_rows:
            copies = specs["leaves"].shape[0] // index.num_rows
            codec |= {} if copies == 1 else {"copies": copies}
    return {
        "magic": MAGIC,
        "format_version": FORMAT_VERSION,
        "library_version": importlib.import_module("avq_jax").__version__,
        "metric": index.metric,
        "num_rows": index.num_rows,
        "dim": index.dim,
        "num_leaves": index.num_leaves,
        "leaves_to_search": index.leaves_to_search,
        **(
            {}
            if index.tree is None or index.tree.width == index.dim
            else {"scanned_dim": index.tree.width}
        ),
        "codec": codec,
        "weight": weight_to_json(index.weight),
        "tensors": {
            name: {"dtype": spec.dtype, "shape": list(spec.shape), "sha256": spec.sha256}
            for name, spec in specs.items()
        },
    }


def _sizes(tensor: Any, count: int) -> list[int]:
    """The first sizes that a header says of a tensor; -1, which fits no rule, for nonsense."""
    shape = tensor.get("shape") if isinstance(tensor, dict) else None
    shape = shape if isinstance(shape, list) else []
    sizes = [size if type(size) is int and 0 <= size <= _MOST_ROWS else -1 for size in shape]
    return (sizes + [-1] * count)[:count]


def check_header(header: Mapping[str, Any], where: str) -> dict[str, Spec]:
    """Check every field of a header against the format.

    Returns:
      What the header says of each tensor, in the order of the file.

    Raises:
      IndexFormatError: a field that is missing, of another kind or out of range.
    """

    def need(ok: Any, rule: str) -> None:
        if not ok:
            raise IndexFormatError(f"{where} is damaged: its header breaks the rule {rule!r}")

    def count(fields: Any, name: str, least: int, most: int) -> int:
        value = fields.get(name)
        need(type(value) is int and least <= value <= most, f"{least} <= {name} <= {most}")
        return value

    n = count(header, "num_rows", 0, _MOST_ROWS)
    d = count(header, "dim", 1, _MOST_ROWS)
    L = count(header, "num_leaves", 0, _MOST_ROWS)
    count(header, "leaves_to_search", 1, _MOST_ROWS)
    metric: Any = header.get("metric")
    codec: Any = header.get("codec")
    tensors: Any = header.get("tensors")
    need(metric in METRICS, f"metric is one of {METRICS}")
    need(isinstance(tensors, dict), "tensors is an object")
    need(tensors and set(tensors) <= set(TENSORS), f"tensors are among {TENSORS}")
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, Any] = {"codes": "U8", "gains": "U8", "ids": "U32"}
    kinds |= dict.fromkeys(("leaves", "group_starts", "kicks"), "I32")
    if "rows" in tensors:
        shapes["rows"] = (n, d)
        kinds["rows"] = tensors["rows"].get("dtype") if isinstance(tensors["rows"], dict) else ""
        need(kinds["rows"] in ("F32", "BF16", "I8"), "rows are F32, BF16 or I8")
        if kinds["rows"] == "I8":
            shapes["scale"] = (n,)
    if "ids" in tensors:
        shapes["ids"] = (n, 2)
    if codec is None:
        need(L == 0 and "rows" in tensors, "without codes there are rows and no leaves")
    else:
        need(isinstance(codec, dict) and codec.get("kind") in _KINDS, f"codec is one of {_KINDS}")
        m, k = count(codec, "num_subspaces", 1, _MOST_ROWS), count(codec, "num_codewords", 1, 256)
        need(L >= 1, "codes lie in leaves")
        entries = n * (count(codec, "copies", 2, 64) if "copies" in codec else 1)
        p = count(header, "scanned_dim", 1, d) if "scanned_dim" in header else d
        shapes |= {"leaves": (entries,), "centroids": (L, p), "codewords": (m, k, p)}
        if codec["kind"] == "product":
            shapes["codewords"] = (m, k, -(-p // m))
        else:
            need(2 <= m <= p, "2 <= additive codebooks <= dimensions")
        shapes["codes"] = (entries, -(-m // 2) if k <= 16 else m)
        if "ranking" in tensors:
            shapes["ranking"] = (L, p)
        if "projection" in tensors:
            shapes["projection"] = (d, p)
        if "kicks" in tensors:
            shapes["kicks"] = (*_sizes(tensors["kicks"], 2), 2)
            need(codec["kind"] == "additive" and shapes["kicks"][1] <= m, "kicks are of codebooks")
        if "groups" in tensors:
            G = count({"groups": _sizes(tensors["groups"], 1)[0]}, "groups", 1, L)
            shapes |= {"groups": (G, p), "group_starts": (G + 1,)}
        if "levels" in tensors:
            shapes |= {"levels": (_sizes(tensors["levels"], 1)[0],), "gains": (entries,)}
            need(shapes["levels"][0] in (16, 256), "levels are 16 or 256")
        if metric == "l2":
            shapes |= {"leaf_offset": (L,), "offset": (entries,)}
    need(set(shapes) == set(tensors), f"the tensors are {sorted(shapes)}")
    specs = {}
    for name in TENSORS:
        if name in shapes:
            dtype, shape, said = kinds.get(name, "F32"), shapes[name], tensors[name]
            need(isinstance(said, dict) and said.get("dtype") == dtype, f"{name} is {dtype}")
            need(said.get("shape") == list(shape), f"{name} has shape {list(shape)}")
            digest = said.get("sha256")
            need(isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest), "sha256 in hex")
            specs[name] = Spec(dtype, shape, digest)
    return specs


def index_of(
    header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], weight: Any, where: str
) -> Index:
    """Put an index together from a checked header and its tensors.

    Raises:
      IndexFormatError: a number that points outside an array, or is not finite.
      ValueError: ``weight`` given where the file has one.
    """

    def need(ok: Any, name: str, rule: str) -> None:
        if not ok:
            raise IndexFormatError(f"{where} is damaged: {name} must be {rule}")

    weight = weight_from_json(header.get("weight"), weight, where)
    for name, array in arrays.items():
        if name != "rows" and array.dtype == np.float32:
            need(np.isfinite(array).all(), name, "finite")
    n, tree, store = header["num_rows"], None, None
    if "ids" in arrays:
        need(arrays["ids"][:, 0].max(initial=0) < 2**31, "ids", "below 2^63")
    if header["codec"] is not None:
        m, k = header["codec"]["num_subspaces"], header["codec"]["num_codewords"]
        L, leaves = header["num_leaves"], arrays["leaves"]
        codes: Any = arrays["codes"]
        need(not n or (leaves.min() >= 0 and leaves.max() < L), "leaves", f"0 to {L - 1}")
        if k <= 16:
            spare = m % 2 and n and (codes[:, -1] >> 4).any()
            need(not spare, "codes", "0 in the last half byte")
            codes = HalfBytes(codes, m)
        largest = codes.largest() if k <= 16 else codes.max(initial=0)
        need(largest < k, "codes", f"below num_codewords, {k}")
        leaf_offset, offset = arrays.get("leaf_offset"), arrays.get("offset")
        levels, gains = arrays.get("levels"), arrays.get("gains")
        if levels is not None and gains is not None:
            need(levels[0] > 0 and (np.diff(levels) >= 0).all(), "levels", "positive and rising")
            need(gains.max(initial=0) < len(levels), "gains", f"below {len(levels)}")
        if (copies := header["codec"].get("copies", 1)) > 1:
            leaves = leaves.reshape(n, copies)
            offset = None if offset is None else offset.reshape(n, copies)
            gains = None if gains is None else gains.reshape(n, copies)
        groups, axes = None, arrays.get("projection")
        if "groups" in arrays:
            starts = arrays["group_starts"]
            rising = starts[0] == 0 and starts[-1] == L and (np.diff(starts) >= 0).all()
            need(rising, "group_starts", f"rising from 0 to {L}")
            groups = (arrays["groups"], starts)
        book: Codebook | AdditiveCodebook
        if header["codec"]["kind"] == "product":
            book = Codebook(jnp.asarray(arrays["codewords"]), arrays["centroids"].shape[1])
        else:
            kicks = arrays.get("kicks")
            if kicks is not None:
                within = (kicks >= 0).all() and (kicks < [m, k]).all()
                need(within, "kicks", f"codebooks below {m} and words below {k}")
            book = AdditiveCodebook(
                jnp.asarray(arrays["codewords"]), None if kicks is None else jnp.asarray(kicks)
            )
        tree = pack_tree(
            jnp.asarray(arrays["centroids"]),
            leaves,
            book if levels is None else Scaled(book, jnp.asarray(levels)),
            codes,
            offset,
            gains=gains,
            ranking=arrays.get("ranking"),
            leaf_offset=None if leaf_offset is None else jnp.asarray(leaf_offset),
            groups=groups,
            projection=None if axes is None else jnp.asarray(axes),
        )
    if "rows" in arrays:
        scale = arrays.get("scale")
        # device_put uses an aligned array in place on a CPU device, where jnp.asarray copies.
        store = Store(jax.device_put(arrays["rows"]), None if scale is None else jnp.asarray(scale))
    return Index(
        tree=tree,
        store=store,
        ids=jax.device_put(arrays["ids"]) if "ids" in arrays else None,
        weight=weight,
        metric=header["metric"],
        num_rows=n,
        dim=header["dim"],
        leaves_to_search=header["leaves_to_search"],
    )
