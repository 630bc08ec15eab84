"""What the options of a tree bring: adaptive effort, groups, fewer dimensions, additive codes.

    taskset -c 1 python benchmarks/bench_options.py --dataset glove6b-100.hdf5

Every option is compared with the same index (adaptive effort), the same leaves (groups) or the
same data (dimensions, codes) without it. Settings take turns, several rounds; times are medians.
``--scale`` compares codes with and without a score-aware scale, in CPU time, and with codes that
take as long a scan; it writes a file of its own.
"""

import dataclasses
import os
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


def measure(indexes, queries, truth, args, clock):
    """Points of all settings of all indexes in turns, ``args.rounds`` times; medians."""
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
            begin = clock()
            for q in queries[: args.single]:
                find(q)
            times["single_us"].append((clock() - begin) / args.single)
            begin = clock()
            find(queries)
            times["batch_us"].append((clock() - begin) / len(queries))
    for point, _, times in timed:
        point |= {kind: 1e6 * statistics.median(each) for kind, each in times.items()}
        print(point, flush=True)
    points = [point for point, _, _ in timed]
    targets = {
        f"{kind} at {target}": {name: at_recall(points, name, kind, target) for name in indexes}
        for target in (0.9, 0.95, 0.99)
        for kind in ("single_us", "batch_us")
    }
    return {"at_recall": targets, "points": points}


def options_of(build, args, d):
    """Indexes of the options, and what else is told of them."""
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
    return indexes, {"groups": many.tree.packed.groups.vectors.shape[0]}


def scales_of(build, d):
    """Indexes with and without a scale, and with the codes that take as much memory and time."""
    indexes = {}
    for codec, m, settings in (
        ("product", d // 2, PLAIN),
        ("product", d // 4, WIDE),
        ("additive", d // 4, WIDE),
    ):
        # The scan takes codes four at a time: a few more cost no time.
        more = -(-m // 4) * 4
        sizes = [(m, None), (m, 4), (m, 8)] if codec == "product" else [(m, None), (m, 4)]
        for count, scale in [*sizes, (more, None)] if m < d // 2 else sizes:
            bits = "" if scale is None else f", scale of {scale} bits"
            name = f"{codec} codes {count} x 16{bits}"
            index = build(name, codec=codec, num_subspaces=count, scale=scale)
            indexes[name] = (index, settings)
    return indexes


def estimates(build, queries, neighbors, d, leaves):
    """Recall of the codes alone in each row's one leaf, all leaves searched, no rescoring."""
    found = []
    for codec, m in (("product", d // 4), ("additive", d // 4), ("product", d // 2)):
        for scale in (None, 4):
            bits = "" if scale is None else f", scale of {scale} bits"
            name = f"{codec} codes {m} x 16{bits}, {leaves} leaves"
            index = build(
                name, codec=codec, num_subspaces=m, scale=scale, num_leaves=leaves,
                soar_lambda=None, rescore_dtype=None,
            )  # fmt: skip
            find = avq_jax.searcher(index, k=100, leaves_to_search=leaves, rescore=0)
            ids = np.concatenate([find(q).ids for q in np.array_split(queries, 8)])
            hits = [len(np.intersect1d(a, b)) for a, b in zip(ids, neighbors[:, :10], strict=True)]
            found.append(
                {
                    "side": name,
                    "bits": 8 * index.code_bytes,
                    "1@10": float(avq_jax.recall_1_at_n(ids, neighbors, n=10)),
                    "10@100": float(np.mean(hits) / 10),
                }
            )
            print(found[-1], flush=True)
    return found


def main(argv=None):
    parser = record.arguments(
        __doc__.splitlines()[0],
        rounds=5, queries=2000, single=500, many_leaves=4096, leaves=600,
    )  # fmt: skip
    parser.add_argument(
        "--scale", action="store_true", help="the score-aware scale instead of the other options"
    )
    args = parser.parse_args(argv)
    data = read_hdf5(args.dataset)
    x, every = unit(data.train), unit(data.test)
    queries, truth = every[: args.queries], np.asarray(data.neighbors)[: args.queries, :10]
    built: dict[str, float] = {}

    def build(name, **options):
        begin = time.process_time()
        index = avq_jax.build(jax.random.key(0), x, progress=False, **options)
        built[name] = time.process_time() - begin
        return index

    load = os.getloadavg()
    result: dict = {}
    if args.scale:
        indexes = scales_of(build, x.shape[1])
        # CPU time: the machine may be busy.
        result = measure(indexes, queries, truth, args, time.process_time)
        neighbors = np.asarray(data.neighbors)
        result["estimates"] = estimates(build, every, neighbors, x.shape[1], args.leaves)
        result |= {"clock": "CPU time", "load_average": [load[0], os.getloadavg()[0]]}
    else:
        indexes, result = options_of(build, args, x.shape[1])
        result |= measure(indexes, queries, truth, args, time.perf_counter)
    record.write(
        f"options{'_scale' if args.scale else ''}_{data.name}",
        {
            "benchmark": "options",
            "dataset": data.name,
            "rows": len(x),
            "environment": record.environment(),
            "build_cpu_s": built,
            "bytes_per_row": {
                name: index.bytes_per_row.total for name, (index, _) in indexes.items()
            },
            **result,
        },
        args.output,
    )


if __name__ == "__main__":
    sys.exit(main())
