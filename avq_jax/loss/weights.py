"""Weight functions w(t) of an inner product t = <q, x> (Definition 3.1).

A weight function is a pytree with a `__call__`: its parameters are data, so a new value never
retraces a compiled function, and it can be differentiated and vmapped. Any other pytree with
`__call__(t)` works wherever these do; register a closed form for it with
`avq_jax.loss.moments.register`. Parameters are checked where they are used (`eta`, `scaling`), not
at construction: gradients and masks come in the same classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

Weight = Callable[[Array], Array]
"""Any callable t -> w(t) >= 0, elementwise; a registered pytree if it has to cross `jit`."""


def _family(name: str) -> Any:
    # jaxlib 0.10.2 takes the structures of two registered dataclasses for equal when their fields
    # are alike, whatever the class, so a jit cache can run one class's code for the other. A
    # static field that differs keeps them apart.
    return dataclasses.field(default=name, kw_only=True, repr=False, metadata={"static": True})


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

    >>> import jax.numpy as jnp
    >>> Threshold(0.2)(jnp.array([0.1, 0.2, 0.3]))
    Array([0., 1., 1.], dtype=float32)

    Reference: Guo et al. 2020, Section 3.2.
    """

    T: Any
    family: str = _family("threshold")

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
        p: exponent, p >= 0 (checked where it is used, when concrete). p = 0 is the constant weight.

    >>> import jax.numpy as jnp
    >>> Power(2.0)(jnp.array([-1.0, 0.5, 2.0]))
    Array([0.  , 0.25, 4.  ], dtype=float32)

    Reference: Guo et al. 2020, Definition 3.1 and Theorem 3.2.
    """

    p: Any
    family: str = _family("power")

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

    >>> import jax.numpy as jnp
    >>> Exponential(1.0)(jnp.array([0.0, 1.0]))
    Array([1.       , 2.7182817], dtype=float32)

    Reference: Guo et al. 2020, Definition 3.1; the integrals are those of the
    von Mises-Fisher distribution (Mardia and Jupp, Directional Statistics, Section 9.3).
    """

    b: Any
    family: str = _family("exponential")

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
