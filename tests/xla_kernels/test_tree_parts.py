"""Parts of a tree search: ranked leaves, candidates of chosen leaves, the best of several lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xla_kernels import (
    best_candidates,
    library,
    tree_candidates,
    tree_floor,
    tree_leaves,
    tree_search,
)

from .test_tree_search import make

FORMS = [{}, {"offsets": True}, {"gains": 16}, {"leaves": 5, "n": 1000, "d": 16, "m": 4, "k": 256}]


@pytest.fixture(params=["xla", "cpu"])
def implementation(request):
    if request.param == "cpu":
        request.getfixturevalue("compiled")
    return request.param


def chosen_rows(parts, **options):
    scores, rows = (jnp.stack(lists) for lists in zip(*parts, strict=True))
    _, rows = best_candidates(scores, rows, **options)
    return [sorted(r[r >= 0].tolist()) for r in np.asarray(rows)]


@pytest.mark.parametrize("form", FORMS, ids=str)
class TestParts:
    def test_a_search_of_the_ranked_leaves_is_a_search(self, form, implementation):
        tree, _, queries = make(**form)
        queries = queries.at[2, 1].set(jnp.nan)
        by = {"implementation": implementation}
        leaves = tree_leaves(tree, queries, leaves_to_search=3, **by)
        assert leaves.shape == (13, 3)
        assert (leaves[2] == -1).all()
        assert (np.delete(leaves, 2, axis=0) >= 0).all()
        options = {"k": 5, "leaves_to_search": 3, **by}
        found = tree_search(tree, queries, leaves=leaves, **options)
        wanted = tree_search(tree, queries, **options)
        np.testing.assert_array_equal(found[1], wanted[1])
        np.testing.assert_array_equal(found[0], wanted[0])

    def test_candidates_of_parts_make_those_of_the_whole(self, form, implementation):
        tree, _, queries = make(**form)
        by = {"implementation": implementation}
        leaves = tree_leaves(tree, queries, leaves_to_search=4, **by)
        whole = tree_candidates(tree, queries, leaves, retrieve=30, **by)
        choice = {"retrieve": 30, "keep": 30, **by}
        wanted = chosen_rows([whole], **choice)
        assert all(len(some) >= 30 for some in wanted)
        floor = tree_floor(tree, queries, leaves[:, :1], retrieve=30, **by)
        some = [
            tree_candidates(
                tree, queries, jnp.where(leaves % 2 == i, leaves, -1), retrieve=30, floor=f, **by
            )
            for i, f in ((0, None), (1, floor))
        ]
        assert chosen_rows(some, **choice) == wanted

    def test_gradients_and_vmap(self, form, implementation):
        if form:
            return
        tree, _, queries = make()
        by = {"implementation": implementation}
        leaves = tree_leaves(tree, queries, leaves_to_search=3, **by)

        def total(q, **options):
            return jnp.sum(tree_search(tree, q, k=3, leaves_to_search=3, **options, **by)[0])

        np.testing.assert_allclose(
            jax.grad(lambda q: total(q, leaves=leaves))(queries),
            jax.grad(total)(queries),
            rtol=1e-5,
        )
        search = jax.vmap(
            lambda q, some: tree_search(tree, q, k=3, leaves_to_search=3, leaves=some, **by)[1]
        )
        many = search(queries[:12].reshape(3, 4, -1), leaves[:12].reshape(3, 4, -1))
        alone = tree_search(tree, queries[:12], k=3, leaves_to_search=3, leaves=leaves[:12], **by)
        np.testing.assert_array_equal(many.reshape(12, 3), alone[1])


def test_a_floor_is_the_last_of_the_best():
    tree, _, queries = make()
    leaves = tree_leaves(tree, queries, leaves_to_search=2)
    scores, _ = tree_candidates(tree, queries, leaves, retrieve=20, implementation="xla")
    floor = tree_floor(tree, queries, leaves, retrieve=20)
    none = tree_floor(tree, queries, leaves, retrieve=20, implementation="xla")
    assert (np.asarray(none) == -np.inf).all()
    if library.load().handle is not None:
        # Tables are rounded to 8 bits.
        np.testing.assert_allclose(floor, scores[:, 19], atol=0.1)
        few = tree_floor(tree, queries, leaves * 0 - 1, retrieve=20)
        assert (np.asarray(few) == -np.inf).all()


@pytest.mark.parametrize(("retrieve", "keep"), [(10, 10), (10, 4), (60, 7), (60, 60)])
def test_the_best_of_lists(compiled, retrieve, keep):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5, 40, 10)).astype(np.float32)
    rows = rng.integers(-1, 30, (5, 40, 10)).astype(np.int32)
    scores[:, 3] = -np.inf
    scores[2, 4] = np.nan
    options = {"retrieve": retrieve, "keep": keep}
    found = {
        name: [np.asarray(a) for a in best_candidates(scores, rows, implementation=name, **options)]
        for name in ("cpu", "xla")
    }
    for name, (best, best_rows) in found.items():
        assert best.shape == best_rows.shape == found["cpu"][0].shape
        for q in range(40):
            s, r = scores[:, q].ravel(), rows[:, q].ravel()
            order = [i for i in np.argsort(-s, kind="stable") if r[i] >= 0 and s[i] > -np.inf]
            order = order[:retrieve]
            if keep < retrieve:
                order = [i for n, i in enumerate(order) if r[i] not in r[order[:n]]][:keep]
            there = best_rows[q] >= 0
            got = list(zip(best[q][there], best_rows[q][there], strict=True))
            want = list(zip(s[order], r[order], strict=True))
            assert (got if keep < retrieve else sorted(got, reverse=True)) == want, name
            assert (best[q][~there] == -np.inf).all()


@pytest.mark.parametrize("keep", [4, 10])
def test_gradients_of_the_best_of_lists(implementation, keep):
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((3, 6, 10)).astype(np.float32)
    rows = np.broadcast_to(rng.integers(-1, 20, (6, 10)), (3, 6, 10)).astype(np.int32)

    def kept(scores):
        found = best_candidates(scores, rows, retrieve=10, keep=keep, implementation=implementation)
        return jnp.where(found[1] >= 0, found[0], 0) ** 2

    got = jax.grad(lambda s: jnp.sum(kept(s)))(jnp.asarray(scores))
    values = np.asarray(kept(scores))
    for q in range(6):
        want = np.sort(values[q][values[q] > 0])
        place = np.asarray(got[:, q]) != 0
        np.testing.assert_allclose(got[:, q][place], 2 * scores[:, q][place], rtol=1e-6)
        np.testing.assert_allclose(np.sort(scores[:, q][place] ** 2), want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 0), (0, 2, 4), (3, 0, 4)], ids=str)
def test_no_lists(implementation, shape):
    rows = jnp.zeros(shape, jnp.int32)

    def best(scores):
        return best_candidates(scores, rows, retrieve=5, keep=2, implementation=implementation)

    scores, found = best(jnp.zeros(shape))
    assert (scores == -jnp.inf).all()
    assert (found == -1).all()
    assert found.shape == (shape[1], 2)
    assert jax.grad(lambda s: jnp.sum(jnp.exp(best(s)[0])))(jnp.zeros(shape)).shape == shape


def test_arguments():
    tree, _, queries = make()
    leaves = tree_leaves(tree, queries, leaves_to_search=2)
    for call, error in [
        (lambda: tree_leaves(tree, queries, leaves_to_search=0), "leaves_to_search must be"),
        (lambda: tree_candidates(tree, queries, leaves, retrieve=0), "retrieve and k must be"),
        (lambda: tree_candidates(tree, queries, leaves[:3], retrieve=5), "leaves must be int32"),
        (lambda: tree_floor(tree, queries, leaves, retrieve=0), "retrieve must be"),
        (lambda: best_candidates(queries, leaves, retrieve=1, keep=0), "retrieve and keep must be"),
        (lambda: best_candidates(queries, leaves, retrieve=1, keep=1), "must be .p, b, c."),
        (
            lambda: tree_search(tree, queries, k=1, leaves_to_search=2, leaves=leaves, rescore=5),
            "with rows",
        ),
        (
            lambda: tree_search(
                tree, queries, k=1, leaves_to_search=2, leaves=leaves, deviations=3.0
            ),
            "deviations None where leaves",
        ),
    ]:
        with pytest.raises(ValueError, match=error):
            call()
