"""Query terms from a sample of queries."""

import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.loss import known_queries


def draw(n=30, s=12, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape).astype(np.float32) for shape in ((n, d), (s, d)))


def test_terms_are_the_weighted_mean_over_the_best_queries():
    x, queries = draw()
    weight = avq_jax.Power(2.0)
    scaling = avq_jax.scaling(weight, np.linalg.norm(x, axis=1), dim=5)
    terms = avq_jax.query_terms(x, queries, weight, scaling, num_terms=3, strength=2.0)
    units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    error = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    got = np.sum(
        np.asarray(terms.weights) * np.einsum("nrd,nd->nr", terms.directions, error) ** 2, 1
    )
    scores = x @ units.T
    want = []
    for i in range(len(x)):
        best = np.argsort(-scores[i])[:3]
        w = np.maximum(scores[i, best], 0) ** 2
        want.append(2 * float(scaling.orthogonal[i]) * np.sum(w * (units[best] @ error[i]) ** 2))
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, queries = draw()
    scaling = avq_jax.Scaling(jnp.full(30, 5.0), jnp.ones(30))
    whole = avq_jax.query_terms(x, queries, avq_jax.Uniform(), scaling)
    monkeypatch.setattr(known_queries, "_SCORES", 7 * 12)
    monkeypatch.setattr(known_queries, "_query_terms", known_queries._terms)
    parts = avq_jax.query_terms(x, queries, avq_jax.Uniform(), scaling)
    np.testing.assert_allclose(parts.directions, whole.directions, rtol=1e-6)
    np.testing.assert_allclose(parts.weights, whole.weights, rtol=1e-6)


def test_known_queries_are_served_better():
    x, queries = draw(n=400, s=6, d=8)
    scaling = avq_jax.Scaling(jnp.full(400, 5.0), jnp.ones(400))
    weight = avq_jax.Threshold(0.2)
    words = jnp.asarray(x[:16]).reshape(16, 4, 2).transpose(1, 0, 2)
    book = avq_jax.Codebook(words, dim=8)
    terms = avq_jax.query_terms(x, queries, weight, scaling, num_terms=6)
    errors = []
    for extra in (None, terms):
        rows = avq_jax.decode(book, avq_jax.encode(book, x, scaling, extra=extra))
        scores = x @ queries.T
        missed = (np.asarray(x - rows) @ queries.T) ** 2
        errors.append(missed[scores > 0].mean())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.ones((3, 4), np.float32)}, "queries must be as wide as x, 5; got 4"),
        ({"strength": -1.0}, "strength must be >= 0"),
        ({"num_terms": 0}, "num_terms must be at least 1"),
        ({"scaling": avq_jax.Scaling(np.ones(4), np.ones(4))}, "scaling must have 30 rows"),
        ({"queries": np.full((3, 5), np.nan, np.float32)}, "queries must be finite"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, queries = draw()
    given = {"queries": queries, "scaling": avq_jax.Scaling(np.ones(30), np.ones(30))} | change
    with pytest.raises(ValueError, match=message):
        avq_jax.query_terms(
            x, given.pop("queries"), avq_jax.Uniform(), given.pop("scaling"), **given
        )
