"""The command line: as a process on real files, and command by command."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import h5py
import jax
import numpy as np
import pytest

import avq_jax
from avq_jax.cli import main
from avq_jax.evaluation import brute_force, open_rows, write_rows
from avq_jax.mips.tuning import tune

ROOT = pathlib.Path(__file__).parent.parent


def run(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "avq_jax", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        timeout=300,
        **options,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, queries and an ann-benchmarks file, and an index with a tree built from it."""
    folder = tmp_path_factory.mktemp("data files")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 8)).astype(np.float32)
    q = rng.standard_normal((60, 8)).astype(np.float32)
    write_rows(folder / "x.fvecs", [x], shape=x.shape)
    write_rows(folder / "q.npy", [q], shape=q.shape)
    np.save(folder / "ids.npy", np.arange(400) + 2**40)
    true = np.asarray(brute_force(q, x, k=20).ids)
    write_rows(folder / "true.ivecs", [true], shape=true.shape)
    with h5py.File(folder / "ann.hdf5", "w") as content:
        content["train"], content["test"], content["neighbors"] = x, q, true
        content["distances"] = np.zeros(true.shape, np.float32)
        content.attrs["distance"] = "dot"
    options = ["--leaves", "3", "--subspaces", "4", "--iterations", "3", "--seed", "1", "--quiet"]
    assert main(["build", str(folder / "ann.hdf5"), str(folder / "tree"), *options]) == 0
    avq_jax.save(avq_jax.build(jax.random.key(0), x), folder / "flat")
    return folder


def called(capsys, *words):
    """Run in this process; give the exit code, the JSON or text, and what went to stderr."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, json.loads(out) if "--json" in words and not code else out, err


# ---- as a process -------------------------------------------------------------------------------


def test_help_is_quick_and_teaches():
    took = []
    for _ in range(2):
        before = os.times()
        done = run("--help")
        after = os.times()
        took.append(sum(after[2:4]) - sum(before[2:4]))
        assert done.returncode == 0
    assert "avq-jax build glove-100.hdf5" in done.stdout
    assert "exit codes" in done.stdout
    for command in [
        "demo",
        "build",
        "search",
        "eval",
        "tune",
        "explain",
        "info",
        "verify",
        "convert",
    ]:
        assert command in done.stdout
    # Processor time of the process: the machine may be busy with other tests.
    assert 0 < min(took) < 1.5


def test_a_session_as_processes(place, tmp_path):
    index = tmp_path / "größe.index"
    done = run("build", place / "x.fvecs", index, "--metric", "l2", "--ids", place / "ids.npy")
    assert done.returncode == 0, done.stderr
    assert "exact scoring of float32 rows" in done.stdout
    done = run("search", index, place / "q.npy", "--k", 2, "--first", 3)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    number, found = lines[2].split("\t")
    assert number == "2"
    assert all(int(pair.split(":")[0]) >= 2**40 for pair in found.split())
    file = next(index.glob("rows-*"))
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 4
    file.write_bytes(damaged)
    done = run("verify", index)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("avq-jax: error: ")
    assert "'rows' does not match its sha256" in done.stderr
    assert done.stderr.count("\n") == 1


def test_interrupting_exits_130():
    code = (
        "import signal, time, avq_jax.cli, avq_jax.commands as c\n"
        # A child of a background job would inherit that the signal is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(args):\n    print('ready', flush=True); time.sleep(60)\n"
        "c.info = wait\nraise SystemExit(avq_jax.cli.main(['info']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "avq-jax: interrupted\n"


def test_a_closed_pipe_is_no_traceback(place):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "avq_jax", "convert", place / "q.npy", place / "pipe.fbin"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


# ---- command by command -------------------------------------------------------------------------


def test_build_takes_codec_and_scale(place, capsys):
    options = ["--leaves", "3", "--subspaces", "2", "--codec", "additive", "--scale", "4"]
    built = [place / "x.fvecs", place / "scaled", *options, "--iterations", "2", "--quiet"]
    assert called(capsys, "build", *built)[0] == 0
    index = called(capsys, "info", place / "scaled", "--json")[1]["index"]
    assert index["codec"]["kind"] == "additive"
    assert index["tensors"]["levels"]["shape"] == [16]


def test_build_reads_piece_by_piece(place, capsys):
    options = ["--on-disk", "--leaves", "3", "--iterations", "2", "--quiet"]
    code, text, _ = called(capsys, "build", place / "x.fvecs", place / "pieces", *options)
    assert code == 0
    assert "built in" in text
    index = avq_jax.load(place / "pieces")
    assert (index.num_rows, index.num_leaves) == (400, 3)


def test_build_takes_metric_and_sizes(place, capsys):
    code, told, _ = called(capsys, "info", place / "tree", "--json")
    assert code == 0
    index = told["index"]
    assert (index["metric"], index["num_rows"], index["dim"]) == ("dot", 400, 8)
    assert index["codec"] == {"kind": "product", "num_subspaces": 4, "num_codewords": 16}
    assert index["num_leaves"] == 3
    assert told["jax"] == jax.__version__
    assert told["kernels"]
    code, text, _ = called(capsys, "info", place / "tree")
    assert "400 rows x 8, dot" in text
    assert "kernels:" in text


def test_search_gives_what_the_library_gives(place, tmp_path, capsys):
    index = avq_jax.load(place / "tree")
    want = avq_jax.search(index, np.load(place / "q.npy"), k=4, leaves_to_search=3)
    words = ("search", place / "tree", place / "q.npy", "--k", 4, "--leaves", 3)
    code, told, _ = called(capsys, *words, "--json")
    assert code == 0
    np.testing.assert_array_equal(told["ids"], want.ids)
    np.testing.assert_allclose(told["scores"], want.scores, rtol=1e-5)
    code, _, _ = called(capsys, *words, "--out", tmp_path / "found.ivecs")
    assert code == 0
    np.testing.assert_array_equal(open_rows(tmp_path / "found.ivecs")[:], want.ids)


def test_search_pads_chunks(place, capsys, monkeypatch):
    monkeypatch.setattr("avq_jax.commands._QUERIES", 25)
    code, told, _ = called(capsys, "search", place / "flat", place / "q.npy", "--k", 3, "--json")
    assert code == 0
    want = avq_jax.search(avq_jax.load(place / "flat"), np.load(place / "q.npy"), k=3)
    np.testing.assert_array_equal(told["ids"], want.ids)


def test_results_that_do_not_exist_are_null(tmp_path, capsys):
    write_rows(tmp_path / "x.npy", [np.eye(2, dtype=np.float32)], shape=(2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        called(capsys, "build", tmp_path / "x.npy", tmp_path / "i.safetensors")
    words = ("search", tmp_path / "i.safetensors", tmp_path / "x.npy", "--k", 3)
    _, told, _ = called(capsys, *words, "--json")
    assert told["ids"][0] == [0, 1, -1]
    assert told["scores"][0] == [1.0, 0.0, None]
    _, text, _ = called(capsys, *words)
    assert text == "0\t0:1 1:0\n1\t1:1 0:0\n"


def test_eval_by_any_truth(place, capsys):
    words = ("eval", place / "flat", "--leaves", 3, "--rescore", 400, "--json")
    for more in ([place / "ann.hdf5"], [place / "q.npy"],
                 [place / "q.npy", "--truth", place / "true.ivecs"]):  # fmt: skip
        code, told, err = called(capsys, *words, *more)
        assert (code, err) == (0, "")
        assert told["recall"] == 1.0
        assert told["queries"] == 60
        assert 0.9 < told["interval"][0] < told["interval"][1] <= 1
    code, text, _ = called(capsys, "eval", place / "tree", place / "ann.hdf5")
    assert "recall 10@10" in text
    code, _, err = called(capsys, *words, place / "q.npy", "--truth", place / "x.fvecs")
    assert code == 1
    assert "must hold at least 10 row numbers" in err


def test_tune_reaches_its_target(place, capsys):
    code, told, err = called(
        capsys, "tune", place / "tree", place / "ann.hdf5", "--target-recall", 0.9, "--json"
    )
    assert (code, err) == (0, "")
    chosen = [t for t in told["trials"] if t["seconds"] is not None]
    assert all(t["recall"] >= 0.9 for t in chosen)
    assert min(t["seconds"] for t in chosen) == told["seconds"]
    low, high = told["interval"]
    assert low < told["recall"] <= high
    assert told["recall"] > 0.8
    index = avq_jax.load(place / "tree")
    found = avq_jax.search(
        index,
        np.load(place / "q.npy")[1::2],
        k=10,
        leaves_to_search=told["leaves_to_search"],
        rescore=told["rescore"],
    )
    true = open_rows(place / "true.ivecs")[1::2]
    assert avq_jax.recall_k_at_k(found.ids, true, k=10) == pytest.approx(told["recall"])


def test_explain_tells_the_stage(place, capsys):
    words = ["explain", place / "tree", place / "q.npy", "--query", 2, "--k", 3]
    best = avq_jax.search(avq_jax.load(place / "tree"), np.load(place / "q.npy")[2], k=3).ids
    code, told, _ = called(capsys, *words, "--id", int(best[0]), "--json")
    assert (code, told["stage"], told["place"]) == (0, "returned", 1)
    code, text, _ = called(capsys, *words, "--id", int(best[0]))
    assert "returned at place 1 of 3" in text
    code, _, said = called(capsys, *words, "--id", 400)
    assert code == 1
    assert "id must be below the number of rows, 400" in said


def test_tune_says_what_it_cannot_do(place):
    index, q = avq_jax.load(place / "tree"), np.load(place / "q.npy")
    with pytest.raises(ValueError, match="target_recall must be above 0"):
        tune(index, q, target_recall=1.5)
    with pytest.raises(ValueError, match="queries must be at least 2"):
        tune(index, q[:1])
    with pytest.raises(ValueError, match="true_ids must have 60 rows"):
        tune(index, q, true_ids=np.zeros((3, 10), np.int32))
    bare = avq_jax.Index(**{**vars(index), "store": None})
    with pytest.raises(ValueError, match="true_ids must be given"):
        tune(bare, q)
    with pytest.raises(ValueError, match="reachable by this index; got 1"):
        tune(bare, q, target_recall=1.0, true_ids=open_rows(place / "true.ivecs")[:])


def test_verify_and_convert(place, tmp_path, capsys):
    code, told, _ = called(capsys, "verify", place / "tree", "--json")
    assert (code, told["whole"]) == (0, True)
    code, told, _ = called(capsys, "convert", place / "ann.hdf5", tmp_path / "a.fbin", "--json")
    assert (code, told["rows"], told["dim"]) == (0, 400, 8)
    np.testing.assert_array_equal(
        open_rows(tmp_path / "a.fbin")[:], open_rows(place / "x.fvecs")[:]
    )
    text = tmp_path / "glove.txt"
    text.write_text("the 1 2\nbroken\nof 3 4\n")
    code, _, err = called(capsys, "convert", text, tmp_path / "b.npy")
    assert code == 1
    assert "line 2" in err
    code, out, _ = called(
        capsys, "convert", text, tmp_path / "b.npy", "--skip-malformed", "--words",
        tmp_path / "words.txt",
    )  # fmt: skip
    assert (code, out) == (0, f"2 rows x 2 in {tmp_path / 'b.npy'}, 1 malformed lines skipped\n")
    assert (tmp_path / "words.txt").read_text() == "the\nof\n"
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["build"],
        ["search", "a", "b", "--k", "0"],
        ["search", "a", "b", "--k", "ten"],
        ["tune", "a", "b", "--target-recall", "1.5"],
        ["build", "a", "b", "--metric", "hamming"],
    ],
)
def test_wrong_usage_exits_2(words, capsys):
    with pytest.raises(SystemExit) as exited:
        main(words)
    assert exited.value.code == 2
    assert "usage: avq-jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["build", "search", "eval", "tune", "explain", "info", "verify", "convert", "demo"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exited:
        main([command, "--help"])
    assert exited.value.code == 0
    out = capsys.readouterr().out
    assert "usage: " in out
    if command != "demo":
        assert f"avq-jax {command} " in out.split("examples:")[1]
        assert "--json" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify", "nothing"], "no index at 'nothing'"),
        (["build", "nothing.npy", "out"], "no data at 'nothing.npy'"),
        (["build", "nothing.csv", "out"], "path must end in one of"),
        (["search", "{}/tree", "{}/x.fvecs", "--rescore", "3"], "rescore must be 0"),
        (["search", "{}/x.fvecs", "{}/x.fvecs"], "safetensors"),
        (["convert", "{}/q.npy", "{}/q.bvecs"], "which cannot be"),
        (["convert", "{}/q.npy", "{}/a.fbin", "--words", "w"], "--words must be left out"),
    ],
)
def test_failures_are_one_clear_line(place, capsys, words, said):
    code, out, err = called(capsys, *(word.format(place) for word in words))
    assert (code, out) == (1, "")
    assert err.startswith("avq-jax: error: ")
    assert err.count("\n") == 1
    assert said in err
