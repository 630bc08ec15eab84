"""Saved indexes: round trips, damage, crashes at every step, and golden files of each version."""

import builtins
import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import avq_jax
from avq_jax import loss
from avq_jax.mips import Index, io, safe_files, search
from avq_jax.mips.index import pack_ids, user_ids
from avq_jax.mips.io import IndexFormatError, describe, load, save
from avq_jax.mips.packing import coded_rows, pack_tree
from avq_jax.mips.rescoring import store_rows
from avq_jax.mips.weight_format import UnknownWeight

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def make_index(
    n=150, d=6, m=3, k=16, L=4, metric="dot", store="float32", ids=True, seed=0, weight=None,
    p=None, axes=False, groups=0, additive=False,
):  # fmt: skip
    """An index of random parts: no learning, nothing compiled."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)).astype(np.float32)
    tree = None

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    if m:
        l2, p = metric == "l2", p or d
        # In the order in which the golden files were drawn.
        centroids, leaves = draw(L, p), rng.integers(0, L, n).astype(np.int32)
        book = avq_jax.Codebook(draw(m, k, -(-p // m)), p)
        if additive:
            kicks = np.stack([rng.integers(0, m, (5, 2)), rng.integers(0, k, (5, 2))], axis=-1)
            book = avq_jax.AdditiveCodebook(draw(m, k, p), jnp.asarray(kicks, jnp.int32))
        starts = np.linspace(0, L, groups + 1).astype(np.int32)
        tree = pack_tree(
            centroids,
            leaves,
            book,
            rng.integers(0, k, (n, m)).astype(np.uint8),
            rng.standard_normal(n).astype(np.float32) if l2 else None,
            ranking=draw(L, p) if groups and not l2 else None,
            groups=(draw(groups, p), starts) if groups else None,
            projection=draw(d, p) if axes else None,
        )
    return Index(
        tree=tree,
        store=None if store is None else store_rows(x, store),
        ids=jnp.asarray(pack_ids(2**40 + 5 + np.arange(n) * 3, n)) if ids else None,
        weight=loss.Threshold(jnp.float32(0.2)) if weight is None else weight,
        metric=metric,
        num_rows=n,
        dim=d,
        leaves_to_search=2,
    )


def assert_same(a, b):
    assert type(a.weight) is type(b.weight)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(left, right)
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def place_of(tmp_path, form):
    return tmp_path / ("index.safetensors" if form == "file" else "index")


def files_of(place):
    return [place] if place.is_file() else sorted(place.iterdir())


VARIANTS = {
    "dot": {},
    "l2": {"metric": "l2", "k": 256},
    "odd subspaces": {"m": 5, "d": 11, "k": 7, "ids": False},
    "one row": {"n": 1, "L": 1},
    "no rows": {"n": 0},
    "int8": {"store": "int8", "metric": "cosine"},
    "bfloat16": {"store": "bfloat16", "k": 17},
    "codes alone": {"store": None},
    "exact": {"m": 0},
    "prefix": {"p": 4},
    "groups of projected leaves": {"p": 4, "axes": True, "groups": 3, "metric": "l2"},
    "additive": {"additive": True, "p": 5, "axes": True, "groups": 2},
    "power": {"weight": loss.Power(np.float32(1.5))},
    "endless": {"weight": loss.Threshold(np.float32(-np.inf))},
    "uniform": {"weight": loss.Uniform()},
}


@pytest.mark.parametrize("form", ["directory", "file"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory_map", [True, False])
def test_round_trip_is_bit_identical(tmp_path, variant, form, memory_map):
    index, place = make_index(**VARIANTS[variant]), place_of(tmp_path, form)
    save(index, place)
    assert_same(load(place, memory_map=memory_map), index)
    assert_same(load(str(place), verify=False), index)


def test_loaded_index_answers_alike(tmp_path):
    index = make_index()
    save(index, tmp_path / "a")
    q = np.asarray(index.store.rows[:5])
    for one, two in zip(search(index, q, k=4), search(load(tmp_path / "a"), q, k=4), strict=True):
        np.testing.assert_array_equal(one, two)
    assert user_ids(load(tmp_path / "a"), np.array([1], np.int32)) == 2**40 + 8


def test_packing_is_undone():
    index = make_index(metric="l2")
    rows = coded_rows(index.tree, index.num_rows)
    again = pack_tree(
        index.tree.centroids, rows.leaves, index.tree.codebook, rows.codes, rows.offset
    )
    assert_same(index, dataclasses.replace(index, tree=again))


def test_rows_stay_in_the_file(tmp_path):
    index = make_index(n=20_000, d=64, m=0)
    for place in (tmp_path / "a", tmp_path / "a.safetensors"):
        save(index, place)

        def maps(place=place):
            with open("/proc/self/maps") as lines:
                return [line for line in lines if str(place) in line]

        if os.path.exists("/proc/self/maps"):
            loaded = load(place)
            at = loaded.store.rows.unsafe_buffer_pointer()
            spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps()]
            assert any(low <= at < high for low, high in spans)
            del loaded


def test_four_bit_codes_take_half_a_byte(tmp_path):
    save(make_index(n=100, m=5, d=10, k=16), tmp_path / "a")
    assert describe(tmp_path / "a")["tensors"]["codes"]["shape"] == [100, 3]


@pytest.mark.parametrize("form", ["directory", "file"])
def test_safetensors_reads_the_files(tmp_path, form):
    index, place = make_index(metric="l2"), place_of(tmp_path, form)
    save(index, place)
    found = {}
    for file in files_of(place):
        if file.suffix == ".safetensors":
            found |= safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(found["rows"], index.store.rows)
    np.testing.assert_array_equal(found["centroids"], index.tree.centroids)


def test_header_tells_what_the_index_is(tmp_path):
    save(make_index(), tmp_path / "a")
    header = json.loads((tmp_path / "a" / "header.json").read_text())
    assert header["magic"] == "avq_jax index"
    assert header["format_version"] == 1
    assert header["library_version"] == avq_jax.__version__
    assert (header["metric"], header["dim"], header["num_rows"]) == ("dot", 6, 150)
    assert len(header["sha256"]) == 64
    assert all(len(tensor["sha256"]) == 64 for tensor in header["tensors"].values())
    told = describe(tmp_path / "a")
    assert told["bytes"] == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())


# ---- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["directory", "file"])
def test_truncation_is_found(tmp_path, form):
    place = place_of(tmp_path, form)
    save(make_index(n=40, metric="l2"), place)
    for file in files_of(place):
        whole = file.read_bytes()
        for part in range(64):
            file.write_bytes(whole[: len(whole) * part // 64])
            with pytest.raises(IndexFormatError, match="index"):
                load(place, verify=part % 2 == 0)
        file.write_bytes(whole + b"\0")
        with pytest.raises(IndexFormatError):
            load(place)
        file.write_bytes(whole)
    load(place)


@pytest.mark.parametrize(
    ("form", "flips"),
    [
        ("directory", 100),
        ("file", 200),
        pytest.param("directory", 1000, marks=pytest.mark.full),
        pytest.param("file", 1000, marks=pytest.mark.full),
    ],
)
def test_every_flipped_bit_is_found(tmp_path, form, flips):
    place, rng = place_of(tmp_path, form), random.Random(flips)
    save(make_index(n=60, metric="l2", k=10), place)
    files = files_of(place)
    sizes = [file.stat().st_size for file in files]
    found = 0
    for _ in range(flips):
        file = rng.choices(files, sizes)[0] if rng.random() < 0.5 else rng.choice(files)
        with flipped(file, rng):
            try:
                load(place)
            except IndexFormatError:
                found += 1
    assert found == flips


@pytest.mark.parametrize("form", ["directory", "file"])
def test_without_hashes_damage_stays_memory_safe(tmp_path, form):
    place, rng = place_of(tmp_path, form), random.Random(2)
    index = make_index(n=60, metric="l2", k=10, p=5, axes=True, groups=2, additive=True)
    save(index, place)
    files = files_of(place)
    passed = 0
    for _ in range(150):
        with flipped(rng.choice(files), rng), contextlib.suppress(IndexFormatError):
            loaded = load(place, verify=False)
            passed += 1
            assert jax.tree.structure(loaded) == jax.tree.structure(index)
            rows = coded_rows(loaded.tree, 60)
            assert rows.codes.max() < 10
            assert 0 <= rows.leaves.min() <= rows.leaves.max() < 4
    assert passed > 20  # some flips only change a number


@contextlib.contextmanager
def flipped(file, rng):
    whole = file.read_bytes()
    bit = rng.randrange(8 * len(whole))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    file.write_bytes(damaged)
    yield
    file.write_bytes(whole)


def forge(place, change):
    """Change the header of a directory and hash it again, as a hand-made file would."""
    file = place / "header.json"
    header = json.loads(file.read_text())
    del header["sha256"]
    change(header)
    file.write_bytes(safe_files.dump_header(header))


def forge_tensor(place, name, array):
    spec = safe_files.spec_of(array)
    safe_files.write_tensors(place / io._file_name(name, spec), {name: array}, {name: spec})

    def change(header):
        header["tensors"][name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "sha256": spec.sha256
        }  # fmt: skip

    forge(place, change)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("codes", 7, "below num_codewords, 7"),
        ("leaves", 4, "0 to 3"),
        ("leaves", -1, "0 to 3"),
        ("centroids", np.nan, "finite"),
        ("codewords", np.inf, "finite"),
        ("ids", 2**31, "below"),
        ("ranking", np.nan, "finite"),
        ("groups", np.inf, "finite"),
        ("projection", np.nan, "finite"),
        ("group_starts", 5, "rising from 0 to 4"),
        ("kicks", 7, "words below 7"),
        ("kicks", -1, "words below 7"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, name, value, rule, verify):
    place = tmp_path / "a"
    save(make_index(n=40, k=7, p=5, axes=True, groups=2, additive=True), place)
    file = next(place.glob(f"{name}-*"))
    array = safetensors.numpy.load_file(file)[name]
    array.reshape(-1)[-1 if name != "ids" else 0] = value
    forge_tensor(place, name, array)
    with pytest.raises(IndexFormatError, match=rf"{name}.*{rule}"):
        load(place, verify=verify)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(num_rows=2**31 - 1),
        lambda h: h.update(num_rows=-1),
        lambda h: h.update(num_rows=True),
        lambda h: h.update(dim=0),
        lambda h: h.update(dim=7),
        lambda h: h.update(metric="l2"),
        lambda h: h.update(metric=["dot"]),
        lambda h: h.update(codec=None),
        lambda h: h.update(codec={"kind": "other"}),
        lambda h: h["codec"].update(num_codewords=257),
        lambda h: h["codec"].update(num_codewords=8),
        lambda h: h.update(num_leaves=0),
        lambda h: h.update(leaves_to_search=0),
        lambda h: h.update(scanned_dim=7),
        lambda h: h.update(scanned_dim=0),
        lambda h: h["tensors"].update(kicks=h["tensors"]["codes"]),
        lambda h: h["tensors"].update(groups={"shape": [5, 6]}),
        lambda h: h["tensors"].update(groups={"shape": "3"}),
        lambda h: h["tensors"].update(groups=None),
        lambda h: h.update(tensors=[]),
        lambda h: h["tensors"].pop("codes"),
        lambda h: h["tensors"].update(more={}),
        lambda h: h["tensors"].update(rows=None),
        lambda h: h["tensors"]["rows"].update(dtype="F64"),
        lambda h: h["tensors"]["rows"].update(shape=[2**62, 2**62]),
        lambda h: h["tensors"]["rows"].update(sha256="../../x"),
        lambda h: h.update(weight=None),
        lambda h: h.update(weight={"name": "Threshold", "parameters": {"T": "nan"}}),
        lambda h: h.update(weight={"name": "Threshold", "parameters": {"U": "1"}}),
        lambda h: h.update(weight={"name": "os.system", "parameters": {}}),
        lambda h: h.update(format_version="1"),
        lambda h: h.update(magic="other"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_forged_headers_are_refused(tmp_path, change, verify):
    save(make_index(), tmp_path / "a")
    forge(tmp_path / "a", change)
    with pytest.raises(IndexFormatError, match=r"header|weight|index|version"):
        load(tmp_path / "a", verify=verify)


def test_declared_size_is_not_allocated(tmp_path):
    """8 TiB of rows that a header declares must fail by comparing sizes, not by allocating."""
    n = 2**31 - 1
    save(make_index(m=0, ids=False, d=1), tmp_path / "a")

    def change(header):
        header.update(num_rows=n, dim=1000)
        header["tensors"]["rows"]["shape"] = [n, 1000]

    forge(tmp_path / "a", change)
    with pytest.raises(IndexFormatError, match=rf"cut short: it needs {128 + n * 4000} bytes"):
        load(tmp_path / "a")


def test_huge_safetensors_header_is_not_allocated(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(IndexFormatError, match="header of 4611686018427387904 bytes"):
        load(file)


def test_newer_version_is_named(tmp_path):
    save(make_index(), tmp_path / "a")
    forge(tmp_path / "a", lambda h: h.update(format_version=2, library_version="9.9"))
    with pytest.raises(IndexFormatError, match=r"version 2, written by avq_jax 9\.9.*upgrade"):
        load(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[" * 100_000, b"{}", b"\x80\x04K\x01."])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "header.json").write_bytes(content)
    for place in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(IndexFormatError):
            load(place)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index at"):
        load(tmp_path / "none")
    with pytest.raises(IndexFormatError, match=r"header\.json' is missing"):
        load(tmp_path)
    save(make_index(), tmp_path / "a")
    next((tmp_path / "a").glob("codes-*")).unlink()
    with pytest.raises(IndexFormatError, match=r"codes-.* is missing"):
        load(tmp_path / "a")


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    for place in (tmp_path / "a", tmp_path / "a.safetensors"):
        save(make_index(), place)
        load(place)


# ---- places -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with space", "Größe 索引 🔍", "[a]*?", "a.b"])
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_any_name_moved_anywhere(tmp_path, name, suffix):
    index = make_index()
    for _ in range(2):
        save(index, tmp_path / (name + suffix))
    moved = tmp_path / f"moved {name}{suffix}"
    shutil.move(tmp_path / (name + suffix), moved)
    assert_same(load(moved), index)


def test_read_only_directory_loads(tmp_path):
    save(make_index(), tmp_path / "a")
    for entry in [*(tmp_path / "a").iterdir(), tmp_path / "a"]:
        entry.chmod(0o555 if entry.is_dir() else 0o444)
    before = sorted(os.listdir(tmp_path / "a"))
    load(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == before
    if os.geteuid():
        with pytest.raises(PermissionError):
            save(make_index(seed=1), tmp_path / "a")
    (tmp_path / "a").chmod(0o755)


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"path must be an index.*notes\.txt"):
        save(make_index(), tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="path must be a directory"):
        save(make_index(), tmp_path / "file")
    with pytest.raises(ValueError, match="path must be a file"):
        save(make_index(), tmp_path, single_file=True)
    with pytest.raises(TypeError, match="index"):
        save({}, tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        save(make_index(), tmp_path / "no" / "parent")


def test_a_users_file_beside_the_header_survives(tmp_path):
    save(make_index(), tmp_path / "a")
    (tmp_path / "a" / "README").write_text("mine")
    save(make_index(seed=1), tmp_path / "a")
    assert (tmp_path / "a" / "README").read_text() == "mine"


# ---- weights ------------------------------------------------------------------------------------


@jax.tree_util.register_static
class Step:
    def __call__(self, t):
        return jnp.sign(t) + 1

    def __eq__(self, other):
        return isinstance(other, Step)

    def __hash__(self):
        return 1


def test_user_defined_weight_is_told_and_given_back(tmp_path):
    index = make_index(weight=Step())
    save(index, tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert isinstance(loaded.weight, UnknownWeight)
    assert "Step" in repr(loaded)
    with pytest.raises(ValueError, match=r"user-defined weight .*Step.*load\(path, weight"):
        loaded.weight(jnp.float32(1))
    save(loaded, tmp_path / "b")
    assert_same(load(tmp_path / "b", weight=Step()), index)
    search(loaded, np.zeros(6, np.float32), k=1)


def test_known_weight_cannot_be_overridden(tmp_path):
    save(make_index(), tmp_path / "a")
    with pytest.raises(ValueError, match="weight must be None"):
        load(tmp_path / "a", weight=loss.Uniform())


# ---- crashes ------------------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for kill -9 where nothing after it runs."""


def steps_of_a_save(monkeypatch, fail_at, error):
    """Let the ``fail_at``-th write to disk fail; without, count them."""
    count = 0

    def failing(function):
        def step(*args, **kwargs):
            nonlocal count
            count += 1
            if count == fail_at:
                raise error
            return function(*args, **kwargs)

        return step

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    monkeypatch.setattr(safe_files, "tensors_header", failing(safe_files.tensors_header))
    return lambda: count


@pytest.mark.parametrize("form", ["directory", "file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_index(tmp_path, form, error):
    old, new = make_index(n=40), make_index(n=50, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        counted = steps_of_a_save(patch, 0, None)
        save(new, place_of(tmp_path, form))
        total = counted()
    assert total >= 4
    for step in range(1, total + 1):
        folder = tmp_path / str(step)
        folder.mkdir()
        place = place_of(folder, form)
        save(old, place)
        before = sorted(folder.rglob("*"))
        with pytest.MonkeyPatch.context() as patch:
            steps_of_a_save(patch, step, error)
            with contextlib.suppress(type(error)):
                save(new, place)
        loaded = load(place)
        assert same(loaded, old) or same(loaded, new)
        if same(loaded, old):
            assert sorted(folder.rglob("*")) == before
        if step % 3:
            continue
        fresh = place_of(folder, form).with_name("fresh" + place.suffix)
        with pytest.MonkeyPatch.context() as patch:
            steps_of_a_save(patch, step, error)
            with contextlib.suppress(type(error)):
                save(new, fresh)
        assert not fresh.exists() or same(load(fresh), new)


def test_disk_that_fills_up(tmp_path):
    """The system itself refuses to write more, at every length of the largest file."""
    old, new = make_index(n=40), make_index(n=3000, d=32, m=16, seed=1)
    for place in (tmp_path / "a", tmp_path / "a.safetensors"):
        save(old, place)
        before = sorted(tmp_path.rglob("*"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for size in (0, 100, 10_000, 300_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                with pytest.raises(OSError, match="too large"):
                    save(new, place)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert sorted(tmp_path.rglob("*")) == before
            assert_same(load(place), old)


_SAVER = """
import multiprocessing, os, sys, time
sys.path[:0] = {paths!r}
import jax, numpy, test_io
from jax._src import xla_bridge

def two():
    made = [test_io.make_index(n=4000, d=24, m=12, seed=seed) for seed in (0, 1)]
    return jax.tree.map(numpy.asarray, made)

# The indexes are made in one child, and saved by others, each forked from this warm process. That
# saves importing JAX for every kill, and is safe as long as no backend has started threads here.
with multiprocessing.get_context("fork").Pool(1) as pool:
    a, b = pool.apply(two)
for line in sys.stdin:
    assert not xla_bridge.backends_are_initialized()
    child = os.fork()
    if child == 0:
        test_io.save(b, sys.argv[1])
        start = time.perf_counter()
        test_io.save(a, sys.argv[1])
        test_io.save(b, sys.argv[1])
        print("ready", os.getpid(), time.perf_counter() - start, flush=True)
        while True:
            test_io.save(a, sys.argv[1])
            test_io.save(b, sys.argv[1])
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""


class Savers:
    """A process that forks one endlessly saving child after another."""

    def __init__(self, place):
        here = pathlib.Path(__file__)
        code = _SAVER.format(paths=[str(here.parent), str(here.parent.parent.parent)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "XLA_FLAGS": ""},  # one device starts faster than eight
            text=True,
        )

    def __enter__(self):
        return self

    def start(self):
        self.process.stdin.write("start\n")
        self.process.stdin.flush()

    def wait_ready(self):
        """Wait for a whole round of saves; give its seconds."""
        word, self.child, seconds = self.process.stdout.readline().split()
        assert word == "ready"
        return float(seconds)

    def kill(self):
        os.kill(int(self.child), signal.SIGKILL)
        assert self.process.stdout.readline().split() == ["ended", str(int(signal.SIGKILL))]

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def kill_savers(tmp_path, form, kills, rng):
    """Kill a saving process at random moments; what is there is always one index or the other."""
    place = place_of(tmp_path, form)
    a, b = (make_index(n=4000, d=24, m=12, seed=s) for s in (0, 1))
    save(a, place)
    seen = set()
    with Savers(place) as savers:
        for _ in range(kills):
            savers.start()
            # Anywhere in a round: both saves are hit at every stage, however slow the disk.
            time.sleep(rng.uniform(0, 1) * savers.wait_ready())
            savers.kill()
            loaded = load(place)
            assert same(loaded, a) or same(loaded, b)
            seen.add(same(loaded, a))
            unwanted = [entry.name for entry in tmp_path.rglob("*") if entry.suffix == ".tmp"]
            seen.add(f"{len(unwanted)} temporary")
    save(a, place)
    assert not [entry for entry in tmp_path.rglob("*") if entry.suffix == ".tmp"]
    assert len(files_of(place)) == (1 if form == "file" else 7)
    assert_same(load(place), a)
    return seen


@pytest.mark.parametrize("form", ["directory", "file"])
def test_killed_savers(tmp_path, form):
    kill_savers(tmp_path, form, 2, random.Random(3))


@pytest.mark.full
@pytest.mark.parametrize("form", ["directory", "file"])
def test_fifty_killed_savers(tmp_path, form):
    seen = kill_savers(tmp_path, form, 50, random.Random(4))
    assert {True, False} <= seen, "all kills met the same index: they came too early or too late"


@pytest.mark.full
@pytest.mark.parametrize("form", ["directory", "file"])
def test_two_savers_and_a_reader(tmp_path, form):
    """Savers take turns, and a reader always meets a whole index."""
    place = place_of(tmp_path, form)
    a, b = (make_index(n=4000, d=24, m=12, seed=s) for s in (0, 1))
    save(a, place)
    with Savers(place) as one, Savers(place) as two:
        both = (one, two)
        for savers in both:
            savers.start()
        for savers in both:
            savers.wait_ready()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            loaded = load(place)
            assert same(loaded, a) or same(loaded, b)
        for savers in both:
            savers.kill()


def test_reading_while_another_saves(tmp_path):
    """A reader between header and arrays of a replaced index starts again."""
    a, b = make_index(n=40), make_index(n=50, seed=1)
    save(a, tmp_path / "a")
    check = io.check_header

    def slow(header, where):
        monkeypatch.undo()
        save(b, tmp_path / "a")
        return check(header, where)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(io, "check_header", slow)
        assert_same(load(tmp_path / "a"), b)


def test_a_mapped_index_outlives_its_files(tmp_path):
    index = make_index()
    save(index, tmp_path / "a")
    loaded = load(tmp_path / "a")
    save(make_index(seed=1), tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    assert_same(loaded, index)


# ---- golden files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.glob("v*")))
def test_golden_files_of_every_version_load(name):
    want = make_index(**{"v1-l2": {"metric": "l2", "k": 20}}.get(name.split(".")[0], {}))
    assert_same(load(GOLDEN / name), want)
    assert describe(GOLDEN / name)["library_version"] == "0.1.0"


def test_there_are_golden_files():
    assert len(list(GOLDEN.glob("v1*"))) == 3
