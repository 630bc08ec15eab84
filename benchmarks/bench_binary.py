"""Binary quantization, the table of section 7.7: recall of reconstruction and score-aware codes.

    python benchmarks/bench_binary.py --dataset FILE.hdf5

The base is a seeded sample of the file's rows, scaled to unit length, and the exact answer is
computed on that base. All rows are scored by their codes alone, without rescoring.
"""

import json
import time

import jax
import numpy as np
import record

import avq_jax
from avq_jax.evaluation import read_hdf5

METHODS = {
    # name: score-aware, refine, gradient
    "reconstruction": (False, False, "straight_through"),
    "score-aware": (True, False, "straight_through"),
    "reconstruction, stochastic neuron": (False, False, "stochastic_neuron"),
    "score-aware, stochastic neuron": (True, False, "stochastic_neuron"),
    "reconstruction, refined": (False, True, "straight_through"),
    "score-aware, refined": (True, True, "straight_through"),
}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def measure(key, x, queries, truth, scaling, *, bits, refine, gradient, **options):
    begin = time.perf_counter()
    codec, history = avq_jax.fit_binary(
        key, x, scaling, num_bits=bits, refine=refine, gradient=gradient, progress=False, **options
    )
    fitted = time.perf_counter()
    codes = avq_jax.encode(codec, x, scaling)
    jax.block_until_ready(codes)
    encoded = time.perf_counter()
    x_tilde = avq_jax.decode(codec, codes)
    ids = np.asarray(avq_jax.brute_force(queries, x_tilde, k=100).ids)

    # The seam: sums of table entries are the products with the decoded rows.
    table = np.asarray(avq_jax.lookup_table(codec, queries[0]))
    sums = table[np.arange(len(table)), np.asarray(codes.codes)].sum(axis=1)
    np.testing.assert_allclose(sums, np.asarray(x_tilde @ queries[0]), atol=1e-4)
    found = (ids[:, :100, None] == truth[:, None, :10]).any(axis=1)
    return {
        "recall_1_at_1": avq_jax.recall_1_at_n(ids, truth, n=1),
        "recall_1_at_10": avq_jax.recall_1_at_n(ids, truth, n=10),
        "recall_10_at_10": avq_jax.recall_k_at_k(ids, truth, k=10),
        "recall_10_at_100": float(found.mean()),
        "loss": float(history.loss[-1]),
        "fit_seconds": round(fitted - begin, 1),
        "encode_microseconds_per_row": round(1e6 * (encoded - fitted) / len(x), 2),
    }


def main():
    parser = record.arguments(
        __doc__.partition("\n")[0],
        base=100_000,
        queries=2_000,
        threshold=0.2,
        refine=10,
        steps=2_000,
        seed=0,
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()

    data = read_hdf5(arguments.dataset)
    draw = np.random.default_rng(arguments.seed)
    picks = np.sort(draw.choice(len(data.train), arguments.base, replace=False))
    x, queries = unit(data.train[picks]), unit(data.test[: arguments.queries])
    truth = np.asarray(avq_jax.brute_force(queries, x, k=100).ids)
    norms = np.ones(len(x), np.float32)
    weight = avq_jax.Threshold(arguments.threshold)
    aware = avq_jax.scaling(weight, norms, dim=x.shape[1])

    report = {
        "environment": record.environment("optax"),
        "what": "binary quantization, all rows scored by their codes alone",
        "dataset": data.name,
        "rows": len(x),
        "queries": len(queries),
        "seed": arguments.seed,
        "base": "unit length, drawn by numpy.random.default_rng(seed).choice, sorted",
        "threshold": arguments.threshold,
        "eta": float(avq_jax.eta(weight, 1.0, dim=x.shape[1])),
        "refine_sweeps": arguments.refine,
        "gradient_steps": arguments.steps,
        "results": [],
    }
    for bits in arguments.bits:
        for method in arguments.methods:
            score_aware, refined, gradient = METHODS[method]
            row = {"bits": bits, "method": method} | measure(
                jax.random.key(arguments.seed),
                x,
                queries,
                truth,
                aware if score_aware else None,
                bits=bits,
                refine=arguments.refine if refined else 0,
                gradient=gradient,
                num_steps=arguments.steps,
            )
            report["results"].append(row)
            report["results"].sort(key=lambda row: row["bits"])
            print(json.dumps(row), flush=True)
            record.write("binary", report, arguments.output)


if __name__ == "__main__":
    main()
