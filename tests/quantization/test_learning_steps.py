"""The assignment and codebook steps against float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import avq_jax
from avq_jax.quantization.codebook import as_learning_rows
from avq_jax.quantization.rows import in_blocks
from avq_jax.quantization.update import choose_solver, solve


def problem(seed, n, d, R=0, eta=(1.0, 8.0), separate=False):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(np.float32)
    orthogonal = rng.uniform(0.5, 2, n).astype(np.float32)
    parallel = orthogonal * rng.uniform(*eta, n).astype(np.float32)
    options = {}
    if separate:
        options["direction"] = rng.normal(size=(n, d)).astype(np.float32)
    if R:
        options["extra"] = avq_jax.QueryTerms(
            jnp.asarray(rng.normal(size=(n, R, d)), jnp.float32),
            jnp.asarray(rng.uniform(0, 3, (n, R)), jnp.float32),
        )
    return x, avq_jax.Scaling(jnp.asarray(parallel), jnp.asarray(orthogonal)), options


def metrics(x, scaling, direction=None, extra=None):
    """M_i of the loss r^T M_i r of every row, [n, d, d], float64."""
    u = np.asarray(x if direction is None else direction, np.float64)
    norm = np.linalg.norm(u, axis=1, keepdims=True)
    u = np.divide(u, norm, out=np.zeros_like(u), where=norm > 0)
    h, o = (np.asarray(v, np.float64) for v in scaling)
    M = o[:, None, None] * np.eye(x.shape[1]) + np.einsum("n,ni,nj->nij", h - o, u, u)
    if extra is not None:
        directions, weights = (np.asarray(v, np.float64) for v in extra)
        M += np.einsum("nr,nri,nrj->nij", weights, directions, directions)
    return M


def losses(x, decoded, M):
    r = np.asarray(x, np.float64) - np.asarray(decoded, np.float64)
    return np.einsum("ni,nij,nj->n", r, M, r)


def joint_lstsq(x, codes, M, k, dim):
    """Section 7.5 by least squares over all codewords: codewords [m, k, s], float64."""
    n, m = codes.shape
    s = -(-dim // m)
    B = np.zeros((n, dim, m * k * s))
    for i, j, t in itertools.product(range(n), range(m), range(s)):
        if j * s + t < dim:
            B[i, j * s + t, (j * k + codes[i, j]) * s + t] = 1
    A = np.einsum("nip,nij,njq->pq", B, M, B, optimize=True)
    b = np.einsum("nip,nij,nj->p", B, M, x.astype(np.float64), optimize=True)
    return np.linalg.lstsq(A, b, rcond=1e-12)[0].reshape(m, k, s)


def solve_codebook(words, codes, x, scaling, solver, **options):
    rows = jax.tree.map(jnp.asarray, as_learning_rows(x, scaling, **options))
    blocks = in_blocks(rows, 32)
    n, m = codes.shape
    blocked = jnp.pad(jnp.asarray(codes.T, jnp.int32), ((0, 0), (0, -n % 32)))
    blocked = blocked.reshape(m, -1, 32).transpose(1, 0, 2)
    return solve(jnp.asarray(words), blocked, blocks, solver=solver)


def test_codebook_step_is_theorem_4_2():
    n, d, k = 120, 4, 5
    x, scaling, _ = problem(0, n, d)
    codes = np.random.default_rng(1).integers(0, k, (n, 1))
    words = np.zeros((1, k, d), np.float32)
    h, o = (np.asarray(v, np.float64) for v in scaling)
    for solver in ("dense", "cg"):
        found = solve_codebook(words, codes, x, scaling, solver).codewords[0]
        for j in range(k):
            of = codes[:, 0] == j
            y = x[of].astype(np.float64)
            ratio = (h - o)[of] / (y * y).sum(1)
            matrix = np.eye(d) * o[of].sum() + (ratio[:, None] * y).T @ y
            expected = np.linalg.solve(matrix, (h[of][:, None] * y).sum(0))
            np.testing.assert_allclose(found[j], expected, rtol=1e-3, atol=1e-4)


def test_equal_weights_give_the_weighted_average():
    x, scaling, _ = problem(0, 60, 3)
    scaling = avq_jax.Scaling(scaling.orthogonal, scaling.orthogonal)
    codes = np.zeros((60, 1), np.int64)
    for solver in ("mean", "dense", "cg"):
        found = solve_codebook(np.zeros((1, 1, 3), np.float32), codes, x, scaling, solver)
        expected = np.average(x, axis=0, weights=np.asarray(scaling.orthogonal))
        np.testing.assert_allclose(found.codewords[0, 0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("m", "R", "separate"),
    [
        (1, 2, True),
        (3, 0, False),
        pytest.param(1, 0, False, marks=pytest.mark.full),
        pytest.param(2, 2, True, marks=pytest.mark.full),
        pytest.param(3, 2, True, marks=pytest.mark.full),
        pytest.param(6, 0, False, marks=pytest.mark.full),
    ],
)
def test_dense_and_conjugate_gradients_equal_least_squares(m, R, separate):
    n, d, k = 90, 6 if m != 3 else 7, 3
    x, scaling, options = problem(2, n, d, R, separate=separate)
    codes = np.random.default_rng(3).integers(0, k, (n, m))
    M = metrics(x, scaling, **options)
    book = joint_lstsq(x, codes, M, k, d)
    best = losses(x, avq_jax.decode(avq_jax.Codebook(jnp.float32(book), d), codes), M).sum()
    start = np.zeros((m, k, -(-d // m)), np.float32)
    for solver in ("dense", "cg"):
        found = solve_codebook(start, codes, x, scaling, solver, **options)
        decoded = avq_jax.decode(avq_jax.Codebook(found.codewords, d), codes)
        assert losses(x, decoded, M).sum() == pytest.approx(best, rel=1e-5)
        assert bool(found.used.all())


@pytest.mark.parametrize("solver", ["dense", "cg"])
@pytest.mark.parametrize("m", [1, 2])
def test_unused_codewords_stay(m, solver):
    x, scaling, _ = problem(4, 40, 4)
    words = np.random.default_rng(5).normal(size=(m, 4, 4 // m)).astype(np.float32)
    codes = np.random.default_rng(6).integers(0, 3, (40, m))
    found = solve_codebook(words, codes, x, scaling, solver)
    np.testing.assert_array_equal(found.codewords[:, 3], words[:, 3])
    np.testing.assert_array_equal(found.used, [[True, True, True, False]] * m)


def test_enumeration_finds_the_best_codeword():
    x, scaling, options = problem(7, 200, 5, R=2, separate=True)
    book = avq_jax.Codebook(jax.random.normal(jax.random.key(0), (1, 37, 5)), dim=5)
    M = metrics(x, scaling, **options)
    each = np.stack(
        [losses(x, np.broadcast_to(w, x.shape), M) for w in np.asarray(book.codewords[0])], axis=1
    )
    codes = np.asarray(avq_jax.encode(book, x, scaling, **options).codes)[:, 0]
    np.testing.assert_allclose(each[np.arange(200), codes], each.min(1), rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    eta=st.sampled_from([(0.0, 1.0), (1.0, 8.0), (50.0, 500.0)]),
    R=st.sampled_from([0, 2]),
)
def test_descent_ends_where_no_single_change_helps(seed, eta, R):
    m, k, d, n = 3, 4, 6, 40
    x, scaling, options = problem(seed, n, d, R, eta)
    words = np.random.default_rng(seed + 1).normal(size=(m, k, 2)).astype(np.float32)
    book = avq_jax.Codebook(jnp.asarray(words), dim=d)
    M = metrics(x, scaling, **options)

    def loss_of(codes):
        return losses(x, avq_jax.decode(book, codes), M)

    codes = np.asarray(avq_jax.encode(book, x, scaling, num_sweeps=50, **options).codes)
    found = loss_of(codes)
    slack = found * 1e-4 + 1e-4
    euclidean = loss_of(np.asarray(avq_jax.encode(book, x).codes))
    assert (found <= euclidean + slack).all()
    every = np.stack(
        [
            loss_of(np.broadcast_to(np.uint8(c), codes.shape))
            for c in itertools.product(range(k), repeat=m)
        ]
    ).min(0)
    assert (found >= every - slack).all()
    assert np.mean(found <= every + slack) > 0.3
    for j, c in itertools.product(range(m), range(k)):
        changed = codes.copy()
        changed[:, j] = c
        assert (found <= loss_of(changed) + slack).all()


def test_a_sweep_lowers_the_loss_of_each_row():
    x, scaling, _ = problem(8, 300, 8, eta=(3.0, 9.0))
    book = avq_jax.Codebook(jax.random.normal(jax.random.key(1), (4, 16, 2)), dim=8)
    M = metrics(x, scaling)
    each = [
        losses(x, avq_jax.decode(book, avq_jax.encode(book, x, scaling, num_sweeps=t)), M)
        for t in (0, 1, 5)
    ]
    for before, after in itertools.pairwise(each):
        assert (after <= before * (1 + 1e-5) + 1e-5).all()
    assert each[-1].mean() < 0.9 * each[0].mean()


def test_rows_far_from_the_origin_are_told_apart():
    x, scaling, _ = problem(9, 200, 4)
    words = jax.random.normal(jax.random.key(2), (2, 16, 2))
    shift = 2.0**12
    near = avq_jax.encode(avq_jax.Codebook(words, 4), x, scaling, direction=x).codes
    words, moved = words + shift, jnp.asarray(x) + shift
    # What float32 keeps of the moved rows, moved back.
    kept = avq_jax.Codebook(words - shift, 4)
    near = avq_jax.encode(kept, moved - shift, scaling, direction=x).codes
    far = avq_jax.encode(avq_jax.Codebook(words, 4), moved, scaling, direction=x).codes
    assert np.mean(np.asarray(near == far)) > 0.995


def test_solver_by_size():
    assert choose_solver("auto", 50, 16, 2) == "dense"
    assert choose_solver("auto", 96, 256, 8) == "cg"
    assert choose_solver("auto", 1, 16, 100) == "dense"
    assert choose_solver("cg", 2, 2, 2) == "cg"
