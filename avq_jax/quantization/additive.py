"""Additive quantization under the score-aware loss: the sum of one full-width word a codebook."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.progress import steps
from avq_jax.quantization.additive_update import (
    additive_block,
    block_losses,
    metric_terms,
    solve_additive,
    sum_words,
)
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.codec import Codes, decode, encode, lookup_table
from avq_jax.quantization.lloyd import History, LloydState, fit
from avq_jax.quantization.rows import Rows, in_blocks
from xla_kernels import assign_additive_codes

__all__ = ["AdditiveCodebook", "even_chunk", "fit_additive"]

# Rows handed to one compiled call by the host loop of `encode`.
_CHUNK = 1 << 16
# Codes overwritten in a round of the search, as in LSQ++.
_KICK = 4
# Rounds of an iteration of learning: codes go on from those of the iteration before.
_LEARNING_ROUNDS = 8
_PRODUCT_ITERATIONS = 8


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codewords", "kicks"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True)
class AdditiveCodebook:
    """Codewords of additive quantization, ``x~ = sum_j codewords[j, c_j]``.

    A product codebook is the case of words that are zero outside their subspace; at equal bytes
    and scan time an additive one costs a wider table, ``m k d`` products, and slower encoding.

    Attributes:
      codewords: ``float32[m, k, d]``, k words of the full width in each of m codebooks.
      kicks: ``int32[rounds, size, 2]``, the codes that each round of the search of
        :func:`~avq_jax.encode` overwrites, pairs of a codebook and a word; ``None`` for
        coordinate descent alone. See :func:`xla_kernels.assign_additive_codes`.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = AdditiveCodebook(jnp.array([[[0., 0.], [1., 2.]], [[5., 0.], [0., 7.]]]))
    >>> avq_jax.decode(book, jnp.array([[1, 1]], jnp.uint8)).tolist(), book.bits
    ([[1.0, 9.0]], 2.0)
    """

    # Unshaped: transformations put other things than arrays into the leaves of a pytree.
    codewords: Any
    kicks: Any = None
    # Classes with like fields are one structure to jaxlib 0.10.2: a static field tells them apart.
    kind: str = dataclasses.field(default="additive", kw_only=True, repr=False)

    @property
    def dim(self) -> int:
        """Width d of the rows."""
        return self.codewords.shape[2]

    @property
    def num_subspaces(self) -> int:
        """Number of codebooks m, codes of a row."""
        return self.codewords.shape[0]

    @property
    def num_codewords(self) -> int:
        """Number of words k of a codebook."""
        return self.codewords.shape[1]

    @property
    def bits(self) -> float:
        """Bits of a row, m * log2(k)."""
        return self.num_subspaces * float(np.log2(self.num_codewords))


def _search(
    codewords: Array, rows: Rows, codes: Any, kicks: Array | None, num_sweeps: int
) -> Array:
    directions, weights = metric_terms(rows)
    orthogonal = rows.scaling.orthogonal
    # A row without any weight is encoded under the reconstruction loss.
    weightless = (orthogonal == 0) & jnp.all(weights == 0, axis=-1)
    return assign_additive_codes(
        rows.x,
        codewords,
        directions=directions,
        orthogonal=jnp.where(weightless, 1, orthogonal),
        weights=weights,
        kicks=jnp.zeros((0, 1, 2), jnp.int32) if kicks is None else kicks,
        codes=codes,
        max_sweeps=num_sweeps,
    )


def even_chunk(n: int, most: int) -> int:
    """Rows of a chunk, at most so many, where n rows are cut into as few chunks of one size.

    Chunks of ``most`` rows would do up to a chunk of the work twice.

    >>> even_chunk(331_479, 65_536), even_chunk(10, 65_536)
    (55247, 10)
    """
    return -(-n // -(-n // most)) if n else 0


@functools.partial(jax.jit, static_argnames="num_sweeps")
def _encode(codec: AdditiveCodebook, rows: Rows, num_sweeps: int) -> Array:
    return _search(codec.codewords, rows, None, codec.kicks, num_sweeps)


@encode.register
def _(
    codec: AdditiveCodebook,
    x: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    num_sweeps: int = 10,
) -> Codes:
    as_count(num_sweeps, name="num_sweeps")
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    n = rows.x.shape[0]
    if n <= _CHUNK or is_traced(codec, rows):
        return Codes(_encode(codec, rows, num_sweeps))
    out = np.empty((n, codec.num_subspaces), np.uint8)
    size = even_chunk(n, _CHUNK)
    for start in range(0, n, size):
        # The last chunk overlaps the one before, so that one compiled shape serves all.
        start = min(start, n - size)
        part = jax.tree.map(lambda leaf, a=start: leaf[a : a + size], rows)
        out[start : start + size] = _encode(codec, part, num_sweeps)
    return Codes(jnp.asarray(out))


@decode.register
def _(codec: AdditiveCodebook, codes: Any) -> Array:
    gain = None
    if isinstance(codes, Codes):
        codes, gain = codes.codes, codes.gain
    codes = jnp.asarray(codes)
    m = codec.num_subspaces
    if codes.ndim != 2 or codes.shape[1] != m or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers [n, {m}]; got {codes.dtype} {codes.shape}")
    rows = sum_words(codec.codewords, codes.T)
    return rows if gain is None else rows * jnp.asarray(gain, jnp.float32)[:, None]


@lookup_table.register
def _(codec: AdditiveCodebook, q: Any) -> Array:
    q = jnp.asarray(q, jnp.float32)
    if q.ndim not in (1, 2) or q.shape[-1] != codec.dim:
        raise ValueError(f"q must be [{codec.dim}] or [b, {codec.dim}]; got shape {q.shape}")
    return jnp.einsum("...d,mkd->...mk", q, codec.codewords, precision="highest")


class _State(NamedTuple):
    codewords: Float[Array, "m k d"]
    codes: Array  # uint8[n, m]
    each: Float[Array, " n"]  # loss of each row
    loss: Float[Array, ""]
    used: Float[Array, ""]


def _full_width(start: LloydState) -> Float[Array, "m k d"]:
    """Words of a product codebook, zero outside their subspace."""
    m, k, s = start.codebook.codewords.shape
    own = jnp.eye(m, dtype=jnp.float32)[:, None, :, None]
    words = own * start.codebook.codewords[:, :, None, :]
    return words.reshape(m, k, m * s)[:, :, : start.codebook.dim]


def _blocks(codes: Array, block: int) -> Int32[Array, "nb m B"]:
    n, m = codes.shape
    codes = jnp.pad(codes.astype(jnp.int32), ((0, -n % block), (0, 0)))
    return codes.reshape(-1, block, m).transpose(0, 2, 1)


def _losses(codewords: Array, codes: Array, rows: Rows) -> tuple[Array, Array]:
    """Loss of each row and their mean."""
    n = codes.shape[0]
    block = additive_block(n)

    def one(z):
        codes, part = z
        return block_losses(part.scaling, *metric_terms(part), part.x - sum_words(codewords, codes))

    each = jax.lax.map(one, (_blocks(codes, block), in_blocks(rows, block))).reshape(-1)[:n]
    return each, jnp.sum(each / n)


def _begin(start: LloydState, rows: Rows) -> _State:
    codewords = _full_width(start)
    each, loss = _losses(codewords, start.codes, rows)
    return _State(codewords, start.codes, each, loss, jnp.float32(1))


def _kicks(key: Array, rounds: int, m: int, k: int) -> Int32[Array, "T P 2"]:
    """Draw different codebooks, and a word of each, for every round."""
    key_books, key_words = jax.random.split(key)
    size = min(_KICK, m)
    order = jax.vmap(lambda key: jax.random.permutation(key, m)[:size])
    books = order(jax.random.split(key_books, rounds)) if rounds else jnp.zeros((0, size))
    words = jax.random.randint(key_words, (rounds, size), 0, k)
    return jnp.stack([books.astype(jnp.int32), words.astype(jnp.int32)], axis=-1)


def _step(state: _State, rows: Rows, key: Array, num_sweeps: int) -> _State:
    """Encode anew from the present codes, then solve for the codewords; the loss never rises."""
    n, m = state.codes.shape
    k = state.codewords.shape[1]
    kicks = _kicks(key, _LEARNING_ROUNDS, m, k)
    codes = _search(state.codewords, rows, state.codes, kicks, num_sweeps)
    each, _ = _losses(state.codewords, codes, rows)
    # Rounding in the search can lose more than it found.
    worse = each > state.each
    codes = jnp.where(worse[:, None], state.codes, codes)
    each = jnp.where(worse, state.each, each)
    before = jnp.sum(each / n)

    block = additive_block(n)
    found, used = solve_additive(state.codewords, _blocks(codes, block), in_blocks(rows, block))
    new_each, after = _losses(found, codes, rows)
    worse = after > before
    codewords = jnp.where(worse, state.codewords, found)
    each, loss = jnp.where(worse, each, new_each), jnp.where(worse, before, after)

    def reseed(codewords):
        # A word that no row uses becomes one that serves one of the worst rows exactly.
        rank = jnp.cumsum(~used.reshape(-1)).reshape(m, k) - 1
        worst = jax.lax.top_k(each, min(m * k, n))[1]
        row = worst[jnp.minimum(rank, worst.shape[0] - 1)]  # [m, k]
        residual = rows.x - sum_words(codewords, codes.T)
        present = codewords[jnp.arange(m)[:, None], codes[row, jnp.arange(m)[:, None]]]
        return jnp.where(used[:, :, None], codewords, present + residual[row])

    codewords = jax.lax.cond(jnp.all(used), lambda c: c, reseed, codewords)
    return _State(codewords, codes, each, loss, jnp.mean(used, dtype=jnp.float32))


_jit_begin = jax.jit(_begin)
_jit_step = jax.jit(_step, static_argnames="num_sweeps")


def fit_additive(
    key: Array,
    x: Any,
    scaling: Scaling | None = None,
    *,
    num_codebooks: int,
    num_codewords: int = 16,
    num_iterations: int = 25,
    num_rounds: int = 24,
    direction: Any = None,
    extra: QueryTerms | None = None,
    tolerance: float | int = 1e-3,
    num_sweeps: int = 10,
    callback: Callable[[AdditiveCodebook], Any] | None = None,
    progress: bool | None = None,
) -> tuple[AdditiveCodebook, History]:
    """Learn additive codebooks under the score-aware loss.

    Minimises the mean over the rows of ``h_orthogonal ||r||^2 + (h_parallel - h_orthogonal)
    <u, r>^2``, ``r = x - sum_j c_j``, from product codebooks (:func:`~avq_jax.fit`) on. Each
    iteration searches for better codes of each row, with the exact coupling of all words
    (coordinate descent and iterated local search), and then solves for all codewords together.
    Called inside ``jit`` or ``vmap`` it runs the same steps in a scan of ``num_iterations``,
    without early stop, callback or progress.

    Args:
      key: a typed key, ``jax.random.key(seed)``; the same key gives the same codebooks.
      x: ``[n, d]`` rows, n >= num_codewords.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      num_codebooks: m, 1 to d.
      num_codewords: k of each codebook, 2 to 256.
      num_iterations: most iterations.
      num_rounds: rounds of local search that :func:`~avq_jax.encode` makes with this codec, 0 or
        more. Time grows in proportion, gains shrink: 16 find most of what 128 do.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      tolerance: stop when an iteration lowers the loss by at most this fraction.
      num_sweeps: most sweeps of a descent.
      callback: called with the codec after each iteration; a true result stops the learning.
      progress: show a progress bar; ``None`` shows it in a terminal or notebook.

    Returns:
      The :class:`~avq_jax.AdditiveCodebook`, and the :class:`~avq_jax.History` of loss (never
      rising) and codeword usage.

    Raises:
      ValueError: sizes out of range, too few rows, rows that are not finite.
      FloatingPointError: a loss that is not finite, with the iteration; its ``state`` attribute is
        the last good codec.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 8))
    >>> codec, history = fit_additive(jax.random.key(1), x, num_codebooks=4, num_iterations=3)
    >>> codec.codewords.shape, bool(history.loss[-1] <= history.loss[0])
    ((4, 16, 8), True)

    Reference:
      Babenko and Lempitsky, Additive Quantization, 2014; Martinez et al., LSQ++, 2018; the loss is
      that of Guo et al., 2020.
    """
    rows = as_learning_rows(x, scaling, direction, extra)
    num_iterations = as_count(num_iterations, name="num_iterations", minimum=0)
    num_rounds = as_count(num_rounds, name="num_rounds", minimum=0)
    as_count(num_sweeps, name="num_sweeps")
    as_count(num_codebooks, name="num_codebooks")
    if num_codebooks > rows.x.shape[1]:
        raise ValueError(
            f"num_codebooks must be at most the width of x, {rows.x.shape[1]}; got {num_codebooks}"
        )
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0; got {tolerance}")
    rows = jax.tree.map(jnp.asarray, rows)
    key_start, key_codec, key_steps = jax.random.split(key, 3)
    start, _ = fit(
        key_start,
        rows.x,
        rows.scaling,
        num_subspaces=num_codebooks,
        num_codewords=num_codewords,
        num_iterations=_PRODUCT_ITERATIONS,
        direction=rows.direction,
        extra=rows.extra,
        progress=False,
    )
    state = _jit_begin(start, rows)
    kicks = _kicks(key_codec, num_rounds, num_codebooks, num_codewords)

    if is_traced(key, rows):

        def body(state, i):
            state = _step(state, rows, jax.random.fold_in(key_steps, i), num_sweeps)
            return state, History(state.loss, state.used)

        state, history = jax.lax.scan(body, state, jnp.arange(num_iterations))
        return AdditiveCodebook(state.codewords, kicks), history

    losses: list[float] = []
    usages: list[float] = []
    for i in steps(num_iterations, "learning additive codebooks", progress):
        new = _jit_step(state, rows, jax.random.fold_in(key_steps, i), num_sweeps)
        loss, previous = float(new.loss), float(state.loss)
        if not math.isfinite(loss):
            error = FloatingPointError(
                f"the loss became {loss} at iteration {i}; the last good codec is in this error's "
                "`state` attribute"
            )
            error.state = AdditiveCodebook(state.codewords, kicks)  # type: ignore[attr-defined]
            raise error
        state = new
        losses.append(loss)
        usages.append(float(state.used))
        if callback is not None and callback(AdditiveCodebook(state.codewords, kicks)):
            break
        if previous - loss <= tolerance * previous and usages[-1] == 1:
            break
    codec = AdditiveCodebook(state.codewords, kicks)
    return codec, History(np.array(losses, np.float32), np.array(usages, np.float32))
