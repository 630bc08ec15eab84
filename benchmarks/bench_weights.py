"""Which weight, and whose: families of weights on unit rows, and one eta or many on raw rows.

    python benchmarks/bench_weights.py --dataset glove6b-100.hdf5

Product codes of 16 words, learned on a sample and scored exhaustively by their tables, without
rescoring. On unit rows a weight enters the loss by its ratio eta = h_parallel / h_orthogonal
alone; each family runs over its parameter. On raw rows, searched by inner product, Theorem 3.2
gives every row an eta by its norm and a weight in the mean, h_orthogonal, by its norm. For
thresholds both are also replaced by one number for all rows, that of the median norm; the ratio of
a power is one number by itself.
"""

import jax
import numpy as np
import record

import avq_jax
from avq_jax.evaluation import read_hdf5
from xla_kernels import adc_top_k, pack_codes

FAMILIES = {
    "Threshold(T)": (avq_jax.Threshold, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)),
    "Power(p)": (avq_jax.Power, (0.0, 1.0, 2.0, 4.0, 6.0, 10.0, 20.0)),
    "Exponential(b)": (avq_jax.Exponential, (5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0)),
}
# Of the threshold that suits the median norm; at some, eta and weight are taken apart.
SHARES, TAKEN_APART = (0.5, 1.0, 1.5, 2.0, 2.5), (1.0, 1.5)
POWERS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
LARGEST = 100.0


class Codes:
    """Codes of rows under a loss, and the recall of their exhaustive search."""

    def __init__(self, x, queries, truth, args):
        self.x, self.queries, self.truth, self.args = x, queries, truth, args
        draw = np.random.default_rng(args.seed)
        self.picked = np.sort(draw.choice(len(x), min(args.sample, len(x)), replace=False))

    def recall(self, scaling):
        few = None if scaling is None else jax.tree.map(lambda v: v[self.picked], scaling)
        state, _ = avq_jax.fit(
            jax.random.key(self.args.seed),
            self.x[self.picked],
            few,
            num_subspaces=self.args.subspaces,
            num_iterations=self.args.iterations,
            progress=False,
        )
        codes = avq_jax.encode(state.codebook, self.x, scaling)
        tables = avq_jax.lookup_table(state.codebook, self.queries)
        packed = pack_codes(codes.codes, num_codewords=state.codebook.num_codewords)
        ids = np.asarray(adc_top_k(tables, packed, 100)[1])
        hits = [np.isin(t[:10], i).mean() for t, i in zip(self.truth, ids, strict=True)]
        return {
            "1@1": float(avq_jax.recall_1_at_n(ids, self.truth, n=1)),
            "1@10": float(avq_jax.recall_1_at_n(ids, self.truth, n=10)),
            "10@10": float(avq_jax.recall_k_at_k(ids, self.truth, k=10)),
            "10@100": float(np.mean(hits)),
        }


def families(codes):
    """Recall of each weight at each parameter; rows of unit length."""
    n, d = codes.x.shape
    for family, (weight, values) in FAMILIES.items():
        for value in values:
            scaling = avq_jax.scaling(weight(value), np.ones(n, np.float32), dim=d)
            eta = float(avq_jax.eta(weight(value), 1.0, dim=d))
            row = {"family": family, "value": value, "eta": eta, **codes.recall(scaling)}
            print(row, flush=True)
            yield row


def whose(codes):
    """Recall of weights by the norm of each row, and with an eta or a weight the same for all."""
    n, d = codes.x.shape
    norms = np.linalg.norm(codes.x, axis=1)
    default = avq_jax.default_threshold(norms, dim=d)

    def measured(loss, weight, scaling, **more):
        row = {"loss": loss, "weight": weight, **more, **codes.recall(scaling)}
        print(row, flush=True)
        return row

    yield measured("reconstruction", "Uniform()", None)
    for p in POWERS:
        own = avq_jax.scaling(avq_jax.Power(p), norms, dim=d)
        yield measured("eta of each row, weight of each row", f"Power({p:g})", own)
    for share in SHARES:
        weight = avq_jax.Threshold(share * default)
        name, more = f"Threshold({share * default:.3f})", {"share_of_default": share}
        own = avq_jax.scaling(weight, norms, dim=d)
        yield measured("eta of each row, weight of each row", name, own, **more)
        if share not in TAKEN_APART:
            continue
        across = np.asarray(own.orthogonal)
        # The ratio grows without bound where the norm falls to T, and such rows have next to no
        # weight; in a mean of equal weights they would be all of it.
        ratio = np.minimum(np.asarray(avq_jax.eta(weight, norms, dim=d)), LARGEST)
        one = float(avq_jax.eta(weight, float(np.median(norms)), dim=d))
        for loss, eta, weights in (
            ("one eta, weight of each row", np.full(n, one), across),
            ("eta of each row, one weight", ratio, np.ones(n)),
            ("one eta, one weight", np.full(n, one), np.ones(n)),
        ):
            parts = ((eta * weights).astype(np.float32), weights.astype(np.float32))
            yield measured(loss, name, avq_jax.Scaling(*parts), **more, eta_at_median=one)


def main():
    parser = record.arguments(
        __doc__.partition("\n")[0], sample=100_000, iterations=15, subspaces=50, seed=0
    )
    args = parser.parse_args()
    data = read_hdf5(args.dataset)
    raw = read_hdf5(args.dataset, metric="dot")

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    truth = np.asarray(data.neighbors)[:, :100]
    result = {
        "benchmark": "weights",
        "environment": record.environment(),
        "dataset": data.name,
        "rows": len(data.train),
        "queries": len(data.test),
        "codes": f"{args.subspaces} x 16",
        "sample": args.sample,
        "seed": args.seed,
        "largest_eta_of_equal_weights": LARGEST,
        "families": list(families(Codes(unit(data.train), unit(data.test), truth, args))),
    }
    if raw.neighbors is not None:
        # The length of a query changes no order of rows.
        truth = np.asarray(raw.neighbors)[:, :100]
        result["whose"] = list(whose(Codes(raw.train, unit(raw.test), truth, args)))
    record.write(f"weights_{data.name}", result, args.output)


if __name__ == "__main__":
    main()
