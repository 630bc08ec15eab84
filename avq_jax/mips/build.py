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
from avq_jax.loss import Power, Threshold, Uniform, Weight, row_norms, scaling
from avq_jax.mips.exact import METRICS
from avq_jax.mips.index import Index, pack_ids
from avq_jax.mips.learning import ONE_DEVICE, Workers, as_pytree, learn_tree
from avq_jax.mips.options import TreeOptions, tree_options
from avq_jax.mips.rescoring import StoreType, check_store_type, store_rows
from avq_jax.progress import shown
from avq_jax.quantization.codebook import check_magnitude

__all__ = [
    "build",
    "build_index",
    "check_arguments",
    "default_effort",
    "default_threshold",
    "default_weight",
]


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
    scale: Literal[4, 8] | None = None,
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
      scale: 4 or 8 bits, a score-aware scale a row (:func:`avq_jax.fit_scale`) that multiplies its
        decoded residual: fewer errors for half a byte or a byte a row, codes searched twice in the
        build and a few float operations more a row in the scan. ``None`` has none.
      weight: of the score-aware loss, in the units of <q, x>; ``None`` takes ``Power(5)``, whose
        eta is 6 for rows of every norm, for ``"cosine"`` ``Threshold(T)`` of
        :func:`default_threshold`, about the same eta at norm 1, and ``Uniform()`` for ``"l2"``.
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
        ``None`` ranks all leaves; ``"auto"`` takes sqrt(L) groups from 16,384 leaves on.
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
    check_arguments(key, metric, rescore_dtype, leaves_to_search)
    weight = None if weight is None else as_pytree(weight)
    x = np.asarray(as_rows(x, name="x"))
    check_magnitude(x)
    options = tree_options(
        *x.shape,
        metric=metric,
        num_leaves=num_leaves,
        num_subspaces=num_subspaces,
        num_codewords=num_codewords,
        num_iterations=num_iterations,
        sample_size=sample_size,
        soar_lambda=soar_lambda,
        balance=balance,
        spherical=spherical,
        num_groups=num_groups,
        scanned_dim=scanned_dim,
        projection=projection,
        codec=codec,
        scale=scale,
    )
    if options is None and rescore_dtype is None:
        raise ValueError(
            "rescore_dtype must not be None where rows are scored exactly, as "
            f"{len(x)} rows are here; give num_subspaces, and enough rows, to have codes"
        )
    return build_index(
        key,
        x,
        options,
        metric=metric,
        weight=weight,
        ids=ids,
        leaves_to_search=leaves_to_search,
        rescore_dtype=rescore_dtype,
        progress=progress,
    )


def check_arguments(key: Any, metric: Any, rescore_dtype: Any, leaves_to_search: Any) -> None:
    """Check what every way of building takes, before any work."""
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must be a typed key, jax.random.key(seed); got {_described(key)}")
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    check_store_type(rescore_dtype)
    if leaves_to_search is not None:
        as_count(leaves_to_search, name="leaves_to_search")


def build_index(
    key: Array,
    x: np.ndarray,
    options: TreeOptions | None,
    *,
    metric: str,
    weight: Any,
    ids: Any,
    leaves_to_search: int | None,
    rescore_dtype: StoreType | None,
    workers: Workers = ONE_DEVICE,
    progress: bool | None = False,
) -> Index:
    """The index of checked rows, on one device or shared out.

    Args:
      key: as of :func:`build`.
      x: ``[n, d]`` rows.
      options: of the tree; ``None`` scores all rows exactly.
      metric: as of :func:`build`.
      weight: a pytree, or ``None`` for the default.
      ids: as of :func:`build`.
      leaves_to_search: as of :func:`build`.
      rescore_dtype: as of :func:`build`.
      workers: what runs the steps that go through all rows.
      progress: as of :func:`build`.

    Returns:
      :class:`avq_jax.Index`.
    """
    n, d = x.shape
    packed = None if ids is None else jnp.asarray(pack_ids(ids, n))
    norms = np.asarray(row_norms(x))
    if metric == "cosine":
        x = x / np.where(norms > 0, norms, 1)[:, None]
        norms = (norms > 0).astype(np.float32)
    if weight is None:
        weight = default_weight(metric, dim=d)
    tree = None
    if options is not None:
        tree = learn_tree(
            key, x, norms, weight, options, metric=metric, workers=workers, progress=progress
        )
    store = None
    if rescore_dtype is not None:
        each = None
        if metric != "l2":
            each = jax.tree.map(np.asarray, scaling(weight, norms, dim=d))
        store = store_rows(x, rescore_dtype, each)
    index = Index(
        tree=tree,
        store=store,
        ids=packed,
        weight=weight,
        metric=metric,
        num_rows=n,
        dim=d,
        leaves_to_search=leaves_to_search
        or default_effort(0 if tree is None else tree.centroids.shape[0]),
    )
    if shown(progress):
        print(f"{index}\n{index.bytes_per_row}", file=sys.stderr)
    return index


def default_weight(metric: str, *, dim: int) -> Weight:
    """What ``weight=None`` is: an eta near 6 for the rows that win, whatever their norms.

    Unit rows: ``Threshold`` with the default T. Raw rows: a T that suits the median row is low for
    the long rows that win, whose eta then falls to 1, and one that suits those gives the others no
    weight; ``Power(5)`` has the eta of 6 for every norm, and weights rows by their fifth power
    (``benchmarks/bench_weights.py`` has both). Lifted rows of Euclidean search: ``Uniform()``.
    """
    if metric == "l2":
        return Uniform()
    if metric == "dot":
        return Power(jnp.float32(5))
    return Threshold(jnp.float32(default_threshold(np.ones(1), dim=dim)))


def default_effort(num_leaves: int) -> int:
    """A tenth of the leaves, and eight at least where there are so many."""
    return max(1, min(num_leaves, max(8, math.ceil(num_leaves / 10))))


def _described(value: Any) -> str:
    return f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else repr(value)
