"""Builds that write as they read: the same index, whatever the source, and after a kill."""

import json
import os
import re
import threading
import time

import h5py
import jax
import numpy as np
import pytest

import avq_jax
from avq_jax.mips import streaming

from .conftest import make_rows

N, D = 1500, 12
OPTIONS = {"num_leaves": 16, "num_subspaces": 6, "num_iterations": 3, "chunk_rows": 512}


@pytest.fixture(scope="module")
def rows():
    return make_rows(N, D, seed=7)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def write(source, path, **options):
    streaming.build_to_disk(jax.random.key(3), source, path, **{**OPTIONS, **options})


@pytest.mark.parametrize("metric", ["dot", pytest.param("l2", marks=pytest.mark.full)])
def test_same_index_from_any_source(rows, tmp_path, metric):
    rows.tofile(tmp_path / "rows.f32")
    mapped = np.memmap(tmp_path / "rows.f32", np.float32, mode="r", shape=(N, D))
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["train"] = rows
        sources = {
            "memmap": mapped,
            "hdf5": file["train"],
            "chunks": lambda: iter(np.array_split(rows, [3, 700, 1300])),
        }
        for name, source in sources.items():
            write(source, tmp_path / name, metric=metric, ids=2**40 + np.arange(N))
            assert contents(tmp_path / name) == contents(tmp_path / "memmap")
    assert not list(tmp_path.glob("*.partial"))
    index = avq_jax.load(tmp_path / "memmap")
    held = avq_jax.brute_force(rows[:50], rows, k=5, metric=metric)
    found = avq_jax.search(index, rows[:50], k=5, leaves_to_search=16, rescore=N)
    np.testing.assert_array_equal(found.ids, held.ids)
    np.testing.assert_array_equal(index.store.rows, rows)
    assert avq_jax.user_ids(index, [7]).tolist() == [2**40 + 7]


@pytest.mark.parametrize(
    "options",
    [
        {"scanned_dim": 8, "num_groups": 4, "spherical": True, "soar_lambda": 1.0, "scale": 8},
        pytest.param({"metric": "cosine", "rescore_dtype": "int8"}, marks=pytest.mark.full),
        pytest.param({"metric": "l2", "soar_lambda": 1.0, "num_groups": 4}, marks=pytest.mark.full),
        pytest.param(
            {"metric": "l2", "scanned_dim": 8, "projection": "prefix"}, marks=pytest.mark.full
        ),
        pytest.param({"num_leaves": 1, "num_codewords": 40}, marks=pytest.mark.full),
    ],
)
def test_the_index_of_build_where_all_rows_are_the_sample(rows, tmp_path, options):
    write(rows, tmp_path / "a", **options)
    loaded = avq_jax.load(tmp_path / "a")
    small = {name: value for name, value in OPTIONS.items() if name != "chunk_rows"} | options
    built = avq_jax.build(jax.random.key(3), rows, **small)
    assert str(loaded) == str(built)
    for one, two in zip(jax.tree.leaves(loaded), jax.tree.leaves(built), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)
    queries = make_rows(50, D, seed=8)
    for implementation in (None, "xla"):
        search = {"k": 5, "leaves_to_search": 4, "implementation": implementation}
        one, two = (avq_jax.search(index, queries, **search) for index in (loaded, built))
        np.testing.assert_array_equal(one.ids, two.ids)


@pytest.mark.full
def test_codes_are_as_good_as_those_of_build(rows, tmp_path):
    """A sample of a third of the rows, which `build` draws in another way."""
    plain = {"sample_size": 512}
    kinds = {"metric": "cosine", "rescore_dtype": "int8"}, {"soar_lambda": 1.0}, {"scanned_dim": 9}
    for options in (plain | kind for kind in kinds):
        write(rows, tmp_path / "a", **options)
        index = avq_jax.load(tmp_path / "a")
        small = {name: value for name, value in OPTIONS.items() if name != "chunk_rows"}
        other = avq_jax.build(jax.random.key(3), rows, **small, **options)
        queries = make_rows(200, D, seed=8)
        metric = options.get("metric", "dot")
        truth = avq_jax.brute_force(queries, rows, k=10, metric=metric)
        recall = [
            float(
                avq_jax.recall_k_at_k(avq_jax.search(i, queries, k=10, rescore=30).ids, truth.ids)
            )
            for i in (index, other)
        ]
        assert recall[0] > recall[1] - 0.02, recall


@pytest.mark.parametrize(
    ("chunk", "options"),
    [
        (0, {}),
        (1, {"scanned_dim": 8, "num_groups": 4, "spherical": True, "soar_lambda": 1.0}),
        (2, {}),
    ],
)
def test_goes_on_after_a_kill(rows, tmp_path, monkeypatch, chunk, options):
    write(rows, tmp_path / "whole", **options)
    encode, calls = streaming._encoded, []

    def dies(*args):
        calls.append(1)
        if len(calls) > chunk:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(streaming, "_encoded", dies)
    with pytest.raises(KeyboardInterrupt):
        write(rows, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
    work = tmp_path / "a.partial"
    assert json.loads((work / "journal.json").read_text())["rows"] == min(N, 512 * chunk)
    # What a kill in the middle of a write leaves after the last synced chunk.
    for name in ("rows", "codes", "leaves"):
        with open(work / f"{name}.safetensors", "ab") as file:
            file.write(b"torn")
    monkeypatch.setattr(streaming, "_encoded", lambda *args: calls.append(1) or encode(*args))
    monkeypatch.setattr(streaming, "_learn", None)
    calls.clear()
    write(rows, tmp_path / "a", **options)
    assert len(calls) == 3 - chunk
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    assert not work.exists()


def test_faults(rows, tmp_path, monkeypatch):
    bad = rows.copy()
    bad[1400, 2] = np.inf
    sources = [
        (bad, {}, "source must be finite: 1 of"),
        (rows[:, 0], {}, "source must have shape"),
        (lambda: iter([]), {}, "at least one row"),
        (lambda: iter([rows, rows[:, :3]]), {}, "of one width"),
        (rows, {"ids": np.zeros(N, np.int64)}, "ids must be distinct"),
        (rows, {"scanned_dim": D + 1}, f"scanned_dim must be at most the width of x, {D}"),
        (rows, {"num_groups": 17}, "num_groups must be at most the number of leaves, 16"),
        (rows, {"soar_lambda": -1.0}, "soar_lambda must be"),
    ]
    for source, options, error in sources:
        with pytest.raises(ValueError, match=error):
            write(source, tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()
    with (
        pytest.warns(UserWarning, match="too few"),
        pytest.raises(ValueError, match="20 rows, too few"),
    ):
        write(rows[:20], tmp_path / "b")
    assert not list(tmp_path.glob("*.partial"))
    # A build to go on with is for the same arguments alone.
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_encoded", None)
        with pytest.raises(TypeError):
            write(rows, tmp_path / "a")
    for other in (
        {"num_leaves": 8},
        {"soar_lambda": 1.0},
        {"spherical": True},
        {"num_groups": 2},
        {"scanned_dim": 8},
        {"projection": "prefix"},
    ):
        with pytest.raises(ValueError, match=re.escape("other arguments; remove")):
            write(rows, tmp_path / "a", **other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="holds 'notes'"):
        write(rows, tmp_path / "mine")


def anonymous_bytes():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Five times the rows, 77 MB of them: the peak of anonymous memory grows by less than 25 MB."""

    def peak_of(count):
        def source():
            for seed in range(count // 4096):
                rng = np.random.default_rng(seed)
                yield rng.standard_normal((4096, 64), np.float32)

        peak, done = 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.is_set():
                peak = max(peak, anonymous_bytes())
                time.sleep(0.005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            sizes = {"num_leaves": 32, "num_subspaces": 16, "num_iterations": 2}
            sizes |= {"sample_size": 4096, "chunk_rows": 4096}
            write(source, tmp_path / str(count), **sizes)
        finally:
            done.set()
            watcher.join()
        return peak

    peak_of(15 * 4096)
    few = peak_of(15 * 4096)
    many = peak_of(75 * 4096)
    assert many - few < 25e6
