"""Exported searches: the same ids, without this package, and what damaged ones say."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avq_jax
from avq_jax.cli import main
from avq_jax.mips.index import pack_ids
from avq_jax.mips.packing import pack_tree
from avq_jax.mips.partition import nearest_centroids
from avq_jax.mips.rescoring import store_rows
from avq_jax.serving import ExportError, export, load_exported
from xla_kernels import library

pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers to write programs")

N, D = 500, 12
SETTINGS = {"k": 5, "leaves_to_search": 4, "rescore": 40}


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)


@pytest.fixture(scope="module")
def index(rows):
    """Codes of random codewords: nothing is learned, so the fixture costs nothing."""
    rng = np.random.default_rng(1)
    centroids = jnp.asarray(rows[:8])
    leaves = nearest_centroids(rows, centroids)
    book = avq_jax.Codebook(jnp.asarray(rng.standard_normal((6, 16, 2)), jnp.float32), D)
    codes = avq_jax.encode(book, rows - rows[:8][leaves]).codes
    return avq_jax.Index(
        tree=pack_tree(centroids, leaves, book, np.asarray(codes)),
        store=store_rows(rows, "float32"),
        ids=jnp.asarray(pack_ids(2**40 + np.arange(N), N)),
        weight=avq_jax.Threshold(jnp.float32(0.2)),
        metric="dot",
        num_rows=N,
        dim=D,
        leaves_to_search=4,
    )


@pytest.fixture(scope="module")
def folder(index, tmp_path_factory):
    place = tmp_path_factory.mktemp("exports") / "dot"
    export(index, place, **SETTINGS)
    return place


def same(found, wanted):
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-6)


def test_every_batch_size_gives_the_ids_of_search(index, folder, rows):
    find = load_exported(folder)
    for b in (1, 11):
        found = find(rows[:b])
        same(found, avq_jax.search(index, rows[:b], implementation="xla", **SETTINGS))
        np.testing.assert_array_equal(
            find.user_ids(found.ids), avq_jax.user_ids(index, np.asarray(found.ids))
        )
    assert find(rows[:0]).ids.shape == (0, 5)
    assert find.header["platforms"] == ["cpu", "tpu", "cuda"]
    assert find.header["inputs"]["shape"] == ["b", D]
    bad = rows[:3].copy()
    bad[1, 0] = np.nan
    assert find(bad).ids[1].tolist() == [-1] * 5
    for wrong in (rows[:2, :5], rows[0]):
        with pytest.raises(ValueError, match=r"inputs must have shape \[b, 12\]; got"):
            find(wrong)


_CLEAN = """
import sys
try:
    import avq_jax
except ImportError:
    pass
else:
    raise SystemExit("avq_jax can be imported")
sys.path.insert(0, sys.argv[1])
import numpy
from standalone import load_exported
find = load_exported(sys.argv[1])
queries = numpy.load(sys.argv[2])
numpy.savez(sys.argv[3], ids=find(queries).ids, user=find.user_ids(find(queries[:2]).ids))
assert not {"xla_kernels", "jaxtyping", "safetensors", "optax"} & set(sys.modules)
"""


def test_clean_environment(index, folder, rows, tmp_path):
    """A Python whose only packages are jax, what jax requires, and flatbuffers."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("jax", "jaxlib", "numpy", "ml_dtypes", "scipy", "opt_einsum", "flatbuffers"):
        place = pathlib.Path(__import__(name).__file__).parent
        (site / name).symlink_to(place)
        libraries = place.with_name(name + ".libs")
        if libraries.exists():
            (site / libraries.name).symlink_to(libraries)
    shutil.copytree(folder, tmp_path / "moved elsewhere")
    np.save(tmp_path / "queries.npy", rows[:9])
    code = f"import sys; sys.path.append({str(site)!r})" + _CLEAN
    words = [tmp_path / "moved elsewhere", tmp_path / "queries.npy", tmp_path / "found.npz"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *map(str, words)],
        env={"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as found:
        wanted = avq_jax.search(index, rows[:9], implementation="xla", **SETTINGS)
        np.testing.assert_array_equal(found["ids"], wanted.ids)
        np.testing.assert_array_equal(
            found["user"], avq_jax.user_ids(index, np.asarray(wanted.ids[:2]))
        )


def test_retrieval_model_as_one_program(index, rows, tmp_path):
    """Token ids in, neighbours out: the encoder and its parameters are part of the export."""
    params = {
        "table": jax.random.normal(jax.random.key(1), (50, D)).astype(jnp.bfloat16),
        "layer": [jax.random.normal(jax.random.key(2), (D, D))],
    }

    def encoder(params, tokens):
        mean = params["table"][tokens].astype(jnp.float32).mean(axis=1)
        return jnp.tanh(mean @ params["layer"][0])

    tokens = np.random.default_rng(1).integers(0, 50, (3, 7)).astype(np.int32)
    export(index, tmp_path / "model", encoder=encoder, params=params, inputs=tokens, **SETTINGS)
    found = load_exported(tmp_path / "model")(tokens)
    queries = encoder(params, tokens)
    same(found, avq_jax.search(index, queries, implementation="xla", **SETTINGS))
    with pytest.raises(ValueError, match="encoder must return"):
        export(index, tmp_path / "bad", encoder=lambda p, x: x[:, :2], inputs=rows[:1])
    with pytest.raises(ValueError, match="given together"):
        export(index, tmp_path / "bad", encoder=encoder)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("metric", ["cosine", pytest.param("l2", marks=pytest.mark.full)])
def test_exact_index(rows, tmp_path, metric):
    index = avq_jax.build(jax.random.key(0), rows, metric=metric, rescore_dtype="int8")
    export(index, tmp_path / "a", k=3, batch=4, platforms=("cpu",))
    find = load_exported(tmp_path / "a")
    np.testing.assert_array_equal(find(rows[:4]).ids, avq_jax.search(index, rows[:4], k=3).ids)
    with pytest.raises(ValueError, match=r"shape \[4, 12\]"):
        find(rows[:5])


@pytest.mark.skipif(library.load().handle is None, reason="no compiled kernel")
def test_kernel_variant_states_what_it_needs(index, rows, tmp_path, monkeypatch):
    export(index, tmp_path / "a", platforms=("cpu",), implementation="cpu", **SETTINGS)
    find = load_exported(tmp_path / "a")
    same(find(rows[:9]), avq_jax.search(index, rows[:9], implementation="cpu", **SETTINGS))
    needs = find.header["requires"]
    assert needs["custom_call"] == "xla_kernels_tree_search"
    assert needs["interface"] == library.ABI
    gone = library.Library(None, "not built")
    monkeypatch.setattr(library, "load", lambda: gone)
    with pytest.raises(RuntimeError, match=r"xla_kernels_tree_search.*not built"):
        load_exported(tmp_path / "a")


def test_damage_is_found(folder, tmp_path):
    place, rng = tmp_path / "copy", random.Random(0)
    shutil.copytree(folder, place)
    files = [file for file in place.iterdir() if file.name != "standalone.py"]
    assert len(files) == 3
    for file in files:
        whole = file.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(ExportError):
                load_exported(place)
        for part in range(8):
            file.write_bytes(whole[: len(whole) * part // 8])
            with pytest.raises(ExportError):
                load_exported(place, verify=False)
        file.unlink()
        with pytest.raises(ExportError, match="missing"):
            load_exported(place)
        file.write_bytes(whole)
    load_exported(place)
    header = json.loads((place / "header.json").read_text())
    header["format_version"] = 2
    (place / "header.json").write_text(json.dumps(header))
    with pytest.raises(ExportError, match="format version 2"):
        load_exported(place)


def test_replaced_export_and_foreign_places(index, rows, folder, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    export(index, place, k=2, platforms=("cpu",))
    assert len(list(place.iterdir())) == 4
    assert load_exported(place)(rows[:1]).ids.shape == (1, 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt'"):
        export(index, tmp_path / "mine", platforms=("cpu",))


def test_arguments(index, tmp_path):
    for options, error in [
        ({"implementation": "cpu"}, "implementation must be 'xla', or 'cpu' with"),
        ({"platforms": "cpu"}, "platforms must be a sequence"),
        ({"batch": "2b"}, "batch must be a name or a number"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"k": 0}, "k must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=error):
            export(index, tmp_path / "a", **options)
    with pytest.raises(TypeError, match="index"):
        export({}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_command(index, tmp_path, capsys):
    avq_jax.save(index, tmp_path / "index")
    words = ["export", str(tmp_path / "index"), str(tmp_path / "out"), "--k", "3", "--batch", "8"]
    assert main([*words, "--platforms", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["inputs"]["shape"] == [8, D]
    assert load_exported(tmp_path / "out").header["k"] == 3
