"""Search over eight devices and over two processes: the ids of one device."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import avq_jax
from avq_jax.mips.leaf_owners import leaf_owners
from avq_jax.mips.packing import coded_rows
from avq_jax.mips.rescoring import store_rows

from .conftest import LEAVES, SIZES, D, N


@pytest.fixture(scope="module")
def spilled(rows):
    """An index whose rows lie in two leaves each."""
    return avq_jax.build(jax.random.key(0), rows, soar_lambda=1.0, **SIZES)


def mesh_of(*shape, axes=("shards", "queries")):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, axes[: len(shape)])


def assert_same(one, two):
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_allclose(one.scores, two.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("metric", "rescore"),
    [
        ("dot", 40),
        ("l2", 40),
        pytest.param("dot", 0, marks=pytest.mark.full),
        pytest.param("cosine", 40, marks=pytest.mark.full),
        pytest.param("l2", 0, marks=pytest.mark.full),
    ],
)
def test_eight_devices(indexes, queries, metric, rescore):
    """Plain XLA on both sides, where candidates are chosen by float scores."""
    parts = avq_jax.shard(indexes[metric], mesh_of(8), axis="shards")
    options = {"k": 5, "leaves_to_search": 3, "rescore": rescore, "implementation": "xla"}
    bad = np.array(queries)
    bad[3, 1] = np.nan
    one = avq_jax.search(indexes[metric], bad, **options)
    many = avq_jax.search_sharded(parts, bad, **options)
    assert_same(many, one)
    assert (np.asarray(many.ids[3]) == -1).all()


def test_queries_over_another_axis(index, queries):
    parts = avq_jax.shard(index, mesh_of(4, 2), axis="shards")
    options = {"k": 5, "leaves_to_search": LEAVES, "rescore": 200}
    one = avq_jax.search(index, queries, **options)
    assert_same(avq_jax.search_sharded(parts, queries, queries_axis="queries", **options), one)
    few = avq_jax.search_sharded(parts, queries[0], **options)
    assert few.ids.tolist() == one.ids[0].tolist()
    assert avq_jax.search_sharded(parts, queries[:0], **options).ids.shape == (0, 5)


@pytest.mark.parametrize(
    ("metric", "rescore"),
    [
        ("dot", 40),
        ("l2", 0),
        pytest.param("dot", 0, marks=pytest.mark.full),
        pytest.param("l2", 40, marks=pytest.mark.full),
    ],
)
def test_gradients(indexes, queries, metric, rescore):
    parts = avq_jax.shard(indexes[metric], mesh_of(3), axis="shards")
    options = {"k": 3, "leaves_to_search": 4, "rescore": rescore}

    def total(search, index):
        return jax.grad(lambda q: (search(index, q, **options).scores ** 2).sum())(queries[:7])

    one, many = total(avq_jax.search, indexes[metric]), total(avq_jax.search_sharded, parts)
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"adaptive": 1.5},
        {"overretrieve": 1.5, "adaptive": 2.0, "rescore": 20},
        {"recall_target": 0.9, "rescore": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("leaves", "implementation"),
    [
        ("near", "xla"),
        ("spread", None),
        pytest.param("near", None, marks=pytest.mark.full),
        pytest.param("spread", "xla", marks=pytest.mark.full),
    ],
)
def test_options_of_search(spilled, queries, leaves, implementation, options):
    parts = avq_jax.shard(spilled, mesh_of(3), axis="shards", leaves=leaves)
    options = {"k": 5, "leaves_to_search": LEAVES, "rescore": 40, **options}
    options["implementation"] = implementation
    one = avq_jax.search(spilled, queries, **options)
    many = avq_jax.search_sharded(parts, queries, **options)
    assert_same(many, one)
    if "adaptive" in options:
        # It is not the search without.
        less = {**options, "adaptive": 0.0}
        assert_same(
            avq_jax.search_sharded(parts, queries, **less), avq_jax.search(spilled, queries, **less)
        )


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_ties_beyond_the_candidates(indexes, queries, metric):
    """All rows score 0 for a zero query, far more than are rescored: the lowest come first."""
    parts = avq_jax.shard(indexes[metric], mesh_of(3), axis="shards")
    asked = np.concatenate([np.zeros((1, D), np.float32), queries[:2]])
    options = {"k": 5, "leaves_to_search": LEAVES, "rescore": 40}
    assert_same(
        avq_jax.search_sharded(parts, asked, **options),
        avq_jax.search(indexes[metric], asked, **options),
    )


def test_leaves_are_shared_out_evenly():
    rng = np.random.default_rng(0)
    vectors, sizes = rng.standard_normal((400, 5)), rng.integers(1, 20, 400)
    for leaves in ("near", "spread"):
        owners = leaf_owners(vectors, sizes, 6, leaves)
        load = np.bincount(owners, sizes, minlength=6)
        assert load.max() < 1.1 * load.mean()
    alone = leaf_owners(vectors[:2], sizes[:2], 6, "near")
    assert len(set(alone.tolist())) == 2
    same = leaf_owners(np.zeros((9, 2)), np.ones(9, int), 3, "near")
    assert np.bincount(same).tolist() == [3, 3, 3]


@pytest.mark.full
def test_other_forms(index, rows, queries):
    """int8 rows, an odd number of shards with empty ones, spilled copies, removed rows."""
    options = {"k": 5, "leaves_to_search": LEAVES, "rescore": 300, "implementation": "xla"}
    small = dataclasses.replace(index, store=store_rows(rows, "int8"))
    spilled = avq_jax.build(jax.random.key(0), rows, soar_lambda=1.0, **SIZES)
    gone = avq_jax.remove(index, np.arange(150, 400))
    for each in (small, spilled, gone):
        parts = avq_jax.shard(each, mesh_of(7), axis="shards")
        many = avq_jax.search_sharded(parts, queries, **options)
        assert_same(many, avq_jax.search(each, queries, **options))
    empty = avq_jax.remove(index, np.arange(N))
    parts = avq_jax.shard(empty, mesh_of(2), axis="shards")
    assert (np.asarray(avq_jax.search_sharded(parts, queries[:2]).ids) == -1).all()


def test_arguments(index, exact_indexes, queries, rows):
    mesh = mesh_of(2)

    def built(mesh, **options):
        options = {"axis": "shards", **SIZES, **options}
        return avq_jax.build_sharded(jax.random.key(0), rows, mesh=mesh, **options)

    parts = avq_jax.shard(index, mesh, axis="shards")
    for call, error in [
        (lambda: avq_jax.shard(exact_indexes["dot"], mesh, axis="shards"), "must have a tree"),
        (lambda: avq_jax.shard(index, mesh, axis="rows"), "axis must be one of"),
        (lambda: avq_jax.shard(index, mesh, axis="shards", leaves="far"), "leaves must be one of"),
        (lambda: built(mesh, axis="rows"), "axis must be one of"),
        (lambda: built(mesh, soar_lambda=-1.0), "soar_lambda must be None or a finite number"),
        (lambda: built(mesh, scanned_dim=D + 1), "scanned_dim must be at most the width of x"),
        (lambda: built(mesh, num_groups=LEAVES + 1), "num_groups must be at most"),
        (lambda: avq_jax.search_sharded(parts, queries[:, :3]), f"as wide as .* {D}"),
        (lambda: avq_jax.search_sharded(parts, queries, k=5, rescore=3), "at least k = 5"),
        (lambda: avq_jax.search_sharded(parts, queries, queries_axis="shards"), "queries_axis"),
        (lambda: avq_jax.search_sharded(parts, queries, adaptive=-1.0), "adaptive must be None"),
        (lambda: avq_jax.search_sharded(parts, queries, overretrieve=0.5), "overretrieve must be"),
        (
            lambda: avq_jax.search_sharded(parts, queries, recall_target=0.0),
            "recall_target must be",
        ),
    ]:
        with pytest.raises(ValueError, match=error):
            call()


_PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import numpy as np
import avq_jax
assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
mesh = jax.make_mesh((2,), ("shards",))
"""

_SEARCH = """
index = avq_jax.load(sys.argv[3])
queries = np.load(sys.argv[4])
parts = avq_jax.shard(index, mesh, axis="shards")
assert parts.rows.addressable_shards[0].data.shape[1] == index.num_rows // 2
found = avq_jax.search_sharded(parts, queries, k=5, leaves_to_search=3, rescore=40,
                               implementation="xla")
np.save(sys.argv[5], np.asarray(found.ids.addressable_data(0)))
"""

_BUILD = """
index = avq_jax.build_sharded(jax.random.key(0), np.load(sys.argv[3]), mesh=mesh, axis="shards",
                              num_leaves=int(sys.argv[4]), num_subspaces=int(sys.argv[5]),
                              num_iterations=int(sys.argv[6]))
avq_jax.save(index, sys.argv[7])
"""


def in_two_processes(code, *words):
    """Run code in two processes over loopback, with words as arguments from the third on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    root = str(pathlib.Path(__file__).resolve().parents[2])
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = root + os.pathsep + env.get("PYTHONPATH", "")
    children = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", _PROCESS + code, address, str(i)),
                *(str(word).format(process=i) for word in words),
            ],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [child.communicate(timeout=240)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], said


@pytest.mark.full
def test_two_processes(index, queries, tmp_path):
    avq_jax.save(index, tmp_path / "index")
    np.save(tmp_path / "queries.npy", queries)
    words = (tmp_path / "index", tmp_path / "queries.npy", tmp_path / "{process}.npy")
    in_two_processes(_SEARCH, *words)
    options = {"k": 5, "leaves_to_search": 3, "rescore": 40, "implementation": "xla"}
    wanted = avq_jax.search(index, queries, **options)
    for i in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{i}.npy"), wanted.ids)


def assert_same_index(many, one):
    """Up to the order of float sums."""
    np.testing.assert_allclose(many.tree.centroids, one.tree.centroids, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(many.tree.ranking, one.tree.ranking, rtol=1e-4, atol=1e-4)
    a, b = coded_rows(many.tree, N), coded_rows(one.tree, N)
    assert (a.leaves == b.leaves).mean() > 0.99
    np.testing.assert_allclose(
        many.tree.codebook.codewords, one.tree.codebook.codewords, rtol=1e-2, atol=1e-2
    )
    assert (a.codes == b.codes).mean() > 0.98


@pytest.mark.full
def test_a_build_in_two_processes(rows, tmp_path):
    np.save(tmp_path / "rows.npy", rows)
    words = [SIZES[name] for name in ("num_leaves", "num_subspaces", "num_iterations")]
    in_two_processes(_BUILD, tmp_path / "rows.npy", *words, tmp_path / "index{process}")
    one = avq_jax.build(jax.random.key(0), rows, **SIZES)
    first, second = (avq_jax.load(tmp_path / f"index{i}") for i in range(2))
    assert avq_jax.to_arrays(first)[0] == avq_jax.to_arrays(second)[0]
    assert_same_index(first, one)


@pytest.mark.parametrize(
    "options",
    [
        {"scanned_dim": 8, "num_groups": 3, "soar_lambda": 1.0, "rescore_dtype": "int8"},
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"metric": "l2"}, marks=pytest.mark.full),
        pytest.param({"metric": "cosine", "spherical": True}, marks=pytest.mark.full),
        pytest.param({"metric": "l2", "soar_lambda": 1.0, "num_groups": 3}, marks=pytest.mark.full),
        pytest.param(
            {"metric": "l2", "scanned_dim": 8, "projection": "prefix"}, marks=pytest.mark.full
        ),
        pytest.param({"num_leaves": 1, "scale": 4}, marks=pytest.mark.full),
    ],
)
def test_sharded_build_is_that_of_one_device(rows, options, tmp_path):
    """k-means, normal equations, both leaves and codes over eight devices, against `build`."""
    metric, options = options.get("metric", "dot"), {**SIZES, **options}
    if options.get("spherical"):
        # A row of zeros is equally far from all centroids of length 1: rounding takes its leaf.
        rows = np.where(rows.any(axis=1, keepdims=True), rows, np.float32(1))
    one = avq_jax.build(jax.random.key(0), rows, **options)
    many = avq_jax.build_sharded(jax.random.key(0), rows, mesh=mesh_of(8), axis="shards", **options)
    assert str(many) == str(one)
    assert_same_index(many, one)
    avq_jax.save(many, tmp_path / "a")
    again = avq_jax.load(tmp_path / "a")
    # Headers have the sha256 of every array.
    assert avq_jax.to_arrays(again)[0] == avq_jax.to_arrays(many)[0]
    a, b = coded_rows(many.tree, N), coded_rows(one.tree, N)
    if metric == "l2":
        same = (a.codes == b.codes).all(axis=-1) & (a.leaves == b.leaves)
        np.testing.assert_allclose(a.offset[same], b.offset[same], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("m", [pytest.param(1, marks=pytest.mark.full), 3])
def test_sharded_learner_takes_the_same_steps(rows, m):
    """Three iterations, where rounding has no time to lead elsewhere: dense, joint, and m = 1."""
    x = rows[:592]
    norms = np.linalg.norm(x, axis=1)
    scaling = avq_jax.scaling(avq_jax.Threshold(0.5), norms, dim=D)
    options = {"num_subspaces": m, "num_codewords": 8, "num_iterations": 3, "tolerance": 0.0}
    one, history = avq_jax.fit(jax.random.key(2), x, scaling, **options)
    many, histories = avq_jax.fit_sharded(
        jax.random.key(2), x, scaling, mesh=mesh_of(8), axis="shards", **options
    )
    np.testing.assert_allclose(histories.loss, history.loss, rtol=1e-4)
    np.testing.assert_allclose(
        many.codebook.codewords, one.codebook.codewords, rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(histories.usage, history.usage)
    with pytest.raises(ValueError, match="multiple of 8 rows"):
        avq_jax.fit_sharded(
            jax.random.key(2), rows[:593], mesh=mesh_of(8), axis="shards", num_subspaces=m
        )


@pytest.mark.full
def test_best_rows_all_on_one_device(rows):
    """Every eighth row: one device scores all of them exactly."""
    x = np.array(rows)
    x[::8] = 5 * x[0] + x[::8] / 10
    index = avq_jax.build(jax.random.key(0), x, **SIZES)
    options = {"k": 20, "leaves_to_search": LEAVES, "rescore": 70, "implementation": "xla"}
    parts = avq_jax.shard(index, mesh_of(8), axis="shards")
    one = avq_jax.search(index, x[:48:8], **options)
    assert (np.asarray(one.ids) % 8 == 0).all()
    assert_same(avq_jax.search_sharded(parts, x[:48:8], **options), one)
