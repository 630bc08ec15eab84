"""Additive codes that minimise a score-aware loss, by iterated local search."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import implementations
from . import cpu, reference

# Words of a codebook are padded to full registers.
_LANES = 16


def assign_additive_codes(
    rows: Any,
    codewords: Any,
    *,
    directions: Any,
    orthogonal: Any,
    weights: Any,
    kicks: Any,
    codes: Any = None,
    max_sweeps: Any = 10,
    implementation: str | None = None,
) -> jax.Array:
    r"""Assign additive codes: ``x~ = sum_j codewords[j, codes[j]]``.

    For a row x with residual r = x - x~ the loss is ``a ||r||^2 + sum_w w <u_w, r>^2``: Theorem 3.2
    of Guo et al. 2020 (arXiv:1908.10396) with a = h_orthogonal and the one direction
    u = x / ||x|| of weight h_parallel - h_orthogonal. Codebooks are coupled through ``<c, c'>`` and
    ``<u, r>``. Coordinate descent gives each in turn the word that is best given the others, until
    none changes. Then, for each round, some codes are overwritten with those of ``kicks``, the
    descent runs again from the codebook after the last of them, and the result is kept if its loss
    is lower (iterated local search, as in Martinez et al., LSQ++, 2018).

    Args:
      rows: ``float[n, d]``.
      codewords: ``float[m, k, d]``, 1 to 256 words a codebook.
      directions: ``float[n, r, d]``, directions u of each row.
      orthogonal: ``float[n]``, the factor a of each row.
      weights: ``float[n, r]``, the factor w of each direction.
      kicks: ``int[rounds, size, 2]``, pairs of a codebook and a word, the same for all rows: so
        a row's codes do not depend on its neighbours. Pairs out of range kick nothing.
      codes: ``uint8[n, m]`` where the descent starts; None starts from no words at all, and the
        first sweep adds one of each codebook.
      max_sweeps: most sweeps of a descent, at least 1.
      implementation: None (the fastest here), ``"xla"``, ``"cpu"`` or ``"reference"``.

    Returns:
      ``uint8[n, m]``; among equal losses the lowest codeword. The loss is at most that of
      ``codes``, to rounding. Implementations agree except where two losses differ by no more than
      float32 rounding.

    Raises:
      ValueError: shapes, dtypes or max_sweeps that do not fit, or an implementation that cannot
        run.

    Example:
      >>> import numpy as np
      >>> words = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]], np.float32)
      >>> rows = np.array([[2.0, 1.0], [0.0, 1.0]], np.float32)
      >>> terms = dict(directions=rows[:, None], orthogonal=np.ones(2), weights=np.ones((2, 1)))
      >>> terms["kicks"] = np.zeros((0, 1, 2), np.int32)
      >>> assign_additive_codes(rows, words, **terms).tolist()
      [[1, 1], [0, 0]]
    """
    if isinstance(max_sweeps, bool) or not isinstance(max_sweeps, int) or max_sweeps < 1:
        raise ValueError(f"max_sweeps must be an integer of at least 1, got {max_sweeps!r}")
    rows = _array("rows", rows, 2)
    codewords = _array("codewords", codewords, 3)
    m, k, d = codewords.shape
    n = rows.shape[0]
    if not 1 <= k <= 256:
        raise ValueError(f"codewords must be float[m, 1 to 256, d], got k={k}")
    if rows.shape[1] != d:
        raise ValueError(f"rows must be {d} wide, as codewords are, got {rows.shape[1]}")
    directions = _array("directions", directions, 3)
    r = directions.shape[1]
    if directions.shape != (n, r, d):
        raise ValueError(f"directions must be float[{n}, r, {d}], got {directions.shape}")
    orthogonal, weights = _array("orthogonal", orthogonal, 1), _array("weights", weights, 2)
    if orthogonal.shape != (n,):
        raise ValueError(f"orthogonal must be float[n] with n={n}, got {orthogonal.shape}")
    if weights.shape != (n, r):
        raise ValueError(f"weights must be float{[n, r]}, as directions are, got {weights.shape}")
    kicks = _array("kicks", kicks, 3, jnp.integer).astype(jnp.int32)
    if kicks.shape[2] != 2:
        raise ValueError(f"kicks must be int[rounds, size, 2], got {kicks.shape}")
    if codes is None:
        codes = jnp.zeros((0, m), jnp.uint8)
    else:
        codes = _array("codes", codes, 2, jnp.integer).astype(jnp.uint8)
        if codes.shape != (n, m):
            raise ValueError(f"codes must be uint8{[n, m]}, got {codes.shape}")
    if 0 in (n, m, d):
        return jnp.zeros((n, m), jnp.uint8)
    chosen = implementations.resolve(implementation)
    return _assign(
        chosen, max_sweeps, rows, directions, orthogonal, weights, codes, codewords, kicks
    )


def _array(name: str, value: Any, ndim: int, kind: Any = jnp.floating) -> jax.Array:
    value = jnp.asarray(value)
    if value.ndim != ndim or not jnp.issubdtype(value.dtype, kind):
        raise ValueError(
            f"{name} must be a {ndim}-dimensional {kind.__name__} array, "
            f"got {value.dtype}{list(value.shape)}"
        )
    return value.astype(jnp.float32) if kind is jnp.floating else value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _assign(
    implementation: str,
    max_sweeps: int,
    rows: jax.Array,
    directions: jax.Array,
    orthogonal: jax.Array,
    weights: jax.Array,
    codes: jax.Array,
    codewords: jax.Array,
    kicks: jax.Array,
) -> jax.Array:
    # The loss depends on x - x~ alone: centred codebooks keep ||c||^2 - 2 <c, x> from cancelling
    # where the rows lie far from the origin, and make no word of a codebook its mean word.
    center = jnp.mean(codewords, axis=1)
    codewords = codewords - center[:, None]
    rows = rows - jnp.sum(center, axis=0)[None]
    m, k, d = codewords.shape
    lanes = -k % _LANES
    words = jnp.pad(codewords, ((0, 0), (0, lanes), (0, 0)))
    norms = jnp.sum(words * words, axis=-1)
    flat = codewords.reshape(m * k, d)
    pairs = 2 * jnp.matmul(flat, words.reshape(-1, d).T, precision="highest")
    pairs = pairs.reshape(m, k, m, k + lanes)
    pairs = jnp.where(jnp.eye(m, dtype=bool)[:, None, :, None], 0, pairs)
    compiled = functools.partial(cpu.assign_additive_codes, max_sweeps=max_sweeps)
    plain = functools.partial(reference.assign_additive_codes, max_sweeps=max_sweeps)
    # Codes have no gradient: cut it here, where the foreign function would refuse it.
    args = (rows, directions, orthogonal, weights, codes, words, norms, pairs, kicks)
    cut = [jax.lax.stop_gradient(x) for x in args]
    return implementations.choose(implementation, compiled, plain, *cut)
