"""What the options of a tree bring: adaptive effort, groups of leaves, fewer scanned dimensions.

    taskset -c 1 python benchmarks/bench_options.py --dataset glove6b-100.hdf5

Every option is compared with the same index (adaptive effort), the same leaves (groups) or the same
data (dimensions) without it. Settings take turns, several rounds; times are medians.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np
import record

import avq_jax
from avq_jax.evaluation import read_hdf5

PLAIN = [(10, 50), (14, 65), (20, 80), (27, 100), (40, 100), (60, 100), (80, 110), (100, 110)]
ADAPTIVE = [(27, 60, 3.25), (40, 80, 3.25), (60, 90, 3.5), (80, 100, 3.75), (110, 110, 3.75)]
ADAPTIVE += [(110, 120, 4.0), (160, 150, 4.0), (60, 90, 4.5), (80, 100, 5.0), (110, 110, 6.0)]
MANY = [(20, 60), (40, 60), (70, 60), (100, 60), (150, 80), (250, 100), (400, 110)]


def unit(x):
    return np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def flat(index):
    """The same leaves, all of them ranked."""
    packed = index.tree.packed._replace(groups=None)
    return dataclasses.replace(index, tree=index.tree._replace(packed=packed))


def main(argv=None):
    parser = record.arguments(
        __doc__.splitlines()[0], rounds=5, queries=2000, single=500, many_leaves=4096
    )
    args = parser.parse_args(argv)
    data = read_hdf5(args.dataset)
    x, queries = unit(data.train), unit(data.test)[: args.queries]
    truth = np.asarray(data.neighbors)[: args.queries, :10]
    d = x.shape[1]
    built, indexes = {}, {}

    def build(name, **options):
        begin = time.process_time()
        index = avq_jax.build(jax.random.key(0), x, progress=False, **options)
        built[name] = time.process_time() - begin
        return index

    usual = build("default")
    many = build("groups", num_leaves=args.many_leaves)
    indexes = {
        "default": (usual, PLAIN),
        "adaptive": (usual, ADAPTIVE),
        f"{args.many_leaves} leaves": (flat(many), MANY),
        f"{args.many_leaves} leaves in groups": (many, MANY),
    }
    for p in (d // 2, 3 * d // 4):
        indexes[f"{p} principal dimensions"] = (build(f"{p}", scanned_dim=p), PLAIN)
    points = []
    for name, (index, settings) in indexes.items():
        for setting in settings:
            names = ("leaves_to_search", "rescore", "adaptive")
            find = avq_jax.searcher(index, k=10, **dict(zip(names, setting, strict=False)))
            recall = float(avq_jax.recall_k_at_k(find(queries).ids, truth, k=10))
            find(queries[0])
            point = {"side": name, "setting": setting, "recall": recall}
            points.append((point, find, {"single_us": [], "batch_us": []}))
    for _ in range(args.rounds):
        for _, find, times in points:
            begin = time.perf_counter()
            for q in queries[: args.single]:
                find(q)
            times["single_us"].append((time.perf_counter() - begin) / args.single)
            begin = time.perf_counter()
            find(queries)
            times["batch_us"].append((time.perf_counter() - begin) / len(queries))
    for point, _, times in points:
        point |= {kind: 1e6 * statistics.median(each) for kind, each in times.items()}
        print(point, flush=True)
    record.write(
        f"options_{data.name}",
        {
            "benchmark": "options",
            "dataset": data.name,
            "rows": len(x),
            "environment": record.environment(),
            "build_cpu_s": built,
            "bytes_per_row": {
                name: index.bytes_per_row.total for name, (index, _) in indexes.items()
            },
            "groups": many.tree.packed.groups.vectors.shape[0],
            "points": [point for point, _, _ in points],
        },
        args.output,
    )


if __name__ == "__main__":
    sys.exit(main())
