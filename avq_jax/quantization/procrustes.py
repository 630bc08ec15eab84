"""The rotation step of optimized product quantization, under the score-aware loss.

Optimized product quantization alternates codes, codewords and an orthogonal R under the
reconstruction loss, where the best R for given decoded rows y_i is a Procrustes problem. With the
metric ``M_i = a_i I + sum_j w_ij u_ij u_ij^T`` of Theorem 3.2 the step

  ``min_R sum_i (x_i - R^T y_i)^T M_i (x_i - R^T y_i)``,  ``R R^T = I``

is not one, but ``M_i <= L_i I``, ``L_i = a_i + sum_j max(w_ij, 0) ||u_ij||^2``, majorises it by
one: at R_0, with ``r_i = x_i - R_0^T y_i`` and up to a constant, the sum is at most

  ``sum_i L_i ||t_i - R^T y_i||^2``,  ``t_i = R_0^T y_i + M_i r_i / L_i``,

with equality at R_0. As ``||R^T y_i||`` is fixed its minimum is ``R = U V^T`` by the singular value
decomposition ``U S V^T = sum_i y_i (L_i t_i)^T``, and the loss cannot rise. Rows whose errors turn
little towards their u_ij have less curvature than L_i, so a bolder step with a part of the w_ij in
L_i is tried too, and the best of both and of R_0 is kept.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avq_jax.quantization.additive_update import metric_terms
from avq_jax.quantization.codec import decode
from avq_jax.quantization.lloyd_steps import LloydState, mean_loss
from avq_jax.quantization.rotation import turn_rows
from avq_jax.quantization.rows import Rows, in_blocks

__all__ = ["RotatedState", "turn_step"]

# Parts of the anisotropic curvature that steps count: 1 is the majoriser, less is bolder.
_CURVATURES = (0.1, 1.0)
_BLOCK = 1024


class RotatedState(NamedTuple):
    """State of the learner of a rotation; a pytree.

    Attributes:
      lloyd: codes, codewords and loss of the turned rows.
      matrix: orthogonal R.
      turned: the rows R x and the directions R u.
    """

    lloyd: LloydState
    matrix: Float[Array, "d d"]
    turned: Rows


def _moments(
    matrix: Array, decoded: Float[Array, "n d"], rows: Rows
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """``sum_i y_i (M_i r_i + a_i R^T y_i)^T``, and ``sum_i (L_i - a_i) y_i (R^T y_i)^T``."""
    product = functools.partial(jnp.einsum, precision="highest")

    def add(total, block):
        y, part = block
        u, w = metric_terms(part)
        back = product("ed,be->bd", matrix, y)
        r = part.x - back
        along = product("br,brd->bd", w * product("brd,bd->br", u, r), u)
        a = part.scaling.orthogonal[:, None]
        curvature = jnp.sum(jnp.maximum(w, 0) * jnp.sum(u * u, axis=-1), axis=1)[:, None]
        new = product("be,bd->ed", y, a * part.x + along), product("be,bd->ed", y, curvature * back)
        return jax.tree.map(jnp.add, total, new), None

    block = min(_BLOCK, decoded.shape[0])
    pad = ((0, -decoded.shape[0] % block), (0, 0))
    blocks = jnp.pad(decoded, pad).reshape(-1, block, decoded.shape[1]), in_blocks(rows, block)
    zero = jnp.zeros_like(matrix)
    return jax.lax.scan(add, (zero, zero), blocks)[0]


def turn_step(state: RotatedState, rows: Rows) -> RotatedState:
    """Turn the rotation towards the minimum for given codes; the loss never rises."""
    codebook, codes = state.lloyd.codebook, state.lloyd.codes
    decoded = decode(codebook, codes)
    linear, curvature = _moments(state.matrix, decoded, rows)
    best = state
    for part in _CURVATURES:
        left, _, right = jnp.linalg.svd(linear + part * curvature, full_matrices=False)
        matrix = jnp.matmul(left, right, precision="highest")
        turned = turn_rows(matrix, rows)
        loss, _ = mean_loss(codebook.codewords, codes.T.astype(jnp.int32), turned)
        new = RotatedState(state.lloyd._replace(loss=loss), matrix, turned)
        # Also where the decomposition failed: a loss that is not a number is not lower.
        lower = loss < best.lloyd.loss
        best = jax.tree.map(lambda a, b, lower=lower: jnp.where(lower, a, b), new, best)
    return best
