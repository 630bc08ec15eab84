"""Building an index with the rows shared out over devices: partition, learn and encode."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from avq_jax.checks import as_count, as_rows
from avq_jax.loss import Threshold, Uniform, Weight, row_norms
from avq_jax.mips.build import default_threshold
from avq_jax.mips.index import Index, pack_ids
from avq_jax.mips.learning import CENTROID_ETA, as_pytree, loss_terms, tree_sizes
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.partition import (
    _assign,
    anisotropic_centroids,
    k_means_step,
    nearest_centroids,
)
from avq_jax.mips.rescoring import StoreType, check_store_type, store_rows
from avq_jax.quantization import Codebook, decode, encode
from avq_jax.quantization.codebook import check_magnitude
from avq_jax.quantization.sharded import fit_sharded

__all__ = ["build_sharded"]

_ROWS_PER_DEVICE = 1 << 15


@functools.partial(jax.jit, static_argnums=(2, 3))
def _k_means(x: Array, centroids: Array, mesh: Mesh, axis: str) -> tuple[Array, Array]:
    whole = PartitionSpec()
    return jax.shard_map(
        lambda x, c: k_means_step(x, c, axis),
        mesh=mesh,
        in_specs=(PartitionSpec(axis), whole),
        out_specs=(whole, whole),
        check_vma=False,
    )(x, centroids)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _leaves(x: Array, centroids: Array, mesh: Mesh, axis: str) -> Array:
    shared = PartitionSpec(axis)
    return jax.shard_map(
        _assign, mesh=mesh, in_specs=(shared, PartitionSpec()), out_specs=shared, check_vma=False
    )(x, centroids)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _codes(book: Codebook, residual: Array, terms: Any, mesh: Mesh, axis: str) -> Array:
    shared = PartitionSpec(axis)
    return jax.shard_map(
        lambda book, residual, terms: encode(book, residual, **terms).codes,
        mesh=mesh,
        in_specs=(PartitionSpec(), shared, shared),
        out_specs=shared,
        check_vma=False,
    )(book, residual, terms)


def build_sharded(
    key: Array,
    x: Any,
    *,
    mesh: Mesh,
    axis: str,
    metric: Literal["dot", "cosine", "l2"] = "dot",
    num_leaves: int | None = None,
    num_subspaces: int | None = None,
    num_codewords: int = 16,
    weight: Weight | None = None,
    ids: Any = None,
    leaves_to_search: int | None = None,
    rescore_dtype: StoreType | None = "float32",
    num_iterations: int = 12,
    sample_size: int = 100_000,
) -> Index:
    """Build the index of :func:`avq_jax.build`, k-means, codebooks and codes over a mesh axis.

    Centroids are added up by ``psum`` and codebooks by :func:`avq_jax.fit_sharded`; rows are
    assigned and encoded where they lie. The index is that of ``build`` up to the order of float
    sums, as long as the sample is a multiple of the devices (else it is cut to one).

    Args:
      key: as of :func:`avq_jax.build`.
      x: as of :func:`avq_jax.build`, on the host.
      mesh: of devices.
      axis: its axis over which rows are shared out.
      metric: as of :func:`avq_jax.build`.
      num_leaves: as of :func:`avq_jax.build`; ``None`` takes sqrt(n).
      num_subspaces: as of :func:`avq_jax.build`.
      num_codewords: as of :func:`avq_jax.build`.
      weight: as of :func:`avq_jax.build`.
      ids: as of :func:`avq_jax.build`.
      leaves_to_search: as of :func:`avq_jax.build`.
      rescore_dtype: as of :func:`avq_jax.build`.
      num_iterations: as of :func:`avq_jax.build`.
      sample_size: as of :func:`avq_jax.build`.

    Returns:
      :class:`avq_jax.Index`, for :func:`avq_jax.shard` or any other use.

    Raises:
      ValueError: as of :func:`avq_jax.build`; too few rows to learn codes from.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (2000, 16))
    >>> mesh = jax.make_mesh((1,), ("rows",))
    >>> build_sharded(jax.random.key(1), x, mesh=mesh, axis="rows", num_leaves=20).num_leaves
    20
    """
    check_store_type(rescore_dtype)
    as_count(num_iterations, name="num_iterations")
    if axis not in mesh.shape:
        raise ValueError(f"axis must be one of {tuple(mesh.shape)}; got {axis!r}")
    x = np.asarray(as_rows(x, name="x"))
    check_magnitude(x)
    n, d = x.shape
    sizes = tree_sizes(
        n, d, num_leaves or max(1, round(math.sqrt(n))), num_subspaces, num_codewords
    )
    if sizes is None:
        raise ValueError(f"x has {n} rows, too few to learn codes from; use build")
    leaves, m = sizes
    words = None if ids is None else jnp.asarray(pack_ids(ids, n))
    norms = np.asarray(row_norms(x))
    if metric == "cosine":
        x = x / np.where(norms > 0, norms, 1)[:, None]
        norms = (norms > 0).astype(np.float32)
    if weight is None:
        T = default_threshold(norms, dim=d)
        weight = Uniform() if metric == "l2" else Threshold(jnp.float32(T))
    weight = as_pytree(weight)
    terms = loss_terms(weight, norms, x, metric)
    mesh = Mesh(mesh.devices, mesh.axis_names)  # without the explicit axes of jax.make_mesh
    place = NamedSharding(mesh, PartitionSpec(axis))
    devices = mesh.shape[axis]

    # The draws of `build`, so that the same key gives the same index.
    key_sample, key_tree, key_codes = jax.random.split(key, 3)
    size = min(n, max(sample_size, 32 * leaves))
    picked = np.sort(np.asarray(jax.random.choice(key_sample, n, (size,), replace=False)))
    sample = x[picked[: size - size % devices]]
    first = jax.random.choice(key_tree, len(sample), (leaves,), replace=False)
    centroids = jnp.asarray(sample[np.asarray(first)])
    shared = jax.device_put(sample, place)
    previous = np.inf
    for _ in range(num_iterations):
        centroids, loss = _k_means(shared, centroids, mesh, axis)
        if previous - float(loss) <= 1e-3 * float(loss):
            break
        previous = float(loss)
    ranking = None
    vectors = centroids
    if metric != "l2" and leaves > 1:
        # As `build` does; the sample is small enough for every host.
        near = nearest_centroids(sample, centroids)
        vectors = ranking = anisotropic_centroids(
            jnp.asarray(sample), near, centroids, eta=CENTROID_ETA
        )

    step = _ROWS_PER_DEVICE * devices
    step = min(step, -(-n // devices) * devices)

    def chunks():
        for begin in range(0, n, step):
            yield np.arange(begin, begin + step).clip(max=n - 1), min(step, n - begin)

    def put(a: Any) -> Array:
        return jax.device_put(np.asarray(a), place)

    leaf = np.empty(n, np.int32)
    for i, count in chunks():
        leaf[i[:count]] = np.asarray(_leaves(put(x[i]), vectors, mesh, axis))[:count]
    if ranking is not None:
        near = leaf[picked[: len(sample)]]
        centroids = anisotropic_centroids(jnp.asarray(sample), near, centroids, eta=1.0)
    center = np.asarray(centroids)
    few = picked[:: -(-size // (sample_size // 2))]
    few = few[: len(few) - len(few) % devices]
    state, _ = fit_sharded(
        key_codes,
        x[few] - center[leaf[few]],
        mesh=mesh,
        axis=axis,
        num_subspaces=m,
        num_codewords=num_codewords,
        num_iterations=num_iterations,
        **terms(few),
    )
    book = Codebook(jnp.asarray(np.asarray(state.codebook.codewords)), d)
    codes = np.empty((n, m), np.uint8)
    offset = np.empty(n, np.float32) if metric == "l2" else None
    for i, count in chunks():
        residual = x[i] - center[leaf[i]]
        part = _codes(book, put(residual), jax.tree.map(put, terms(i)), mesh, axis)
        codes[i[:count]] = np.asarray(part)[:count]
        if offset is not None:
            left = residual[:count] - np.asarray(decode(book, codes[i[:count]]))
            mine = x[i[:count]]
            offset[i[:count]] = np.sum(mine * left, axis=1) - 0.5 * np.sum(mine * mine, axis=1)
    store = None
    if rescore_dtype is not None:
        store = store_rows(
            x, rescore_dtype, None if metric == "l2" else terms(slice(None))["scaling"]
        )
    return Index(
        tree=pack_tree(jnp.asarray(center), leaf, book, codes, offset, ranking=ranking),
        store=store,
        ids=words,
        weight=weight,
        metric=metric,
        num_rows=n,
        dim=d,
        leaves_to_search=leaves_to_search or max(1, min(leaves, max(8, math.ceil(leaves / 10)))),
    )
