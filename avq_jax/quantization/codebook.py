"""Product (and, with one subspace, vector) quantization: the codebook and its codec."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from avq_jax.checks import as_count, as_float32, as_rows, check_finite, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.quantization.assignment import assign, block_size
from avq_jax.quantization.codec import Codes, decode, encode, lookup_table
from avq_jax.quantization.rows import Rows, in_blocks, quadratic_form, split, unit
from xla_kernels import assign_codes, available_implementations

__all__ = ["Codebook", "as_learning_rows", "check_magnitude", "encode_rows"]

# Rows handed to one compiled call by the host loop of `encode`.
_CHUNK = 1 << 17
# Sums of weighted squares of rows beyond these leave float32.
_LARGEST, _SMALLEST = 1e14, 1e-14


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codewords"], meta_fields=["dim"])
@dataclasses.dataclass(frozen=True)
class Codebook:
    """Codewords of product quantization, ``x~ = (codewords[0, c_0], ..., codewords[m-1, c_m-1])``.

    Attributes:
      codewords: ``float32[m, k, s]``, k codewords of width s = ceil(d / m) in each of m subspaces.
        One subspace is vector quantization.
      dim: the width d of the rows; columns from d up to m * s are zero padding.

    >>> import jax.numpy as jnp
    >>> Codebook(jnp.zeros((4, 16, 2)), dim=8).num_codewords
    16
    """

    # Unshaped: transformations put other things than arrays into the leaves of a pytree.
    codewords: Any
    dim: int

    @property
    def num_subspaces(self) -> int:
        """Number of subspaces m."""
        return self.codewords.shape[0]

    @property
    def num_codewords(self) -> int:
        """Number of codewords k of a subspace."""
        return self.codewords.shape[1]

    @property
    def bits(self) -> float:
        """Bits of a code, m * log2(k)."""
        return self.num_subspaces * float(np.log2(self.num_codewords))


def encode_rows(
    codewords: Float[Array, "m k s"],
    rows: Rows,
    codes: Int32[Array, "m n"] | None = None,
    *,
    num_sweeps: int,
) -> Int32[Array, "m n"]:
    """Do the assignment step over all rows, block by block; pure."""
    m, k, s = codewords.shape
    n = rows.x.shape[0]
    block = block_size(m, k, s)
    blocks = in_blocks(rows, block)
    if codes is None:
        found = jax.lax.map(
            lambda b: assign(codewords, quadratic_form(b, m), num_sweeps=num_sweeps), blocks
        )
    else:
        start = jnp.pad(codes, ((0, 0), (0, -n % block))).reshape(m, -1, block)
        found = jax.lax.map(
            lambda z: assign(codewords, quadratic_form(z[0], m), z[1], num_sweeps=num_sweeps),
            (blocks, start.transpose(1, 0, 2)),
        )
    return found.transpose(1, 0, 2).reshape(m, -1)[:, :n]


def _encode(codewords: Array, rows: Rows, num_sweeps: int) -> Array:
    compiled = rows.extra is None and available_implementations()["default"] == "cpu"
    return _jit_encode(codewords, rows, num_sweeps, compiled)


@functools.partial(jax.jit, static_argnames=("num_sweeps", "compiled"))
def _jit_encode(codewords: Array, rows: Rows, num_sweeps: int, compiled: bool) -> Array:
    if not compiled:
        return encode_rows(codewords, rows, num_sweeps=num_sweeps).T.astype(jnp.uint8)
    # The same coordinate descent, four times as fast; it knows one direction a row.
    m, _, s = codewords.shape
    pad = ((0, 0), (0, m * s - rows.x.shape[1]))
    isotropic, parallel = rows.scaling.orthogonal, rows.scaling.parallel
    return assign_codes(
        jnp.pad(rows.x, pad),
        codewords,
        direction=jnp.pad(unit(rows.x if rows.direction is None else rows.direction), pad),
        # A row without any weight is encoded under the reconstruction loss.
        orthogonal=jnp.where((isotropic == 0) & (parallel == 0), 1, isotropic),
        weight=parallel - isotropic,
        max_sweeps=num_sweeps,
    )


def as_learning_rows(
    x: Any,
    scaling: Scaling | None,
    direction: Any = None,
    extra: QueryTerms | None = None,
    *,
    dim: int | None = None,
) -> Rows:
    """Check and convert what learners and encoders take; ``scaling=None`` is ``Scaling(1, 1)``.

    Raises:
      ValueError: rows that are not finite, of another width than ``dim`` or too large or small
        for float32 squares; or parts that disagree about the number of rows.
    """
    x = as_rows(x, name="x")
    n, d = x.shape
    if dim is not None and d != dim:
        raise ValueError(f"x must have the width of the codec, {dim}; got rows of width {d}")
    check_magnitude(x)
    if scaling is None:
        scaling = Scaling(jnp.ones(n, jnp.float32), jnp.ones(n, jnp.float32))
    elif not isinstance(scaling, Scaling):
        raise TypeError(
            f"scaling must be a Scaling, as avq_jax.scaling gives it, or None; "
            f"got {type(scaling).__name__}"
        )
    parts = [_vector(getattr(scaling, f), f"scaling.{f}", n) for f in Scaling._fields]
    if direction is not None:
        direction = as_rows(direction, name="direction")
        if direction.shape != (n, d):
            raise ValueError(f"direction must have the shape of x, {(n, d)}; got {direction.shape}")
    if extra is not None:
        extra = _query_terms(extra, n, d)
    return Rows(x, Scaling(*parts), direction, extra)


def check_magnitude(x: Any) -> None:
    """Raise a ValueError where squares of the rows would overflow or vanish in float32."""
    if is_traced(x) or x.size == 0:
        return
    with jax.ensure_compile_time_eval():  # also while something else is traced around x
        peak = float(np.max(np.abs(x)) if isinstance(x, np.ndarray) else jnp.max(jnp.abs(x)))
    if peak > _LARGEST or 0 < peak < _SMALLEST:
        raise ValueError(
            f"x must have its largest absolute value between {_SMALLEST:g} and {_LARGEST:g}, so "
            f"that squared norms fit float32; got {peak:.3g}. Rescale the rows: scores scale along"
        )


def _query_terms(extra: QueryTerms, n: int, d: int) -> QueryTerms:
    directions: Any = as_float32(extra.directions, name="extra.directions")
    weights: Any = as_float32(extra.weights, name="extra.weights")
    shape = weights.shape
    if len(shape) != 2 or shape[0] != n or directions.shape != (*shape, d):
        raise ValueError(
            f"extra must have directions [{n}, R, {d}] and weights [{n}, R]; "
            f"got {directions.shape} and {weights.shape}"
        )
    check_finite(directions, name="extra.directions")
    check_finite(weights, name="extra.weights")
    if not is_traced(weights) and weights.size and float(weights.min()) < 0:
        raise ValueError(f"extra.weights must be >= 0; got {float(weights.min())}")
    return QueryTerms(directions, weights)


def _vector(v: Any, name: str, n: int) -> Any:
    v = jnp.asarray(v, jnp.float32) if is_traced(v) else np.asarray(v, np.float32)
    if v.ndim == 0:
        v = jnp.broadcast_to(v, (n,)) if is_traced(v) else np.full(n, v, np.float32)
    if v.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one value a row of x; got {v.shape}")
    if not is_traced(v):
        bad = ~(np.isfinite(v) & (v >= 0))
        if bad.any():
            i = int(np.argmax(bad))
            raise ValueError(
                f"{name} must be finite and >= 0; got {v[i]} at row {i} ({bad.sum()} such rows)"
            )
    return v


@encode.register
def _(
    codec: Codebook,
    x: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
    num_sweeps: int = 10,
) -> Codes:
    as_count(num_sweeps, name="num_sweeps", minimum=0)
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    n = rows.x.shape[0]
    if n <= _CHUNK or any(is_traced(leaf) for leaf in jax.tree.leaves((codec, rows))):
        return Codes(_encode(codec.codewords, rows, num_sweeps))
    out = np.empty((n, codec.num_subspaces), np.uint8)
    for start in range(0, n, _CHUNK):
        # The last chunk overlaps the one before, so that one compiled shape serves all.
        start = min(start, n - _CHUNK)
        part = jax.tree.map(lambda leaf, a=start: leaf[a : a + _CHUNK], rows)
        out[start : start + _CHUNK] = _encode(codec.codewords, part, num_sweeps)
    return Codes(jnp.asarray(out))


@decode.register
def _(codec: Codebook, codes: Any) -> Array:
    gain = None
    if isinstance(codes, Codes):
        codes, gain = codes.codes, codes.gain
    codes = jnp.asarray(codes)
    m = codec.num_subspaces
    if codes.ndim != 2 or codes.shape[1] != m or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers [n, {m}]; got {codes.dtype} {codes.shape}")
    picked = jax.vmap(lambda c, i: c.at[i].get(mode="clip"), in_axes=(0, 1), out_axes=1)(
        codec.codewords, codes
    )
    rows = picked.reshape(codes.shape[0], -1)[:, : codec.dim]
    return rows if gain is None else rows * jnp.asarray(gain, jnp.float32)[:, None]


@lookup_table.register
def _(codec: Codebook, q: Any) -> Array:
    q = jnp.asarray(q, jnp.float32)
    if q.ndim not in (1, 2) or q.shape[-1] != codec.dim:
        raise ValueError(f"q must be [{codec.dim}] or [b, {codec.dim}]; got shape {q.shape}")
    parts = split(q.reshape(-1, codec.dim), codec.num_subspaces)
    tables = jnp.einsum("msb,mks->bmk", parts, codec.codewords, precision="highest")
    return tables if q.ndim == 2 else tables[0]
