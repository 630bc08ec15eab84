"""What every way of building shares: the loss of rows, the tree, the codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avq_jax.loss import QueryTerms, Scaling, Weight, row_norms, scaling
from avq_jax.mips.balance import balanced_centroids, balanced_leaves
from avq_jax.mips.index import Tree
from avq_jax.mips.options import TreeOptions
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.partition import (
    anisotropic_centroids,
    assign_first,
    assign_second,
    k_means_step,
    leaf_groups,
    nearest_centroids,
    spilled_leaves,
    train_centroids,
)
from avq_jax.mips.projection import learn_projection, scanned_rows
from avq_jax.progress import steps
from avq_jax.quantization import (
    AdditiveCodebook,
    Codebook,
    Codes,
    Scaled,
    decode,
    encode,
    fit,
    fit_additive,
    fit_scale,
)
from avq_jax.quantization.additive import even_chunk
from avq_jax.quantization.scale import level_numbers

__all__ = [
    "CENTROID_ETA",
    "ONE_DEVICE",
    "Encoded",
    "TreeCodec",
    "Workers",
    "as_pytree",
    "build_tree",
    "encode_leaves",
    "learn_tree",
    "loss_terms",
    "row_leaves",
    "scanned_terms",
]

_CHUNK = 1 << 17
# Of the search for additive codes, which takes most of a build.
_ROUNDS = 16
# Of the centroids: best of 1, 1.5, 2.5, 4 and 8 on word vectors, raw or of length 1.
CENTROID_ETA = 2.5


TreeCodec = Codebook | AdditiveCodebook | Scaled


def row_codes(codec: TreeCodec, x: Any, terms: dict[str, Any]) -> tuple[Any, Any]:
    """Codes ``uint8[n, m]`` of rows under what :func:`loss_terms` gives of them.

    With them ``uint8[n]`` numbers of their gains, or ``None``.
    """
    found = encode(codec, x, **terms)
    return found.codes, level_numbers(codec, found.gain) if isinstance(codec, Scaled) else None


class Encoded(NamedTuple):
    """Rows as files and :func:`avq_jax.mips.packing.pack_tree` have them, an axis more for copies.

    Attributes:
      codes: ``uint8[n, m]`` or ``[n, c, m]``.
      offset: ``float32[n]`` or ``[n, c]`` for L2, else ``None``.
      gains: ``uint8[n]`` or ``[n, c]`` numbers of levels of a scale, or ``None``.
    """

    codes: np.ndarray
    offset: np.ndarray | None
    gains: np.ndarray | None


class Workers(NamedTuple):
    """The steps of a build that go through all rows, and how many devices share these out.

    Attributes:
      k_means_step: of :mod:`avq_jax.mips.partition`.
      assign: rows and centroids to the nearest ones, likewise.
      assign_second: rows, their first leaves, centroids and lambda to second leaves, likewise.
      codes: :func:`row_codes`.
      fit: :func:`avq_jax.fit`.
      devices: samples are cut to a multiple of so many rows.
    """

    k_means_step: Callable[..., Any]
    assign: Callable[..., Any]
    assign_second: Callable[..., Any]
    codes: Callable[..., Any]
    fit: Callable[..., Any]
    devices: int = 1


ONE_DEVICE = Workers(k_means_step, assign_first, assign_second, row_codes, fit)


def as_pytree(weight: Any) -> Any:
    """Make the weight a pytree of arrays, so that it passes through ``jit`` with the index."""
    if not callable(weight):
        raise TypeError(f"weight must be callable, t -> w(t); got {weight!r}")
    if jax.tree_util.all_leaves([weight]):  # a plain function
        return jax.tree_util.Partial(weight)
    return jax.tree.map(jnp.asarray, jax.tree.map(np.float32, weight))


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


def learn_tree(
    key: Array,
    x: np.ndarray,
    norms: Any,
    weight: Weight,
    options: TreeOptions,
    *,
    metric: str,
    workers: Workers = ONE_DEVICE,
    progress: bool | None,
) -> Tree:
    """The projection of the options, and :func:`build_tree` of the rows under it.

    Args:
      key: a typed key.
      x: ``[n, d]`` rows, of length 1 for ``"cosine"``.
      norms: ``[n]`` their norms.
      weight: of the score-aware loss.
      options: sizes and the rest.
      metric: as of ``build``.
      workers: what runs the steps that go through all rows.
      progress: as of ``build``.

    Returns:
      :class:`avq_jax.mips.Tree`.
    """
    n, width = x.shape
    axes = None
    if options.scanned_dim is not None:
        width = options.scanned_dim
        some = x[:: -(-n // options.sample_size)]
        axes = learn_projection(some, width, method=options.projection, centered=metric == "l2")
    seen, terms = scanned_terms(axes, width, weight, norms, x, metric=metric)
    tree = build_tree(key, seen, terms, options, metric=metric, workers=workers, progress=progress)
    return tree._replace(projection=axes)


def build_tree(
    key: Array,
    x: np.ndarray,
    terms: Any,
    options: TreeOptions,
    *,
    metric: str,
    workers: Workers = ONE_DEVICE,
    progress: bool | None,
) -> Tree:
    """Leaves, codebook and codes of all rows.

    Args:
      key: a typed key.
      x: ``[n, p]`` rows as they are quantized, of length 1 for ``"cosine"``.
      terms: from :func:`loss_terms`, or :func:`scanned_terms`.
      options: sizes and the rest; rows are taken as projected already.
      metric: as of ``build``.
      workers: what runs the steps that go through all rows.
      progress: as of ``build``.

    Returns:
      :class:`avq_jax.mips.Tree`.
    """
    n, num_leaves, balance = x.shape[0], options.num_leaves, options.balance
    key_sample, key_tree, key_codes = jax.random.split(key, 3)
    size = min(n, max(options.sample_size, 32 * num_leaves))
    picked = np.sort(np.asarray(jax.random.choice(key_sample, n, (size,), replace=False)))
    picked = picked[: size - size % workers.devices]
    sample = jnp.asarray(x[picked])
    centroids = train_centroids(
        key_tree,
        sample,
        num_leaves=num_leaves,
        num_iterations=options.num_iterations,
        spherical=options.spherical,
        progress=progress,
        step=workers.k_means_step,
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
    if options.num_groups is not None:
        groups, order = leaf_groups(
            jax.random.fold_in(key_tree, 1),
            centroids if ranking is None else ranking,
            num_groups=options.num_groups,
            eta=1.0 if metric == "l2" else CENTROID_ETA,
        )
        centroids = centroids[order]
        ranking = None if ranking is None else ranking[order]
        leaves = None if leaves is None else np.argsort(order).astype(np.int32)[leaves]
    vectors = centroids if ranking is None else ranking
    if leaves is None:
        leaves = nearest_centroids(x, vectors, assign=workers.assign)
    if ranking is not None:
        centroids = anisotropic_centroids(sample, leaves[picked], centroids, eta=1.0)
    center = np.asarray(centroids)

    # More rows and iterations brought word vectors no recall.
    few = picked[:: -(-size // (options.sample_size // 2))]
    few = few[: len(few) - len(few) % workers.devices]
    residual, m = x[few] - center[leaves[few]], options.num_subspaces
    learner: Any = {
        "num_codewords": options.num_codewords, "num_iterations": options.num_iterations,
        "progress": progress, **terms(few),
    }  # fmt: skip
    codebook: Any
    if options.codec == "additive":
        codebook, _ = fit_additive(
            key_codes, residual, num_codebooks=m, num_rounds=_ROUNDS, **learner
        )
    else:
        state, _ = workers.fit(key_codes, residual, num_subspaces=m, **learner)
        codebook = state.codebook
    codec: TreeCodec = codebook
    if options.scale is not None:
        codec = fit_scale(codebook, residual, bits=options.scale, **terms(few))

    if options.soar_lambda is not None and len(center) > 1:
        leaves = _with_second(x, leaves, vectors, options.soar_lambda, workers)
    found = encode_leaves(x, leaves, center, codec, terms, metric, progress, codes=workers.codes)
    return pack_tree(
        centroids, leaves, codec, found.codes, found.offset,
        gains=found.gains, ranking=ranking, groups=groups,
    )  # fmt: skip


def _with_second(
    x: Any, leaves: np.ndarray, vectors: Any, soar_lambda: float, workers: Workers
) -> np.ndarray:
    second = spilled_leaves(
        x, leaves, vectors, soar_lambda=soar_lambda, assign=workers.assign_second
    )
    return np.stack([leaves, second], axis=1)


def row_leaves(x: Any, vectors: Float[Array, "L d"], soar_lambda: float | None) -> np.ndarray:
    """Leaf of every row, ``int32[n]``, or both leaves ``[n, 2]``, by the vectors that rank them."""
    leaves = nearest_centroids(x, vectors)
    if soar_lambda is None or vectors.shape[0] < 2:
        return leaves
    return _with_second(x, leaves, vectors, soar_lambda, ONE_DEVICE)


def encode_leaves(
    x: np.ndarray,
    leaves: np.ndarray,
    center: np.ndarray,
    codec: TreeCodec,
    terms: Any,
    metric: str,
    progress: bool | None,
    *,
    codes: Callable[..., Any] = row_codes,
) -> Encoded:
    """Codes of the residuals of rows in their leaves and, for L2, offsets.

    Args:
      x: ``[n, p]`` rows as they are quantized.
      leaves: ``int32[n]``, or ``[n, c]`` of c copies.
      center: ``[L, p]``.
      codec: of the residuals.
      terms: from :func:`loss_terms`, or :func:`scanned_terms`.
      metric: as of ``build``.
      progress: as of ``build``.
      codes: of :class:`Workers`.

    Returns:
      :class:`Encoded`.
    """
    if leaves.ndim == 2:
        each = [
            encode_leaves(x, copy, center, codec, terms, metric, progress, codes=codes)
            for copy in leaves.T
        ]
        return jax.tree.map(lambda *copies: np.stack(copies, axis=1), *each)
    n = x.shape[0]
    found = np.empty((n, codec.num_subspaces), np.uint8)
    gains = np.empty(n, np.uint8) if isinstance(codec, Scaled) else None
    offset = np.empty(n, np.float32) if metric == "l2" else None
    size = max(1, even_chunk(n, _CHUNK))
    starts = range(0, n, size)
    for step in steps(len(starts), "encoding", progress):
        # The last chunk overlaps the one before, so that one compiled shape serves all.
        start = max(0, min(starts[step], n - size))
        i = np.arange(start, min(n, start + size))
        residual = x[i] - center[leaves[i]]
        found[i], level = codes(codec, residual, terms(i))
        scale = None
        if gains is not None and isinstance(codec, Scaled):
            gains[i], scale = level, jnp.asarray(codec.levels)[jnp.asarray(level, jnp.int32)]
        if offset is not None:
            left = residual - np.asarray(decode(codec, Codes(jnp.asarray(found[i]), scale)))
            offset[i] = np.sum(x[i] * left, axis=1) - 0.5 * np.sum(x[i] * x[i], axis=1)
    return Encoded(found, offset, gains)
