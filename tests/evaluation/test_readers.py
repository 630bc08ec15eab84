"""Readers and writers: every format round-trips, damage is named, nothing is read beyond need."""

import os
import pathlib

import h5py
import numpy as np
import pytest

from avq_jax.evaluation import readers
from avq_jax.evaluation.readers import open_rows
from avq_jax.evaluation.writers import WRITABLE, write_rows

DTYPES = {
    ".fvecs": "f4", ".ivecs": "i4", ".bvecs": "u1", ".fbin": "f4", ".ibin": "i4", ".u8bin": "u1",
    ".i8bin": "i1", ".npy": "f8",
}  # fmt: skip


def sample(suffix, n=10, d=7):
    rng = np.random.default_rng(0)
    dtype = np.dtype(DTYPES[suffix])
    if dtype.kind == "f":
        return rng.standard_normal((n, d)).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return rng.integers(low, high, (n, d), dtype, endpoint=True)


@pytest.mark.parametrize("suffix", WRITABLE)
def test_written_rows_are_read_back(tmp_path, suffix):
    rows, file = sample(suffix), tmp_path / f"ä b{suffix}"
    write_rows(file, [rows[:4], rows[4:]], shape=rows.shape)
    with open_rows(file) as opened:
        assert opened.shape == (10, 7)
        assert opened.dtype == rows.dtype
        np.testing.assert_array_equal(opened[:], rows)
        np.testing.assert_array_equal(np.asarray(opened), rows)
        np.testing.assert_array_equal(opened[2:9:3], rows[2:9:3])
        np.testing.assert_array_equal(opened[-1], rows[-1])
        assert opened[5:2].shape == (0, 7)
        chunks = list(opened.iter_chunks(4))
        assert [len(chunk) for chunk in chunks] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate(chunks), rows)
        with pytest.raises(IndexError, match="row 10 is outside the 10 rows"):
            opened[10]
        with pytest.raises(ValueError, match="forwards"):
            opened[::-1]
        with pytest.raises(ValueError, match="size must be at least 1"):
            list(opened.iter_chunks(0))
    assert os.listdir(tmp_path) == [file.name]


def test_layouts_are_the_published_ones(tmp_path):
    write_rows(tmp_path / "a.fvecs", [np.array([[1, 2], [3, 4]], np.float32)], shape=(2, 2))
    want = np.array([2, 0, 0, 2, 0, 0], "<i4")
    want.view("<f4")[[1, 2, 4, 5]] = [1, 2, 3, 4]
    assert (tmp_path / "a.fvecs").read_bytes() == want.tobytes()
    write_rows(tmp_path / "a.u8bin", [np.array([[1, 2], [3, 4]], np.uint8)], shape=(2, 2))
    assert (tmp_path / "a.u8bin").read_bytes() == bytes([2, 0, 0, 0, 2, 0, 0, 0, 1, 2, 3, 4])
    rows = sample(".npy")
    write_rows(tmp_path / "a.npy", [rows], shape=rows.shape)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), rows)


@pytest.mark.parametrize("suffix", [".fvecs", ".bvecs", ".fbin", ".u8bin", ".npy", ".hdf5"])
def test_every_truncation_is_found(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    rows = sample(".fvecs" if suffix == ".hdf5" else suffix, n=8, d=5)
    if suffix == ".hdf5":
        with h5py.File(file, "w") as content:
            content["train"] = rows
    else:
        write_rows(file, [rows], shape=rows.shape)
    whole = file.read_bytes()
    stride = 4 + 5 * rows.dtype.itemsize
    for part in range(64):
        size = len(whole) * part // 64
        if suffix.endswith("vecs") and size and size % stride == 0:
            continue  # whole rows and no header: such a file is a shorter one
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"a{suffix}"):
            open_rows(file)[:]
    if suffix not in (".npy", ".hdf5"):
        file.write_bytes(whole + b"\0")
        with pytest.raises(ValueError, match=f"a{suffix}"):
            open_rows(file)


def test_rows_of_another_width_are_named(tmp_path):
    rows = sample(".fvecs", n=9)
    write_rows(tmp_path / "a.fvecs", [rows], shape=rows.shape)
    content = np.fromfile(tmp_path / "a.fvecs", "<i4").reshape(9, 8)
    content[5, 0] = 6
    content.tofile(tmp_path / "a.fvecs")
    opened = open_rows(tmp_path / "a.fvecs")
    assert opened[:5].shape == (5, 7)
    with pytest.raises(ValueError, match="one width, 7; got 6 at row 5"):
        opened[3:]


@pytest.mark.parametrize(
    ("suffix", "head"),
    [
        (".fbin", np.array([2**32 - 1, 2**32 - 1], "<u4").tobytes()),
        (".fvecs", np.array([2**31 - 1], "<i4").tobytes()),
        (".fvecs", np.array([-4], "<i4").tobytes()),
        (".bvecs", np.array([0], "<i4").tobytes()),
        (".fbin", np.array([5, 0], "<u4").tobytes()),
    ],
)
def test_absurd_sizes_raise_before_allocating(tmp_path, suffix, head):
    (tmp_path / f"a{suffix}").write_bytes(head + b"\0" * 8)
    with pytest.raises(ValueError, match=f"a{suffix}"):
        open_rows(tmp_path / f"a{suffix}")


def test_unknown_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.fvecs"):
        open_rows(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="no data at"):
        open_rows(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="must end in one of"):
        write_rows(tmp_path / "a.csv", [], shape=(0, 1))
    np.save(tmp_path / "objects.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy"):
        open_rows(tmp_path / "objects.npy")


def test_hdf5_parts(tmp_path):
    file = tmp_path / "a.hdf5"
    rows = sample(".fvecs")
    with h5py.File(file, "w") as content:
        content["train"], content["test"], content["other"] = rows, rows[:3], [1, 2]
    assert open_rows(file).shape == (10, 7)
    np.testing.assert_array_equal(open_rows(file, part="test")[1:], rows[1:3])
    for part in ("absent", "other"):
        with pytest.raises(ValueError, match="it has other, test, train"):
            open_rows(file, part=part)


# ---- text ---------------------------------------------------------------------------------------

TEXT = "the 0.5 -1 2e-1\n. . . 1 2 3\nnaïve 4 5 6 \r\nlast 7 8 9"


def test_glove_text(tmp_path):
    file = tmp_path / "glove.txt"
    file.write_bytes(TEXT.encode())
    opened = open_rows(file)
    assert opened.words == ["the", ". . .", "naïve", "last"]
    want = np.array([[0.5, -1, 0.2], [1, 2, 3], [4, 5, 6], [7, 8, 9]], np.float32)
    np.testing.assert_array_equal(opened[:], want)
    np.testing.assert_array_equal(np.concatenate(list(opened.iter_chunks(3))), want)
    file.write_text("2 3\nthe 1 2 3\nof 4 5 6\n")
    assert open_rows(file).shape == (2, 3)
    file.write_text("3 3\nthe 1 2 3\nof 4 5 6\n")
    with pytest.raises(ValueError, match="declares 3 rows on its first line; got 2"):
        open_rows(file)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"word 1 2", "3 fields, fewer than 4"),
        (b"word 1 2 3 4", "5 fields, more than 4"),
        (b"word 1 x 3", "could not convert"),
        (b"word 1 nan 3", "not a finite float32"),
        (b"word 1 1e39 3", "not a finite float32"),
        (b"word 1 1_0 3", "underscore"),
        (b"", "1 fields, fewer"),
        (b"\xff 1 2 3", "not UTF-8"),
        (b" 1 2 3", "no word"),
    ],
)
def test_malformed_lines_are_named_or_counted(tmp_path, line, why):
    file = tmp_path / "glove.txt"
    file.write_bytes(b"a 1 2 3\n" + line + b"\nb 4 5 6\n")
    with pytest.raises(ValueError, match=rf"glove\.txt.*1 lines do not: line 2: .*{why}"):
        open_rows(file)
    opened = open_rows(file, on_malformed="skip")
    assert opened.words == ["a", "b"]
    assert opened[1].tolist() == [4, 5, 6]
    assert [number for number, _ in opened.malformed] == [2]


def test_many_malformed_lines_are_counted(tmp_path):
    file = tmp_path / "glove.txt"
    file.write_text("a 1 2\n" + "b 1\n" * 9)
    with pytest.raises(ValueError, match=r"9 lines do not: line 2: .*line 6: .*and 4 more"):
        open_rows(file)
    file.write_text("")
    with pytest.raises(ValueError, match="at least one line"):
        open_rows(file)


# ---- conversion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "value", "said"),
    [
        (".bvecs", 256, "uint8, which cannot be 256"),
        (".bvecs", -1, "cannot be -1"),
        (".u8bin", 0.5, r"cannot be 0\.5"),
        (".ivecs", float("nan"), "cannot be nan"),
        (".ibin", 2**31, "int32"),
        (".fvecs", 2**24 + 1, "float32, which cannot be 16777217"),
        (".fbin", 1e39, "cannot be 1e"),
    ],
)
def test_values_that_do_not_fit_are_refused_whole(tmp_path, suffix, value, said):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"old")
    with pytest.raises(ValueError, match=rf"{said}.*row 3, column 1"):
        write_rows(file, [[[1, 2]] * 3, [[1, value]]], shape=(4, 2))
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [file.name]


def test_wrong_chunks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="4 rows in all; got 1"):
        write_rows(tmp_path / "a.npy", [[[1, 2]]], shape=(4, 2))
    with pytest.raises(ValueError, match="must have 2 columns"):
        write_rows(tmp_path / "a.npy", [[[1, 2, 3]]], shape=(1, 2))
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="needs /proc")
def test_files_larger_than_the_chunk_are_not_read_whole(tmp_path):
    """64 MB of rows pass through chunks of 256 kB without being held."""
    file, n = tmp_path / "a.fbin", 1_000_000
    with open(file, "wb") as content:
        content.write(np.array([n, 16], "<u4").tobytes())
        content.truncate(8 + n * 64)

    def anonymous():
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = anonymous()
    total = sum(len(chunk) for chunk in open_rows(file).iter_chunks(4096))
    assert total == n
    assert anonymous() - before < 16_000
    assert readers.open_rows(file)[n - 1].tolist() == [0] * 16
