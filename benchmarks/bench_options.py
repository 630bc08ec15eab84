"""What the options of a tree bring: adaptive effort, groups, fewer dimensions, additive codes.

    taskset -c 1 python benchmarks/bench_options.py --dataset glove6b-100.hdf5

Every option is compared with the same index (adaptive effort), the same leaves (groups) or the same
data (dimensions, codes) without it. Settings take turns, several rounds; times are medians.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np
import record
from bench_search import at_recall, unit

import avq_jax
from avq_jax.evaluation import read_hdf5

PLAIN = [(10, 50), (14, 65), (20, 80), (27, 100), (40, 100), (60, 100), (80, 110), (100, 110)]
ADAPTIVE = [(27, 60, 3.25), (40, 80, 3.25), (60, 90, 3.5), (80, 100, 3.75), (110, 110, 3.75)]
ADAPTIVE += [(110, 120, 4.0), (160, 150, 4.0), (60, 90, 4.5), (80, 100, 5.0), (110, 110, 6.0)]
WIDE = [(14, 100), (27, 100), (27, 200), (40, 200), (60, 300), (80, 500), (110, 800)]
MANY = [(20, 60), (40, 60), (70, 60), (100, 60), (150, 80), (250, 100), (400, 110)]


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
    many = build("groups", num_leaves=args.many_leaves, num_groups=round(args.many_leaves**0.5))
    indexes = {
        "default": (usual, PLAIN),
        "adaptive": (usual, ADAPTIVE),
        f"{args.many_leaves} leaves": (flat(many), MANY),
        f"{args.many_leaves} leaves in groups": (many, MANY),
    }
    for p in (d // 2, 3 * d // 4):
        name = f"{p} principal dimensions"
        indexes[name] = (build(name, scanned_dim=p), PLAIN)
    additive = build("additive codes", codec="additive")
    codes = f"product codes {additive.tree.codebook.num_subspaces} x 16"
    half = build(codes, num_subspaces=additive.tree.codebook.num_subspaces)
    indexes |= {codes: (half, WIDE), "additive codes of as many bytes": (additive, WIDE)}
    timed: list[tuple] = []
    for name, (index, settings) in indexes.items():
        for setting in settings:
            names = ("leaves_to_search", "rescore", "adaptive")
            find = avq_jax.searcher(index, k=10, **dict(zip(names, setting, strict=False)))
            recall = float(avq_jax.recall_k_at_k(find(queries).ids, truth, k=10))
            find(queries[0])
            point = {"side": name, "setting": setting, "recall": recall}
            timed.append((point, find, {"single_us": [], "batch_us": []}))
    for _ in range(args.rounds):
        for _, find, times in timed:
            begin = time.perf_counter()
            for q in queries[: args.single]:
                find(q)
            times["single_us"].append((time.perf_counter() - begin) / args.single)
            begin = time.perf_counter()
            find(queries)
            times["batch_us"].append((time.perf_counter() - begin) / len(queries))
    for point, _, times in timed:
        point |= {kind: 1e6 * statistics.median(each) for kind, each in times.items()}
        print(point, flush=True)
    points = [point for point, _, _ in timed]
    targets = {
        f"{kind} at {target}": {name: at_recall(points, name, kind, target) for name in indexes}
        for target in (0.9, 0.95, 0.99)
        for kind in ("single_us", "batch_us")
    }
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
            "at_recall": targets,
            "points": points,
        },
        args.output,
    )


if __name__ == "__main__":
    sys.exit(main())
