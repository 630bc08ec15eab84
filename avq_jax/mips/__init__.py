"""Sections 2 and 5.3 of the paper: the search engine."""

from avq_jax.mips.build import build, default_threshold
from avq_jax.mips.exact import SearchResult, brute_force
from avq_jax.mips.explain import Explanation, explain
from avq_jax.mips.index import Index, Tree, user_ids
from avq_jax.mips.io import IndexFormatError, load, save
from avq_jax.mips.searcher import search, searcher
from avq_jax.mips.tuning import Tuned, tune

__all__ = [
    "Explanation",
    "Index",
    "IndexFormatError",
    "SearchResult",
    "Tree",
    "Tuned",
    "brute_force",
    "build",
    "default_threshold",
    "explain",
    "load",
    "save",
    "search",
    "searcher",
    "tune",
    "user_ids",
]
