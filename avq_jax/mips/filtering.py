"""Filters: only allowed rows, at the recall of a search among all rows.

Few allowed rows are gathered and scored exactly, which costs less than looking for them leaf by
leaf. Otherwise leaves without an allowed row are passed over, and more leaves are probed: the
best rows of a sparse subset lie farther from the query, and so in more leaves, than those of the
whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.mips.capacity import held_rows
from avq_jax.mips.index import Index
from avq_jax.mips.rescoring import Store
from xla_kernels import PackedTree

__all__ = [
    "Restricted",
    "allowed_rows",
    "allowed_store",
    "exact_bound",
    "filtered_search",
    "restrict",
    "restrict_tree",
    "widths",
]

# Exact scoring of a gathered row costs about as much as the codes of 40 rows.
_EXACT_ROWS, _EXACT_SHARE = 4096, 64
# How many times more leaves a sparse filter may probe, in powers of two. Of masks of 1 to 30 % of
# word vectors (random, balls, ranges of frequency) none needed more.
_DOUBLINGS = 4
# A leaf of this score comes after all others; finite, so that sums with it stay ordered.
_LAST = np.float32(-1.7e38)
_GROUP = 64

Found = tuple[Array, Array]


def exact_bound(n: int) -> int:
    """Most allowed rows that are scored exactly.

    >>> exact_bound(1000), exact_bound(1_000_000)
    (1000, 15625)
    """
    return min(n, max(_EXACT_ROWS, n // _EXACT_SHARE))


def widths(leaves: int, num_leaves: int) -> list[int]:
    """Numbers of leaves that a filtered search may probe, where an unfiltered one probes some.

    >>> widths(10, 100)
    [10, 20, 40, 80, 100]
    """
    return sorted({min(num_leaves, leaves << i) for i in range(_DOUBLINGS + 1)})


def _level(share: Any) -> Any:
    """Place in `widths` for leaves filled to this share: (2 / share - 1) times the leaves."""
    ratio = 2 / jnp.maximum(share, 1e-6) - 1
    return jnp.clip(jnp.ceil(jnp.log2(ratio / 1.25)), 0, _DOUBLINGS).astype(jnp.int32)


def allowed_rows(mask: Bool[Array, " n"], size: int) -> Int32[Array, " size"]:
    """Row numbers of the first ``size`` true places, ascending; n where there are fewer.

    Counts groups of 64 first, so that no array longer than n / 64 is summed along.

    >>> allowed_rows(jnp.array([False, True, True]), 4).tolist()
    [1, 2, 3, 3]
    """
    n = mask.shape[0]
    groups = jnp.pad(mask, (0, -n % _GROUP)).reshape(-1, _GROUP)
    counts = jnp.sum(groups, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    place = jnp.arange(size, dtype=jnp.int32)
    group = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
    group = jnp.minimum(group, len(ends) - 1)
    rank = place - (ends - counts)[group]
    within = jnp.cumsum(groups[group], axis=1, dtype=jnp.int32) <= rank[:, None]
    rows = group * _GROUP + jnp.sum(within, axis=1, dtype=jnp.int32)
    return jnp.where(place < ends[-1], rows, n)


def allowed_store(store: Store, rows: Int32[Array, " r"]) -> Store:
    """The stored rows of some numbers; numbers beyond the last give the last."""
    rows = jnp.minimum(rows, store.rows.shape[0] - 1)
    return Store(store.rows[rows], None if store.scale is None else store.scale[rows])


def restrict_tree(
    packed: PackedTree, mask: Bool[Array, " n"]
) -> tuple[PackedTree, Float[Array, ""]]:
    """A tree whose scan sees allowed rows only, and the share of a leaf that they fill.

    Leaves without an allowed row rank last. The share is the mean number of allowed slots in
    leaves that have one, over the mean number of slots in a leaf.
    """
    rows = packed.slot_rows
    usable = mask[jnp.maximum(rows, 0)] & packed.usable[0]

    def in_leaves(slots: Array) -> Array:
        each = jnp.sum(slots.reshape(-1, packed.block), axis=1, dtype=jnp.int32)
        ends = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(each, dtype=jnp.int32)])
        return ends[packed.starts[1:]] - ends[packed.starts[:-1]]

    def mean(sizes: Array) -> Array:
        return jnp.sum(sizes) / jnp.maximum(jnp.sum(sizes > 0), 1)

    left = in_leaves(usable)
    usual = packed.leaf_offset if packed.leaf_offset.shape[0] else jnp.float32(0)
    offset = jnp.where(left > 0, usual, _LAST).astype(jnp.float32)
    share = mean(left) / jnp.maximum(mean(in_leaves(packed.usable[0])), 1)
    # Groups do not tell which of their leaves are left, so all leaves are ranked.
    return packed._replace(usable=usable[None], leaf_offset=offset, groups=None), share


def filtered_search(
    index: Index,
    mask: Bool[Array, " n"],
    *,
    leaves: int,
    rescore: int,
    probe: Callable[[PackedTree, int], Found],
    score: Callable[[Store, Array], Found],
) -> Found:
    """Search the allowed rows of a tree, inside ``jit``.

    Args:
      index: with a tree.
      mask: rows that may be returned.
      leaves: that a search among all rows would probe.
      rescore: candidates scored exactly, 0 for none.
      probe: searches a tree, probing so many leaves.
      score: searches a store exactly, where rows are marked as there.

    Returns:
      Scores and row numbers.
    """
    n, packed = index.num_rows, index.tree.packed
    mask = mask & held_rows(index)
    exact = bool(rescore) and index.store is not None
    bound = exact_bound(n)
    few = jnp.sum(mask, dtype=jnp.int32) <= bound

    def by_rows() -> Found:
        rows = allowed_rows(mask, bound)
        scores, places = score(allowed_store(index.store, rows), rows < n)
        return scores, jnp.where(places >= 0, rows[jnp.maximum(places, 0)], -1)

    def by_leaves() -> Found:
        tree, share = restrict_tree(packed, mask)
        steps = widths(leaves, index.num_leaves)
        level = jnp.minimum(_level(share), len(steps) - 1)
        if exact:
            branches = [lambda tree, count=count: probe(tree, count) for count in steps]
        else:  # without exact scores all leaves are where few rows are found
            branches = [
                lambda tree, count=count: probe(tree, count)
                for count in sorted({*steps, index.num_leaves})
            ]
            level = jnp.where(few, len(branches) - 1, level)
        return jax.lax.switch(level, branches, tree)

    if exact and bound == n:
        return by_rows()
    return jax.lax.cond(few, by_rows, by_leaves) if exact else by_leaves()


class Restricted(NamedTuple):
    """An index of allowed rows only.

    Attributes:
      part: searched in place of the whole index; without a tree where few rows are allowed.
      leaves: to be probed in it.
      rows: row number of each of its rows, or ``None`` where they are the same.
    """

    part: Index
    leaves: int
    rows: np.ndarray | None


def restrict(index: Index, allowed: np.ndarray, *, leaves: int, rescore: int) -> Restricted:
    """What :func:`filtered_search` decides, once and on the host, for many searches.

    Args:
      index: of concrete arrays.
      allowed: ``bool[n]``.
      leaves: that a search among all rows would probe.
      rescore: candidates scored exactly, 0 for none.

    Returns:
      :class:`Restricted`.
    """
    allowed = allowed & np.asarray(held_rows(index))
    count = int(np.count_nonzero(allowed))
    few = count <= exact_bound(index.num_rows)
    if index.tree is None or (few and rescore and index.store is not None):
        rows = np.flatnonzero(allowed).astype(np.int32)
        store = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[rows]), index.store)
        small = dataclasses.replace(index, tree=None, store=store, ids=None, num_rows=count)
        return Restricted(small, leaves, rows)
    tree, share = restrict_tree(index.tree.packed, jnp.asarray(allowed))
    steps = widths(leaves, index.num_leaves)
    probed = index.num_leaves if few else steps[min(int(_level(share)), len(steps) - 1)]
    return Restricted(
        dataclasses.replace(index, tree=index.tree._replace(packed=tree)), probed, None
    )
