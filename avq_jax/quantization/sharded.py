"""Learning codebooks from rows that are shared out over devices: the sums are added up."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from avq_jax.checks import as_count
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.lloyd_steps import (
    WARM_ITERATIONS,
    History,
    LloydState,
    Options,
    check_sizes,
    finish,
    start,
    step,
    warm,
)
from avq_jax.quantization.update import choose_solver

__all__ = ["fit_sharded"]

_start = jax.jit(start, static_argnums=(2, 3, 4))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(state: LloydState, rows: Any, kind: str, mesh: Mesh, options: Options) -> Any:
    """One step of a kind on every device, and the fraction of codewords in use."""

    def device(state: LloydState, rows: Any) -> Any:
        if kind == "warm":
            return warm(state, rows, options.axis), jnp.float32(0)
        if kind == "finish":
            return finish(state, rows, options), jnp.float32(0)
        return step(state, rows, options)

    whole, shared = PartitionSpec(), PartitionSpec(options.axis)
    states = LloydState(whole, shared, whole, whole)  # type: ignore[arg-type]
    # Sums over the devices are the same on all of them, which the type system cannot see.
    return jax.shard_map(
        device, mesh=mesh, in_specs=(states, shared), out_specs=(states, whole), check_vma=False
    )(state, rows)


def fit_sharded(
    key: Array,
    x: Any,
    scaling: Scaling | None = None,
    *,
    mesh: Mesh,
    axis: str,
    num_subspaces: int,
    num_codewords: int = 16,
    num_iterations: int = 25,
    direction: Any = None,
    extra: QueryTerms | None = None,
    tolerance: float = 1e-4,
    num_sweeps: int = 3,
) -> tuple[LloydState, History]:
    """Learn the codebooks of :func:`avq_jax.fit` with the rows shared out over a mesh axis.

    Every device assigns codes to its rows; the right-hand side and the normal equations of section
    7.5 are added up by ``psum`` (with conjugate gradients, the product of every iteration), so
    codebooks are those of one device up to the order of float sums.

    Args:
      key: a typed key.
      x: ``[n, d]`` rows, n a multiple of the devices of the axis.
      scaling: as of :func:`avq_jax.fit`.
      mesh: of devices.
      axis: its axis over which rows are shared out.
      num_subspaces: as of :func:`avq_jax.fit`.
      num_codewords: as of :func:`avq_jax.fit`.
      num_iterations: as of :func:`avq_jax.fit`.
      direction: as of :func:`avq_jax.fit`.
      extra: as of :func:`avq_jax.fit`.
      tolerance: as of :func:`avq_jax.fit`.
      num_sweeps: as of :func:`avq_jax.fit`.

    Returns:
      The state, its codes shared out as the rows are, and the history.

    Raises:
      ValueError: as of :func:`avq_jax.fit`; n not a multiple of the devices.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (256, 8))
    >>> mesh = jax.make_mesh((1,), ("rows",))
    >>> state, _ = fit_sharded(jax.random.key(1), x, mesh=mesh, axis="rows", num_subspaces=4)
    >>> state.codes.shape
    (256, 4)
    """
    rows = as_learning_rows(x, scaling, direction, extra)
    m, k = check_sizes(rows.x, num_subspaces, num_codewords)
    as_count(num_iterations, name="num_iterations", minimum=0)
    if axis not in mesh.shape:
        raise ValueError(f"axis must be one of {tuple(mesh.shape)}; got {axis!r}")
    n, d = rows.x.shape
    if n % mesh.shape[axis] or n // mesh.shape[axis] < 1:
        raise ValueError(
            f"x must have a multiple of {mesh.shape[axis]} rows, the devices of {axis!r}; got {n}"
        )
    # Axes of jax.make_mesh are explicit, and the draw of the first codewords gathers rows.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    place = NamedSharding(mesh, PartitionSpec(axis))
    rows = jax.tree.map(lambda a: jax.device_put(a, place), rows)
    options = Options(choose_solver("auto", m, k, -(-d // m)), num_sweeps, axis)
    state = _start(key, rows, m, k, "reconstruction")
    for _ in range(WARM_ITERATIONS):
        state, _ = _run(state, rows, "warm", mesh, options)
    state, _ = _run(state, rows, "finish", mesh, options)
    losses, usages = [], []
    previous, stalled = float(state.loss), False
    for i in range(num_iterations):
        new, usage = _run(state, rows, "update", mesh, options)
        loss = float(new.loss)
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at iteration {i}")
        state = new
        losses.append(loss)
        usages.append(float(usage))
        small = previous - loss <= tolerance * previous
        if small and (stalled or usages[-1] == 1 or loss == 0):
            break
        previous, stalled = loss, small
    return state, History(np.array(losses, np.float32), np.array(usages, np.float32))
