"""The ADC scan against FAISS's scans, interleaved on one core; ids checked, JSON written.

Run it pinned, for example ``taskset -c 1 python benchmarks/bench_adc.py --out results.json``. All
sides run in the same process, one thread, a few calls at a time in turn; the first calls of a turn
are not counted, so that nobody pays for the caches another side left behind. Reported are medians
of CPU time (which other processes do not inflate) beside the wall clock.

One query is also asked of ``direct_adc_top_k``, which takes the query and makes its table as FAISS
does, without JAX between; the other sides are jitted functions of tables.

Codes of 4 bits run beside ``IndexPQFastScan``; codes of ``--more-bits`` (6 and 8: 64 and 256
codewords) beside ``IndexPQ`` and XLA's gather, at the first of ``--n`` and ``--more-batches``.

``--simd avx2`` starts again with both sides held to AVX2 (ScaNN cannot be held). ``--dataset``
takes an HDF5 file with ``train`` and ``test`` rows for the int8 part, which is left out without it:
the int8 scan beside the fastest exact float32 of the same run (ScaNN's brute force, XLA, NumPy).
"""

import argparse
import importlib.metadata
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


def measure(sides, budget, turn=3, warm=1):
    """Median seconds a call of each side: {name: (cpu, wall)}; at least three turns."""
    import numpy as np

    times = {name: [] for name in sides}
    start = time.perf_counter()
    while True:
        for name, call in sides.items():
            for _ in range(warm):
                call()
            for _ in range(turn):
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
        turns = len(next(iter(times.values()))) // turn
        if turns >= 12 or (turns >= 3 and time.perf_counter() - start > budget):
            return {name: tuple(np.median(x, axis=0).tolist()) for name, x in times.items()}


def adc_case(n, m, batches, k, budget, plain_xla, bits=4):
    """Codes of random points: FAISS learns the codewords, and both sides encode alike."""
    import faiss
    import jax
    import jax.numpy as jnp
    import numpy as np

    import xla_kernels

    rng = np.random.default_rng(0)
    d = 2 * m
    points = rng.standard_normal((n, d), np.float32)
    kind, k_words = (faiss.IndexPQFastScan if bits == 4 else faiss.IndexPQ), 2**bits
    index = kind(d, m, bits, faiss.METRIC_INNER_PRODUCT)
    index.train(points[:20000])
    codes = np.empty((n, m), np.uint8)
    words = faiss.vector_to_array(index.pq.centroids).reshape(m, k_words, 2)
    for j in range(m):  # the same assignment as index.add, Euclidean nearest
        part = points[:, 2 * j : 2 * j + 2]
        codes[:, j] = (-2 * part @ words[j].T + (words[j] ** 2).sum(1)).argmin(1)
    index.add(points)
    del points
    packed = jax.block_until_ready(xla_kernels.pack_codes(codes, num_codewords=k_words))
    columns = xla_kernels.pack_codes(codes, num_codewords=k_words, layout="columns")

    @jax.jit
    def gather(t, c):
        return jax.lax.top_k(jnp.sum(t[0, jnp.arange(m), c], axis=1), k)

    rows = []
    for b in batches:
        queries = rng.standard_normal((b, d), np.float32)
        tables = jnp.asarray(np.einsum("bms,mks->bmk", queries.reshape(b, m, 2), words))
        search = jax.jit(lambda t, p: xla_kernels.adc_top_k(t, p, k))
        rounded = jax.jit(lambda t, p: xla_kernels.adc_top_k(t, p, k, recall_target=0.9))
        plain = jax.jit(lambda t, p: xla_kernels.adc_top_k(t, p, k, implementation="xla"))

        sides = {
            "faiss": lambda queries=queries: index.search(queries, k),
            "exact": lambda t=tables, s=search: jax.block_until_ready(s(t, packed)),
            "rounded": lambda t=tables, s=rounded: jax.block_until_ready(s(t, packed)),
        }
        find = xla_kernels.direct_adc_top_k(packed, k=k, codewords=words)
        if b == 1:
            # Arrays of NumPy in and out, as FAISS; the sides above have their tables made before.
            sides["direct"] = lambda queries=queries, f=find: f(queries)
        # One query of an index that fits a cache is over before the cache is warm: count more.
        spent = measure(sides, budget, *((10, 5) if b == 1 else (1, 0) if b > 500 else (3, 1)))
        if plain_xla and b == 1:
            rowwise, one = jnp.asarray(codes), tables
            spent |= measure(
                {
                    "plain_xla_columns": lambda p=plain, t=one: jax.block_until_ready(
                        p(t, columns)
                    ),
                    "plain_xla_gather": lambda t=one, c=rowwise: jax.block_until_ready(
                        gather(t, c)
                    ),
                },
                budget,
            )

        checked = min(b, 4)
        scores, ids = (np.asarray(x) for x in search(tables, packed))
        sums = np.zeros((checked, n), np.float32)
        for j in range(m):
            sums += np.asarray(tables)[:checked, j][:, codes[:, j]]
        want = np.argsort(-sums, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(sums, want, 1)
        direct_scores, direct_ids = find(queries[:checked])
        same = bool((ids[:checked] == want).all() and (direct_ids == want).all())
        exact_scores = bool((scores[:checked] == best).all() and (direct_scores == best).all())
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
            "k": k_words,
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
        }
        if b == 1:
            row["faiss_over_direct"] = round(per["faiss"][0] / per["direct"][0], 3)
        if bits == 4:
            # One 64-byte shuffle a cycle (Zen 4, Ice Lake); processors with two (Zen 5) pass it.
            bound = round(-(-m // 4) * 4 / 64 / 3.4, 4)
            row["shuffle_bound_ns_at_3.4_GHz"] = bound
            row["fraction_of_bound"] = round(bound / per["exact"][0], 3)
        else:
            row["ns_per_code_cpu"] = {name: round(x[0] / m, 5) for name, x in per.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def int8_case(dataset, budget, b=1024, k=10):
    """Time the flat int8 scan against exact float32 products, all with selection; recall 10@10."""
    import h5py
    import jax
    import jax.numpy as jnp
    import numpy as np
    import scann

    import xla_kernels

    with h5py.File(dataset) as file:
        base = file["train"][:].astype(np.float32)
        queries = file["test"][:b].astype(np.float32)
    base /= np.maximum(np.linalg.norm(base, axis=1, keepdims=True), 1e-9)
    queries /= np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-9)
    b = len(queries) // 64 * 64
    n, queries = len(base), queries[:b]
    scale = np.abs(base).max(axis=1) / 127
    rows = xla_kernels.pack_rows(np.round(base / scale[:, None]).astype(np.int8))
    on_device, asked, scales = jnp.asarray(base), jnp.asarray(queries), jnp.asarray(scale)

    @jax.jit
    def exact(queries, base):
        return jax.lax.map(
            lambda part: jax.lax.top_k(part @ base.T, k), queries.reshape(-1, 64, base.shape[1])
        )

    def numpy_exact():
        found = []
        for start in range(0, b, 64):
            scores = queries[start : start + 64] @ base.T
            best = np.argpartition(scores, n - k, axis=1)[:, n - k :]
            found.append(best)
        return np.concatenate(found)

    # One thread: the parallel form is another method (search_batched_parallel).
    builder = scann.scann_ops_pybind.builder(base, k, "dot_product")
    brute_force = builder.score_brute_force(quantize=False).build()

    scan = jax.jit(lambda q, r, s: xla_kernels.dot_top_k(q, r, k, scale=s))
    unscaled = jax.jit(lambda q, r: xla_kernels.dot_top_k(q, r, k))
    common = float(scale.max())
    even = xla_kernels.pack_rows(np.round(base / common).astype(np.int8))
    spent = measure(
        {
            "int8": lambda: jax.block_until_ready(scan(asked, rows, scales)),
            "int8_common_scale": lambda: jax.block_until_ready(unscaled(asked, even)),
            "xla_float32": lambda: jax.block_until_ready(exact(asked, on_device)),
            "numpy_float32": numpy_exact,
            "scann_float32": lambda: brute_force.search_batched(queries),
        },
        budget,
        turn=1,
        warm=0,
    )
    want = np.asarray(exact(asked, on_device)[1]).reshape(b, k)

    def recall(ids):
        return float(
            np.mean([len(np.intersect1d(x, y)) / k for x, y in zip(ids, want, strict=True)])
        )

    per = {name: round(x[0] / n / b * 1e9, 4) for name, x in spent.items()}
    exact_sides = ("xla_float32", "numpy_float32", "scann_float32")
    fastest = min(per[side] for side in exact_sides)
    row = {
        "n": n,
        "width": base.shape[1],
        "batch": b,
        "ns_per_point_and_query_cpu": per,
        "fastest_float32": min(exact_sides, key=per.get),
        "recall_10_at_10_scann_float32": round(recall(brute_force.search_batched(queries)[0]), 4),
        "fastest_float32_over_int8": round(fastest / per["int8"], 3),
        "fastest_float32_over_int8_common_scale": round(fastest / per["int8_common_scale"], 3),
        "recall_10_at_10": round(recall(np.asarray(scan(asked, rows, scales)[1])), 4),
        "recall_10_at_10_common_scale": round(recall(np.asarray(unscaled(asked, even)[1])), 4),
    }
    print(json.dumps(row), flush=True)
    return row


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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
            "scann": _version("scann"),
        },
        "commit": commit,
        "machine": {
            "kind": platform.machine(),
            "simd": have["simd"],
            "faiss_compiled_for": faiss.get_compile_options().strip(),
            "faiss_level": (
                faiss.SIMDConfig.get_level_name()
                if hasattr(faiss, "SIMDConfig")
                else os.environ.get("FAISS_OPT_LEVEL", "automatic")
            ),
            "cores_allowed": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
        },
        "threads": 1,
        "default": have["default"],
    }


def write(report, path):
    with open(path, "w") as file:
        json.dump(report, file, indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--dataset", help="HDF5 file with train and test rows, for the int8 part")
    parser.add_argument("--n", type=int, nargs="+", default=[331_479, 1_000_000])
    parser.add_argument("--m", type=int, nargs="+", default=[50, 25])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--more-bits", type=int, nargs="*", default=[6, 8], choices=[5, 6, 7, 8])
    parser.add_argument("--more-batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--results", type=int, default=100)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds a case")
    parser.add_argument("--simd", choices=sorted(SIDES_ENVIRONMENT))
    arguments = parser.parse_args()
    wanted = SIDES_ENVIRONMENT.get(arguments.simd, {})
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)

    import faiss

    faiss.omp_set_num_threads(1)
    if arguments.simd and hasattr(faiss, "SIMDConfig"):
        # Since 1.15 one FAISS library chooses at run time, and the variable no longer counts.
        level = {"avx2": faiss.SIMDLevel_AVX2, "portable": faiss.SIMDLevel_NONE}[arguments.simd]
        faiss.SIMDConfig.set_level(level)
    if len(os.sched_getaffinity(0)) != 1:
        print("warning: not pinned to one core; run under taskset -c", file=sys.stderr)
    report = environment() | {"adc": []}
    if arguments.dataset:
        report["int8"] = int8_case(arguments.dataset, arguments.budget)
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
                write(report, arguments.out)
    report["more_codewords"] = []
    for bits in arguments.more_bits:
        for m in arguments.m:
            report["more_codewords"] += adc_case(
                arguments.n[0],
                m,
                arguments.more_batches,
                arguments.results,
                arguments.budget,
                plain_xla=arguments.n[0] < 500_000,
                bits=bits,
            )
            if arguments.out:
                write(report, arguments.out)


if __name__ == "__main__":
    main()
