"""Codewords fine-tuned by a ranking loss: recall of the codes alone, before and after.

    python benchmarks/bench_ranking.py --dataset glove6b-100.hdf5

A part of the base rows is searched, other base rows are the sample of queries; the test queries
are asked at the end only. Unit rows, codewords of 16, the default T, exhaustive scoring with float
tables, no rescoring. The standard error is that of the difference of recall 1@10, query by query.
"""

import jax
import numpy as np
import record
from bench_quality import cpu, unit

import avq_jax
from avq_jax.evaluation import read_hdf5
from xla_kernels import adc_top_k, pack_codes


def main(argv=None):
    parser = record.arguments(
        __doc__.partition("\n")[0], rows=40_000, sample=20_000, codes=25, iterations=15, seed=0
    )
    args = parser.parse_args(argv)
    data = read_hdf5(args.dataset)
    base, queries = unit(data.train), unit(data.test)
    draw = np.random.default_rng(args.seed)
    picked = draw.choice(len(base), args.rows + args.sample, replace=False)
    x, asked = base[picked[: args.rows]], base[picked[args.rows :]]
    truth = np.asarray(avq_jax.brute_force(queries, x, k=10).ids)
    weight = avq_jax.Threshold(avq_jax.default_threshold(np.ones(len(x)), dim=x.shape[1]))
    scaling = avq_jax.scaling(weight, np.ones(len(x), np.float32), dim=x.shape[1])
    key, m = jax.random.key(args.seed), args.codes

    def hits(codec):
        codes = pack_codes(
            avq_jax.encode(codec, x, scaling).codes, num_codewords=codec.num_codewords
        )
        ids = np.asarray(adc_top_k(avq_jax.lookup_table(codec, queries), codes, 10)[1])
        return ids[:, 0] == truth[:, 0], np.any(ids == truth[:, :1], axis=1)

    learners = {
        f"PQ {m} x 16": lambda: (
            avq_jax.fit(key, x, scaling, num_subspaces=m, progress=False)[0].codebook
        ),
        f"additive {m} x 16": lambda: avq_jax.fit_additive(
            key, x, scaling, num_codebooks=m, num_iterations=args.iterations, progress=False
        )[0],
    }
    results = []
    for name, learn in learners.items():
        codec, fit_s = cpu(learn)
        (tuned, history), tune_s = cpu(
            lambda codec=codec: avq_jax.fit_ranking(key, codec, x, asked, scaling, progress=False)
        )
        before, after = hits(codec), hits(tuned)
        gap = after[1].astype(float) - before[1]
        row = {
            "name": name,
            "before": {"1@1": float(before[0].mean()), "1@10": float(before[1].mean())},
            "after": {"1@1": float(after[0].mean()), "1@10": float(after[1].mean())},
            "gain_1@10": float(gap.mean()),
            "standard_error": float(gap.std() / np.sqrt(len(gap))),
            "fit_s": fit_s,
            "tune_s": tune_s,
            "loss": [round(float(v), 5) for v in history.loss],
            "held_out": [round(float(v), 5) for v in history.held_out],
        }
        results.append(row)
        print(row, flush=True)
    result = {
        "benchmark": "ranking",
        "environment": record.environment("optax"),
        "dataset": data.name,
        "rows": args.rows,
        "sample": args.sample,
        "queries": len(queries),
        "seed": args.seed,
        "T": float(weight.T),
        "results": results,
    }
    record.write(f"ranking_{data.name}", result, args.output)


if __name__ == "__main__":
    main()
