"""What accelerators should take to scan codes, by arithmetic, and where codes do not pay.

python benchmarks/roofline.py           predictions, into benchmarks/results/roofline.json
python benchmarks/roofline.py --measure times this machine's TPU or GPU beside them

A scan of n rows for b queries takes the longest of: reading the rows once; multiplying them by the
queries at the peak rate; and, for codes on TPUs, issuing the compiled instructions (bundles of
``aot/baseline.json``, for few and for 128 queries, a line between and beyond) at the clock. Beyond
256 queries the rows are decoded again. Of the two cores of a v4 or v5p the second has work from
then on. Real programs are slower: no latency, no selection of the last k, no launch is counted, and
exact rows are charged bytes and products alone. The predicted columns are of published peaks, not
of a run.

A scan of a tree, 30 of 1,024 leaves of equal size, takes a window and 8 queries or more an entry of
its work list: it reads the window's codes and marks, writes the best of each bin, which the merging
reads again, and issues the bundles of a step. A leaf is wanted by a binomial number of a batch of
at most 256 queries, and decoded once for each group of them. Ranking, lists and merging are left
out. From some batch on a scan of all rows, of codes or exact ones, takes no longer.
"""

import argparse
import json
import math
import pathlib
import time

import record
import tree_problem

HERE = pathlib.Path(__file__).parent
# Published peaks a chip: bytes/s, bfloat16 operations/s, clock in Hz and cores where published.
DEVICES = {
    "v4": (1228e9, 275e12, 1.05e9, 2),
    "v5e": (819e9, 197e12, 1.5e9, 1),
    "v5p": (2765e9, 459e12, 1.75e9, 2),
    "v6e": (1640e9, 918e12, None, 1),
    "tpu7x": (7380e9, 2307e12, None, 2),
    "h100": (3350e9, 989e12, None, 132),
}
M, K, S = 64, 16, 2
BATCHES = (1, 8, 32, 128, 512, 2048)
AGAIN = 256  # queries for which rows are decoded once
ROWS, LEAVES, PROBED, BINS = 1 << 20, 1024, 30, 128  # of the tree, as in aot/programs.py


def predict(device: str, cases: dict) -> dict:
    """Bytes and operations of a row, and nanoseconds a row and batch, for codes and exact rows."""
    bandwidth, peak, clock, cores = DEVICES[device]
    d = M * S
    size = {"codes": M // 2 if device != "h100" else M, "bfloat16": 2 * d, "int8": d}
    few, many = (cases.get(f"{device}/{M}x{K}x{S}/{form}", {}) for form in ("few", "bins"))
    issued = None
    if clock and "bundles_per_128" in few and "bundles_per_128" in many:
        slope = (many["bundles_per_128"] - few["bundles_per_128"]) / (128 - 16)

        def issued(b):
            part = min(b, AGAIN)
            bundles = few["bundles_per_128"] + slope * max(part - 16, 0)
            passes = -(-b // AGAIN)
            return passes * bundles / 128 / (clock * min(cores, passes))

    def seconds(kind: str, b: int) -> float:
        passes = -(-b // AGAIN) if kind == "codes" else 1
        longest = max(passes * size[kind] / bandwidth, 2 * d * b / peak)
        return max(longest, issued(b)) if kind == "codes" and issued else longest

    def crossover() -> int | None:
        """Smallest batch at which exact bfloat16 rows take no longer than codes."""
        return next(
            (b for b in range(1, 4097) if seconds("bfloat16", b) <= seconds("codes", b)), None
        )

    def entries(b: int) -> tuple[float, int]:
        """Entries of the work lists of a batch, and queries of a group, as `worklist.plan_of`."""
        part, lists = min(b, AGAIN), -(-b // AGAIN)
        wanted = 1.5 * part * PROBED / LEAVES
        fewest = 16 if device == "h100" else 8
        group = min(128, max(fewest, 1 << math.ceil(math.log2(max(wanted, 1)))))
        share = PROBED / LEAVES
        chance = [
            math.comb(part, c) * share**c * (1 - share) ** (part - c) for c in range(part + 1)
        ]
        return lists * LEAVES * sum(p * -(-c // group) for c, p in enumerate(chance)), group

    scan = cases.get(f"{device}/{M}x{K}x{S}/tree", {})
    points = scan.get("points", 1.25 * ROWS / LEAVES)

    def tree_work(b: int) -> dict:
        """Bytes and operations of a batch, and seconds."""
        count, group = entries(b)
        moved = count * (points * (size["codes"] + 4) + 2 * group * BINS * 4)
        operations = count * 2 * d * group * points
        longest = max(moved / bandwidth, operations / peak)
        if issued is not None and "bundles_per_128" in scan:
            bundles = scan["bundles_per_128"] + slope * (group - 8)
            longest = max(longest, count * bundles * points / 128 / (clock * cores))
        return {"bytes": moved, "operations": operations, "seconds": longest}

    def tree_crossover(kind: str) -> int | None:
        """Smallest batch at which a scan of all rows takes no longer than the tree."""
        return next(
            (b for b in range(1, 4097) if ROWS * seconds(kind, b) <= tree_work(b)["seconds"]), None
        )

    tree = {b: tree_work(b) for b in BATCHES}
    return {
        "tree": {
            "bytes_a_query": {b: round(w["bytes"] / b) for b, w in tree.items()},
            "operations_a_query": {b: round(w["operations"] / b) for b, w in tree.items()},
            "queries_a_second": {b: round(b / w["seconds"]) for b, w in tree.items()},
            "stops_paying_against_all_codes_at_batch": tree_crossover("codes"),
            "stops_paying_against_bfloat16_rows_at_batch": tree_crossover("bfloat16"),
        },
        "bytes_a_row": size,
        "operations_a_row_and_query": 2 * d,
        "instructions_counted": issued is not None,
        "ns_a_row": {kind: {b: round(seconds(kind, b) * 1e9, 4) for b in BATCHES} for kind in size},
        "queries_a_second_at_a_million_rows": {
            kind: {b: round(b / (seconds(kind, b) * 1e6)) for b in BATCHES} for kind in size
        },
        "codes_stop_paying_at_batch": crossover(),
    }


def measure(n: int) -> dict:
    """Nanoseconds a row and batch on this machine's device: codes and tree by Pallas, exact by XLA.

    The tree's are of its whole search, without rescoring, over all n rows.
    """
    import jax
    import jax.numpy as jnp

    from xla_kernels import FactoredTables, PackedCodes, adc_top_k

    platform = jax.default_backend()
    if platform not in ("tpu", "gpu"):
        raise SystemExit(f"--measure needs a TPU or a GPU; the default device is a {platform}")
    key = jax.random.key(0)
    codes = jax.random.randint(key, (M, n), 0, K, jnp.uint8)
    narrow = platform == "tpu"
    codes = PackedCodes(
        codes.astype(jnp.uint4) if narrow else codes, n, M, K, "nibbles" if narrow else "columns"
    )
    words = jax.random.normal(key, (M, K, S))
    rows = jax.random.normal(key, (n, M * S), jnp.bfloat16)

    @jax.jit
    def quantized(q):
        tables = FactoredTables(q, words)
        name = f"pallas_{platform}"
        return adc_top_k(tables, codes, 10, recall_target=0.95, implementation=name)

    @jax.jit
    def exact(q):
        scores = jnp.dot(q.astype(jnp.bfloat16), rows.T, preferred_element_type=jnp.float32)
        return jax.lax.approx_max_k(scores, 10)

    def nanoseconds(run, q):
        jax.block_until_ready(run(q))
        times = []
        for _ in range(20):
            start = time.perf_counter()
            jax.block_until_ready(run(q))
            times.append(time.perf_counter() - start)
        return round(sorted(times)[len(times) // 2] / n * 1e9, 4)

    problem = tree_problem.make(n, LEAVES, M, K, S)

    @jax.jit
    def probing(q):
        return problem.search(q, PROBED, f"pallas_{platform}")

    ways = {"codes": quantized, "bfloat16": exact, "tree": probing}
    found = {"device": jax.devices()[0].device_kind, "rows": n, **{name: {} for name in ways}}
    for b in BATCHES:
        q = jax.random.normal(jax.random.key(b), (b, M * S))
        for name, run in ways.items():
            found[name][b] = nanoseconds(run, q)
        print(b, *(found[name][b] for name in ways), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time this machine's device too")
    parser.add_argument("--rows", type=int, default=1 << 20)
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    cases = json.loads((HERE / "aot" / "baseline.json").read_text())["cases"]
    result = {
        "environment": record.environment(),
        "codes": f"{M} x {K}, {S} columns each",
        "predicted": {device: predict(device, cases) for device in DEVICES},
        "measured": measure(options.rows) if options.measure else None,
    }
    for device, row in result["predicted"].items():
        print(device, row["ns_a_row"], "codes stop paying at", row["codes_stop_paying_at_batch"])
        print("  tree", row["tree"])
    record.write("roofline", result, options.output)


if __name__ == "__main__":
    main()
