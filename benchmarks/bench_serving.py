"""Load test of examples/serve.py, time of an exported program.

    python benchmarks/bench_serving.py --dataset glove.hdf5 --requests 5000

The service runs in a process of its own; a client keeps ``--at-once`` requests of one query on
their way and compares every answer with ``search``.
"""

import asyncio
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import aiohttp
import h5py
import jax
import numpy as np
import record

import avq_jax
from avq_jax.serving import export, load_exported

HERE = pathlib.Path(__file__).resolve().parent


async def load(port, queries, wanted, requests, at_once, child):
    took, wrong = [], 0
    address = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(address + "/health") as answer:
                    if answer.status == 200:
                        break
            except aiohttp.ClientConnectionError:
                assert child.poll() is None, "the service ended"
            await asyncio.sleep(0.2)
        numbers = iter(range(requests))

        async def worker():
            nonlocal wrong
            for i in numbers:
                q = i % len(queries)
                start = time.perf_counter()
                body = {"queries": [queries[q].tolist()]}
                async with session.post(address + "/search", json=body) as answer:
                    found = await answer.json()
                    ok = answer.status == 200 and found["ids"][0] == wanted[q].tolist()
                took.append(time.perf_counter() - start)
                wrong += not ok

        begin = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(at_once)))
        seconds = time.perf_counter() - begin
        async with session.get(address + "/metrics") as answer:
            told = dict(line.rsplit(" ", 1) for line in (await answer.text()).splitlines())
    p50, p95, p99 = np.percentile(np.array(took) * 1e3, [50, 95, 99])
    return {
        "requests": requests,
        "at_once": at_once,
        "wrong": wrong,
        "requests_a_second": round(requests / seconds, 1),
        "milliseconds": {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2)},
        "queries_a_batch": round(
            int(told["avq_queries_total"]) / int(told["avq_batches_total"]), 2
        ),
    }


def cpu_us(function, count, repeats=5):
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(function())
        times.append((time.process_time() - start) / count * 1e6)
    return float(np.median(times))


def main():
    parser = record.arguments(__doc__.splitlines()[0], requests=5000, at_once=32, rows=0)
    args = parser.parse_args()
    with h5py.File(args.dataset) as file:
        rows = file["train"][: args.rows or None].astype(np.float32)
        queries = file["test"][:1000].astype(np.float32)
    options = {"k": 10, "leaves_to_search": 30, "rescore": 100}
    index = avq_jax.build(jax.random.key(0), rows, metric="cosine", progress=False)
    result = {"dataset": pathlib.Path(args.dataset).stem, "rows": len(rows), "settings": options}
    find = avq_jax.searcher(index, **options)
    wanted = np.asarray(avq_jax.search(index, queries, **options).ids)
    with tempfile.TemporaryDirectory() as folder:
        avq_jax.save(index, folder + "/index")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [HERE.parent / "examples" / "serve.py", folder + "/index", "--port", port]
        words += ["--leaves", 30, "--rescore", 100]
        env = {**os.environ, "XLA_FLAGS": ""}
        child = subprocess.Popen(
            [sys.executable, *map(str, words)], env=env, stdout=subprocess.DEVNULL
        )
        try:
            result["http"] = asyncio.run(
                load(port, queries, wanted, args.requests, args.at_once, child)
            )
            child.terminate()
            result["http"]["exit_code"] = child.wait(timeout=30)
        finally:
            child.kill()
            child.wait()
        print(result["http"], flush=True)
        batch = queries[:256]
        result["searcher_cpu_us"] = cpu_us(lambda: find(batch), len(batch))
        for kind in ("xla", "cpu"):
            where = ("cpu",) if kind == "cpu" else ("cpu", "tpu", "cuda")
            export(index, f"{folder}/{kind}", platforms=where, implementation=kind, **options)
            run = load_exported(f"{folder}/{kind}")
            alike = avq_jax.search(index, batch, implementation=kind, **options)
            result[f"exported_{kind}"] = {
                "cpu_us": cpu_us(lambda run=run: run(batch), len(batch)),
                "same_ids": bool((run(batch).ids == np.asarray(alike.ids)).all()),
            }
            print(kind, result[f"exported_{kind}"], flush=True)
    record.write("serving", {**result, **record.environment("aiohttp")}, args.output)


if __name__ == "__main__":
    main()
