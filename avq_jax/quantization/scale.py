"""A score-aware scale: one number a row, from a small grid, that multiplies its decoded row.

For a row x with codes that decode to x~ the loss of ``x - s x~`` is a parabola in s,

  ``A s^2 - 2 B s + const``,  ``A = <x~, M x~>``,  ``B = <x, M x~>``,

with the metric ``M = a I + sum_j w_j u_j u_j^T`` of Theorem 3.2 (and of any further query terms),
so the best scale is B / A. For a unit row and its own direction that is
``s = eta p / (eta p^2 + o^2)``, p = <x, x~> and o^2 = ||x~||^2 - p^2; eta = 1 is the least squares
scale and eta -> infinity the factor 1 / p of RaBitQ. The best value of a grid is the nearest one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.quantization.additive_update import metric_terms
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.codec import Codes, Wrapper, decode, encode, lookup_table
from avq_jax.quantization.rows import Rows

__all__ = ["Scaled", "codes_without_gain", "fit_scale", "level_numbers"]

_LLOYD_ITERATIONS = 30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codec", "levels"],
    meta_fields=["bisect", "kind"],
)
@dataclasses.dataclass(frozen=True)
class Scaled(Wrapper):
    """Any codec with a scale a row: codes as those of ``codec``, the scale as their ``gain``.

    Attributes:
      codec: the codec of the rows divided by their scales.
      levels: ``float32[L]`` scales to choose from, ascending and positive; log2(L) bits a row.
      bisect: whether the encoding of a row looks through the levels by halving steps, log2(L)
        times the work; pays where the best scales of rows are far apart.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[0.], [1.]], [[0.], [1.]]]), dim=2)
    >>> codec = Scaled(book, jnp.array([1., 2., 3., 4.]))
    >>> codes = avq_jax.encode(codec, [[0., 3.], [2., 2.]])
    >>> codes.codes.tolist(), codes.gain.tolist(), codec.bits
    ([[0, 1], [1, 1]], [3.0, 2.0], 4.0)
    """

    # Unshaped: transformations put other things than arrays into the leaves of a pytree.
    codec: Any
    levels: Any
    bisect: bool = False
    # Classes with like fields are one structure to jaxlib 0.10.2: a static field tells them apart.
    kind: str = dataclasses.field(default="scaled", kw_only=True, repr=False)

    @property
    def bits(self) -> float:
        """Bits of a row with its scale."""
        return self.codec.bits + float(np.log2(self.levels.shape[0]))


def _parabola(decoded: Array, rows: Rows) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """A and B of each row."""
    u, w = metric_terms(rows)
    a = rows.scaling.orthogonal
    weightless = (a == 0) & jnp.all(w == 0, axis=1)
    a = jnp.where(weightless, 1, a)
    product = functools.partial(jnp.einsum, precision="highest")
    theirs, ours = product("nrd,nd->nr", u, decoded), product("nrd,nd->nr", u, rows.x)
    square = a * jnp.sum(decoded**2, axis=1) + jnp.sum(w * theirs**2, axis=1)
    across = a * jnp.sum(decoded * rows.x, axis=1) + jnp.sum(w * ours * theirs, axis=1)
    return square, across


def _nearest(levels: Float[Array, " L"], best: Float[Array, " n"]) -> Array:
    middle = 0.5 * (levels[1:] + levels[:-1])
    return levels[jnp.searchsorted(middle, best)]


@jax.jit
def _gains(levels: Array, decoded: Array, rows: Rows) -> Float[Array, " n"]:
    square, across = _parabola(decoded, rows)
    # A row that decodes to nothing takes the level that is nearest to 1.
    return _nearest(levels, jnp.where(square > 0, across / jnp.where(square > 0, square, 1), 1))


@jax.jit
def _divided(rows: Rows, gain: Array) -> Rows:
    """Rows x / s and the weights that give them the loss of ``x - s x~``."""
    square = gain * gain
    scaling = jax.tree.map(lambda v: v * square, rows.scaling)
    extra = rows.extra
    if extra is not None:
        extra = QueryTerms(extra.directions, extra.weights * square[:, None])
    direction = rows.x if rows.direction is None else rows.direction
    return Rows(rows.x / gain[:, None], scaling, direction, extra)


def _better(old: tuple, new: tuple) -> tuple[Array, Array, Array]:
    """Choose for each row the codes, gain and loss of the lower loss."""
    better = new[2] < old[2]
    codes = jnp.where(better[:, None], new[0], old[0])
    return codes, jnp.where(better, new[1], old[1]), jnp.where(better, new[2], old[2])


def level_numbers(codec: Scaled, gain: Any) -> UInt8[Array, " n"]:
    """Numbers of the levels that gains of :func:`~avq_jax.encode` are.

    >>> import avq_jax
    >>> codec = Scaled(avq_jax.Codebook(jnp.ones((1, 2, 1)), dim=1), jnp.array([0.5, 2.0]))
    >>> level_numbers(codec, jnp.array([2.0, 0.5])).tolist()
    [1, 0]
    """
    return jnp.searchsorted(codec.levels, jnp.asarray(gain)).astype(jnp.uint8)


def codes_without_gain(codec: Any, rows: Rows, **options: Any) -> Codes:
    """Codes of the rows by a codec inside another that gives them their gain.

    Raises:
      TypeError: the codec has a gain or an offset of its own.
    """
    codes = encode(
        codec, rows.x, rows.scaling, direction=rows.direction, extra=rows.extra, **options
    )
    if codes.gain is not None or codes.offset is not None:
        raise TypeError(
            f"codec must be one whose codes have no gain and no offset; got {type(codec).__name__}"
        )
    return codes


@encode.register
def _(
    codec: Scaled,
    x: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    num_alternations: int = 1,
    **options: Any,
) -> Codes:
    """Codes and their scales, then ``num_alternations`` times codes of x / s; the best stay."""
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    rows = jax.tree.map(jnp.asarray, rows)
    num_alternations = as_count(num_alternations, name="num_alternations", minimum=0)
    count = codec.levels.shape[0]

    def at(gain):
        codes = codes_without_gain(codec.codec, _divided(rows, gain), **options).codes
        decoded = decode(codec.codec, codes)
        gain = _gains(codec.levels, decoded, rows)
        return codes, gain, _loss(decoded, gain, rows)

    best = at(jnp.broadcast_to(codec.levels[count // 2], rows.x.shape[:1]))
    step = count // 4 if codec.bisect else 0
    while step:
        here = jnp.searchsorted(codec.levels, best[1])
        for move in (-step, step):
            there = jnp.clip(here + move, 0, count - 1)
            best = _better(best, at(codec.levels[there]))
        step //= 2
    for _ in range(num_alternations):
        best = _better(best, at(best[1]))
    return Codes(best[0], best[1])


@jax.jit
def _loss(decoded: Array, gain: Array, rows: Rows) -> Float[Array, " n"]:
    """Loss of each row, less what does not depend on its codes."""
    square, across = _parabola(decoded, rows)
    return gain * (gain * square - 2 * across)


@decode.register
def _(codec: Scaled, codes: Any) -> Array:
    if not isinstance(codes, Codes) or codes.gain is None:
        raise ValueError("codes must be Codes with a gain, as encode gives them for a Scaled codec")
    return decode(codec.codec, codes)


@lookup_table.register
def _(codec: Scaled, q: Any) -> Array:
    return lookup_table(codec.codec, q)


def fit_scale(
    codec: Any,
    x: Any,
    scaling: Scaling | None = None,
    *,
    bits: int = 4,
    direction: Any = None,
    extra: QueryTerms | None = None,
) -> Scaled:
    """Learn the levels of a score-aware scale for a codec.

    The levels are those of a scalar Lloyd-Max quantizer of the best scales B / A, each weighted by
    its A (see :mod:`avq_jax.quantization.scale`), which minimises the loss for given codes.

    Args:
      codec: a learned codec, such as :class:`~avq_jax.Codebook` or
        :class:`~avq_jax.AdditiveCodebook`; of a :class:`Scaled` one the levels are learned anew
        for the codes that it gives.
      x: ``[n, d]`` rows.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      bits: of a scale, 1 to 8.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.

    Returns:
      :class:`Scaled`.

    Raises:
      TypeError: the codec has a gain or an offset of its own, or x is traced.
      ValueError: bits out of range, rows that are not finite.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 8))
    >>> state, _ = avq_jax.fit(jax.random.key(1), x, num_subspaces=2)
    >>> codec = fit_scale(state.codebook, x)
    >>> codec.bits, avq_jax.encode(codec, x).gain.shape
    (12.0, (500,))
    """
    bits = as_count(bits, name="bits")
    if bits > 8:
        raise ValueError(f"bits must be at most 8; got {bits}")
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    if is_traced(codec, rows):
        raise TypeError("fit_scale sorts scales on the host; call it outside jit")
    rows = jax.tree.map(jnp.asarray, rows)
    if isinstance(codec, Scaled):
        terms = {"direction": rows.direction, "extra": rows.extra}
        codes, bisect = encode(codec, rows.x, rows.scaling, **terms).codes, codec.bisect
        codec = codec.codec
    else:
        bisect = False
        codes = codes_without_gain(codec, rows).codes
    decoded = decode(codec, codes)
    square, across = (np.asarray(v, np.float64) for v in _parabola(decoded, rows))
    return Scaled(codec, jnp.asarray(_levels(square, across, 1 << bits)), bisect)


def _levels(square: np.ndarray, across: np.ndarray, count: int) -> np.ndarray:
    """Lloyd-Max levels of across / square under the weights square, ascending and positive."""
    kept = (square > 0) & (across > 0)
    if not kept.any():
        return np.geomspace(0.5, 2.0, count).astype(np.float32)
    best, weight = across[kept] / square[kept], square[kept]
    order = np.argsort(best)
    best, weight = best[order], weight[order]
    mass = np.concatenate([[0.0], np.cumsum(weight)])
    moment = np.concatenate([[0.0], np.cumsum(weight * best)])
    levels = np.interp((np.arange(count) + 0.5) / count, mass[1:] / mass[-1], best)
    for _ in range(_LLOYD_ITERATIONS):
        edges = np.searchsorted(best, 0.5 * (levels[1:] + levels[:-1]))
        edges = np.concatenate([[0], edges, [best.size]])
        total, weighted = np.diff(mass[edges]), np.diff(moment[edges])
        levels = np.where(total > 0, weighted / np.where(total > 0, total, 1), levels)
    return np.sort(levels).astype(np.float32)
