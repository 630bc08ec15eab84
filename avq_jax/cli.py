"""The command ``avq-jax``: its arguments, its help, its exit codes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]

_EXAMPLES = """\
a first session:
  avq-jax demo                                     real word vectors, in three minutes
  avq-jax build glove-100.hdf5 glove.index         learn codes, lay out the tree, save
  avq-jax eval glove.index glove-100.hdf5          recall 10@10 and queries a second
  avq-jax tune glove.index glove-100.hdf5 --target-recall 0.95
  avq-jax search glove.index queries.npy --k 5     ids and scores, a line a query

formats by suffix:  .npy  .hdf5 .h5 (ann-benchmarks)  .fvecs .ivecs .bvecs  .fbin .ibin .u8bin
.i8bin  .txt .vec (GloVe, word2vec). --json prints one JSON object for programs.
exit codes:  0 done, 1 failed (one line says why), 2 wrong usage, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      argv: arguments without the program's name; ``None`` takes those of the process.

    Returns:
      The exit code: 0 done, 1 failed, 130 interrupted. Wrong usage raises ``SystemExit(2)``.

    >>> main(["verify", "/no/such/index"])
    1
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["demo"]:
            return importlib.import_module("avq_jax.demo").main(argv[1:]) or 0
        args = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            commands = importlib.import_module("avq_jax.commands")
            report = getattr(commands, args.command)(args)
        print(json.dumps(report.values) if args.json else report.text, flush=True)
    except KeyboardInterrupt:
        print("avq-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"avq-jax: error: {said}", file=sys.stderr)
        return 1
    return 0


def _warn(message: Any, *_: Any, **__: Any) -> None:
    print(f"avq-jax: warning: {message}", file=sys.stderr)


_ADAPTIVE = "deviations beyond which a query passes leaves over"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def _from_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0; got {text!r}")
    return int(text)


def _from_zero_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; got {text!r}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1; got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="avq-jax",
        description="Maximum inner product search with anisotropic vector quantization (ScaNN).",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, short: str, long: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=short,
            description=long,
            epilog=f"examples:\n{example}",
            formatter_class=raw,
        )
        made.add_argument("--json", action="store_true", help="print one JSON object")
        made.add_argument("--quiet", action="store_true", help="no progress bars")
        return made

    command(
        "demo",
        "learn, index and search real word vectors",
        "Index real word vectors and print recall and speed.",
        "  avq-jax demo\n  avq-jax demo --help",
    )
    _add_build(command)
    _add_searching(command)
    exported = command(
        "export",
        "an index and its search as one program",
        "Write the search of an index as a StableHLO program that needs jax and flatbuffers\n"
        "alone; the directory holds a loader, standalone.py.",
        "  avq-jax export glove.index glove.export --k 10 --rescore 100\n"
        "  avq-jax export glove.index glove.cpu --kernel --batch 8",
    )
    exported.add_argument("index", metavar="INDEX", help="a saved index")
    exported.add_argument("target", metavar="TO", help="a directory")
    exported.add_argument("--k", type=_count, default=10, help="results (default: %(default)s)")
    exported.add_argument("--leaves", type=_count, help="leaves searched")
    exported.add_argument("--rescore", type=_from_zero, help="rows rescored, 0 for none")
    exported.add_argument("--adaptive", type=_from_zero_float, help=_ADAPTIVE)
    exported.add_argument(
        "--batch", default="b", help="a name for any batch size, or a number (default: any)"
    )
    exported.add_argument(
        "--platforms", default="cpu,tpu,cuda", help="with commas (default: %(default)s)"
    )
    exported.add_argument(
        "--kernel", action="store_true", help="for CPUs with the compiled kernel only"
    )
    info = command(
        "info",
        "what is installed, which kernels run, what an index is",
        "Tell versions, devices, which kernels run and why; with an index, what it holds.\n"
        "Only the header of the index is read.",
        "  avq-jax info\n  avq-jax info glove.index --json",
    )
    info.add_argument("index", nargs="?", metavar="INDEX", help="a saved index")
    verify = command(
        "verify",
        "check every byte of a saved index",
        "Compare every byte of an index with its sha256, and every number with its range.\n"
        "Exit code 0 if the index is whole, else 1.",
        "  avq-jax verify glove.index && cp -r glove.index /backup",
    )
    verify.add_argument("index", metavar="INDEX", help="a saved index")
    convert = command(
        "convert",
        "rows from one file format to another",
        "Copy rows between file formats, a chunk at a time. Values never change silently:\n"
        "what the new format cannot hold fails, and leaves no file.",
        "  avq-jax convert base.fvecs base.npy\n"
        "  avq-jax convert glove.txt glove.fbin --words words.txt --skip-malformed\n"
        "  avq-jax convert glove-100.hdf5 queries.fvecs --part test",
    )
    convert.add_argument("source", metavar="FROM", help="a file of rows")
    convert.add_argument("target", metavar="TO", help="a file; the suffix says the format")
    convert.add_argument("--words", metavar="FILE", help="words of a text file, one a line")
    _add_reading(convert, part="train")
    return parser


def _add_reading(parser: Any, *, part: str) -> None:
    parser.add_argument(
        "--part", default=part, help="data set of an HDF5 file (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-malformed",
        action="store_true",
        help="skip and count lines of a text file that are no word and numbers",
    )


def _add_build(command: Any) -> None:
    build = command(
        "build",
        "learn codes for rows and save an index",
        "Build an index of the rows of a file. Sizes left out are chosen from the data:\n"
        "below 20,000 rows exact scoring, below 50,000 a scan of all codes, above sqrt(n) leaves;\n"
        "a code is half a byte for two columns, or for four beyond 128 columns.",
        "  avq-jax build base.npy base.index --metric l2\n"
        "  avq-jax build glove-100.hdf5 glove.safetensors --rescore-dtype int8\n"
        "  avq-jax build base.fbin base.index --leaves 2000 --subspaces 50 --threshold 0.2",
    )
    build.add_argument("data", metavar="DATA", help="a file of rows")
    build.add_argument(
        "index", metavar="INDEX", help="where to save: a directory, or a file *.safetensors"
    )
    build.add_argument(
        "--metric",
        choices=("dot", "cosine", "l2"),
        help="default: what an HDF5 file says, else dot",
    )
    build.add_argument("--leaves", type=_count, help="leaves of the tree; 1 is a flat scan")
    build.add_argument("--subspaces", type=_count, help="codes a row")
    build.add_argument("--codewords", type=_count, default=16, help="default: %(default)s")
    build.add_argument(
        "--codec",
        choices=("product", "additive"),
        default="product",
        help="additive codes are more accurate and take longer to learn (default: %(default)s)",
    )
    build.add_argument(
        "--scale", type=int, choices=(4, 8), metavar="BITS", help="4 or 8 bits of scale a row"
    )
    build.add_argument(
        "--scanned-dim", type=_count, metavar="P", help="principal dimensions that codes are of"
    )
    build.add_argument(
        "--threshold", type=float, metavar="T", help="of the score-aware loss, in units of <q, x>"
    )
    build.add_argument(
        "--rescore-dtype",
        choices=("float32", "bfloat16", "int8", "none"),
        default="float32",
        help="rows kept for exact scores (default: %(default)s)",
    )
    build.add_argument(
        "--on-disk",
        action="store_true",
        help="read the file piece by piece, for more rows than memory holds; INDEX is a directory, "
        "and a build that was interrupted goes on where it was",
    )
    build.add_argument("--ids", metavar="FILE", help="int64 ids of the rows, a .npy of one axis")
    build.add_argument("--iterations", type=_count, default=12, help="default: %(default)s")
    build.add_argument("--seed", type=_from_zero, default=0, help="default: %(default)s")
    _add_reading(build, part="train")


def _add_searching(command: Any) -> None:
    search = command(
        "search",
        "the best rows for each query",
        "Search an index. Prints a line a query: its number, then id:score, best first.",
        "  avq-jax search glove.index queries.npy --k 5\n"
        "  avq-jax search glove.index glove-100.hdf5 --first 3 --json\n"
        "  avq-jax search glove.index queries.fvecs --out ids.npy",
    )
    search.add_argument("--out", metavar="FILE", help="write ids to a .npy or .ivecs file instead")
    evaluate = command(
        "eval",
        "recall and speed on queries",
        "Measure recall k@k with its 95 % interval, and time.\n"
        "The truth is --truth, or the neighbors of an HDF5 file if its metric is that of the\n"
        "index, or found by scoring all stored rows.",
        "  avq-jax eval glove.index glove-100.hdf5\n"
        "  avq-jax eval sift.index query.fvecs --truth groundtruth.ivecs --leaves 40",
    )
    tune = command(
        "tune",
        "the cheapest settings that reach a recall",
        "Find the cheapest --leaves, --rescore and --adaptive that reach a recall. Half of the\n"
        "queries choose, the other half gives the recall and its 95 % interval.",
        "  avq-jax tune glove.index glove-100.hdf5 --target-recall 0.95 --first 1000",
    )
    tune.add_argument("--target-recall", type=_fraction, default=0.95, help="default: %(default)s")
    explain = command(
        "explain",
        "why a row was or was not returned",
        "Tell at which stage a search lost a row: the ranks of its leaves, the errors of its\n"
        "codes, its exact score and that of the results.",
        "  avq-jax explain glove.index glove-100.hdf5 --query 3 --id 1234\n"
        "  avq-jax explain glove.index queries.npy --id 1234 --leaves 20 --rescore 50 --json",
    )
    explain.add_argument("--id", type=_from_zero, required=True, help="user id, or row number")
    explain.add_argument(
        "--query", type=_from_zero, default=0, metavar="N", help="which query (default: 0)"
    )
    for each in (search, evaluate, tune, explain):
        each.add_argument("index", metavar="INDEX", help="a saved index")
        each.add_argument("queries", metavar="QUERIES", help="a file of rows")
        each.add_argument("--k", type=_count, default=10, help="results (default: %(default)s)")
        if each is not explain:
            each.add_argument("--first", type=_count, metavar="N", help="only the first N queries")
        _add_reading(each, part="test")
        if each is not tune:
            each.add_argument("--leaves", type=_count, help="leaves searched")
            each.add_argument("--rescore", type=_from_zero, help="rows rescored, 0 for none")
            each.add_argument("--adaptive", type=_from_zero_float, help=_ADAPTIVE)
        if each in (evaluate, tune):
            each.add_argument("--truth", metavar="FILE", help="true row numbers, .ivecs or .npy")


if __name__ == "__main__":
    raise SystemExit(main())
