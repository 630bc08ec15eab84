"""Rotations: orthogonal changes of coordinates before a codec, where dimensions are correlated.

Inner products, norms and the score-aware loss do not change under an orthogonal R, so any codec
may quantize R x in place of x, with directions R u, and answer a query by the table of R q. What
changes is what a subspace sees: by principal axes, dealt out so that subspaces carry equal shares,
or by random ones, the codewords of a product codebook go further. Additive codebooks have words of
the full width and gain nothing from a rotation but a better start.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avq_jax.checks import as_count, as_rows, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.codec import Codes, Wrapper, decode, encode, lookup_table
from avq_jax.quantization.rows import Rows

__all__ = ["Method", "Rotated", "random_rotation", "rotation", "turn_rows"]

Method = Literal["pca", "random"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codec", "matrix"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True)
class Rotated(Wrapper):
    """Any codec of the rotated rows, ``x~ = R^T decode(codes)``.

    Attributes:
      codec: the codec of the rows R x.
      matrix: ``float32[d, d]`` orthogonal R.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[0.], [1.]], [[5.], [7.]]]), dim=2)
    >>> codec = Rotated(book, jnp.array([[0., 1.], [-1., 0.]]))
    >>> avq_jax.decode(codec, jnp.array([[1, 0]], jnp.uint8)).tolist()
    [[-5.0, 1.0]]
    """

    # Unshaped: transformations put other things than arrays into the leaves of a pytree.
    codec: Any
    matrix: Any
    # Classes with like fields are one structure to jaxlib 0.10.2: a static field tells them apart.
    kind: str = dataclasses.field(default="rotated", kw_only=True, repr=False)


def _turn(matrix: Array, v: Any) -> Array:
    return jnp.einsum("ed,...d->...e", matrix, jnp.asarray(v), precision="highest")


def turn_rows(matrix: Array, rows: Rows) -> Rows:
    """Turn rows, their directions and any further terms by R; losses stay what they are."""
    extra = rows.extra
    return Rows(
        _turn(matrix, rows.x),
        rows.scaling,
        None if rows.direction is None else _turn(matrix, rows.direction),
        None if extra is None else QueryTerms(_turn(matrix, extra.directions), extra.weights),
    )


@encode.register
def _(
    codec: Rotated,
    x: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    **options: Any,
) -> Codes:
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    rows = turn_rows(codec.matrix, rows)
    return encode(
        codec.codec, rows.x, rows.scaling, direction=rows.direction, extra=rows.extra, **options
    )


@decode.register
def _(codec: Rotated, codes: Any) -> Array:
    return _turn(codec.matrix.T, decode(codec.codec, codes))


@lookup_table.register
def _(codec: Rotated, q: Any) -> Array:
    q = jnp.asarray(q, jnp.float32)
    if q.ndim not in (1, 2) or q.shape[-1] != codec.dim:
        raise ValueError(f"q must be [{codec.dim}] or [b, {codec.dim}]; got shape {q.shape}")
    return lookup_table(codec.codec, _turn(codec.matrix, q))


def random_rotation(key: Array, dim: int) -> Float[Array, "d d"]:
    """Draw uniformly from all rotations and reflections (Haar measure)."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (dim, dim)))
    return q * jnp.sign(jnp.diagonal(r))[None]


def rotation(
    key: Array, x: Any, *, num_subspaces: int = 1, method: Method = "pca"
) -> Float[Array, "d d"]:
    """Give an orthogonal matrix to rotate rows by.

    Args:
      key: a typed key; only ``"random"`` draws from it.
      x: ``[n, d]`` rows.
      num_subspaces: m, of the product codebook that follows.
      method: ``"pca"``, the principal axes dealt to the subspaces so that the products of their
        variances are as equal as a greedy choice makes them (the parametric solution of OPQ), or
        ``"random"``, uniform over all rotations and reflections.

    Returns:
      ``float32[d, d]`` R; ``x @ R.T`` are the rotated rows.

    Raises:
      ValueError: an unknown method, sizes out of range, rows that are not finite.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (100, 4)) * jax.numpy.array([[8., 4., 2., 1.]])
    >>> R = rotation(jax.random.key(1), x, num_subspaces=2)
    >>> spread = jax.numpy.std(x @ R.T, axis=0)  # the largest and smallest share a subspace
    >>> bool(spread[0] > spread[2] > spread[3] > spread[1])
    True

    Reference:
      Ge et al., Optimized Product Quantization, 2013.
    """
    x = jnp.asarray(as_rows(x, name="x"))
    d = x.shape[1]
    m = as_count(num_subspaces, name="num_subspaces")
    if m > d:
        raise ValueError(f"num_subspaces must be at most the width of x, {d}; got {m}")
    if method == "random":
        return random_rotation(key, d)
    if method != "pca":
        raise ValueError(f"method must be 'pca' or 'random'; got {method!r}")
    if is_traced(x):
        raise TypeError("rotation by 'pca' deals axes out on the host; call it outside jit")
    host = np.asarray(x, np.float64)
    host = host - host.mean(axis=0)
    values, vectors = np.linalg.eigh(host.T @ host / len(host))
    width = -(-d // m)
    logs = np.log(np.maximum(values, 1e-12 * max(values.max(), 1e-30)))
    members: list[list[int]] = [[] for _ in range(m)]
    room = [min(width, max(d - j * width, 0)) for j in range(m)]
    for axis in np.argsort(-values):
        # The relative logarithm is positive: without it an empty subspace would look full.
        totals = [
            np.sum(logs[members[j]] - logs.min()) if len(members[j]) < room[j] else np.inf
            for j in range(m)
        ]
        members[int(np.argmin(totals))].append(int(axis))
    return jnp.asarray(vectors[:, np.concatenate(members).astype(int)].T, jnp.float32)
