"""Total CPU time of sharded search, a query, by shards.

    python benchmarks/bench_sharded.py --dataset glove.hdf5

Shards are host devices that share the CPU, so the figure is the CPU time of all of them together,
not latency. ``same_ids`` is against one shard; ``search`` is the same effort without shards, which
keeps R copies of rows where sharded search keeps R rows (rows lie in two leaves here).
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
)

import pathlib
import time

import h5py
import jax
import numpy as np
import record
from jax.sharding import Mesh

import avq_jax

SHARDS = (1, 2, 4, 8)


def cpu_us(function, count, repeats=9):
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(function())
        times.append((time.process_time() - start) / count * 1e6)
    return round(float(np.median(times)), 1)


def main():
    parser = record.arguments(__doc__.splitlines()[0], rows=0, queries=256)
    args = parser.parse_args()
    with h5py.File(args.dataset) as file:
        rows = file["train"][: args.rows or None].astype(np.float32)
        queries = jax.numpy.asarray(file["test"][: args.queries].astype(np.float32))
    index = avq_jax.build(jax.random.key(0), rows, metric="cosine", progress=False)
    found = []
    for leaves in (30, 150):
        options = {"k": 10, "leaves_to_search": leaves, "rescore": 100}
        count = len(queries)
        plain = avq_jax.search(index, queries, **options)
        us = cpu_us(lambda options=options: avq_jax.search(index, queries, **options), count)
        found.append({**options, "search_cpu_us": us, "shards": []})
        first, base = np.zeros(0), 1.0
        for shards in SHARDS:
            mesh = Mesh(np.array(jax.devices()[:shards]), ("shards",))
            parts = avq_jax.shard(index, mesh, axis="shards")

            def run(parts=parts, options=options):
                return avq_jax.search_sharded(parts, queries, **options)

            ids = np.asarray(run().ids)
            first = ids if shards == 1 else first
            us = cpu_us(run, count)
            base = us if shards == 1 else base
            row = {
                "shards": shards,
                "cpu_us": us,
                "times_one_shard": round(us / base, 2),
                "same_ids": float((ids == first).mean()),
                "same_ids_as_search": round(float((ids == np.asarray(plain.ids)).mean()), 4),
            }
            found[-1]["shards"].append(row)
            print(leaves, row, flush=True)
    dataset = pathlib.Path(args.dataset).stem
    body = {"dataset": dataset, "rows": len(rows), "queries": len(queries), "efforts": found}
    record.write("sharded", {**body, **record.environment()}, args.output)


if __name__ == "__main__":
    main()
