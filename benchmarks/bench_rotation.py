"""Rotations of product codes, fixed and learned with the codewords: recall of the codes alone.

    python benchmarks/bench_rotation.py --dataset sentences-384.hdf5 --codes 32 64

Unit rows, codewords of 16, the default T; exhaustive scoring with float tables, no rescoring. All
rotations go through one learner on the same sample; ``choice`` is what the learner would take by
default, from that sample alone. Times are CPU seconds of this process.
"""

import jax
import record
from bench_quality import Task, cpu, ours

import avq_jax

METHODS = (("none", "pca"), ("random", "pca"), ("pca", "pca"), ("learned", "random"))
METHODS += (("learned", "pca"),)


def main(argv=None):
    parser = record.arguments(
        __doc__.partition("\n")[0], sample=40_000, iterations=25, leaves=1, seed=0, bits=0
    )
    parser.add_argument("--codes", type=int, nargs="+", default=[32, 64])
    args = parser.parse_args(argv)
    task = Task(args)
    few, everything = task.scaling(len(task.learn)), task.scaling(task.n)
    choices = {}
    for m in args.codes:
        (choice, losses), choice_s = cpu(
            lambda m=m: avq_jax.choose_rotation(task.key, task.learn, few, num_subspaces=m)
        )
        choices[str(m)] = {"method": choice, "ranking_losses": losses, "cpu_s": choice_s}
        print(choices, flush=True)
        for method, start in METHODS:
            (codec, _), fit_s = cpu(
                lambda m=m, method=method, start=start: avq_jax.fit_rotated(
                    jax.random.key(args.seed),
                    task.learn,
                    few,
                    num_subspaces=m,
                    num_iterations=args.iterations,
                    method=method,
                    start=start,
                    progress=False,
                )
            )
            name = f"learned from {start}" if method == "learned" else method
            ours(task, f"PQ {m} x 16, rotation {name}", codec, fit_s, everything)
    result = {
        "benchmark": "rotation",
        "environment": record.environment(),
        "dataset": task.name,
        "rows": task.n,
        "queries": len(task.queries),
        "sample": len(task.learn),
        "iterations": args.iterations,
        "seed": args.seed,
        "T": float(task.weight.T),
        "choices": choices,
        "results": task.rows,
    }
    record.write(f"rotation_{task.name}", result, args.output)


if __name__ == "__main__":
    main()
