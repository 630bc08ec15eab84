"""Sections 5 and 7.8 of the paper: exact search, metrics and data sets."""

from avq_jax.evaluation.datasets import (
    Dataset,
    clustered,
    glove_50d,
    read_hdf5,
    read_npy,
    split_queries,
)
from avq_jax.evaluation.images import sift_descriptors
from avq_jax.evaluation.metrics import (
    query_recalls,
    recall_1_at_n,
    recall_interval,
    recall_k_at_k,
    relative_error,
)
from avq_jax.evaluation.readers import RowFile, open_rows
from avq_jax.evaluation.writers import write_rows
from avq_jax.mips.exact import SearchResult, brute_force

__all__ = [
    "Dataset",
    "RowFile",
    "SearchResult",
    "brute_force",
    "clustered",
    "glove_50d",
    "open_rows",
    "query_recalls",
    "read_hdf5",
    "read_npy",
    "recall_1_at_n",
    "recall_interval",
    "recall_k_at_k",
    "relative_error",
    "sift_descriptors",
    "split_queries",
    "write_rows",
]
