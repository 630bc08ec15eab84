"""QUIPS: product codebooks under the second moments of queries (Guo et al., 2016).

The expected squared error of an inner product, ``E_q <q, x - x~>^2 = r^T Sigma r`` with
``Sigma = E q q^T``, falls apart over subspaces when products between them are left out, as the
paper does: ``sum_j r_j^T Sigma_j r_j``. With ``Sigma_j = L_j L_j^T`` that is the squared length
of ``L_j^T r_j``, so that Mahalanobis k-means is ordinary k-means of the rows ``L_j^T x_j``. Sigma
comes from the rows themselves (`"cov_x"`) or from a sample of queries (`"cov_q"`).

`"opt"` also asks that for each sample query q the row x+ of the largest product keeps it:
``<q, x~+> >= <q, x~->`` for the other rows x-. Constraints become hinges beside the loss,

  ``(1/n) sum_i r_i^T Sigma r_i / E + penalty (1/b) sum_q sum_- max(0, <q, x~- - x~+>) / sqrt(E)``,

where E, the loss of the `"cov_q"` codebook that the descent starts from, makes the penalty a plain
number. Steps alternate: rows to their nearest codewords; the most violated constraints of each
query; gradient steps of the codewords. Choices of this module, not claims about the paper: the
constraints move codewords alone and never pick codes, so that `encode` gives new rows what it gave
the learning rows; the units above; Adam; and a ridge on singular moments.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from avq_jax.checks import as_count, as_rows, is_traced
from avq_jax.loss import QueryTerms, Scaling
from avq_jax.progress import steps
from avq_jax.quantization.codebook import Codebook, as_learning_rows, check_magnitude
from avq_jax.quantization.codec import Codes, Wrapper, decode, encode, lookup_table
from avq_jax.quantization.lloyd import History, fit
from avq_jax.quantization.lloyd_steps import check_sizes
from avq_jax.quantization.rows import split
from avq_jax.quantization.sgd import optimizer_step

__all__ = ["MahalanobisCodebook", "fit_quips"]

Variant = Literal["cov_x", "cov_q", "opt"]

# Of the mean second moment of a subspace, and of the whole: metrics must be invertible.
_RIDGE, _FLOOR = 1e-5, 1e-9
# Gradient steps between two assignments, and their size beside that of the codewords.
_STEPS, _STEP_SIZE = 20, 0.01
# Queries whose scores of all rows are held at a time.
_QUERIES = 32


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codec", "factors"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True)
class MahalanobisCodebook(Wrapper):
    """A product codebook whose rows are encoded under a metric of each subspace.

    Codes minimise ``sum_j (x_j - c_j)^T L_j L_j^T (x_j - c_j)``, which takes the place of the loss
    of Theorem 3.2: a scaling, a direction and further query terms are checked and have no effect.
    Decoding and tables are those of the codebook alone.

    Attributes:
      codec: the :class:`~avq_jax.Codebook`, in the coordinates of the rows.
      factors: ``float32[m, s, s]`` lower triangular L_j of each subspace.

    >>> import avq_jax, jax.numpy as jnp
    >>> book = avq_jax.Codebook(jnp.array([[[0., 3.], [2., 0.]]]), dim=2)
    >>> codec = MahalanobisCodebook(book, jnp.array([[[1., 0.], [0., 0.1]]]))
    >>> avq_jax.encode(codec, [[0., 0.]]).codes.tolist()  # 0.1 * 3 < 2
    [[0]]
    """

    # Unshaped: transformations put other things than arrays into the leaves of a pytree.
    codec: Any
    factors: Any
    # Classes with like fields are one structure to jaxlib 0.10.2: a static field tells them apart.
    kind: str = dataclasses.field(default="mahalanobis", kw_only=True, repr=False)


def _whiten(factors: Float[Array, "m s s"], x: Float[Array, "n d"]) -> Float[Array, "n ms"]:
    """Rows ``L_j^T x_j``, subspaces side by side."""
    parts = split(x, factors.shape[0])
    parts = jnp.einsum("mts,mtn->nms", factors, parts, precision="highest")
    return parts.reshape(parts.shape[0], -1)


def _whitened_words(factors: Float[Array, "m s s"], words: Float[Array, "m k s"]) -> Array:
    return jnp.einsum("mts,mkt->mks", factors, words, precision="highest")


@encode.register
def _(
    codec: MahalanobisCodebook,
    x: Any,
    scaling: Scaling | None = None,
    *,
    direction: Any = None,
    extra: QueryTerms | None = None,
) -> Codes:
    rows = as_learning_rows(x, scaling, direction, extra, dim=codec.dim)
    words = _whitened_words(codec.factors, codec.codec.codewords)
    m, _, s = words.shape
    # Nothing couples the subspaces: the nearest codeword of each, without sweeps.
    return encode(
        Codebook(words, dim=m * s), _whiten(codec.factors, jnp.asarray(rows.x)), num_sweeps=0
    )


@decode.register
def _(codec: MahalanobisCodebook, codes: Any) -> Array:
    return decode(codec.codec, codes)


@lookup_table.register
def _(codec: MahalanobisCodebook, q: Any) -> Array:
    return lookup_table(codec.codec, q)


def _factors(sample: Any, m: int) -> tuple[np.ndarray, float]:
    """Cholesky factors ``[m, s, s]`` of the second moments of a sample, and their common unit."""
    parts = np.asarray(split(jnp.asarray(sample), m), np.float64)
    moments = np.einsum("msn,mtn->mst", parts, parts) / parts.shape[2]
    eye = np.eye(parts.shape[1])
    mean = float(np.trace(moments, axis1=1, axis2=2).sum()) / sample.shape[1]
    if mean == 0:
        return np.broadcast_to(eye, moments.shape), 1.0
    moments = moments / mean
    ridge = _RIDGE * np.trace(moments, axis1=1, axis2=2) / parts.shape[1] + _FLOOR
    return np.linalg.cholesky(moments + ridge[:, None, None] * eye), mean


class _Problem(NamedTuple):
    """The descent of ``"opt"``, in whitened coordinates, where ``<q', w'> = <q, w>``.

    Attributes:
      rows: ``[n, m s]``.
      queries: ``[b, m s]``.
      best: ``[b]`` row of the largest product with each query.
      unit: E, the loss that the penalty is measured in.
      deviation: sqrt(E) in the units of a score.
    """

    rows: Float[Array, "n ms"]
    queries: Float[Array, "b ms"]
    best: Int32[Array, " b"]
    unit: Float[Array, ""]
    deviation: Float[Array, ""]


class _Constraints(NamedTuple):
    """Codes of the row that has to win each query, and of those that come before it."""

    winners: Int32[Array, "b m"]
    others: Int32[Array, "b j m"]


def _in_query_blocks(function: Any, queries: Float[Array, "b d"], *more: Array) -> Any:
    return jax.lax.map(lambda z: function(*z), (queries, *more), batch_size=_QUERIES)


@jax.jit
def _best_rows(x: Float[Array, "n d"], queries: Float[Array, "b d"]) -> Int32[Array, " b"]:
    return _in_query_blocks(lambda q: jnp.argmax(x @ q).astype(jnp.int32), queries)


@functools.partial(jax.jit, static_argnames="count")
def _most_violated(
    words: Float[Array, "m k s"], codes: Int32[Array, "n m"], problem: _Problem, count: int
) -> _Constraints:
    m, _, s = words.shape
    decoded = decode(Codebook(words, dim=m * s), codes)

    def top(q, best):
        scores = (decoded @ q).at[best].set(-jnp.inf)
        return jax.lax.top_k(scores, count)[1]

    others = _in_query_blocks(top, problem.queries, problem.best)
    return _Constraints(codes[problem.best], codes[others])


def _objective(words, shares, means, constraints, problem, penalty):
    """Loss of the codewords for fixed codes, but for the spread of rows around their means."""
    m, k, s = words.shape
    square = jnp.sum(shares * jnp.sum((words - means) ** 2, axis=2))
    tables = jnp.einsum(
        "bms,mks->bmk", problem.queries.reshape(-1, m, s), words, precision="highest"
    ).reshape(-1, m * k)
    entry = (jnp.arange(m) * k)[None]
    winner = jnp.sum(jnp.take_along_axis(tables, entry + constraints.winners, axis=1), axis=1)
    b, j, _ = constraints.others.shape
    others = jnp.take_along_axis(tables, (entry[None] + constraints.others).reshape(b, -1), axis=1)
    hinge = jnp.maximum(others.reshape(b, j, m).sum(axis=2) - winner[:, None], 0)
    return square / problem.unit + penalty * jnp.sum(hinge) / b / problem.deviation


@jax.jit
def _descend(words, codes, constraints, problem, penalty):
    """Gradient steps of the codewords for fixed codes and constraints; and the whole objective."""
    import optax  # type: ignore[import-untyped]  # deferred: it is slow to import

    m, k, s = words.shape
    parts = problem.rows.reshape(-1, m, s)
    sums = jax.vmap(
        lambda c, v: jax.ops.segment_sum(jnp.pad(v, ((0, 0), (0, 1)), constant_values=1), c, k),
        in_axes=(1, 1),
    )(codes, parts)
    counts = sums[..., -1]
    means = jnp.where(counts[..., None] > 0, sums[..., :-1] / jnp.maximum(counts, 1)[..., None], 0)
    means = jnp.where(counts[..., None] > 0, means, words)
    shares = counts / parts.shape[0]
    picked = jax.vmap(lambda w, c: w[c], in_axes=(0, 1), out_axes=1)(means, codes)
    spread = jnp.mean(jnp.sum((parts - picked) ** 2, axis=(1, 2)))

    def objective(words):
        return _objective(words, shares, means, constraints, problem, penalty)

    optimizer = optax.adam(_STEP_SIZE * jnp.sqrt(jnp.mean(words**2)))

    def one(carry, _):
        words, state = carry
        return optimizer_step(optimizer, jax.grad(objective)(words), state, words), None

    (words, _), _ = jax.lax.scan(one, (words, optimizer.init(words)), None, length=_STEPS)
    used = jnp.mean((counts > 0).astype(jnp.float32))
    return words, objective(words) + spread / problem.unit, used


def fit_quips(
    key: Array,
    x: Any,
    *,
    queries: Any = None,
    variant: Variant = "cov_x",
    num_subspaces: int,
    num_codewords: int = 16,
    num_iterations: int = 25,
    num_rounds: int = 10,
    num_constraints: int = 128,
    penalty: float | int = 0.1,
    progress: bool | None = None,
) -> tuple[MahalanobisCodebook, History]:
    """Learn the product codebook of QUIPS: the least squared error of inner products.

    Minimises ``mean_i sum_j r_ij^T Sigma_j r_ij`` (see :mod:`avq_jax.quantization.quips`). A peer
    of :func:`~avq_jax.fit`: it knows the covariance of queries and not, as the score-aware loss
    does, that errors along a row cost more. The paper deals dimensions to subspaces at random
    first; for that, or any rotation, learn from ``x @ R.T`` and put the codec into
    :class:`~avq_jax.Rotated`.

    Args:
      key: a typed key, ``jax.random.key(seed)``.
      x: ``[n, d]`` rows, n >= num_codewords.
      queries: ``[b, d]`` sample of queries, for ``"cov_q"`` and ``"opt"``.
      variant: ``"cov_x"``, the second moments of the rows in place of those of queries;
        ``"cov_q"``, those of the queries; or ``"opt"``, from there a descent with the constraint
        that the best row of each query stays the best.
      num_subspaces: m, 1 to d.
      num_codewords: k of each subspace, 2 to 256.
      num_iterations: most iterations of k-means.
      num_rounds: of ``"opt"``, each an assignment and some gradient steps.
      num_constraints: of ``"opt"``, a query and round: the rows that score highest beside the best.
      penalty: of ``"opt"``, of a violated constraint, relative to the loss of ``"cov_q"``.
      progress: show a progress bar; ``None`` shows it in a terminal or notebook.

    Returns:
      :class:`MahalanobisCodebook`, and the :class:`~avq_jax.History` of loss and codeword usage, in
      squared units of a score. The loss of ``"opt"`` includes its penalty and begins anew after
      ``"cov_q"``; as its constraints change each round, it may rise.

    Raises:
      TypeError: called inside a transformation.
      ValueError: sizes out of range, too few rows, rows that are not finite, an unknown variant, or
        queries that are missing, not used by it or of another width.

    >>> import avq_jax, jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 8))
    >>> codec, history = fit_quips(jax.random.key(1), x, num_subspaces=4)
    >>> avq_jax.encode(codec, x).codes.shape, codec.bits
    ((500, 4), 16.0)

    Reference:
      Guo, Kumar, Choromanski and Simcha, Quantization based Fast Inner Product Search, 2016.
    """
    if variant not in ("cov_x", "cov_q", "opt"):
        raise ValueError(f"variant must be 'cov_x', 'cov_q' or 'opt'; got {variant!r}")
    x = as_rows(x, name="x")
    m, k = check_sizes(x, num_subspaces, num_codewords)
    check_magnitude(x)
    if (queries is None) != (variant == "cov_x"):
        rule = "None" if variant == "cov_x" else "a sample of queries"
        raise ValueError(f"queries must be {rule} for variant {variant!r}")
    as_count(num_rounds, name="num_rounds", minimum=0)
    count = min(as_count(num_constraints, name="num_constraints"), x.shape[0])
    if not penalty >= 0:
        raise ValueError(f"penalty must be >= 0; got {penalty}")
    if is_traced(key, x, queries):
        raise TypeError("fit_quips is a host loop; call it outside jit")
    sample = x
    if queries is not None:
        sample = queries = as_rows(queries, name="queries")
        if queries.shape[1] != x.shape[1]:
            raise ValueError(f"queries must have the width of x, {x.shape[1]}; got {queries.shape}")
        check_magnitude(queries)
    exact, mean = _factors(sample, m)
    factors = jnp.asarray(exact, jnp.float32)
    rows = _whiten(factors, jnp.asarray(x))
    state, history = fit(
        key,
        rows,
        num_subspaces=m,
        num_codewords=k,
        num_iterations=num_iterations,
        solver="cg",
        progress=progress,
    )
    history = History(history.loss * np.float32(mean), history.usage)
    words, unit = state.codebook.codewords, float(state.loss)
    if variant == "opt" and unit > 0:
        whitened = np.linalg.solve(exact, np.asarray(split(jnp.asarray(queries), m), np.float64))
        problem = _Problem(
            rows,
            jnp.asarray(whitened.transpose(2, 0, 1).reshape(len(queries), -1), jnp.float32),
            _best_rows(jnp.asarray(x), jnp.asarray(queries)),
            jnp.float32(unit),
            jnp.float32((unit * mean) ** 0.5),
        )
        found = []
        for _ in steps(num_rounds, "learning under constraints", progress):
            nearest = encode(Codebook(words, dim=rows.shape[1]), rows, num_sweeps=0)
            codes = nearest.codes.astype(jnp.int32)
            constraints = _most_violated(words, codes, problem, count)
            words, loss, used = _descend(words, codes, constraints, problem, jnp.float32(penalty))
            found.append((float(loss) * unit * mean, float(used)))
        more = np.array(found, np.float32).reshape(-1, 2)
        history = History(*(np.concatenate(z) for z in zip(history, more.T, strict=True)))
    words = np.linalg.solve(exact.transpose(0, 2, 1), np.asarray(words, np.float64).swapaxes(1, 2))
    words = jnp.asarray(words.swapaxes(1, 2), jnp.float32)
    return MahalanobisCodebook(Codebook(words, dim=x.shape[1]), factors), history
