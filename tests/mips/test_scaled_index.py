"""A score-aware scale behind the tree: what holds of an index without one holds with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
import avq_jax.serving
from avq_jax.mips.packing import coded_rows
from avq_jax.quantization import Codes, Scaled

from .conftest import LEAVES, SIZES, D, N, make_rows

KINDS = {
    "product": {"metric": "dot", "scale": 4},
    "additive, l2": {"metric": "l2", "scale": 8, "codec": "additive", "num_codewords": 4},
    "spilled": {"metric": "cosine", "scale": 4, "soar_lambda": 1.0},
}
ALL = {"k": 7, "leaves_to_search": LEAVES}


@pytest.fixture(
    scope="module",
    params=["product", pytest.param("additive, l2", marks=pytest.mark.full), "spilled"],
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def index(rows, kind):
    return avq_jax.build(jax.random.key(0), rows, **SIZES, **KINDS[kind])


@pytest.fixture(scope="module")
def scaled(rows):
    return avq_jax.build(jax.random.key(0), rows, **SIZES, scale=4)


def gains_of(index, numbers):
    return jnp.asarray(np.asarray(index.tree.packed.gains.levels)[numbers])


def near(index, copy=None):
    """Decoded rows ``[n, d]`` of one of the copies."""
    coded = coded_rows(index.tree, N)
    leaves, codes, gains = (
        a if copy is None else a[:, copy] for a in (coded.leaves, coded.codes, coded.gains)
    )
    decoded = avq_jax.decode(index.tree.codec, Codes(jnp.asarray(codes), gains_of(index, gains)))
    return np.asarray(index.tree.centroids)[leaves] + np.asarray(decoded)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_estimates_are_those_of_decoded_rows(index, kind, queries, implementation):
    found = avq_jax.search(index, queries, rescore=0, implementation=implementation, **ALL)
    q = queries
    if kind == "spilled":
        q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        scores = np.maximum(q @ near(index, 0).T, q @ near(index, 1).T)
    else:
        scores = q @ near(index).T
    if index.metric == "l2":
        offset = coded_rows(index.tree, N).offset
        scores = 2 * (scores + offset[None]) - np.sum(q * q, axis=1, keepdims=True)
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :7], atol=5e-5)


def test_everything_rescored_is_exact(index, rows, queries):
    found = avq_jax.search(index, queries, rescore=2 * N, **ALL)
    exact = avq_jax.brute_force(queries, rows, k=7, metric=index.metric)
    np.testing.assert_array_equal(found.ids, exact.ids)


def test_host_handle_filters_and_mesh_give_the_same(index, queries):
    options = {**ALL, "k": 5, "rescore": 40}
    found = avq_jax.search(index, queries, **options)
    handle = avq_jax.searcher(index, **options)
    np.testing.assert_array_equal(handle(queries[:3]).ids, found.ids[:3])
    # Estimates of slots of one row may tie at the border: no rescoring, but all slots.
    allowed = np.arange(N) % 3 > 0
    some = avq_jax.search(index, queries[:4], allowed=allowed, rescore=0, **ALL)
    every = avq_jax.search(index, queries[:4], rescore=0, **{**ALL, "k": N})
    for ids, scores, wanted, best in zip(
        some.ids, some.scores, np.asarray(every.ids), np.asarray(every.scores), strict=True
    ):
        np.testing.assert_array_equal(ids, wanted[allowed[wanted]][:7])
        np.testing.assert_allclose(scores, best[allowed[wanted]][:7], rtol=1e-6)
    mesh = jax.make_mesh((2,), ("shards",))
    parts = avq_jax.shard(index, mesh, axis="shards")
    options |= {"rescore": 300, "implementation": "xla"}
    one = avq_jax.search(index, queries, **options)
    many = avq_jax.search_sharded(parts, queries, **options)
    np.testing.assert_array_equal(many.ids, one.ids)


def test_size_and_name(index, kind):
    bits = KINDS[kind]["scale"]
    assert f"a scale of {bits} bits" in repr(index)
    plain = index.tree.codebook.bits / 8 + (4 if index.metric == "l2" else 0)
    assert index.code_bytes == plain + bits / 8
    assert isinstance(index.tree.codec, Scaled)
    assert sum(index.bytes_per_row) * N == pytest.approx(
        sum(leaf.nbytes for leaf in jax.tree.leaves(dataclasses.replace(index, weight=None)))
    )


def test_saved_loaded_and_changed(index, kind, rows, queries, tmp_path):
    avq_jax.save(index, tmp_path / "index")
    again = avq_jax.load(tmp_path / "index")
    header, arrays = avq_jax.to_arrays(index)
    # With the sha256 of every array.
    assert avq_jax.to_arrays(again)[0] == header
    assert avq_jax.to_arrays(avq_jax.from_arrays(header, arrays))[0] == header
    for a, b in zip(coded_rows(index.tree, N), coded_rows(again.tree, N), strict=True):
        np.testing.assert_array_equal(a, b)
    options = {"soar_lambda": KINDS[kind].get("soar_lambda")}
    roomy = avq_jax.reserve(avq_jax.remove(again, np.arange(40)), capacity=N + 30)
    roomy, numbers = avq_jax.add(roomy, rows[:20], **options)
    assert numbers.tolist() == list(range(20))
    roomy, _ = avq_jax.add(roomy, rows[20:40], **options)
    roomy = avq_jax.replace(roomy, np.arange(50, 90), rows[50:90], **options)
    # Codes and scales are those of build, but where rounding decides.
    old, new = coded_rows(index.tree, N), coded_rows(avq_jax.compact(roomy).tree, N)
    same = np.asarray(old.leaves == new.leaves)
    assert same.mean() > 0.99
    assert (old.gains == new.gains)[same].mean() > 0.99
    assert (old.codes == new.codes)[same].mean() > 0.99
    fresh = avq_jax.rebalance(jax.random.key(1), roomy, num_iterations=2, **options)
    assert fresh.tree.packed.gains.levels.shape == index.tree.packed.gains.levels.shape
    exact = avq_jax.brute_force(queries, rows, k=7, metric=index.metric)
    found = avq_jax.search(fresh, queries, rescore=2 * fresh.num_rows, **ALL)
    np.testing.assert_array_equal(found.ids, exact.ids)


def test_explained(index, queries):
    found = avq_jax.search(index, queries[0], rescore=0, **ALL)
    told = avq_jax.explain(index, queries[0], int(found.ids[0]), rescore=0, **ALL)
    assert max(copy.approximate for copy in told.copies) == pytest.approx(
        float(found.scores[0]), abs=1e-4
    )
    likely = avq_jax.search(index, queries, rescore=50, adaptive=6.0, **ALL)
    every = avq_jax.search(index, queries, rescore=50, **ALL)
    assert (np.asarray(likely.ids) == np.asarray(every.ids)).mean() > 0.95


def test_loses_less(scaled, indexes, rows):
    plain, loss = indexes["dot"], []
    norms = np.linalg.norm(rows, axis=1)
    scaling = avq_jax.scaling(plain.weight, norms, dim=D)
    for each in (plain, scaled):
        coded = coded_rows(each.tree, N)
        gain = None if coded.gains is None else gains_of(each, coded.gains)
        decoded = avq_jax.decode(each.tree.codec, Codes(jnp.asarray(coded.codes), gain))
        x_tilde = each.tree.centroids[coded.leaves] + decoded
        loss.append(float(jnp.mean(avq_jax.score_aware_loss(jnp.asarray(rows), x_tilde, scaling))))
    assert loss[1] < 0.95 * loss[0]


def test_gradients_reach_the_levels(scaled, queries):
    q = jnp.asarray(queries[:3])

    def total(levels, q, implementation):
        gains = scaled.tree.packed.gains._replace(levels=levels)
        tree = scaled.tree._replace(packed=scaled.tree.packed._replace(gains=gains))
        changed = dataclasses.replace(scaled, tree=tree)
        options = {"rescore": 0, "implementation": implementation}
        return avq_jax.search(changed, q, **ALL, **options).scores.sum()

    levels = scaled.tree.packed.gains.levels
    plain, kernel = (
        jax.grad(total, argnums=(0, 1))(levels, q, implementation)
        for implementation in ("xla", None)
    )
    step = 1e-3 * jax.random.normal(jax.random.key(2), levels.shape)
    slope = (total(levels + step, q, "xla") - total(levels - step, q, "xla")) / 2
    np.testing.assert_allclose(jnp.sum(plain[0] * step), slope, rtol=0.02, atol=1e-4)
    for a, b in zip(plain, kernel, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_exported(scaled, queries, tmp_path):
    options = {"k": 5, "leaves_to_search": 3, "rescore": 0}
    avq_jax.serving.export(scaled, tmp_path / "a", platforms=("cpu",), **options)
    found = avq_jax.serving.load_exported(tmp_path / "a")(queries[:6])
    wanted = avq_jax.search(scaled, queries[:6], implementation="xla", **options)
    np.testing.assert_array_equal(found.ids, wanted.ids)


def test_damaged_files_are_refused(scaled, tmp_path):
    packed = scaled.tree.packed

    def saved(**change):
        gains = packed.gains._replace(**change)
        tree = scaled.tree._replace(packed=packed._replace(gains=gains))
        avq_jax.save(dataclasses.replace(scaled, tree=tree), tmp_path / "index")
        return avq_jax.load(tmp_path / "index")

    levels = packed.gains.levels
    for change, message in [
        ({"level": packed.gains.level.at[3].set(16)}, "gains must be below 16"),
        ({"levels": levels[::-1]}, "levels must be positive and rising"),
        ({"levels": -levels[::-1]}, "levels must be positive and rising"),
        ({"levels": levels.at[2].set(jnp.nan)}, "levels must be finite"),
        ({"levels": levels[:15]}, "levels are 16 or 256"),
    ]:
        with pytest.raises(avq_jax.IndexFormatError, match=message):
            saved(**change)


@pytest.mark.full
def test_built_otherwise(scaled, rows, tmp_path):
    """On disk the same, bit for bit; over a mesh up to the order of sums."""
    key = jax.random.key(0)
    avq_jax.build_to_disk(key, rows, tmp_path / "a", scale=4, chunk_rows=250, **SIZES)
    found = avq_jax.to_arrays(avq_jax.load(tmp_path / "a"))[1]
    wanted = avq_jax.to_arrays(scaled)[1]
    assert found.keys() == wanted.keys()
    for name in ("levels", "codewords", "centroids"):
        np.testing.assert_array_equal(found[name], wanted[name])
    for name in ("gains", "codes"):
        assert (found[name] == wanted[name]).mean() > 0.99
    mesh = jax.make_mesh((8,), ("shards",))
    many = avq_jax.build_sharded(key, rows, mesh=mesh, axis="shards", scale=4, **SIZES)
    assert str(many) == str(scaled)
    np.testing.assert_allclose(
        many.tree.packed.gains.levels, scaled.tree.packed.gains.levels, rtol=0.02
    )
    a, b = coded_rows(many.tree, N), coded_rows(scaled.tree, N)
    assert (a.codes == b.codes).mean() > 0.97
    assert (a.gains == b.gains).mean() > 0.95


@pytest.mark.parametrize(("scale", "error"), [(5, ValueError), (0, ValueError), (4.5, TypeError)])
def test_other_sizes_are_refused(scale, error):
    from avq_jax.mips.options import tree_options

    options = {
        "metric": "dot", "num_leaves": 4, "num_subspaces": 3, "num_codewords": 16,
        "num_iterations": 2, "sample_size": 500, "soar_lambda": None, "spherical": False,
        "num_groups": None, "scanned_dim": None, "projection": "pca",
    }  # fmt: skip
    with pytest.raises(error, match="scale must be"):
        tree_options(*make_rows(50).shape, scale=scale, **options)
