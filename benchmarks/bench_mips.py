"""Inner products of raw rows, whose norms vary: recall against the codes read for a query.

    python benchmarks/bench_mips.py --dataset glove6b-100.hdf5

"Codes read" counts the codes of all probed leaves, both copies of rows that lie in two, so it
compares indexes whatever their kernels. ScaNN's leaves are read from its serialized index. 100
candidates are rescored, and 10 for the last column. The file needs ``neighbors_ip``, row numbers
by raw inner product; without it they are computed.
"""

import importlib.util
import itertools
import sys
import tempfile
import time

import h5py
import jax
import numpy as np
import record

import avq_jax

PROBED = (5, 10, 15, 20, 25, 30, 40, 60, 120)


def codes_read(centroids, sizes, queries, probed):
    """Codes in the leaves of largest <q, centroid>, mean over queries."""
    scores = queries @ centroids.T
    best = np.argpartition(-scores, min(probed, len(centroids)) - 1, axis=1)[:, :probed]
    return float(sizes[best].sum(axis=1).mean())


def curve(name, search, centroids, sizes, queries, truth):
    """Recalls and codes read at every number of leaves."""
    points = []
    for probed in (*(p for p in PROBED if p < len(sizes)), len(sizes)):
        recall = float(avq_jax.recall_k_at_k(search(queries, probed, 100), truth, k=10))
        read = codes_read(centroids, sizes, queries, probed)
        points.append({"leaves": probed, "codes_read": read, "recall": recall})
        print(f"{name}: {probed} leaves, {read / 1000:.1f}k codes, recall {recall:.4f}", flush=True)
    ten = float(avq_jax.recall_k_at_k(search(queries, len(sizes), 10), truth, k=10))
    print(f"{name}: rescore 10, all leaves: {ten:.4f}", flush=True)
    return {"points": points, "all_leaves_rescore_10": ten}


def ours(x, queries, truth, leaves, soar_lambda):
    begin = time.process_time()
    index = avq_jax.build(
        jax.random.key(0), x, num_leaves=leaves, soar_lambda=soar_lambda, progress=False
    )
    built = time.process_time() - begin
    packed = index.tree.packed
    ends = np.concatenate([[0], np.cumsum(np.asarray(packed.slot_rows) >= 0)])
    sizes = np.diff(ends[np.asarray(packed.starts) * packed.block])

    def search(q, probed, rescore):
        return avq_jax.searcher(index, k=10, leaves_to_search=probed, rescore=rescore)(q).ids

    name = "avq_jax" if soar_lambda is None else f"avq_jax, soar_lambda={soar_lambda:g}"
    result = curve(name, search, np.asarray(index.tree.ranking), sizes, queries, truth)
    memory = index.bytes_per_row.total * len(x)
    return name, {**result, "build_cpu_s": built, "bytes": memory, "settings": repr(index)}


def scann(x, queries, truth, leaves, threshold):
    import scann
    from scann.partitioning import partitioner_pb2

    begin = time.process_time()
    searcher = (
        scann.scann_ops_pybind.builder(x, 10, "dot_product")
        .tree(
            num_leaves=leaves,
            num_leaves_to_search=30,
            training_sample_size=len(x),
            avq=2.5,
            soar_lambda=1.5,
            overretrieve_factor=2.0,
        )
        .score_ah(2, anisotropic_quantization_threshold=threshold)
        .reorder(100)
        .build()
    )
    searcher.set_num_threads(1)
    built = time.process_time() - begin
    with tempfile.TemporaryDirectory() as folder:
        searcher.serialize(folder)
        partitioner = partitioner_pb2.SerializedPartitioner()
        with open(f"{folder}/serialized_partitioner.pb", "rb") as file:
            partitioner.ParseFromString(file.read())
        leaf_of = np.load(f"{folder}/datapoint_to_token.npy").astype(np.int64)
    centers = partitioner.kmeans.kmeans_tree.root.centers
    centroids = np.array([center.dimension for center in centers], np.float32)
    sizes = np.bincount(leaf_of[leaf_of >= 0], minlength=len(centroids))

    def search(q, probed, rescore):
        return searcher.search_batched(
            q,
            final_num_neighbors=10,
            leaves_to_search=probed,
            pre_reorder_num_neighbors=rescore,
        )[0].astype(np.int32)

    name = f"ScaNN, T={threshold:g}, avq=2.5, SOAR"
    result = curve(name, search, centroids, sizes, queries, truth)
    return name, {**result, "build_cpu_s": built}


def recall_at(points, read):
    """Recall at so many codes read, on the line between the settings around it."""
    known = sorted((p["codes_read"], p["recall"]) for p in points)
    for (c0, r0), (c1, r1) in itertools.pairwise(known):
        if c0 <= read <= c1:
            return r0 + (r1 - r0) * (read - c0) / (c1 - c0)
    return None


def read_at(points, recall):
    """Codes read at a recall, likewise."""
    known = sorted((p["recall"], p["codes_read"]) for p in points)
    for (r0, c0), (r1, c1) in itertools.pairwise(known):
        if r0 <= recall <= r1:
            return c0 + (c1 - c0) * (recall - r0) / (r1 - r0)
    return None


def main(argv=None):
    parser = record.arguments(__doc__.splitlines()[0], leaves=600, queries=5000, threshold=1.2)
    args = parser.parse_args(argv)
    with h5py.File(args.dataset) as file:
        x, queries = file["train"][:], file["test"][: args.queries]
        truth = file["neighbors_ip"][: args.queries, :10] if "neighbors_ip" in file else None
    x, queries = np.asarray(x, np.float32), np.asarray(queries, np.float32)
    if truth is None:
        truth = np.asarray(avq_jax.brute_force(queries, x, k=10).ids)
    name = args.dataset.rsplit("/", 1)[-1].removesuffix(".hdf5")
    sides = dict([ours(x, queries, truth, args.leaves, None)])
    sides |= dict([ours(x, queries, truth, args.leaves, 1.0)])
    work = None
    if importlib.util.find_spec("scann"):
        peer, result = scann(x, queries, truth, args.leaves, args.threshold)
        sides[peer] = result
        work = read_at(result["points"], 0.87)
    if work:
        print(f"at the {work / 1000:.1f}k codes where ScaNN reaches .87:")
        for side, result in sides.items():
            result["recall_at_that_work"] = recall_at(result["points"], work)
            print(f"  {side}: {result['recall_at_that_work']}")
    record.write(
        f"mips_{name}",
        {
            "benchmark": "mips",
            "dataset": name,
            "rows": len(x),
            "queries": len(queries),
            "environment": record.environment("scann"),
            "codes_read_by_scann_at_0.87": work,
            "sides": sides,
        },
        args.output,
    )


if __name__ == "__main__":
    sys.exit(main())
