"""The compiled tree search without JAX's dispatch: NumPy in and out, for serving loops."""

import ctypes
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .. import library
from ..adc.cpu import LAYOUT_NUMBERS
from ..layout import POINTS_LAST
from .effort import effort_of
from .packed import PackedTree

_POINTERS = (
    "centroids",
    "tiles",
    "leaf_offset",
    "spread",
    "group_tiles",
    "group_offset",
    "group_starts",
    "starts",
    "codewords",
    "codes",
    "slot_offset",
    "slot_level",
    "levels",
    "slot_rows",
    "usable",
    "rows",
    "row_scale",
)
_NUMBERS = (
    "dim",
    "num_leaves",
    "width",
    "num_codewords",
    "layout",
    "num_slots",
    "num_subspaces",
    "store",
    "num_rows",
    "row_dim",
    "num_groups",
    "euclidean",
    "leaves_to_search",
    "leaves_ranked",
    "rescore",
    "retrieve",
    "k",
    "num_levels",
)
_FACTORS = ("centroid_scale", "group_scale", "deviations")
_STORES = {"float32": 1, "bfloat16": 2, "int8": 3}


class _Arguments(ctypes.Structure):
    """`XlaKernelsTreeSearch` of csrc/tree_search_c.cc."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int64) for name in _NUMBERS]
        + [(name, ctypes.c_double) for name in _FACTORS]
    )


def direct_tree_search(
    tree: PackedTree,
    *,
    k: int,
    leaves_to_search: int,
    rescore: int = 0,
    rows: Any = None,
    row_scale: Any = None,
    euclidean: bool = False,
    deviations: float | None = None,
    retrieve: int | None = None,
) -> Callable[..., tuple[np.ndarray, np.ndarray] | None] | None:
    """Bind `tree_search` to its operands, once, as a function of NumPy queries.

    Args:
      tree: as of `tree_search`, of concrete arrays.
      k: as of `tree_search`, like all other arguments.
      leaves_to_search: leaves probed.
      rescore: candidates scored exactly.
      rows: rows for that.
      row_scale: factor of int8 rows.
      euclidean: exact scores are negated squared distances.
      deviations: of leaves that are passed over.
      retrieve: slots kept for rescoring.

    Returns:
      A function from C-ordered ``float32[b, d]``, and ``float32[b, e]`` after it where rows are
      wider, to scores and rows ``[b, k]``, on the calling thread without the interpreter lock; it
      returns None for queries of extreme size, which are for `tree_search`. None instead of the
      function where the kernel cannot run.
    """
    effort = effort_of(
        tree,
        rows,
        k=k,
        leaves_to_search=leaves_to_search,
        rescore=rescore,
        deviations=deviations,
        retrieve=retrieve,
    )
    handle = library.load().handle
    platforms = {device.platform for leaf in jax.tree.leaves(tree) for device in leaf.devices()}
    if handle is None or tree.codes.layout in POINTS_LAST or platforms != {"cpu"}:
        return None
    if euclidean and rows is not None and rows.dtype != np.float32:
        return None
    starts, slots = np.asarray(tree.starts), tree.slot_rows.shape[0]
    m, width, codewords = tree.codewords.shape
    if np.any(np.diff(starts) < 0) or starts[0] < 0 or starts[-1] * tree.block > slots:
        return None
    operands = {name: getattr(tree, name, None) for name in _POINTERS}
    operands |= {"codes": tree.codes.data, "rows": rows, "row_scale": row_scale}
    if tree.gains is not None:
        operands |= {"slot_level": tree.gains.level, "levels": tree.gains.levels}
    groups = tree.groups
    if groups is not None:
        begin = np.asarray(groups.starts)
        if begin[0] or np.any(np.diff(begin) < 0) or begin[-1] != tree.centroids.shape[0]:
            return None
        operands |= {
            f"group_{name}": getattr(groups, name) for name in ("tiles", "offset", "starts")
        }
    # Views of the device arrays; they live as long as the function.
    held = {
        name: np.ascontiguousarray(np.asarray(array))
        for name, array in operands.items()
        if array is not None and array.size
    }
    arguments = _Arguments(
        dim=tree.centroids.shape[1],
        num_leaves=tree.centroids.shape[0],
        width=width,
        num_codewords=codewords,
        layout=LAYOUT_NUMBERS[tree.codes.layout],
        num_slots=slots,
        num_subspaces=m,
        store=_STORES[rows.dtype.name] if rescore else 0,
        num_rows=rows.shape[0] if rescore else np.iinfo(np.int32).max,
        row_dim=rows.shape[1] if rescore else tree.centroids.shape[1],
        num_groups=0 if groups is None else groups.vectors.shape[0],
        group_scale=1.0 if groups is None else float(groups.scale),
        euclidean=euclidean,
        num_levels=0 if tree.gains is None else tree.gains.levels.shape[0],
        centroid_scale=float(tree.centroid_scale),
        **effort._asdict(),
        **{name: array.ctypes.data for name, array in held.items()},
    )
    run = handle.xla_kernels_tree_search_direct
    run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] + [ctypes.c_void_p]
    address = ctypes.addressof(arguments)
    wide = arguments.row_dim != arguments.dim
    address_of: Any = (ctypes.c_char * 0).from_buffer

    def find(
        queries: np.ndarray, row_queries: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        b = len(queries)
        results = np.empty((2, b, k), np.float32)
        # A copy as bytes and a view of the buffer cost a tenth of what `ndarray.ctypes` does.
        these = exact = queries.tobytes()
        if wide:
            if row_queries is None:
                raise ValueError("row_queries must be given where rows are wider than the tree")
            exact = row_queries.tobytes()
        if run(address, these, exact, b, address_of(results)):
            return None
        return results[0], results[1].view(np.int32)

    find.held = arguments, held  # type: ignore[attr-defined]
    return find
