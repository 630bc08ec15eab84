"""Building an index: partition, codebooks under the score-aware loss, codes, rescoring rows."""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from avq_jax.checks import as_count, as_rows, is_traced
from avq_jax.loss import Threshold, Uniform, Weight, row_norms
from avq_jax.mips.exact import METRICS
from avq_jax.mips.index import Index, pack_ids
from avq_jax.mips.learning import (
    FLAT_ROWS,
    as_pytree,
    build_tree,
    group_count,
    loss_terms,
    scanned_terms,
    tree_sizes,
)
from avq_jax.mips.projection import METHODS, learn_projection
from avq_jax.mips.rescoring import StoreType, check_store_type, store_rows
from avq_jax.progress import shown
from avq_jax.quantization.codebook import check_magnitude

__all__ = ["build", "default_threshold"]


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
    codec: Literal["product", "additive"] = "product",
    weight: Weight | None = None,
    ids: Any = None,
    soar_lambda: float | Literal["auto"] | None = "auto",
    balance: float | None = None,
    spherical: bool = False,
    num_groups: int | Literal["auto"] | None = "auto",
    scanned_dim: int | None = None,
    projection: Literal["pca", "prefix"] = "pca",
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
      codec: ``"product"``, or ``"additive"``, codes that are the sum of m full-width words: fewer
        errors in as many bytes and the same scan, for a wider table (``m k d`` products a query)
        and a build that takes two to three times as long. ``num_subspaces`` is then the number of
        codebooks; ``None`` takes half as many as of product codes, for half the memory, and recall
        between that of product codes of as many bytes and of twice as many.
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
      num_groups: G groups of neighbouring leaves, an upper level of the tree: a query ranks the
        groups, and then the leaves of the best of them, sixteen times as many as it probes.
        ``None`` ranks all leaves; ``"auto"`` takes sqrt(L) groups from 4,096 leaves on.
      scanned_dim: p; leaves and codes are of a projection of the rows to p dimensions, which makes
        ranking and scanning cheaper and codes finer, while rescoring has the whole rows. Rows are
        lengthened inside the projection such that the score-aware loss is that of the whole rows.
        ``None`` takes d.
      projection: ``"pca"``, principal axes, or ``"prefix"``, the first p coordinates, for
        embeddings trained to be cut short (Matryoshka).
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
    if not isinstance(codec, str) or codec not in ("product", "additive"):
        raise ValueError(f"codec must be 'product' or 'additive'; got {codec!r}")
    if not isinstance(projection, str) or projection not in METHODS:
        raise ValueError(f"projection must be one of {', '.join(METHODS)}; got {projection!r}")
    weight = None if weight is None else as_pytree(weight)
    x = np.asarray(as_rows(x, name="x"))
    check_magnitude(x)
    n, d = x.shape
    if isinstance(soar_lambda, str):
        soar_lambda = 1.0 if n >= FLAT_ROWS and metric != "l2" else None
    width = d if scanned_dim is None else as_count(scanned_dim, name="scanned_dim")
    if width > d:
        raise ValueError(f"scanned_dim must be at most the width of x, {d}; got {width}")
    sizes = tree_sizes(
        n,
        width,
        num_leaves,
        num_subspaces,
        num_codewords,
        spilled=soar_lambda is not None,
        codec=codec,
    )
    num_groups = group_count(num_groups, 0 if sizes is None else sizes[0])
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
    terms = loss_terms(weight, norms, x, metric)
    if sizes is not None:
        leaves, m = sizes
        axes = None
        if scanned_dim is not None:
            some = x[:: -(-n // sample_size)]
            axes = learn_projection(some, width, method=projection, centered=metric == "l2")
        seen, seen_terms = scanned_terms(axes, width, weight, norms, x, metric=metric)
        tree = build_tree(
            key,
            seen,
            seen_terms,
            metric=metric,
            num_leaves=leaves,
            num_subspaces=m,
            num_codewords=num_codewords,
            num_iterations=num_iterations,
            sample_size=sample_size,
            soar_lambda=soar_lambda,
            balance=balance,
            spherical=spherical,
            num_groups=num_groups,
            codec=codec,
            progress=progress,
        )._replace(projection=axes)
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
