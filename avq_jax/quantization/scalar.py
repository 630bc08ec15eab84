"""Scalar quantization under the score-aware loss: one small integer a coordinate.

A row is ``x~ = s * grid[codes]`` with a grid that is even and symmetric, the same for every
coordinate, and a scale s a row: its interval is ``[-s, s]``. Codes descend the loss of the whole
row coordinate by coordinate, as those of any product codebook do, so ``<q, x~>`` is unbiased by
the errors along x that rounding alone leaves; the scale is the score-aware one. One bit after a
random rotation is RaBitQ's code with another factor (:mod:`avq_jax.quantization.rabitq` has its
own). Coordinates of few levels share a code: four signs, or two coordinates of three or four
levels, are at most 16 words, which a packed code holds in four bits.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.quantization.codebook import Codebook, as_learning_rows
from avq_jax.quantization.rotation import Rotated, rotation
from avq_jax.quantization.scale import Scaled, fit_scale

__all__ = ["fit_scalar", "grid"]

# Words of a code of four packed bits.
_WORDS = 16


def grid(num_levels: int, dim: int) -> Codebook:
    """Codebook of all rows with coordinates of ``num_levels`` even steps in [-1, 1]."""
    width = 1
    while num_levels ** (width + 1) <= _WORDS:
        width += 1
    codes = -(-dim // width)
    width = -(-dim // codes)  # of a codebook with so many subspaces
    levels = np.linspace(-1, 1, num_levels, dtype=np.float32)
    words = np.array(list(itertools.product(levels, repeat=width)), np.float32)
    return Codebook(jnp.asarray(np.broadcast_to(words, (codes, *words.shape))), dim=dim)


def _number_of_levels(bits: int | None, num_levels: int | None) -> int:
    if num_levels is None:
        bits = 4 if bits is None else as_count(bits, name="bits")
        if bits > 8:
            raise ValueError(f"bits must be at most 8; got {bits}")
        return 1 << bits
    if bits is not None:
        raise ValueError(f"bits must be None where num_levels is given; got {bits}")
    num_levels = as_count(num_levels, name="num_levels", minimum=2)
    if num_levels > 256:
        raise ValueError(f"num_levels must be at most 256; got {num_levels}")
    return num_levels


def fit_scalar(
    key: Array,
    x: Any,
    scaling: Scaling | None = None,
    *,
    bits: int | None = None,
    num_levels: int | None = None,
    scale_bits: int = 8,
    rotate: bool = False,
    direction: Any = None,
    extra: QueryTerms | None = None,
    num_iterations: int = 4,
) -> Scaled:
    """Learn a scalar quantizer: the scales that rows may take.

    Args:
      key: a typed key; only the rotation draws from it.
      x: ``[n, d]`` rows.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      bits: of a coordinate, 1 to 8, for 2^bits levels; 4 where ``num_levels`` is not given either.
      num_levels: values of a coordinate, 2 to 256, evenly over its interval; instead of ``bits``.
        Three are ternary, -s, 0 and s. Two levels put four coordinates into a code, three or four
        levels two, more one.
      scale_bits: of a row's scale, 1 to 8.
      rotate: rotate by a random matrix first, which spreads a row evenly over its coordinates;
        worth it at few bits or for uneven coordinates.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      num_iterations: alternations of scales and codes.

    Returns:
      :class:`~avq_jax.Scaled` product codebooks, whose words are the grid; rotated,
      :class:`~avq_jax.Rotated` ones. Their ``bits`` count information: log2(3) a ternary
      coordinate, of which a code holds two in 9 words, in memory four bits by
      :func:`~xla_kernels.pack_codes`, so two bits a coordinate.

    Raises:
      TypeError: called inside a transformation.
      ValueError: bits or levels out of range, or both given; rows that are not finite.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (200, 16))
    >>> codec = fit_scalar(jax.random.key(1), x, bits=8)
    >>> rows = avq_jax.decode(codec, avq_jax.encode(codec, x))
    >>> bool(jax.numpy.mean((rows - x) ** 2) < 1e-3), codec.bits
    (True, 136.0)
    >>> fit_scalar(jax.random.key(1), x, num_levels=3).num_codewords  # of two coordinates
    9

    Reference:
      Gao and Long, RaBitQ, 2024, for one bit; the loss is that of Guo et al., 2020.
    """
    num_levels = _number_of_levels(bits, num_levels)
    scale_bits = as_count(scale_bits, name="scale_bits")
    as_count(num_iterations, name="num_iterations")
    rows = as_learning_rows(x, scaling, direction, extra)
    if is_traced(key, rows):
        raise TypeError("fit_scalar is a host loop; call it outside jit")
    rows = jax.tree.map(jnp.asarray, rows)
    dim = rows.x.shape[1]
    codec: Any = grid(num_levels, dim)
    turned = rows.x
    if rotate:
        matrix = rotation(key, rows.x, method="random")
        codec, turned = Rotated(codec, matrix), jnp.matmul(rows.x, matrix.T, precision="highest")
    # A row starts at the interval that just holds it; signs, at its mean absolute value.
    reach = jnp.mean if num_levels == 2 else jnp.max
    size = np.asarray(reach(jnp.abs(turned), axis=1), np.float64)
    positive = size[size > 0]
    if not positive.size:
        positive = np.ones(1)
    count = 1 << scale_bits
    levels = np.quantile(positive, (np.arange(count) + 0.5) / count)
    # Signs are the same at every scale; other codes are not.
    scaled = Scaled(codec, jnp.asarray(np.sort(levels), jnp.float32), num_levels > 2)
    for _ in range(num_iterations):
        scaled = fit_scale(
            scaled,
            rows.x,
            rows.scaling,
            bits=scale_bits,
            direction=rows.direction,
            extra=rows.extra,
        )
    return scaled
