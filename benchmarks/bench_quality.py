"""Recall of codes of equal size: ours beside the quantizers of FAISS and ScaNN.

Exhaustive scoring of unit rows with float tables, no rescoring; every code of one size, or of those
sizes that are near it (a scale adds four bits; FAISS's RaBitQ stores factors). ``--only`` makes
some groups of systems and keeps the others of an earlier run, with their environment.
Ours are scored by the kernel that searches them; codes behind a tree by their decoded rows, which
order rows as their tables do. Times are CPU seconds (or microseconds) of this process.

    python benchmarks/bench_quality.py --dataset glove6b-100.hdf5 --bits 100
"""

import json
import pathlib
import sys
import time

import jax
import numpy as np
import record

import avq_jax
from avq_jax.evaluation import read_hdf5
from xla_kernels import adc_top_k, pack_codes


def unit(x):
    x = np.asarray(x, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class Task:
    """The data, and what every system is measured by."""

    def __init__(self, args):
        data = read_hdf5(args.dataset)
        self.name, self.bits = data.name, args.bits
        self.x, self.queries = unit(data.train), unit(data.test)
        self.truth = np.asarray(data.neighbors)[:, :100]
        self.n, self.dim = self.x.shape
        rng = np.random.default_rng(args.seed)
        self.picked = np.sort(rng.choice(self.n, min(args.sample, self.n), replace=False))
        self.learn = self.x[self.picked]
        self.key = jax.random.key(args.seed)
        self.iterations, self.leaves = args.iterations, args.leaves
        norms = np.ones(self.n, np.float32)
        self.weight = avq_jax.Threshold(avq_jax.default_threshold(norms, dim=self.dim))
        self.rows = []

    def scaling(self, n):
        return avq_jax.scaling(self.weight, np.ones(n, np.float32), dim=self.dim)

    def recall(self, ids, which=slice(None)):
        ids, truth = np.asarray(ids), self.truth[which]
        hits = [len(np.intersect1d(a, b[:10])) for a, b in zip(ids, truth, strict=True)]
        return {
            "1@1": float(avq_jax.recall_1_at_n(ids, truth, n=1)),
            "1@10": float(avq_jax.recall_1_at_n(ids, truth, n=10)),
            "10@100": float(np.mean(hits) / 10),
        }

    def add(self, name, bits, ids, **more):
        row = {"name": name, "bits": float(bits), **self.recall(ids), **more}
        self.rows.append(row)
        print(row, flush=True)


def cpu(function):
    """Result of a call and its CPU seconds."""
    begin = time.process_time()
    result = jax.block_until_ready(function())
    return result, time.process_time() - begin


def ours(task, name, codec, fit_s, scaling, **options):
    """Encode all rows with a codec, search them by their codes, and time both."""
    codes, encode_s = cpu(lambda: avq_jax.encode(codec, task.x, scaling, **options))
    packed = pack_codes(codes.codes, num_codewords=codec.num_codewords)
    table = jax.jit(avq_jax.lookup_table)
    jax.block_until_ready(table(codec, task.queries))
    tables, table_s = cpu(lambda: table(codec, task.queries))
    found = adc_top_k(tables[:64], packed, 100, gain=codes.gain)
    found, scan_s = cpu(lambda: adc_top_k(tables, packed, 100, gain=codes.gain))
    task.add(
        name,
        codec.bits,
        found[1],
        fit_s=fit_s,
        encode_s=encode_s,
        table_us=1e6 * table_s / len(task.queries),
        scan_ns=1e9 * scan_s / len(task.queries) / task.n,
    )


def run_product(task):
    """Product codes, with and without a rotation by principal axes, and a scale."""
    few, everything = task.scaling(len(task.learn)), task.scaling(task.n)
    m = round(task.bits / 4)
    options = {"num_subspaces": m, "num_iterations": 25, "progress": False}
    (plain, _), fit_s = cpu(lambda: avq_jax.fit(task.key, task.learn, None, **options))
    ours(task, "PQ, reconstruction", plain.codebook, fit_s, None)
    (state, _), fit_s = cpu(lambda: avq_jax.fit(task.key, task.learn, few, **options))
    ours(task, "PQ, score-aware", state.codebook, fit_s, everything)
    scaled, more_s = cpu(lambda: avq_jax.fit_scale(state.codebook, task.learn, few))
    ours(task, "PQ, score-aware, scale", scaled, fit_s + more_s, everything)

    def rotated():
        matrix = avq_jax.rotation(task.key, task.learn, num_subspaces=m)
        turned = task.learn @ np.asarray(matrix).T
        state, _ = avq_jax.fit(task.key, turned, few, **options)
        return avq_jax.Rotated(state.codebook, matrix)

    codec, fit_s = cpu(rotated)
    ours(task, "PQ, score-aware, rotated", codec, fit_s, everything)


def run_chosen(task):
    """Product codes with the rotation that the learner takes by default."""
    options = {"num_subspaces": round(task.bits / 4), "num_iterations": 25, "progress": False}
    few, everything = task.scaling(len(task.learn)), task.scaling(task.n)
    method, choice_s = cpu(
        lambda: avq_jax.choose_rotation(
            task.key, task.learn, few, num_subspaces=options["num_subspaces"]
        )[0]
    )
    (codec, _), fit_s = cpu(
        lambda: avq_jax.fit_rotated(task.key, task.learn, few, method=method, **options)
    )
    name = f"PQ, score-aware, rotation by default: {method}"
    ours(task, name, codec, choice_s + fit_s, everything)


def run_scalar(task):
    """Scalar quantizers whose size is near, rotated, each with a scale of 8 bits."""
    few, everything = task.scaling(len(task.learn)), task.scaling(task.n)
    for levels in (2, 3, 4, 8, 16, 256):
        if not 0.6 < task.dim * np.log2(levels) / task.bits < 1.7:
            continue
        codec, fit_s = cpu(
            lambda levels=levels: avq_jax.fit_scalar(
                task.key, task.learn, few, num_levels=levels, rotate=True
            )
        )
        ours(task, f"scalar, {levels} levels, score-aware", codec, fit_s, everything)


def run_binary(task):
    """Sign codes: SGH as the paper has it, under its loss, and with codes refined under it."""
    few, everything = task.scaling(len(task.learn)), task.scaling(task.n)
    for name, aware, refine, gradient in (
        ("SGH", False, 0, "stochastic_neuron"),
        ("SGH, score-aware", True, 0, "stochastic_neuron"),
        ("signs, score-aware, refined", True, 10, "straight_through"),
    ):
        (codec, _), fit_s = cpu(
            lambda aware=aware, refine=refine, gradient=gradient: avq_jax.fit_binary(
                task.key,
                task.learn,
                few if aware else None,
                num_bits=task.bits,
                gradient=gradient,
                refine=refine,
                progress=False,
            )
        )
        ours(task, name, codec, fit_s, everything if aware else None)


def run_additive(task):
    """Additive codes with and without a scale."""
    few, everything = task.scaling(len(task.learn)), task.scaling(task.n)
    m = round(task.bits / 4)
    (codec, _), fit_s = cpu(
        lambda: avq_jax.fit_additive(
            task.key,
            task.learn,
            few,
            num_codebooks=m,
            num_iterations=task.iterations,
            progress=False,
        )
    )
    ours(task, f"additive {m} x 16, score-aware", codec, fit_s, everything)
    scaled, more_s = cpu(lambda: avq_jax.fit_scale(codec, task.learn, few))
    ours(task, f"additive {m} x 16, score-aware, scale", scaled, fit_s + more_s, everything)


def run_tree(task):
    """The same codes of the residuals behind a tree, the loss along the original rows."""
    tree = avq_jax.build(
        task.key,
        task.x,
        num_leaves=task.leaves,
        num_subspaces=1,
        num_iterations=25,
        rescore_dtype=None,
        progress=False,
    ).tree
    centroids = np.asarray(tree.centroids)
    leaves = np.asarray(avq_jax.brute_force(task.x, centroids, k=1, metric="l2").ids)[:, 0]
    residual = task.x - centroids[leaves]
    few, everything = task.scaling(len(task.learn)), task.scaling(task.n)
    learn = residual[task.picked]

    def add(name, codec, fit_s):
        codes, encode_s = cpu(lambda: avq_jax.encode(codec, residual, everything, direction=task.x))
        rows = centroids[leaves] + np.asarray(avq_jax.decode(codec, codes))
        ids = avq_jax.brute_force(task.queries, rows, k=100).ids
        name = f"{name}, {task.leaves} leaves"
        task.add(name, codec.bits, ids, fit_s=fit_s, encode_s=encode_s)

    m = round(task.bits / 4)
    options = {"num_subspaces": m, "num_iterations": 25, "direction": task.learn}
    (state, _), fit_s = cpu(lambda: avq_jax.fit(task.key, learn, few, progress=False, **options))
    add("PQ, score-aware", state.codebook, fit_s)
    (codec, _), fit_s = cpu(
        lambda: avq_jax.fit_additive(
            task.key,
            learn,
            few,
            num_codebooks=m,
            num_iterations=task.iterations,
            direction=task.learn,
            progress=False,
        )
    )
    add(f"additive {m} x 16", codec, fit_s)
    scaled = avq_jax.fit_scale(codec, learn, few, direction=task.learn)
    add(f"additive {m} x 16, scale", scaled, fit_s)


def run_queries(task):
    """Known queries: all of them, and those of one region, each with a sample from the base.

    The region is the tenth of the queries nearest one of them; its sample is the base rows nearest
    that query, the sample of all queries is drawn from the base at random. No test query is used.
    """
    few = task.scaling(len(task.learn))
    m = round(task.bits / 4)
    state, _ = avq_jax.fit(
        task.key, task.learn, few, num_subspaces=m, num_iterations=15, progress=False
    )
    rng = np.random.default_rng(1)
    anchor = task.queries[rng.integers(len(task.queries))]
    region = np.argsort(-(task.queries @ anchor))[: len(task.queries) // 10]
    count = 4000
    samples = {
        "isotropic loss": None,
        "sample of the base": task.x[rng.choice(task.n, count, replace=False)],
        "sample of the region": task.x[np.argsort(-(task.x @ anchor))[:count]],
    }
    step = 1 << 15
    for name, sample in samples.items():
        rows = np.empty_like(task.x)
        for start in range(0, task.n, step):
            start = min(start, task.n - step)
            part, scaling = task.x[start : start + step], task.scaling(step)
            extra = None
            if sample is not None:
                extra = avq_jax.query_terms(part, sample, task.weight, scaling)
            codes = avq_jax.encode(state.codebook, part, scaling, extra=extra)
            rows[start : start + step] = avq_jax.decode(state.codebook, codes)
        for asked, which in (("all", slice(None)), ("the region's", region)):
            ids = avq_jax.brute_force(task.queries[which], rows, k=100).ids
            row = {"name": f"PQ {m} x 16, {name}", "bits": 4.0 * m, "queries": asked}
            task.rows.append(row | task.recall(ids, which))
            print(task.rows[-1], flush=True)


def run_quips(task):
    """QUIPS in its three variants; half of the queries are its sample, the others are asked."""
    m = round(task.bits / 4)
    half = np.random.default_rng(1).permutation(len(task.queries))[: len(task.queries) // 2]
    asked = np.ones(len(task.queries), bool)
    asked[half] = False
    options = {"num_subspaces": m, "num_iterations": 25, "progress": False}
    few, everything = task.scaling(len(task.learn)), task.scaling(task.n)

    def quips(variant):
        sample = None if variant == "cov_x" else task.queries[half]
        return avq_jax.fit_quips(task.key, task.learn, queries=sample, variant=variant, **options)[
            0
        ]

    def product(scaling):
        return avq_jax.fit(task.key, task.learn, scaling, **options)[0].codebook

    for name, learn, scaling in (
        ("PQ, reconstruction", lambda: product(None), None),
        ("PQ, score-aware", lambda: product(few), everything),
        ("QUIPS cov(x)", lambda: quips("cov_x"), None),
        ("QUIPS cov(q)", lambda: quips("cov_q"), None),
        ("QUIPS opt", lambda: quips("opt"), None),
    ):
        codec, fit_s = cpu(learn)
        codes, encode_s = cpu(lambda c=codec, s=scaling: avq_jax.encode(c, task.x, s))
        tables = avq_jax.lookup_table(codec, task.queries[asked])
        packed = pack_codes(codes.codes, num_codewords=codec.num_codewords)
        row = {"name": name, "bits": codec.bits, "queries": "the half not sampled"}
        row |= task.recall(adc_top_k(tables, packed, 100)[1], asked)
        task.rows.append(row | {"fit_s": fit_s, "encode_s": encode_s})
        print(task.rows[-1], flush=True)


def run_rabitq(task):
    """RaBitQ, ours and FAISS's, of rows less their mean, which keeps the order of scores.

    Beside recall, the share of the scores inside their bounds, for some queries and all rows.
    """
    import faiss

    if abs(task.dim - task.bits) > 0.75 * task.bits:
        return
    centre = task.learn.mean(axis=0)
    rows = task.x - centre
    codec = avq_jax.rabitq(task.key, task.dim)
    codes, encode_s = cpu(lambda: avq_jax.encode(codec, rows))
    # The error of a row along the mean is known: kept as an offset it leaves that of q - mean.
    decoded = np.asarray(avq_jax.decode(codec, codes))
    offset = (rows - decoded) @ centre
    errors = avq_jax.error_norms(codec, codes, rows)
    tables = avq_jax.lookup_table(codec, task.queries)
    packed = pack_codes(codes.codes, num_codewords=codec.num_codewords)
    some = task.queries[:100]
    for name, bits, more, asked in (
        ("RaBitQ, signs and gain", codec.bits, {}, some),
        ("RaBitQ, signs, gain and offset", codec.bits + 32, {"offset": offset}, some - centre),
    ):
        options = {"gain": codes.gain, **more}
        adc_top_k(tables[:64], packed, 100, **options)
        found, scan_s = cpu(lambda o=options: adc_top_k(tables, packed, 100, **o))
        gap = np.abs(asked @ (rows - decoded).T)
        inside = {
            str(e): float((gap <= avq_jax.score_bounds(errors, asked, epsilon=e)).mean())
            for e in (0.3, 1.9, 3.0)
        }
        scan_ns = 1e9 * scan_s / len(task.queries) / task.n
        times = {"fit_s": 0.0, "encode_s": encode_s, "scan_ns": scan_ns}
        task.add(name, bits, found[1], inside_bounds=inside, **times)
    faiss.omp_set_num_threads(1)
    index = faiss.IndexRaBitQ(task.dim, faiss.METRIC_INNER_PRODUCT)
    bits = 8 * index.code_size  # one a dimension, and the factors of a row
    rotation = faiss.RandomRotationMatrix(task.dim, task.dim)
    whole(task, "RaBitQ", bits, faiss.IndexPreTransform(rotation, index))


def decoded(task, name, bits, quantizer, learn, transform=None):
    """A quantizer of FAISS, scored by its decoded rows."""

    def rotate(x):
        return x if transform is None else transform.apply(np.ascontiguousarray(x))

    def train():
        if transform is not None:
            transform.train(learn)
        quantizer.train(rotate(learn))

    _, fit_s = cpu(train)
    codes, encode_s = cpu(lambda: quantizer.compute_codes(rotate(task.x)))
    ids = avq_jax.brute_force(rotate(task.queries), quantizer.decode(codes), k=100).ids
    task.add(f"FAISS {name}", bits, ids, fit_s=fit_s, encode_s=encode_s)


def run_lsq(task):
    """FAISS's local search quantizer, an additive code under the reconstruction loss."""
    import faiss

    faiss.omp_set_num_threads(1)
    m = round(task.bits / 4)
    lsq = faiss.LocalSearchQuantizer(task.dim, m, 4)
    decoded(task, f"LSQ {m} x 16", 4 * m, lsq, task.learn[:20_000])


def whole(task, name, bits, index):
    """An index of FAISS, scored by its own search."""
    _, fit_s = cpu(lambda: index.train(task.learn))
    _, encode_s = cpu(lambda: index.add(task.x))
    (_, ids), scan_s = cpu(lambda: index.search(task.queries, 100))
    scan_ns = 1e9 * scan_s / len(task.queries) / task.n
    task.add(f"FAISS {name}", bits, ids, fit_s=fit_s, encode_s=encode_s, scan_ns=scan_ns)


def run_faiss(task):
    """FAISS's product, optimized product and binary quantizers."""
    import faiss

    faiss.omp_set_num_threads(1)
    d, m = task.dim, round(task.bits / 4)

    few = task.learn[:50_000]
    for count, wide in ((m, 4), (round(task.bits / 8), 8)):
        if abs(count * wide - task.bits) > 4 or count > d:
            continue
        width = -(-d // count) * count
        padded = faiss.OPQMatrix(d, count, width)
        padded.niter, padded.max_train_points = 15, 20_000
        decoded(
            task,
            f"OPQ {count} x {2**wide}",
            count * wide,
            faiss.ProductQuantizer(width, count, wide),
            few,
            padded,
        )
        if d % count == 0:
            pq = faiss.ProductQuantizer(d, count, wide)
            decoded(task, f"PQ {count} x {2**wide}", count * wide, pq, task.learn)

    if task.bits <= d:
        itq = faiss.index_factory(d, f"ITQ{task.bits // 4 * 4},LSHt")
        whole(task, "ITQ", task.bits // 4 * 4, itq)


def run_scann(task):
    """ScaNN's codes alone, exhaustively; the best of its thresholds by 1@10."""
    import scann

    for width in (2, 3, 4, 6, 8, 12, 16):
        count = -(-task.dim // width)
        if abs(4 * count - task.bits) > 4:
            continue
        best = None
        for threshold in (float("nan"), 0.7, 1.0, 1.4, 2.0):
            T = threshold * float(task.weight.T)
            builder = scann.scann_ops_pybind.builder(task.x, 100, "dot_product")
            searcher, fit_s = cpu(
                lambda b=builder, w=width, T=T: b.score_ah(
                    w, anisotropic_quantization_threshold=T, training_sample_size=len(task.learn)
                ).build()
            )
            ids, scan_s = cpu(lambda s=searcher: s.search_batched(task.queries)[0])
            got = task.recall(ids.astype(np.int64))["1@10"]
            if best is None or got > best[0]:
                best = (got, T, ids.astype(np.int64), fit_s, scan_s)
        _, T, ids, fit_s, scan_s = best
        scan_ns = 1e9 * scan_s / len(task.queries) / task.n
        name = f"ScaNN AH, {width} dimensions a code, T={T:.3g}"
        task.add(name, 4 * count, ids, fit_s=fit_s, scan_ns=scan_ns)
        return


def main(argv=None):
    parser = record.arguments(
        __doc__.splitlines()[0], bits=100, sample=100_000, iterations=20, leaves=600, seed=0
    )
    parser.add_argument("--only", nargs="*", default=list(GROUPS), choices=list(GROUPS))
    args = parser.parse_args(argv)
    task = Task(args)
    name = f"quality_{task.name}_{args.bits}"
    earlier = pathlib.Path(args.output or record.RESULTS / f"{name}.json")
    groups = json.loads(earlier.read_text())["groups"] if earlier.exists() else {}
    for group in args.only:
        task.rows = []
        GROUPS[group](task)
        groups[group] = {
            "environment": record.environment("faiss-cpu", "scann"),
            "sample": len(task.learn),
            "iterations": args.iterations,
            "seed": args.seed,
            "results": task.rows,
        }
        result = {
            "benchmark": "quality",
            "dataset": task.name,
            "bits": args.bits,
            "rows": task.n,
            "queries": len(task.queries),
            "T": float(task.weight.T),
            "groups": {group: groups[group] for group in GROUPS if group in groups},
        }
        record.write(name, result, args.output)  # after every group: all of them take an hour


GROUPS = {
    "product": run_product,
    "chosen": run_chosen,
    "additive": run_additive,
    "scalar": run_scalar,
    "binary": run_binary,
    "tree": run_tree,
    "queries": run_queries,
    "quips": run_quips,
    "rabitq": run_rabitq,
    "faiss": run_faiss,
    "lsq": run_lsq,
    "scann": run_scann,
}

if __name__ == "__main__":
    sys.exit(main())
