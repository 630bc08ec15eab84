"""Fine-tuning of learned codewords for the order of the best rows, by gradient through ADC scores.

The score-aware loss weighs the errors of a row by where its queries may lie; a ranking loss looks
at real queries and at the rows that compete for them. For a query q of unit length, rows x_i and
decoded rows x~_i it is the divergence of two distributions over the rows,

  ``KL(p || p~)``,  ``p_i ~ exp(<q, x_i> / tau)``,  ``p~_i ~ exp(<q, x~_i> / tau)``,

the listwise cross entropy less its least value. The codes have no gradient; they are fixed while
the codewords move and are made anew by the encoder between rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.checks import as_count, as_rows, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.progress import steps
from avq_jax.quantization.additive import AdditiveCodebook
from avq_jax.quantization.codebook import Codebook, as_learning_rows
from avq_jax.quantization.codec import decode, encode, lookup_table
from avq_jax.quantization.ranking import (
    divergence,
    error_spread,
    mean_divergence,
    nearest_rows,
)
from avq_jax.quantization.rotation import Rotated
from avq_jax.quantization.rows import unit
from avq_jax.quantization.sgd import init_optimizer, optimizer_step
from xla_kernels import adc_top_k

__all__ = ["RankingHistory", "fit_ranking"]

_LEARNING_RATE = 0.0003
# Rounds without a gain that end the learning.
_PATIENCE = 2


class RankingHistory(NamedTuple):
    """What happened in each round of :func:`~avq_jax.fit_ranking`.

    Attributes:
      loss: ``[rounds]`` mean loss of the minibatches, over the candidates of their queries.
      held_out: ``[rounds + 1]`` mean loss of the held-out queries over all rows, with the codes
        made anew; the first is that of the codec that was given.
    """

    loss: Float[np.ndarray, " t"]
    held_out: Float[np.ndarray, " t+1"]


class _Lists(NamedTuple):
    """Queries and the rows that compete for them."""

    queries: Float[Array, "b d"]
    ids: Int32[Array, "b C"]
    exact: Float[Array, "b C"]
    valid: Bool[Array, "b C"]  # false for the second mention of a row


def _words(codec: Any) -> Array:
    if isinstance(codec, Rotated):
        return _words(codec.codec)
    if isinstance(codec, Codebook | AdditiveCodebook):
        return codec.codewords
    raise TypeError(
        "codec must be a Codebook, an AdditiveCodebook or a Rotated one of these "
        f"(scale it afterwards); got {type(codec).__name__}"
    )


def _with_words(codec: Any, words: Array) -> Any:
    if isinstance(codec, Rotated):
        return dataclasses.replace(codec, codec=_with_words(codec.codec, words))
    return dataclasses.replace(codec, codewords=words)


def _list_loss(words: Array, codec: Any, codes: Array, lists: _Lists, temperature: Array) -> Array:
    """Mean loss of a minibatch over its candidates, through the tables of ADC."""
    tables = lookup_table(_with_words(codec, words), lists.queries)  # [b, m, k]
    picked = jnp.take_along_axis(
        tables, codes[lists.ids].transpose(0, 2, 1).astype(jnp.int32), axis=2
    )
    scores = jnp.sum(picked, axis=1)
    return jnp.mean(divergence(lists.exact, scores, lists.valid, temperature))


@jax.jit
def _join(queries: Array, x: Array, top: tuple[Array, Array], found: Array) -> _Lists:
    """True neighbours, and what ADC ranks high beside them."""
    known = jnp.any(found[:, :, None] == top[1][:, None, :], axis=-1)
    scores = jax.lax.map(lambda z: jnp.matmul(x[z[1]], z[0], precision="highest"), (queries, found))
    return _Lists(
        queries,
        jnp.concatenate([top[1], found], axis=1),
        jnp.concatenate([top[0], scores], axis=1),
        jnp.concatenate([jnp.ones_like(top[1], bool), ~known], axis=1),
    )


@functools.partial(jax.jit, static_argnames=("optimizer", "batch_size"))
def _descend(
    key: Array,
    words: Array,
    state: Any,
    codec: Any,
    codes: Array,
    lists: _Lists,
    temperature: Array,
    num_steps: Array,
    optimizer: Any,
    batch_size: int,
) -> tuple[Array, Any, Array]:
    """``num_steps`` gradient steps for fixed codes, and the mean loss of their minibatches."""

    def body(i, carry):
        words, state, total = carry
        picks = jax.random.randint(
            jax.random.fold_in(key, i), (batch_size,), 0, lists.queries.shape[0]
        )
        batch = jax.tree.map(lambda leaf: leaf[picks], lists)
        loss, gradient = jax.value_and_grad(_list_loss)(words, codec, codes, batch, temperature)
        words, state = optimizer_step(optimizer, gradient, state, words)
        return words, state, total + loss

    start = (words, state, jnp.float32(0))
    words, state, total = jax.lax.fori_loop(0, num_steps, body, start)
    return words, state, total / jnp.maximum(num_steps, 1).astype(jnp.float32)


@functools.cache
def _default_optimizer() -> Any:
    import optax  # type: ignore[import-untyped]  # deferred: it is slow to import

    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-20),
        optax.scale_by_param_block_rms(min_scale=1e-20),
        optax.scale_by_learning_rate(_LEARNING_RATE),
    )


def fit_ranking(
    key: Array,
    codec: Any,
    x: Any,
    queries: Any,
    scaling: Scaling | None = None,
    *,
    temperature: float | None = None,
    num_neighbors: int = 32,
    num_negatives: int = 96,
    num_rounds: int = 16,
    num_steps: int = 100,
    batch_size: int = 256,
    optimizer: Any = None,
    held_out: float = 0.25,
    direction: Any = None,
    extra: QueryTerms | None = None,
    callback: Callable[[Any], Any] | None = None,
    progress: bool | None = None,
) -> tuple[Any, RankingHistory]:
    """Fine-tune the words of a learned codec for the order of the best rows of sample queries.

    A round encodes all rows under the score-aware loss, gathers the candidates of each query (its
    true neighbours, and the rows that ADC ranks highest), and lets an optimizer lower the
    divergence ``KL(p || p~)`` over them, ``p ~ exp(<q, x> / tau)``, by the gradient through the
    lookup tables; codes, and the matrix of a :class:`~avq_jax.Rotated` codec, stay as they are. The
    codec returned is the one of least loss over all rows on queries held out, encoding anew
    included, among the one given and those after each round: it is never worse than the one given
    by that measure, and equal to it where nothing was gained.

    Args:
      key: a typed key, ``jax.random.key(seed)``; the same key gives the same codec.
      codec: a learned :class:`~avq_jax.Codebook`, :class:`~avq_jax.AdditiveCodebook`, or
        :class:`~avq_jax.Rotated` one of these.
      x: ``[n, d]`` rows to be searched.
      queries: ``[s, d]`` sample of queries, s >= 2, of any norm; never those that will be tested.
        Rows kept out of x will do where queries are like rows; a row of x itself is its own
        neighbour, which teaches little.
      scaling: of the rows, for their codes; ``None`` is the reconstruction loss.
      temperature: tau > 0, in the units of <q, x> for q of unit length. ``None`` is the standard
        deviation of the errors ``<q, x - x~>`` of the true neighbours under the given codec.
      num_neighbors: true neighbours of a query among its candidates, at most n.
      num_negatives: rows of the highest ADC scores among its candidates, at most n.
      num_rounds: most rounds; two in a row without a gain end the learning.
      num_steps: gradient steps of a round.
      batch_size: queries of a step, drawn with replacement.
      optimizer: an ``optax.GradientTransformation`` over the codewords; ``None`` is Adam with a
        step of a fraction of their root mean square. A new object compiles the steps anew.
      held_out: fraction of the queries that choose the codec and give no gradient, above 0 and
        below 1.
      direction: ``[n, d]`` direction of the parallel error in encoding, ``None`` for the rows.
      extra: further :class:`~avq_jax.QueryTerms` of the loss of encoding.
      callback: called with the codec after each round; a true result stops the learning.
      progress: show a progress bar; ``None`` shows it in a terminal or notebook.

    Returns:
      A codec of the same kind, and the :class:`~avq_jax.RankingHistory`. Codes made with the codec
      given do not fit the one returned: encode anew.

    Raises:
      TypeError: another kind of codec, or traced arguments.
      ValueError: values out of range, sizes that do not fit, values that are not finite.
      FloatingPointError: a loss that is not finite, with the round; its ``state`` attribute is the
        best codec so far.

    >>> import avq_jax, jax
    >>> x, queries = jax.random.normal(jax.random.key(0), (2, 300, 8))
    >>> state, _ = avq_jax.fit(jax.random.key(1), x, num_subspaces=4, num_codewords=4)
    >>> codec, history = fit_ranking(jax.random.key(2), state.codebook, x, queries, num_rounds=3)
    >>> bool(history.held_out.min() <= history.held_out[0])
    True

    Reference:
      Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, 2007; Zhan et al.,
      Jointly Optimizing Query Encoder and Product Quantization, 2021.
    """
    words = _words(codec)
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    queries = as_rows(queries, name="queries", min_rows=2)
    if is_traced(key, codec, rows, queries):
        raise TypeError("fit_ranking compares codecs on the host; call it outside jit")
    if queries.shape[1] != codec.dim:
        raise ValueError(
            f"queries must have the width of the codec, {codec.dim}; got {queries.shape[1]}"
        )
    n, s = rows.x.shape[0], queries.shape[0]
    num_neighbors = min(as_count(num_neighbors, name="num_neighbors"), n)
    num_negatives = min(as_count(num_negatives, name="num_negatives"), n)
    num_rounds = as_count(num_rounds, name="num_rounds", minimum=0)
    num_steps = as_count(num_steps, name="num_steps")
    batch_size = as_count(batch_size, name="batch_size")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be above 0 and below 1; got {held_out}")
    if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a finite number above 0; got {temperature}")
    optimizer = _default_optimizer() if optimizer is None else optimizer
    state = init_optimizer(optimizer, words)

    rows = jax.tree.map(jnp.asarray, rows)
    key_order, key_steps = jax.random.split(key)
    order = jax.random.permutation(key_order, s)
    asked = unit(jnp.asarray(queries))[order]
    count = min(max(1, round(held_out * s)), s - 1)
    judges, pupils = asked[:count], asked[count:]
    terms = {"direction": rows.direction, "extra": rows.extra}

    def encoded(codec: Any) -> tuple[Array, Array]:
        codes = encode(codec, rows.x, rows.scaling, **terms).codes
        return codes, decode(codec, codes)

    codes, decoded = encoded(codec)
    top = nearest_rows(pupils, rows.x, num_neighbors)
    if temperature is None:
        tau = error_spread(pupils, rows.x, decoded, top[1])
    else:
        tau = jnp.float32(temperature)

    def judge(decoded: Array) -> float:
        return float(mean_divergence(judges, rows.x, decoded, tau))

    best, least = codec, judge(decoded)
    losses: list[float] = []
    held = [least]
    for i in steps(num_rounds, "fine-tuning codewords", progress):
        tables = lookup_table(codec, pupils)
        found = jnp.asarray(adc_top_k(tables, codes, num_negatives)[1])
        lists = _join(pupils, rows.x, top, found)
        words, state, loss = _descend(
            jax.random.fold_in(key_steps, i),
            _words(codec),
            state,
            codec,
            codes,
            lists,
            tau,
            jnp.int32(num_steps),
            optimizer,
            batch_size,
        )
        codec = _with_words(codec, words)
        finite = math.isfinite(float(loss)) and bool(jnp.all(jnp.isfinite(words)))
        if finite:
            codes, decoded = encoded(codec)
        value = judge(decoded) if finite else math.nan
        if not math.isfinite(value):
            error = FloatingPointError(
                f"the loss became {float(loss)} on minibatches and {value} on held-out queries in "
                f"round {i}; the best codec so far is in this error's `state` attribute (a smaller "
                "learning rate or a larger temperature may help)"
            )
            error.state = best  # type: ignore[attr-defined]
            raise error
        losses.append(float(loss))
        held.append(value)
        if value < least:
            best, least = codec, value
        if callback is not None and callback(codec):
            break
        if len(held) > _PATIENCE and min(held[-_PATIENCE:]) > least:
            break
    return best, RankingHistory(np.array(losses, np.float32), np.array(held, np.float32))
