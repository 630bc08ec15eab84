"""The partition assignment step of section 4: enumeration for m = 1, coordinate descent above.

The parallel error ``<u, r>`` of a row adds up over all subspaces, so a subspace cannot choose its
codeword alone. Coordinate descent visits the subspaces in turn; each takes the codeword that is
best for the whole row given the others. The loss of a row falls or stays at every step, and with
one subspace a single visit is the exact enumeration of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from avq_jax.quantization.rows import QuadraticForm

__all__ = ["assign", "block_size"]

# Floats of the tables [m, k, B] of a block: small for the caches, large enough that a fused
# expression over B rows outweighs its dispatch.
_BLOCK_FLOATS = 1 << 22
# Candidates compared in one fused expression; XLA computes parts of longer ones many times over.
_GROUP = 4


def block_size(num_subspaces: int, num_codewords: int, width: int) -> int:
    """Rows a block, so that the tables of a block take some 16 MiB at most."""
    floats = num_subspaces * max(num_codewords, width)
    return max(32, min(512, 1 << max(_BLOCK_FLOATS // floats, 1).bit_length() - 1))


class _Best(NamedTuple):
    cost: Float[Array, " B"]
    code: Int32[Array, " B"]
    projection: Float[Array, "R B"]


def assign(
    codewords: Float[Array, "m k s"],
    form: QuadraticForm,
    codes: Int32[Array, "m B"] | None = None,
    *,
    num_sweeps: int,
) -> Int32[Array, "m B"]:
    """Codes of a block of rows under the quadratic loss.

    Args:
      codewords: ``[m, k, s]``.
      form: the loss of the block.
      codes: where the descent starts; ``None`` starts at the nearest codewords, which is the
        optimum of the reconstruction loss.
      num_sweeps: most visits of all subspaces; the descent stops when a sweep changes nothing.

    Returns:
      ``int32[m, B]``; ties go to the lowest codeword number. A row without any weight is encoded
      under the reconstruction loss.
    """
    num_codewords = codewords.shape[1]
    # The loss depends on x - c alone: a shift of both keeps ||c||^2 - 2 <c, x> from cancelling
    # where the rows lie far from the origin.
    center = jnp.mean(codewords, axis=1)
    codewords = codewords - center[:, None, :]
    x = form.x - center[:, :, None]
    weightless = (form.isotropic == 0) & jnp.all(form.weights == 0, axis=0)
    isotropic = jnp.where(weightless, 1, form.isotropic)

    dots = _products(codewords, x)
    projections = jnp.stack([_products(codewords, u) for u in form.directions], axis=2)
    squares = jnp.sum(codewords * codewords, axis=-1)  # [m, k]

    if codes is None:

        def nearest(_: None, subspace):
            dot, projection, square = subspace
            best = _argmin(lambda j: square[j] - 2 * dot[j], projection, num_codewords)
            return None, (best.code, best.projection)

        _, (codes, current) = jax.lax.scan(nearest, None, (dots, projections, squares))
    else:
        current = jnp.take_along_axis(projections, codes[:, None, None, :], axis=1)[:, 0]
    if num_sweeps == 0:
        return codes
    total = jnp.einsum("rmsb,msb->rb", form.directions, x, precision="highest")

    def visit(parallel, subspace):
        dot, projection, square, chosen = subspace
        without = parallel + chosen  # <u, r> with this subspace's codeword taken out

        def cost(j):
            quadratic = form.weights * (without - projection[j]) ** 2
            return isotropic * (square[j] - 2 * dot[j]) + jnp.sum(quadratic, axis=0)

        best = _argmin(cost, projection, num_codewords)
        return without - best.projection, (best.code, best.projection)

    def sweep(carry):
        codes, current, parallel, _, count = carry
        parallel, (new_codes, current) = jax.lax.scan(
            visit, parallel, (dots, projections, squares, current)
        )
        return new_codes, current, parallel, jnp.any(new_codes != codes), count + 1

    def unfinished(carry):
        return carry[3] & (carry[4] < num_sweeps)

    # Taken from the data, so that under shard_map it varies over devices like the sweeps' answer.
    undone = jnp.any(codes >= 0)
    start = (codes, current, total - jnp.sum(current, axis=0), undone, 0)
    return jax.lax.while_loop(unfinished, sweep, start)[0]


def _products(codewords: Float[Array, "m k s"], x: Float[Array, "m s B"]) -> Array:
    return jnp.einsum("mks,msb->mkb", codewords, x, precision="highest")


def _argmin(cost: Callable, projection: Float[Array, "k R B"], count: int) -> _Best:
    """Find the first least cost over ``count`` candidates, with its projection.

    A running comparison, elementwise over the block, vectorises where ``argmin`` over an axis does
    not, and in a loop over small groups is faster than unrolled, from 16 codewords (a quarter) to
    32 (seven times).
    """

    def compare(best, j):
        value = cost(j)
        better = value < best[0]
        return jnp.where(better, value, best[0]), jnp.where(better, jnp.int32(j), best[1])

    first = cost(0)

    def group(g, best):
        for j in range(_GROUP):
            best = compare(best, head + g * _GROUP + j)
        return best

    # At least one comparison comes first: the code then varies over devices like the cost.
    head = 2 + (count - 2) % _GROUP
    best = (first, jnp.zeros(first.shape, jnp.int32))
    for j in range(1, head):
        best = compare(best, j)
    best = jax.lax.fori_loop(0, (count - head) // _GROUP, group, best)
    along = jnp.take_along_axis(projection, best[1][None, None, :], axis=0)[0]
    return _Best(best[0], best[1], along)
