"""What every way of building shares: sizes, the loss of rows, the tree, the codes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from avq_jax.checks import as_count
from avq_jax.loss import QueryTerms, Scaling, Weight, row_norms, scaling
from avq_jax.mips.balance import balanced_centroids, balanced_leaves
from avq_jax.mips.index import Tree
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.partition import (
    anisotropic_centroids,
    check_slots,
    leaf_groups,
    nearest_centroids,
    spilled_leaves,
    train_centroids,
)
from avq_jax.mips.projection import scanned_rows
from avq_jax.progress import steps
from avq_jax.quantization import (
    AdditiveCodebook,
    Codebook,
    decode,
    encode,
    fit,
    fit_additive,
)
from xla_kernels import slots_per_block

__all__ = [
    "CENTROID_ETA",
    "FLAT_ROWS",
    "as_pytree",
    "build_tree",
    "encode_leaves",
    "group_count",
    "loss_terms",
    "scanned_terms",
    "tree_sizes",
]

# Below this many rows exact scoring is as fast as anything, and below this many a scan of all
# codes, which loses no row to an unprobed leaf.
_EXACT_ROWS = 20_000
FLAT_ROWS = 50_000
# From so many leaves on ranking them all takes longer than groups lose.
_GROUPED_LEAVES = 4096
# Fewest rows that a tree and codebooks are learned from.
_LEAST_ROWS = 32
_CHUNK = 1 << 17
# Of the search for additive codes, which takes most of a build.
_ROUNDS = 16
# Of the centroids: best of 1, 1.5, 2.5, 4 and 8 on word vectors, raw or of length 1.
CENTROID_ETA = 2.5


def as_pytree(weight: Any) -> Any:
    """Make the weight a pytree of arrays, so that it passes through ``jit`` with the index."""
    if not callable(weight):
        raise TypeError(f"weight must be callable, t -> w(t); got {weight!r}")
    if jax.tree_util.all_leaves([weight]):  # a plain function
        return jax.tree_util.Partial(weight)
    return jax.tree.map(jnp.asarray, jax.tree.map(np.float32, weight))


def tree_sizes(
    n: int,
    d: int,
    num_leaves: Any,
    num_subspaces: Any,
    num_codewords: Any,
    *,
    spilled: bool = False,
    codec: str = "product",
) -> tuple[int, int] | None:
    """Leaves and subspaces of the tree, or ``None`` where all rows are scored exactly."""
    k = as_count(num_codewords, name="num_codewords", minimum=2)
    if k > 256:
        raise ValueError(f"num_codewords must be at most 256, so that codes are bytes; got {k}")
    leaves = 1 if n < FLAT_ROWS and not spilled else round(math.sqrt(n))
    if num_leaves is not None:
        leaves = as_count(num_leaves, name="num_leaves")
    m = math.ceil(d / 2) if d <= 128 else max(64, math.ceil(d / 4))
    if codec == "additive":
        m = math.ceil(m / 2)
    if num_subspaces is not None:
        m = as_count(num_subspaces, name="num_subspaces")
        if m > d:
            raise ValueError(f"num_subspaces must be at most the width of x, {d}; got {m}")
    if n < max(k, _LEAST_ROWS):
        warnings.warn(
            f"{n} rows are too few to learn {k} codewords a subspace from; "
            "the index scores all rows exactly",
            stacklevel=3,
        )
        return None
    if num_leaves is None and num_subspaces is None and n < _EXACT_ROWS:
        return None
    if leaves > n:
        warnings.warn(
            f"num_leaves = {leaves} is more than the {n} rows; using {n // 32 or 1}", stacklevel=3
        )
        leaves = n // 32 or 1
    check_slots(n + slots_per_block(k) * leaves)
    return leaves, m


def group_count(num_groups: Any, leaves: int) -> int | None:
    """Groups of so many leaves: the number asked for, or by ``"auto"`` sqrt(L) of very many.

    Raises:
      ValueError: more groups than leaves, another word than ``"auto"``.

    >>> group_count("auto", 1000), group_count("auto", 10_000), group_count(5, 1000)
    (None, 100, 5)
    """
    if isinstance(num_groups, str):
        if num_groups != "auto":
            raise ValueError(f"num_groups must be a number, None or 'auto'; got {num_groups!r}")
        return round(math.sqrt(leaves)) if leaves >= _GROUPED_LEAVES else None
    if num_groups is not None and as_count(num_groups, name="num_groups") > leaves:
        raise ValueError(
            f"num_groups must be at most the number of leaves, {leaves}; got {num_groups}"
        )
    return num_groups


def loss_terms(weight: Weight, norms: Any, x: Any, metric: str):
    """Make a function from row numbers to what ``fit`` and ``encode`` need of those rows."""
    d = x.shape[1]
    if metric != "l2":
        each = jax.tree.map(np.asarray, scaling(weight, norms, dim=d))
        return lambda i: {"scaling": Scaling(*(a[i] for a in each)), "direction": x[i]}
    # The lifted row (x, -||x||^2 / 2). Its last coordinate is not quantized, so only the first
    # d coordinates of the direction meet a residual: Theorem 3.2 with a direction shorter than 1.
    half = 0.5 * norms.astype(np.float64) ** 2
    lifted = np.hypot(norms, half)
    each = jax.tree.map(np.asarray, scaling(weight, lifted.astype(np.float32), dim=d + 1))
    extra_weight = each.parallel - each.orthogonal

    def terms(i):
        plain = Scaling(each.orthogonal[i], each.orthogonal[i])
        if not np.any(extra_weight):
            return {"scaling": plain}
        u = x[i] / np.maximum(lifted[i], np.finfo(np.float32).tiny)[:, None]
        u = u.astype(np.float32)[:, None, :]
        return {"scaling": plain, "extra": QueryTerms(u, extra_weight[i][:, None])}

    return terms


def scanned_terms(
    projection: Any, width: int, weight: Weight, norms: Any, x: np.ndarray, *, metric: str
):
    """Rows as a tree of this projection quantizes them, and :func:`loss_terms` of those."""
    if projection is None and width == x.shape[1]:
        return x, loss_terms(weight, norms, x, metric)
    if metric == "l2":
        seen = np.asarray(scanned_rows(projection, width, x, None).rows)
        return seen, loss_terms(weight, np.asarray(row_norms(seen)), seen, metric)
    found = scanned_rows(projection, width, x, scaling(weight, norms, dim=x.shape[1]))
    seen, each = jax.tree.map(np.asarray, found)
    return seen, lambda i: {"scaling": Scaling(*(a[i] for a in each)), "direction": seen[i]}


def build_tree(
    key: Array,
    x: np.ndarray,
    terms: Any,
    *,
    metric: str,
    num_leaves: int,
    num_subspaces: int,
    num_codewords: int,
    num_iterations: int,
    sample_size: int,
    soar_lambda: float | None,
    progress: bool | None,
    balance: float | None = None,
    spherical: bool = False,
    num_groups: int | None = None,
    codec: str = "product",
) -> Tree:
    """Leaves, codebook and codes of all rows; the arguments are those of :func:`avq_jax.build`.

    Args:
      key: a typed key.
      x: ``[n, d]`` rows as they are quantized, of length 1 for ``"cosine"``.
      terms: from :func:`loss_terms`, or :func:`scanned_terms`.
      metric: as of ``build``.
      num_leaves: L.
      num_subspaces: m.
      num_codewords: k.
      num_iterations: most iterations of k-means and of the codebook learner.
      sample_size: rows that centroids are learned from.
      soar_lambda: of second copies, ``None`` for none.
      progress: as of ``build``.
      balance: as of ``build``.
      spherical: as of ``build``.
      num_groups: as of ``build``.
      codec: as of ``build``.

    Returns:
      :class:`avq_jax.mips.Tree`.
    """
    n = x.shape[0]
    key_sample, key_tree, key_codes = jax.random.split(key, 3)
    size = min(n, max(sample_size, 32 * num_leaves))
    picked = np.sort(np.asarray(jax.random.choice(key_sample, n, (size,), replace=False)))
    sample = jnp.asarray(x[picked])
    centroids = train_centroids(
        key_tree,
        sample,
        num_leaves=num_leaves,
        num_iterations=num_iterations,
        spherical=spherical,
        progress=progress,
    )
    leaves = ranking = None
    if balance is not None:
        centroids, prices = balanced_centroids(
            sample, centroids, balance=balance, progress=progress
        )
        leaves = balanced_leaves(x, centroids, prices, balance=balance)
    if metric != "l2" and num_leaves > 1:
        # Ranks leaves better. Residuals are coded from the means, which leaves less to code.
        near = nearest_centroids(sample, centroids) if leaves is None else leaves[picked]
        ranking = anisotropic_centroids(sample, near, centroids, eta=CENTROID_ETA)
    groups = None
    if num_groups is not None:
        groups, order = leaf_groups(
            jax.random.fold_in(key_tree, 1),
            centroids if ranking is None else ranking,
            num_groups=num_groups,
            eta=1.0 if metric == "l2" else CENTROID_ETA,
        )
        centroids = centroids[order]
        ranking = None if ranking is None else ranking[order]
        leaves = None if leaves is None else np.argsort(order).astype(np.int32)[leaves]
    if ranking is not None:
        leaves = nearest_centroids(x, ranking) if leaves is None else leaves
        centroids = anisotropic_centroids(sample, leaves[picked], centroids, eta=1.0)
    if leaves is None:
        leaves = nearest_centroids(x, centroids)
    center = np.asarray(centroids)

    # More rows and iterations brought word vectors no recall.
    few = picked[:: -(-size // (sample_size // 2))]
    sizes: Any = {"num_codewords": num_codewords, "num_iterations": num_iterations}
    residual = x[few] - center[leaves[few]]
    codebook: Codebook | AdditiveCodebook
    if codec == "additive":
        codebook, _ = fit_additive(
            key_codes,
            residual,
            num_codebooks=num_subspaces,
            num_rounds=_ROUNDS,
            progress=progress,
            **sizes,
            **terms(few),
        )
    else:
        state, _ = fit(
            key_codes,
            residual,
            num_subspaces=num_subspaces,
            progress=progress,
            **sizes,
            **terms(few),
        )
        codebook = state.codebook

    if soar_lambda is None or len(center) < 2:
        codes, offset = encode_leaves(x, leaves, center, codebook, terms, metric, progress)
        return pack_tree(centroids, leaves, codebook, codes, offset, ranking=ranking, groups=groups)
    vectors = centroids if ranking is None else ranking
    second = spilled_leaves(x, leaves, vectors, soar_lambda=soar_lambda)
    pairs = [
        encode_leaves(x, each, center, codebook, terms, metric, progress)
        for each in (leaves, second)
    ]
    codes = np.stack([codes for codes, _ in pairs], axis=1)
    offset = None if metric != "l2" else np.stack([offset for _, offset in pairs], axis=1)
    both = np.stack([leaves, second], axis=1)
    return pack_tree(centroids, both, codebook, codes, offset, ranking=ranking, groups=groups)


def encode_leaves(
    x: np.ndarray,
    leaves: np.ndarray,
    center: np.ndarray,
    codebook: Codebook | AdditiveCodebook,
    terms: Any,
    metric: str,
    progress: bool | None,
) -> tuple[np.ndarray, Any]:
    """Codes of all residuals and, for L2, the offset of each row."""
    n = x.shape[0]
    codes = np.empty((n, codebook.num_subspaces), np.uint8)
    offset = np.empty(n, np.float32) if metric == "l2" else None
    starts = range(0, n, _CHUNK)
    for step in steps(len(starts), "encoding", progress):
        # The last chunk overlaps the one before, so that one compiled shape serves all.
        start = max(0, min(starts[step], n - _CHUNK))
        i = np.arange(start, min(n, start + _CHUNK))
        residual = x[i] - center[leaves[i]]
        part = encode(codebook, residual, **terms(i))
        codes[i] = part.codes
        if offset is not None:
            left = residual - np.asarray(decode(codebook, part))
            offset[i] = np.sum(x[i] * left, axis=1) - 0.5 * np.sum(x[i] * x[i], axis=1)
    return codes, offset
