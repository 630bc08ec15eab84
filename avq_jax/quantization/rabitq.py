"""RaBitQ: signs after a random rotation, unbiased inner products, and bounds of their error.

A row x is coded by the signs s of R x, R a rotation drawn uniformly and without a look at the data;
``x~ = g R^T s`` with the gain ``g = ||x||^2 / <R^T s, x>``, so that ``<x, x~> = ||x||^2`` and the
error r = x - x~ is orthogonal to x. It is the scale of :mod:`avq_jax.quantization.scale` in the
limit eta -> infinity. Given x, R is as likely as R Q for every rotation Q that keeps x, so r points
in all directions across x alike: ``<q, x~>`` is unbiased over R, and its error ``<q, r>`` is
``||q|| ||r||`` times at most one coordinate of a random unit vector of d - 1 dimensions,

  ``|<q, x~> - <q, x>| <= epsilon / sqrt(d - 1) ||q|| ||r||``,
  ``||r|| = ||x|| sqrt(1 - p^2) / p``,  ``p = <x, x~> / (||x|| ||x~||)``,

but for a share of the rotations of at most ``2 exp(-c epsilon^2)`` (Theorem 3.2 of RaBitQ, there for
unit rows and queries, with x~ before the gain). ``||r||`` is what a row has to keep for its bound;
nothing in the argument needs signs, so it holds for any fixed codec behind such a rotation.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avq_jax.checks import as_count, as_float32, as_queries, check_finite, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.codec import Codes, decode, encode, lookup_table
from avq_jax.quantization.rotation import Rotated, random_rotation
from avq_jax.quantization.rows import unit
from avq_jax.quantization.scalar import grid
from avq_jax.quantization.scale import without_gain

__all__ = ["Unbiased", "error_norms", "rabitq", "score_bounds"]

# Rows decoded at a time by `error_norms`.
_BLOCK = 1 << 14


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codec"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class Unbiased:
    """Any codec with the gain that makes ``<x, x~>`` exact, ``||x||^2 / <x, decode(codes)>``.

    Codes are those of ``codec``. The gain is a float32 number and along the encoded row, whatever
    ``direction`` its codes were chosen for; it is 0 where the decoded row does not point along x.

    Attributes:
      codec: one whose codes have no gain of their own.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[-1., -1.], [1., 1.]]]), dim=2)
    >>> codes = avq_jax.encode(Unbiased(book), [[3., 1.]])
    >>> codes.codes.tolist(), codes.gain.tolist()  # 10 / 4
    ([[1]], [2.5])
    """

    # Unshaped: transformations put other things than arrays into the leaves of a pytree.
    codec: Any
    # Classes with like fields are one structure to jaxlib 0.10.2: a static field tells them apart.
    kind: str = dataclasses.field(default="unbiased", kw_only=True, repr=False)

    @property
    def dim(self) -> int:
        """Width d of the rows."""
        return self.codec.dim

    @property
    def num_subspaces(self) -> int:
        """Number of codes of a row, without the gain."""
        return self.codec.num_subspaces

    @property
    def num_codewords(self) -> int:
        """Number of words of a code."""
        return self.codec.num_codewords

    @property
    def bits(self) -> float:
        """Bits of a row with its gain, which takes 32."""
        return self.codec.bits + 32


@encode.register
def _(
    codec: Unbiased,
    x: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    **options: Any,
) -> Codes:
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    rows = jax.tree.map(jnp.asarray, rows)
    codes = without_gain(codec.codec, rows, **options).codes
    u, decoded = unit(rows.x), decode(codec.codec, codes)
    # Both sides divided by ||x||: no square of a small or large row is taken.
    norm, along = jnp.sum(u * rows.x, axis=1), jnp.sum(u * decoded, axis=1)
    return Codes(codes, jnp.where(along > 0, norm / jnp.where(along > 0, along, 1), 0))


@decode.register
def _(codec: Unbiased, codes: Any) -> Array:
    if not isinstance(codes, Codes) or codes.gain is None:
        raise ValueError(
            "codes must be Codes with a gain, as encode gives them for an Unbiased codec"
        )
    return decode(codec.codec, codes)


@lookup_table.register
def _(codec: Unbiased, q: Any) -> Array:
    return lookup_table(codec.codec, q)


def rabitq(key: Array, dim: int, *, num_levels: int = 2) -> Unbiased:
    """Give the codec of RaBitQ: a random rotation, signs, and the unbiased gain.

    Nothing is learned. Rows far from the origin (or behind the leaf of a tree) lose less when their
    mean is taken off first: ``<q, x> = <q, mean> + <q, x - mean>``. Encoded without a scaling the
    signs are RaBitQ's; with one, codes descend the score-aware loss and the gain stays the same rule.

    Args:
      key: a typed key, of the rotation.
      dim: width d of the rows, at least 1.
      num_levels: of a coordinate, 2 to 256, evenly over ``[-1, 1]`` times ``3 / sqrt(d)`` of a unit
        row beyond two; two are signs. More levels are scaled for rows of unit length.

    Returns:
      :class:`Unbiased` of :class:`~avq_jax.Rotated` of a :class:`~avq_jax.Codebook` of four signs a
      code, 16 words; ``ceil(d / 4)`` codes and a gain a row.

    Raises:
      ValueError: a width or a number of levels out of range.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (100, 64))
    >>> codec = rabitq(jax.random.key(1), 64)
    >>> codes = avq_jax.encode(codec, x)
    >>> rows = avq_jax.decode(codec, codes)
    >>> bool(jax.numpy.allclose((x * rows).sum(1), (x * x).sum(1), rtol=1e-4)), codec.bits
    (True, 96.0)

    Reference:
      Gao and Long, RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound for
      Approximate Nearest Neighbor Search, 2024.
    """
