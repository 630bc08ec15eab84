"""RaBitQ: signs after a random rotation, unbiased inner products, and bounds of their error.

A row x is coded by the signs s of R x, R a rotation drawn uniformly and without a look at the data;
``x~ = g R^T s`` with the gain ``g = ||x||^2 / <R^T s, x>``, so that ``<x, x~> = ||x||^2`` and the
error r = x - x~ is orthogonal to x. It is the scale of :mod:`avq_jax.quantization.scale` in the
limit eta -> infinity. Given x, R is as likely as R Q for every rotation Q that keeps x, so r points
in all directions across x alike: ``<q, x~>`` is unbiased over R, and its error ``<q, r>`` is
``||q|| ||r||`` times at most one coordinate of a random unit vector of d - 1 dimensions,

  ``|<q, x~> - <q, x>| <= epsilon / sqrt(d - 1) ||q|| ||r||``,
  ``||r|| = ||x|| sqrt(1 - p^2) / p``,  ``p = <x, x~> / (||x|| ||x~||)``,

but for a share of the rotations of at most ``2 exp(-c epsilon^2)`` (Theorem 3.2 of RaBitQ, there
for unit rows and queries, with x~ before the gain). ``||r||`` is what a row has to keep for its
bound; nothing in the argument needs signs, so it holds for any fixed codec behind such a rotation.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avq_jax.checks import as_count, as_float32, as_rows, is_traced
from avq_jax.loss import QueryTerms, Scaling, row_norms
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.codec import Codes, Wrapper, decode, encode, lookup_table
from avq_jax.quantization.rotation import Rotated, random_rotation
from avq_jax.quantization.rows import unit
from avq_jax.quantization.scalar import grid
from avq_jax.quantization.scale import codes_without_gain

__all__ = ["Unbiased", "error_norms", "rabitq", "score_bounds"]

# Rows decoded at a time by `error_norms`.
_BLOCK = 1 << 14


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codec"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class Unbiased(Wrapper):
    """Any codec with the gain that makes ``<x, x~>`` exact, ``||x||^2 / <x, decode(codes)>``.

    The gain takes away the whole parallel error, so of the loss of Theorem 3.2 remains the
    orthogonal part, ``h_orthogonal ||x||^2 (1 / p^2 - 1)`` with the cosine p of x and x~, whatever
    its scaling: codes are those of ``codec`` under the reconstruction loss, which for words of
    equal length is the largest p. The gain is float32, and 0 where p is not positive.

    Attributes:
      codec: one whose codes have no gain of their own.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[-1., -1.], [1., 1.]]]), dim=2)
    >>> codes = avq_jax.encode(Unbiased(book), [[3., 1.]])
    >>> codes.codes.tolist(), codes.gain.round(5).tolist()  # 10 / 4
    ([[1]], [2.5])
    """

    # Unshaped: transformations put other things than arrays into the leaves of a pytree.
    codec: Any
    # Classes with like fields are one structure to jaxlib 0.10.2: a static field tells them apart.
    kind: str = dataclasses.field(default="unbiased", kw_only=True, repr=False)

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
    one = jnp.ones(rows.x.shape[0], jnp.float32)
    rows = jax.tree.map(jnp.asarray, rows._replace(scaling=Scaling(one, one)))
    codes = codes_without_gain(codec.codec, rows, **options).codes
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


def rabitq(key: Array, dim: int) -> Unbiased:
    """Give the codec of RaBitQ: a random rotation, signs, and the unbiased gain.

    Nothing is learned. Rows that lie far from the origin, or behind the leaf of a tree, lose less
    when their mean c is taken off first: ``<q, x> = <q, c> + <q, x - c>``. Their codes may keep the
    error along c, ``<c, r>``, as the ``offset`` of :class:`~avq_jax.Codes`; what is left is the
    error of q - c, whose bound :func:`score_bounds` gives for that query. For more bits put another
    codec behind the rotation, ``Unbiased(Rotated(codec, R))``.

    Args:
      key: a typed key, of the rotation.
      dim: width d of the rows, at least 1.

    Returns:
      :class:`Unbiased` of :class:`~avq_jax.Rotated` of a :class:`~avq_jax.Codebook` of four signs
      a code, 16 words: ceil(d / 4) codes and a gain a row.

    Raises:
      ValueError: the width is below 1.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (100, 64))
    >>> codec = rabitq(jax.random.key(1), 64)
    >>> rows = avq_jax.decode(codec, avq_jax.encode(codec, x))
    >>> bool(jax.numpy.allclose((x * rows).sum(1), (x * x).sum(1), rtol=1e-4)), codec.bits
    (True, 96.0)

    Reference:
      Gao and Long, RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound for
      Approximate Nearest Neighbor Search, 2024.
    """
    dim = as_count(dim, name="dim")
    return Unbiased(Rotated(grid(2, dim), random_rotation(key, dim)))


def error_norms(codec: Any, codes: Codes, x: Any) -> Float[Array, " n"]:
    """Length of the error of each row, ``||x - x~||``: what :func:`score_bounds` needs of a row.

    For an :class:`Unbiased` codec it is ``||x|| sqrt(1 - p^2) / p`` with the cosine p of x and x~.
    It cannot be had from the codes alone: keep it beside them, four bytes a row.

    Args:
      codec: the codec that made the codes.
      codes: :class:`~avq_jax.Codes` of the rows.
      x: ``[n, d]`` the rows that were encoded.

    Returns:
      ``float32[n]``.

    Raises:
      ValueError: rows that are not finite, or of another number or width than the codes.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[-1., -1.], [1., 1.]]]), dim=2)
    >>> codec, x = Unbiased(book), [[3., 1.]]
    >>> error_norms(codec, avq_jax.encode(codec, x), x).tolist()  # (3, 1) - 2.5 (1, 1)
    [1.5811...]
    """
    x = as_rows(x, name="x")
    n, d = x.shape
    if d != codec.dim or n != codes.codes.shape[0]:
        raise ValueError(
            f"x must be the rows of the codes, {(codes.codes.shape[0], codec.dim)}; got {(n, d)}"
        )
    blocks = [slice(start, start + _BLOCK) for start in range(0, n, _BLOCK)]
    parts = [
        row_norms(x[rows] - decode(codec, jax.tree.map(lambda v, rows=rows: v[rows], codes)))
        for rows in blocks
    ]
    return jnp.concatenate(parts) if parts else jnp.zeros(0, jnp.float32)


def score_bounds(
    errors: Any, queries: Any, *, epsilon: float | int | Array = 1.9
) -> Float[Array, " n"] | Float[Array, "b n"]:
    """Half-width of the confidence interval of each estimated inner product.

    ``epsilon / sqrt(d - 1) ||q|| ||x - x~||``: over random rotations the true ``<q, x>`` lies that
    near ``<q, x~>`` with a probability of at least ``1 - 2 exp(-c epsilon^2)``. The error is
    ``sin(q, x) ||q|| ||x - x~|| / sqrt(d - 1)`` times a variable that is close to normal, so that
    1.9 holds 94 % of the rows that are across the query, 3 holds 99.7 %; of others more.

    Args:
      errors: ``[n]`` lengths of the errors of the rows, from :func:`error_norms`.
      queries: ``[d]`` query, or a batch ``[b, d]``; NaN gives NaN.
      epsilon: half-width in standard deviations, at least 0.

    Returns:
      ``float32[n]``, or ``float32[b, n]`` for a batch: add it to a score for its upper bound.

    Raises:
      ValueError: errors that are not ``[n]``, queries of no or more than two axes, or epsilon < 0.

    >>> import jax.numpy as jnp
    >>> q = jnp.array([3., 0., 4., 0., 0.])
    >>> score_bounds(jnp.array([0.5, 0.]), q, epsilon=2.0).tolist()  # 2 / sqrt(4) * 5 * 0.5
    [2.5, 0.0]

    Reference:
      Gao and Long, RaBitQ, 2024, Theorem 3.2.
    """
    errors = jnp.asarray(as_float32(errors, name="errors"))
    if errors.ndim != 1:
        raise ValueError(f"errors must be [n], one number a row; got shape {errors.shape}")
    if not is_traced(epsilon) and not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0; got {epsilon}")
    q = jnp.asarray(as_float32(queries, name="queries"))
    if q.ndim not in (1, 2) or q.shape[-1] < 1:
        raise ValueError(f"queries must be [d] or [b, d]; got shape {q.shape}")
    rows = q.reshape(-1, q.shape[-1])
    # One dimension has no error to bound: signs are exact there.
    deviation = row_norms(rows) / max(q.shape[-1] - 1, 1) ** 0.5
    bounds = epsilon * deviation[:, None] * errors[None, :]
    return bounds if q.ndim == 2 else bounds[0]
