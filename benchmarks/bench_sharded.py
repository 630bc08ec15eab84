"""Sharded search: total CPU time a query by shards, and wall-clock time of one and two processes.

    python benchmarks/bench_sharded.py --dataset glove.hdf5
    python benchmarks/bench_sharded.py --synthetic 10000000

The second makes rows and queries as `bench_streaming.py` does and builds from a file, int8 rows
for exact scores; for 10^7 rows it takes 7 GB of disk for a while.

Shards are host devices of one process that share the CPU, pinned to one core, so ``cpu_us`` is the
CPU time of all of them together, not latency; ways to share leaves out and numbers of shards take
turns. ``same_ids`` is against ``search``, whose time at the same effort is ``search_cpu_us``.
``processes`` has batches where each process has a core of its own, one thread and one shard, and
they talk over loopback: the least wall-clock time, and the CPU time of the process that takes most,
waiting included where it spins; ``gain`` and ``cpu_gain`` are one process over two.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

EFFORTS = (30, 150)
SHARDS = (1, 2, 4, 8)
BATCHES = (256, 1024)
_FLAGS = "--xla_force_host_platform_device_count=8"


def times_of(
    calls: list[Callable[[], Any]], clock: Callable[[], float], rounds: int
) -> list[list[float]]:
    """Microseconds of each call, which take turns."""
    import jax

    for call in calls:
        jax.block_until_ready(call())
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            start = clock()
            jax.block_until_ready(call())
            own.append((clock() - start) * 1e6)
    return times


def synthetic(rows: int, folder: pathlib.Path) -> tuple[str, str]:
    """A file of rows and queries, and an index of the rows."""
    import bench_streaming
    import h5py
    import jax
    import numpy as np

    import avq_jax

    path = folder / f"mixture_{rows}.hdf5"
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((1000, 96), np.float32)
    with h5py.File(path, "w") as file:
        train = file.create_dataset("train", (rows, 96), np.float32)
        for begin in range(0, rows, 65_536):
            some = bench_streaming.mixture(rng, centers, min(65_536, rows - begin))
            train[begin : begin + len(some)] = some
        file["test"] = bench_streaming.mixture(rng, centers, 4096)
        avq_jax.build_to_disk(
            jax.random.key(0),
            train,
            folder / "index",
            metric="cosine",
            rescore_dtype="int8",
            progress=True,
        )
    return str(path), str(folder / "index")


def queries_of(path: str) -> Any:
    import h5py
    import numpy as np

    with h5py.File(path) as file:
        return file["test"][: max(BATCHES)].astype(np.float32)


def one_process(args: argparse.Namespace) -> None:
    """A process of a run of several: prints its times a batch."""
    os.sched_setaffinity(0, {args.core})
    import jax

    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.address, args.processes, args.process)
    import avq_jax

    index = avq_jax.load(args.index)
    queries = queries_of(args.dataset)
    mesh = jax.make_mesh((args.processes,), ("shards",))
    parts = avq_jax.shard(index, mesh, axis="shards")
    calls = [
        lambda leaves=leaves, some=queries[:count]: avq_jax.search_sharded(
            parts, some, k=10, leaves_to_search=leaves, rescore=100
        )
        for leaves in EFFORTS
        for count in BATCHES
    ]
    # The best round: another program on one of the cores slows all processes down.
    wall = [min(own) for own in times_of(calls, time.perf_counter, args.rounds)]
    cpu = [sorted(own)[len(own) // 2] for own in times_of(calls, time.process_time, args.rounds)]
    print(json.dumps([wall, cpu]), flush=True)


def run_processes(
    args: argparse.Namespace, index: pathlib.Path, processes: int, first: int
) -> list[list[float]]:
    """Wall-clock and CPU time of each kind of batch, on so many cores from one on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    words = ["--dataset", args.dataset, "--index", str(index), "--address", address]
    words += ["--processes", str(processes), "--rounds", str(args.rounds)]
    children = [
        subprocess.Popen(
            [
                *(sys.executable, __file__, *words, "--process", str(process)),
                *("--core", str((first + process) % len(os.sched_getaffinity(0)))),
            ],
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    said = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    return [[max(times) for times in zip(*each, strict=True)] for each in zip(*said, strict=True)]


def by_processes(args: argparse.Namespace, index: Any) -> list[dict[str, Any]]:
    import avq_jax

    found: dict[int, list[list[list[float]]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "index"
        avq_jax.save(index, path)
        for repeat in range(args.repeats):
            for processes, own in found.items():
                own.append(run_processes(args, path, processes, repeat))
    rows = []
    for i, (leaves, count) in enumerate((e, b) for e in EFFORTS for b in BATCHES):
        (one, one_cpu), (two, two_cpu) = (
            [min(times[clock][i] for times in own) / count for clock in (0, 1)]
            for own in found.values()
        )
        row = {
            "leaves_to_search": leaves,
            "queries": count,
            "one_process_us": round(one, 2),
            "two_processes_us": round(two, 2),
            "gain": round(one / two, 2),
            "one_process_cpu_us": round(one_cpu, 2),
            "two_processes_cpu_us": round(two_cpu, 2),
            "cpu_gain": round(one_cpu / two_cpu, 2),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def by_shards(args: argparse.Namespace, index: Any, queries: Any) -> list[dict[str, Any]]:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    import avq_jax

    parts = {}
    for how in args.leaves:
        for shards in SHARDS:
            mesh = Mesh(np.array(jax.devices()[:shards]), ("shards",))
            parts[how, shards] = avq_jax.shard(index, mesh, axis="shards", leaves=how)
    found = []
    for leaves, count in ((e, b) for e in EFFORTS for b in BATCHES):
        options = {"k": 10, "leaves_to_search": leaves, "rescore": 100}
        some = jax.numpy.asarray(queries[:count])
        calls: list[Callable[[], Any]] = [partial(avq_jax.search, index, some, **options)]
        calls += [partial(avq_jax.search_sharded, own, some, **options) for own in parts.values()]
        ids = [np.asarray(call().ids) for call in calls]
        times = times_of(calls, time.process_time, args.rounds)
        plain, *times = (round(float(np.median(own)) / count, 1) for own in times)
        effort = {**options, "queries": count, "search_cpu_us": plain, "shards": []}
        one = {how: us for (how, shards), us in zip(parts, times, strict=True) if shards == 1}
        for (how, shards), us, own in zip(parts, times, ids[1:], strict=True):
            row = {
                "leaves": how,
                "shards": shards,
                "cpu_us": us,
                "times_one_shard": round(us / one[how], 2),
                "same_ids": round(float((own == ids[0]).mean()), 4),
            }
            effort["shards"].append(row)
            print(leaves, count, row, flush=True)
        found.append(effort)
    return found


def main() -> None:
    import record

    parser = record.arguments(__doc__.splitlines()[0], dataset=False, rows=0, rounds=15, repeats=3)
    parser.add_argument("--dataset", default=None, help="ann-benchmarks HDF5 file")
    parser.add_argument("--index", default=None, help="a saved index of the data set")
    parser.add_argument("--leaves", nargs="+", default=["near", "spread"], help="of `shard`")
    parser.add_argument("--process", type=int, default=None, help="number of this process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--address", default="")
    parser.add_argument("--synthetic", type=int, default=None, help="so many rows, made here")
    args = parser.parse_args()
    if args.process is not None:
        return one_process(args)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
    with tempfile.TemporaryDirectory() as folder:
        if args.synthetic is not None:
            args.dataset, args.index = synthetic(args.synthetic, pathlib.Path(folder))
        elif args.dataset is None:
            parser.error("--dataset or --synthetic")
        measure(args)
    return None


def measure(args: argparse.Namespace) -> None:
    import h5py
    import jax
    import numpy as np
    import record

    import avq_jax

    cores = os.sched_getaffinity(0)
    if args.index is None:
        with h5py.File(args.dataset) as file:
            rows = file["train"][: args.rows or None].astype(np.float32)
        index = avq_jax.build(jax.random.key(0), rows, metric="cosine", progress=False)
    else:
        index = avq_jax.load(args.index)
    body = {
        "dataset": pathlib.Path(args.dataset).stem,
        "rows": index.num_rows,
        "processes": by_processes(args, index) if len(cores) > 1 else [],
    }
    os.sched_setaffinity(0, {max(cores)})
    body["efforts"] = by_shards(args, index, queries_of(args.dataset))
    os.sched_setaffinity(0, cores)
    name = "sharded" if args.synthetic is None else f"sharded_{args.synthetic}"
    record.write(name, {**body, **record.environment()}, args.output)


if __name__ == "__main__":
    main()
