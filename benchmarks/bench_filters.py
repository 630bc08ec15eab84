"""Filtered search: recall and time under masks of several kinds and sizes.

    taskset -c 1 python benchmarks/bench_filters.py --dataset glove6b-100.hdf5

Masks: rows at random; the rows nearest to one row; those nearest to any of 30 rows; a range of row
numbers. CPU time, medians of three.
"""

import statistics
import sys
import time

import jax
import numpy as np
import record

import avq_jax
from avq_jax.evaluation import read_hdf5


def unit(x):
    return np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def masks(rng, x, share):
    n, size = len(x), int(share * len(x))

    def nearest(count):
        closeness = (x @ x[rng.integers(n, size=count)].T).max(axis=1)
        mask = np.zeros(n, bool)
        mask[np.argpartition(-closeness, size)[:size]] = True
        return mask

    start = rng.integers(n - size)
    numbers = np.arange(n)
    return {
        "random": rng.random(n) < share,
        "one ball": nearest(1),
        "30 balls": nearest(30),
        "range": (numbers >= start) & (numbers < start + size),
    }


def cpu_us(run, queries):
    run()
    times = []
    for _ in range(3):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return 1e6 * statistics.median(times) / queries


def main(argv=None):
    parser = record.arguments(
        __doc__.splitlines()[0], leaves=14, rescore=80, num_leaves=1000, queries=1000
    )
    args = parser.parse_args(argv)
    data = read_hdf5(args.dataset)
    x, queries = unit(data.train), unit(data.test)[: args.queries]
    truth = np.asarray(data.neighbors)[: args.queries, :10]
    index = avq_jax.build(
        jax.random.key(0), x, num_leaves=args.num_leaves, soar_lambda=1.0, progress=False
    )
    effort = {"k": 10, "leaves_to_search": args.leaves, "rescore": args.rescore}
    find = avq_jax.searcher(index, **effort)
    plain = {
        "recall": float(avq_jax.recall_k_at_k(find(queries).ids, truth, k=10)),
        "handle_us": cpu_us(lambda: [find(q) for q in queries], len(queries)),
    }
    print(plain, flush=True)
    scores = queries @ x.T
    rng = np.random.default_rng(0)
    results = []
    for share in (0.3, 0.1, 0.01, 0.001):
        for kind, mask in masks(rng, x, share).items():
            true = np.argpartition(-np.where(mask, scores, -np.inf), 10, axis=1)[:, :10]
            handle = avq_jax.searcher(index, allowed=mask, **effort)

            def batch(mask=mask):
                return np.asarray(avq_jax.search(index, queries, allowed=mask, **effort).ids)

            if not np.array_equal(batch(), handle(queries).ids):
                raise AssertionError("search and searcher differ")
            results.append(
                {
                    "share": share,
                    "kind": kind,
                    "recall": float(avq_jax.recall_k_at_k(batch(), true.astype(np.int32), k=10)),
                    "handle_us": cpu_us(lambda h=handle: [h(q) for q in queries], len(queries)),
                    "batch_us": cpu_us(batch, len(queries)),
                }
            )
            print(results[-1], flush=True)
    record.write(
        f"filters_{data.name}",
        {
            "benchmark": "filters",
            "dataset": data.name,
            "rows": len(x),
            "queries": len(queries),
            **{name: getattr(args, name) for name in ("leaves", "rescore", "num_leaves")},
            "environment": record.environment(),
            "unfiltered": plain,
            "masks": results,
        },
        args.output,
    )


if __name__ == "__main__":
    sys.exit(main())
