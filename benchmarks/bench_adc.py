"""The ADC scan against FAISS's fast scan, interleaved on one core; writes a JSON with the ids checked.

Run it pinned, for example ``taskset -c 1 python benchmarks/bench_adc.py --out results.json``. Every
side runs in the same process, one thread, a few calls at a time in turn; a turn's first call is
not counted, so that nobody pays for the caches another side left behind. Reported are medians of
CPU time (which other processes do not inflate) beside the wall clock.

``--simd avx2`` starts again with both sides held to AVX2. ``--dataset`` takes an HDF5 file with
``train`` rows for the int8 part; without it rows are random, and recall is not reported.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time

SIDES_ENVIRONMENT = {
    "avx2": {"XLA_KERNELS_SIMD": "avx2", "FAISS_OPT_LEVEL": "avx2"},
    "portable": {"XLA_KERNELS_SIMD": "portable", "FAISS_OPT_LEVEL": "generic"},
}


def measure(sides, budget, most=40, turn=3):
    """Median seconds a call of each side: {name: (cpu, wall)}."""
    import numpy as np

    times = {name: [] for name in sides}
    start = time.perf_counter()
    while True:
        for name, call in sides.items():
            call()
            for _ in range(turn):
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        done = len(next(iter(times.values())))
        if done >= most or time.perf_counter() - start > budget:
            return {name: tuple(np.median(x, axis=0).tolist()) for name, x in times.items()}


def adc_case(n, m, batches, k, budget, plain_xla):
    """16-entry codes of random points: FAISS adds the points, its own codes go to our kernel."""
    import faiss
    import jax
    import jax.numpy as jnp
    import numpy as np

    import xla_kernels

    rng = np.random.default_rng(0)
    d = 2 * m
    points = rng.standard_normal((n, d), np.float32)
    index = faiss.IndexPQFastScan(d, m, 4, faiss.METRIC_INNER_PRODUCT)
    index.train(points[:20000])
    codes = np.empty((n, m), np.uint8)
    words = faiss.vector_to_array(index.pq.centroids).reshape(m, 16, 2)
    for j in range(m):  # the same assignment as index.add, Euclidean nearest
        part = points[:, 2 * j : 2 * j + 2]
        codes[:, j] = (-2 * part @ words[j].T + (words[j] ** 2).sum(1)).argmin(1)
    index.add(points)
    del points
    packed = jax.block_until_ready(xla_kernels.pack_codes(codes, num_codewords=16))
    columns = xla_kernels.pack_codes(codes, num_codewords=16, layout="columns")

    rows = []
    for b in batches:
        queries = rng.standard_normal((b, d), np.float32)
        tables = jnp.asarray(np.einsum("bms,mks->bmk", queries.reshape(b, m, 2), words))
        search = jax.jit(lambda t, p: xla_kernels.adc_top_k(t, p, k))
        rounded = jax.jit(lambda t, p: xla_kernels.adc_top_k(t, p, k, recall_target=0.9))
        plain = jax.jit(lambda t, p: xla_kernels.adc_top_k(t, p, k, implementation="xla"))

        def gather(t, c):
            sums = jnp.sum(t[0, jnp.arange(m), c], axis=1)
            return jax.lax.top_k(sums, k)

        sides = {
            "faiss": lambda queries=queries: index.search(queries, k),
            "exact": lambda t=tables, s=search: jax.block_until_ready(s(t, packed)),
            "rounded": lambda t=tables, s=rounded: jax.block_until_ready(s(t, packed)),
        }
        if plain_xla and b == 1:
            rowwise, gathered = jnp.asarray(codes), jax.jit(gather)
            sides["plain_xla_columns"] = lambda t=tables: jax.block_until_ready(plain(t, columns))
            sides["plain_xla_gather"] = lambda t=tables: jax.block_until_ready(gathered(t, rowwise))
        spent = measure(sides, budget)

        checked = min(b, 4)
        scores, ids = (np.asarray(x) for x in search(tables, packed))
        sums = np.zeros((checked, n), np.float32)
        for j in range(m):
            sums += np.asarray(tables)[:checked, j][:, codes[:, j]]
        want = np.argsort(-sums, axis=1, kind="stable")[:, :k]
        same = bool((ids[:checked] == want).all())
        exact_scores = bool((scores[:checked] == np.take_along_axis(sums, want, 1)).all())
        faiss_ids = index.search(queries[:checked], k)[1]
        overlap = float(
            np.mean([len(np.intersect1d(x, y)) / k for x, y in zip(faiss_ids, want, strict=True)])
        )
        rounded_ids = np.asarray(rounded(tables, packed)[1])[:checked]
        rounded_overlap = float(
            np.mean([len(np.intersect1d(x, y)) / k for x, y in zip(rounded_ids, want, strict=True)])
        )
        per = {name: [x / n / b * 1e9 for x in spent[name]] for name in spent}
        row = {
            "n": n,
            "m": m,
            "k": 16,
            "results": k,
            "batch": b,
            "ns_per_point_and_query_cpu": {name: round(x[0], 4) for name, x in per.items()},
            "ns_per_point_and_query_wall": {name: round(x[1], 4) for name, x in per.items()},
            "faiss_over_exact": round(per["faiss"][0] / per["exact"][0], 3),
            "faiss_over_rounded": round(per["faiss"][0] / per["rounded"][0], 3),
            "ids_equal_numpy_adc": same,
            "scores_equal_numpy_adc": exact_scores,
            "faiss_overlap_with_numpy_adc": round(overlap, 4),
            "rounded_overlap_with_numpy_adc": round(rounded_overlap, 4),
            # 64 look-ups a cycle; only the VBMI form can reach it.
            "shuffle_bound_ns_at_3.4_GHz": round(-(-m // 4) * 4 / 64 / 3.4, 4),
        }
        bound = row["shuffle_bound_ns_at_3.4_GHz"]
        row["fraction_of_bound"] = round(bound / per["exact"][0], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def environment():
    """Describe what ran: versions, commit, kind of machine, threads."""
    import faiss
    import jax
    import jaxlib
    import numpy as np

    import xla_kernels

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    have = xla_kernels.available_implementations()
    return {
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "faiss": faiss.__version__,
            "numpy": np.__version__,
        },
        "commit": commit,
        "machine": {
            "kind": platform.machine(),
            "simd": have["simd"],
            "faiss_compiled_for": faiss.get_compile_options().strip(),
            "faiss_level": os.environ.get("FAISS_OPT_LEVEL", "automatic"),
            "cores_allowed": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
        },
        "threads": 1,
        "default": have["default"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--dataset", help="HDF5 file with train and test rows, for the int8 part")
    parser.add_argument("--n", type=int, nargs="+", default=[331_479, 1_000_000])
    parser.add_argument("--m", type=int, nargs="+", default=[50, 25])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--results", type=int, default=100)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds a case")
    parser.add_argument("--simd", choices=sorted(SIDES_ENVIRONMENT))
    arguments = parser.parse_args()
    wanted = SIDES_ENVIRONMENT.get(arguments.simd, {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)

    import faiss

    faiss.omp_set_num_threads(1)
    if len(os.sched_getaffinity(0)) != 1:
        print("warning: not pinned to one core; run under taskset -c", file=sys.stderr)
    report = environment() | {"adc": []}
    for n in arguments.n:
        for m in arguments.m:
            report["adc"] += adc_case(
                n,
                m,
                arguments.batches,
                arguments.results,
                arguments.budget,
                plain_xla=n < 500_000,
            )
            if arguments.out:
                with open(arguments.out, "w") as file:
                    json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
