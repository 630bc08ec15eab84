"""Build an index of more rows than memory should hold, from a file, and measure the memory.

    python benchmarks/bench_streaming.py --rows 10000000

Synthetic rows (a mixture of 1,000 Gaussians, written once to a raw float32 file) are read through
``np.memmap``, indexed by ``build_to_disk``, and searched from the loaded index. The process limits
its own memory (RLIMIT_DATA, which pages of files do not count against): with less it would end in a
MemoryError. ``anonymous`` is the peak of RssAnon, memory that only this process can give back; the
peak of the resident set counts pages of the files too, which the system drops when it needs room.
"""

import argparse
import json
import pathlib
import resource
import shutil
import tempfile
import threading
import time

import jax
import numpy as np
import record

import avq_jax


def status(field):
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


class Peak(threading.Thread):
    """Sample the memory of this process, anonymous and in all, twenty times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0
        self.running = True

    def run(self):
        while self.running:
            self.anonymous = max(self.anonymous, status("RssAnon:"))
            self.resident = max(self.resident, status("VmRSS:"))
            time.sleep(0.05)


def measured(function):
    peak = Peak()
    peak.start()
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    peak.running = False
    peak.join()
    took |= {"peak_anonymous_bytes": peak.anonymous, "peak_resident_bytes": peak.resident}
    return value, {key: round(number, 2) for key, number in took.items()}


def mixture(rng, centers, count):
    rows = centers[rng.integers(len(centers), size=count)]
    rows = rows + 0.7 * rng.standard_normal(rows.shape, np.float32)
    return rows.astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--limit-gib", type=float, default=8.0, help="memory the process may take")
    parser.add_argument("--folder", type=pathlib.Path, default=None)
    parser.add_argument("--output", default=None, help="JSON file; default benchmarks/results/")
    args = parser.parse_args()
    limit = int(args.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    work = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rng = np.random.default_rng(0)
        centers = rng.standard_normal((1000, args.dim), np.float32)
        with open(work / "rows.f32", "wb") as file:
            for begin in range(0, args.rows, 65_536):
                mixture(rng, centers, min(65_536, args.rows - begin)).tofile(file)
        rows = np.memmap(work / "rows.f32", np.float32, mode="r", shape=(args.rows, args.dim))
        queries = mixture(rng, centers, args.queries)
        _, build = measured(
            lambda: avq_jax.build_to_disk(
                jax.random.key(0),
                rows,
                work / "index",
                metric="cosine",
                soar_lambda=None,
                progress=True,
            )
        )
        print("build", build, flush=True)
        index, load = measured(lambda: avq_jax.load(work / "index", verify=False))
        print("load", load, index, flush=True)
        # Exact neighbours a slice of the file at a time.
        scores = np.full((args.queries, 10), -np.inf, np.float32)
        ids = np.full((args.queries, 10), -1, np.int64)
        for begin in range(0, args.rows, 1 << 18):
            found = avq_jax.brute_force(
                queries, rows[begin : begin + (1 << 18)], k=10, metric="cosine"
            )
            scores = np.concatenate([scores, found.scores], axis=1)
            ids = np.concatenate([ids, np.asarray(found.ids) + begin], axis=1)
            order = np.argsort(-scores, axis=1)[:, :10]
            scores, ids = (np.take_along_axis(a, order, axis=1) for a in (scores, ids))
        found = []
        for leaves in (20, 50, 100):
            find = avq_jax.searcher(index, k=10, leaves_to_search=leaves, rescore=100)
            find(queries[0])
            begin = time.process_time()
            got = np.stack([find(q).ids for q in queries])
            micros = (time.process_time() - begin) / len(queries) * 1e6
            recall = float(avq_jax.recall_k_at_k(got, ids.astype(np.int32)))
            found.append({"leaves": leaves, "recall10@10": recall, "cpu_us": round(micros, 1)})
        size = sum(file.stat().st_size for file in (work / "index").iterdir())
        body = {
            "rows": args.rows,
            "dim": args.dim,
            "num_leaves": index.num_leaves,
            "memory_limit_bytes": limit,
            "source_bytes": rows.nbytes,
            "index_bytes": size,
            "build": build,
            "load": load,
            "search": found,
            **record.environment(),
        }
        print(json.dumps(body, indent=1))
        record.write("streaming", body, args.output)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
