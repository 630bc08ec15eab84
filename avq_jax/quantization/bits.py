"""Codes of bits under the score-aware loss: refinement of the codes, closed form of the decoder.

A row is decoded as ``x~ = U^T b + o`` from bits b in {-1, +1}^h. Four bits are one code of 16
words: bit ``4 g + j`` is +1 where bit j of code g is set. The point axis is last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.quantization.rows import QuadraticForm, Rows, in_blocks, quadratic_form
from avq_jax.quantization.update import row_losses

__all__ = [
    "GROUP",
    "bit_losses",
    "block_rows",
    "from_bits",
    "refine_codes",
    "solve_decoder",
    "to_bits",
]

# Bits of a code, and its words.
GROUP = 4
_WORDS = 1 << GROUP
# Floats of a block's correlations [h, B]: they stay in the second-level cache.
_BLOCK_FLOATS = 1 << 16
_CG_ITERATIONS = 24
_CG_TOLERANCE = 1e-4
# Relative to the mean diagonal: keeps bits that are constant or copies of others where they are.
_RIDGE = 1e-6


def to_bits(codes: Int32[Array, "g ..."]) -> Float[Array, "h ..."]:
    """Give the signs -1 and +1 of the codes, ``h = 4 g``."""
    tail = [1] * (codes.ndim - 1)
    shifts = jnp.arange(GROUP, dtype=jnp.int32).reshape(1, GROUP, *tail)
    signs = 2 * ((codes[:, None] >> shifts) & 1) - 1
    return signs.astype(jnp.float32).reshape(-1, *codes.shape[1:])


def from_bits(bits: Float[Array, "h ..."]) -> Int32[Array, "g ..."]:
    """Give the codes of signs; 0 counts as +1."""
    tail = [1] * (bits.ndim - 1)
    shifts = jnp.arange(GROUP, dtype=jnp.int32).reshape(1, GROUP, *tail)
    groups = (bits >= 0).astype(jnp.int32).reshape(-1, GROUP, *bits.shape[1:])
    return jnp.sum(groups << shifts, axis=1)


def block_rows(num_bits: int) -> int:
    """Choose the rows of a block, which keeps its correlations in the cache."""
    return max(64, min(512, 1 << max(_BLOCK_FLOATS // num_bits, 1).bit_length() - 1))


def bit_losses(
    decoder: Float[Array, "h d"],
    offset: Float[Array, " d"],
    form: QuadraticForm,
    codes: Int32[Array, "g B"],
) -> Float[Array, " B"]:
    """Give the loss of each row of a block (Theorem 3.2)."""
    return row_losses(form, form.x - _decode(decoder, offset, codes)[None])


def _decode(decoder, offset, codes):
    return jnp.matmul(decoder.T, to_bits(codes), precision="highest") + offset[:, None]


def refine_codes(
    decoder: Float[Array, "h d"],
    offset: Float[Array, " d"],
    form: QuadraticForm,
    codes: Int32[Array, "g B"],
    *,
    num_sweeps: int | Int32[Array, ""],
) -> Int32[Array, "g B"]:
    """Refine codes by coordinate descent over groups of four bits under the loss of the row.

    A group U_g of the decoder's rows takes the word, of signs s, with the least

      ``a (s^T U_g U_g^T s - 2 s^T U_g r) + sum_j w_j (<u_j, r> - s^T U_g u_j)^2``,

    where r is the residual without the group. All 16 words are compared, so where a sweep changes
    nothing no flip of up to four bits of a group lowers the loss. ``U_g r`` comes from the Gram
    matrix ``U U^T`` and the other bits.

    Args:
      decoder: ``[h, d]`` U.
      offset: ``[d]`` o.
      form: the loss of a block of rows, in one subspace.
      codes: where the descent starts.
      num_sweeps: most visits of all groups; it stops when a sweep changes nothing.

    Returns:
      The codes; their loss is at most that of the start. Ties go to the lowest word.
    """
    h, _ = decoder.shape
    groups = h // GROUP
    gram = jnp.matmul(decoder, decoder.T, precision="highest").reshape(groups, GROUP, h)
    # The group's own part of the Gram matrix, and the matrix without it.
    inner = jnp.stack([gram[i, :, GROUP * i : GROUP * (i + 1)] for i in range(groups)])
    own = np.kron(np.eye(groups, dtype=bool), np.ones((1, GROUP), bool))[:, None, :]
    outer = jnp.where(own, 0, gram)
    x = form.x[0] - offset[:, None]
    directions = form.directions[:, 0]  # [R, d, B]
    products = jnp.matmul(decoder, x, precision="highest").reshape(groups, GROUP, -1)
    projections = jnp.einsum("hd,rdb->hrb", decoder, directions, precision="highest")
    bits = to_bits(codes)
    parallel = jnp.einsum("rdb,db->rb", directions, x, precision="highest")
    parallel = parallel - jnp.sum(projections * bits[:, None], axis=0)
    projections = projections.reshape(groups, GROUP, *projections.shape[1:])

    def visit(carry, group):
        bits, parallel = carry
        g, others, gram_group, product, projection, old = group
        dot = product - jnp.matmul(others, bits, precision="highest")
        without = parallel + jnp.sum(projection * to_bits(old[None])[:, None], axis=0)

        def cost(v):
            sign = [1 if v >> j & 1 else -1 for j in range(GROUP)]
            along, across = _signed(sign, dot), _signed(sign, projection)
            pairs = np.outer(sign, sign).astype(np.float32)
            value = form.isotropic * (jnp.sum(gram_group * pairs) - 2 * along)
            return value + jnp.sum(form.weights * (without - across) ** 2, axis=0), across

        best, chosen = cost(0)
        code = jnp.zeros_like(old)
        # A running comparison vectorises where argmin over an axis does not.
        for v in range(1, _WORDS):
            value, across = cost(v)
            better = value < best
            best = jnp.where(better, value, best)
            code = jnp.where(better, jnp.int32(v), code)
            chosen = jnp.where(better[None, :], across, chosen)
        bits = jax.lax.dynamic_update_slice(bits, to_bits(code[None]), (GROUP * g, 0))
        return (bits, without - chosen), code

    numbers = jnp.arange(groups, dtype=jnp.int32)

    def sweep(carry):
        codes, bits, parallel, _, count = carry
        (bits, parallel), new = jax.lax.scan(
            visit, (bits, parallel), (numbers, outer, inner, products, projections, codes)
        )
        return new, bits, parallel, jnp.any(new != codes), count + 1

    def unfinished(carry):
        return carry[3] & (carry[4] < num_sweeps)

    start = (codes, bits, parallel, jnp.array(num_sweeps > 0), 0)
    return jax.lax.while_loop(unfinished, sweep, start)[0]


def _signed(sign: list[int], values: Array) -> Array:
    """Sum ``sign_j values_j``."""
    total = values[0] if sign[0] > 0 else -values[0]
    for j in range(1, GROUP):
        total = total + values[j] if sign[j] > 0 else total - values[j]
    return total


def solve_decoder(
    decoder: Float[Array, "h d"],
    offset: Float[Array, " d"],
    codes: Int32[Array, "g n"],
    rows: Rows,
    real: Bool[Array, " h"],
) -> tuple[Float[Array, "h d"], Float[Array, " d"]]:
    """Find the decoder and offset that minimise the loss for fixed codes.

    With a last bit that is always 1, whose word is o, and M_i the metric of row i, they solve

      ``sum_i b_i b_i^T U M_i = sum_i b_i x_i^T M_i``,

    (h + 1) d unknowns. Conjugate gradients for the change of U, preconditioned by the isotropic
    part ``sum_i a_i b_i b_i^T``: the condition is at most the largest eta.

    Args:
      decoder: ``[h, d]`` before the solve.
      offset: ``[d]`` before the solve.
      codes: of all rows.
      rows: the rows and their loss.
      real: which bits count; the rows of the others stay as they are.

    Returns:
      The new decoder and offset.
    """
    h, d = decoder.shape
    block = block_rows(h)
    blocks = in_blocks(rows, block)
    padded = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % block)))
    padded = padded.reshape(codes.shape[0], -1, block).transpose(1, 0, 2)
    mask = jnp.concatenate([real, jnp.ones(1, bool)]).astype(jnp.float32)[:, None]

    def bits_of(codes):
        return jnp.concatenate([to_bits(codes), jnp.ones((1, block), jnp.float32)]) * mask

    def total(function, start):
        def add(sum_, block):
            codes, rows = block
            new = function(bits_of(codes), quadratic_form(rows, 1))
            return jax.tree.map(jnp.add, sum_, new), None

        return jax.lax.scan(add, start, (padded, blocks))[0]

    present = jnp.concatenate([decoder, offset[None]])

    def first(bits, form):
        r = form.x[0] - jnp.matmul(present.T, bits, precision="highest")
        force = form.isotropic[None] * r + _anisotropic(form, r)
        return (bits * form.isotropic[None]) @ bits.T, bits @ force.T

    gram, right = total(first, (jnp.zeros((h + 1, h + 1)), jnp.zeros((h + 1, d))))
    diagonal = jnp.mean(jnp.diagonal(gram))
    ridge = _RIDGE * jnp.where(diagonal > 0, diagonal, 1)
    factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(h + 1, dtype=jnp.float32))

    def product(v):
        def add(bits, form):
            return bits @ _anisotropic(form, v.T @ bits).T

        return total(add, gram @ v + ridge * v)

    delta, _ = jax.scipy.sparse.linalg.cg(
        product,
        right,
        M=lambda v: jax.scipy.linalg.cho_solve(factor, v),
        tol=_CG_TOLERANCE,
        maxiter=_CG_ITERATIONS,
    )
    # A failed factorisation of a degenerate system is NaN: keep the decoder then.
    new = present + jnp.where(jnp.all(jnp.isfinite(delta)), delta, 0)
    return new[:-1], new[-1]


def _anisotropic(form: QuadraticForm, r: Float[Array, "d B"]) -> Float[Array, "d B"]:
    """``sum_j w_j u_j <u_j, r>``."""
    directions = form.directions[:, 0]
    projection = jnp.einsum("rdb,db->rb", directions, r)
    return jnp.einsum("rb,rdb->db", form.weights * projection, directions)
