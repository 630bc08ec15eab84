"""What the commands of ``avq-jax`` do; each gives a report for people and for programs."""

from __future__ import annotations

import argparse
import importlib
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

import avq_jax
from avq_jax.checks import as_count
from avq_jax.evaluation import brute_force, open_rows, query_recalls, recall_interval, write_rows
from avq_jax.evaluation.readers import RowFile
from avq_jax.mips.io import describe
from avq_jax.mips.tuning import tune as find_settings
from avq_jax.progress import steps

__all__ = [
    "Report",
    "build",
    "convert",
    "eval",
    "explain",
    "export",
    "info",
    "search",
    "tune",
    "verify",
]

_CHUNK = 65_536
_QUERIES = 1024
_SINGLE = 200
_HDF5_METRICS = {"angular": "cosine", "cosine": "cosine", "euclidean": "l2", "l2": "l2",
                 "dot": "dot", "ip": "dot"}  # fmt: skip


class Report(NamedTuple):
    """Values for ``--json``, text for people."""

    values: dict[str, Any]
    text: str


def _rows(path: str, args: argparse.Namespace) -> RowFile:
    return open_rows(path, part=args.part, on_malformed="skip" if args.skip_malformed else "raise")


def _progress(args: argparse.Namespace) -> bool | None:
    return False if args.quiet or args.json else None


def _own_metric(path: str) -> str | None:
    """Read the metric that an ann-benchmarks file is for."""
    if pathlib.Path(path).suffix.lower() not in (".hdf5", ".h5"):
        return None
    with importlib.import_module("h5py").File(path, "r") as content:
        said = content.attrs.get("distance")
    return _HDF5_METRICS.get(said.decode() if isinstance(said, bytes) else said)


def build(args: argparse.Namespace) -> Report:
    """Build an index from a file and save it."""
    with _rows(args.data, args) as rows:
        metric: Any = args.metric or _own_metric(args.data) or "dot"
        ids = None
        if args.ids is not None:
            ids = np.load(args.ids, allow_pickle=False)
        key = jax.random.key(args.seed)
        options: dict[str, Any] = {
            "metric": metric,
            "num_leaves": args.leaves,
            "num_subspaces": args.subspaces,
            "num_codewords": args.codewords,
            "codec": args.codec,
            "scale": args.scale,
            "scanned_dim": args.scanned_dim,
            "weight": None if args.threshold is None else avq_jax.Threshold(args.threshold),
            "ids": ids,
            "rescore_dtype": None if args.rescore_dtype == "none" else args.rescore_dtype,
            "num_iterations": args.iterations,
            "progress": _progress(args),
        }
        start = time.perf_counter()
        if args.on_disk:
            avq_jax.build_to_disk(key, rows, args.index, **options)
        else:
            index = jax.block_until_ready(avq_jax.build(key, rows[:], **options))
        seconds = time.perf_counter() - start
        skipped = len(rows.malformed)
    values: dict[str, Any] = {"index": args.index, "seconds": seconds, "skipped_lines": skipped}
    lines = []
    if not args.on_disk:
        avq_jax.save(index, args.index)
        memory = index.bytes_per_row
        values["bytes_per_row"] = {**memory._asdict(), "total": memory.total}
        lines = [str(index), str(memory)]
    told = describe(args.index)
    lines.append(f"built in {seconds:.1f} s, saved to {args.index} ({_size(told['bytes'])})")
    text, values = "\n".join(lines), {**values, **told}
    return Report(values, text + (f"\nskipped {skipped} malformed lines" if skipped else ""))


def _effort(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "leaves_to_search": args.leaves, "rescore": args.rescore, "adaptive": args.adaptive
    }  # fmt: skip


def search(args: argparse.Namespace) -> Report:
    """Search an index for the queries of a file."""
    index = avq_jax.load(args.index)
    find = avq_jax.searcher(index, k=args.k, **_effort(args))
    ids, scores = [], []
    with _rows(args.queries, args) as queries:
        count = min(len(queries), args.first or len(queries))
        size = min(count, _QUERIES)
        starts = range(0, count, max(1, size))
        for step in steps(len(starts), "searching", _progress(args)):
            chunk = np.asarray(queries[starts[step] : min(count, starts[step] + size)])
            # The last chunk is padded, so that one compiled shape serves all.
            padded = np.zeros((size, chunk.shape[1]), np.float32)
            padded[: len(chunk)] = chunk
            found = find(padded)
            scores.append(np.asarray(found[0])[: len(chunk)])
            ids.append(avq_jax.user_ids(index, np.asarray(found[1])[: len(chunk)]))
    all_ids = np.concatenate(ids) if ids else np.empty((0, args.k), np.int64)
    all_scores = np.concatenate(scores) if ids else np.empty((0, args.k), np.float32)
    values: dict[str, Any] = {"queries": len(all_ids), "k": args.k}
    if args.out:
        write_rows(args.out, [all_ids], shape=all_ids.shape)
        return Report({**values, "out": args.out}, f"ids of {len(all_ids)} queries in {args.out}")
    finite = [[s if math.isfinite(s) else None for s in row] for row in all_scores.tolist()]
    lines = (
        f"{i}\t" + " ".join(f"{a}:{s:.6g}" for a, s in zip(row, best, strict=True) if a >= 0)
        for i, (row, best) in enumerate(zip(all_ids.tolist(), all_scores.tolist(), strict=True))
    )
    return Report({**values, "ids": all_ids.tolist(), "scores": finite}, "\n".join(lines))


def _queries_and_truth(
    args: argparse.Namespace, index: avq_jax.Index
) -> tuple[np.ndarray, np.ndarray | None, str]:
    with _rows(args.queries, args) as rows:
        queries = np.asarray(rows[: args.first])
    k = min(args.k, index.num_rows)
    path, part = args.truth, None
    if path is None and (part := _answer_part(args, index)) is not None:
        path = args.queries
    if path is None:
        return queries, None, "exact scores of the stored rows"
    with open_rows(path, part=part or "train") as rows:
        truth = np.asarray(rows[: len(queries)])
    whole = truth.dtype.kind in "iu" and truth.shape[0] == len(queries) and truth.shape[1] >= k
    if not whole or (truth.size and not -1 <= truth.min() <= truth.max() < index.num_rows):
        raise ValueError(
            f"{path!r} must hold at least {k} row numbers below {index.num_rows} for each of "
            f"{len(queries)} queries; got shape {truth.shape} of {truth.dtype}"
        )
    return queries, truth[:, :k].astype(np.int32), f"{path}"


def _answer_part(args: argparse.Namespace, index: avq_jax.Index) -> str | None:
    """Find the data set of an HDF5 file that answers its queries for this index, if one does."""
    own = _own_metric(args.queries)
    if own is None or args.part != "test":
        return None
    part = "neighbors" if own == index.metric else "neighbors_ip"
    with importlib.import_module("h5py").File(args.queries, "r") as content:
        same = "train" in content and content["train"].shape == (index.num_rows, index.dim)
        usable = same and part in content and (own == index.metric or index.metric == "dot")
    return part if usable else None


def eval(args: argparse.Namespace) -> Report:
    """Measure recall and time of an index."""
    index = avq_jax.load(args.index)
    queries, truth, where = _queries_and_truth(args, index)
    as_count(len(queries), name="the number of queries")
    k = min(args.k, index.num_rows)
    if truth is None:
        if index.store is None or index.store.scale is not None:
            raise ValueError("--truth must be given for an index without float rows")
        rows = np.asarray(index.store.rows).astype(np.float32, copy=False)
        truth = np.asarray(brute_force(queries, rows, k=k, metric=index.metric).ids)
    find = avq_jax.searcher(index, k=k, **_effort(args))
    ids = np.asarray(find(queries)[1])
    start = time.perf_counter()
    find(queries)
    batch = (time.perf_counter() - start) / len(queries)
    find(queries[0])
    start = time.perf_counter()
    for q in queries[:_SINGLE]:
        find(q)
    single = (time.perf_counter() - start) / min(len(queries), _SINGLE)
    recalls = query_recalls(ids, truth, k=k)
    recall, interval = float(np.nanmean(recalls)), recall_interval(recalls)
    values = {
        "k": k, "queries": len(queries), "recall": recall, "interval": list(interval),
        "seconds_per_query": single, "seconds_per_query_in_batch": batch, "truth": where,
    }  # fmt: skip
    text = (
        f"recall {k}@{k}   {recall:.4f}   (95 % interval {interval[0]:.4f} to {interval[1]:.4f}, "
        f"{len(queries)} queries)\n"
        f"one query      {single * 1e6:.0f} us ({1 / single:.0f} a second)\n"
        f"in a batch     {batch * 1e6:.0f} us ({1 / batch:.0f} a second)\n"
        f"truth          {where}"
    )
    return Report(values, text)


def explain(args: argparse.Namespace) -> Report:
    """Tell why a row was or was not returned for one query."""
    index = avq_jax.load(args.index)
    with _rows(args.queries, args) as rows:
        if args.query >= len(rows):
            raise ValueError(f"--query must be below the {len(rows)} queries; got {args.query}")
        query = np.asarray(rows[args.query : args.query + 1])[0]
    found = avq_jax.explain(index, query, args.id, k=args.k, **_effort(args))
    values = {**found._asdict(), "copies": [copy._asdict() for copy in found.copies]}
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    return Report(finite, f"{found}")


def tune(args: argparse.Namespace) -> Report:
    """Find the cheapest settings that reach a recall."""
    index = avq_jax.load(args.index)
    queries, truth, where = _queries_and_truth(args, index)
    found = find_settings(
        index,
        queries,
        k=args.k,
        target_recall=args.target_recall,
        true_ids=truth,
        progress=_progress(args),
    )
    values = {
        **found._asdict(),
        "interval": list(found.interval),
        "trials": [trial._asdict() for trial in found.trials],
        "truth": where,
    }
    low, high = found.interval
    lines = [f"{'leaves':>8}{'rescore':>9}{'adaptive':>10}{'recall':>9}{'us':>9}"]
    for trial in found.trials:
        adaptive = "" if trial.adaptive is None else f"{trial.adaptive:g}"
        cost = "" if trial.seconds is None else f"{trial.seconds * 1e6:.0f}"
        lines.append(
            f"{trial.leaves_to_search:>8}{trial.rescore:>9}{adaptive:>10}{trial.recall:>9.4f}"
            f"{cost:>9}"
        )
    more = "" if found.adaptive is None else f" --adaptive {found.adaptive:g}"
    lines.append(
        f"cheapest: --leaves {found.leaves_to_search} --rescore {found.rescore}{more}, "
        f"{found.seconds * 1e6:.0f} us a query; recall {args.k}@{args.k} {found.recall:.4f} "
        f"(95 % interval {low:.4f} to {high:.4f}) on queries it was not chosen on"
    )
    return Report(values, "\n".join(lines))


def export(args: argparse.Namespace) -> Report:
    """Export an index and its search as one program."""
    serving = importlib.import_module("avq_jax.serving")
    index = avq_jax.load(args.index)
    serving.export(
        index,
        args.target,
        batch=int(args.batch) if args.batch.isdecimal() else args.batch,
        k=args.k,
        **_effort(args),
        platforms=("cpu",) if args.kernel else tuple(args.platforms.split(",")),
        implementation="cpu" if args.kernel else "xla",
    )
    header = serving.load_exported(args.target).header
    kept = ("inputs", "k", "platforms", "requires", "jax_version", "num_rows", "metric")
    values = {"export": args.target, **{name: header[name] for name in kept}}
    shape = ", ".join(str(n) for n in header["inputs"]["shape"])
    size = _size(header["program"]["bytes"] + header["arrays"]["bytes"])
    needs = "" if header["requires"] is None else ", with the compiled kernel"
    text = (
        f"{args.target}: [{shape}] -> k = {header['k']}, for {', '.join(header['platforms'])}"
        f"{needs} ({size})"
    )
    return Report(values, text)


def info(args: argparse.Namespace) -> Report:
    """Tell what is installed and what an index holds."""
    devices = [f"{device.platform}:{device.id}" for device in jax.devices()]
    values: dict[str, Any] = {
        "avq_jax": avq_jax.__version__,
        "jax": jax.__version__,
        "devices": devices,
        "kernels": _kernels(),
    }
    lines = [
        f"avq_jax {avq_jax.__version__}, jax {jax.__version__} on {', '.join(devices)}",
        *(f"kernels: {name}: {why}" for name, why in values["kernels"].items()),
    ]
    if args.index is not None:
        told = values["index"] = describe(args.index)
        codec = told["codec"]
        codes = "no codes" if codec is None else (
            f"{codec['num_subspaces']} codes of {codec['num_codewords']} codewords, "
            f"{told['num_leaves']} leaves of which {told['leaves_to_search']} are searched"
        )  # fmt: skip
        lines += [
            f"{args.index}: {told['num_rows']} rows x {told['dim']}, {told['metric']}, {codes}",
            f"  {told['form']} of {_size(told['bytes'])}, format version "
            f"{told['format_version']}, written by avq_jax {told['library_version']}",
            *(
                f"  {name:<12}{tensor['dtype']:>5} {tensor['shape']!s:<18}{_size(tensor['bytes'])}"
                f", {tensor['bytes'] / max(told['num_rows'], 1):.1f} a row"
                for name, tensor in told["tensors"].items()
            ),
        ]
    return Report(values, "\n".join(lines))


def _kernels() -> dict[str, str]:
    """Name the implementations of the kernels, and say which run and why."""
    kernels = importlib.import_module("xla_kernels")
    available = getattr(kernels, "available_implementations", None)
    if available is None:
        return {"xla": "in use; this installation has no compiled kernels"}
    found = available()
    if isinstance(found, dict):
        return {str(name): str(why) for name, why in found.items()}
    return {str(name): "available" for name in found}


def verify(args: argparse.Namespace) -> Report:
    """Check a saved index."""
    start = time.perf_counter()
    index = avq_jax.load(args.index, verify=True)
    seconds = time.perf_counter() - start
    told = describe(args.index)
    values = {"index": args.index, "whole": True, "seconds": seconds, "bytes": told["bytes"]}
    text = f"{args.index} is whole: {_size(told['bytes'])} checked in {seconds:.1f} s\n{index}"
    return Report(values, text)


def convert(args: argparse.Namespace) -> Report:
    """Copy rows from one format to another."""
    with _rows(args.source, args) as rows:
        count = -(-len(rows) // _CHUNK)
        progress = _progress(args)
        chunks = (rows[i * _CHUNK : (i + 1) * _CHUNK] for i in steps(count, "converting", progress))
        if args.words and rows.words is None:
            raise ValueError(f"--words must be left out where FROM has no words: {args.source}")
        write_rows(args.target, chunks, shape=rows.shape, dtype=rows.dtype)
        if args.words:
            pathlib.Path(args.words).write_text("\n".join(rows.words or []) + "\n", "utf-8")
        (n, d), skipped = rows.shape, len(rows.malformed)
    values = {"rows": n, "dim": d, "skipped_lines": skipped, "target": args.target}
    text = f"{n} rows x {d} in {args.target}"
    return Report(values, text + (f", {skipped} malformed lines skipped" if skipped else ""))


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
