"""Exact samples of a softmax over many classes from the best few, by lazy Gumbel noise."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from avq_jax.checks import as_count, as_queries
from avq_jax.layers.sparse import gather_rows
from avq_jax.mips import Index, search

__all__ = ["SoftmaxSample", "sample_softmax"]


class SoftmaxSample(NamedTuple):
    """Classes drawn from a softmax.

    Attributes:
      ids: ``int32[b]`` one class a query.
      complete: ``bool[b]``, whether the draw looked at every class that could have won.
    """

    ids: Int32[Array, " b"]
    complete: Bool[Array, " b"]


def sample_softmax(
    key: Array,
    index: Index,
    hidden: Any,
    *,
    k: int,
    num_samples: int,
    table: Float[Array, "n d"] | None = None,
    slack: Any = 0.0,
    leaves_to_search: int | None = None,
) -> SoftmaxSample:
    r"""Draw a class from ``softmax(<hidden, row_i>)`` without looking at all classes.

    The argmax of logits plus independent Gumbel noise is such a draw. The noise of the k best
    classes is drawn first; with M their largest sum, another class can only win if its noise
    exceeds :math:`B = M - y_k - \text{slack}`. How many do is binomial, with
    :math:`1 - \exp(-e^{-B})` each; only these are drawn, uniformly among the other classes, with
    noise conditioned on exceeding B. About n / k are to be expected.

    Args:
      key: a typed key.
      index: of the class rows, metric ``"dot"``.
      hidden: ``[b, d]`` queries.
      k: best classes to look for, at least 1.
      num_samples: places for other classes; 4 n / k is ample.
      table: ``[n, d]`` present class rows; ``None`` for those stored in the index.
      slack: most by which the search may miss: a class not found has a logit of at most
        ``y_k + slack``. 0 is an exact search.
      leaves_to_search: as in :func:`avq_jax.search`.

    Returns:
      :class:`SoftmaxSample`. Where ``complete``, the draw is exact (for the slack given); a query
      of the others had more candidates than places, and only as many were looked at.

    Raises:
      TypeError: not an index, counts that are not integers.
      ValueError: another metric than ``"dot"``, counts out of range, an index without stored
        float rows and no table.

    >>> import avq_jax, jax
    >>> rows = jax.random.normal(jax.random.key(0), (1000, 8))
    >>> rows = rows / jax.numpy.linalg.norm(rows, axis=1, keepdims=True)
    >>> index = avq_jax.build(jax.random.key(1), rows)
    >>> drawn = sample_softmax(jax.random.key(2), index, 99 * rows[:3], k=30, num_samples=100)
    >>> drawn.ids.tolist(), drawn.complete.tolist()
    ([0, 1, 2], [True, True, True])

    Reference:
      Mussmann, Levy and Ermon, 2017, Algorithm 1.
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be an avq_jax.Index; got {type(index).__name__}")
    if index.metric != "dot":
        raise ValueError(f"index must have the metric 'dot', whose scores are logits; got {index}")
    if table is None:
        if index.store is None or index.store.rows.dtype == jnp.int8:
            raise ValueError("table must be given where the index stores no float rows")
        table = index.store.rows
    k = as_count(k, name="k")
    num_samples = as_count(num_samples, name="num_samples")
    queries = jnp.asarray(as_queries(hidden, width=index.dim, name="hidden")[0])
    found = search(index, queries, k=k, leaves_to_search=leaves_to_search).ids
    return _draw(key, queries, found, table, jnp.asarray(slack, jnp.float32), num_samples)


@functools.partial(jax.jit, static_argnames="num_samples")
def _draw(
    key: Array,
    queries: Float[Array, "b d"],
    found: Int32[Array, "b k"],
    table: Float[Array, "n d"],
    slack: Float[Array, ""],
    num_samples: int,
) -> SoftmaxSample:
    n, k = table.shape[0], found.shape[1]

    def logits(q: Array, ids: Array) -> Array:
        values = gather_rows(table, ids).astype(jnp.float32) @ q
        return jnp.where(ids >= 0, values, -jnp.inf)

    def one(key: Array, q: Array, found: Array) -> tuple[Array, Array]:
        noise, count, choice, tail = jax.random.split(key, 4)
        y = logits(q, found)
        best = y + jax.random.gumbel(noise, (k,))
        rest = n - jnp.sum(found >= 0)
        bound = jnp.max(best) - jnp.min(y) - slack
        above = -jnp.expm1(-jnp.exp(-bound))  # P(Gumbel > bound)
        wanted = jax.random.binomial(count, rest.astype(jnp.float32), above)
        # Distinct classes beyond those found: the first of uniform draws that qualify.
        drawn = jax.random.randint(choice, (2 * num_samples + k,), 0, n)
        order = jnp.argsort(drawn, stable=True)
        first = jnp.concatenate([jnp.ones(1, bool), drawn[order][1:] != drawn[order][:-1]])
        known = jnp.sort(jnp.where(found < 0, n, found))
        place = jnp.minimum(jnp.searchsorted(known, drawn), k - 1)
        good = jnp.zeros(len(drawn), bool).at[order].set(first) & (known[place] != drawn)
        turn = jnp.cumsum(good) - 1
        taken = jnp.nonzero(
            good & (turn < wanted.astype(jnp.int32)), size=num_samples, fill_value=len(drawn)
        )[0]
        others = drawn.at[taken].get(mode="fill", fill_value=-1)
        # Gumbel noise given that it exceeds the bound, by inverting its distribution.
        u = jax.random.uniform(tail, (num_samples,), minval=jnp.finfo(jnp.float32).tiny)
        late = logits(q, others) - jnp.log(-jnp.log1p(-above * u))
        ids = jnp.concatenate([found, others])
        complete = (wanted <= num_samples) & (jnp.sum(good) >= wanted.astype(jnp.int32))
        return ids[jnp.argmax(jnp.concatenate([best, late]))], complete | (rest == 0)

    ids, complete = jax.vmap(one)(jax.random.split(key, queries.shape[0]), queries, found)
    return SoftmaxSample(ids, complete)
