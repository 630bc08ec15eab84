"""How much work a tree search does: one set of numbers for every implementation."""

import math
from typing import Any, NamedTuple

from .packed import PackedTree

# A query scans so many leaves before it may pass over any; csrc/tree_search.cc has the same.
SURE_LEAVES = 4
# With groups, so many times the leaves that are searched are ranked.
_RANKED = 16


class Effort(NamedTuple):
    """Static numbers of a search.

    Attributes:
      k: results a query.
      leaves_to_search: leaves probed at most.
      leaves_ranked: leaves that are ranked at least, those of the best groups.
      deviations: leaves are passed over whose estimates would have to lie more than so many
        deviations beyond their mean; inf passes over none.
      rescore: rows scored exactly, 0 for none.
      retrieve: slots kept for that; the best ``rescore`` distinct rows of them are scored.
    """

    k: int
    leaves_to_search: int
    leaves_ranked: int
    deviations: float
    rescore: int
    retrieve: int


def effort_of(
    tree: PackedTree,
    rows: Any,
    *,
    k: int,
    leaves_to_search: int,
    rescore: int,
    deviations: float | None,
    retrieve: int | None,
) -> Effort:
    """Check the numbers of a search and fill in what is left open.

    Raises:
      ValueError: numbers out of range.
    """
    if k < 1 or leaves_to_search < 1:
        raise ValueError(
            f"k and leaves_to_search must be at least 1; got {k} and {leaves_to_search}"
        )
    if rescore and (rescore < k or rows is None):
        raise ValueError(f"rescore must be 0, or at least k = {k} and with rows; got {rescore}")
    if deviations is not None and not deviations >= 0:
        raise ValueError(f"deviations must be None or at least 0; got {deviations}")
    if retrieve is None:
        # With as many slots, rows lie in two leaves each. Second copies must not take the places
        # of few candidates; among many they cost less than it takes to find them.
        spilled = rescore and rescore < 3 * k and tree.slot_rows.shape[0] >= 2 * rows.shape[0]
        retrieve = 2 * rescore if spilled else rescore
    if retrieve < rescore:
        raise ValueError(f"retrieve must be at least rescore = {rescore}; got {retrieve}")
    probed = min(leaves_to_search, tree.centroids.shape[0])
    return Effort(
        k,
        probed,
        leaves_ranked(tree, probed),
        math.inf if deviations is None else float(deviations),
        rescore,
        retrieve,
    )


def leaves_ranked(tree: PackedTree, probed: int) -> int:
    """Leaves that are ranked at least where so many are probed."""
    return min(tree.centroids.shape[0], _RANKED * probed)
