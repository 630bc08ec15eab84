"""The best row of each bin, and how the bins become the k best rows."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LANES = 128


def expected_recall(k: int, bins: int) -> float:
    """Share of the best k rows found by keeping one a bin: ``L (1 - (1 - 1/L)^k) / k``.

    The expected share of k balls in L bins that come first in theirs, so of rows in random order.

    Example:
      >>> round(expected_recall(10, 128), 3)
      0.966
    """
    return -bins * math.expm1(k * math.log1p(-1 / bins)) / k if bins > 1 else 1 / k


def bins_for(k: int, recall_target: float) -> int:
    """Fewest bins, 128 times a power of two, whose expected recall is at least the target.

    Example:
      >>> bins_for(10, 0.95), bins_for(100, 0.95)
      (128, 1024)
    """
    bins = _LANES
    while expected_recall(k, bins) < recall_target:
        bins *= 2
    return bins


def best_of(scores: jax.Array, ids: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of ``[b, L]``, the first among equals, or all where there are fewer."""
    found, at = lax.top_k(scores, min(k, scores.shape[1]))
    return found, jnp.take_along_axis(ids, at, axis=1)


def merge_blocks(
    scan: Callable[[Any], tuple[jax.Array, jax.Array]], calls: int, k: int
) -> tuple[jax.Array, jax.Array]:
    """The k best of the results of ``scan(0)`` to ``scan(calls - 1)``, rows rising from one on."""

    def merge(i: jax.Array, kept: Any) -> Any:
        # Kept rows are lower, so they stay first among equals.
        pairs = zip(kept, scan(i), strict=True)
        scores, ids = (jnp.concatenate(pair, axis=1) for pair in pairs)
        return best_of(scores, ids, k)

    scores, ids = scan(0)
    pad = ((0, 0), (0, max(0, k - scores.shape[1])))
    scores = jnp.pad(scores, pad, constant_values=-jnp.inf)
    kept = best_of(scores, jnp.pad(ids, pad, constant_values=-1), k)
    return lax.fori_loop(1, calls, merge, kept)


def results(
    scores: jax.Array, ids: jax.Array, usable: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """Order rows, the lowest first among equals, and mark what is missing."""
    scores = jnp.where(usable[:, None] & (ids >= 0), scores, -jnp.inf)
    ids = jnp.where(scores > -jnp.inf, ids, -1)
    scores, ids = lax.sort((jnp.where(scores == 0, 0.0, -scores), ids), num_keys=2)
    pad = ((0, 0), (0, k - scores.shape[1]))
    return jnp.pad(0.0 - scores, pad, constant_values=-jnp.inf), jnp.pad(
        ids, pad, constant_values=-1
    )


def fold_mask(offset: jax.Array | None, valid: jax.Array | None) -> Any:
    """A mask of all queries becomes an offset of -inf; one a query stays, as int8."""
    if valid is None:
        return offset, None
    if valid.shape[0] == 1:
        return jnp.where(valid[0], 0.0 if offset is None else offset, -jnp.inf), None
    return offset, valid.astype(jnp.int8)
