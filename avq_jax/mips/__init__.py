"""Sections 2 and 5.3 of the paper: the search engine."""

from avq_jax.mips.build import build, default_threshold
from avq_jax.mips.capacity import compact, held_rows, reserve
from avq_jax.mips.checkpoint import from_arrays, to_arrays
from avq_jax.mips.exact import SearchResult, brute_force
from avq_jax.mips.explain import Explanation, explain
from avq_jax.mips.index import Index, Tree, user_ids
from avq_jax.mips.io import IndexFormatError, load, save
from avq_jax.mips.rebalancing import Statistics, rebalance, statistics
from avq_jax.mips.searcher import search, searcher
from avq_jax.mips.sharded import ShardedIndex, search_sharded, shard
from avq_jax.mips.sharded_build import build_sharded
from avq_jax.mips.streaming import build_to_disk
from avq_jax.mips.tuning import Tuned, tune
from avq_jax.mips.updates import Added, add, remove, replace, row_numbers

__all__ = [
    "Added",
    "Explanation",
    "Index",
    "IndexFormatError",
    "SearchResult",
    "ShardedIndex",
    "Statistics",
    "Tree",
    "Tuned",
    "add",
    "brute_force",
    "build",
    "build_sharded",
    "build_to_disk",
    "compact",
    "default_threshold",
    "explain",
    "from_arrays",
    "held_rows",
    "load",
    "rebalance",
    "remove",
    "replace",
    "reserve",
    "row_numbers",
    "save",
    "search",
    "search_sharded",
    "searcher",
    "shard",
    "statistics",
    "to_arrays",
    "tune",
    "user_ids",
]
