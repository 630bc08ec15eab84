"""Gradient learning of binary codes: straight through the sign, or by stochastic neurons."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.quantization.bits import GROUP, from_bits, solve_decoder
from avq_jax.quantization.lloyd import History
from avq_jax.quantization.rows import QuadraticForm, Rows, quadratic_form
from avq_jax.quantization.sgd import init_optimizer, optimizer_step
from avq_jax.quantization.update import row_losses

__all__ = [
    "Gradient",
    "GradientState",
    "Options",
    "Units",
    "Weights",
    "batch_loss",
    "default_binary_optimizer",
    "initial_weights",
    "real_bits",
    "run_steps",
    "start",
    "to_rows",
    "units_of",
]

Gradient = Literal["straight_through", "stochastic_neuron"]

_LEARNING_RATE = 3e-3


class Weights(NamedTuple):
    """What the gradient learns, in units where the rows are centred with root mean square 1.

    Attributes:
      encoder: ``[h, d]`` W.
      threshold: ``[h]`` c.
      decoder: ``[h, d]`` U.
      offset: ``[d]`` o.
    """

    encoder: Float[Array, "h d"]
    threshold: Float[Array, " h"]
    decoder: Float[Array, "h d"]
    offset: Float[Array, " d"]


class Units(NamedTuple):
    """Mean of the rows, root mean square of what is left, and mean weight of their loss."""

    center: Float[Array, " d"]
    size: Float[Array, ""]
    weight: Float[Array, ""]


class Options(NamedTuple):
    """Static options of a gradient step."""

    gradient: Gradient
    batch_size: int
    log_every: int
    num_bits: int


class GradientState(NamedTuple):
    """What a step carries.

    ``good`` are the last weights whose minibatch loss was finite; once ``failed`` is set they no
    longer change.
    """

    weights: Weights
    optimizer_state: Any
    good: Weights
    failed: Bool[Array, ""]
    step: Int32[Array, ""]


@functools.cache
def default_binary_optimizer(num_steps: int) -> Any:
    """Adam with a cosine decay to zero over ``num_steps``.

    Args:
      num_steps: gradient steps of the whole learning.

    Returns:
      An ``optax.GradientTransformation``; the same object for the same ``num_steps``, so that
      compiled steps are reused.

    >>> default_binary_optimizer(10) is default_binary_optimizer(10)
    True
    """
    import optax  # type: ignore[import-untyped]  # deferred: it is slow to import

    return optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, max(num_steps, 1)))


@jax.jit
def units_of(rows: Rows) -> Units:
    """Measure the units of the rows; a size or weight of zero is taken as 1."""
    center = jnp.mean(rows.x, axis=0)
    square = jnp.mean((rows.x - center[None]) ** 2)
    weight = jnp.mean(rows.scaling.orthogonal)
    return Units(
        center,
        jnp.sqrt(jnp.where(square > 0, square, 1)),
        jnp.where(weight > 0, weight, 1),
    )


def _in_units(rows: Rows, units: Units) -> QuadraticForm:
    """Give the loss in the units of the gradient; directions are those of the rows as they are."""
    form = quadratic_form(rows, 1)
    return form._replace(
        x=(form.x - units.center[None, :, None]) / units.size,
        isotropic=form.isotropic / units.weight,
        weights=form.weights / units.weight,
    )


def to_rows(weights: Weights, units: Units) -> Weights:
    """Give the weights in the units of the rows."""
    encoder = weights.encoder / units.size
    shift = jnp.matmul(encoder, units.center, precision="highest")
    return Weights(
        encoder,
        weights.threshold - shift,
        weights.decoder * units.size,
        weights.offset * units.size + units.center,
    )


def real_bits(num_bits: int) -> Bool[Array, " h"]:
    """Which of the bits, in whole codes, count."""
    return jnp.arange(-(-num_bits // GROUP) * GROUP) < num_bits


@functools.partial(jax.jit, static_argnames="num_bits")
def initial_weights(key: Array, rows: Rows, units: Units, num_bits: int) -> Weights:
    """Random projections, and the decoder that suits their signs best."""
    d = rows.x.shape[1]
    real = real_bits(num_bits)
    h = real.shape[0]
    encoder = jnp.where(real[:, None], jax.random.normal(key, (h, d)) / math.sqrt(d), 0)
    threshold = jnp.where(real, 0.0, -1.0)
    centred = rows._replace(
        x=(rows.x - units.center[None]) / units.size,
        direction=rows.x if rows.direction is None else rows.direction,
    )
    codes = from_bits(encoder @ centred.x.T + threshold[:, None])
    decoder, offset = solve_decoder(jnp.zeros((h, d)), jnp.zeros(d), codes, centred, real)
    return Weights(encoder, threshold, decoder, offset)


def batch_loss(
    weights: Weights, key: Array, form: QuadraticForm, gradient: Gradient
) -> tuple[Float[Array, ""], Float[Array, "h B"]]:
    """Mean loss of a minibatch and its bits; its derivative is that of the chosen estimator.

    ``"straight_through"``: b = sign(z), z = W x + c, and db/dz = 1 where |z| <= 1.

    ``"stochastic_neuron"``: b_k is +1 with probability p(z_k) = 1 / (1 + exp(-z_k)). The
    distributional derivative of Dai et al. 2017, section 3.2, is

      ``d E[l(b)] / dz_k = p'(z_k) E[l(b; b_k = 1) - l(b; b_k = -1)]``.

    They expand the difference to first order; the loss is a quadratic here, so that it is
    ``-4 U_k^T M r - 4 b_k U_k^T M U_k`` and the estimate has no bias.
    """
    z = weights.encoder @ form.x[0] + weights.threshold[:, None]
    if gradient == "straight_through":
        soft = jnp.clip(z, -1, 1)
        bits = soft + jax.lax.stop_gradient(jnp.where(z >= 0, 1.0, -1.0) - soft)
        r = form.x[0] - weights.decoder.T @ bits - weights.offset[:, None]
        return jnp.mean(row_losses(form, r[None])), bits
    p = jax.nn.sigmoid(z)
    bits = jnp.where(jax.random.uniform(key, z.shape) < jax.lax.stop_gradient(p), 1.0, -1.0)
    r = form.x[0] - weights.decoder.T @ bits - weights.offset[:, None]
    loss = jnp.mean(row_losses(form, r[None]))
    decoder, r = jax.lax.stop_gradient((weights.decoder, r))
    directions = form.directions[:, 0]  # [R, d, B]
    across = jnp.einsum("hd,rdb->rhb", decoder, directions)
    along = form.weights * jnp.einsum("rdb,db->rb", directions, r)
    force = form.isotropic[None] * (decoder @ r) + jnp.sum(along[:, None] * across, axis=0)
    curvature = form.isotropic[None] * jnp.sum(decoder**2, axis=1)[:, None]
    curvature = curvature + jnp.sum(form.weights[:, None] * across**2, axis=0)
    difference = -4 * (force + bits * curvature)
    surrogate = jnp.sum(difference * (p - jax.lax.stop_gradient(p))) / z.shape[1]
    return loss + surrogate, bits


def start(weights: Weights, optimizer: Any) -> GradientState:
    """Give the state at step 0."""
    state = init_optimizer(optimizer, weights)
    return GradientState(weights, state, weights, jnp.array(False), jnp.array(0, jnp.int32))


@functools.partial(jax.jit, static_argnames=("optimizer", "options"))
def run_steps(
    key: Array,
    state: GradientState,
    rows: Rows,
    units: Units,
    count: Any,
    optimizer: Any,
    options: Options,
) -> tuple[GradientState, Float[Array, " log_every"], History]:
    """``count`` gradient steps, at most ``log_every``, in one dispatch.

    Returns:
      The next state; the loss of each step (0 beyond ``count``); their mean, and the fraction of
      bits that took both signs.
    """
    real = real_bits(options.num_bits)
    column = real[:, None]

    def body(i, loop):
        state, losses, seen = loop
        draw, noise = jax.random.split(jax.random.fold_in(key, state.step))
        picks = jax.random.randint(draw, (options.batch_size,), 0, rows.x.shape[0])
        form = _in_units(jax.tree.map(lambda leaf: leaf[picks], rows), units)
        (loss, bits), gradient = jax.value_and_grad(batch_loss, has_aux=True)(
            state.weights, noise, form, options.gradient
        )
        weights, optimizer_state = optimizer_step(
            optimizer, gradient, state.optimizer_state, state.weights
        )
        weights = Weights(
            jnp.where(column, weights.encoder, 0),
            jnp.where(real, weights.threshold, -1),
            jnp.where(column, weights.decoder, 0),
            weights.offset,
        )
        failed = state.failed | ~jnp.isfinite(loss)
        good = jax.tree.map(lambda a, b: jnp.where(failed, a, b), state.good, state.weights)
        seen = seen | jnp.stack([jnp.any(bits < 0, axis=1), jnp.any(bits > 0, axis=1)])
        state = GradientState(weights, optimizer_state, good, failed, state.step + 1)
        return state, losses.at[i].set(loss * units.weight * units.size**2), seen

    begin = (
        state,
        jnp.zeros(options.log_every, jnp.float32),
        jnp.zeros((2, real.shape[0]), bool),
    )
    state, losses, seen = jax.lax.fori_loop(0, count, body, begin)
    usage = jnp.sum(jnp.all(seen, axis=0) & real, dtype=jnp.float32) / options.num_bits
    return state, losses, History(jnp.sum(losses) / jnp.float32(count), usage)
