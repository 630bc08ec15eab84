"""Building an index: partition, codebooks under the score-aware loss, codes, rescoring rows."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from avq_jax.checks import as_count, as_rows, is_traced
from avq_jax.loss import QueryTerms, Scaling, Threshold, Uniform, Weight, row_norms, scaling
from avq_jax.mips.balance import balanced_centroids, balanced_leaves
from avq_jax.mips.exact import METRICS
from avq_jax.mips.index import Index, Tree, pack_ids
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.partition import (
    anisotropic_centroids,
    check_slots,
    nearest_centroids,
    spilled_leaves,
    train_centroids,
)
from avq_jax.mips.rescoring import StoreType, check_store_type, store_rows
from avq_jax.progress import shown, steps
from avq_jax.quantization import Codebook, decode, encode, fit
from avq_jax.quantization.codebook import check_magnitude
from xla_kernels import slots_per_block

__all__ = ["build", "default_threshold"]

# Below this many rows exact scoring is as fast as anything, and below this many a scan of all
# codes, which loses no row to an unprobed leaf.
_EXACT_ROWS = 20_000
_FLAT_ROWS = 50_000
# Fewest rows that a tree and codebooks are learned from.
_LEAST_ROWS = 32
_CHUNK = 1 << 17
# Of the centroids: best of 1, 1.5, 2.5, 4 and 8 on word vectors, raw or of length 1.
_CENTROID_ETA = 2.5


def default_threshold(norms: Any, *, dim: int) -> float:
    """T = 2 / sqrt(d + 3) times the median norm, for a limit eta of about 4 in every dimension.

    By Eq. (3) eta = (d - 1) c^2 / (1 - c^2) with c = T / ||x||: 0.2 at d = 100, 0.1 at d = 384.

    >>> round(default_threshold([1.0, 1.0], dim=97), 3)
    0.2
    """
    norms = np.asarray(norms, np.float32)
    positive = norms[norms > 0]
    return 2 / math.sqrt(dim + 3) * float(np.median(positive)) if positive.size else 1.0


def build(
    key: Array,
    x: Any,
    *,
    metric: Literal["dot", "cosine", "l2"] = "dot",
    num_leaves: int | None = None,
    num_subspaces: int | None = None,
    num_codewords: int = 16,
    weight: Weight | None = None,
    ids: Any = None,
    soar_lambda: float | Literal["auto"] | None = "auto",
    balance: float | None = None,
    spherical: bool = False,
    leaves_to_search: int | None = None,
    rescore_dtype: StoreType | None = "float32",
    num_iterations: int = 10,
    sample_size: int = 100_000,
    progress: bool | None = None,
) -> Index:
    """Build an index for maximum inner product, cosine or Euclidean search.

    A k-means tree parts the rows into leaves; what its centroids leave over is product-quantized
    under the score-aware loss, whose parallel direction and scaling are those of the original
    row; the rows themselves are kept for exact rescoring. For ``"l2"`` the rows are lifted,
    q -> (q, 1) and x -> (x, -||x||^2 / 2), so that the inner product orders by distance. The last
    coordinate is kept apart as a float a row, ``<x, x - x~> - ||x||^2 / 2``, which cancels the
    parallel error.

    Args:
      key: a typed key, ``jax.random.key(seed)``; the same key gives the same index.
      x: ``[n, d]`` rows, of any real dtype.
      metric: ``"dot"``, ``"cosine"`` or ``"l2"``.
      num_leaves: L; ``None`` chooses by size: below 20,000 rows exact scoring without codes
        (unless ``num_subspaces`` is given), below 50,000 codes in one leaf, all of which are
        scanned (unless ``soar_lambda`` is given), then sqrt(n) leaves.
      num_subspaces: m, bytes a code at 16 codewords are m / 2; ``None`` takes two columns a
        subspace, four beyond 128 columns.
      num_codewords: k, 2 to 256.
      weight: of the score-aware loss, in the units of <q, x>; ``None`` takes ``Threshold(T)`` of
        :func:`default_threshold`, and ``Uniform()`` for ``"l2"``.
      ids: ``int64[n]`` ids of the rows for :func:`avq_jax.user_ids`, distinct and >= 0.
      soar_lambda: assign every row to a second leaf as well, whose residual is penalised along the
        first one by this factor (1 to 1.5); fewer leaves need searching for the same recall,
        at twice the memory of codes. ``None`` does not; ``"auto"`` is 1 from 50,000 rows on,
        except for ``"l2"``, and ``None`` below.
      balance: no leaf holds more than this multiple, above 1, of the mean number of rows (second
        copies not counted), so that no query meets a leaf that is long to scan; ``None`` leaves
        sizes as k-means makes them, which finds more in as many codes.
      spherical: k-means with centroids of length 1, for rows that differ in direction alone. As
        without, leaves are ranked by Theorem 4.2 and rows coded from the means.
      leaves_to_search: default effort of ``search``; ``None`` takes a tenth of the leaves.
      rescore_dtype: storage of the rescoring rows, ``"float32"``, ``"bfloat16"``, ``"int8"``, or
        ``None`` to keep none.
      num_iterations: most iterations of k-means and of the codebook learner.
      sample_size: rows that centroids are learned from; codebooks are from half of them.
      progress: show progress and what was chosen, sizes and memory; ``None`` does in a terminal
        or notebook.

    Returns:
      :class:`avq_jax.Index`.

    Raises:
      TypeError: sizes or ids that are not integers, a key that is not typed, a weight that is
        not callable, a traced x.
      ValueError: no rows, rows that are not finite, sizes out of range, repeated ids.

    Warns:
      UserWarning: fewer than 32 (or k) rows, which are scored exactly; more leaves than rows.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (2000, 16))
    >>> avq_jax.build(jax.random.key(1), x, num_leaves=20).num_leaves
    20

    Reference:
      Guo et al., 2020, sections 4 and 5.3.
    """
    if is_traced(x):
        raise TypeError("build is a host loop; call it outside jit, or use fit and encode inside")
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must be a typed key, jax.random.key(seed); got {_described(key)}")
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    check_store_type(rescore_dtype)
    as_count(sample_size, name="sample_size", minimum=256)
    as_count(num_iterations, name="num_iterations")
    if isinstance(soar_lambda, str):
        if soar_lambda != "auto":
            raise ValueError(f"soar_lambda must be a number, None or 'auto'; got {soar_lambda!r}")
    elif soar_lambda is not None and not 0 <= soar_lambda < math.inf:
        raise ValueError(f"soar_lambda must be None or a finite number >= 0; got {soar_lambda}")
    if balance is not None and not 1 < balance < math.inf:
        raise ValueError(f"balance must be None or a finite number above 1; got {balance}")
    if leaves_to_search is not None:
        as_count(leaves_to_search, name="leaves_to_search")
    weight = None if weight is None else _as_pytree(weight)
    x = np.asarray(as_rows(x, name="x"))
    check_magnitude(x)
    n, d = x.shape
    if isinstance(soar_lambda, str):
        soar_lambda = 1.0 if n >= _FLAT_ROWS and metric != "l2" else None
    sizes = _sizes(n, d, num_leaves, num_subspaces, num_codewords, spilled=soar_lambda is not None)
    if sizes is None and rescore_dtype is None:
        raise ValueError(
            f"rescore_dtype must not be None where rows are scored exactly, as {n} rows are here; "
            "give num_subspaces, and enough rows, to have codes"
        )
    packed = None if ids is None else jnp.asarray(pack_ids(ids, n))
    norms = np.asarray(row_norms(x))
    if metric == "cosine":
        x = x / np.where(norms > 0, norms, 1)[:, None]
        norms = (norms > 0).astype(np.float32)
    if weight is None:
        T = default_threshold(norms, dim=d)
        weight = Uniform() if metric == "l2" else Threshold(jnp.float32(T))

    tree = None
    terms = _loss_terms(weight, norms, x, metric)
    if sizes is not None:
        leaves, m = sizes
        tree = _build_tree(
            key,
            x,
            terms,
            metric=metric,
            num_leaves=leaves,
            num_subspaces=m,
            num_codewords=num_codewords,
            num_iterations=num_iterations,
            sample_size=sample_size,
            soar_lambda=soar_lambda,
            balance=balance,
            spherical=spherical,
            progress=progress,
        )
    count = 0 if tree is None else tree.centroids.shape[0]
    index = Index(
        tree=tree,
        store=None
        if rescore_dtype is None
        else store_rows(
            x, rescore_dtype, None if metric == "l2" else terms(slice(None))["scaling"]
        ),
        ids=packed,
        weight=weight,
        metric=metric,
        num_rows=n,
        dim=d,
        leaves_to_search=leaves_to_search or max(1, min(count, max(8, math.ceil(count / 10)))),
    )
    if shown(progress):
        print(f"{index}\n{index.bytes_per_row}", file=sys.stderr)
    return index


def _described(value: Any) -> str:
    return f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else repr(value)


def _as_pytree(weight: Any) -> Any:
    """Make the weight a pytree of arrays, so that it passes through ``jit`` with the index."""
    if not callable(weight):
        raise TypeError(f"weight must be callable, t -> w(t); got {weight!r}")
    if jax.tree_util.all_leaves([weight]):  # a plain function
        return jax.tree_util.Partial(weight)
    return jax.tree.map(jnp.asarray, jax.tree.map(np.float32, weight))


def _sizes(
    n: int,
    d: int,
    num_leaves: Any,
    num_subspaces: Any,
    num_codewords: Any,
    *,
    spilled: bool = False,
) -> tuple[int, int] | None:
    """Leaves and subspaces of the tree, or ``None`` where all rows are scored exactly."""
    k = as_count(num_codewords, name="num_codewords", minimum=2)
    if k > 256:
        raise ValueError(f"num_codewords must be at most 256, so that codes are bytes; got {k}")
    leaves = 1 if n < _FLAT_ROWS and not spilled else round(math.sqrt(n))
    if num_leaves is not None:
        leaves = as_count(num_leaves, name="num_leaves")
    m = math.ceil(d / 2) if d <= 128 else max(64, math.ceil(d / 4))
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


def _loss_terms(weight: Weight, norms: Any, x: Any, metric: str):
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


def _build_tree(
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
) -> Tree:
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
        ranking = anisotropic_centroids(sample, near, centroids, eta=_CENTROID_ETA)
        leaves = nearest_centroids(x, ranking) if leaves is None else leaves
        centroids = anisotropic_centroids(sample, leaves[picked], centroids, eta=1.0)
    if leaves is None:
        leaves = nearest_centroids(x, centroids)
    center = np.asarray(centroids)

    # More rows and iterations brought word vectors no recall.
    few = picked[:: -(-size // (sample_size // 2))]
    state, _ = fit(
        key_codes,
        x[few] - center[leaves[few]],
        num_subspaces=num_subspaces,
        num_codewords=num_codewords,
        num_iterations=num_iterations,
        progress=progress,
        **terms(few),
    )
    codebook = state.codebook

    if soar_lambda is None or len(center) < 2:
        codes, offset = _encode_leaves(x, leaves, center, codebook, terms, metric, progress)
        return pack_tree(centroids, leaves, codebook, codes, offset, ranking=ranking)
    vectors = centroids if ranking is None else ranking
    second = spilled_leaves(x, leaves, vectors, soar_lambda=soar_lambda)
    pairs = [
        _encode_leaves(x, each, center, codebook, terms, metric, progress)
        for each in (leaves, second)
    ]
    codes = np.stack([codes for codes, _ in pairs], axis=1)
    offset = None if metric != "l2" else np.stack([offset for _, offset in pairs], axis=1)
    both = np.stack([leaves, second], axis=1)
    return pack_tree(centroids, both, codebook, codes, offset, ranking=ranking)


def _encode_leaves(
    x: np.ndarray,
    leaves: np.ndarray,
    center: np.ndarray,
    codebook: Codebook,
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
