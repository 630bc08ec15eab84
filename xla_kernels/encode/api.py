"""Product codes that minimise a score-aware loss, by coordinate descent over the subspaces."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import implementations
from . import cpu, reference


def assign_codes(
    rows: Any,
    codewords: Any,
    *,
    direction: Any,
    orthogonal: Any,
    weight: Any,
    max_sweeps: Any = 10,
    implementation: str | None = None,
) -> jax.Array:
    r"""Assign product codes that keep the error across a direction apart from the error along it.

    For a row x with residual r = x - x~ the loss is ``a ||r||^2 + w <u, r>^2``: Theorem 3.2 of Guo
    et al. 2020 (arXiv:1908.10396) with a = h_orthogonal, w = h_parallel - h_orthogonal and
    u = x / ||x||. The subspaces are coupled through <u, r>, so each in turn takes the codeword that
    is best given the others, from the Euclidean nearest ones on, until no code changes.

    Args:
      rows: ``float[n, m * s]``; pad the width to a multiple of s with zeros.
      codewords: ``float[m, k, s]``, 1 to 256 codewords a subspace.
      direction: ``float[n, m * s]``, the direction u of each row (behind a tree leaf the direction
        of the original row, not of the residual).
      orthogonal: ``float[n]``, the factor a of each row.
      weight: ``float[n]``, the factor w of each row.
      max_sweeps: sweeps over all subspaces, at least 0; 0 gives the Euclidean nearest codewords.
      implementation: None (the fastest here), ``"xla"``, ``"cpu"`` or ``"reference"``.

    Returns:
      ``uint8[n, m]``; among equal losses the lowest codeword. Implementations agree except where
      two losses differ by no more than float32 rounding.

    Raises:
      ValueError: shapes, dtypes or max_sweeps that do not fit, or an implementation that cannot
        run.

    Example:
      >>> import numpy as np
      >>> words = np.array([[[0.0], [1.0]], [[0.0], [1.0]]], np.float32)
      >>> rows = np.array([[0.4, 0.4]], np.float32)
      >>> unit = rows / np.linalg.norm(rows)
      >>> ones = np.ones(1, np.float32)
      >>> assign_codes(rows, words, direction=unit, orthogonal=ones, weight=0 * ones).tolist()
      [[0, 0]]
      >>> assign_codes(rows, words, direction=unit, orthogonal=ones, weight=9 * ones).tolist()
      [[1, 0]]
    """
    if isinstance(max_sweeps, bool) or not isinstance(max_sweeps, int) or max_sweeps < 0:
        raise ValueError(f"max_sweeps must be an integer of at least 0, got {max_sweeps!r}")
    rows = _float("rows", rows, 2)
    codewords = _float("codewords", codewords, 3)
    m, k, s = codewords.shape
    if not 1 <= k <= 256:
        raise ValueError(f"codewords must be float[m, 1 to 256, s], got k={k}")
    if rows.shape[1] != m * s:
        raise ValueError(f"rows must be {m * s} wide (m={m}, s={s}), got {rows.shape[1]}")
    direction = _float("direction", direction, 2)
    if direction.shape != rows.shape:
        raise ValueError(f"direction must have shape {rows.shape}, got {direction.shape}")
    orthogonal, weight = _float("orthogonal", orthogonal, 1), _float("weight", weight, 1)
    for name, value in (("orthogonal", orthogonal), ("weight", weight)):
        if value.shape != rows.shape[:1]:
            raise ValueError(f"{name} must be float[n] with n={rows.shape[0]}, got {value.shape}")
    chosen = implementations.resolve(implementation)
    return _assign_codes(chosen, max_sweeps, rows, codewords, direction, orthogonal, weight)


def _float(name: str, value: Any, ndim: int) -> jax.Array:
    value = jnp.asarray(value)
    if value.ndim != ndim or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be a {ndim}-dimensional float array, got {value.dtype}{list(value.shape)}"
        )
    return value.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _assign_codes(implementation: str, max_sweeps: int, *args: jax.Array) -> jax.Array:
    compiled = functools.partial(cpu.assign_codes, max_sweeps=max_sweeps)
    plain = functools.partial(reference.assign_codes, max_sweeps=max_sweeps)
    # Codes have no gradient: cut it here, where the foreign function would refuse it.
    args = tuple(jax.lax.stop_gradient(x) for x in args)
    return implementations.choose(implementation, compiled, plain, *args)
