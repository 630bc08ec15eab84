"""The codebook step of additive quantization: one linear system for all codewords.

For fixed codes the loss is a convex quadratic of all codewords C ``[m k, d]`` together. With the
0/1 vector b_i that selects the words of row i and its metric ``M_i = a_i I + sum_j w_ij u_ij
u_ij^T`` the minimum solves

  ``sum_i b_i (b_i^T D) M_i = sum_i b_i (x_i - C^T b_i)^T M_i``,  ``C + D`` the new codewords.

Product codebooks (section 7.5) are the case where a word is zero outside its subspace. The system
is solved by conjugate gradients, preconditioned by its isotropic part ``sum_i a_i b_i b_i^T``,
which all columns share: the condition number is then at most the largest eta. Adding a vector to
all words of one codebook and taking it from another changes nothing; a small ridge on D leaves the
words alone there, in the system as in the preconditioner, so that rounding does not grow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Integer

from avq_jax.loss import Scaling
from avq_jax.quantization.rows import Rows, unit

__all__ = ["additive_block", "metric_terms", "solve_additive", "sum_words"]

_CG_ITERATIONS = 16
_CG_TOLERANCE = 1e-3
_RIDGE = 1e-5
# Most words for which the preconditioner is a dense matrix and codes are 0/1 vectors.
_DENSE_WORDS = 1024
_BLOCK = 1024


def additive_block(num_rows: int) -> int:
    """Rows of a block."""
    return min(_BLOCK, max(num_rows, 1))


def metric_terms(rows: Rows) -> tuple[Float[Array, "*n R d"], Float[Array, "*n R"]]:
    """Directions u and weights w of the anisotropic part of the metric of each row."""
    u = unit(rows.x if rows.direction is None else rows.direction)[..., None, :]
    w = (rows.scaling.parallel - rows.scaling.orthogonal)[..., None]
    if rows.extra is None:
        return u, w
    u = jnp.concatenate([u, rows.extra.directions], axis=-2)
    return u, jnp.concatenate([w, rows.extra.weights], axis=-1)


def sum_words(
    codewords: Float[Array, "m k d"], codes: Integer[Array, "m B"]
) -> Float[Array, "B d"]:
    """``sum_j codewords[j, codes[j]]`` of each row."""

    def add(total, z):
        return total + z[0].at[z[1]].get(mode="clip"), None

    # Taken from the data, so that under shard_map it varies over devices as the sum does.
    zero = jnp.zeros((codes.shape[1], codewords.shape[2]), jnp.float32)
    first = zero + 0 * codewords[0].at[codes[0]].get(mode="clip")
    return jax.lax.scan(add, first, (codewords, codes))[0]


def _one_hot(codes: Int32[Array, "m B"], k: int) -> Float[Array, "m k B"]:
    return (codes[:, None, :] == jnp.arange(k, dtype=jnp.int32)[None, :, None]).astype(jnp.float32)


def _scatter(codes: Int32[Array, "m B"], values: Float[Array, "B s"], k: int) -> Array:
    """``sum_i b_i v_i^T`` of a block, ``[m, k, s]``."""
    if codes.shape[0] * k <= _DENSE_WORDS:
        return jnp.einsum("mkb,bs->mks", _one_hot(codes, k), values, precision="highest")
    return jax.lax.map(lambda c: jax.ops.segment_sum(values, c, num_segments=k), codes)


def _metric(scaling: Scaling, u: Array, w: Array, r: Float[Array, "B d"]) -> Float[Array, "B d"]:
    along = w * jnp.einsum("brd,bd->br", u, r, precision="highest")
    return scaling.orthogonal[:, None] * r + jnp.einsum("br,brd->bd", along, u, precision="highest")


def block_losses(scaling: Scaling, u: Array, w: Array, r: Float[Array, "B d"]) -> Array:
    """Loss of each row of a block, never below zero."""
    along = jnp.einsum("brd,bd->br", u, r, precision="highest")
    loss = scaling.orthogonal * jnp.sum(r * r, axis=1) + jnp.sum(w * along**2, axis=1)
    return jnp.maximum(loss, 0)


def solve_additive(
    codewords: Float[Array, "m k d"], codes: Int32[Array, "nb m B"], blocks: Rows
) -> tuple[Float[Array, "m k d"], Bool[Array, "m k"]]:
    """Codewords that minimise the loss for fixed codes.

    Args:
      codewords: before the step.
      codes: of the rows, in blocks.
      blocks: the rows, in blocks.

    Returns:
      The new codewords, and which words rows with a weight use; the others stay as they are.
    """
    m, k, d = codewords.shape
    words = m * k
    dense = words <= _DENSE_WORDS

    def total(function, start):
        def add(sum_, block):
            codes, rows = block
            new = function(codes, rows, *metric_terms(rows))
            return jax.tree.map(jnp.add, sum_, new), None

        return jax.lax.scan(add, start, (codes, blocks))[0]

    def first(codes, rows, u, w):
        force = _metric(rows.scaling, u, w, rows.x - sum_words(codewords, codes))
        a = rows.scaling.orthogonal
        weight = a + jnp.sum(jnp.maximum(w, 0) * jnp.sum(u * u, axis=-1), axis=1) / d
        sides = jnp.concatenate([force, a[:, None], weight[:, None]], axis=1)
        sums = _scatter(codes, sides, k)
        if not dense:
            return sums
        hot = _one_hot(codes, k).reshape(words, -1)
        return sums, jnp.matmul(hot * a[None], hot.T, precision="highest")

    zero = jnp.zeros((m, k, d + 2), jnp.float32)
    sums = total(first, (zero, jnp.zeros((words, words), jnp.float32)) if dense else zero)
    sums, gram = sums if dense else (sums, None)
    right, isotropic, weight = sums[..., :d], sums[..., d], sums[..., d + 1]
    used = weight > 0
    mean = jnp.sum(isotropic) / jnp.maximum(jnp.sum(used, dtype=jnp.float32), 1)
    ridge = _RIDGE * jnp.where(mean > 0, mean, 1)
    if gram is not None:
        factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(words, dtype=jnp.float32))

        def precondition(v):
            return jax.scipy.linalg.cho_solve(factor, v.reshape(words, d)).reshape(m, k, d)
    else:
        scale = 1 / (isotropic + ridge)

        def precondition(v):
            return v * scale[..., None]

    def product(v):
        def one(codes, rows, u, w):
            return _scatter(codes, _metric(rows.scaling, u, w, sum_words(v, codes)), k)

        return total(one, ridge * v)

    delta, _ = jax.scipy.sparse.linalg.cg(
        product,
        right,
        M=precondition,
        tol=_CG_TOLERANCE,
        maxiter=_CG_ITERATIONS if dense else 4 * _CG_ITERATIONS,
    )
    # A failed factorisation of a degenerate system is NaN: keep the codewords then.
    failed = jnp.all(jnp.isfinite(right)) & ~jnp.all(jnp.isfinite(delta))
    return codewords + jnp.where(failed, 0, delta), used
