"""Choose the block sizes of the Pallas scans on this machine's TPU or GPU.

python benchmarks/tune_device.py           prints times, and the entry to put into `SIZES`
python benchmarks/tune_device.py --tree    of the tree's kernel

Defaults are frozen in the kernels' modules, so that results do not depend on a tuner's state.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import time

import jax
import jax.numpy as jnp
import record
import tree_problem

GRIDS = {
    "tpu": {"points": (2048, 4096, 8192, 16384), "queries": (64, 128, 256), "batch": (128, 256)},
    "gpu": {"points": (64, 128, 256), "queries": (32, 64, 128), "step": (16, 32), "warps": (4, 8)},
}
TREE_GRIDS = {
    "tpu": {"points": (512, 1024, 2048), "fewest": (8, 16, 32), "batch": (128, 256)},
    "gpu": {"points": (512, 1024, 2048), "fewest": (16, 32, 64), "batch": (128, 256, 512)},
}
LEAVES, PROBED = 1024, 30


@dataclasses.dataclass
class Problem:
    """Codes of n rows and a batch of queries."""

    n: int
    m: int
    k: int
    s: int
    b: int


def seconds(module, platform: str, problem: Problem, sizes) -> float:
    """Median of 10 runs of the scan and its selection."""
    p, key = problem, jax.random.key(0)
    narrow = platform == "tpu" and p.k <= 16
    columns = jax.random.randint(key, (p.m, p.n), 0, p.k, jnp.uint8)
    columns = columns.astype(jnp.uint4 if narrow else jnp.uint8)
    q = jax.random.normal(key, (p.b, p.m, p.s))
    words = jax.random.normal(key, (p.m, p.k, p.s))
    run = jax.jit(
        lambda q, words, columns: module.top_k(
            q, words, columns, None, None, None, k=10, recall_target=0.95, sizes=sizes
        )
    )
    return median(run, q, words, columns)


def tree_seconds(problem: tree_problem.Problem, platform: str, p: Problem, sizes) -> float:
    """Median of 10 searches of a tree, without rescoring."""
    q = jax.random.normal(jax.random.key(0), (p.b, p.m * p.s))
    run = jax.jit(lambda q: problem.search(q, PROBED, f"pallas_{platform}", sizes))
    return median(run, q)


def median(run, *args) -> float:
    """Median seconds of 10 runs, after one to compile."""
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return sorted(times)[5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("n", 1 << 20), ("m", 64), ("k", 16), ("s", 2), ("b", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", default=None)
    parser.add_argument("--tree", action="store_true", help="the kernel of the tree")
    options = vars(parser.parse_args())
    output, tree = options.pop("output"), options.pop("tree")
    problem = Problem(**options)
    platform = jax.default_backend()
    if platform not in GRIDS:
        raise SystemExit(f"tuning needs a TPU or a GPU; the default device is a {platform}")
    where = "tree_search" if tree else "adc"
    module = importlib.import_module(f"xla_kernels.{where}.pallas_{platform}")
    grid, tried = (TREE_GRIDS if tree else GRIDS)[platform], []
    if tree:
        p = problem
        run = functools.partial(tree_seconds, tree_problem.make(p.n, LEAVES, p.m, p.k, p.s))
    else:
        run = functools.partial(seconds, module)
    for values in itertools.product(*grid.values()):
        sizes = module.Sizes()._replace(**dict(zip(grid, values, strict=True)))
        try:
            found = run(platform, problem, sizes)
        except Exception as problem_met:  # a size that the compiler refuses is a result
            print(sizes, "refused:", str(problem_met).splitlines()[0][:100])
            continue
        tried.append((found, sizes))
        print(sizes, f"{1e3 * found:.3f} ms", flush=True)
    if not tried:
        raise SystemExit("no size compiled")
    best = min(tried)
    kind = jax.devices()[0].device_kind
    print(f"SIZES[{kind!r}] = {best[1]}")
    record.write(
        "tuned_tree" if tree else "tuned",
        {
            "environment": record.environment(),
            "device": kind,
            "problem": dataclasses.asdict(problem),
            "tried": [{"seconds": t, **sizes._asdict()} for t, sizes in sorted(tried)],
        },
        output,
    )


if __name__ == "__main__":
    main()
