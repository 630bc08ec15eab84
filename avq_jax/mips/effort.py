"""How much work a search does: its settings, checked once for all ways to search."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from avq_jax.checks import as_count, as_recall_target, is_number
from avq_jax.mips.index import Index
from xla_kernels import Implementation

__all__ = ["Effort", "effort_of"]


class Effort(NamedTuple):
    """Static settings of a search."""

    k: int
    leaves_to_search: int
    rescore: int
    implementation: Implementation | None
    adaptive: float | None = None
    retrieve: int | None = None
    recall_target: float = 1.0


def effort_of(
    index: Index,
    k: Any,
    leaves_to_search: Any,
    rescore: Any,
    implementation: Any,
    adaptive: Any = None,
    overretrieve: Any = None,
    recall_target: Any = 1.0,
) -> Effort:
    """Settings of a search, checked, with the defaults of the index."""
    k = as_count(k, name="k")
    if leaves_to_search is None:
        leaves_to_search = index.leaves_to_search
    leaves = min(as_count(leaves_to_search, name="leaves_to_search"), index.num_leaves)
    if rescore is None:
        rescore = max(10 * k, 100) if index.store is not None else 0
    rescore = as_count(rescore, name="rescore", minimum=0)
    if index.store is None and rescore:
        raise ValueError(
            "rescore must be 0 for an index built with rescore_dtype=None, which keeps no rows; "
            f"got {rescore}"
        )
    if 0 < rescore < k:
        raise ValueError(f"rescore must be 0 (off) or at least k = {k}; got {rescore}")
    if adaptive is not None:
        if not (is_number(adaptive) and adaptive >= 0):
            raise ValueError(f"adaptive must be None or a number >= 0; got {adaptive!r}")
        adaptive = float(adaptive)
    retrieve = None
    if overretrieve is not None:
        if not (is_number(overretrieve) and 1 <= overretrieve < math.inf):
            raise ValueError(f"overretrieve must be None or a number >= 1; got {overretrieve!r}")
        slots = 0 if index.tree is None else index.tree.packed.slot_rows.shape[0]
        retrieve = max(rescore, math.ceil(min(overretrieve * rescore, slots)))
    target = as_recall_target(recall_target)
    return Effort(k, leaves, rescore, implementation, adaptive, retrieve, target)
