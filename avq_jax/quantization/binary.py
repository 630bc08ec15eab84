"""Binary quantization (section 7.7): a sign encoder and a linear decoder of bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from avq_jax.checks import as_count, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.progress import steps
from avq_jax.quantization.binary_gradient import (
    Gradient,
    Options,
    Units,
    Weights,
    default_binary_optimizer,
    initial_weights,
    real_bits,
    run_steps,
    start,
    to_rows,
    units_of,
)
from avq_jax.quantization.bits import (
    GROUP,
    bit_losses,
    block_rows,
    from_bits,
    refine_codes,
    solve_decoder,
    to_bits,
)
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.codec import Codes, decode, encode, lookup_table
from avq_jax.quantization.lloyd import History
from avq_jax.quantization.rows import Rows, in_blocks, quadratic_form
from avq_jax.quantization.sgd import interval_counts, learning_failure

__all__ = ["BinaryCodec", "fit_binary"]

# Rows handed to one compiled call by the host loop of `encode`.
_CHUNK = 1 << 17


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["encoder", "threshold", "decoder", "offset"],
    meta_fields=["num_bits", "refine"],
)
@dataclasses.dataclass(frozen=True)
class BinaryCodec:
    """Binary codes ``b = sign(W x + c)``, decoded as ``x~ = U^T b + o``.

    Four bits are one code of 16 words; h is ``num_bits`` rounded up to a multiple of four, and
    the bits added are always -1 and decode to nothing.

    Attributes:
      encoder: ``float32[h, d]`` W.
      threshold: ``float32[h]`` c.
      decoder: ``float32[h, d]`` U.
      offset: ``float32[d]`` o.
      num_bits: bits of a code.
      refine: sweeps of refinement that :func:`~avq_jax.encode` makes; 0 keeps the signs.

    >>> import jax.numpy as jnp
    >>> codec = BinaryCodec(jnp.eye(4), jnp.zeros(4), jnp.eye(4), jnp.zeros(4), num_bits=4)
    >>> codec.dim, codec.num_subspaces, codec.num_codewords
    (4, 1, 16)
    """

    # Unshaped: transformations put other things than arrays into the leaves of a pytree.
    encoder: Any
    threshold: Any
    decoder: Any
    offset: Any
    num_bits: int
    refine: int = 0

    @property
    def dim(self) -> int:
        """Width d of the rows."""
        return self.decoder.shape[1]

    @property
    def num_subspaces(self) -> int:
        """Number of codes of a row."""
        return self.decoder.shape[0] // GROUP

    @property
    def num_codewords(self) -> int:
        """Words of a code, 16."""
        return 1 << GROUP

    @property
    def bits(self) -> float:
        """Bits of a row."""
        return float(self.num_bits)


@functools.partial(jax.jit, static_argnames="refine")
def _encode(
    codec: BinaryCodec, rows: Rows, refine: int
) -> tuple[Int32[Array, "g n"], Float[Array, ""]]:
    """Codes of all rows, block by block, and their mean loss."""
    n = rows.x.shape[0]

    def one(block):
        form = quadratic_form(block, 1)
        z = jnp.matmul(codec.encoder, form.x[0], precision="highest") + codec.threshold[:, None]
        codes = from_bits(z)
        if refine:
            codes = refine_codes(codec.decoder, codec.offset, form, codes, num_sweeps=refine)
        return codes, bit_losses(codec.decoder, codec.offset, form, codes)

    codes, losses = jax.lax.map(one, in_blocks(rows, block_rows(codec.decoder.shape[0])))
    codes = codes.transpose(1, 0, 2).reshape(codec.num_subspaces, -1)[:, :n]
    return codes, jnp.mean(losses.reshape(-1)[:n])


@encode.register
def _(
    codec: BinaryCodec,
    x: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    refine: int | None = None,
) -> Codes:
    """Signs of W x + c, then ``refine`` sweeps under the loss; ``None`` takes the codec's."""
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    refine = as_count(codec.refine if refine is None else refine, name="refine", minimum=0)
    n = rows.x.shape[0]
    if n <= _CHUNK or is_traced(codec, rows):
        return Codes(_encode(codec, rows, refine)[0].T.astype(jnp.uint8))
    out = np.empty((n, codec.num_subspaces), np.uint8)
    for begin in range(0, n, _CHUNK):
        # The last chunk overlaps the one before, so that one compiled shape serves all.
        begin = min(begin, n - _CHUNK)
        part = jax.tree.map(lambda leaf, a=begin: leaf[a : a + _CHUNK], rows)
        out[begin : begin + _CHUNK] = _encode(codec, part, refine)[0].T
    return Codes(jnp.asarray(out))


@decode.register
def _(codec: BinaryCodec, codes: Any) -> Array:
    gain = None
    if isinstance(codes, Codes):
        codes, gain = codes.codes, codes.gain
    codes = jnp.asarray(codes)
    m, last = codec.num_subspaces, codec.num_codewords - 1
    if codes.ndim != 2 or codes.shape[1] != m or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers [n, {m}]; got {codes.dtype} {codes.shape}")
    bits = to_bits(jnp.clip(codes.astype(jnp.int32), 0, last).T)
    rows = jnp.matmul(bits.T, codec.decoder, precision="highest") + codec.offset[None]
    return rows if gain is None else rows * jnp.asarray(gain, jnp.float32)[:, None]


@lookup_table.register
def _(codec: BinaryCodec, q: Any) -> Array:
    q = jnp.asarray(q, jnp.float32)
    if q.ndim not in (1, 2) or q.shape[-1] != codec.dim:
        raise ValueError(f"q must be [{codec.dim}] or [b, {codec.dim}]; got shape {q.shape}")
    rows = q.reshape(-1, codec.dim)
    dots = jnp.matmul(rows, codec.decoder.T, precision="highest")
    words = to_bits(jnp.arange(codec.num_codewords, dtype=jnp.int32)[None])  # [4, 16]
    dots = dots.reshape(-1, codec.num_subspaces, GROUP)
    tables = jnp.einsum("bmj,jk->bmk", dots, words, precision="highest")
    # The offset counts once, in the first row of the table.
    constant = jnp.matmul(rows, codec.offset, precision="highest")
    tables = tables.at[:, 0].add(constant[:, None])
    return tables if q.ndim == 2 else tables[0]


def _to_codec(weights: Weights, units: Units, num_bits: int, refine: int) -> BinaryCodec:
    return BinaryCodec(*to_rows(weights, units), num_bits=num_bits, refine=refine)


@jax.jit
def _solve(codec: BinaryCodec, codes: Array, rows: Rows) -> BinaryCodec:
    real = real_bits(codec.num_bits)
    decoder, offset = solve_decoder(codec.decoder, codec.offset, codes, rows, real)
    return dataclasses.replace(codec, decoder=decoder, offset=offset)


@jax.jit
def _better(old: tuple, new: tuple) -> tuple[BinaryCodec, Array, History]:
    # Not `new < old`: a loss that is NaN must be seen.
    codec, codes, loss = jax.tree.map(lambda a, b: jnp.where(new[2] >= old[2], a, b), old, new)
    share = jnp.mean(to_bits(codes) > 0, axis=1, dtype=jnp.float32)
    both = jnp.sum((share > 0) & (share < 1) & real_bits(codec.num_bits), dtype=jnp.float32)
    return codec, codes, History(loss, both / codec.num_bits)


def _alternate(
    codec: BinaryCodec, codes: Array, loss: Array, rows: Rows
) -> tuple[BinaryCodec, Array, History]:
    """Solve for the decoder, then encode anew; keep both if that lowers the loss."""
    new = _solve(codec, codes, rows)
    return _better((codec, codes, loss), (new, *_encode(new, rows, codec.refine)))


def fit_binary(
    key: Array,
    x: Any,
    scaling: Scaling | None = None,
    *,
    num_bits: int,
    gradient: Gradient | str = "straight_through",
    refine: int = 10,
    optimizer: Any = None,
    batch_size: int = 1024,
    num_steps: int = 2000,
    num_iterations: int = 8,
    direction: Any = None,
    extra: QueryTerms | None = None,
    tolerance: float = 1e-3,
    log_every: int = 100,
    callback: Callable[[BinaryCodec], Any] | None = None,
    progress: bool | None = None,
) -> tuple[BinaryCodec, History]:
    """Learn binary codes under the score-aware loss (section 7.7).

    Encoder ``b = sign(W x + c)`` and decoder ``x~ = U^T b + o`` first descend the mean loss of
    Definition 4.1 by minibatch gradients. The sign has no useful derivative; ``gradient`` says
    what stands in for it. Then the decoder takes its closed form for the codes of all rows, which
    with ``refine`` are those of coordinate descent under the loss from the signs on, and codes
    and decoder alternate while the loss falls. ``scaling=None`` is the reconstruction loss of
    Dai et al.; the paper's score-aware one is a change of this argument. Called inside ``jit`` or
    ``vmap`` it runs the same steps in scans, without early stop, callback or progress.

    Args:
      key: a typed key, ``jax.random.key(seed)``; the same key gives the same codec.
      x: ``[n, d]`` rows.
      scaling: their :class:`~avq_jax.Scaling`; ``None`` is the reconstruction loss.
      num_bits: h, 1 or more. Four are one code: multiples of four waste none.
      gradient: ``"straight_through"``, the sign passes gradients where ``|W x + c| <= 1``; or
        ``"stochastic_neuron"``, bits drawn with probability ``1 / (1 + exp(-W x - c))`` and the
        unbiased distributional gradient of their expected loss.
      refine: most sweeps over the bits of a row when it is encoded, here and by
        :func:`~avq_jax.encode`; 0 keeps the signs.
      optimizer: an ``optax.GradientTransformation``; ``None`` is Adam with cosine decay. It acts
        on the weights in units where the rows are centred with root mean square 1. A new object
        compiles the step anew: keep and reuse it.
      batch_size: rows of a step, drawn with replacement.
      num_steps: gradient steps, 0 or more.
      num_iterations: most alternations of decoder and codes; without ``refine`` at most 1 is made.
      direction: ``[n, d]`` direction of the parallel error, ``None`` for the rows themselves.
      extra: further :class:`~avq_jax.QueryTerms` of the loss.
      tolerance: stop alternating when the loss falls by a smaller fraction than this.
      log_every: steps of one compiled call and one entry of the history.
      callback: called with the codec after each such interval and each alternation; a true
        result stops the learning.
      progress: show a progress bar; ``None`` shows it in a terminal or notebook.

    Returns:
      The :class:`~avq_jax.BinaryCodec`, and the :class:`~avq_jax.History`: the mean loss of the
      minibatches of each interval of gradient steps, then of all rows after each alternation
      (never rising, and the last is that of the codec); and the fraction of bits that took
      both signs.

    Raises:
      ValueError: sizes out of range, an unknown gradient, rows that are not finite.
      FloatingPointError: a loss that is not finite, with the step; its ``state`` attribute is the
        last good codec.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 8))
    >>> scaling = avq_jax.scaling(avq_jax.Threshold(1.0), jax.numpy.linalg.norm(x, axis=1), dim=8)
    >>> codec, history = fit_binary(jax.random.key(1), x, scaling, num_bits=16, num_steps=100)
    >>> avq_jax.encode(codec, x, scaling).codes.shape
    (500, 4)

    Reference:
      Guo et al. 2020, section 7.7; Dai et al., Stochastic Generative Hashing, 2017.
    """
    rows = as_learning_rows(x, scaling, direction, extra)
    num_bits = as_count(num_bits, name="num_bits")
    num_steps = as_count(num_steps, name="num_steps", minimum=0)
    refine = as_count(refine, name="refine", minimum=0)
    num_iterations = as_count(num_iterations, name="num_iterations", minimum=0)
    num_iterations = min(num_iterations, num_iterations if refine else 1)
    if gradient not in ("straight_through", "stochastic_neuron"):
        raise ValueError(
            f"gradient must be 'straight_through' or 'stochastic_neuron'; got {gradient!r}"
        )
    if tolerance < 0:
        raise ValueError(f"tolerance must be >= 0; got {tolerance}")
    options = Options(
        gradient,
        as_count(batch_size, name="batch_size"),
        as_count(log_every, name="log_every"),
        num_bits,
    )
    optimizer = default_binary_optimizer(num_steps) if optimizer is None else optimizer
    rows = jax.tree.map(jnp.asarray, rows)
    units = units_of(rows)
    key_start, key_steps = jax.random.split(key)
    state = start(initial_weights(key_start, rows, units, num_bits), optimizer)
    counts = interval_counts(num_steps, options.log_every)

    if is_traced(key, rows):

        def interval(state, count):
            state, _, entry = run_steps(key_steps, state, rows, units, count, optimizer, options)
            return state, entry

        def alternate(carry, _):
            codec, codes, loss = carry
            codec, codes, history = _alternate(codec, codes, loss, rows)
            return (codec, codes, history.loss), history

        state, first = jax.lax.scan(interval, state, jnp.asarray(counts))
        codec = _to_codec(state.weights, units, num_bits, refine)
        carry = (codec, *_encode(codec, rows, refine))
        (codec, *_), second = jax.lax.scan(alternate, carry, None, length=num_iterations)
        return codec, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second)

    entries: list[History] = []
    for i in steps(len(counts), "learning bits", progress):
        new, losses, entry = run_steps(key_steps, state, rows, units, counts[i], optimizer, options)
        if bool(new.failed):
            losses = np.asarray(losses)[: counts[i]]
            bad = int(np.argmax(~np.isfinite(losses)))
            good = _to_codec(new.good, units, num_bits, refine)
            raise learning_failure(losses[bad], int(state.step) + bad, good)
        state = new
        entries.append(entry)
        if callback is not None and callback(_to_codec(state.weights, units, num_bits, refine)):
            num_iterations = 0
            break
    codec = _to_codec(state.weights, units, num_bits, refine)
    codes, loss = _encode(codec, rows, refine)
    if not np.isfinite(loss):
        raise learning_failure(loss, num_steps, _to_codec(state.good, units, num_bits, refine))
    for i in steps(num_iterations, "refining bits", progress):
        new_codec, codes, entry = _alternate(codec, codes, loss, rows)
        if not np.isfinite(entry.loss):
            raise learning_failure(entry.loss, num_steps + i, codec)
        codec = new_codec
        entries.append(entry)
        if callback is not None and callback(codec):
            break
        if float(loss) - float(entry.loss) <= tolerance * float(loss):
            break
        loss = entry.loss
    loss, usage = np.array(entries, np.float32).reshape(-1, 2).T
    return codec, History(loss, usage)
