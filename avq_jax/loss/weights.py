"""Weight functions w(t) of an inner product t = <q, x> (Definition 3.1).

A weight function is a pytree with a `__call__`: its parameters are data, so a new value never
retraces a compiled function, and it can be differentiated and vmapped. Any other pytree with
`__call__(t)` works wherever these do; register a closed form for it with
`avq_jax.loss.moments.register`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

Weight = Callable[[Array], Array]
"""Any callable t -> w(t) >= 0, elementwise; a registered pytree if it has to cross `jit`."""


def _check_parameter(value: Any, name: str, *, minimum: float = -math.inf) -> None:
    # Tracers and the placeholders of pytree transformations pass through unchecked.
    if not isinstance(value, (bool, int, float, np.ndarray, np.generic)):
        return
    number = np.asarray(value)
    if number.dtype == np.bool_ or not np.issubdtype(number.dtype, np.number):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    if np.isnan(number).any():
        raise ValueError(f"{name} must not be NaN, got {value!r}")
    if (number < minimum).any():
        raise ValueError(f"{name} must be at least {minimum:g}, got {value!r}")


def _as_float(t: ArrayLike) -> Array:
    """Float32, or float64 where the input has it: half precision is a storage type only."""
    t = jnp.asarray(t)
    return t if t.dtype == jnp.float64 else t.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold:
    r"""The indicator weight w(t) = I(t >= T) of Section 3.2: only queries scoring >= T count.

    T is in the units of <q, x>: with row norms near 4, T = 0.2 changes next to nothing.

    Args:
        T: threshold, any real number that is not NaN. T <= -||x|| weighs every query alike.

    Raises:
        ValueError: T is NaN. TypeError: T is not a number.

    >>> import jax.numpy as jnp
    >>> Threshold(0.2)(jnp.array([0.1, 0.2, 0.3]))
    Array([0., 1., 1.], dtype=float32)

    Reference: Guo et al. 2020, Section 3.2.
    """

    T: Any

    def __post_init__(self) -> None:
        _check_parameter(self.T, "T")

    def __call__(self, t: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Evaluate w(t) elementwise.

        >>> float(Threshold(0.2)(0.3))
        1.0
        """
        t = _as_float(t)
        return (t >= jnp.asarray(self.T).astype(t.dtype)).astype(t.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Power:
    r"""The power weight w(t) = max(t, 0)^p, for which eta = p + 1 in every dimension.

    It has no scale: rescaling the data rescales all weights by one common factor.

    Args:
        p: exponent, p >= 0 (checked when concrete). p = 0 is the constant weight.

    Raises:
        ValueError: p is NaN or negative. TypeError: p is not a number.

    >>> import jax.numpy as jnp
    >>> Power(2.0)(jnp.array([-1.0, 0.5, 2.0]))
    Array([0.  , 0.25, 4.  ], dtype=float32)

    Reference: Guo et al. 2020, Definition 3.1 and Theorem 3.2.
    """

    p: Any

    def __post_init__(self) -> None:
        _check_parameter(self.p, "p", minimum=0.0)

    def __call__(self, t: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Evaluate w(t) elementwise.

        >>> float(Power(3.0)(2.0))
        8.0
        """
        t = _as_float(t)
        p = jnp.asarray(self.p).astype(t.dtype)
        positive = t > 0
        return jnp.where(positive, jnp.where(positive, t, 1) ** p, (p == 0).astype(t.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exponential:
    r"""The exponential weight w(t) = exp(b t), smooth, for softmax-like uses of the score.

    Args:
        b: rate in the units of 1/<q, x>, any finite number; b = 0 is the constant weight.

    Raises:
        ValueError: b is NaN. TypeError: b is not a number.

    >>> import jax.numpy as jnp
    >>> Exponential(1.0)(jnp.array([0.0, 1.0]))
    Array([1.       , 2.7182817], dtype=float32)

    Reference: Guo et al. 2020, Definition 3.1; the integrals are those of the
    von Mises-Fisher distribution (Mardia and Jupp, Directional Statistics, Section 9.3).
    """

    b: Any

    def __post_init__(self) -> None:
        _check_parameter(self.b, "b")

    def __call__(self, t: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Evaluate w(t) elementwise.

        >>> float(Exponential(2.0)(0.0))
        1.0
        """
        t = _as_float(t)
        return jnp.exp(jnp.asarray(self.b).astype(t.dtype) * t)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uniform:
    r"""The constant weight w(t) = 1: the reconstruction loss ||x - x~||^2 (Equation 1).

    >>> import jax.numpy as jnp
    >>> Uniform()(jnp.array([-1.0, 1.0]))
    Array([1., 1.], dtype=float32)

    Reference: Guo et al. 2020, Equation 1.
    """

    def __call__(self, t: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
        """Evaluate w(t) elementwise.

        >>> float(Uniform()(0.3))
        1.0
        """
        return jnp.ones_like(_as_float(t))
