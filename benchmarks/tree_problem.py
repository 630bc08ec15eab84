"""A tree of random codes, for timing kernels."""

from typing import Any, NamedTuple

import jax
import numpy as np

from xla_kernels import PackedTree, pack_tree, slots_per_block, tree_search
from xla_kernels.tree_search import pallas
from xla_kernels.tree_search.effort import effort_of


class Problem(NamedTuple):
    """A tree whose leaves are equally large."""

    tree: PackedTree

    def search(self, queries, probed: int, name: str, sizes: Any = None, k: int = 10):
        """Best rows by estimate, by a kernel with sizes of its own."""
        if not name.startswith("pallas"):
            options = {"k": k, "leaves_to_search": probed, "implementation": name}
            return tree_search(self.tree, queries, **options)
        effort = effort_of(
            self.tree, None, k=k, leaves_to_search=probed, rescore=0, deviations=None, retrieve=None
        )
        kernel = pallas.Kernel(name, 0.95, sizes, False)
        nothing = (None,) * 4
        return pallas.tree_search(
            self.tree, queries, *nothing, effort=effort, euclidean=False, kernel=kernel
        )


def make(n: int, leaves: int, m: int, k: int, s: int) -> Problem:
    """A tree of n rows, whole blocks a leaf, with m codes of k words of s columns."""
    rng, size = np.random.default_rng(0), slots_per_block(k)
    blocks = -(-n // (leaves * size))
    slots = blocks * leaves * size
    rows = np.arange(slots, dtype=np.int32)
    return Problem(
        jax.device_put(
            pack_tree(
                rng.standard_normal((leaves, m * s)),
                np.arange(leaves + 1) * blocks,
                np.where(rows < n, rows, -1),
                rng.standard_normal((m, k, s)) / 4,
                rng.integers(0, k, (slots, m)).astype(np.uint8),
            )
        )
    )
