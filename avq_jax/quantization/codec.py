"""The seam between quantizers and search: every codec encodes to codes and gives a lookup table."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from jaxtyping import Array, Float, UInt8

__all__ = ["Codes", "Wrapper", "decode", "encode", "lookup_table"]


class Codes(NamedTuple):
    """Quantized rows.

    The score of row i for a query with table t is
    ``gain[i] * sum_m t[m, codes[i, m]] + offset[i]``.

    Attributes:
      codes: ``uint8[n, m]``, one codeword number per row and subspace.
      gain: ``float32[n]`` factor of each row, or ``None`` for 1.
      offset: ``float32[n]`` term of each row, or ``None`` for 0.
    """

    codes: UInt8[Array, "n m"]
    gain: Float[Array, " n"] | None = None
    offset: Float[Array, " n"] | None = None


class Wrapper:
    """Base of a codec around another, whose sizes it has; what differs is overridden.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.zeros((3, 16, 2)), dim=6)
    >>> codec = avq_jax.Rotated(book, jnp.eye(6))
    >>> codec.num_subspaces, codec.num_codewords, codec.bits
    (3, 16, 12.0)
    """

    codec: Any

    @property
    def dim(self) -> int:
        """Width d of the rows."""
        return self.codec.dim

    @property
    def num_subspaces(self) -> int:
        """Number of codes of a row."""
        return self.codec.num_subspaces

    @property
    def num_codewords(self) -> int:
        """Number of words of a code."""
        return self.codec.num_codewords

    @property
    def bits(self) -> float:
        """Bits of a row."""
        return self.codec.bits


@functools.singledispatch
def encode(codec: Any, x: Any, scaling: Any = None, **options: Any) -> Codes:
    """Quantize rows with a learned codec, under the score-aware loss.

    Each row takes the codes that minimise (locally) the loss of Theorem 3.2,
    ``orthogonal ||r||^2 + (parallel - orthogonal) <u, r>^2`` with ``r = x - decode(codes)``.

    Args:
      codec: a learned codec, such as :class:`~avq_jax.Codebook`.
      x: ``[n, d]`` rows, of any real dtype.
      scaling: :class:`~avq_jax.Scaling` of the rows; ``None`` is the reconstruction loss.
      **options: of the codec; product codes take ``direction``, ``extra`` and ``num_sweeps``.

    Returns:
      :class:`Codes` of the rows.

    Raises:
      TypeError: the codec is of an unknown kind.
      ValueError: the rows have another width than the codec or are not finite.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (256, 8))
    >>> one = avq_jax.Scaling(jax.numpy.ones(256), jax.numpy.ones(256))
    >>> state, _ = avq_jax.fit(jax.random.key(1), x, one, num_subspaces=4, num_codewords=16)
    >>> avq_jax.encode(state.codebook, x, one).codes.shape
    (256, 4)
    """
    raise TypeError(_unknown(codec))


@functools.singledispatch
def decode(codec: Any, codes: Any) -> Array:
    """Rows x~ that the codes stand for.

    Args:
      codec: the codec that made the codes.
      codes: :class:`Codes`, or plain ``uint8[n, m]``. Code numbers beyond the codebook are clamped.

    Returns:
      ``float32[n, d]``.

    Raises:
      TypeError: the codec is of an unknown kind.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[0.], [1.]], [[5.], [7.]]]), dim=2)
    >>> avq_jax.decode(book, jnp.array([[1, 0]], jnp.uint8)).tolist()
    [[1.0, 5.0]]
    """
    raise TypeError(_unknown(codec))


@functools.singledispatch
def lookup_table(codec: Any, q: Any) -> Array:
    """Table of asymmetric distance computation: ``<q, x~> = sum_m table[m, codes[m]]``.

    Args:
      codec: a codec.
      q: ``[d]`` query, or a batch ``[b, d]``.

    Returns:
      ``float32[m, k]``, or ``float32[b, m, k]`` for a batch.

    Raises:
      TypeError: the codec is of an unknown kind.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[0.], [1.]], [[5.], [7.]]]), dim=2)
    >>> avq_jax.lookup_table(book, jnp.array([10., 1.])).tolist()
    [[0.0, 10.0], [5.0, 7.0]]
    """
    raise TypeError(_unknown(codec))


def _unknown(codec: Any) -> str:
    known = ", ".join(t.__name__ for t in encode.registry if t is not object)
    return f"codec must be one of {known} (or a registered type); got {type(codec).__name__}"
