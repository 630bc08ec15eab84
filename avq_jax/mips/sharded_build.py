"""Building an index with the rows shared out over devices: partition, learn and encode."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from avq_jax.checks import as_rows, is_traced
from avq_jax.loss import Weight
from avq_jax.mips.build import build_index, check_arguments
from avq_jax.mips.index import Index
from avq_jax.mips.learning import Workers, as_pytree, row_codes
from avq_jax.mips.options import tree_options
from avq_jax.mips.partition import assign_first, assign_second, k_means_step
from avq_jax.mips.rescoring import StoreType
from avq_jax.quantization.codebook import check_magnitude
from avq_jax.quantization.sharded import fit_sharded

__all__ = ["build_sharded"]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _run(function: Callable[..., Any], rows: Any, rest: Any, mesh: Mesh, axis: str) -> Any:
    shared = PartitionSpec(axis)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(shared, PartitionSpec()),
        out_specs=shared,
        check_vma=False,
    )(rows, rest)


def _each_row(function: Callable[..., Any], mesh: Mesh, axis: str) -> Callable[..., Any]:
    """Run a function of (leaves that have rows, leaves that have none) where the rows lie."""
    place = NamedSharding(mesh, PartitionSpec(axis))

    def run(rows: Any, rest: Any) -> Any:
        n = jax.tree.leaves(rows)[0].shape[0]
        more = -n % mesh.shape[axis]

        def put(a: Any) -> Array:
            a = np.asarray(a)
            return jax.device_put(np.pad(a, ((0, more),) + ((0, 0),) * (a.ndim - 1)), place)

        found = _run(function, jax.tree.map(put, rows), jax.tree.map(np.asarray, rest), mesh, axis)
        whole = multihost_utils.process_allgather(found, tiled=True)
        return jax.tree.map(lambda a: np.asarray(a)[:n], whole)

    return run


@functools.partial(jax.jit, static_argnums=(2, 3))
def _k_means_step(x: Array, centroids: Array, mesh: Mesh, axis: str) -> tuple[Array, Array]:
    whole = PartitionSpec()
    return jax.shard_map(
        lambda x, c: k_means_step(x, c, axis),
        mesh=mesh,
        in_specs=(PartitionSpec(axis), whole),
        out_specs=(whole, whole),
        check_vma=False,
    )(x, centroids)


def _first(rows: Any, centroids: Array) -> Array:
    return assign_first(rows, centroids)


def _second(rows: Any, rest: Any) -> Array:
    return assign_second(*rows, *rest)


def _codes(rows: Any, codec: Any) -> tuple[Array, Any]:
    return row_codes(codec, *rows)


def _workers(mesh: Mesh, axis: str) -> Workers:
    mesh = Mesh(mesh.devices, mesh.axis_names)  # without the explicit axes of jax.make_mesh
    place = NamedSharding(mesh, PartitionSpec(axis))
    first, second, codes = (_each_row(f, mesh, axis) for f in (_first, _second, _codes))

    def step(x: Array, centroids: Array) -> tuple[Any, Any]:
        shared = jax.device_put(np.asarray(x), place)
        found = _k_means_step(shared, np.asarray(centroids), mesh, axis)
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), found)

    def fit(key: Array, x: Any, *, progress: Any, **options: Any) -> Any:
        state, history = fit_sharded(key, x, mesh=mesh, axis=axis, **options)
        # The codes stay where the rows are.
        book = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), state.codebook)
        return state._replace(codebook=book), history

    return Workers(
        step,
        lambda x, centroids: first(x, centroids),
        lambda x, leaves, *rest: second((x, leaves), rest),
        lambda codec, x, terms: codes((x, terms), codec),
        fit,
        mesh.shape[axis],
    )


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
    codec: Literal["product", "additive"] = "product",
    scale: Literal[4, 8] | None = None,
    weight: Weight | None = None,
    ids: Any = None,
    soar_lambda: float | Literal["auto"] | None = "auto",
    spherical: bool = False,
    num_groups: int | Literal["auto"] | None = "auto",
    scanned_dim: int | None = None,
    projection: Literal["pca", "prefix"] = "pca",
    leaves_to_search: int | None = None,
    rescore_dtype: StoreType | None = "float32",
    num_iterations: int = 10,
    sample_size: int = 100_000,
    progress: bool | None = False,
) -> Index:
    """Build the index of :func:`avq_jax.build`, k-means, codebooks and codes over a mesh axis.

    Centroids are added up by ``psum`` and codebooks by :func:`avq_jax.fit_sharded`; rows are
    assigned and encoded where they lie. The index is that of ``build`` up to the order of float
    sums, as long as the sample and its half are multiples of the devices (else they are cut to
    that). ``balance`` is left out: its leaves depend on all rows at once.

    Args:
      key: as of :func:`avq_jax.build`.
      x: as of :func:`avq_jax.build`, on the host.
      mesh: of devices.
      axis: its axis over which rows are shared out.
      metric: as of :func:`avq_jax.build`.
      num_leaves: as of :func:`avq_jax.build`; ``None`` takes sqrt(n).
      num_subspaces: as of :func:`avq_jax.build`.
      num_codewords: as of :func:`avq_jax.build`.
      codec: as of :func:`avq_jax.build`; additive codebooks are learned by every process alike.
      scale: as of :func:`avq_jax.build`.
      weight: as of :func:`avq_jax.build`.
      ids: as of :func:`avq_jax.build`.
      soar_lambda: as of :func:`avq_jax.build`.
      spherical: as of :func:`avq_jax.build`.
      num_groups: as of :func:`avq_jax.build`.
      scanned_dim: as of :func:`avq_jax.build`.
      projection: as of :func:`avq_jax.build`.
      leaves_to_search: as of :func:`avq_jax.build`.
      rescore_dtype: as of :func:`avq_jax.build`.
      num_iterations: as of :func:`avq_jax.build`.
      sample_size: as of :func:`avq_jax.build`.
      progress: show progress, and what was chosen.

    Returns:
      :class:`avq_jax.Index`, for :func:`avq_jax.shard` or any other use.

    Raises:
      TypeError: as of :func:`avq_jax.build`.
      ValueError: as of :func:`avq_jax.build`; an axis that the mesh does not have; too few
        rows to learn codes from.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (2000, 16))
    >>> mesh = jax.make_mesh((1,), ("rows",))
    >>> build_sharded(jax.random.key(1), x, mesh=mesh, axis="rows", num_leaves=20).num_leaves
    20
    """
    if is_traced(x):
        raise TypeError("build_sharded is a host loop; call it outside jit")
    check_arguments(key, metric, rescore_dtype, leaves_to_search)
    if axis not in mesh.shape:
        raise ValueError(f"axis must be one of {tuple(mesh.shape)}; got {axis!r}")
    weight = None if weight is None else as_pytree(weight)
    x = np.asarray(as_rows(x, name="x"))
    check_magnitude(x)
    options = tree_options(
        *x.shape,
        metric=metric,
        num_leaves=max(1, round(math.sqrt(len(x)))) if num_leaves is None else num_leaves,
        num_subspaces=num_subspaces,
        num_codewords=num_codewords,
        num_iterations=num_iterations,
        sample_size=sample_size,
        soar_lambda=soar_lambda,
        spherical=spherical,
        num_groups=num_groups,
        scanned_dim=scanned_dim,
        projection=projection,
        codec=codec,
        scale=scale,
    )
    if options is None:
        raise ValueError(f"x has {len(x)} rows, too few to learn codes from; use build")
    return build_index(
        key,
        x,
        options,
        metric=metric,
        weight=weight,
        ids=ids,
        leaves_to_search=leaves_to_search,
        rescore_dtype=rescore_dtype,
        workers=_workers(mesh, axis),
        progress=progress,
    )
